"""`python -m common.cli.check PATH…`: is everything in these libraries, models and other outputs as it was written?"""

import sys
from pathlib import Path

from common.cli import flags as cli
from common.composing.scheme import SCHEME_BY, is_scheme
from common.runtime.errors import UserError
from common.runtime.records import RECORD_NAME, check_file, check_files, read_json, read_record


def build_parser():
    parser = cli.Parser(__doc__, "example: python -m common.cli.check modules-finetuned finetuned/0")
    parser.prog = "common.cli.check"
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a library, a model's folder or .pth, a tokenizer, data, a scheme"
    )
    return parser


def check_all(paths: list[str]) -> dict:
    """Check outputs against their digests; the result for stdout: {"checked": {path: how many files}}.

    Raises:
        UserError: one is damaged, or no output of this suite, or too old to have digests.
    """
    return {"checked": {path: check(path) for path in paths}}


def check(path: str | Path) -> int:
    """Check one output; returns how many files were compared with their digests.

    Raises:
        UserError: see `check_all`.
    """
    path = Path(path)
    if path.is_dir() and (path / RECORD_NAME).is_file():
        record = read_record(path / RECORD_NAME)
        if isinstance(record.get("variants"), dict) and "stage" in record:
            return _check_library(path, record)
        if "digest" not in record:
            raise UserError(f"{path}: its record is older than digests, or written by hand; nothing to check it by")
        check_files(path, record)
        return len(record["files"]) + 1
    if path.suffix == ".pth" and path.is_file():
        from common.models.saving import damage  # torch takes seconds to import

        reason = damage(path)
        if reason:
            raise UserError(reason)
        return 1
    if path.is_file() and is_scheme(read_json(path, SCHEME_BY)):
        return 1
    raise UserError(f"{path}: is no output of this suite that has digests: a library, model, tokenizer, data or scheme")


def _check_library(path, record):
    """Compare the files of a library with their digests; returns how many there are, the record among them."""
    entries = [*record["variants"].values(), *([record["shared"]] if "shared" in record else [])]
    for entry in entries:
        check_file(path / entry["file"], entry["sha256"])
    return len(entries) + 1


def main(argv=None):
    return cli.launch(build_parser(), lambda args: check_all(args.paths), argv)


if __name__ == "__main__":
    sys.exit(main())
