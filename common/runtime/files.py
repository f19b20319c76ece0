"""Writing files: never half of one, never over a file that is not ours, and nothing left behind.

A file or folder is written under a temporary name beside its place, and takes its place in one step. Who writes it
holds a lock on it, by which what a killed process left behind is told apart, and removed.
"""

import contextlib
import ctypes
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.runtime import plan
from common.runtime.errors import UserError
from common.runtime.signals import deferred

TEMPORARY = ".pruning-part"  # how temporary names end
MOST_NAMED = 8  # of what is there instead of what was asked for
A_MODEL = ("*.pth", "*/config.json")  # what shows that there is one, see `no_such`
LONGEST_STEM = 60  # characters of a file's own name in its temporary one: names may have 255 bytes


# --- writing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator["_Handle"]:
    """A binary file handle whose content becomes `path` when the block ends well; a symbolic link is replaced.

    In a plan, nothing is written.
    """
    path, handle = Path(path), _Handle()
    if planned := plan.current():
        with open(os.devnull, "wb") as handle.file:
            yield handle
        planned.disk[str(path)] = handle.written
        return
    try:
        with _temporary_beside(path, is_folder=False) as (temporary, descriptor):
            with os.fdopen(descriptor, "wb", closefd=False) as handle.file:
                yield handle
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
            os.replace(temporary, path)
    except BaseException as error:
        cause = handle.failure or error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None  # the temporary name would tell nobody
        raise


class _Handle:
    """A file that remembers why writing failed: torch and numpy turn a full disk into errors that don't say so."""

    file = failure = None
    written = 0  # bytes

    def write(self, data):
        self.written += memoryview(data).nbytes
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, or what that links to, when the block ends well."""
    path = real(path)
    with _temporary_beside(path, is_folder=True) as (temporary, _):
        yield temporary
        _settle(temporary)
        if path.exists():
            _exchange(temporary, path)
        else:
            os.rename(temporary, path)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for the length of the block, where the system has such; a `UserError` if there is no room for it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(tempfile.gettempdir()):
            raise  # of another file
        place = os.environ.get("TMPDIR", "the folder for temporary files")
        raise UserError(f"{place}: {error.strerror}; let TMPDIR name a folder that is there and has room") from None


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, atomically; see `atomic_file`."""
    with atomic_file(path) as handle:
        handle.write(content)


def real(path: str | Path) -> Path:
    """The place that a path leads to, past all symbolic links."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _temporary_beside(path, is_folder):
    """(temporary file or folder, descriptor that holds the lock on it); what has not taken its place is removed."""
    names = {"prefix": f".{path.name[:LONGEST_STEM]}.", "suffix": TEMPORARY, "dir": path.parent}
    with deferred():
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        while True:
            if is_folder:
                temporary = tempfile.mkdtemp(**names)
                descriptor = os.open(temporary, os.O_RDONLY)
            else:
                descriptor, temporary = tempfile.mkstemp(**names)
            if _lock(descriptor):
                break
            os.close(descriptor)  # another process took it for abandoned, before it was locked
        try:
            yield Path(temporary), descriptor
            _sync(path.parent)
        finally:
            _remove(Path(temporary))
            os.close(descriptor)


def _exchange(one, other):
    """Let two folders change places: in one step, where the system and the file system can (renameat2 of Linux)."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None or renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        aside = one.with_name(f"{one.name}{TEMPORARY}")
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def _settle(folder):
    """Give a folder and all files in it the modes that files have here, and bring them to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as handle:
                os.fchmod(handle.fileno(), 0o666 & ~_umask())  # safetensors gives 0600
                os.fsync(handle.fileno())
        os.chmod(parent, 0o777 & ~_umask())
        _sync(parent)


def _sync(folder):
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems cannot
        os.fsync(descriptor)
    os.close(descriptor)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- what killed processes leave behind ------------------------------------------------------------------------------


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed processes left beside `path` when they wrote it."""
    path = Path(path)
    remove_leftovers_in(path.parent, f".{glob.escape(path.name[:LONGEST_STEM])}.")


def remove_leftovers_in(folder: str | Path, prefix: str = ".") -> None:
    """Remove what killed processes left when they wrote files of a folder, or those with a prefix."""
    for leftover in Path(folder).glob(f"{prefix}*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _lock(descriptor):  # no process writes it
                    _remove(leftover)
            finally:
                os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that only unfinished work has."""
    return name.startswith(".") and name.endswith(TEMPORARY)


def _remove(path):
    """Remove a file, or a folder as far as it lets us."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(descriptor):
    """Lock a temporary file or folder for as long as its descriptor is open; False if another process was faster."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(descriptor).st_nlink > 0


# --- what is there ---------------------------------------------------------------------------------------------------


def no_such(path: str | Path, what: str, made_by: str, *patterns: str) -> UserError:
    """The error that a path is not there: which script makes such a thing, and which ones lie where it was looked for.

    `patterns`: what shows one, as "*.json", or "*/config.json" for the folder of such a file.
    """
    there = {found.parent if "/" in pattern else found for pattern in patterns for found in _beside(path, pattern)}
    names, more = sorted(map(str, there)), len(there) - MOST_NAMED
    listed = f"; there are {', '.join(names[:MOST_NAMED])}{f' and {more} more' if more > 0 else ''}" if names else ""
    return UserError(f"{path}: no such {what}; {made_by}{listed}")


def _beside(path, pattern):
    with contextlib.suppress(OSError):  # a folder that may not be read
        yield from Path(path).parent.glob(pattern)


def damage_in(path: str | Path) -> str | None:
    """What a full disk or a power cut has left of a file: nothing, or zeros alone; None of any other, or of none."""
    if not os.path.isfile(path):  # a pipe or a device may have no end
        return None
    with open(path, "rb") as handle:
        while part := handle.read(2**20):
            if part.strip(b"\0"):
                return None
    return (
        f"{path}: is {'all zeros' if os.path.getsize(path) else 'empty'}, as a full disk leaves a file; make it again"
    )


# --- may it be written? --------------------------------------------------------------------------------------------


def check_writable(path: str | Path, *, is_file: bool = False) -> None:
    """Make sure, before any long work, that `path` can be written, and remove what killed processes left there.

    Raises:
        UserError: it cannot, is a folder but `is_file`, or is neither a file nor a folder, as /dev/null is; or begins
            with ~.
    """
    if str(path).startswith("~"):
        raise UserError(f"{path}: the shell has left ~ as it stands, as it does after =; write $HOME instead")
    place = real(path)
    if is_file and place.is_dir():
        raise UserError(f"{path}: is a folder where a file belongs; choose another output")
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise UserError(f"{path}: is neither a file nor a folder, and is never replaced; choose another output")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
        remove_leftovers(place)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {parent}: {error.strerror}") from None


def check_apart(outputs: dict[str, str | Path | None], inputs: dict[str, object]) -> None:
    """Make sure that no output is an input, or another output; else a `UserError` with the two flags.

    Args:
        outputs, inputs: {flag: path, several in a list, or None where it was not given}.
    """
    taken = {}
    for flag, paths in {**inputs, **outputs}.items():
        for path in paths if isinstance(paths, (list, tuple)) else [paths]:
            if path is None:
                continue
            other = taken.setdefault(real(path), flag)
            if other != flag and flag in outputs:
                raise UserError(f"{other} and {flag}: both name {path}, which would be lost; give another {flag}")
