"""Go's goroutines, channels, select and worker groups for asyncio and trio."""

from chanflow._channel import Channel as Channel
from chanflow._channel import ReceiveChannel as ReceiveChannel
from chanflow._channel import SendChannel as SendChannel
from chanflow._group import Group as Group
from chanflow._group import Result as Result
from chanflow._group import ResultCancelledError as ResultCancelledError
from chanflow._park import set_checkpoint_interval as set_checkpoint_interval
from chanflow._retry import Retry as Retry
from chanflow._select import After as After
from chanflow._select import Case as Case
from chanflow._select import Selectable as Selectable
from chanflow._select import Send as Send
from chanflow._select import Ticker as Ticker
from chanflow._select import after as after
from chanflow._select import select as select
from chanflow._select import select_nowait as select_nowait
from chanflow._select import ticker as ticker
from chanflow._state import ChannelStatistics as ChannelStatistics
from chanflow._threads import ThreadChannel as ThreadChannel
from chanflow._workers import DeadLetter as DeadLetter
from chanflow._workers import WorkerGroup as WorkerGroup
from chanflow._workers import WorkerStatistics as WorkerStatistics

# Users find them here, and so should tracebacks and the documentation.
for _value in list(vars().values()):
    if getattr(_value, "__module__", "").startswith("chanflow."):
        _value.__module__ = __name__
