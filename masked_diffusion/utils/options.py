"""Dataclasses whose fields are flags. Each field states the default, range and help text of its flag, in one place."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import field, fields, replace
from typing import Any

from typing_extensions import Self

from .errors import UserError


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    check: Callable[[Any], str | None] | None = None,
    read: Callable[[str], Any] | None = None,
    metavar: Any = None,
    changes_run: bool = False,
    presets: dict[str, dict[str, Any]] | None = None,
    excludes: str | None = None,
) -> Any:
    """A dataclass field that is a flag.

    :param help: the help text of the flag.
    :param at_least, above, at_most, below: the range of a number, or of each number of a tuple.
    :param choices: the allowed words.
    :param check: a function that returns None if the value is allowed, else what it must be.
    :param read: a function that turns the flag's text into the value, if the type of the field is not enough for that.
    :param metavar: what `--help` shows in the place of the values.
    :param changes_run: whether the value changes the result of a run, so that resuming must compare it.
    :param presets: for a flag that sets others: by its value, their values by name.
    :param excludes: another flag that must not be given beside this one.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "bounds": {key: value for key, value in bounds.items() if value is not None}}
    metadata |= {"choices": choices, "check": check, "read": read, "metavar": metavar, "changes_run": changes_run}
    metadata |= {"presets": presets, "excludes": excludes}
    return field(default=default, metadata=metadata)


def describe_bounds(bounds: dict[str, float]) -> str:
    """The bounds of `option` in words, such as `at least 0 and below 1`."""
    shown = {key: value if isinstance(value, int) else f"{value:.4g}" for key, value in bounds.items()}
    return " and ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _outside(value: float, bounds: dict[str, float]) -> bool:
    inside = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at_most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    return not all(inside[key](bound) for key, bound in bounds.items())


class Config:
    """Base class of the configurations. A field may be another `Config`, whose fields are flags of this one, too."""

    @classmethod
    def flags(cls) -> Iterator[tuple[type["Config"], dataclasses.Field]]:
        """All fields that are flags, each with the class that defines it."""
        hints = typing.get_type_hints(cls)
        for each in fields(cls):
            if isinstance(hints[each.name], type) and issubclass(hints[each.name], Config):
                yield from hints[each.name].flags()
            elif "help" in each.metadata:
                yield cls, each

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Create a configuration from a flat dict of values by field name. Missing values keep their defaults."""
        hints = typing.get_type_hints(cls)
        made = {}
        for each in fields(cls):
            if isinstance(hints[each.name], type) and issubclass(hints[each.name], Config):
                made[each.name] = hints[each.name].from_values(values)
            elif each.name in values:
                made[each.name] = values[each.name]
        return cls(**made)

    def values(self) -> dict[str, Any]:
        """All values in a flat dict by field name."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        nested = {name: value for name, value in own.items() if isinstance(value, Config)}
        flat = {name: value for name, value in own.items() if name not in nested}
        for value in nested.values():
            flat |= value.values()
        return flat

    def replaced(self, **changes: Any) -> Self:
        """A copy with new values, by field name; the fields may be in nested configurations."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        made = {name: value.replaced(**changes) for name, value in own.items() if isinstance(value, Config)}
        return replace(self, **made, **{name: changes[name] for name in own if name in changes and name not in made})

    def check(self) -> Self:
        """Refuse values that are out of range, before any work starts.

        :return: the configuration itself, unchanged.
        :raises UserError: for the first such value; the message names the flag, the value and the requirement.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Config):
                value.check()
            elif "help" in each.metadata:
                check_value(each, value)
        return self


def check_value(each: dataclasses.Field, value: Any) -> None:
    """Check the value of a field that is a flag.

    :raises UserError: when the value is not allowed.
    """
    meta = each.metadata
    requirement = None
    if value is None:
        return  # the parser gives None only to fields that may be None
    values = value if isinstance(value, tuple) else (value,)
    numbers = [v for v in values if type(v) in (int, float)]
    if not all(map(math.isfinite, numbers)):
        requirement = " and ".join(filter(None, ("finite", describe_bounds(meta["bounds"]))))
    elif meta["bounds"] and len(numbers) < len(values):  # from a config.json: argparse lets only numbers pass
        requirement = "a number"
    elif any(_outside(number, meta["bounds"]) for number in numbers):
        requirement = describe_bounds(meta["bounds"])
    elif meta["choices"] and value not in meta["choices"]:
        requirement = f"one of {', '.join(meta['choices'])}"
    elif meta["check"]:
        requirement = meta["check"](value)
    if requirement:
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        raise UserError(f"--{each.name} is {shown or repr('')}: it must be {requirement}")


def is_optional(annotation: Any) -> bool:
    """Whether the type of a field allows None."""
    return isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)
