"""A split's examples, tokenized once."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.data.sources import DataSource
from common.data.splits import fixed_sample, read_texts
from common.data.tasks import IGNORED, Classification, Translation, padded
from common.runtime.errors import UserError, as_user_error
from common.runtime.records import digest


class Batch(dict):
    """Tensors of a batch on a device, by name; and in `host` on the CPU, so that nothing waits to learn of padding."""

    def __init__(self, host: dict[str, torch.Tensor], device: torch.device):
        super().__init__({name: to_device(tensor, device) for name, tensor in host.items()})
        self.host, self.device = host, device

    def numbers(self, mask: torch.Tensor) -> torch.Tensor:
        """The numbers of the true entries of a mask in the CPU's memory, row by row: int64, on the batch's device."""
        return to_device(mask.flatten().nonzero().flatten(), self.device)

    def labelled(self) -> torch.Tensor:
        """The numbers of the labels that are none of padding."""
        return self.numbers(self.host["labels"] != IGNORED)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device; the copy to a GPU is queued there, from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def rows_of(tensor: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Rows (tokens, …) of a tensor (batch, length, …), or of one (batch, …) that has a row for each example."""
    return tensor[numbers] if tensor.dim() < 3 else tensor.flatten(0, 1)[numbers]


@dataclass
class Examples:
    """A tokenized split. `inputs`: token ids; `targets`: token ids (translation) or a label (classification).

    `texts`: the pairs they came from; an input of two texts is a tuple. `types`: which of two a token belongs to.
    """

    task: Translation | Classification
    inputs: list
    targets: list
    texts: list
    pad: int
    longest: int | None = None  # tokens of an input that were kept; None where nobody said
    types: list | None = None
    unknown: float = 0.0  # the share of tokens that stand for what the tokenizer does not know

    def __len__(self):
        return len(self.inputs)

    def at_longest(self) -> int:
        """How many examples have an input or target that is as long as one may be, and may have been cut there."""
        if self.longest is None:
            return 0
        of_target = min(self.longest, self.task.longest_target or self.longest)
        targets = ([] if self.task.has_labels else target for target in self.targets)
        return sum(len(row) >= self.longest or len(target) >= of_target for row, target in zip(self.inputs, targets))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what a model is shown."""
        return digest([self.inputs, self.targets, *[self.types] * (self.types is not None)])

    def sample(self, size: int) -> "Examples":
        """See `sample_and_rest`."""
        return self.sample_and_rest(size)[0]

    def sample_and_rest(self, size: int) -> tuple["Examples", "Examples"]:
        """A fixed sample of `size` examples, or of all if there are no more, and the others; in their order."""
        taken = set(fixed_sample(range(len(self)), min(size, len(self))))
        rest = [position for position in range(len(self)) if position not in taken]
        return self._at(sorted(taken)), self._at(rest)

    def part(self, number: int, count: int) -> "Examples":
        """Every `count`-th example, from the one with this number on."""
        return self._at(range(number, len(self), count))

    def _at(self, positions):
        columns = {name: getattr(self, name) for name in ("inputs", "targets", "texts", "types")}
        return replace(self, **{name: column and [column[i] for i in positions] for name, column in columns.items()})

    def count_of(self, tokens: int) -> int:
        """How many examples have about so many input tokens, at the mean length; one at least."""
        return max(1, tokens * len(self) // max(1, sum(map(len, self.inputs))))

    def tokens_in(self, positions: list[int]) -> int:
        """How many tokens a batch of the examples at `positions` has, with its padding."""
        rows = [self.inputs] + ([] if self.task.has_labels else [self.targets])
        return len(positions) * sum(max(len(row[i]) for i in positions) for row in rows)

    def labels_in(self, positions: list[int]) -> int:
        """How many labels the examples at `positions` have: tokens, or one each."""
        targets = [self.targets[i] for i in positions]
        return sum(len(target) if isinstance(target, list) else 1 for target in targets)

    def batch(self, positions: list[int], device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """The examples at `positions`, padded to their longest.

        Returns:
            {"input_ids", "attention_mask": int64 (batch, source length), "labels": int64}; labels are
            (batch, target length) with IGNORED for padding, or (batch,) classes. With `types` "token_type_ids" too.
        """
        inputs = [self.inputs[i] for i in positions]
        batch = {
            "input_ids": padded(inputs, self.pad),
            "attention_mask": padded([[1] * len(row) for row in inputs], 0),
            "labels": self.task.labels([self.targets[i] for i in positions]),
        }
        if self.types:
            batch["token_type_ids"] = padded([self.types[i] for i in positions], 0)
        return Batch(batch, torch.device(device))


def load_examples(
    source: DataSource | str | Path,
    split: str,
    tokenizer,
    task: Translation | Classification,
    *,
    prefix: str = "",
    label2id: dict[str, int] | None = None,
    positions: int | None = None,
    token_types: int | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    whole: bool = False,
) -> Examples:
    """Read and tokenize a split, once.

    Args:
        prefix, label2id: in front of every input text; the labels that the model knows.
        positions: how many tokens the model has positions for; None for any number.
        token_types: how many types of tokens the model tells apart; None for any number.
        max_length: longest input or target in tokens; None takes the smallest of the tokenizer's, the model's and the
            task's.
        whole: without truncation.
        limit: use so many examples only: a sample, since hub data are often sorted by label, but always the same.
    Raises:
        UserError: see `read_texts`; or a text that the tokenizer cannot take.
    """
    pairs = read_texts(source, split, task, limit=limit, label2id=label2id)
    max_length = max_length or min(tokenizer.model_max_length, positions or task.longest, task.longest)

    def tokenize(*texts, longest=max_length, **other):
        settings = {} if whole else {"max_length": min(longest, max_length), "truncation": True}
        return tokenizer(*texts, **other, **settings, return_attention_mask=False)

    texts = [text if isinstance(text, tuple) else (text,) for text, _ in pairs]
    with as_user_error(source, f"cannot be tokenized by {tokenizer.name_or_path}"):
        inputs = tokenize([prefix + first for first, *_ in texts], *zip(*(rest for _, *rest in texts)))
        targets = task.targets([target for _, target in pairs], tokenize)
    types = inputs.get("token_type_ids") if len(texts[0]) > 1 else None  # of one text they are the default, zeros
    if types and token_types is not None:
        most = 1 + max(map(max, types))
        if most > token_types > 0:
            raise UserError(
                f"{tokenizer.name_or_path}: tells {most} types of tokens apart, and the model {token_types}: take "
                "'token_type_ids' out of 'model_input_names' in its tokenizer_config.json"
            )
        types = types if token_types else None
    rows = inputs["input_ids"] if task.has_labels else inputs["input_ids"] + targets
    unknown = sum(row.count(tokenizer.unk_token_id) for row in rows) / sum(map(len, rows))
    return Examples(task, inputs["input_ids"], targets, pairs, tokenizer.pad_token_id, max_length, types, unknown)
