"""A bus whose backend fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from chanflow.bus import StorageError
from chanflow.bus.backends.memory import MemoryBackend


class Faulty(MemoryBackend):
    """A backend whose members do in some calls what a test says."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        super().__init__(max_pending=math.inf, retention=0.0)
        self.calls = calls

    async def join(self, membership: Any) -> Any:
        if "join" in self.calls:
            await self.calls["join"]()
        member = await super().join(membership)
        for name, call in self.calls.items():
            setattr(member, name, partial(call, getattr(member, name, None)))
        return member


async def fail(*_arguments: Any, **_options: Any) -> Any:
    msg = "the disk is gone"
    raise StorageError(msg)
