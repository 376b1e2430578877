"""What is true of every channel when a test is over."""

from __future__ import annotations

from typing import Any

from chanflow import Channel


def assert_at_rest(*channels: Channel[Any]) -> None:
    """Check that nobody waits on these channels, nothing is reserved, and no item is unaccounted for."""
    for channel in channels:
        figures = channel.statistics()
        assert figures.tasks_waiting_send == figures.tasks_waiting_receive == channel._state.reserved == 0, channel
        assert figures.sent == figures.received + figures.dropped + figures.current_buffer_used, channel
