"""Files that are written whole or not at all; digests against hashlib; what error messages name."""

import hashlib
import json
import os
import stat

import pytest

from common.errors import UserError
from common.records import (
    atomic_file,
    atomic_folder,
    check_writable,
    differences,
    digest,
    file_digest,
    is_done,
    keeps_existing,
    make_record,
    read_json,
    write_json,
)


class Interruption(Exception):
    """Stands for anything that stops a writer half-way."""


@pytest.fixture
def umask():
    """Set the umask for the length of a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def names(folder):
    return sorted(os.listdir(folder))


# --- atomic files --------------------------------------------------------------------------------------------------


def test_a_file_becomes_what_was_written(tmp_path):
    with atomic_file(tmp_path / "a") as handle:
        handle.write(b"whole")
        assert not (tmp_path / "a").exists()  # not before the end
    assert (tmp_path / "a").read_bytes() == b"whole" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("stop", [Interruption, KeyboardInterrupt])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path, stop):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(stop), atomic_file(tmp_path / "a") as handle:
        handle.write(b"half")
        raise stop
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_file_in_a_folders_place_fails_and_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError), atomic_file(tmp_path / "a") as handle:
        handle.write(b"new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").is_dir()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_file_or_folder(tmp_path, umask, mask):
    """Oracle: what open() and mkdir() make under the same umask."""
    umask(mask)
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain folder").mkdir()
    write_json(tmp_path / "file", {})
    with atomic_folder(tmp_path / "folder"):
        pass
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert modes["file"] == modes["plain"] and modes["folder"] == modes["plain folder"]


# --- atomic folders ------------------------------------------------------------------------------------------------


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "stale").write_text("old")
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "fresh").write_text("new")
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["fresh"]


@pytest.mark.parametrize("stop", [Interruption, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path, stop):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "kept").write_text("old")
    with pytest.raises(stop), atomic_folder(tmp_path / "f") as folder:
        (folder / "half").write_text("new")
        raise stop
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["kept"]


def make_file(path):
    path.write_text("old")


def make_link(path):
    (path.parent.parent / "elsewhere").mkdir()
    (path.parent.parent / "elsewhere" / "kept").write_text("old")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("make", [make_file, make_link])
def test_a_folder_replaces_a_file_or_a_link_and_leaves_nothing_behind(tmp_path, make):
    work = tmp_path / "work"
    work.mkdir()
    make(work / "f")
    for round_ in ("first", "second"):  # what the first leaves behind would be in the second's way
        with atomic_folder(work / "f") as folder:
            (folder / round_).write_text("new")
        assert names(work) == ["f"] and names(work / "f") == [round_]
    if make is make_link:
        assert names(tmp_path / "elsewhere") == ["kept"]


# --- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file; maker.py makes it"),
        (b"{", "malformed JSON"),
        (b"", "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b"[1]", "holds a JSON list where an object belongs; maker.py makes one"),
        (b"3", "holds a JSON int"),
        (b"\xff\xfe", "is not a JSON text file; maker.py makes one"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
    ],
    ids=["absent", "cut", "empty", "deep", "list", "number", "binary", "twins"],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path, "maker.py")
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


def test_a_folder_is_no_json_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path, "maker.py")


def test_json_survives_the_file(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"ü": "ß"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "maker.py") == value
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize(
    "written, overwrite, kept",
    [
        (None, False, False),
        ('{"a": 1, "b": 2}', False, True),
        ('{"b": 2,\n "a": 1}', True, True),
        ('{"a": 2}', True, False),
        ("{", True, False),
    ],
)
def test_an_existing_file_is_kept_if_it_holds_the_same(tmp_path, written, overwrite, kept):
    if written is not None:
        (tmp_path / "x").write_text(written)
    assert keeps_existing(tmp_path / "x", {"a": 1, "b": 2}, overwrite) is kept


@pytest.mark.parametrize("written", ['{"a": 2}', "{", "by hand"])
def test_an_existing_file_that_holds_something_else_is_not_overwritten_unasked(tmp_path, written):
    (tmp_path / "x").write_text(written)
    with pytest.raises(UserError, match="holds something else; .*--overwrite"):
        keeps_existing(tmp_path / "x", {"a": 1}, False)


def test_an_output_is_checked_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "x")
    assert names(tmp_path) == []  # the folders are made when there is something to write
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "x")


# --- digests and records -------------------------------------------------------------------------------------------


def test_a_digest_is_sha256_of_the_sorted_compact_json():
    expected = hashlib.sha256(b'{"a":[1,{"c":null,"d":0.5}],"b":"x"}').hexdigest()
    assert digest({"b": "x", "a": [1, {"d": 0.5, "c": None}]}) == expected
    assert digest({"a": [1, {"c": None, "d": 0.5}], "b": "x"}) == expected


def test_a_digest_tells_values_and_their_order_apart():
    values = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"b": 1}, [1, 2], [2, 1], {"a": {"b": 1}}, {"a": None}]
    assert len({digest(value) for value in values}) == len(values)


def test_a_files_digest_is_hashlibs(tmp_path):
    content = bytes(range(256)) * 1000
    (tmp_path / "x").write_bytes(content)
    assert file_digest(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_a_record_says_who_made_it_from_what_and_holds_no_clock():
    record = make_record("prune.py", {"rate": 0.5}, measured=0.5)
    assert (record["script"], record["made_from"], record["measured"]) == ("prune.py", {"rate": 0.5}, 0.5)
    assert record["key"] == digest({"rate": 0.5})
    assert set(record["versions"]) == {"python", "torch", "transformers", "numpy"}
    assert record == make_record("prune.py", {"rate": 0.5}, measured=0.5)


@pytest.mark.parametrize(
    "there, record, overwrite, done",
    [
        (False, None, False, False),
        (False, {"key": digest("k")}, False, False),
        (True, {"key": digest("k")}, False, True),
        (True, {"key": digest("k")}, True, True),
        (True, {"key": "other"}, True, False),
        (True, None, True, False),
    ],
)
def test_an_output_is_done_if_it_is_there_under_the_same_key(tmp_path, there, record, overwrite, done):
    if there:
        (tmp_path / "x").write_text("")
    assert is_done(tmp_path / "x", record, "k", overwrite) is done


@pytest.mark.parametrize("record", [None, {}, {"key": "other"}])
def test_an_output_of_something_else_is_not_overwritten_unasked(tmp_path, record):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="made from other inputs or settings; .*--overwrite"):
        is_done(tmp_path / "x", record, "k", False)


@pytest.mark.parametrize(
    "found, text",
    [
        ({"epochs": 1, "lr": 0.1}, " (epochs: 1 there, 2 asked for)"),
        ({"epochs": 2}, " (lr: null there, 0.1 asked for)"),
        ({"epochs": 2, "lr": 0.1, "examples": "0" * 64}, " (examples: not the same)"),
        ({"epochs": 2, "lr": 0.1}, ""),
        (None, ""),
    ],
)
def test_what_differs_is_said_setting_by_setting(found, text):
    """By hand. A digest says nothing to a reader, so its value is not shown."""
    assert differences({"made_from": found}, {"epochs": 2, "lr": 0.1}) == text


def test_no_file_of_ours_holds_what_json_does_not_know(tmp_path):
    """Oracle: RFC 8259, which has no NaN and no infinities."""
    for value in (float("nan"), [float("inf")], {"a": {"b": -float("inf")}}):
        with pytest.raises(UserError, match="not a finite number"):
            write_json(tmp_path / "x.json", value)
    assert names(tmp_path) == []
