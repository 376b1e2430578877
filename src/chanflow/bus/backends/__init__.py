"""Where messages are kept: a file for each kind of place."""
