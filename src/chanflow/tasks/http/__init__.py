"""The task service over HTTP: an ASGI app with a dashboard, made by `TaskService.asgi`, and a client.

It needs starlette, prometheus-client and httpx: `pip install 'chanflow[http]'`.
"""

try:
    import httpx as _httpx  # noqa: F401
    import prometheus_client as _prometheus_client  # noqa: F401
    import starlette as _starlette  # noqa: F401
except ModuleNotFoundError as _error:
    _message = f"chanflow.tasks.http needs {_error.name}: pip install 'chanflow[http]'"
    raise ModuleNotFoundError(_message, name=_error.name) from None

from chanflow.tasks.http._client import ServiceError, TaskClient, Watch

__all__ = ["ServiceError", "TaskClient", "Watch"]
