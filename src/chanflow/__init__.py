"""Go's goroutines, channels, select and worker groups for asyncio and trio."""

from importlib import import_module
from typing import TYPE_CHECKING

from chanflow._channel._ends import Channel as Channel
from chanflow._channel._ends import ReceiveChannel as ReceiveChannel
from chanflow._channel._ends import SendChannel as SendChannel
from chanflow._channel._select import After as After
from chanflow._channel._select import Case as Case
from chanflow._channel._select import Selectable as Selectable
from chanflow._channel._select import Send as Send
from chanflow._channel._select import Ticker as Ticker
from chanflow._channel._select import after as after
from chanflow._channel._select import select as select
from chanflow._channel._select import select_nowait as select_nowait
from chanflow._channel._select import ticker as ticker
from chanflow._channel._state import ChannelStatistics as ChannelStatistics
from chanflow._channel._threads import ThreadChannel as ThreadChannel
from chanflow._loop._home import set_checkpoint_interval as set_checkpoint_interval
from chanflow._work._group import Group as Group
from chanflow._work._group import Result as Result
from chanflow._work._group import ResultCancelledError as ResultCancelledError

if TYPE_CHECKING:
    from chanflow._work._retry import Retry as Retry
    from chanflow._work._workers import DeadLetter as DeadLetter
    from chanflow._work._workers import WorkerGroup as WorkerGroup
    from chanflow._work._workers import WorkerStatistics as WorkerStatistics

__all__ = [
    "After",
    "Case",
    "Channel",
    "ChannelStatistics",
    "DeadLetter",
    "Group",
    "ReceiveChannel",
    "Result",
    "ResultCancelledError",
    "Retry",
    "Selectable",
    "Send",
    "SendChannel",
    "ThreadChannel",
    "Ticker",
    "WorkerGroup",
    "WorkerStatistics",
    "after",
    "select",
    "select_nowait",
    "set_checkpoint_interval",
    "ticker",
]

__version__ = "0.1.0"

# Worker groups import attrs and more; programs that use only channels should not pay for that.
_LATER = {
    "DeadLetter": "_work._workers",
    "Retry": "_work._retry",
    "WorkerGroup": "_work._workers",
    "WorkerStatistics": "_work._workers",
}


def __getattr__(name: str) -> object:
    """Import a lazily loaded name on first use."""
    if name not in _LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    value.__module__ = __name__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Users import these names from here, so tracebacks and the documentation name this module too.
for _name in __all__:
    if _name not in _LATER:
        globals()[_name].__module__ = __name__
