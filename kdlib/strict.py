"""Errors that are one clear line, and the one check of types and ranges that every description of a run passes."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Input that cannot be used: the message names what is wrong and what to do about it."""

    def _render_traceback_(self) -> list[str]:  # IPython prints this instead of a stack trace
        return [f"{type(self).__name__}: {self}"]


class TrainingError(RuntimeError):
    """A training that failed (NaN, an inactive distillation term): the message names method, epoch and cause."""

    _render_traceback_ = InputError._render_traceback_


FORESEEN = {  # errors by the names that kernels and processes give: a `DefectError` has shown its table there
    "InputError": InputError, "DefectError": InputError, "TrainingError": TrainingError,
}  # fmt: skip


def lookup(kind: str, name: str, options: Mapping):
    """`options[name]`, or an error that lists the names there are."""
    if not isinstance(name, str) or name not in options:
        raise InputError(f"{kind} {name!r} does not exist: choose from {', '.join(options)}")
    return options[name]


def check_each_once(**lists: Sequence[object]) -> None:
    """Raises InputError for an empty list, or one that names something twice."""
    for name, given in lists.items():
        if not given or len(set(given)) < len(given):
            raise InputError(f"{name} {list(given)}: give at least one, and each once")


def either(names) -> str:
    """The names as a choice in words."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


@dataclass(frozen=True)
class Range:
    """Numbers that a field of type `Annotated[float, Range(...)]` allows; `above` and `below` leave out the end."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        reached = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        return reached and (self.above is None or value > self.above) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        if (self.high, self.above, self.below) == (None, None, None):
            return f"of {self.low:g} or more"
        ends = {"from {:g}": self.low, "above {:g}": self.above, "up to {:g}": self.high, "below {:g}": self.below}
        return " and ".join(text.format(end) for text, end in ends.items() if end is not None)


AtLeastOne = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Whole = Annotated[int, Range(0)]


def check_fields(made: object) -> None:
    """Checks every field of a dataclass against its annotation; lists become tuples, and whole numbers floats where
    a float belongs, so that equal descriptions have equal keys. For `__post_init__`.

    Annotations may be int, float, str, bool, Literal, tuple, a dataclass, `X | None`, and `Annotated` with a `Range`.

    Raises: InputError: names the field, its value and what is allowed.
    """
    kinds, name = _kinds(type(made)), vars(made).get("name")
    for field in dataclasses.fields(made):
        called = f" {name!r}" if isinstance(name, str) and field.name != "name" else ""
        what = f"{type(made).__name__.lower()}{called}, {field.name}"
        object.__setattr__(made, field.name, checked(what, getattr(made, field.name), kinds[field.name]))


def checked(what: str, value: Any, kind: Any) -> Any:
    """The value as an annotation wants it, see `check_fields`. Raises: InputError: what, its value, what is allowed."""
    try:
        return _read(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{what} {value!r}: give {_words(kind)}") from None


@functools.cache
def _kinds(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _read(value: Any, kind: Any) -> Any:
    """The value as the annotation wants it. Raises: ValueError or TypeError where it is not of that kind."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _read(value, args[0])
        if value is not None and not args[1].holds(value):
            raise ValueError
    elif origin in (Union, types.UnionType):
        return None if value is None else _read(value, next(a for a in args if a is not type(None)))
    elif origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise ValueError
    elif origin is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_read(part, own) for part, own in zip(value, each, strict=True))
    elif kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError
        return operator.index(value) if kind is int else float(value)
    elif kind not in (Any, object) and not isinstance(value, kind):
        raise ValueError
    return value


def _words(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_words(args[0])} {args[1]}"
    if origin in (Union, types.UnionType):
        return f"{_words(next(a for a in args if a is not type(None)))}, or None"
    if origin is Literal:
        return either(args)
    if origin is tuple:
        return f"{'a list' if args[-1] is Ellipsis else f'{len(args)} values'}, each {_words(args[0])}"
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return plain.get(kind) or f"a {kind.__name__}"
