"""Our own backends under the conformance suite, and broken ones, which it must find out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chanflow.bus import Bus, connect
from chanflow.bus.conformance import BusConformance
from tests.support.paths import another_way


class TestMemory(BusConformance):
    @pytest.fixture
    def open_bus(self) -> Callable[..., Bus]:
        return lambda **options: connect("memory://", **options)


@pytest.mark.real_time  # Its times are those of the machine's clock.
class TestSqlite(BusConformance):
    # Longer than a busy machine takes to write to its disk.
    ack_deadline = 1.0

    @pytest.fixture
    def open_bus(self, tmp_path: Path) -> Callable[..., Bus]:
        return lambda **options: connect(f"sqlite:///{another_way(tmp_path / 'bus.db')}", **options)
