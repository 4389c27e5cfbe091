"""Settings written once: a dataclass field with its help and bounds becomes a flag, a variable and a row of the docs.

`option()` declares a field. `check_options` validates an instance, `parse_options` reads a command line and an
environment, and `options_of` lists the options for whoever documents them. Standard library only.
"""

import argparse
import dataclasses
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bounds:
    """A condition on one value. `text` completes the sentence "NAME VALUE must be ...". `holds` may raise OSError."""

    text: str
    holds: Callable[[Any], bool]


def between(low: float, high: float, unit: str = "") -> Bounds:
    """From `low` to `high`, both included."""
    return Bounds(f"between {low} and {high} {unit}".rstrip(), lambda value: low <= value <= high)


def at_least(low: float, unit: str = "") -> Bounds:
    """A finite number not below `low`."""
    return Bounds(f"at least {low} {unit}".rstrip(), lambda value: low <= value < float("inf"))


def above(low: float, unit: str = "") -> Bounds:
    """A finite number above `low`."""
    return Bounds(f"above {low} {unit}".rstrip(), lambda value: low < value < float("inf"))


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises OSError if it cannot be entered or listed."""
    if not path.is_dir():
        return False
    with os.scandir(os.path.join(path, ".")):  # the dot takes the right to enter, as opening a file does
        return True


A_FOLDER = Bounds("a folder", is_folder)


@dataclass(frozen=True, slots=True)
class Option:
    """What `option()` records about a field, and what the field itself says: name, type, default."""

    help: str
    flag: str = ""
    """Without dashes: `idle-timeout`. Empty means the field's name."""
    metavar: str | None = None
    bounds: Bounds | None = None
    """For each value of a list; not applied to None."""
    unset: str | None = None
    """What a default of None or () means, in words; None leaves it out of the help text."""
    secret: bool = False
    """Read from the environment only, where other users of the machine do not see it."""
    field: str = ""
    type: Any = str
    default: Any = None

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "LIVEREEL_" + self.flag.upper().replace("-", "_")

    @property
    def choices(self) -> tuple[str, ...] | None:
        return get_args(self.type) if get_origin(self.type) is Literal else None

    @property
    def default_text(self) -> str | None:
        """The default in words; None where the help text already says it."""
        return self.unset if self.default in (None, (), "") else str(self.default)

    @property
    def bounds_text(self) -> str:
        """What the value must be, for people; empty where any value of its type will do."""
        if self.choices:
            return " or ".join(self.choices)
        return self.bounds.text if self.bounds else ""

    @property
    def parse(self) -> Callable[[str], Any]:
        """Converts what the command line or the environment holds; raises ValueError."""
        if get_origin(self.type) is tuple:
            return comma_separated
        return str if self.choices else self.type

    def check(self, value: Any) -> None:
        """Raises ValueError with the option's name, the value and what it must be."""
        for each in value if isinstance(value, tuple) else (value,):
            try:
                wrong = self.choices and each not in self.choices
                if wrong or (self.bounds and each is not None and not self.bounds.holds(each)):
                    raise ValueError(f"{self.flag} {each} must be {self.bounds_text}")
            except OSError as error:
                raise ValueError(f"{self.flag} {each} cannot be read: {error.strerror}") from None


def comma_separated(text: str) -> tuple[str, ...]:
    """The items of a list such as `a, b`; empty ones are left out."""
    return tuple(item for each in text.split(",") if (item := each.strip()))


def option(
    default: T,
    help: str,
    *,
    flag: str = "",
    metavar: str | None = None,
    bounds: Bounds | None = None,
    unset: str | None = None,
    secret: bool = False,
) -> T:
    """A dataclass field that is an option. A field with its unit in its name gives `flag` without it."""
    record = Option(help, flag, metavar, bounds, unset, secret)
    return dataclasses.field(default=default, repr=not secret, metadata={"option": record})


def options_of(settings: type[Any]) -> list[Option]:
    """The options that a dataclass declares, in its order."""
    hints = get_type_hints(settings)
    found = []
    for field in dataclasses.fields(settings):
        if (record := field.metadata.get("option")) is None:
            continue
        hint = hints[field.name]
        if get_origin(hint) in (Union, types.UnionType):  # X | None
            hint = next(each for each in get_args(hint) if each is not type(None))
        flag = record.flag or field.name.replace("_", "-")
        found.append(dataclasses.replace(record, flag=flag, field=field.name, type=hint, default=field.default))
    return found


def check_options(settings: Any) -> None:
    """Validate every option of an instance. Raises ValueError for the first that is out of bounds."""
    for each in options_of(type(settings)):
        each.check(getattr(settings, each.field))


def parse_options(
    settings: type[Any], parser: argparse.ArgumentParser, arguments: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Values by field name: from the flag, else the variable, else the default. Exits with usage on a bad value."""
    values = {}
    options = options_of(settings)
    for each in options:
        if each.secret:
            values[each.field] = environment.get(each.variable, each.default)
            continue
        default = environment.get(each.variable, each.default)
        said = (
            f"{each.help} ({each.unset if default in (None, (), '') else default})"
            if each.default_text is not None
            else each.help
        )
        parser.add_argument(
            f"--{each.flag}",
            dest=each.field,
            type=each.parse,
            choices=each.choices,
            metavar=each.metavar,
            default=default,  # argparse converts a string as it would on the command line
            help=said.replace("%", "%%"),
        )
    return values | vars(parser.parse_args(arguments))
