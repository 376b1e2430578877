"""The backends of the bus: one file for each kind of storage."""
