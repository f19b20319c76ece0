"""Files that are never half-written, and the records that stages leave for the next one.

Every output carries a record: the script, its arguments, the versions, what it was made from and what was
measured. A later stage reads records, never file names. A record holds no clock times, so two runs of the same
stage with the same seed write identical files.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

from common.errors import UserError

FORMAT_VERSION = 1
RECORD_NAME = "record.json"
VERSIONED_PACKAGES = ("torch", "transformers", "numpy")


# --- atomic writes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path):
    """A binary file handle whose content becomes `path` when the block ends well, and nothing otherwise.

    The temporary file lies in the same folder, so the final rename cannot cross file systems.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    handle = _Handle()
    try:
        with os.fdopen(descriptor, "wb") as file:
            handle.file = file
            yield handle
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        cause = handle.failure or error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None  # the temporary name would tell nobody
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
def atomic_folder(path):
    """A temporary folder that becomes `path` when the block ends well, replacing what was there.

    Two renames swap an old folder for the new one; a crash between them leaves the old one beside it as
    `.NAME.old`, complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        old = path.with_name(f".{path.name}.old")
        _remove(old)
        if os.path.lexists(path):
            os.replace(path, old)
        os.replace(temporary, path)
        _remove(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path, content):
    """Write a whole file, atomically."""
    with atomic_file(path) as handle:
        handle.write(content)


def write_json(path, value):
    """Write `value` as indented JSON, atomically.

    Raises:
        UserError: it holds NaN or an infinity, which JSON does not know.
    """
    write_bytes(path, (json_text(value, indent=1) + "\n").encode())


def json_text(value, **layout):
    """`value` as JSON.

    Raises:
        UserError: it holds NaN or an infinity, which JSON does not know; a model or data that are damaged cause that.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        raise UserError("a result is not a finite number: the model or the data are damaged") from None


def keeps_existing(path, content, overwrite, *, is_derived=lambda found: False):
    """Whether a file need not be written because it holds this very content.

    Args:
        content: bytes, or a JSON value (layout and the order of keys do not count).
        is_derived: whether what was found there is a file that this suite derived and nobody edits; it is replaced
            without `overwrite`. Called with bytes or a JSON value, as `content` is.
    Raises:
        UserError: it holds something else, perhaps written by hand, and `overwrite` is off.
    """
    if not Path(path).exists():
        return False
    try:
        found = Path(path).read_bytes()
        found = found if isinstance(content, bytes) else json.loads(found)
        if found == content:
            return True
        replaceable = is_derived(found)
    except (OSError, ValueError):
        replaceable = False
    if not (overwrite or replaceable):
        raise UserError(
            f"{path}: exists already and holds something else; choose another output or pass --overwrite to replace it"
        )
    return False


def check_writable(path, *, is_file=False):
    """Make sure, before any long work, that `path` can be written. Folders on the way to it may be missing.

    Raises:
        UserError: a parent is a file, the folder does not let us write, or `path` is a folder but `is_file`.
    """
    if is_file and Path(path).is_dir():
        raise UserError(f"{path}: is a folder where a file belongs; choose another output")
    parent = Path(path).parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {parent}: {error.strerror}") from None


# --- reading ---------------------------------------------------------------------------------------------------


def read_json(path, made_by):
    """The JSON object in `path`.

    Args:
        made_by: the script that makes such a file, for the error message.
    Raises:
        UserError: absent, unreadable, malformed, a key given twice, or no JSON object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {made_by} makes it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a JSON text file; {made_by} makes one") from None
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_twins(path, pairs))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__} where an object belongs; {made_by} makes one")
    return value


def _no_twins(path, pairs):
    keys = [key for key, _ in pairs]
    twins = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else ()
    for key in twins:
        raise UserError(f"{path}: the key {key!r} stands twice in one object; keep one of them")
    return dict(pairs)


# --- fingerprints and records ----------------------------------------------------------------------------------


def digest(value):
    """SHA-256 (hex) of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path):
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def make_record(script, made_from, **content):
    """A record: which script made the output, from what, under which versions.

    Args:
        made_from: everything that determined the output, {name: JSON value}: inputs by their digests, settings as they
            are. It is kept in plain, so that a reader sees how the output was made, and as a digest, the "key".
        content: further JSON values.
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    return {
        "version": FORMAT_VERSION,
        "script": script,
        "key": digest(made_from),
        "made_from": made_from,
        **content,
        "versions": {"python": platform.python_version(), **versions},
    }


def check_distinct(files: dict[str, str | Path | None]) -> None:
    """Make sure that no two flags name one file: {flag: path, None where it was not given}.

    Raises:
        UserError: two do.
    """
    resolved = {}
    for flag, path in files.items():
        if path and (other := resolved.setdefault(Path(path).resolve(), flag)) != flag:
            raise UserError(f"{other} and {flag}: both name {path}; give two files")


def is_done(path, record, made_from, overwrite):
    """Whether the output at `path` need not be made again: it is there, and was made from the same things.

    Args:
        record: the record found at `path`, or None if there is none.
        made_from: see `make_record`.
    Raises:
        UserError: something else is there, and `overwrite` is off.
    """
    if not Path(path).exists():
        return False
    if record is not None and record.get("key") == digest(made_from):
        return True
    if record is None and Path(path).is_dir() and any(Path(path).iterdir()):
        raise UserError(f"{path}: is a folder that this suite did not write; choose another output")
    if not overwrite:
        raise UserError(
            f"{path}: exists already, made from other inputs or settings{differences(record, made_from)}; "
            "choose another output or pass --overwrite to replace it"
        )
    return False


def differences(record, wanted):
    """In which settings an output that is there differs from the wanted one, as " (…)"; "" where nothing is known.

    Args:
        record: what tells of the output, with "made_from" in it if it is known; may be None.
        wanted: {name: JSON value}.
    """
    found = (record or {}).get("made_from")
    if not isinstance(found, dict):
        return ""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return f" ({', '.join(_difference(name, found.get(name), wanted.get(name)) for name in names)})" if names else ""


def _difference(name, found, wanted):
    name = name.replace("_", " ")
    plain = all(
        isinstance(value, bool | int | float | str | None) and len(str(value)) < 40 for value in (found, wanted)
    )
    return f"{name}: {json.dumps(found)} there, {json.dumps(wanted)} asked for" if plain else f"{name}: not the same"
