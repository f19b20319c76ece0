"""The closed form's solutions, pass by pass: solved, and measured on held-out data beside the pruned weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from common.blocks.tensors import Variant
from common.composing.scheme import Pair, by_block
from common.pruning.closed_form import Context, blocks_by_pass, reconstruct, too_few
from common.runtime.devices import give_back_memory
from common.runtime.errors import UserError
from common.training.block_level.stage import BlockStage
from common.training.block_level.teacher import held_out_errors
from common.training.stats import Epoch, EpochSeconds

LEVELS = 3  # of removal, each with a context of its own
NO_TIME = (EpochSeconds(0, 0.0, 0.0), EpochSeconds(1, 0.0, 0.0))  # that a closed form has taken so far


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
    def best(self) -> dict[str, torch.Tensor]:
        """The pruned weights where the solution is no better."""
        return self.tensors if self.is_better else self.pruned.tensors

    @property
    def history(self) -> list[Epoch]:
        """The errors as the first two epochs."""
        return [Epoch(epoch, float("nan"), error) for epoch, error in enumerate((self.before, self.after))]


def solve(
    stage: BlockStage, pairs: Sequence[Pair], context: Context | None = None
) -> Iterator[tuple[dict[Pair, Solution], list[EpochSeconds]]]:
    """Solve pruned variants with each ridge, as many blocks at a time as share a teacher pass, and fit the memory.

    Args:
        context: where the blocks stand; None for the original.
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
    for group in runtime.talk.progress(passes, "passes"):
        variants = stage.pruned_on_device([pair for block in group for pair in variants_of[block.name]])
        if len(passes) > 1:
            runtime.talk.say(f"blocks {done + 1} to {done + len(group)} of {len(sizes)}: {len(variants)} variants")
        done += len(group)
        started = runtime.now()
        solved = reconstruct(teacher, variants, stage.calibration, runtime, ridges=stage.ridges, context=context)
        finished = runtime.now()
        solutions = measured(stage, variants, solved, context)
        training, validation = training + finished - started, validation + runtime.now() - finished
        before, after = (
            sum(getattr(solution, name) for solution in solutions.values()) / len(solutions)
            for name in ("before", "after")
        )
        runtime.talk.say(f"closed form: mean held-out error {before:.4f} -> {after:.4f}, {finished - started:.1f} s")
        yield solutions, [NO_TIME[0], EpochSeconds(1, training, validation)]
        del variants, solved, solutions
        give_back_memory()


class Level(NamedTuple):
    """Variants that about as much is removed from, and what is typically beside them: {block: variant}."""

    pairs: list[Pair]
    beside: dict[str, Pair]


def levels_of(stage: BlockStage) -> list[Level]:
    """All pruned variants in up to LEVELS levels, by the share of their block that is removed."""
    ranked = {
        name: sorted(variants, key=lambda pair: kept(stage.pruned.read(stage.blocks[pair.block], pair.variant)))[::-1]
        for name, variants in by_block(stage.pruned.variants()).items()
    }
    count = min(LEVELS, max(map(len, ranked.values())))
    levels = [Level([], {}) for _ in range(count)]
    for name, variants in ranked.items():
        for place, pair in enumerate(variants):
            levels[(2 * place + 1) * count // (2 * len(variants))].pairs.append(pair)
        for number, level in enumerate(levels):
            level.beside[name] = variants[(2 * number + 1) * len(variants) // (2 * count)]
    return levels


def solve_in_context(
    stage: BlockStage, todo: Sequence[Pair], levels: list[Level], typical: dict[Pair, dict[str, torch.Tensor]]
) -> Iterator[tuple[dict[Pair, Solution], list[EpochSeconds]]]:
    """Solve those of `todo` level by level, each in its context, on its part of the calibration examples; see `solve`.

    `typical`: the tensors of what is beside a level's variants.
    """
    spent = NO_TIME
    for number, level in enumerate(levels):
        pairs = [pair for pair in level.pairs if pair in todo]
        part = replace(stage, calibration=stage.calibration.part(number, len(levels)))
        seconds = spent
        context = Context(stage.original, {name: typical[pair] for name, pair in level.beside.items()})
        for solutions, own in solve(part, pairs, context):
            seconds = [add_seconds(*rows) for rows in zip(spent, own)]
            yield solutions, seconds
        spent = seconds


def typical_solutions(
    stage: BlockStage, todo: Sequence[Pair], levels: list[Level]
) -> tuple[dict[Pair, dict[str, torch.Tensor]], list[EpochSeconds]]:
    """The tensors of the variants that contexts are made of, and the seconds that it took.

    Those of `todo` are solved on the original's inputs, and then in context as often as `stage.rounds` says, the last
    time left out; the library has the others.
    """
    pairs = dict.fromkeys(pair for level in levels for pair in level.beside.values())
    new = [pair for pair in pairs if pair in todo]
    typical = {pair: variant.tensors for pair, variant in stage.variants(stage.library, pairs.keys() - new).items()}
    spent = NO_TIME
    for number in range(stage.rounds):
        found, seconds = {}, spent
        for solutions, own in solve_in_context(stage, new, levels, typical) if number else solve(stage, new):
            found |= {pair: solution.best for pair, solution in solutions.items()}
            seconds = [add_seconds(*rows) for rows in zip(spent, own)]
        typical, spent = typical | found, seconds
    return typical, spent


def add_seconds(one: EpochSeconds, other: EpochSeconds) -> EpochSeconds:
    """What two parts of an epoch took."""
    return EpochSeconds(one.epoch, one.train + other.train, one.validation + other.validation)


def kept(variant: Variant) -> int:
    """How many weights are left of a variant's block."""
    return sum(int(keep.sum()) for keep in variant.keeps.values())


def measured(
    stage: BlockStage, variants: dict[Pair, Variant], solved: dict[Pair, list[dict]], context: Context | None
) -> dict[Pair, Solution]:
    """The solution of each variant whose held-out error is least; `solved`: {pair: [tensors, for each ridge]}."""
    candidates = {pair: [variant.tensors, *solved[pair]] for pair, variant in variants.items()}
    errors = held_out_errors(stage.original, stage.blocks, candidates, stage.held_out, stage.runtime, context)
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
