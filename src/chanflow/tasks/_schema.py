"""The types of arguments and results: how each is stored, read again, and described."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec

from chanflow._check import show

__all__ = ["describe", "from_plain", "pack", "reader", "strip"]

TEMPLATE = "#/$defs/{name}"


def pack(value: object, *, ordered: bool = False) -> bytes:
    """Give a value as it is stored.

    Args:
        value: plain data, or of the types that `from_plain` makes.
        ordered: whether what has no order of its own, such as a set, is put into one.
    """
    return msgspec.msgpack.encode(value, enc_hook=to_plain, order="deterministic" if ordered else None)


def reader(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Make what reads values of a type that were stored.

    Raises:
        TypeError: the type is not one of plain data, or of paths and pydantic models, or both in one union.
    """
    describe(kind)
    return msgspec.msgpack.Decoder(kind, dec_hook=from_plain)


def is_path(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, PurePath)


def is_model(kind: Any) -> bool:
    """Tell whether a type is a model of pydantic, which need not be there."""
    return isinstance(kind, type) and hasattr(kind, "model_validate_json")


def to_plain(value: Any) -> Any:
    """Give plain data for a value that msgspec does not know."""
    if isinstance(value, PurePath):
        return str(value)
    if is_model(type(value)):
        return value.model_dump(mode="json", by_alias=True, round_trip=True)
    msg = f"Encoding objects of type {type(value).__name__} is unsupported"
    raise TypeError(msg)


def from_plain(kind: Any, data: Any) -> Any:
    """Make a value of a type that msgspec does not know; a ValueError or TypeError says why not."""
    if is_path(kind):
        if not isinstance(data, str):
            msg = f"Expected `str`, got `{type(data).__name__}`"
            raise TypeError(msg)
        return kind(data)
    if is_model(kind):
        try:
            # As JSON, so that a strict model takes what JSON has no type for.
            return kind.model_validate_json(msgspec.json.encode(data))
        except ValueError as error:
            raise ValueError(told(error)) from error
    return data


def told(error: ValueError) -> str:
    """Give the message of a validation in one line, without the values, which may be long or secret."""
    errors: Callable[..., list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    return "; ".join(
        f"{each['msg']} - at `{'.'.join(['$', *map(str, each['loc'])])}`"
        for each in errors(include_url=False, include_input=False, include_context=False)
    )


def describe(kind: Any, template: str = TEMPLATE) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the JSON schema of a type, and those that it refers to, by name.

    Args:
        kind: the type.
        template: what a reference looks like, with `{name}`.

    Raises:
        TypeError: as for `reader`.
    """
    parts: dict[str, Any] = {}

    def hook(kind: Any) -> dict[str, Any]:
        if is_path(kind):
            return {"type": "string", "format": "path"}
        if is_model(kind):
            # Under its module's name, too: msgspec may have a type of the same name.
            prefix = re.sub(r"[^a-zA-Z0-9.\-_]", "_", f"{kind.__module__}.{kind.__qualname__}")
            schema: dict[str, Any] = kind.model_json_schema(
                ref_template=template.replace("{name}", f"{prefix}.{{model}}")
            )
            parts.update({f"{prefix}.{name}": part for name, part in schema.pop("$defs", {}).items()})
            return schema
        if kind is object:
            return {"description": "Anything."}
        msg = f"{show(kind)} is neither plain data nor a path nor a pydantic model"
        raise TypeError(msg)

    try:
        (schema,), components = msgspec.json.schema_components([kind], schema_hook=hook, ref_template=template)
    except KeyError as error:
        msg = f"two types have the same name: {error}"
        raise TypeError(msg) from None
    return schema, components | parts


def strip(hint: Any) -> Any:
    """Give what a hint says beside `None` and annotations, if that is one type; else the hint."""
    if get_origin(hint) is Annotated:
        return strip(get_args(hint)[0])
    if get_origin(hint) in {Union, UnionType}:
        kinds = [each for each in get_args(hint) if each is not NoneType]
        return strip(kinds[0]) if len(kinds) == 1 else hint
    return hint
