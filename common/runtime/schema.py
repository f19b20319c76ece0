"""Schemas of JSON values: what a file must hold, said once, beside the format's reader.

A schema is a small object with a `find(value)`: None if the value is right, else a `Fault`, the first one. By hand,
since that is a handful of classes: a library for it would be one more dependency, whose messages take several lines,
and which takes True for a number and 2.0 for a whole one. How deep a value may be nested is the parser's affair
(`records.parse_json`).
"""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from common.runtime.errors import UserError

LARGEST = 2**53  # of whole numbers: what every reader of JSON can hold exactly
LONGEST_SHOWN = 60  # characters of a wrong value


class Fault(NamedTuple):
    """Where a value is wrong (from the outside inwards), what is there and what belongs there."""

    keys: tuple[str, ...]
    got: str
    expected: str

    def within(self, key: str) -> "Fault":
        """The same, seen from further outside."""
        return self._replace(keys=(key, *self.keys))

    def __str__(self):
        return f"{''.join(f'{key}: ' for key in self.keys)}{self.got} where {self.expected} belongs"


def check(where: object, value: object, schema, remedy: str = "") -> None:
    """Make sure that a value of the file `where` is what its schema says.

    Raises:
        UserError: naming the file, the keys that lead to it, what is there, what belongs there, and the remedy.
    """
    fault = schema.find(value)
    if fault:
        raise UserError(f"{where}: {fault}" + (f"; {remedy}" if remedy else ""))


def shown(value: object) -> str:
    """A value in a message: JSON's own short ones as they are, of others the kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, both included; with `whole` an int. True is none."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def find(self, value):
        fits = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if fits and self.low <= value <= self.high and abs(value) <= (LARGEST if self.whole else sys.float_info.max):
            return None
        return Fault((), shown(value), self.expected)

    @property
    def expected(self):
        ends = (f" from {self.low}" if self.low > -math.inf else "") + (
            f" to {self.high}" if self.high < math.inf else ""
        )
        up = " up" if self.low > -math.inf and self.high == math.inf else ""
        return f"a {'whole ' if self.whole else ''}number{ends}{up}"


@dataclass(frozen=True)
class Text:
    """A string: one of `choices`, or one that a pattern matches in full, which `expected` puts into words."""

    choices: tuple[str, ...] = ()
    pattern: str = ""
    expected: str = ""

    def find(self, value):
        fits = isinstance(value, str) and (not self.choices or value in self.choices)
        if fits and (not self.pattern or re.fullmatch(self.pattern, value)):
            return None
        return Fault(
            (), shown(value), self.expected or (f"one of {', '.join(self.choices)}" if self.choices else "text")
        )


@dataclass(frozen=True)
class Anything:
    """Any value."""

    def find(self, value):
        return None


@dataclass(frozen=True)
class Maybe:
    """null, or what a schema says."""

    schema: object

    def find(self, value):
        fault = None if value is None else self.schema.find(value)
        return fault if fault is None or fault.keys else fault._replace(expected=f"{fault.expected}, or null,")


@dataclass(frozen=True)
class ListOf:
    """A list of some length whose items, called `each` and a number from 0, are all of one schema."""

    schema: object
    each: str = "item"
    shortest: int = 0
    longest: int | None = None

    def find(self, value):
        if not isinstance(value, list) or not self.shortest <= len(value) <= (self.longest or len(value)):
            some = f" of {self.shortest} {self.each}{'s' * (self.shortest > 1)} or more" if self.shortest else ""
            return Fault((), shown(value), f"a list{some}")
        faults = ((number, self.schema.find(item)) for number, item in enumerate(value))
        return next((fault.within(f"{self.each} {number}") for number, fault in faults if fault), None)


@dataclass(frozen=True)
class MapOf:
    """An object whose keys are free, or all of one schema, and whose values are of one schema."""

    schema: object
    keys: object = Anything()
    smallest: int = 0

    def find(self, value):
        if not isinstance(value, dict) or len(value) < self.smallest:
            what = "an object" if not self.smallest else "an object that is not empty"
            return Fault((), "an empty one" if value == {} else shown(value), what)
        for key, item in value.items():
            fault = self.keys.find(key) or (found.within(repr(key)) if (found := self.schema.find(item)) else None)
            if fault:
                return fault
        return None


@dataclass(frozen=True)
class Object:
    """An object with some keys, each of its own schema: those it must have, those it may have, and `others`, free."""

    required: dict = field(default_factory=dict)
    optional: dict = field(default_factory=dict)
    others: bool = False

    def find(self, value):
        if not isinstance(value, dict):
            return Fault((), shown(value), "an object")
        for key in self.required:
            if key not in value:
                return Fault((repr(key),), "nothing", "something")
        known = self.required | self.optional
        for key, item in value.items():
            if key in known:
                fault = known[key].find(item)
                if fault:
                    return fault.within(repr(key))
            elif not self.others:
                return Fault((repr(key),), shown(item), f"nothing ({', '.join(known)} are known)")
        return None


@dataclass(frozen=True)
class Either:
    """What one of several schemas says, chosen by a key of the object: {its value: schema}."""

    key: str
    schemas: dict

    def find(self, value):
        fault = Object({self.key: Text(tuple(self.schemas))}, others=True).find(value)
        return fault or self.schemas[value[self.key]].find(value)


@dataclass(frozen=True)
class Where:
    """What a schema says, and a condition across its parts that gives a `Fault` or None."""

    schema: object
    condition: Callable[[object], Fault | None]

    def find(self, value):
        return self.schema.find(value) or self.condition(value)


HEX = Text(pattern="[0-9a-f]{1,64}", expected="hexadecimal digits")
SHA256 = Text(pattern="[0-9a-f]{64}", expected="64 hexadecimal digits")
PATH = Text(pattern=r"(?s)[^\x00]+", expected="a path")
