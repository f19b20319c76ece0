"""JSON files and records; digests against hashlib; what is replaced, and what error messages name."""

import hashlib
import os

import pytest
import torch

from common.runtime.errors import UserError
from common.runtime.records import (
    check_files,
    content_digest,
    digest,
    file_digest,
    is_done,
    keeps_existing,
    make_record,
    read_json,
    read_record,
    sealed,
    write_json,
    write_record,
)


def names(folder):
    return sorted(os.listdir(folder))


# --- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file; maker.py makes it"),
        (b"{", "malformed JSON"),
        (b"", "is empty, as a full disk leaves a file; make it again with maker.py"),
        (bytes(10), "is all zeros, as a full disk leaves a file; make it again with maker.py"),
        (b"[" * 100_000, "malformed JSON"),
        (b"[1]", "holds a list of 1 where an object belongs; maker.py makes one"),
        (b"\xff\xfe", "malformed JSON: 'utf-8' codec"),
        (b"1" * 5000, "malformed JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
    ],
    ids=["absent", "cut", "empty", "zeros", "deep", "list", "binary", "huge", "twins"],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, "maker.py")
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


def test_json_may_be_saved_as_windows_does(tmp_path):
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{\r\n "a": "\xc3\xa4"\r\n}\r\n')
    assert read_json(tmp_path / "x", "maker.py") == {"a": "ä"}


def is_dict(found):
    return isinstance(found, dict)


@pytest.mark.parametrize(
    "written, overwrite, kept",
    [
        (None, False, False),
        ('{"a": 1, "b": 2}', False, True),
        ('{"b": 2,\n "a": 1}', True, True),
        ('{"a": 2}', True, False),
    ],
)
def test_an_existing_file_is_kept_if_it_holds_the_same(tmp_path, written, overwrite, kept):
    if written is not None:
        (tmp_path / "x").write_text(written)
    assert keeps_existing(tmp_path / "x", {"a": 1, "b": 2}, overwrite, is_ours=is_dict) is kept


def test_an_existing_file_that_holds_something_else_is_not_overwritten_unasked(tmp_path):
    write_json(tmp_path / "x", {"a": 2})
    with pytest.raises(UserError, match="with other content; .*--overwrite"):
        keeps_existing(tmp_path / "x", {"a": 1}, False, is_ours=is_dict)


@pytest.mark.parametrize("written", ["[1]", "by hand", "[" * 100_000])
def test_a_file_of_another_kind_is_never_overwritten(tmp_path, written):
    (tmp_path / "x").write_text(written)
    with pytest.raises(UserError, match="no such output of this script"):
        keeps_existing(tmp_path / "x", {"a": 1}, True, is_ours=is_dict)
    assert (tmp_path / "x").read_text() == written


# --- digests and records -------------------------------------------------------------------------------------------


def test_a_digest_is_sha256_of_the_sorted_compact_json():
    expected = hashlib.sha256(b'{"a":[1,{"c":null,"d":0.5}],"b":"x"}').hexdigest()
    assert digest({"b": "x", "a": [1, {"d": 0.5, "c": None}]}) == expected
    assert digest({"a": [1, {"c": None, "d": 0.5}], "b": "x"}) == expected


def test_a_record_says_who_made_it_from_what_and_holds_no_clock():
    record = make_record("prune.py", {"rate": 0.5}, measured=0.5)
    assert (record["script"], record["made_from"], record["measured"]) == ("prune.py", {"rate": 0.5}, 0.5)
    assert record["key"] == digest({"rate": 0.5})
    assert set(record["versions"]) == {"composable-pruning", "python", "torch", "transformers", "numpy"}
    assert record == make_record("prune.py", {"rate": 0.5}, measured=0.5)


def record_of(made_from, script="maker.py"):
    return {"script": script, "key": digest(made_from)}


@pytest.mark.parametrize(
    "there, record, overwrite, done",
    [
        (False, None, False, False),
        (False, record_of("k"), False, False),
        (True, record_of("k"), False, True),
        (True, record_of("k"), True, True),
        (True, record_of("other"), True, False),
    ],
)
def test_an_output_is_done_if_it_is_there_under_the_same_key(tmp_path, there, record, overwrite, done):
    if there:
        (tmp_path / "x").write_text("x")
    assert is_done(tmp_path / "x", record, "k", overwrite, "maker.py") is done


@pytest.mark.parametrize(
    "record, overwrite, words",
    [
        (record_of("other"), False, "made from other inputs or settings; .*--overwrite"),
        (record_of("k", "other.py"), True, "no such output of this script"),
        (None, True, "no such output of this script"),
    ],
)
def test_an_output_of_something_else_is_not_overwritten(tmp_path, record, overwrite, words):
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match=words):
        is_done(tmp_path / "x", record, "k", overwrite, "maker.py")


def test_a_damaged_output_is_made_again_if_that_is_asked_for(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match="x: is cut short, or pass --overwrite"):
        is_done(tmp_path / "x", record_of("k"), "k", False, "maker.py", lambda: "x: is cut short")
    assert not is_done(tmp_path / "x", record_of("k"), "k", True, "maker.py", lambda: "x: is cut short")


def test_a_record_knows_when_it_was_changed(tmp_path):
    """A bit of every byte."""
    path = tmp_path / "record.json"
    record = sealed(make_record("prune.py", {"rate": 0.5}, measured=0.125))
    write_json(path, record)
    assert read_record(path) == record
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="record.json"):
            read_record(path)


def test_a_folders_record_knows_its_files(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    write_record(tmp_path, make_record("maker.py", {}))
    record = read_record(tmp_path / "record.json")
    assert record["files"] == {name: file_digest(tmp_path / name) for name in (os.path.join("inner", "a"), "b")}
    check_files(tmp_path, record)
    (tmp_path / "b").write_text("c")
    with pytest.raises(UserError, match="b: is not the file that was written"):
        check_files(tmp_path, record)
    check_files(tmp_path, record, lambda name: name != "b")
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="b: no such file"):
        check_files(tmp_path, record)


def test_a_contents_digest_tells_all_that_torch_saves_apart():
    one = torch.arange(6.0)
    values = [
        {"a": one},
        {"b": one},
        {"a": one.reshape(2, 3)},
        {"a": one.to(torch.bfloat16)},
        {"a": one.flip(0)},
        {"a": -one},  # its first entry is minus zero
        {"a": [one]},
        {"a": one, "b": None},
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": True},
        {},
        [],
        [[], []],
        [[[]]],
        {"a": torch.tensor(1.0)},
        {"a": torch.tensor([1.0])},
    ]
    assert len({content_digest(value) for value in values}) == len(values)
    assert content_digest({"a": one}) == content_digest({"a": torch.arange(6.0)})
    assert content_digest((1, 2)) == content_digest([1, 2])  # a file does not tell them apart either


def test_no_file_of_ours_holds_what_json_does_not_know(tmp_path):
    """Oracle: RFC 8259, which has no NaN and no infinities."""
    for value in (float("nan"), [float("inf")], {"a": {"b": -float("inf")}}):
        with pytest.raises(UserError, match="not a finite number"):
            write_json(tmp_path / "x.json", value)
    assert names(tmp_path) == []
