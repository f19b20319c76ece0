"""Heads ranked over a stack: the self-attentions that share a position bias lose the same ones, see `models.plain`."""

from collections.abc import Iterable

import torch

from common.blocks.find import find_blocks
from common.models.plain import Whole
from common.pruning.criteria import criterion_class
from common.runtime.errors import UserError


class Ranked:
    """Of a `criteria.Criterion` what chooses heads: scores that are known."""

    def __init__(self, scores: torch.Tensor):
        self.scores = scores

    def head_scores(self) -> torch.Tensor:
        return self.scores


def stacks_of(model) -> list[list[str]]:
    """The names of the attention blocks that share a position bias, a list for each bias of several.

    Raises:
        UserError: there are none, or they have lost different heads already.
    """
    blocks = {block.root: block for block in find_blocks(model).values()}
    stacks = [[blocks[root] for root in readers if root in blocks] for readers in Whole(model).biases.values()]
    stacks = [stack for stack in stacks if len(stack) > 1]
    if not stacks:
        raise UserError(
            f"--plain-heads: no layers of a {model.config.model_type} model share a position bias, as a T5's do"
        )
    kept = getattr(model.config, "kept_heads", None) or {}
    for stack in stacks:
        if len({tuple(kept.get(block.root, range(block.heads))) for block in stack}) > 1:
            raise UserError(f"--plain-heads: {stack[0].name} and others of its stack have lost different heads already")
    return [[block.name for block in stack] for stack in stacks]


def rank(stacks: list[list[str]], criterion: str, tensors: dict, sums: Iterable[tuple]) -> dict[str, Ranked]:
    """The same scores for all blocks of a stack: the sum of each block's share.

    Args:
        criterion: its name; `tensors`: {block's name: its tensors}.
        sums: (block, sums over calibration data or None), of all blocks of the stacks.
    """
    scores = {
        block.name: criterion_class(criterion)(block, tensors[block.name], each).head_scores() for block, each in sums
    }
    shares = {name: score / (score.sum() or 1) for name, score in scores.items()}
    totals = [sum(shares[name] for name in stack) for stack in stacks]  # a block of zeros has no say
    return {name: Ranked(total) for stack, total in zip(stacks, totals) for name in stack}
