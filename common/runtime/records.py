"""JSON files, and the records that stages leave for the next one.

Every output carries a record: the script, the versions, what it was made from and what was measured. A record holds no
clock times, so two runs with the same seed write identical files. It carries a digest of itself, and of every file that
it is about.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import __version__
from common.runtime import plan
from common.runtime.errors import UserError
from common.runtime.files import check_writable, damage_in, is_temporary, no_such, write_bytes
from common.runtime.schema import shown

FORMAT_VERSION = 1  # of configurations, schemes and .pth files
RECORD_VERSION = 2  # of records
RECORD_NAME = "record.json"
CARD_NAME = "README.md"  # which people edit, so that no record has its digest
VERSIONED_PACKAGES = ("torch", "transformers", "numpy")


# --- JSON --------------------------------------------------------------------------------------------------------


def write_json(path, value):
    """Write `value` as indented JSON, atomically; see `json_text`."""
    write_bytes(path, (json_text(value, indent=1) + "\n").encode())


def write_json_lines(path, rows):
    """Write `rows` as JSON, one on each line, atomically; see `json_text`."""
    write_bytes(path, "".join(json_text(row, ensure_ascii=False) + "\n" for row in rows).encode())


def json_text(value, **layout):
    """`value` as JSON; a `UserError` if it holds NaN or an infinity, which JSON does not know."""
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        raise UserError("a result is not a finite number: the model or the data are damaged") from None


def keeps(path: str | Path, overwrite: bool, *, is_ours: bool, is_same: bool, difference: str) -> bool:
    """Whether an output that is there already need not be made again.

    Args:
        is_ours: whether it is of the kind, and of the script, that is to be written; others are never replaced.
        is_same, difference: whether it is what would be made, and why it is not.
    Raises:
        UserError: it is not ours; or not the same, and `overwrite` is off.
    """
    if not is_ours:
        raise UserError(
            f"{path}: exists already and is no such output of this script, which never replaces it; "
            "choose another output"
        )
    if not (is_same or overwrite):
        raise UserError(
            f"{path}: exists already, {difference}; choose another output or pass --overwrite to replace it"
        )
    plan.note(path, plan.THERE if is_same else difference)
    return is_same


def keeps_existing(path: str | Path, content: dict, overwrite: bool, *, is_ours: Callable[[object], bool]) -> bool:
    """Whether a JSON file need not be written because it holds this very content; see `keeps`.

    `is_ours`: whether the JSON value that is there is of the kind that is to be written.
    """
    if not Path(path).exists():
        return False
    if is_lost(damage_in(path), overwrite):
        return False
    value = _json_in(path)
    of_kind = value is not None and is_ours(value)
    return keeps(path, overwrite, is_ours=of_kind, is_same=value == content, difference="with other content")


def is_lost(damage: str | None, overwrite: bool) -> bool:
    """Whether an output that is there is made again because of some damage; a `UserError` if `overwrite` is off."""
    if damage and not overwrite:
        raise UserError(f"{damage}, or pass --overwrite")
    return damage is not None


def check_report(path: str | Path | None, script: str, *, lines: bool = False) -> None:
    """Make sure, before any long work, that a JSON report can be written: nothing is there, or a report of this script.

    Args:
        path: None where none was asked for.
        lines: whether it is one of JSON lines, of which the first one tells.
    """
    if path is None:
        return
    check_writable(path, is_file=True)
    if Path(path).exists() and not damage_in(path):
        report = _json_in(path, lines)
        is_ours = isinstance(report, dict) and report.get("script") == script and "key" not in report  # of a record
        keeps(path, True, is_ours=is_ours, is_same=False, difference="written anew")


def _json_in(path, first_line=False):
    """The JSON value in a file, or in its first line; None if there is none."""
    try:
        if os.path.isfile(path):  # a pipe or a device may have no end
            with open(path, "rb") as handle:
                return json.loads(handle.readline() if first_line else handle.read())
    except (OSError, ValueError, RecursionError):
        pass
    return None


# --- reading ---------------------------------------------------------------------------------------------------


def read_json(path, made_by):
    """The JSON object in `path`; `made_by`: the script that makes such a file, for the error message.

    Raises:
        UserError: absent, unreadable, malformed, a key given twice, or no JSON object.
    """
    if not os.path.isfile(path):
        raise no_such(path, "file", f"{made_by} makes it", f"*{Path(path).suffix}")
    if damage := damage_in(path):
        raise UserError(f"{damage} with {made_by}")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=without_twins)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {shown(value)} where an object belongs; {made_by} makes one")
    return value


def without_twins(pairs: list[tuple]) -> dict:
    """An object of JSON, of which Python would keep the last of two equal keys; for `json.loads`."""
    twins = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twins:
        raise ValueError(f"the key {twins[0]!r} stands twice in one object; keep one of them")
    return dict(pairs)


# --- digests ---------------------------------------------------------------------------------------------------


def digest(value: object) -> str:
    """SHA-256 (hex) of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_digest(folder: str | Path) -> str:
    """SHA-256 (hex) of all files of a folder and their names, but for its record."""
    return digest(_file_digests(folder, without=(RECORD_NAME,)))


def content_digest(value: object) -> str:
    """SHA-256 (hex) of what `torch.save` can write without code: tensors, numbers, strings, None, lists and dicts."""
    sha = hashlib.sha256()
    _hash(sha, value)
    return sha.hexdigest()


def _hash(sha, value):
    if isinstance(value, dict):
        sha.update(f"{{{len(value)}".encode())
        for key, item in value.items():
            _hash(sha, key)
            _hash(sha, item)
    elif isinstance(value, list | tuple):
        sha.update(f"[{len(value)}".encode())
        for item in value:
            _hash(sha, item)
    elif hasattr(value, "untyped_storage"):  # a tensor; torch itself is heavy, and not for this file
        import torch

        sha.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        sha.update(repr((type(value).__name__, value)).encode("utf-8", "surrogatepass"))


# --- records ---------------------------------------------------------------------------------------------------


def make_record(script: str, made_from: dict, **content) -> dict:
    """A record: which script made the output, from what, under which versions, and further content.

    `made_from`: everything that determined the output, {name: JSON value}: inputs by their digests, settings as they
    are. It is kept in plain, and as a digest, the "key".
    """
    versions = {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    return {
        "version": RECORD_VERSION,
        "script": script,
        "key": digest(made_from),
        "made_from": made_from,
        **content,
        "versions": {"composable-pruning": __version__, "python": platform.python_version(), **versions},
    }


def sealed(record: dict) -> dict:
    """A record with the digest of its content in it, in place of an older one."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return {**content, "digest": digest(content)}


def write_record(folder: str | Path, record: dict) -> None:
    """Write the record of a finished folder into it, with the digests of all its files but the card."""
    files = _file_digests(folder, without=(RECORD_NAME, CARD_NAME))
    write_json(Path(folder) / RECORD_NAME, sealed({**record, "files": files}))


def _file_digests(folder, without):
    digests = {}
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = os.path.join(parent, name)
            if os.path.relpath(path, folder) not in without and not is_temporary(name):
                digests[os.path.relpath(path, folder)] = file_digest(path)
    return digests


def read_record(path: str | Path, made_by: str = "this suite") -> dict:
    """The record in a file, as it was written. One without a version was written by hand, and has no digest.

    Raises:
        UserError: see `read_json`; or it was changed since.
    """
    record = read_json(path, made_by)
    if ("version" in record or "digest" in record) and sealed(record) != record:
        raise UserError(f"{path}: was changed since it was written; make the output again")
    return record


def check_files(folder: str | Path, record: dict, is_meant: Callable[[str], bool] = lambda name: True) -> None:
    """Make sure that the files that a record lists are there, as they were written; see `check_file`.

    `is_meant`: of which files, by their names.
    """
    for name, wanted in record.get("files", {}).items():
        if is_meant(name):
            check_file(Path(folder) / name, wanted)


def check_file(path: Path, wanted: str, remedy: str = "make the output again") -> None:
    """Make sure that a file that a record lists is there, with the digest that the record says; else a `UserError`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, though the record lists it; {remedy}")
    if file_digest(path) != wanted:
        raise UserError(f"{path}: is not the file that was written (corrupt, truncated or replaced); {remedy}")


def is_done(
    path: str | Path,
    record: dict | None,
    made_from: dict,
    overwrite: bool,
    script: str,
    damage: Callable[[], str | None] = lambda: None,
) -> bool:
    """Whether the output at `path` need not be made again: it is there, intact, and was made from the same things.

    Args:
        record: the record found at `path`, or None if there is none.
        made_from: see `make_record`.
        script: the one that makes it; `overwrite` replaces only what the same one made.
        damage: says what is wrong with it, if it is not what was written.
    Raises:
        UserError: see `keeps`; or, with `overwrite` off, it is damaged.
    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        plan.note(path, plan.MISSING)
        return False
    if is_lost(damage_in(path / RECORD_NAME if path.is_dir() else path), overwrite):
        plan.note(path, plan.DAMAGED)
        return False
    is_ours = record is not None and record.get("script") == script
    is_same = is_ours and record.get("key") == digest(made_from)
    is_damaged = is_same and is_lost(damage(), overwrite)
    difference = plan.DAMAGED if is_damaged else f"made from other inputs or settings{differences(record, made_from)}"
    return keeps(path, overwrite, is_ours=is_ours, is_same=is_same and not is_damaged, difference=difference)


def differences(record: dict | None, wanted: dict) -> str:
    """In which settings an output that is there differs from the wanted one, as " (…)"; "" where nothing is known.

    `record`: may be None, or have no "made_from"; `wanted`: {name: JSON value}.
    """
    made_from = (record or {}).get("made_from")
    there, wanted = (_flat(settings) if made_from else {} for settings in (made_from, wanted))
    texts = [
        f"{name.replace('_', ' ')}: {shown(there.get(name))} there, {shown(wanted.get(name))} asked for"
        for name in {**there, **wanted}
        if there.get(name) != wanted.get(name)
    ]
    return f" ({', '.join(texts)})" if texts else ""


def _flat(settings):
    """Settings, and those within them that are objects, as {"criteria linear": "l1"}."""
    flat = {}
    for name, value in settings.items():
        flat |= {f"{name} {key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat
