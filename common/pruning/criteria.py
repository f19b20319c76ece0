"""The criteria that choose what is removed, by name. Torch is not imported here, so that flags can list them.

A new criterion is a class as `Criterion` describes it, and an entry in `CRITERIA`.
"""

import importlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from common.blocks.find import Block
    from common.pruning.closed_form import Sums


class Criterion(Protocol):
    """Scores the parts of one block. What scores least is removed first.

    `version` is part of the key of every variant that the criterion chose; raise it when its choices change.
    """

    version: int

    def __init__(self, block: "Block", tensors: "dict[str, torch.Tensor]", sums: "Sums | None" = None):
        """
        Args:
            tensors: the block's, {"q.weight": tensor}.
            sums: over calibration data, for a criterion that needs them: `sums.gram(linear)` is H = AᵀA, (in, in), of
                a Linear's inputs A in the original, a bias's constant input last. Of an attention block the output
                Linear's alone is known.
        """

    def head_scores(self) -> "torch.Tensor":
        """(heads,), of an attention block."""

    def neuron_scores(self) -> "torch.Tensor":
        """(neurons,), of a feed-forward block."""

    def weight_mask(
        self, linear: str, removed: int, features: "torch.Tensor", keeps: "dict[str, torch.Tensor]"
    ) -> "torch.Tensor":
        """Which weights of a Linear stay, bool (out, in), all but `removed`.

        `features`: bool, the output Linear's inputs that stay; `keeps`: the masks of the Linears before this one.
        """


class Entry(NamedTuple):
    path: str  # of the class, "module:class"
    needs_data: bool
    help: str  # what is removed


CRITERIA = {
    "l1": Entry("common.pruning.l1:L1", False, "what is smallest"),
    "reconstruction": Entry(
        "common.pruning.reconstruction:Reconstruction",
        True,
        "what the block's output on training examples loses least by, once the closed form has solved what is left",
    ),
}
DEFAULT = "l1"


def criterion_class(name: str) -> type[Criterion]:
    """The class of a criterion in the table."""
    module, _, class_name = CRITERIA[name].path.partition(":")
    return getattr(importlib.import_module(module), class_name)
