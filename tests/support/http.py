"""The time of the HTTP app."""

from __future__ import annotations

import time
from types import SimpleNamespace

import anyio
import pytest

from chanflow.tasks.http import _app, _live


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the app tell the time by the event loop, whose time is virtual."""
    clock = SimpleNamespace(monotonic=anyio.current_time, time=time.time)
    for module in (_app, _live):
        monkeypatch.setattr(module, "time", clock)
