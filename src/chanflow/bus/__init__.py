"""Messages between the parts of a service: topics, consumer groups, acknowledgement, retries and dead letters.

:func:`connect` returns a :class:`Bus` in the memory of this process or in an SQLite file.
"""

from chanflow._errors import StorageError
from chanflow.bus._bus import Bus, DeadMessage
from chanflow.bus._connect import connect
from chanflow.bus._subscription import LeaseLostError, Message, Subscription
from chanflow.bus.backend import Backend, Capabilities, Content, Delivery, Member, Membership, Origin

__all__ = [
    "Backend",
    "Bus",
    "Capabilities",
    "Content",
    "DeadMessage",
    "Delivery",
    "LeaseLostError",
    "Member",
    "Membership",
    "Message",
    "Origin",
    "StorageError",
    "Subscription",
    "connect",
]
