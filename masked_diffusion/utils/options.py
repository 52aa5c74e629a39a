"""Dataclasses whose fields are flags: each states its default, range and help text once."""

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
) -> Any:
    """A dataclass field that is a flag.

    :param at_least, above, at_most, below: the range of a number, or of each number of a tuple.
    :param choices: the words that are allowed.
    :param check: a function of the value that returns what it must be where it is not that, else None.
    :param read: makes the value of the flag's text, where the type alone does not say how.
    :param changes_run: a run computes something else with another value, so that resuming compares it.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "bounds": {key: value for key, value in bounds.items() if value is not None}}
    metadata |= {"choices": choices, "check": check, "read": read, "metavar": metavar, "changes_run": changes_run}
    return field(default=default, metadata=metadata)


def describe_bounds(bounds: dict[str, float]) -> str:
    """`at least 0 and below 1`, of the bounds that `option` took."""
    return " and ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in bounds.items())


def _outside(value: float, bounds: dict[str, float]) -> bool:
    inside = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at_most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    return not all(inside[key](bound) for key, bound in bounds.items())


class Config:
    """What the classes of this module share; a field may be another `Config`, whose fields count as its own."""

    @classmethod
    def flags(cls) -> Iterator[tuple[type["Config"], dataclasses.Field]]:
        """Every field that is a flag, with the class that states it."""
        hints = typing.get_type_hints(cls)
        for each in fields(cls):
            if isinstance(hints[each.name], type) and issubclass(hints[each.name], Config):
                yield from hints[each.name].flags()
            elif "help" in each.metadata:
                yield cls, each

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Make one of a flat dict of values by field name; what the dict lacks has its default."""
        hints = typing.get_type_hints(cls)
        made = {}
        for each in fields(cls):
            if isinstance(hints[each.name], type) and issubclass(hints[each.name], Config):
                made[each.name] = hints[each.name].from_values(values)
            elif each.name in values:
                made[each.name] = values[each.name]
        return cls(**made)

    def values(self) -> dict[str, Any]:
        """All values, flat, by field name."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        nested = {name: value for name, value in own.items() if isinstance(value, Config)}
        flat = {name: value for name, value in own.items() if name not in nested}
        for value in nested.values():
            flat |= value.values()
        return flat

    def replaced(self, **changes: Any) -> Self:
        """A copy with other values, given by the names of fields at any depth."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        made = {name: value.replaced(**changes) for name, value in own.items() if isinstance(value, Config)}
        return replace(self, **made, **{name: changes[name] for name in own if name in changes and name not in made})

    def check(self) -> Self:
        """Refuse values out of their range, before any work starts.

        :raises UserError: for the first such value; names its flag, the value and what is required.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Config):
                value.check()
            elif "help" in each.metadata:
                check_value(each, value)
        return self


def check_value(each: dataclasses.Field, value: Any) -> None:
    """Hold a value against its field.

    :raises UserError: where it does not fit.
    """
    meta = each.metadata
    requirement = None
    if value is None:
        return  # the parser gives None only to fields that may be None
    values = value if isinstance(value, tuple) else (value,)
    numbers = [v for v in values if type(v) in (int, float)]
    if not all(map(math.isfinite, numbers)):
        requirement = " and ".join(filter(None, ("finite", describe_bounds(meta["bounds"]))))
    elif meta["bounds"] and len(numbers) < len(values):  # of a file: argparse has read the flags
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
    """Whether a field's type admits None."""
    return isinstance(annotation, types.UnionType) and type(None) in typing.get_args(annotation)
