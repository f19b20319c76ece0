"""Files that are written whole or not at all, over nothing that is not ours, and that leave nothing behind."""

import errno
import os
import stat
import subprocess
import sys

import pytest
from helpers import ROOT

from common.runtime import files
from common.runtime.errors import UserError
from common.runtime.files import (
    atomic_file,
    atomic_folder,
    check_apart,
    check_writable,
    damage_in,
    remove_leftovers,
    temporary_folder,
    write_bytes,
)
from common.training.stats import check_stats


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
def test_what_is_interrupted_leaves_the_old_content_and_nothing_else(tmp_path, stop):
    write_bytes(tmp_path / "a", b"old")
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "kept").write_text("old")
    with pytest.raises(stop), atomic_file(tmp_path / "a") as handle, atomic_folder(tmp_path / "f") as folder:
        handle.write(b"half")
        (folder / "half").write_text("new")
        raise stop
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a", "f"] and names(tmp_path / "f") == ["kept"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_an_ordinary_file_or_folder(tmp_path, umask, mask):
    """Oracle: what open() and mkdir() make under the same umask."""
    umask(mask)
    (tmp_path / "plain").write_text("")
    (tmp_path / "plain folder").mkdir()
    write_bytes(tmp_path / "file", b"")
    with atomic_folder(tmp_path / "folder") as folder:
        os.close(os.open(folder / "inner", os.O_CREAT, 0o600))  # as safetensors makes them
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes["file"] == modes["inner"] == modes["plain"] and modes["folder"] == modes["plain folder"]


# --- atomic folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_linux", [True, False])
def test_a_folder_replaces_the_old_one(tmp_path, monkeypatch, is_linux):
    """Also where no system call lets two folders change places."""
    if not is_linux:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: None)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "stale").write_text("old")
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "fresh").write_text("new")
    assert names(tmp_path) == ["f"] and names(tmp_path / "f") == ["fresh"]


# --- outputs ------------------------------------------------------------------------------------------------


def test_an_output_is_checked_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "deep" / "x")
    assert names(tmp_path) == []  # the folders are made when there is something to write
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="a folder where a file belongs"):
        check_writable(tmp_path, is_file=True)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        check_writable("/dev/null")
    with pytest.raises(UserError, match="the shell has left ~ as it stands"):
        check_writable("~/x")


def test_outputs_and_inputs_are_kept_apart(tmp_path):
    check_apart({"-o": tmp_path / "a", "--stats": None}, {"-m": tmp_path / "b", "-p": [tmp_path / "c"], "-t": None})
    check_apart({"-o": tmp_path / "a"}, {"-m": tmp_path / "b", "-t": tmp_path / "b"})  # inputs may be one
    (tmp_path / "link").symlink_to("b")
    for outputs, inputs, words in (
        ({"-o": tmp_path / "a", "--stats": tmp_path / "a"}, {}, "-o and --stats: both name"),
        ({"-o": tmp_path / "link"}, {"-m": tmp_path / "b"}, "-m and -o: both name"),
        ({"-o": tmp_path / "x" / ".." / "b"}, {"-p": [tmp_path / "c", tmp_path / "b"]}, "-p and -o: both name"),
    ):
        with pytest.raises(UserError, match=words):
            check_apart(outputs, inputs)


# --- leftovers -----------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from common.runtime.files import atomic_file, atomic_folder
with atomic_file("a"), atomic_folder("f") as folder:
    (folder / "half").write_text("half")
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print(flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    command = [sys.executable, "-c", KILLED, ROOT]
    subprocess.run([*command, "kill"], cwd=tmp_path, check=False)
    left = names(tmp_path)
    assert len(left) == 2 and all(files.is_temporary(name) for name in left)
    with subprocess.Popen([*command, "live"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        living.stdout.readline()  # now it has removed what the first one left, and is writing
        writing = names(tmp_path)
        assert len(writing) == 2 and not set(left) & set(writing)
        remove_leftovers(tmp_path / "a")
        remove_leftovers(tmp_path / "f")
        assert names(tmp_path) == writing
        living.communicate(b"")
    assert names(tmp_path) == ["a", "f"] and names(tmp_path / "f") == ["half"]


def test_a_link_to_a_folder_stays_and_one_to_a_file_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(f"disk/{name}")
    write_bytes(tmp_path / "file", b"new")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "a").write_text("new")
    assert not (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert names(tmp_path / "disk") == ["folder"] and names(tmp_path / "folder") == ["a"]


def test_a_folder_for_temporary_files_that_is_full_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    full = f"^{tmp_path}: No space left on device; let TMPDIR name"
    with pytest.raises(UserError, match=full), temporary_folder() as folder:
        assert folder.is_dir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="/none"), temporary_folder():
        os.listdir("/none")


# --- what a full disk leaves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [(b"", "is empty"), (bytes(10), "is all zeros"), (bytes(2**21), "is all zeros"), (bytes(2**21) + b"x", "")],
)
def test_a_file_that_holds_nothing_is_damaged(tmp_path, content, words):
    path = tmp_path / "stats.csv"
    path.write_bytes(content)
    assert words in (damage_in(path) or "") and bool(damage_in(path)) == bool(words)
    assert damage_in(tmp_path) is damage_in(tmp_path / "none") is None
    if words:
        check_stats(path)  # lost rows are no one else's file
    else:
        with pytest.raises(UserError, match="is no stats CSV"):
            check_stats(path)
