"""What training makes smaller: the protocol, and the loss of a whole model."""

import contextlib
from collections.abc import Hashable, Iterator
from typing import NamedTuple, Protocol

import torch

from common.data.examples import Batch, rows_of
from common.runtime.devices import computing
from common.training.learner import Learner, Recipe


class Loss(NamedTuple):
    """What a learner loses on a batch: a scalar, and what it counts for in the epoch's mean (a scalar too).

    `part`: which part of a validation this is, where it has several; their mean is the learner's loss.
    """

    learner: Hashable
    value: torch.Tensor
    weight: torch.Tensor
    part: str | None = None


class Objective(Protocol):
    """What each learner loses on a batch.

    `divides`: whether processes share the examples of a batch; if not, each has learners of its own.
    """

    divides: bool

    def begin(self, batch: Batch, learners: dict[Hashable, Learner]) -> object:
        """Do what all learners share; returns what `losses` is given."""

    def losses(self, begun: object, learners: dict[Hashable, Learner], training: bool) -> Iterator[Loss]:
        """A loss for each learner, or in validation one for each of its parts."""


class ModelObjective:
    """The loss of a whole model, for the only learner there is.

    It is the task's mean cross-entropy, over tokens or examples; in training, with the recipe's share `distill`, the
    divergence KL(teacher || model) of the predicted distributions takes its place (Hinton et al., arXiv 1503.02531,
    at temperature 1). Validation is by the task's loss alone, so that runs with and without compare.
    """

    divides = True  # the loss of a batch is the mean of its examples', which processes can share

    def __init__(self, model: torch.nn.Module, recipe: Recipe, teacher: torch.nn.Module | None = None):
        """`teacher`: the original model; needed if the recipe distils."""
        self.model, self.recipe, self.teacher = model, recipe, teacher
        # T5 would otherwise fill a cache of keys and values, which nothing reads here.
        self.settings = {"use_cache": False} if model.config.is_encoder_decoder else {}
        if teacher is not None:
            teacher.eval()  # dropout would make the targets noisy

    def begin(self, batch, learners):
        """Nothing is shared: the batch as it is."""
        return batch

    def losses(self, batch, learners, training):
        """The `Loss` of the only learner; its weight is the number of tokens or examples."""
        (name,) = learners
        self.model.train(training and self.recipe.dropout)
        distill = self.recipe.distill if training else 0.0
        with forward(batch["labels"].device, self.recipe, training):
            output = self.model(**batch, **self.settings)
            real, loss = batch.labelled(), output.loss
            if distill:
                with torch.no_grad():
                    wanted = rows_of(self.teacher(**batch, **self.settings).logits, real).float().log_softmax(-1)
                found = rows_of(output.logits, real).float().log_softmax(-1)  # (tokens, classes)
                divergence = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
                loss = (1 - distill) * loss + distill * divergence
        yield Loss(name, loss, torch.full((), float(len(real)), device=loss.device))


@contextlib.contextmanager
def forward(device: torch.device, recipe: Recipe, training: bool) -> Iterator[None]:
    """The mode of a forward pass: gradients in training alone, and the recipe's precision."""
    with torch.set_grad_enabled(training), computing(device, recipe.precision):
        yield
