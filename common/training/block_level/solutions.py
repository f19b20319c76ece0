"""The closed form's solutions, pass by pass: solved, and measured on held-out data beside the pruned weights."""

import math
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant
from common.composing.scheme import Pair, by_block
from common.data.examples import Examples
from common.pruning.closed_form import blocks_by_pass, reconstruct, too_few
from common.runtime.devices import Runtime, give_back_memory
from common.runtime.errors import UserError
from common.training.block_level.teacher import held_out_errors
from common.training.learner import Epoch, EpochSeconds


class Solution(NamedTuple):
    """What the closed form found for a variant. `before`, `after`: held-out error (NMSE) without and with it."""

    tensors: dict[str, torch.Tensor]
    before: float
    after: float
    ridge: float  # the one of several that the error is least with

    @property
    def is_better(self) -> bool:
        return self.after < self.before


class Solved(NamedTuple):
    """The solutions of the variants of some blocks, and the seconds of all passes so far, this one included.

    `variants`: the pruned ones. `seconds`: what solving each of them took, an equal share of this pass.
    """

    variants: dict[Pair, Variant]
    solutions: dict[Pair, Solution]
    seconds: float
    rows: list[EpochSeconds]  # before, and of the closed form as epoch 1

    def better(self) -> dict[Pair, dict[str, torch.Tensor]]:
        """The solutions that are better than the pruned weights."""
        return {pair: solution.tensors for pair, solution in self.solutions.items() if solution.is_better}

    def histories(self) -> dict[Pair, list[Epoch]]:
        """The held-out errors as the first two epochs of each variant."""
        nan = float("nan")
        return {
            pair: [Epoch(0, nan, solution.before, 0.0), Epoch(1, nan, solution.after, self.seconds)]
            for pair, solution in self.solutions.items()
        }


def solve(
    pairs: Sequence[Pair],
    read: Callable[[Sequence[Pair]], dict[Pair, Variant]],
    teacher: torch.nn.Module,
    blocks: dict[str, Block],
    calibration: Examples,
    held_out: Examples,
    ridges: Sequence[float],
    runtime: Runtime,
) -> Iterator[Solved]:
    """Solve variants with each ridge, as many blocks at a time as share a teacher pass.

    Nothing of a pass is held any longer once the next is asked for, so that a library may be larger than the memory.

    Args:
        read: gives the pruned variants of some pairs, on the device.
        blocks: all of the teacher's.
        held_out: the examples that errors are measured on.
    Raises:
        UserError: an error is no finite number: the model or the data are damaged.
    """
    variants_of, talk = by_block(pairs), runtime.talk
    shortage = too_few(teacher, [blocks[name] for name in variants_of], calibration)
    if shortage:
        talk.say(f"few examples to solve on: {shortage}; give more with --calibration")
    sizes = {}  # {block: bytes of its variants, pruned and solved, in float32}
    for name, own in variants_of.items():
        sizes[blocks[name]] = 4 * sum(prod(shape) for _, shape in blocks[name].shapes) * len(own) * (1 + len(ridges))
    passes, done = blocks_by_pass(teacher, sizes), 0
    before, after = EpochSeconds(0, 0.0, 0.0), EpochSeconds(1, 0.0, 0.0)
    for group in passes:
        variants = read([pair for block in group for pair in variants_of[block.name]])
        if len(passes) > 1:
            talk.say(f"blocks {done + 1} to {done + len(group)} of {len(sizes)}: {len(variants)} variants")
        done += len(group)
        started = runtime.now()
        solved = reconstruct(teacher, variants, calibration, runtime, ridges=ridges)
        finished = runtime.now()
        solutions = measured(variants, solved, teacher, blocks, held_out, ridges, runtime)
        took = finished - started
        after = EpochSeconds(1, after.train + took, after.validation + runtime.now() - finished)
        mean_before, mean_after = (
            sum(errors) / len(solutions)
            for errors in zip(*((solution.before, solution.after) for solution in solutions.values()))
        )
        talk.say(f"closed form: mean held-out error {mean_before:.4f} -> {mean_after:.4f}, {took:.1f} s")
        yield Solved(variants, solutions, took / len(variants), [before, after])
        del variants, solved, solutions
        give_back_memory()


def measured(variants, solved, teacher, blocks, held_out, ridges, runtime) -> dict[Pair, Solution]:
    """The solution of each variant whose held-out error is least.

    Args:
        solved: {pair: [tensors, for each ridge]}; the others are as in `solve`.
    """
    candidates = {pair: [variant.tensors, *solved[pair]] for pair, variant in variants.items()}
    errors = held_out_errors(teacher, blocks, candidates, held_out, runtime)
    solutions = {}
    for pair, (before, *after) in errors.items():
        if not math.isfinite(before):
            raise UserError(f"{pair}: its held-out error is not a finite number: the model or the data are damaged")
        least = min(range(len(after)), key=after.__getitem__)
        solutions[pair] = Solution(solved[pair][least], before, after[least], ridges[least])
        is_left_out = not any(bool(keep.any()) for keep in variants[pair].keeps.values())  # nothing to solve
        if not solutions[pair].is_better and not is_left_out:
            runtime.talk.say(f"{pair}: the closed form is no better on held-out data; the pruned weights stay")
    return solutions
