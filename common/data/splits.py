"""The examples of a split.

A validation split that is not there is held out of train, stratified by label. The test split is for evaluation alone,
and never made.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from common.data.readers import finder
from common.data.sources import SPLITS, DataSource, check_source, flag_of
from common.runtime.errors import UserError
from common.runtime.schema import shown

HOLDOUT = 0.1  # of train, where there is no validation split
FIXED_SEED = 2024  # of held-out and limited examples: every stage must choose the same ones, whatever its --seed


def read_texts(
    source: DataSource | str | Path, split: str, task, *, limit: int | None = None, label2id: dict | None = None
) -> list[tuple]:
    """The examples of a split as they are: [(input, target)].

    An input is a text, or (text, second text). A target is a text, or a label as it stands there.

    Args:
        source: a path or a hub id for one of which nothing else need be said.
        split: "train", "validation" or "test".
        task: whose inputs and targets these are, see `tasks`.
        limit: so many examples only: a sample, always the same.
        label2id: the model's labels by their names. With it, labels become the model's numbers.
    Raises:
        UserError: nothing usable there, and why; a label that is none of the model's.
    """
    source = source if isinstance(source, DataSource) else DataSource(data=str(source))
    if split not in SPLITS:
        raise UserError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    check_source(source, task)
    find = finder(source, task)
    opened = find(split)
    is_made = opened is None and split == "validation"  # of train
    opened = find("train") if is_made else opened
    if opened is None:
        raise UserError(f"{source}: has no {split} split; {_remedy(source, split, task)}")
    rows = opened()
    if not rows.count:
        raise UserError(f"{source}: its {split} split is empty")
    positions = range(rows.count)
    if is_made or (split == "train" and find("validation") is None):
        held_out = stratified_holdout(rows.targets() if task.has_labels else [0] * rows.count)
        positions = [i for i in positions if (i in held_out) == is_made]
        if not positions:
            remedy = "give download_model.py a --validation-file"
            raise UserError(f"{source}: too few examples to hold some out of train; {remedy}")
    if limit and limit < len(positions):
        positions = fixed_sample(positions, limit)
    pairs = rows.take(positions)
    if label2id and task.has_labels:
        where = source.file("train" if is_made else split) or source
        return _numbered(f"{where}: {split}", pairs, positions, label2id, rows.classes)
    return pairs


def has_split(source: DataSource, split: str, task) -> bool:
    """Whether a split is there, so that it need not be made."""
    return finder(source, task)(split) is not None


def _remedy(source, split, task):
    if source.data and Path(source.data).is_dir():
        one, other = source.languages(task) if not task.has_labels else ("", "")
        text = f", or {split}.{one} and {split}.{other}," if one else ""
        return f"a file {split}.csv, .tsv, .jsonl, .json or .parquet{text} belongs into the folder"
    remedy = f"give download_model.py one with {flag_of(f'{split}_file')}"
    return remedy + (", or evaluate with --split validation" if split == "test" else "")


# --- labels ------------------------------------------------------------------------------------------------------


def _number(label, label2id, classes):
    """The model's number of a label: of a name, in upper or lower case, else the number itself; None for no such one.

    Args:
        classes: the names of the data set's own numbers, where it knows them; {} where they are not the model's.
    """
    label = classes.get(label, label)
    if isinstance(label, bool | str):
        names = {name.casefold(): number for name, number in label2id.items()}
        found = label2id.get(str(label), names.get(str(label).casefold()))
        if found is not None or not re.fullmatch(r"[0-9]{1,9}", str(label)):
            return found
        label = int(label)
    return label if isinstance(label, int) and 0 <= label <= max(label2id.values()) else None


def _numbered(where, pairs, positions, label2id, classes):
    """Pairs whose labels are the model's numbers.

    Raises:
        UserError: naming the first example whose label is none of the model's.
    """
    known = {name.casefold() for name in label2id}
    own = dict(enumerate(classes)) if classes and {name.casefold() for name in classes} <= known else {}
    numbers = [_number(label, label2id, own) for _, label in pairs]
    if None in numbers:
        first = numbers.index(None)
        names = ", ".join(sorted(label2id, key=label2id.get)[:10])
        raise UserError(
            f"{where} example {positions[first]} has label {shown(pairs[first][1])}, but the model knows only 0 to "
            f"{max(label2id.values())} ({names}); its config.json names them, or choose --label-column"
        )
    return [(text, number) for (text, _), number in zip(pairs, numbers)]


# --- samples that are the same in every run ---------------------------------------------------------------------


def fixed_sample(items: Sequence, size: int) -> list:
    """`size` of the items, in their order: the same ones in every run."""
    return [items[i] for i in sorted(random.Random(FIXED_SEED).sample(range(len(items)), size))]


def stratified_holdout(labels: list[int | str]) -> set[int]:
    """Positions of the held-out examples: the fraction HOLDOUT of each label, always the same ones."""
    by_label = {}
    for position, label in enumerate(labels):
        by_label.setdefault(label if isinstance(label, int | str) else repr(label), []).append(position)
    shuffler = random.Random(FIXED_SEED)
    return {
        position
        for label in sorted(by_label, key=lambda label: (isinstance(label, str), label))  # no number above a string
        for position in shuffler.sample(by_label[label], round(HOLDOUT * len(by_label[label])))
    }
