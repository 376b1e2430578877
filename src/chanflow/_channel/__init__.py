"""The channel: its state, its ends, the side for threads, and select."""
