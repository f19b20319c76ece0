"""Pictures on disk: which formats, how we know our own, and that equal figures give equal files."""

import io
from pathlib import Path

from common.errors import UserError
from common.files import check_writable, write_bytes

MARK = "composable-pruning plot_loss.py"  # in every picture, so that we know our own again
# Metadata: our mark, and without the date and version that matplotlib adds.
FORMATS = {
    "png": {"Software": MARK},
    "pdf": {"Creator": MARK, "Producer": None, "CreationDate": None},
    "svg": {"Creator": MARK, "Date": None},
}
# How the mark stands in a file's metadata: a picture that only mentions this suite somewhere is not ours.
SIGNS = {"png": f"tEXtSoftware\0{MARK}", "pdf": f"/Creator ({MARK})", "svg": f"<dc:title>{MARK}</dc:title>"}


def check_picture(path: str | Path) -> None:
    """Make sure, before any long work, that a picture can be written: nothing is there, or a picture of this suite.

    Raises:
        UserError: it cannot be written, or is of no format that is known, or something else is there.
    """
    suffix = _suffix(path)
    if suffix not in FORMATS:
        raise UserError(f"{path}: must end in one of {', '.join('.' + name for name in FORMATS)}")
    check_writable(path, is_file=True)
    if Path(path).exists() and SIGNS[suffix].encode() not in Path(path).read_bytes():
        raise UserError(f"{path}: exists already and is no picture of this suite; choose another output")


def save_picture(path: str | Path, figure) -> None:
    """Write a matplotlib figure, atomically, in the format that the path ends in; an equal picture is kept."""
    import matplotlib

    suffix, content = _suffix(path), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": MARK}):  # else names within an SVG are random
        figure.savefig(content, format=suffix, dpi=150, bbox_inches="tight", metadata=FORMATS[suffix])
    if not (Path(path).exists() and Path(path).read_bytes() == content.getvalue()):
        write_bytes(path, content.getvalue())


def _suffix(path):
    return Path(path).suffix[1:].lower()
