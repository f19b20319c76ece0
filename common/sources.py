"""Where the texts of a split are, and how they are read.

A data source is a local folder or a hub id. Translation folders hold `train.en`, `train.de`, `val.*` and `test2016.*`,
as Multi30K does; classification folders `train.jsonl`, `validation.jsonl` and `test.jsonl` with `text` and `label`. A
data set without a validation split gets one held out of train, stratified by label; the test split is for evaluation
alone.
"""

import random
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import check_regular
from common.records import RECORD_NAME, check_files, parse_json, read_record
from common.schema import Number, Object, Text

SPLITS = ("train", "validation", "test")
TRANSLATION_STEMS = {"train": "train", "validation": "val", "test": "test2016"}
HOLDOUT = 0.1  # of train, where there is no validation split
FIXED_SEED = 2024  # of held-out and limited examples: every stage must choose the same ones, whatever its --seed
EXAMPLE = Object({"text": Text(), "label": Number(0, 10**6, whole=True)}, others=True)  # a line of a .jsonl


def read_texts(source: str | Path, split: str, task) -> list[tuple]:
    """The examples of a split as they are: [(input, target)].

    Args:
        source: a local folder or a hub id.
        split: "train", "validation" or "test".
        task: whose inputs and targets these are, see `tasks`.
    Raises:
        UserError: nothing usable there, and why.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    if not is_folder(source) and (str(source).count("/") != 1 or str(source).startswith((".", "/"))):
        raise UserError(f"{source}: is neither a data folder nor a hub id (such as bentrevett/multi30k)")
    if is_folder(source) and (Path(source) / RECORD_NAME).is_file():
        check_files(source, read_record(Path(source) / RECORD_NAME))
    if is_folder(source):
        check_regular(source)
    pairs = (_labelled_texts if task.has_labels else _translations)(source, split)
    if not pairs:
        raise UserError(f"{source}: its {split} split is empty")
    return pairs


def _translations(source, split):
    """The (English, German) pairs of a split."""
    if not is_folder(source):
        return list(zip(*hub_columns(source, load_hub(source), split, ("en", "de"))))
    folder, stem = Path(source), TRANSLATION_STEMS[split]
    lengths = {}
    for language in ("en", "de"):
        path = folder / f"{stem}.{language}"
        if not path.is_file():
            raise UserError(f"{path}: no such file; a translation folder holds {stem}.en and {stem}.de")
        try:
            lengths[language] = 0
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if not line.strip():  # torchtext would leave out the pair without a word
                        raise UserError(f"{path}: line {number}: is empty; take it out of both languages' files")
                    lengths[language] = number
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
    if lengths["en"] != lengths["de"]:
        raise UserError(
            f"{folder}: {stem}.en has {lengths['en']} lines and {stem}.de {lengths['de']}; "
            "they must be translations line by line"
        )
    from torchtext.data import RawField  # archived: 0.6.0 is the last that works beside this torch
    from torchtext.datasets import Multi30k

    wanted = {name: stem if name == split else None for name in SPLITS}
    (dataset,) = Multi30k.splits((".en", ".de"), (RawField(), RawField()), path=str(folder), **wanted)
    return [(example.src, example.trg) for example in dataset]


def _labelled_texts(source, split):
    """The (text, label) pairs of a split."""
    folder = Path(source)
    if is_folder(source):
        has_validation = (folder / "validation.jsonl").is_file()

        def read(name):
            return read_jsonl(folder / f"{name}.jsonl")

    else:
        rows = load_hub(source)
        has_validation = "validation" in rows

        def read(name):
            return list(zip(*hub_columns(source, rows, name, ("text", "label"))))

    if split == "test" or has_validation:
        return read(split)
    pairs = read("train")
    held_out = stratified_holdout([label for _, label in pairs])
    return [pair for i, pair in enumerate(pairs) if (i in held_out) == (split == "validation")]


# --- reading ---------------------------------------------------------------------------------------------------


def is_folder(source):
    return Path(source).is_dir()


def load_hub(source):
    """All splits of a hub data set: from the local cache if it is there, else over the network."""
    import datasets

    datasets.disable_progress_bars()
    for local_only in (True, False):
        try:
            return datasets.load_dataset(source, download_config=datasets.DownloadConfig(local_files_only=local_only))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
    raise UserError(
        f"{source}: no such folder, not in the local cache, and not available from the hub ({reason}); "
        "give a local folder with --data"
    )


def hub_columns(source, rows, split, columns):
    """Some columns of a split of a hub data set.

    Raises:
        UserError: it has no such split, or not these columns.
    """
    if split not in rows or not set(columns) <= set(rows[split].column_names):
        names = " and ".join(repr(name) for name in columns)
        raise UserError(f"{source}: has no {split} split with columns {names}")
    return [rows[split][name] for name in columns]


def read_jsonl(path):
    """[(text, label)] of a file with a JSON object on each line.

    Raises:
        UserError: absent, or a line is not such an object.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a classification folder holds train.jsonl and test.jsonl "
            "with a 'text' and a 'label' on each line"
        )
    pairs = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = parse_json(f"{path}: line {number}", line)
                if EXAMPLE.find(row):
                    raise UserError(f"{path}: line {number}: needs a string 'text' and a whole number 'label'")
                pairs.append((row["text"], row["label"]))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    return pairs


# --- samples that are the same in every run ---------------------------------------------------------------------


def fixed_sample(items: Sequence, size: int) -> list:
    """`size` of the items, in their order: the same ones in every run."""
    return [items[i] for i in sorted(random.Random(FIXED_SEED).sample(range(len(items)), size))]


def stratified_holdout(labels: list[int]) -> set[int]:
    """Positions of the held-out examples: the fraction HOLDOUT of each label, always the same ones."""
    by_label = {}
    for position, label in enumerate(labels):
        by_label.setdefault(label, []).append(position)
    shuffler = random.Random(FIXED_SEED)
    return {
        position
        for label in sorted(by_label)
        for position in shuffler.sample(by_label[label], round(HOLDOUT * len(by_label[label])))
    }
