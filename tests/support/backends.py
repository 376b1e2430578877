"""Tests for one event loop only."""

from __future__ import annotations

import pytest

native = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
"""For what only asyncio has: cancellation of a task from outside of any scope."""
