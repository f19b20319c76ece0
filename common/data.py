"""Data sets: read, tokenize once, batch by length.

A source is a local folder or a hub id. Multi30K folders hold `train.en`, `train.de`, `val.*` and `test2016.*`;
IMDb folders `train.jsonl`, `validation.jsonl` and `test.jsonl` with `text` and `label`. A data set without a
validation split gets one held out of train, stratified by label; the test split is for evaluation alone.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from common.records import digest

SPLITS = ("train", "validation", "test")
TRANSLATION_STEMS = {"train": "train", "validation": "val", "test": "test2016"}
HOLDOUT = 0.1  # of train, where there is no validation split
FIXED_SEED = 2024  # of held-out and limited examples: every stage must choose the same ones, whatever its --seed
LONGEST = {"translation": 128, "classification": 256}  # tokens, unless --max-length says otherwise
IGNORED = -100  # the label of padding, as torch's cross_entropy has it
SORTED_BATCHES = 50  # shuffled examples are sorted by length in pools of so many batches


# --- reading texts ---------------------------------------------------------------------------------------------


def read_texts(source, split, task):
    """The examples of a split as they are: [(English, German)] or [(text, label)].

    Args:
        source: a local folder or a hub id.
        split: "train", "validation" or "test".
        task: "translation" or "classification".
    Raises:
        UserError: nothing usable there, and why.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: must be one of {', '.join(SPLITS)}")
    is_folder = Path(source).is_dir()
    if not is_folder and (str(source).count("/") != 1 or str(source).startswith((".", "/"))):
        raise UserError(f"{source}: is neither a data folder nor a hub id (such as bentrevett/multi30k)")
    if task == "translation":
        pairs = _read_pairs(Path(source), split) if is_folder else _read_hub_pairs(source, split)
    else:
        pairs = _read_labelled(source, split, is_folder)
    if not pairs:
        raise UserError(f"{source}: its {split} split is empty")
    return pairs


def _read_pairs(folder, split):
    stem = TRANSLATION_STEMS[split]
    lengths = {}
    for language in ("en", "de"):
        path = folder / f"{stem}.{language}"
        if not path.is_file():
            raise UserError(f"{path}: no such file; a translation folder holds {stem}.en and {stem}.de")
        try:
            lengths[language] = sum(1 for _ in path.open(encoding="utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
    if lengths["en"] != lengths["de"]:
        raise UserError(
            f"{folder}: {stem}.en has {lengths['en']} lines and {stem}.de {lengths['de']}; "
            "they must be translations line by line"
        )
    from torchtext.data import RawField  # archived: 0.6.0 is the last that works beside this torch, see README
    from torchtext.datasets import Multi30k

    wanted = {name: stem if name == split else None for name in SPLITS}
    (dataset,) = Multi30k.splits((".en", ".de"), (RawField(), RawField()), path=str(folder), **wanted)
    return [(example.src, example.trg) for example in dataset]


def _read_hub_pairs(source, split):
    rows = _load_hub(source)
    if split not in rows or not {"en", "de"} <= set(rows[split].column_names):
        raise UserError(f"{source}: has no {split} split with columns 'en' and 'de'")
    return list(zip(rows[split]["en"], rows[split]["de"]))


def _read_labelled(source, split, is_folder):
    if is_folder:
        has_validation = (Path(source) / "validation.jsonl").is_file()

        def read(name):
            return _read_jsonl(Path(source) / f"{name}.jsonl")
    else:
        rows = _load_hub(source)
        has_validation = "validation" in rows

        def read(name):
            return _hub_labelled(source, rows, name)

    if split == "test" or has_validation:
        return read(split)
    pairs = read("train")
    held_out = stratified_holdout([label for _, label in pairs])
    return [pair for i, pair in enumerate(pairs) if (i in held_out) == (split == "validation")]


def _hub_labelled(source, rows, split):
    if split not in rows or not {"text", "label"} <= set(rows[split].column_names):
        raise UserError(f"{source}: has no {split} split with columns 'text' and 'label'")
    return list(zip(rows[split]["text"], rows[split]["label"]))


def _read_jsonl(path):
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a classification folder holds train.jsonl and test.jsonl "
            "with a 'text' and a 'label' on each line"
        )
    pairs = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line)
                if not (
                    isinstance(row, dict)
                    and isinstance(row.get("text"), str)
                    and type(row.get("label")) is int
                    and row["label"] >= 0
                ):
                    raise UserError(f"{path}: line {number}: needs a string 'text' and a whole number 'label'")
                pairs.append((row["text"], row["label"]))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {len(pairs) + 1}: malformed JSON: {error}") from None
    return pairs


def fixed_sample(items, size):
    """`size` of the items, in their order: the same ones in every run."""
    return [items[i] for i in sorted(random.Random(FIXED_SEED).sample(range(len(items)), size))]


def stratified_holdout(labels):
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


def _load_hub(source):
    """All splits of a hub data set: from the local cache if it is there, else over the network."""
    import datasets

    datasets.disable_progress_bars()
    for local_only in (True, False):
        try:
            return datasets.load_dataset(source, download_config=datasets.DownloadConfig(local_files_only=local_only))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
    raise UserError(
        f"{source}: no such folder, not in the local cache, and not to be had from the hub ({reason}); "
        "give a local folder with --data"
    )


# --- tokenizing ------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """A tokenized split. `inputs`: token ids; `targets`: token ids (translation) or a label (classification)."""

    task: str
    inputs: list
    targets: list
    texts: list  # the pairs they came from
    pad: int

    def __len__(self):
        return len(self.inputs)

    def fingerprint(self):
        """SHA-256 (hex) of what a model is shown."""
        return digest([self.inputs, self.targets])

    def sample(self, size):
        """A fixed sample of `size` examples, or all of them if there are no more."""
        if size >= len(self):
            return self
        columns = zip(*fixed_sample(list(zip(self.inputs, self.targets, self.texts)), size))
        return Examples(self.task, *map(list, columns), self.pad)

    def batch(self, positions, device="cpu"):
        """The examples at `positions`, padded to their longest.

        Returns:
            {"input_ids", "attention_mask": int64 (batch, source length), "labels": int64}; labels are
            (batch, target length) with IGNORED for padding, or (batch,) classes.
        """
        inputs = _padded([self.inputs[i] for i in positions], self.pad)
        batch = {"input_ids": inputs, "attention_mask": _padded([[1] * len(self.inputs[i]) for i in positions], 0)}
        targets = [self.targets[i] for i in positions]
        batch["labels"] = _padded(targets, IGNORED) if self.task == "translation" else torch.tensor(targets)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _padded(rows, filler):
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def load_examples(source, split, tokenizer, family, *, classes=None, max_length=None, limit=None):
    """Read and tokenize a split, once.

    Args:
        family: an `architectures.Family`: the task, and the prefix in front of every input.
        classes: how many labels the model knows.
        max_length: longest input or target in tokens; None takes the smaller of the tokenizer's and LONGEST.
        limit: use so many examples only: a sample, since hub data are often sorted by label, but always the same.
    Raises:
        UserError: see `read_texts`; or a label that the model does not know.
    """
    pairs = read_texts(source, split, family.task)
    if limit and limit < len(pairs):
        pairs = fixed_sample(pairs, limit)
    if family.task == "classification" and classes is not None:
        for number, (_, label) in enumerate(pairs):
            if label >= classes:
                raise UserError(
                    f"{source}: {split} example {number} has label {label}, but the model knows only 0 to {classes - 1}"
                )
    max_length = max_length or min(tokenizer.model_max_length, LONGEST[family.task])
    options = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
    inputs = tokenizer([family.prefix + text for text, _ in pairs], **options)["input_ids"]
    targets = [target for _, target in pairs]
    if family.task == "translation":
        targets = tokenizer(text_target=targets, **options)["input_ids"]
    return Examples(family.task, inputs, targets, pairs, tokenizer.pad_token_id)


# --- batching --------------------------------------------------------------------------------------------------


def training_batches(examples, batch_size, seed, epoch, size=None):
    """Positions of one epoch's batches: shuffled, but examples of like length together to save padding.

    The order depends on (seed, epoch) alone, so that a resumed run sees what the interrupted one would have seen.

    Args:
        epoch: counted from 1.
        size: examples an epoch; None for all. Shorter epochs go on where the one before ended, so that each example
            is seen once before any is seen again.
    """
    total = len(examples)
    size = min(size or total, total)
    first, offset = divmod((epoch - 1) * size, total)  # which pass over all examples, and where in it
    order = [position for number in (first, first + 1) for position in _shuffled(total, f"{seed}/pass {number}")]
    order, pool = order[offset : offset + size], SORTED_BATCHES * batch_size
    order = [i for start in range(0, size, pool) for i in _by_length(examples, order[start : start + pool])]
    batches = _chunks(order, batch_size)
    random.Random(f"{seed}/epoch {epoch}").shuffle(batches)
    return batches


def _shuffled(count, seed):
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def evaluation_batches(examples, batch_size):
    """Positions of batches over all examples, longest first, so that memory runs out at once or never."""
    return _chunks(_by_length(examples, range(len(examples)))[::-1], batch_size)


def _by_length(examples, positions):
    return sorted(positions, key=lambda i: len(examples.inputs[i]))


def _chunks(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]
