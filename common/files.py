"""Writing files: never half of one, never over a file that is not ours, and nothing left behind.

A file or folder is written under a temporary name beside its place, and takes its place in one step. Who writes it
holds a lock on it, so that the next one who writes there can tell what a killed process left behind, and removes it.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from common.interruption import deferred

try:
    import fcntl
except ImportError:  # not a Unix: there, what a killed process leaves behind stays
    fcntl = None

TEMPORARY = ".pruning-part"  # how temporary names end
ASIDE = ".pruning-old"  # and those of old folders, where two cannot be exchanged in one step
LONGEST_STEM = 60  # characters of a file's own name in its temporary one: names may have 255 bytes
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


# --- writing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | Path, *, follow: bool = True) -> Iterator["_Handle"]:
    """A binary file handle whose content becomes `path` when the block ends well, and nothing otherwise.

    A signal waits until it is there.

    Args:
        follow: a symbolic link stays, and the file that it leads to is written: what the user named. Without it the
            link is replaced: within a folder of the suite's own, where no link belongs.
    """
    with deferred(), _atomic_file(path, follow) as handle:
        yield handle


@contextlib.contextmanager
def _atomic_file(path, follow):
    shown, path = path, real(path) if follow else real(Path(path).parent) / Path(path).name
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers_of(path)
    temporary, descriptor = _make_temporary(path, is_folder=False)
    handle = _Handle()
    try:
        with os.fdopen(descriptor, "wb") as file:
            handle.file = file
            yield handle
            file.flush()
            os.fchmod(descriptor, 0o666 & ~_umask())
            os.fsync(descriptor)
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        cause = handle.failure or error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(shown)) from None  # the temporary name would tell nobody
        raise


class _Handle:
    """A file that remembers why writing failed: torch and numpy turn a full disk into errors that don't say so."""

    file = failure = None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, in place of what was there.

    Linux exchanges the two in one step. Elsewhere that takes two, and a crash between them leaves the old folder under
    a name from which `remove_leftovers` puts it back. A signal waits until it is there.
    """
    with deferred(), _atomic_folder(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _atomic_folder(path):
    path = real(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary, descriptor = _make_temporary(path, is_folder=True)
    try:
        yield temporary
        _settle(temporary)
        if not os.path.lexists(path):
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            aside = temporary.with_suffix(ASIDE)
            os.rename(path, aside)
            os.rename(temporary, path)
            aside.rename(temporary)
        _sync(path.parent)
    finally:  # now the old one, or after a failure the new one
        _remove(temporary)
        os.close(descriptor)


def write_bytes(path: str | Path, content: bytes, *, follow: bool = True) -> None:
    """Write a whole file, atomically; see `atomic_file`."""
    with atomic_file(path, follow=follow) as handle:
        handle.write(content)


def real(path: str | Path) -> Path:
    """The place that a path leads to, past all symbolic links."""
    return Path(os.path.realpath(path))


def _make_temporary(path, is_folder):
    """A temporary file or folder beside `path`, and a descriptor that holds the lock on it."""
    names = {"prefix": f".{path.name[:LONGEST_STEM]}.", "suffix": TEMPORARY, "dir": path.parent}
    while True:
        if is_folder:
            temporary = tempfile.mkdtemp(**names)
            descriptor = os.open(temporary, os.O_RDONLY)
        else:
            descriptor, temporary = tempfile.mkstemp(**names)
        if _lock(descriptor) is not False:
            return Path(temporary), descriptor
        os.close(descriptor)  # another process took it for abandoned, before it was locked


def _settle(folder):
    """Give a folder and all files in it the modes that files have here, and bring them to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fchmod(descriptor, 0o666 & ~_umask())  # safetensors gives 0600
            os.fsync(descriptor)
            os.close(descriptor)
        os.chmod(parent, 0o777 & ~_umask())
        _sync(parent)


def _exchange(one, other):
    """Exchange two paths in one step; returns whether this system and file system can."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _sync(folder):
    """Bring a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- what killed processes leave behind ------------------------------------------------------------------------------


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed processes left beside `path` when they wrote it, and put back an old folder set aside."""
    _remove_leftovers_of(real(path))


def _remove_leftovers_of(path):
    _clean(path.parent, re.escape(path.name[:LONGEST_STEM]), restore=path)


def remove_leftovers_in(folder: str | Path) -> None:
    """Remove what killed processes left when they wrote files of a folder."""
    _clean(real(folder), ".+")


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that only unfinished work has."""
    return name.startswith(".") and name.endswith((TEMPORARY, ASIDE))


def hold(handle) -> int:
    """Keep the lock that `atomic_file` has on what is written, so that no process ever takes it for abandoned.

    Returns:
        a descriptor, to be closed in the end.
    """
    return os.dup(handle.fileno())


def remove_abandoned(path: str | Path) -> None:
    """Remove a file of ours, unless a process holds it (see `hold`)."""
    with contextlib.suppress(OSError), _locked(path) as is_abandoned:
        if is_abandoned:
            _remove(Path(path))


def _clean(folder, stem, restore=None):
    pattern = re.compile(rf"\.{stem}\.\w+({re.escape(TEMPORARY)}|{re.escape(ASIDE)})")
    try:
        found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # no such folder, or not for us to read
        return
    for path in found:
        with contextlib.suppress(OSError), _locked(path) as is_abandoned:
            if not is_abandoned:
                continue
            if restore and path.suffix == ASIDE and not os.path.lexists(restore):
                os.rename(path, restore)
            else:
                _remove(path)


def _remove(path):
    """Remove a file, or a folder as far as it lets us."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(descriptor):
    """Lock a temporary file or folder for as long as its descriptor is open.

    Returns:
        whether it is locked now: not if another process has it, or has removed the file; None where there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return os.fstat(descriptor).st_nlink > 0


@contextlib.contextmanager
def _locked(path):
    """Hold the lock on a temporary file, if the process that made it is gone; gives whether it is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield _lock(descriptor) is True
    finally:
        os.close(descriptor)


# --- may it be written? --------------------------------------------------------------------------------------------


def check_writable(path: str | Path, *, is_file: bool = False) -> None:
    """Make sure, before any long work, that `path` can be written. Folders on the way to it may be missing.

    What a killed process left there is removed on the way.

    Raises:
        UserError: a parent is a file, the folder does not let us write, or `path` is a folder but `is_file`, or is
            neither a file nor a folder (a device, a pipe, a symbolic link in a circle).
    """
    place = real(path)
    if is_file and place.is_dir():
        raise UserError(f"{path}: is a folder where a file belongs; choose another output")
    if os.path.lexists(place) and stat.S_IFMT(os.lstat(place).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{path}: is neither a file nor a folder, and is never replaced; choose another output")
    parent = place.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {parent}: {error.strerror}") from None
    remove_leftovers(place)


def check_apart(outputs: dict[str, str | Path | None], inputs: dict[str, object]) -> None:
    """Make sure that no output is an input, or another output, and none lies where a file is to be.

    Args:
        outputs: {flag: path, None where it was not given}.
        inputs: {flag: path, several in a list, or None}.
    Raises:
        UserError: two flags name one place.
    """
    taken = {}
    for flag, given in {**inputs, **outputs}.items():
        for path in given if isinstance(given, (list, tuple)) else [given]:
            if path is None:
                continue
            other = taken.setdefault(real(path), flag)
            if other != flag and flag in outputs:
                raise UserError(f"{other} and {flag}: both name {path}, which would be lost; give another {flag}")


# --- may it be read? -----------------------------------------------------------------------------------------------


def check_regular(path: str | Path) -> None:
    """Make sure that an input is a file or a folder, and so is all that lies in the folder; or that nothing is there.

    Reading from a device or a pipe may never end.

    Raises:
        UserError: it is something else, or a symbolic link in a circle.
    """
    kind = _kind_of(path)
    if kind == stat.S_IFDIR:
        for name in sorted(os.listdir(path)):
            if _kind_of(os.path.join(path, name)) not in (stat.S_IFREG, stat.S_IFDIR, None):
                raise UserError(f"{os.path.join(path, name)}: is neither a file nor a folder; take it away")
    elif kind not in (stat.S_IFREG, None):
        raise UserError(f"{path}: is neither a file nor a folder; give one")


def _kind_of(path):
    """What a path leads to, as in `stat.S_IFMT`; None if there is nothing, S_IFLNK if it leads round in a circle."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return stat.S_IFLNK
        return None  # no right to look, or a file where a folder belongs: whoever opens it says so
