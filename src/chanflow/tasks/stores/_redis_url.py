"""The URL of a Redis: where it is, who asks, and how long to wait for it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import parse_qsl, unquote

from attrs import field, frozen

from chanflow._check import show
from chanflow._url import without_secrets

__all__ = ["RedisUrl", "read_url"]

Kind = Literal["server", "cluster", "sentinel"]

SCHEMES: Mapping[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
}
"""What each names, and whether over TLS."""
PORTS: Mapping[Kind, int] = {"server": 6379, "cluster": 6379, "sentinel": 26379}
PREFIXES: Mapping[Kind, str] = {
    "server": "chanflow:tasks:",
    "sentinel": "chanflow:tasks:",
    # A cluster keeps on one node all keys that have the same text in braces.
    "cluster": "{chanflow:tasks}:",
}
TIMEOUT = 5.0
MOST_SECONDS = 600.0
VERIFY = {"none": ssl.CERT_NONE, "required": ssl.CERT_REQUIRED}
ANY = {"prefix", "username", "password", "connect_timeout", "stream_timeout", "client_name"}
OPTIONS: Mapping[Kind, set[str]] = {
    "server": {"db"},
    "cluster": set(),
    "sentinel": {"db", "sentinel_username", "sentinel_password"},
}
TLS_OPTIONS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}


@frozen
class RedisUrl:
    """What a URL says."""

    place: str
    """The URL without its secrets."""
    kind: Kind
    hosts: Sequence[tuple[str, int]]
    """One, or several nodes or sentinels; none for a socket."""
    path: str = ""
    """Of a socket."""
    service: str = ""
    """What the sentinels call it."""
    prefix: str = ""
    """What all keys begin with."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    connect_timeout: float = TIMEOUT
    stream_timeout: float = TIMEOUT
    """Seconds to wait for an answer."""
    client_name: str | None = None
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def secrets(self) -> Sequence[str]:
        """What must be in no message."""
        return [each for each in (self.password, self.sentinel_password) if each]


def read_url(url: str, prefix: str | None = None) -> RedisUrl:
    """Read the URL of a Redis.

    Args:
        url: see `RedisStore`.
        prefix: what all keys begin with; None for what the URL says, or the default.

    Raises:
        ValueError: it is no such URL. The message has none of its secrets.
    """
    place = without_secrets(url)
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES or place.endswith("://..."):
        msg = (
            "store must be redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// for TLS, unix:///PATH, "
            "redis+cluster://HOST,HOST... or redis+sentinel://HOST,HOST.../SERVICE[/DATABASE], with what is not a "
            f"letter or digit percent-encoded in USER and PASSWORD, got {show(place)}"
        )
        raise ValueError(msg)
    kind, encrypted = SCHEMES[scheme]
    rest, _, fragment = rest.partition("#")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if fragment:
        refuse(place, "must have no fragment: write %23 for #")
    user_information, _, hosts = authority.rpartition("@")
    username, _, password = user_information.partition(":")
    options = read_options(place, query, ANY | OPTIONS[kind] | (TLS_OPTIONS if encrypted else set()))
    service = db = ""
    if scheme == "unix":
        if hosts or not path:
            refuse(place, "must be unix:///PATH")
    elif kind == "sentinel":
        service, _, db = unquote(path).partition("/")
        if not service:
            refuse(place, "must name the service that the sentinels watch: redis+sentinel://HOST,HOST.../SERVICE")
    else:
        db = path
    if kind == "cluster" and db not in {"", "0"}:
        refuse(place, "must have no database: a cluster has one only")
    if scheme != "unix" and not all(host.partition(":")[0] for host in hosts.split(",")):
        refuse(place, "must name a host")
    if prefix is not None and "prefix" in options:
        refuse(place, "has a prefix already, so that prefix must be None")
    prefix = options.get("prefix", PREFIXES[kind] if prefix is None else prefix)
    check_prefix(place, kind, prefix)
    return RedisUrl(
        place,
        kind,
        hosts=[read_host(place, host, PORTS[kind]) for host in hosts.split(",") if host],
        path=f"{slash}{unquote(path)}" if scheme == "unix" else "",
        service=service,
        prefix=prefix,
        db=read_database(place, options.get("db", db)),
        username=options.get("username", unquote(username)) or None,
        password=options.get("password", unquote(password)) or None,
        sentinel_username=options.get("sentinel_username"),
        sentinel_password=options.get("sentinel_password"),
        connect_timeout=read_seconds(place, "connect_timeout", options),
        stream_timeout=read_seconds(place, "stream_timeout", options),
        client_name=options.get("client_name"),
        ssl_context=make_context(place, options) if encrypted else None,
    )


def refuse(place: str, rule: str) -> None:
    """Raise a ValueError."""
    msg = f"{place} {rule}"
    raise ValueError(msg)


def read_options(place: str, query: str, known: set[str]) -> dict[str, str]:
    """Read the part behind the question mark."""
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    for name, _ in pairs:
        if name not in known:
            shown = show(name) if name.isidentifier() else "another"
            refuse(place, f"may have the options {', '.join(sorted(known))}, but has {shown}")
    if len(options) < len(pairs):
        refuse(place, "has an option twice")
    return options


def read_host(place: str, host: str, default: int) -> tuple[str, int]:
    """Read a host and its port."""
    # An address of IPv6 is in brackets.
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, ""
    number = int(port or default)
    if not 1 <= number <= 65535:  # noqa: PLR2004 -- as ports are
        refuse(place, f"must have a port from 1 to 65535, got {number}")
    return unquote(name.strip("[]")), number


def read_database(place: str, database: str) -> int:
    """Read the number of a database."""
    if not (database.isascii() and database.isdigit()) and database:
        refuse(place, "must have the number of a database")
    return int(database or 0)


def read_seconds(place: str, name: str, options: Mapping[str, str]) -> float:
    """Read how long to wait."""
    try:
        seconds = float(options.get(name, TIMEOUT))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MOST_SECONDS:
        refuse(place, f"must have a {name} in seconds, > 0 and <= {MOST_SECONDS:g}, got {show(options[name])}")
    return seconds


def check_prefix(place: str, kind: Kind, prefix: str) -> None:
    """Refuse a prefix that keys can't have."""
    if not isinstance(prefix, str) or not prefix:
        refuse(place, f"must have a prefix that is a str and not empty, got {show(prefix)}")
    opening = prefix.find("{")
    if kind == "cluster" and not prefix.find("}", opening) > opening + 1 > 0:
        refuse(place, f"must have a prefix with a part in braces, as {{app}}:, got {show(prefix)}")


def make_context(place: str, options: Mapping[str, str]) -> ssl.SSLContext:
    """Make what TLS needs to know."""
    required = options.get("ssl_cert_reqs", "required")
    if required not in VERIFY:
        refuse(place, f"must have an ssl_cert_reqs of required or none, got {show(required)}")
    check_hostname = options.get("ssl_check_hostname", "false" if required == "none" else "true")
    if check_hostname not in {"true", "false"}:
        refuse(place, f"must have an ssl_check_hostname of true or false, got {show(check_hostname)}")
    context = ssl.create_default_context()
    try:
        if authorities := options.get("ssl_ca_certs"):
            context.load_verify_locations(authorities)
        if certificate := options.get("ssl_certfile"):
            context.load_cert_chain(certificate, options.get("ssl_keyfile"))
    except OSError as error:
        msg = f"{place}: ssl_ca_certs, ssl_certfile and ssl_keyfile must be files in PEM form: {error}"
        raise ValueError(msg) from None
    context.check_hostname = False
    context.verify_mode = VERIFY[required]
    context.check_hostname = check_hostname == "true"
    return context
