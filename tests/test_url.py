"""URLs of stores and buses: what they may say, and that nothing of their secrets is told."""

from __future__ import annotations

import re
import ssl
import traceback
from typing import Any

import pytest

from chanflow._url import without_secrets
from chanflow.bus import connect
from chanflow.tasks import TaskService
from chanflow.tasks.http import TaskClient
from chanflow.tasks.stores._redis_url import RedisUrl, read_url

SECRET = "s3cret"  # noqa: S105 -- for the tests alone


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:s3cret@host:6379/0", "redis://host:6379/0"),
        ("redis://:s3cret@[::1]:6379", "redis://[::1]:6379"),
        ("redis://s3cret@host", "redis://host"),
        ("redis://host/0?password=s3cret&prefix=app:", "redis://host/0"),
        ("redis://host?password=p@s3cret", "redis://..."),
        ("redis://host/0#s3cret", "redis://host/0"),
        ("unix://user:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis+sentinel://:s3cret@one:1,two:2/service", "redis+sentinel://one:1,two:2/service"),
        ("https://user:s3cret@host/path", "https://host/path"),
        # Where what is not percent-encoded makes it another URL.
        ("redis://:a/s3cret@host", "redis://..."),
        ("redis://user:12/s3cret@host", "redis://..."),
        ("redis://user:12?s3cret@host", "redis://..."),
        ("redis://user:12#s3cret@host", "redis://..."),
        ("redis://:a@b/s3cret@host", "redis://..."),
        ("redis://:s3cret", "redis://..."),
        ("redis://[s3cret", "redis://..."),
        ("redis:///:s3cret@host", "redis://..."),
        ("s3cret@redis://host", "://..."),
        ("redis:s3cret@host", "..."),
        ("tasks.db", "tasks.db"),
        ("tasks.db?key=s3cret", "tasks.db"),
    ],
)
def test_without_secrets(url: str, told: str) -> None:
    """User information, query and fragment are left out; where it isn't sure what they are, all but the scheme."""
    assert without_secrets(url) == told


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("redis://host", {"hosts": [("host", 6379)]}),
        ("redis://host:1/2", {"hosts": [("host", 1)], "db": 2}),
        ("redis://[::1]:1", {"hosts": [("::1", 1)]}),
        ("redis://[::1]", {"hosts": [("::1", 6379)]}),
        ("redis://host?db=3", {"hosts": [("host", 6379)], "db": 3}),
        (
            "redis://us%2Fer%40:p%40ss%3A%2F%3F%23%25@host",
            {"hosts": [("host", 6379)], "username": "us/er@", "password": "p@ss:/?#%"},
        ),
        ("redis://:a:b@host", {"hosts": [("host", 6379)], "password": "a:b"}),
        (
            "redis://host?username=user&password=a%26b",
            {"hosts": [("host", 6379)], "username": "user", "password": "a&b"},
        ),
        (
            "redis://host?connect_timeout=0.5&stream_timeout=600&client_name=app",
            {"hosts": [("host", 6379)], "connect_timeout": 0.5, "stream_timeout": 600.0, "client_name": "app"},
        ),
        ("redis://host?prefix=app%3A", {"hosts": [("host", 6379)], "prefix": "app:"}),
        ("unix:///run/my%20redis.sock?db=1", {"path": "/run/my redis.sock", "db": 1}),
        ("unix://user:word@/run/redis", {"path": "/run/redis", "username": "user", "password": "word"}),
        (
            "redis+cluster://one,two:2",
            {"kind": "cluster", "hosts": [("one", 6379), ("two", 2)], "prefix": "{chanflow:tasks}:"},
        ),
        ("redis+cluster://one?prefix={app}", {"kind": "cluster", "hosts": [("one", 6379)], "prefix": "{app}"}),
        (
            "redis+sentinel://user:word@one,two:2/main/1?sentinel_username=watch&sentinel_password=man",
            {
                "kind": "sentinel",
                "hosts": [("one", 26379), ("two", 2)],
                "service": "main",
                "db": 1,
                "username": "user",
                "password": "word",
                "sentinel_username": "watch",
                "sentinel_password": "man",
            },
        ),
    ],
)
def test_urls_of_redis(url: str, read: dict[str, object]) -> None:
    """Each form is read, with its parts decoded."""
    expected: dict[str, Any] = {"kind": "server", "hosts": [], "prefix": "chanflow:tasks:", **read}
    assert read_url(url) == RedisUrl(without_secrets(url), **expected)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("redis:/:s3cret@host", "store must be redis://"),
        ("redis://:s3cret", "store must be redis://"),
        ("redis://:s/s3cret@host", "store must be redis://"),
        ("rediz://:s3cret@host", "store must be memory://"),
        ("redis+pool://:s3cret@host", "store must be redis://"),
        ("redis://:s3cret@", "redis:// must name a host"),
        ("redis://:s3cret@:6379", "redis://:6379 must name a host"),
        ("redis+cluster://one,,two", "redis+cluster://one,,two must name a host"),
        ("redis://:s3cret@host#x", "redis://host must have no fragment: write %23 for #"),
        ("redis://:s3cret@host:0", "redis://host:0 must have a port from 1 to 65535, got 0"),
        ("redis://:s3cret@host:65536", "redis://host:65536 must have a port from 1 to 65535, got 65536"),
        ("redis://:s3cret@host/main", "redis://host/main must have the number of a database"),
        ("redis://:s3cret@host?db=-1", "redis://host must have the number of a database"),
        (
            "redis://:s3cret@host?stream_timeout=0",
            "redis://host must have a stream_timeout in seconds, > 0 and <= 600, got '0'",
        ),
        (
            "redis://host?connect_timeout=soon",
            "redis://host must have a connect_timeout in seconds, > 0 and <= 600, got 'soon'",
        ),
        (
            "redis://host?connect_timeout=nan",
            "redis://host must have a connect_timeout in seconds, > 0 and <= 600, got 'nan'",
        ),
        (
            "redis://host?pasword=s3cret",
            (
                "redis://host may have the options client_name, connect_timeout, db, password, prefix, stream_timeout, "
                "username, but has 'pasword'"
            ),
        ),
        (
            "redis://host?s3cret%20",
            (
                "redis://host may have the options client_name, connect_timeout, db, password, prefix, stream_timeout, "
                "username, but has another"
            ),
        ),
        ("redis://host?password=s3cret&password=s3cret", "redis://host has an option twice"),
        ("redis://host?prefix=", "redis://host must have a prefix that is a str and not empty, got ''"),
        ("redis+cluster://host/1", "redis+cluster://host/1 must have no database: a cluster has one only"),
        (
            "redis+cluster://host?prefix=app:",
            "redis+cluster://host must have a prefix with a part in braces, as {app}:, got 'app:'",
        ),
        (
            "redis+cluster://host?prefix={}app",
            "redis+cluster://host must have a prefix with a part in braces, as {app}:, got '{}app'",
        ),
        (
            "redis+sentinel://:s3cret@host",
            (
                "redis+sentinel://host must name the service that the sentinels watch: "
                "redis+sentinel://HOST,HOST.../SERVICE"
            ),
        ),
        ("unix://host/run/redis", "unix://host/run/redis must be unix:///PATH"),
        ("unix:///", "unix:/// must be unix:///PATH"),
        (
            "rediss://host?ssl_cert_reqs=maybe",
            "rediss://host must have an ssl_cert_reqs of required or none, got 'maybe'",
        ),
        (
            "rediss://host?ssl_check_hostname=1",
            "rediss://host must have an ssl_check_hostname of true or false, got '1'",
        ),
        ("rediss://:s3cret@host?ssl_certfile=/missing", "rediss://host: ssl_ca_certs, ssl_certfile and ssl_keyfile"),
        (
            "rediss://:s3cret@host?ssl_ca_certs=/missing",
            (
                "rediss://host: ssl_ca_certs, ssl_certfile and ssl_keyfile must be files in PEM form: "
                "[Errno 2] No such file or directory"
            ),
        ),
    ],
)
def test_urls_that_are_refused(url: str, rule: str) -> None:
    """One clear error, and no secret in it, nor in those behind it."""
    with pytest.raises(ValueError, match=re.escape(rule)) as caught:
        TaskService(store=url)
    assert SECRET not in "".join(traceback.format_exception(caught.value, limit=0))


def test_a_prefix_is_named_once() -> None:
    """By the URL, or by the argument."""
    assert read_url("redis://host", "app:").prefix == "app:"
    with pytest.raises(ValueError, match=r"^redis://host has a prefix already, so that prefix must be None$"):
        read_url("redis://host?prefix=app:", "app:")


def test_tls() -> None:
    """The server is known by its certificate and name, unless one says that it isn't."""
    context = read_url("rediss://host").ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    context = read_url("rediss://host?ssl_check_hostname=false").ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)
    context = read_url("rediss+cluster://host?ssl_cert_reqs=none").ssl_context
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_NONE, False)


@pytest.mark.parametrize("url", ["postgres://user:s3cret@host/db", "user:s3cret@host", "amqp://host?password=s3cret"])
def test_a_url_of_nothing(url: str) -> None:
    """What is refused is told without its secrets, by stores and by buses."""
    for refused in (lambda: TaskService(store=url), lambda: connect(url), lambda: TaskService(bus=url)):
        with pytest.raises(ValueError, match=r"must be memory://") as caught:
            refused()
        assert SECRET not in str(caught.value)


def test_what_is_no_url() -> None:
    """It may be one in other clothes, and so is not told."""
    url: Any = b"redis://:s3cret@host"
    for refused in (lambda: TaskService(store=url), lambda: connect(url), lambda: TaskClient(url)):
        with pytest.raises(TypeError, match=r" must be a str( or a Store| or a Backend)?, got a bytes$"):
            refused()


def test_what_is_shown_has_no_secret() -> None:
    """Neither a service, nor its store, nor what was read of a URL shows one."""
    url = "redis://user:s3cret@host?prefix=app:"
    service = TaskService(store=url)
    for each in service, service._store, read_url(url), service.bus:
        assert SECRET not in repr(each)
    assert repr(service._store) == "<RedisStore redis://host>"
