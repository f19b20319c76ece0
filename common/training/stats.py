"""The CSVs that fine-tuning leaves, losses and seconds of every epoch, and the trackers that are told of them.

Each row says in its last column which run wrote it: the first digits of the run's key. A run replaces its own rows.
Those of other runs stay, so that the file of a library that grew tells of all that it took.
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from common.data.metrics import Classes, Summaries, Translations
from common.runtime.errors import UserError
from common.runtime.files import check_writable, damage_in, write_bytes

RUN_DIGITS = 12  # of a run's key, in the rows
STATS_COLUMNS = ("epoch", "train_loss", "val_loss", "train_seconds", "val_seconds", "run")
BLOCK_COLUMNS = ("block", "variant", "epoch", "train_loss", "val_loss", "run")
COMPOSITION_COLUMNS = ("composition", "epoch", "val_loss", "run")
METRICS = (*Translations.metrics, *Summaries.metrics, *Classes.metrics)  # columns of what some runs measure besides


class Epoch(NamedTuple):
    """A learner's figures of an epoch. `train_loss` is NaN where nothing was trained; `parts`: {name: val_loss}."""

    epoch: int
    train_loss: float
    val_loss: float
    parts: dict[str, float] = {}
    metric: float | None = None


class EpochSeconds(NamedTuple):
    """What an epoch of all learners together took."""

    epoch: int
    train: float
    validation: float


def check_stats(path, columns=STATS_COLUMNS):
    """Make sure, before any long work, that stats can be written to `path`, and that no other file is lost by it.

    Raises:
        UserError: it cannot be written, or holds something that is no CSV of these columns.
    """
    check_writable(path, is_file=True)
    _checked_rows(path, columns)


def _checked_rows(path, columns):
    """The rows of a stats CSV, as `_rows` reads them; a `UserError` if it is no CSV of these columns."""
    if not Path(path).is_file() or damage_in(path):
        return []
    try:
        with open(path, encoding="utf-8", newline="") as handle:
            header, *rows = csv.reader(handle, strict=True)
    except (ValueError, csv.Error):
        header, rows = [], []
    metrics = [name for name in METRICS if name in header and columns == STATS_COLUMNS]
    if tuple(header) != (*columns[:-1], *metrics, columns[-1]) or any(len(row) != len(header) for row in rows):
        raise UserError(f"{path}: is there, and is no stats CSV of these columns; choose another file")
    return [dict(zip(header, row)) for row in rows]


def write_csv(path, columns, rows, run, metric=None):
    """Write the rows of a run into a stats CSV, atomically; NaN becomes an empty cell, floats keep all their digits.

    `rows`: without the column of the run; what they have beyond the columns is the metric's.
    """
    names = [*columns[:-1], metric]
    lines = [row for row in _checked_rows(path, columns) if row["run"] != run]
    lines += [{name: "" if cell != cell else cell for name, cell in zip(names, row)} | {"run": run} for row in rows]
    measured = [name for name in METRICS if any(name in line for line in lines)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns[:-1], *measured, columns[-1]], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_bytes(path, text.getvalue().encode())


def write_stats(path, histories, seconds, run, metric=None):
    """The stats CSV: per epoch the mean losses of all learners, those that have stopped at their last value.

    `histories`: {learner: [`Epoch`]}; `seconds`: [`EpochSeconds`]; `metric`: its name, a column more, if there is one.
    """
    names = ["train_loss", "val_loss", *["metric"] * bool(metric)]
    figures = [{row.epoch: [getattr(row, name) for name in names] for row in history} for history in histories.values()]
    rows, last = [], [None] * len(figures)
    for row in seconds:
        last = [history.get(row.epoch, previous) for history, previous in zip(figures, last)]
        train_loss, val_loss, *measured = [sum(column) / len(column) for column in zip(*last)]
        rows.append([row.epoch, train_loss, val_loss, round(row.train, 3), round(row.validation, 3), *measured])
    write_csv(path, STATS_COLUMNS, rows, run, metric)


def write_variant_stats(path, histories, run):
    """The second CSV of block-level fine-tuning, a row per variant and epoch; `histories`: {pair: [`Epoch`]}."""
    rows = [[*pair, row.epoch, row.train_loss, row.val_loss] for pair, history in histories.items() for row in history]
    write_csv(path, BLOCK_COLUMNS, rows, run)


def write_composition_stats(path, history, run):
    """The second CSV of joint fine-tuning: a row per composed model that validation measures, and epoch."""
    rows = [[name, row.epoch, loss] for row in history for name, loss in row.parts.items()]
    write_csv(path, COMPOSITION_COLUMNS, rows, run)


def _rows(path):
    """All rows of a stats CSV, {column: text} each; [] without a file."""
    if not Path(path).is_file() or damage_in(path):
        return []
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def read_stats(path, run=None):
    """The rows of a run in a stats CSV, [{column: text}]; without `run` those of the last one in the file."""
    rows = _rows(path)
    return [row for row in rows if row["run"] == (rows[-1]["run"] if run is None else run)]


def read_seconds_of_epochs(path, run):
    """[`EpochSeconds`] of a run in a stats CSV."""
    rows = read_stats(path, run)
    return [EpochSeconds(int(row["epoch"]), float(row["train_seconds"]), float(row["val_seconds"])) for row in rows]


def read_variant_stats(path, run):
    """{(block, variant): [`Epoch`]} of a run in the second CSV of block-level fine-tuning."""
    histories = {}
    for row in read_stats(path, run):
        epoch = Epoch(int(row["epoch"]), float(row["train_loss"] or "nan"), float(row["val_loss"] or "nan"))
        histories.setdefault((row["block"], row["variant"]), []).append(epoch)
    return histories


def last_run(path):
    """The run that wrote the last rows of a stats CSV; "" if it is empty."""
    return next((row["run"] for row in read_stats(path)), "")


def read_seconds(path, runs=None) -> dict[str, float]:
    """What fine-tuning took, by its stats CSV: seconds of the "closed form", of "training" and of "validation".

    A closed form is an epoch that has seconds and no training loss. `runs`: which count; None for all in the file.
    """
    seconds = dict.fromkeys(("closed form", "training", "validation"), 0.0)
    for row in _rows(path):
        if runs is None or row["run"] in runs:
            seconds["training" if row["train_loss"] else "closed form"] += float(row["train_seconds"])
            seconds["validation"] += float(row["val_seconds"])
    return {part: round(spent, 3) for part, spent in seconds.items()}


def seconds_of(path, runs):
    """What some runs took by their stats CSV, interruptions left out; 0 where nothing is known of them."""
    return round(sum(read_seconds(path, runs).values()), 3)
