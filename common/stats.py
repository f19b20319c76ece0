"""The CSVs that fine-tuning leaves: losses and seconds of every epoch."""

import csv
import io
from pathlib import Path

from common.errors import UserError
from common.files import check_writable, write_bytes

STATS_COLUMNS = ("epoch", "train_loss", "val_loss", "train_seconds", "val_seconds")
BLOCK_COLUMNS = ("block", "variant", "epoch", "train_loss", "val_loss", "seconds")
COMPOSITION_COLUMNS = ("composition", "epoch", "val_loss")


def check_stats(path, columns=STATS_COLUMNS):
    """Make sure, before any long work, that stats can be written to `path`, and that no other file is lost by it.

    Raises:
        UserError: it cannot be written, or holds something that is no CSV of these columns.
    """
    check_writable(path, is_file=True)
    if Path(path).is_file():
        with open(path, "rb") as handle:
            if handle.readline().strip() not in (b"", ",".join(columns).encode()):
                raise UserError(f"{path}: is there, and is no stats CSV; choose another file")


def write_csv(path, columns, rows):
    """A CSV file, atomically; NaN becomes an empty cell, floats keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if cell != cell else cell for cell in row] for row in rows])
    write_bytes(path, text.getvalue().encode())


def write_stats(path, learners, progress):
    """The stats CSV: per epoch the mean losses of all learners, those that have stopped at their last value."""
    losses = [{row.epoch: (row.train_loss, row.val_loss) for row in learner.history} for learner in learners.values()]
    rows, last = [], [None] * len(losses)
    for row in progress.rows:
        last = [history.get(row.epoch, previous) for history, previous in zip(losses, last)]
        means = [sum(column) / len(column) for column in zip(*last)]
        rows.append([row.epoch, *means, round(row.train, 3), round(row.validation, 3)])
    write_csv(path, STATS_COLUMNS, rows)


def read_seconds(path) -> dict[str, float]:
    """What a fine-tuning took, by its stats CSV: seconds of the "closed form", of "training" and of "validation".

    A closed form is an epoch that has seconds and no training loss.
    """
    found = dict.fromkeys(("closed form", "training", "validation"), 0.0)
    with open(path, encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            found["training" if row["train_loss"] else "closed form"] += float(row["train_seconds"])
            found["validation"] += float(row["val_seconds"])
    return {part: round(seconds, 3) for part, seconds in found.items()}


def write_variant_stats(path, histories):
    """The second CSV of block-level fine-tuning: a row per variant and epoch.

    The rows of variants that an earlier run fine-tuned stay, so that the file tells of the whole library.

    Args:
        histories: {pair: [`training.Epoch`]}
    """
    rows = [[*pair, *row[: len(BLOCK_COLUMNS) - 2]] for pair, history in histories.items() for row in history]
    if Path(path).is_file():
        with open(path, encoding="utf-8", newline="") as handle:
            rows = [
                row
                for row in csv.reader(handle)
                if len(row) == len(BLOCK_COLUMNS) and tuple(row[:2]) not in histories and tuple(row) != BLOCK_COLUMNS
            ] + rows
    write_csv(path, BLOCK_COLUMNS, rows)


def write_composition_stats(path, history):
    """The second CSV of joint fine-tuning: a row per composed model that validation measures, and epoch."""
    rows = [[name, row.epoch, loss] for row in history for name, loss in row.parts.items()]
    write_csv(path, COMPOSITION_COLUMNS, rows)
