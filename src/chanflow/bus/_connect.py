"""Create a bus from a URL."""

from __future__ import annotations

from pathlib import Path

from chanflow._check import check_count, check_seconds, show
from chanflow._url import without_secrets
from chanflow.bus._bus import Bus
from chanflow.bus.backend import Backend

__all__ = ["connect"]


def connect(url: str | Backend, *, max_pending: float = 10_000, retention: float = 0.0) -> Bus:
    """Create a bus, which connects when its block is entered.

    Args:
        url: where messages are stored: `memory://` for the memory of this process, as long as the bus is open;
            `sqlite:///file.db` for a file relative to the current directory, `sqlite:////var/lib/file.db` for an
            absolute path; or a backend of your own.
        max_pending: how many messages of a topic may wait for the group that is furthest behind before
            `publish` waits, at least 1; `math.inf` for no limit. Dead letters are always accepted.
        retention: how many seconds to keep a message that every group has settled, for groups that are created
            later; at least 0, `math.inf` to keep it forever.

    Raises:
        ValueError: `url` is not one of these, or a number is out of its bounds.
        TypeError: an argument has the wrong type.
    """
    check_count("max_pending", max_pending, 1, infinite=True)
    check_seconds("retention", retention)
    if isinstance(url, Backend):
        return Bus(url)
    if not isinstance(url, str):
        msg = f"url must be a str or a Backend, got a {type(url).__name__}"
        raise TypeError(msg)
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "memory" and not rest:
        from chanflow.bus.backends.memory import MemoryBackend  # noqa: PLC0415 -- backends are imported on first use

        return Bus(MemoryBackend(max_pending=max_pending, retention=retention))
    if separator and scheme == "sqlite" and len(rest) > 1 and rest.startswith("/"):
        from chanflow.bus.backends.sqlite import SqliteBackend  # noqa: PLC0415 -- as above

        return Bus(SqliteBackend(Path(rest[1:]).absolute(), max_pending=max_pending, retention=retention))
    msg = f"url must be memory:// or sqlite:///PATH, got {show(without_secrets(url))}"
    raise ValueError(msg)
