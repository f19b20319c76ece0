"""The examples of a split.

A validation split that is not there is held out of train, stratified by label. The test split is for evaluation alone,
and never made.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from common.data.readers import Rows, finder
from common.data.sources import SPLITS, DataSource, check_source, column_flags
from common.runtime.errors import UserError
from common.runtime.schema import shown

HOLDOUT = 0.1  # of train, where there is no validation split
FIXED_SEED = 2024  # of held-out and limited examples: every stage must choose the same ones, whatever its --seed


def read_texts(
    source: DataSource | str | Path, split: str, task, *, limit: int | None = None, label2id: dict | None = None
) -> list[tuple]:
    """The examples of a split: [(input, target)]. An input is a text, or (text, second text).

    Args:
        source: a path or a hub id for one of which nothing else need be said.
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
        remedy = ", or evaluate with --split validation" if split == "test" else ""
        raise UserError(f"{source}: has no {split} split; give download_model.py one with --{split}-file{remedy}")
    rows, where = opened(), f"{source.file('train' if is_made else split) or source}: {split}"
    if not len(rows):
        raise UserError(f"{source}: its {split} split is empty")
    positions = range(len(rows))
    if is_made or (split == "train" and find("validation") is None):
        labels = [target if task.has_labels else 0 for _, target in _pairs(where, rows, positions, source, task)]
        held_out = stratified_holdout(labels)
        positions = [i for i in positions if (i in held_out) == is_made]
        if not positions:
            remedy = "give download_model.py a --validation-file"
            raise UserError(f"{source}: too few examples to hold some out of train; {remedy}")
    if limit and limit < len(positions):
        positions = fixed_sample(positions, limit)
    pairs = _pairs(where, rows, positions, source, task)
    if label2id and task.has_labels:
        feature = getattr(rows, "features", {}).get(source.columns(task)[-1])  # of a table of the datasets library
        return _numbered(where, pairs, positions, label2id, getattr(feature, "names", None) or [])
    return pairs


def _pairs(where, rows: Rows, positions, source, task):
    """The rows at `positions` as [(input, target)]; a `UserError` if a column is missing, or holds no text."""
    names, columns = source.columns(task), getattr(rows, "column_names", None) or list(rows[0])
    is_nested = not task.has_labels and not source.source_column and "translation" in columns
    if not is_nested and not set(names) <= set(columns):
        missing = next(name for name in names if name not in columns)
        flags = ", ".join(column_flags(task))
        raise UserError(f"{where}: has no column {missing!r}, but {columns}; say which to download_model.py ({flags})")
    if isinstance(rows, list):
        rows = [rows[position] for position in positions]
    else:
        rows = rows.select_columns(["translation"] if is_nested else sorted({*names})).select(positions).to_list()
    pairs = []
    for position, row in zip(positions, rows):
        fields = (row["translation"] or {}) if is_nested else row
        *inputs, target = (fields.get(name) for name in names)
        if not all(isinstance(text, str) for text in (inputs if task.has_labels else [*inputs, target])):
            raise UserError(f"{where}: row {position + 1}: {names} are not all text")
        pairs.append((inputs[0] if len(inputs) == 1 else tuple(inputs), target))
    return pairs


# --- labels ------------------------------------------------------------------------------------------------------


def _numbered(where, pairs, positions, label2id, classes):
    """Pairs whose labels are the model's numbers: of names, in upper or lower case, or the numbers themselves.

    `classes`: the names of the data set's numbers, where it knows them.
    """
    names = {name.casefold(): number for name, number in label2id.items()}
    numbers = {str(number): number for number in range(max(label2id.values()) + 1)}
    if not {name.casefold() for name in classes} <= set(names):
        classes = []  # of other things than the model's
    numbered = []
    for position, (text, label) in zip(positions, pairs):
        if isinstance(label, int) and 0 <= label < len(classes):
            label = classes[label]
        is_number = isinstance(label, int) and not isinstance(label, bool)
        number = None if is_number else label2id.get(str(label), names.get(str(label).casefold()))
        number = numbers.get(str(label)) if number is None else number
        if number is None:
            known = ", ".join(sorted(label2id, key=label2id.get)[:10])
            raise UserError(
                f"{where} example {position} has label {shown(label)}, but the model knows only 0 to "
                f"{max(label2id.values())} ({known}); its config.json names them, or choose --label-column"
            )
        numbered.append((text, number))
    return numbered


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
