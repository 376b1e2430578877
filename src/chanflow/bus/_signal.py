"""A wake-up call that is never lost and never piles up."""

from __future__ import annotations

from chanflow._channel import Channel

__all__ = ["signal"]


def signal() -> Channel[None]:
    """Make what wakes one waiter, or the next that comes; whoever has nothing to do with it passes it on."""
    return Channel(1, overflow="drop_newest")
