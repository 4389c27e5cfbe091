"""Turns the server's JSON objects into dataclasses."""

import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union

from livereel.errors import LivereelError

T = TypeVar("T")


def parse(kind: type[T], data: Any) -> T:
    """An instance of a dataclass from a JSON object. Raises `LivereelError` if `data` is none.

    Fields that the dataclass does not know are ignored, and those that the object lacks get their default, or else
    None: servers may be newer or older than this package.
    """
    if not isinstance(data, Mapping):
        raise LivereelError("The answer is not the JSON object that was expected: is this a Livereel server?")
    made: dict[str, Any] = {}
    for name, convert, required in plan(typing.cast(Any, kind)):
        if name in data:
            made[name] = convert(data[name])
        elif required:
            made[name] = None
    return kind(**made)


@functools.cache
def plan(kind: Any) -> list[tuple[str, Callable[[Any], Any], bool]]:
    """Name and conversion of each field of a dataclass, and whether it has no default."""
    hints = typing.get_type_hints(kind)
    return [
        (field.name, conversion(hints[field.name]), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    ]


def conversion(hint: Any) -> Callable[[Any], Any]:
    """How a JSON value becomes a value of this type. Only dataclasses are made; other values stay as they are."""
    if isinstance(hint, type) and is_dataclass(hint):
        return lambda value: parse(hint, value) if isinstance(value, Mapping) else value
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        each = conversion(arguments[0])
        return lambda value: [each(item) for item in value] if isinstance(value, list) else value
    if typing.get_origin(hint) in (Union, types.UnionType):
        made = [argument for argument in arguments if is_dataclass(argument) or typing.get_origin(argument) is list]
        return conversion(made[0]) if made else lambda value: value
    return lambda value: value
