"""Channels: their state, their ends, their side for threads, and `select`."""
