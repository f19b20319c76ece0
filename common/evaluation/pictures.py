"""Pictures: which formats, how we know our own, that equal figures give equal files, and what they all look like."""

import io
from pathlib import Path

from common.runtime.errors import UserError
from common.runtime.files import check_writable, damage_in, write_bytes

MARK = "composable-pruning plot_loss.py"  # in every picture, so that we know our own again
# Metadata: our mark, and without the date and version that matplotlib adds.
FORMATS = {
    "png": {"Software": MARK},
    "pdf": {"Creator": MARK, "Producer": None, "CreationDate": None},
    "svg": {"Creator": MARK, "Date": None},
}

# Okabe and Ito's colour-blind safe palette, without its yellow, which is too faint on white. As 7 colours and
# 11 markers come round at different times, the first 77 curves of a panel all look different, and 11 without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "os^DvPX*<p>"
METRICS = {"bleu": "BLEU", "chrf": "chrF", "f1": "macro F1", "matthews": "Matthews correlation"}  # and their axes
METRICS |= {f"rouge_{kind}": f"ROUGE-{kind.upper()}" for kind in ("1", "2", "l")}
LOOKS = {  # the series that several pictures show look matched in all of them
    "composed": (COLOURS[0], "o"),
    "searched": (COLOURS[0], "o"),
    "smallest": (COLOURS[0], "o"),
    "baseline": (COLOURS[1], "s"),
    "uniform": (COLOURS[1], "s"),
    "matched": (COLOURS[1], "^"),
    "measured": (COLOURS[2], "^"),
    "other": (COLOURS[2], "^"),
    "original": (COLOURS[6], "*"),
}
LEAST_TICKS = 4  # of an axis of values


def check_picture(path: str | Path) -> None:
    """Raise a UserError, before any long work, if a picture cannot be written, or something else is there."""
    suffix = Path(path).suffix[1:].lower()
    if suffix not in FORMATS:
        raise UserError(f"{path}: must end in one of {', '.join('.' + name for name in FORMATS)}")
    check_writable(path, is_file=True)
    if Path(path).exists() and not damage_in(path) and MARK.encode() not in Path(path).read_bytes():
        raise UserError(f"{path}: exists already and is no picture of this suite; choose another output")


def save_picture(path: str | Path, figure) -> None:
    """Write a matplotlib figure, atomically, in the format that the path ends in; an equal picture is kept."""
    import matplotlib

    suffix, content = Path(path).suffix[1:].lower(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": MARK}):  # else names within an SVG are random
        figure.savefig(content, format=suffix, dpi=150, bbox_inches="tight", metadata=FORMATS[suffix])
    if not (Path(path).exists() and Path(path).read_bytes() == content.getvalue()):
        write_bytes(path, content.getvalue())


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: what stands between two $ is no formula, and no character is unprintable."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text).replace("$", r"\$")


def metric_name(name: str) -> str:
    """How a metric's axis is called."""
    return METRICS.get(name, name.replace("_", " "))


def set_ticks(axis, *, whole: bool = False, log: bool = False) -> None:
    """Enough ticks on a matplotlib axis (`Axes.xaxis` or `yaxis`); `whole`: at whole numbers alone, such as epochs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    if whole:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    elif log and high > 10 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=20))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=8, min_n_ticks=LEAST_TICKS, steps=[1, 2, 2.5, 5, 10]))
        if log:
            axis.set_minor_locator(NullLocator())
    if log:
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
