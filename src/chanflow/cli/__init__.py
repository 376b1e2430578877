"""The command: a file for each of its parts."""
