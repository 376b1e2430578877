"""What a handler's type hints and its name may be: each is stored, read again and described, or refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Optional

import msgspec
import pydantic
import pytest
from attrs import frozen
from starlette.applications import Starlette
from starlette.routing import Mount

from chanflow._check import show
from chanflow.tasks import ArgumentError, Progress, ResultError, TaskFailedError, TaskService
from tests.support.http import asking, references, result_of, served
from tests.support.messages import whole
from tests.support.tasks import double, serving

pytestmark = pytest.mark.anyio


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    name: str = pydantic.Field(min_length=2, alias="called")
    due: date | None = None
    parts: list[Item] = []


class Order(pydantic.BaseModel):
    items: list[Item]
    total: int = pydantic.Field(ge=0)


@frozen
class Address:
    street: str
    plan: Path | None = None


HERE = PurePosixPath("here")

# What is accepted


async def move(source: Path, target: PurePosixPath = HERE, to: Address | None = None) -> list[Path]:
    assert isinstance(source, Path)
    assert type(target) is PurePosixPath
    assert to is None or isinstance(to.plan, Path)
    return [source, Path(target)]


async def test_paths() -> None:
    """A path travels as text, and the handler is given one."""
    async with served(move) as (service, client):
        task_id = await service.submit("move", source=Path("a/b"), to=Address("here", Path("c")))
        assert await service.result(task_id) == [Path("a/b"), Path("here")]
        arguments = (await service.get(task_id)).decode_arguments()
        assert arguments == {"source": "a/b", "to": {"street": "here", "plan": "c"}}
        response = await client.post("/tasks/move", json={"source": "x", "target": "/y"}, headers={"Prefer": "wait=1"})
        assert response.json()["result"] == ["x", "/y"]
        response = await client.post("/tasks/move", json={"source": 5})
        assert response.status_code == 422
        assert response.json()["detail"] == "arguments of move: Expected `str`, got `int` - at `$.source`"
        # The same argument, however it was given.
        first = await service.submit("move", source=Path("a"), idempotency_key="key")
        assert await service.submit("move", source="a", idempotency_key="key") == first


async def total(order: Order, more: Order | None = None) -> Order:
    assert isinstance(order, Order)
    return Order(items=[*order.items, *(more.items if more else [])], total=order.total)


async def test_models_of_pydantic() -> None:
    """They are checked by pydantic itself, and the handler is given one; a result comes back as one."""
    async with served(total) as (service, client):
        order = Order(items=[Item(called="tea", due=date(2026, 11, 27), parts=[Item(called="cup")])], total=3)
        assert await service.result(await service.submit("total", order=order, more=order)) == Order(
            items=order.items * 2, total=3
        )
        plain = {"items": [{"called": "tea", "due": "2026-11-27", "parts": []}], "total": "4"}
        response = await client.post("/tasks/total", json={"order": plain}, headers={"Prefer": "wait=1"})
        assert response.json()["result"] == {**plain, "total": 4}
        for body, detail in (
            ({"items": []}, "Field required - at `$.total`"),
            (
                {"items": [{"called": "x"}], "total": -1},
                (
                    "String should have at least 2 characters - at `$.items.0.called`; "
                    "Input should be greater than or equal to 0 - at `$.total`"
                ),
            ),
            (5, "Input should be an object - at `$`"),
        ):
            response = await client.post("/tasks/total", json={"order": body})
            assert response.status_code == 422
            assert response.json()["detail"] == f"arguments of total: {detail} - at `$.order`"
        with pytest.raises(ArgumentError, match=r"^arguments of total: Field required - at `\$.items`"):
            await service.submit("total", order={"total": 1})


async def test_a_model_of_another_library() -> None:
    """What looks like one of pydantic's, and fails in its own way, fails the task or the submission only."""

    class Odd:
        @classmethod
        def model_validate_json(cls, data: bytes) -> Odd:
            msg = f"no {data.decode()}"
            raise ValueError(msg)

        @classmethod
        def model_json_schema(cls, **_: Any) -> dict[str, Any]:
            return {"type": "object"}

    async def odd(value: Any) -> None: ...

    odd.__annotations__["value"] = Odd
    async with serving(odd) as service:
        with pytest.raises(ArgumentError, match=whole("arguments of odd: no 5 - at `$.value`")):
            await service.submit("odd", value=5)


async def test_an_optional_progress() -> None:
    """However its hint is spelled, a progress is no argument; and so are two."""

    async def maybe(progress: Progress | None = None) -> bool:
        return isinstance(progress, Progress)

    async def older(progress: Optional[Progress]) -> bool:  # noqa: UP045
        return isinstance(progress, Progress)

    async def annotated(progress: Annotated[Progress | None, "how far it is"] = None) -> bool:
        return isinstance(progress, Progress)

    async def two(one: Progress, other: Progress) -> bool:
        await one.update(1)
        await other.update(1)
        return True

    async with served(maybe, older, annotated, two) as (service, client):
        for name in ("maybe", "older", "annotated", "two"):
            assert await service.result(await service.submit(name)) is True
            response = await client.post(f"/tasks/{name}", json={"progress": None})
            assert response.status_code == 422
        assert all("progress" not in json.dumps(each) for each in (await client.get("/handlers")).json()["handlers"])


async def test_bounds_of_msgspec() -> None:
    """What an annotation says of a number or a text goes for arguments."""

    async def send(count: Annotated[int, msgspec.Meta(ge=1)]) -> None: ...

    async with served(send) as (_, client):
        response = await client.post("/tasks/send", json={"count": 0})
        assert response.json()["detail"] == "arguments of send: Expected `int` >= 1 - at `$.count`"


async def test_anything() -> None:
    """`object` takes what `Any` takes."""

    async def keep(value: object, values: dict[str, object] | None = None) -> object:
        return value if values is None else values

    async with served(keep) as (service, client):
        assert await result_of(service, await client.post("/tasks/keep", json={"value": [1, "x"]})) == [1, "x"]
        assert await service.result(await service.submit("keep", value=0, values={"a": None})) == {"a": None}


async def test_a_result_that_does_not_fit() -> None:
    """It fails its task, whatever type it was to have."""

    async def lie() -> Order:
        return Item(called="tea")  # type: ignore[return-value]

    async with serving(lie) as service:
        task_id = await service.submit("lie")
        with pytest.raises(TaskFailedError, match="the result of lie does not fit its annotation: Field required"):
            await service.result(task_id)
        assert (await service.get(task_id)).error_type == ResultError.__name__


# What is refused

REFUSED = "^the type hints of odd are not for plain data: value: "


def same_names() -> tuple[type, type]:
    def make(kind: type) -> type:
        @frozen
        class Part:
            value: kind  # type: ignore[valid-type]

        Part.__annotations__["value"] = kind
        return Part

    return make(int), make(str)


@pytest.mark.parametrize(
    "hint",
    [
        Callable,
        Callable[[int], int],
        type,
        complex,
        range,
        TaskService,
        Iterator[int],
        list[Progress],
        dict[str, Callable[[], None]],
        Callable | None,
    ],
    ids=str,
)
def test_hints_that_are_refused(hint: Any) -> None:
    """What can't be stored or described is refused when the task is registered, and the argument is named."""

    def odd(value: Any) -> Any: ...

    odd.__annotations__["value"] = hint
    with pytest.raises(
        TypeError, match=r"^the type hints of odd are not for plain data: value: .* is neither "
    ) as told:
        TaskService().task(odd)
    assert "\n" not in str(told.value)
    odd.__annotations__ = {"value": int, "return": hint}
    with pytest.raises(TypeError, match=r"^what odd is annotated to return is not plain data: .* is neither "):
        TaskService().task(odd)


def test_unions_that_are_refused() -> None:
    """Which of two a value is must be plain from the value."""

    def odd(value: Any) -> Any: ...

    for hint in (Path | Order, Path | int):
        odd.__annotations__["value"] = hint
        with pytest.raises(TypeError, match=rf"{REFUSED}Type unions "):
            TaskService().task(odd)
    one, other = same_names()
    odd.__annotations__["value"] = dict[str, one] | list[other]  # type: ignore[valid-type]
    with pytest.raises(TypeError, match=rf"{REFUSED}two types have the same name: "):
        TaskService().task(odd)


PRINTABLE = "name must be a str of 1 to 200 printable characters without a slash"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (".", "name must not be . or .., which are steps in a URL's path"),
        ("..", "name must not be . or .., which are steps in a URL's path"),
        ("\udcff", PRINTABLE),
        ("a\nb", PRINTABLE),
        ("a/b", PRINTABLE),
    ],
)
def test_names_that_are_refused(name: str, rule: str) -> None:
    """A name is a part of a URL's path; that of the function is one, too."""
    with pytest.raises(ValueError, match=whole(f"{rule}, got {show(name)}")):
        TaskService().task(name=name)(double)

    async def named() -> None: ...

    named.__name__ = name
    with pytest.raises(ValueError, match=whole(f"{rule}, got {show(name)}")):
        TaskService().task(named)


# Names, and what is told of them

NAMES = ["send mail", "send_mail", "send-mail", "{task}", "{}", "a?b#c%2Fd", "...", "ünï ☃", "chanflow", "tasks"]


async def test_names_of_any_kind() -> None:
    """They are submitted by, described each by itself, and what the description refers to is there."""
    service = TaskService()

    def register(name: str, kind: Any) -> None:
        async def handle(value: Any, order: Any = None) -> Any:
            return value.value

        handle.__annotations__ |= {"value": kind, "order": Order | None}
        service.task(name=name)(handle)

    parts = same_names()
    for number, name in enumerate(NAMES):
        register(name, parts[number % 2])
    async with service, asking(service.asgi()) as client:
        description = (await client.get("/openapi.json")).json()
        for reference in references(description):
            assert reference.removeprefix("#/components/schemas/") in description["components"]["schemas"]
        paths = list(description["paths"])[: len(NAMES)]
        submissions = [description["paths"][path]["post"] for path in paths]
        assert [operation["operationId"] for operation in submissions] == [f"submit_{name}" for name in NAMES]
        told = (await client.get("/handlers")).json()["handlers"]
        assert [handler["name"] for handler in told] == NAMES
        for number, (path, handler) in enumerate(zip(paths, told, strict=True)):
            assert "{" not in path
            for reference in references(handler["arguments"]):
                assert reference.removeprefix("#/$defs/") in handler["arguments"]["$defs"]
            value = [1, "x"][number % 2]
            assert await result_of(service, await client.post(path, json={"value": {"value": value}})) == value
            # Each is described with its own types, and no other's.
            assert (await client.post(path, json={"value": {"value": [1, "x"][1 - number % 2]}})).status_code == 422
            schema = description["components"]["schemas"]
            body = submissions[number]["requestBody"]["content"]["application/json"]["schema"]
            arguments = schema[body["$ref"].removeprefix("#/components/schemas/")]
            part = schema[arguments["properties"]["value"]["$ref"].removeprefix("#/components/schemas/")]
            assert part["properties"]["value"]["type"] == ["integer", "string"][number % 2]


@pytest.mark.parametrize("mount", ["/приложение", "/a b", "/50%", "/ünï/☃"])
async def test_below_a_path_that_is_not_ascii(mount: str) -> None:
    """The answer says where the task is, in a form that a header can carry."""
    service = TaskService()
    service.task(double)
    app = Starlette(routes=[Mount(mount, app=service.asgi())])
    async with service, asking(app) as client:
        response = await client.post(f"{mount.replace('%', '%25')}/tasks/double", headers={"Prefer": "wait=1"})
        assert response.status_code == 200
        place = response.headers["location"]
        assert place.isascii()
        assert " " not in place
        assert (await client.get(place)).json() == response.json()
        response = await client.post(f"{mount.replace('%', '%25')}/tasks/double")
        assert response.json()["status_url"] == response.headers["location"]
        assert (await client.get(response.json()["status_url"])).status_code == 200
