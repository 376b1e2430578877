"""The event loop: the home of what waits in it, and the ways to wait."""
