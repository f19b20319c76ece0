"""The closed form's solutions, pass by pass: solved, and measured on held-out data beside the pruned weights."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from common.blocks.tensors import Variant
from common.composing.scheme import Pair, by_block
from common.pruning.closed_form import blocks_by_pass, reconstruct, too_few
from common.runtime.devices import give_back_memory
from common.runtime.errors import UserError
from common.training.block_level.stage import BlockStage
from common.training.block_level.teacher import held_out_errors
from common.training.learner import Epoch, EpochSeconds


class Solution(NamedTuple):
    """What the closed form found for a variant. `before`, `after`: held-out error (NMSE) without and with it."""

    pruned: Variant
    tensors: dict[str, torch.Tensor]
    before: float
    after: float
    ridge: float  # the one of several that the error is least with

    @property
    def is_better(self) -> bool:
        return self.after < self.before

    @property
    def history(self) -> list[Epoch]:
        """The errors as the first two epochs."""
        return [Epoch(epoch, float("nan"), error) for epoch, error in enumerate((self.before, self.after))]


def solve(stage: BlockStage, pairs: Sequence[Pair]) -> Iterator[tuple[dict[Pair, Solution], list[EpochSeconds]]]:
    """Solve pruned variants with each ridge, as many blocks at a time as share a teacher pass, and fit the memory.

    Returns:
        of each pass the solutions, and the seconds of all passes so far: before, and of the closed form as epoch 1.
    Raises:
        UserError: an error is no finite number: the model or the data are damaged.
    """
    variants_of, blocks, teacher, runtime = by_block(pairs), stage.blocks, stage.original, stage.runtime
    shortage = too_few(teacher, [blocks[name] for name in variants_of], stage.calibration)
    if shortage:
        runtime.talk.say(f"few examples to solve on: {shortage}; give more with --calibration")
    sizes = {}  # {block: bytes of its variants, pruned and solved, in float32}
    for name, variants in variants_of.items():
        entries = sum(math.prod(shape) for _, shape in blocks[name].shapes)
        sizes[blocks[name]] = 4 * entries * len(variants) * (1 + len(stage.ridges))
    passes, done, training, validation = blocks_by_pass(teacher, sizes), 0, 0.0, 0.0
    for group in passes:
        variants = stage.pruned_on_device([pair for block in group for pair in variants_of[block.name]])
        if len(passes) > 1:
            runtime.talk.say(f"blocks {done + 1} to {done + len(group)} of {len(sizes)}: {len(variants)} variants")
        done += len(group)
        started = runtime.now()
        solved = reconstruct(teacher, variants, stage.calibration, runtime, ridges=stage.ridges)
        finished = runtime.now()
        solutions = measured(stage, variants, solved)
        training, validation = training + finished - started, validation + runtime.now() - finished
        before, after = (
            sum(getattr(solution, name) for solution in solutions.values()) / len(solutions)
            for name in ("before", "after")
        )
        runtime.talk.say(f"closed form: mean held-out error {before:.4f} -> {after:.4f}, {finished - started:.1f} s")
        yield solutions, [EpochSeconds(0, 0.0, 0.0), EpochSeconds(1, training, validation)]
        del variants, solved, solutions
        give_back_memory()


def measured(stage: BlockStage, variants: dict[Pair, Variant], solved: dict[Pair, list[dict]]) -> dict[Pair, Solution]:
    """The solution of each variant whose held-out error is least; `solved`: {pair: [tensors, for each ridge]}."""
    candidates = {pair: [variant.tensors, *solved[pair]] for pair, variant in variants.items()}
    errors = held_out_errors(stage.original, stage.blocks, candidates, stage.held_out, stage.runtime)
    solutions = {}
    for pair, (before, *after) in errors.items():
        if not math.isfinite(before):
            raise UserError(f"{pair}: its held-out error is not a finite number: the model or the data are damaged")
        least = min(range(len(after)), key=after.__getitem__)
        solutions[pair] = Solution(variants[pair], solved[pair][least], before, after[least], stage.ridges[least])
        is_left_out = not any(bool(keep.any()) for keep in variants[pair].keeps.values())  # nothing to solve
        if not solutions[pair].is_better and not is_left_out:
            runtime = stage.runtime
            runtime.talk.say(f"{pair}: the closed form is no better on held-out data; the pruned weights stay")
    return solutions
