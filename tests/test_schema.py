"""The combinators of schemas: what each takes, and where and how it says that something is wrong."""

import math

import pytest

from common.runtime.errors import UserError
from common.runtime.schema import (
    FILE_NAME,
    SHA256,
    Anything,
    Either,
    Fault,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Object,
    Text,
    Where,
    check,
    shown,
)

COUNT = Number(0, 10, whole=True)
POINT = Object({"x": Number(), "name": Text()}, {"tags": ListOf(Text(), "tag")})


@pytest.mark.parametrize(
    "schema, right, wrong",
    [
        (Number(), [0, -3, 0.5, 1e300, 2**53], [True, "1", None, [], math.nan, math.inf, -math.inf, 10**400]),
        (Number(0, 1), [0, 1, 0.5], [-1e-9, 1.1, 2]),
        (COUNT, [0, 10], [-1, 11, 1.0, True, "1", 10**400]),
        (Number(whole=True), [-(2**53), 2**53], [2**53 + 1, 10**400, 0.0]),
        (Text(), ["", "a\n"], [1, None, [], True]),
        (Text(("a", "b")), ["a"], ["c", "", 1]),
        (Text(pattern="[a-c]+"), ["abc"], ["", "abcd", "abc\n", 1]),
        (SHA256, ["0" * 64], ["0" * 63, "G" * 64, "0" * 64 + "\n"]),
        (FILE_NAME, ["a.npy", "ü b.json"], ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", ".hidden", "a\0b"]),
        (Anything(), [None, 1, {}], []),
        (Maybe(COUNT), [None, 3], [11, "3"]),
        (ListOf(COUNT), [[], [1, 2]], [[11], {}, "ab", (1,), None]),
        (ListOf(COUNT, shortest=1, longest=2), [[1], [1, 2]], [[], [1, 2, 3]]),
        (MapOf(COUNT), [{}, {"a": 1}], [{"a": "1"}, [], None]),
        (MapOf(COUNT, Text(("a", "b")), smallest=1), [{"a": 1}], [{}, {"c": 1}]),
        (
            POINT,
            [{"x": 1, "name": "p"}, {"x": 1, "name": "p", "tags": []}],
            [{"x": 1}, {"x": 1, "name": "p", "y": 2}, 3],
        ),
        (Object({}, {"a": COUNT}, others=True), [{}, {"b": "?"}, {"a": 1}], [{"a": 11}]),
        (
            Either("kind", {"n": Object({"kind": Text(), "n": COUNT}), "t": Object({"kind": Text(), "t": Text()})}),
            [{"kind": "n", "n": 1}, {"kind": "t", "t": ""}],
            [{"kind": "t", "n": 1}, {"kind": "x"}, {"kind": []}, {}, 3],
        ),
        (
            Where(ListOf(COUNT), lambda value: None if sorted(value) == value else Fault((), "disorder", "order")),
            [[1, 2]],
            [[2, 1], 3],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_schema_takes(schema, right, wrong):
    assert [value for value in right if schema.find(value) is not None] == []
    assert [shown(value) for value in wrong if schema.find(value) is None] == []


@pytest.mark.parametrize(
    "value, message",
    [
        ({"x": "1", "name": "p"}, "f.json: 'x': '1' where a number belongs; mend it"),
        ({"x": True, "name": "p"}, "f.json: 'x': true where a number belongs; mend it"),
        ({"x": 1}, "f.json: 'name': nothing where something belongs; mend it"),
        ({"x": 1, "name": None}, "f.json: 'name': null where text belongs; mend it"),
        ({"x": 1, "name": "", "tags": ["a", {}]}, "f.json: 'tags': tag 1: an object where text belongs; mend it"),
        (
            {"x": 1, "name": "", "z": [1]},
            "f.json: 'z': a list of 1 where nothing (x, name, tags are known) belongs; mend it",
        ),
        ([], "f.json: a list of 0 where an object belongs; mend it"),
    ],
)
def test_a_fault_names_file_key_got_and_expected(value, message):
    with pytest.raises(UserError) as error:
        check("f.json", value, POINT, "mend it")
    assert str(error.value) == message


def test_what_is_expected_of_a_number():
    got = [str(Number(*ends, whole=whole).find("x")) for ends, whole in (((0,), True), ((0, 1), False), ((), False))]
    assert got == [
        "'x' where a whole number from 0 up belongs",
        "'x' where a number from 0 to 1 belongs",
        "'x' where a number belongs",
    ]


def test_a_long_value_is_cut_and_stays_in_one_line():
    text = shown("a\n" * 1000)
    assert len(text) == 60 and "\n" not in text and text.endswith("…")
