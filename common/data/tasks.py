"""The tasks that models are used for: what inputs and targets look like, how an answer is scored."""

import torch

from common.data.metrics import Classes, Scored, Summaries, Translations

IGNORED = -100  # the label of padding, as torch's cross_entropy has it


class Translation:
    """From one language to another. A target is a sequence of tokens."""

    name = "translation"
    scorer = Translations
    metrics = Translations.metrics
    metric = "bleu"  # the main one
    evaluated_by = "evaluate-t5.py"
    has_labels = False  # whether a target is one label
    columns = ("en", "de")  # of inputs and targets in a data set, unless flags say otherwise
    longest = 128  # tokens of an input or target, unless --max-length says otherwise
    longest_target = None  # of a target, if fewer
    longest_answer = 60  # tokens that are generated, unless --max-new-tokens says otherwise
    example = {"batch_size": 8, "input_tokens": 32, "output_tokens": 32}  # what a report's figures are for

    def targets(self, texts: list[str], tokenize) -> list[list[int]]:
        """Token ids."""
        return tokenize(text_target=texts)["input_ids"]

    def scored(self, answers: list[str], texts: list[tuple[str, str]], targets: list) -> Scored:
        """The answers, beside the references in the pairs of texts."""
        return self.scorer(answers, [reference for _, reference in texts])

    def labels(self, targets: list[list[int]]) -> torch.Tensor:
        """A batch's labels, int64 (batch, length), IGNORED for padding."""
        return padded(targets, IGNORED)

    def example_batch(self, batch: dict, stated: dict) -> dict:
        """A batch of made-up inputs, with the decoder's of the stated length; no labels: figures are without loss."""
        return batch | {"decoder_input_ids": batch["input_ids"][:, :1].repeat(1, stated["output_tokens"])}


class Summarization(Translation):
    """A text and a shorter one that says the same."""

    name = "summarization"
    scorer = Summaries
    metrics = Summaries.metrics
    metric = "rouge_l"
    columns = ("document", "summary")
    longest = 512
    longest_target = 128
    longest_answer = 128
    example = {"batch_size": 8, "input_tokens": 256, "output_tokens": 32}

    def targets(self, texts: list[str], tokenize) -> list[list[int]]:
        """Token ids."""
        return tokenize(text_target=texts, longest=self.longest_target)["input_ids"]


class Classification:
    """One label for a text."""

    name = "classification"
    metrics = Classes.metrics
    metric = "accuracy"
    evaluated_by = "evaluate-distilbert.py"
    has_labels = True
    columns = ("text", "label")
    longest_target = None
    longest_answer = 0  # nothing is generated
    longest = 256
    example = {"batch_size": 8, "input_tokens": 128}

    def targets(self, texts: list[int], tokenize) -> list[int]:
        """The labels as they are."""
        return texts

    def scored(self, answers: list[int], texts: list, targets: list[int]) -> Classes:
        """Classes, beside the labels."""
        return Classes(answers, targets)

    def labels(self, targets: list[int]) -> torch.Tensor:
        """A batch's labels, int64 (batch,)."""
        return torch.tensor(targets)

    def example_batch(self, batch: dict, stated: dict) -> dict:
        """A batch of made-up inputs is all that a classifier needs."""
        return batch


TASKS = {task.name: task for task in (Translation(), Summarization(), Classification())}


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    """Rows of unequal length as an int64 tensor (rows, longest)."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
