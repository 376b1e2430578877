"""From a URL to a store."""

from __future__ import annotations

from pathlib import Path

from chanflow._check import show
from chanflow._url import without_secrets
from chanflow.tasks.store import Store

__all__ = ["open_store"]


def open_store(store: str | Store) -> Store:
    """Make the store that a URL names.

    Raises:
        ValueError: it names none.
        TypeError: it is neither a URL nor a store.
    """
    if isinstance(store, Store):
        return store
    if not isinstance(store, str):
        msg = f"store must be a str or a Store, got a {type(store).__name__}"
        raise TypeError(msg)
    if store == "memory://":
        from chanflow.tasks.stores.memory import MemoryStore  # noqa: PLC0415 -- each is imported where it is used

        return MemoryStore()
    if store.startswith(("redis:", "rediss:", "redis+", "rediss+", "unix:")):
        try:
            from chanflow.tasks.stores.redis import RedisStore  # noqa: PLC0415 -- as above
        except ModuleNotFoundError as error:
            msg = f"a store in Redis needs {error.name}: pip install 'chanflow[redis]'"
            raise ModuleNotFoundError(msg, name=error.name) from None

        return RedisStore(store)
    path = store.removeprefix("sqlite:///")
    if path and path != store:
        from chanflow.tasks.stores.sqlite import SqliteStore  # noqa: PLC0415 -- as above

        return SqliteStore(Path(path).absolute())
    msg = f"store must be memory://, sqlite:///PATH or redis://HOST, got {show(without_secrets(store))}"
    raise ValueError(msg)
