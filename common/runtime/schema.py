"""What a JSON file that people may edit must hold, said in plain Python beside the format's reader.

A schema is one of
    str, float, object: a text, a finite number (True is none), anything;
    range(1, 9): a whole number in it;
    {"a", "b"}: one of these texts;
    [schema]: a list of such items;
    (schema,): such a value, or null;
    {"key": schema, "other?": schema, str: schema}: an object with a key, perhaps with another one, and any others.
"""

import json
import sys

from common.runtime.errors import UserError

LONGEST_SHOWN = 60  # characters of a wrong value
NAMES = {str: "text", float: "a number", dict: "an object", list: "a list"}


def check(where: object, value: object, schema, remedy: str = "") -> None:
    """Make sure that a value of the file `where` is what its schema says; a `UserError` says what belongs there."""
    fault = fault_in(value, schema)
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


def fault_in(value: object, schema) -> str | None:
    """The first thing that is wrong with a value, after the keys that lead there; None if it is as its schema says."""
    if isinstance(schema, tuple):
        return None if value is None else fault_in(value, schema[0])
    if isinstance(schema, dict) and isinstance(value, dict):
        return _fault_in_object(value, schema)
    if isinstance(schema, list) and isinstance(value, list):
        faults = ((number, fault_in(item, schema[0])) for number, item in enumerate(value))
        return next((f"item {number}: {fault}" for number, fault in faults if fault), None)
    if isinstance(schema, range):
        fits = type(value) is int and value in schema
        expected = f"a whole number from {schema.start} to {schema.stop - 1}"
    elif isinstance(schema, set):
        fits, expected = isinstance(value, str) and value in schema, f"one of {', '.join(sorted(schema))}"
    elif schema is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
        expected = NAMES[float]
    else:
        fits = schema is object or isinstance(value, schema if isinstance(schema, type) else ())
        expected = NAMES.get(schema if isinstance(schema, type) else type(schema))
    return None if fits else f"{shown(value)} where {expected} belongs"


def _fault_in_object(value, schema):
    known = {key.removesuffix("?"): of_key for key, of_key in schema.items() if key is not str}
    for key in known:
        if key in schema and key not in value:
            return f"{key!r} is missing"
    for key, item in value.items():
        if key not in known and str not in schema:
            return f"{key!r} is not known ({', '.join(known)} are)"
        fault = fault_in(item, known.get(key, schema.get(str)))
        if fault:
            return f"{key!r}: {fault}"
    return None
