"""Schemas in plain Python: what each form takes, and where and how it says that something is wrong."""

import math

import pytest

from common.runtime.schema import fault_in, shown

COUNT = range(11)
POINT = {"x": float, "name": str, "tags?": [str]}


@pytest.mark.parametrize(
    "schema, right, wrong",
    [
        (float, [0, -3, 0.5, 1e300, 2**53], [True, "1", None, [], math.nan, math.inf, -math.inf, 10**400]),
        (COUNT, [0, 10], [-1, 11, 1.0, True, "1", 10**400]),
        (str, ["", "a\n"], [1, None, [], True]),
        ({"a", "b"}, ["a"], ["c", "", 1, []]),
        (object, [None, 1, {}], []),
        ((COUNT,), [None, 3], [11, "3"]),
        ([COUNT], [[], [1, 2]], [[11], {}, "ab", None]),
        ({str: COUNT}, [{}, {"a": 1}], [{"a": "1"}, [], None]),
        (POINT, [{"x": 1, "name": "p"}, {"x": 1, "name": "p", "tags": []}], [{"x": 1}, POINT | {"y": 2}, 3]),
        ({"a?": COUNT, str: object}, [{}, {"b": "?"}, {"a": 1}], [{"a": 11}]),
    ],
    ids=map(str, range(10)),
)
def test_what_a_schema_takes(schema, right, wrong):
    assert [value for value in right if fault_in(value, schema)] == []
    assert [shown(value) for value in wrong if fault_in(value, schema) is None] == []
