"""The examples of a split.

A validation split that is not there is held out of train, stratified by label. The test split is for evaluation alone,
and never made.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from common.data.labels import WithoutLabels, class_numbers
from common.data.readers import Rows, finder
from common.data.sources import SPLITS, UNLABELLED, DataSource, check_source, column_flags
from common.runtime.errors import UserError

HOLDOUT = 0.1  # of train, where there is no validation split
FIXED_SEED = 2024  # of held-out and limited examples: every stage must choose the same ones, whatever its --seed


def read_texts(
    source: DataSource | str | Path, split: str, task, *, limit: int | None = None, label2id: dict | None = None
) -> list[tuple]:
    """The examples of a split: [(input, target)]. An input is a text, or (text, second text).

    Args:
        source: a path or a hub id for one of which nothing else need be said.
        split: one of SPLITS; or UNLABELLED, where every target is "", or class 0.
        limit: so many examples only: a sample, always the same.
        label2id: the model's labels by their names. With it, labels become the model's numbers.
    Raises:
        UserError: nothing usable there, and why; see `labels.class_numbers`.
    """
    source = source if isinstance(source, DataSource) else DataSource(data=str(source))
    if split not in (*SPLITS, UNLABELLED):
        raise UserError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    check_source(source, task)
    find = finder(source, task)
    opened = find(split)
    is_made = opened is None and split == "validation"  # of train
    opened = find("train") if is_made else opened
    remedy = ", or evaluate with --split validation" if split == "test" else ""
    if opened is None:
        raise UserError(f"{source}: has no {split} split; give download_model.py one with --{split}-file{remedy}")
    rows, where = opened(), f"{source.file('train' if is_made else split) or source}: {split}"
    if not len(rows):
        raise UserError(f"{source}: its {split} split is empty")
    has_labels, (*inputs, target) = task.has_labels and split != UNLABELLED, source.columns(task)
    texts = inputs if task.has_labels or split == UNLABELLED else [*inputs, target]
    try:
        is_nested = _is_nested(where, rows, [*texts, *[target] * has_labels], source, task)
        no_labels = [0 if task.has_labels else ""] * len(rows)
        labels = _labels(where, rows, target, label2id) if has_labels else no_labels
    except WithoutLabels as error:
        raise WithoutLabels(f"{error}{remedy}") from None
    positions = range(len(rows))
    if is_made or (split == "train" and find("validation") is None):
        held_out = stratified_holdout(labels)
        positions = [i for i in positions if (i in held_out) == is_made]
        if not positions:
            remedy = "give download_model.py a --validation-file"
            raise UserError(f"{source}: too few examples to hold some out of train; {remedy}")
    if limit and limit < len(positions):
        positions = fixed_sample(positions, limit)
    rows = _texts(where, rows, positions, texts, is_nested)
    if target in texts:
        return rows
    return [(row if len(inputs) > 1 else row[0], labels[i]) for i, row in zip(positions, rows)]


def _is_nested(where, rows: Rows, wanted, source, task):
    """Whether texts lie in a column "translation"; otherwise it is sure that the wanted columns are there."""
    columns = getattr(rows, "column_names", None) or list(dict.fromkeys(name for row in rows for name in row))
    if not task.has_labels and not source.source_column and "translation" in columns:
        return True
    missing = [name for name in wanted if name not in columns]
    if missing:
        of_class = WithoutLabels if task.has_labels and missing == source.columns(task)[-1:] else UserError
        flags = ", ".join(column_flags(task))
        raise of_class(
            f"{where}: has no column {missing[0]!r}, but {columns}; say which to download_model.py ({flags})"
        )
    return False


def _labels(where, rows: Rows, name, label2id):
    """The labels of all rows, in the column `name`, which are the model's numbers if its names are known."""
    labels = [row.get(name) for row in rows] if isinstance(rows, list) else list(rows[name])
    feature = getattr(rows, "features", {}).get(name)  # of a table of the datasets library
    return class_numbers(where, labels, getattr(feature, "names", None) or [], label2id) if label2id else labels


def _is_text(value):
    """Whether a value is a text; JSON may hold half of a surrogate pair, which is none and cannot be tokenized."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _texts(where, rows: Rows, positions, names, is_nested):
    """The texts of the rows at `positions`, as tuples; a `UserError` if a language is missing, or something is no text.

    `names`: of the columns, or if they are nested in "translation" of the languages.
    """
    if isinstance(rows, list):
        rows = [rows[position] for position in positions]
    else:
        rows = rows.select_columns(["translation"] if is_nested else sorted({*names})).select(positions).to_list()
    if is_nested:
        rows = [row["translation"] if isinstance(row.get("translation"), dict) else {} for row in rows]
        languages = sorted({language for row in rows for language in row})
        missing = [name for name in names if name not in languages]
        if missing:
            flags = "--source-lang, --target-lang"
            raise UserError(
                f"{where}: has no language {missing[0]!r}, but {languages}; say which to download_model.py ({flags})"
            )
    texts = [tuple(row.get(name) for name in names) for row in rows]
    for position, row in zip(positions, texts):
        if not all(map(_is_text, row)):
            raise UserError(f"{where}: row {position + 1}: {names} are not all text")
    return texts


# --- samples that are the same in every run ---------------------------------------------------------------------


def fixed_sample(items: Sequence, size: int) -> list:
    """`size` of the items, in their order: the same ones in every run."""
    return [items[i] for i in sorted(random.Random(FIXED_SEED).sample(range(len(items)), size))]


def stratified_holdout(labels: list) -> set[int]:
    """Positions of the held-out examples: the fraction HOLDOUT of each label, always the same ones."""
    by_label = {}
    for position, label in enumerate(labels):
        by_label.setdefault(str(label), []).append(position)
    shuffler = random.Random(FIXED_SEED)
    return {
        position
        for label in sorted(by_label)
        for position in shuffler.sample(by_label[label], round(HOLDOUT * len(by_label[label])))
    }
