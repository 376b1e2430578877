"""The event loop: homes, waiters, waiting rooms and signals."""
