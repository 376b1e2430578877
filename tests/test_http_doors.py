"""Who may come in by HTTP: by which host, with which token, and from which other site's page."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from chanflow.tasks import JsonFormatter, TaskService, Token
from chanflow.tasks._token import parse_tokens
from chanflow.tasks.http._problem import Kind
from tests.support.http import (
    OPEN,
    asking,
    assert_problem,
    routed,
    served,
    virtual_clock,  # noqa: F401 -- a fixture
    visiting,
)
from tests.support.messages import whole
from tests.support.tasks import broken, double, serving

pytestmark = pytest.mark.anyio

# Hosts


def all_routes(service: TaskService) -> Iterator[tuple[str, str]]:
    for path in OPEN:
        yield "GET", path
    for path, method in routed(service):
        yield method, path


async def test_other_hosts_are_refused() -> None:
    """A page that has a name of its own for this machine reads nothing and changes nothing, whatever it asks for."""
    async with served(double, options={"hosts": ["localhost", "127.0.0.1", "::1"]}) as (service, client):
        for method, path in [*all_routes(service), ("GET", "/nowhere"), ("OPTIONS", "/tasks")]:
            response = await client.request(method, path, headers={"Host": "evil.example:8000"})
            told = "this service does not answer for the host 'evil.example:8000'"
            assert_problem(response, 421, told, Kind.WRONG_HOST)
        assert sum((await service.count()).values()) == 0
        with_token = service.asgi(hosts=["localhost"], tokens=["secret"])
        async with asking(with_token) as other:
            response = await other.get("/tasks", headers={"Host": "evil.example", "Authorization": "Bearer secret"})
            assert response.status_code == 421


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LocalHost.", 200),
        ("localhost:", 200),
        ("127.0.0.1:80", 200),
        ("[::1]", 200),
        ("[::1]:8000", 200),
        ("[0:0:0:0:0:0:0:1]:8000", 200),
        ("[2001:DB8::1]", 200),
        ("shop.example", 200),
        ("", 421),
        ("::1", 421),
        ("localhost.evil.example", 421),
        ("evil.example:localhost", 421),
        ("localhost@evil.example", 421),
        ("evil.example#localhost", 421),
        ("localhost, evil.example", 421),
        ("localhost:80:80", 421),
        ("[localhost]", 421),
        ("[:::]", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost..", 421),
        ("\xe4", 421),
    ],
)
async def test_hosts(host: str, status: int) -> None:
    """The port is no matter, nor are capitals and how an address is spelled; everything else is."""
    async with served(options={"hosts": ["localhost", "127.0.0.1", "[::1]", "2001:db8::1", "Shop.Example."]}) as (
        _,
        client,
    ):
        response = await client.get("/health", headers={b"Host": host.encode("latin-1")})
        assert response.status_code == status


async def test_hosts_that_are_not_one() -> None:
    """A request without a host, or with two of which one is wrong, is refused."""
    async with serving() as service:
        app = service.asgi(hosts=["localhost"])
        for hosts, status in (([], 421), ([b"localhost"] * 2, 200), ([b"localhost", b"evil.example"], 421)):
            async with visiting(app, "GET", "/health") as visit:
                pass
            assert visit.status == 421
            visit = type(visit)(app, "GET", "/health")
            visit.scope["headers"] = [(b"host", host) for host in hosts]
            await visit.run()
            assert visit.status == status


@pytest.mark.parametrize(
    "hosts",
    [[], "localhost", [""], ["localhost:8000"], ["http://localhost"], ["*"], ["a b"], [5], ["ü.example"], ["[a]"]],
)
def test_hosts_that_are_none(hosts: Any) -> None:
    """They are refused when the app is made."""
    rule = "hosts must be a sequence of names or addresses, one or more, in ASCII and without a port, or None"
    with pytest.raises(ValueError, match=whole(f"{rule}, got {hosts!r}")):
        TaskService().asgi(hosts=hosts)


# Other sites

APP = "https://app.example"


async def test_pages_of_named_origins() -> None:
    """They may do what any client may, and see what they need; those of others may not."""
    async with served(double, options={"cors": [APP, "http://localhost:3000"]}) as (_, client):
        page = {"Origin": APP, "Sec-Fetch-Site": "cross-site"}
        asked = page | {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,prefer,last-event-id",
        }
        response = await client.options("/tasks/double", headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == APP
        assert "access-control-allow-credentials" not in response.headers
        response = await client.post("/tasks/double", json={"number": 1}, headers=page)
        assert response.status_code == 202
        assert response.headers["access-control-allow-origin"] == APP
        assert "Origin" in response.headers["vary"]
        exposed = response.headers["access-control-expose-headers"]
        assert exposed == "Location, Preference-Applied, Retry-After"
        response = await client.delete(response.headers["location"], headers=page)
        assert response.status_code in {200, 202}
        # Errors are told, too.
        response = await client.get("/tasks/none", headers=page)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (404, APP)
        for origin in ("https://evil.example", "https://app.example.evil.example", "http://app.example", "null", ""):
            other = page | {"Origin": origin}
            assert (await client.post("/tasks/double", headers=other)).status_code == 403
            for response in (
                await client.get("/tasks", headers=other),
                await client.options("/tasks/double", headers=asked | {"Origin": origin}),
            ):
                assert "access-control-allow-origin" not in response.headers


async def test_pages_of_named_origins_need_a_token() -> None:
    """A browser asks for leave without the token, and then shows it; that it is missing can be read by the page."""
    options = {"cors": [APP], "tokens": ["secret"], "hosts": ["test"]}
    async with served(double, options=options) as (_, client):
        asked = {
            "Origin": APP,
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "authorization",
        }
        assert (await client.options("/tasks", headers=asked)).status_code == 200
        assert (await client.options("/tasks", headers=asked | {"Host": "evil.example"})).status_code == 421
        response = await client.get("/tasks", headers={"Origin": APP})
        assert_problem(response, 401, "this needs a valid bearer token")
        assert response.headers["access-control-allow-origin"] == APP
        response = await client.get("/tasks", headers={"Origin": APP, "Authorization": "Bearer secret"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, APP)


@pytest.mark.parametrize(
    "origins", [APP, ["*"], ["null"], ["app.example"], [f"{APP}/"], ["https://App.example"], ["https://*.example"], [5]]
)
def test_origins_that_are_none(origins: Any) -> None:
    """They are refused when the app is made."""
    rule = "cors must be a sequence of origins as browsers send them, such as https://app.example"
    with pytest.raises(ValueError, match=whole(f"{rule}, got {origins!r}")):
        TaskService().asgi(cors=origins)


# Tokens


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def test_scopes() -> None:
    """Each token may do what its scopes say, on every route, and nothing else."""
    tokens = [Token(scope, name=f"the {scope}er", scopes={scope}) for scope in ("read", "submit", "admin")]
    needed = {
        ("GET", "/tasks"): "read",
        ("GET", "/tasks/{task_id}"): "read",
        ("GET", "/tasks/{task_id}/events"): "read",
        ("GET", "/events"): "read",
        ("GET", "/metrics"): "read",
        ("GET", "/handlers"): None,
        ("GET", "/openapi.json"): None,
        ("GET", "/health"): None,
        ("POST", "/tasks/double"): "submit",
        ("DELETE", "/tasks/{task_id}"): "admin",
        ("POST", "/tasks/{task_id}/retry"): "admin",
        ("GET", "/dead-letters"): "admin",
        ("POST", "/dead-letters/{topic}/replay"): "admin",
    }
    async with serving(double) as service:
        app = service.asgi(tokens=[*tokens, "all"])
        assert set(needed) == {(method, path) for path, method in routed(service)}
        for (method, path), scope in needed.items():
            for shown in ("read", "submit", "admin", "all"):
                async with visiting(app, method, path, headers=bearer(shown)) as visit:
                    pass
                allowed = shown == "all" or scope in {None, shown}
                assert (visit.status == 403) is not allowed, (method, path, shown)
                if not allowed:
                    told = json.loads(visit.body)
                    assert told["type"] == Kind.SCOPE_REQUIRED.uri
                    assert told["detail"] == f"this needs a token with the scope {scope!r}"
            assert method != "GET" or await head_status(app, path, scope)


async def head_status(app: Any, path: str, scope: str | None) -> bool:
    """Tell whether HEAD is refused just where GET is."""
    async with visiting(app, "HEAD", path, headers=bearer("submit")) as visit:
        pass
    return (visit.status == 403) is (scope in {"read", "admin"})


async def test_several_scopes_wait_for_what_was_submitted() -> None:
    """Whoever may submit sees what became of it when the answer waits for that, and only then."""
    tokens = [Token("in", scopes=["submit"]), Token("both", scopes=["submit", "read"])]
    async with served(double, options={"tokens": tokens}) as (_, client):
        response = await client.post("/tasks/double", headers=bearer("in") | {"Prefer": "wait=1"})
        assert response.json()["result"] == 2
        place = response.headers["location"]
        assert (await client.get(place, headers=bearer("in"))).status_code == 403
        assert (await client.get(place, headers=bearer("both"))).status_code == 200
        assert (await client.delete(place, headers=bearer("both"))).status_code == 403


async def test_names_are_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Who changed what, or would have, is there; who only looks is not, and no secret ever."""
    caplog.set_level(logging.INFO, "chanflow.tasks")
    tokens = [Token("s3cret-1", name="alice"), Token("s3cret-2", name="bob ☃", scopes=["read"]), "s3cret-3"]
    async with served(double, broken, options={"tokens": tokens}) as (service, client):
        response = await client.post("/tasks/double", headers=bearer("s3cret-1"))
        task_id = response.json()["task_id"]
        await client.get(f"/tasks/{task_id}", headers=bearer("s3cret-1"))
        await client.post("/tasks/double", headers=bearer("s3cret-2"))
        await client.post("/tasks/no%0Asuch", headers=bearer("s3cret-1"))
        await client.delete(f"/tasks/{task_id}", headers=bearer("s3cret-3"))
        assert caplog.messages == [
            f"alice: POST /tasks/double: 202 /tasks/{task_id}",
            "bob ☃: POST /tasks/double: 403",
            "alice: POST /tasks/no%0Asuch: 404",
        ]
        assert '"token_name": "alice"' in JsonFormatter().format(caplog.records[0])
        assert "s3cret" not in caplog.text
        assert "s3cret" not in repr(tokens[:2])
        await service.wait(task_id)


FILE = """\ufeff# alice's laptop
first

  second\t
alice: third
  # not yet: fourth
bob[read]: fi:fth
the build server [ read , submit ] :  sixth
alice: seventh
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_file_of_tokens(line_end: str) -> None:
    """One token a line, with a name and scopes or without; empty lines, comments and a byte order mark are none."""
    everything = {"read", "submit", "admin"}
    told = [
        (token.secret, token.name, set(token.scopes)) for token in parse_tokens(FILE.replace("\n", line_end).encode())
    ]
    assert told == [
        ("first", None, everything),
        ("second", None, everything),
        ("third", "alice", everything),
        ("fi:fth", "bob", {"read"}),
        ("sixth", "the build server", {"read", "submit"}),
        ("seventh", "alice", everything),
    ]


SYNTAX = "must be a secret without spaces, or `name: secret`, or `name[read,submit,admin]: secret`"
PRINTABLE = "a token's secret must be printable ASCII characters, one or more, without a space at either end"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "the file has no token"),
        (b"\n# nothing\n", "the file has no token"),
        ("first\n".encode("utf-16"), "the file must be text in UTF-8"),
        ("first\n".encode("utf-16-le"), f"line 1: {PRINTABLE}"),
        ("é".encode("latin-1"), "the file must be text in UTF-8"),
        ("first\nn\xefve\n".encode(), f"line 2: {PRINTABLE}"),
        (b"first second", f"line 1: {SYNTAX}"),
        (b"\n\nfirst # alice's", f"line 3: {SYNTAX}"),
        (b"alice:first", f"line 1: {SYNTAX}"),
        (b"alice[read]", f"line 1: {SYNTAX}"),
        (b": first", f"line 1: {SYNTAX}"),
        (b"[read]: first", f"line 1: {SYNTAX}"),
        (b"alice[read: first", f"line 1: {SYNTAX}"),
        (b"alice: a b", f"line 1: {SYNTAX}"),
        (b"alice:", f"line 1: {SYNTAX}"),
        (b"a\x07b: first", "line 1: a token's name must be printable characters, one or more, or None, got 'a\\x07b'"),
        (b"a[]: first", "line 1: a token's scopes must be one or more of read, submit, admin, got none"),
        (b"a[read,write]: x", "line 1: a token's scopes must be one or more of read, submit, admin, got read, write"),
    ],
)
def test_a_file_of_tokens_that_is_none(data: bytes, told: str) -> None:
    """What is wrong is told in one line, with the number of its line, and without what may be a secret."""
    with pytest.raises(ValueError, match=whole(told)):
        parse_tokens(data)


NAME = "a token's name must be printable characters, one or more, or None"
SCOPES = "a token's scopes must be one or more of read, submit, admin"
TOKENS = "tokens must be a sequence of one str or Token or more, or None"


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"secret": 5}, TypeError, "a token's secret must be a str, got a int"),
        ({"secret": ""}, ValueError, PRINTABLE),
        ({"secret": " s3cret"}, ValueError, PRINTABLE),
        ({"secret": "s3cret\n"}, ValueError, PRINTABLE),
        ({"secret": "s3crét"}, ValueError, PRINTABLE),
        ({"secret": "s", "name": ""}, ValueError, f"{NAME}, got ''"),
        ({"secret": "s", "name": 5}, ValueError, f"{NAME}, got 5"),
        ({"secret": "s", "scopes": "write"}, ValueError, f"{SCOPES}, got write"),
        ({"secret": "s", "scopes": []}, ValueError, f"{SCOPES}, got none"),
    ],
)
def test_a_token_that_is_none(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    """What is wrong is told, without what may be a secret."""
    with pytest.raises(error, match=whole(told)):
        Token(**arguments)


@pytest.mark.parametrize(
    ("tokens", "error", "told"),
    [
        ("s3cret", TypeError, f"{TOKENS}, got a str"),
        ([], TypeError, f"{TOKENS}, got a list"),
        ((5,), TypeError, f"{TOKENS}, got a tuple"),
        (["a", ""], ValueError, PRINTABLE),
        (
            ["s3cret", Token("s3cret", name="a")],
            ValueError,
            "tokens must differ in their secrets, and two of them have the same",
        ),
    ],
)
def test_tokens_that_are_none(tokens: Any, error: type[Exception], told: str) -> None:
    """They are refused when the app is made, without what may be a secret."""
    with pytest.raises(error, match=whole(told)):
        TaskService().asgi(tokens=tokens)


async def test_tokens_in_odd_encodings() -> None:
    """What is no token is refused as any other, and is no error of the app's."""
    async with served(double, options={"tokens": ["first"]}) as (_, client):
        for shown in (
            b"Bearer \xff\xfe",
            "Bearer fírst".encode(),
            b"Bearer first\x00",
            b"Bearer\tfirst",
            b"\xa0Bearer first",
            b"",
            b"Bearer " + b"x" * 100_000,
        ):
            response = await client.get("/tasks", headers=[(b"Authorization", shown)])
            assert_problem(response, 401, "this needs a valid bearer token")
        async with httpx.AsyncClient(transport=client._transport, base_url="http://test") as other:
            twice = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer first")]
            assert (await other.get("/tasks", headers=twice)).status_code == 401
