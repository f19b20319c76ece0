"""The closed form's solutions, each taken only where it is better on held-out data."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from common import interruption
from common.blocks import Block, Variant
from common.checkpoints import Checkpoint
from common.closed_form import reconstruct_with_each, too_few
from common.data import Examples
from common.devices import Runtime
from common.errors import UserError
from common.scheme import Pair
from common.search import score_composed
from common.teacher import held_out_errors
from common.training import Epoch, EpochSeconds


class Solution(NamedTuple):
    """What the closed form found for a variant. `before`, `after`: held-out error (NMSE) without and with it."""

    tensors: dict[str, torch.Tensor]
    before: float
    after: float
    ridge: float  # the one of several that the error is least with


class MostPruned(NamedTuple):
    """The variant of a block that keeps least: how many weights, and its tensors without and with what was solved."""

    kept: int
    pruned: dict[str, torch.Tensor]
    solved: dict[str, torch.Tensor]

    def copied(self) -> "MostPruned":
        """A copy in the memory of the CPU."""
        pruned, solved = ({n: t.detach().to("cpu", copy=True) for n, t in each.items()} for each in self[1:])
        return MostPruned(self.kept, pruned, solved)


class Solved(NamedTuple):
    """All solutions, what they took, and whether they help a model composed of them."""

    solutions: dict[Pair, Solution]
    rows: list[EpochSeconds]  # before, and of the closed form as epoch 1
    most_pruned: dict | None  # see `measure_most_pruned`; None where other variants follow
    so_far: dict[str, MostPruned]  # of each block, for those that follow; empty where none do

    @property
    def own_seconds(self) -> float:
        """A variant's equal share of what all took."""
        return self.rows[-1].train / len(self.solutions)

    def to_plain(self) -> dict:
        """All of it as plain values and tensors."""
        solutions = [[*pair, *each] for pair, each in self.solutions.items()]
        plain = {"solutions": solutions, "rows": [tuple(row) for row in self.rows], "most_pruned": self.most_pruned}
        so_far = {name: tuple(each) for name, each in self.so_far.items()}
        return plain | ({"so_far": so_far} if so_far else {})

    @classmethod
    def from_plain(cls, plain: dict) -> "Solved":
        """What `to_plain` gave."""
        solutions = {Pair(block, variant): Solution(*each) for block, variant, *each in plain["solutions"]}
        so_far = {name: MostPruned(*each) for name, each in plain.get("so_far", {}).items()}
        return cls(solutions, [EpochSeconds(*row) for row in plain["rows"]], plain["most_pruned"], so_far)

    def better(self) -> dict[Pair, dict[str, torch.Tensor]]:
        """The solutions that are better than the pruned weights."""
        return {pair: each.tensors for pair, each in self.solutions.items() if each.after < each.before}

    def histories(self) -> dict[Pair, list[Epoch]]:
        """The held-out errors as the first two epochs of each variant."""
        nan = float("nan")
        return {
            pair: [Epoch(0, nan, each.before, 0.0), Epoch(1, nan, each.after, self.own_seconds)]
            for pair, each in self.solutions.items()
        }


def solve(
    variants: dict[Pair, Variant],
    teacher: torch.nn.Module,
    blocks: dict[str, Block],
    calibration: Examples,
    validation: Examples,
    ridges: Sequence[float],
    runtime: Runtime,
    checkpoint: Checkpoint | None = None,
    *,
    so_far: dict[str, MostPruned] | None = None,
    is_last: bool = True,
) -> Solved:
    """Solve all variants with each ridge, and measure the solutions on held-out examples.

    Args:
        variants: the pruned ones, on the device; left as they are.
        blocks: all of the teacher's.
        checkpoint: keeps what is solved. What it kept is not solved again, and may be of more variants.
        so_far: of each block, the most pruned of the variants that were solved before, if there were any.
        is_last: whether these are the last ones, so that the model of the most pruned can be measured.
    Raises:
        UserError: an error is no finite number: the model or the data are damaged.
    """
    kept = (checkpoint.solutions() if checkpoint else None) or {"solved": {}, "seconds": 0.0, "all": None}
    if kept["all"]:
        runtime.talk.say(f"the closed form is solved already, by {checkpoint.path}")
        return Solved.from_plain(kept["all"])
    shortage = too_few(teacher, [variant.block for variant in variants.values()], calibration)
    if shortage:
        runtime.talk.say(f"few examples to solve on: {shortage}; give more with --calibration")
    started = runtime.now() - kept["seconds"]
    solved = solve_each(variants, teacher, calibration, ridges, runtime, checkpoint, kept, started)
    finished = runtime.now()
    candidates = {pair: [variant.tensors, *solved[pair]] for pair, variant in variants.items()}
    errors = held_out_errors(teacher, blocks, candidates, validation, runtime)
    for pair, each in errors.items():
        if not math.isfinite(each[0]):
            raise UserError(f"{pair}: its held-out error is not a finite number: the model or the data are damaged")
    best = {pair: min(range(len(each)), key=each.__getitem__) for pair, each in errors.items()}
    most = find_most_pruned(variants, candidates, best, so_far or {}, copies=not is_last)
    most_pruned = measure_most_pruned(most, teacher, blocks, validation, runtime) if is_last else None
    solutions = {}
    for pair, (before, *after) in errors.items():
        least = min(range(len(after)), key=after.__getitem__)
        solutions[pair] = Solution(solved[pair][least], before, after[least], ridges[least])
        is_left_out = not any(bool(keep.any()) for keep in variants[pair].keeps.values())  # nothing to solve
        if after[least] >= before and not is_left_out:
            runtime.talk.say(f"{pair}: the closed form is no better on held-out data; the pruned weights stay")
    before, after = (sum(each) / len(errors) for each in zip(*((each[0], min(each[1:])) for each in errors.values())))
    runtime.talk.say(f"closed form: mean held-out error {before:.4f} -> {after:.4f}, {finished - started:.1f} s")
    rows = [EpochSeconds(0, 0.0, 0.0), EpochSeconds(1, finished - started, runtime.now() - finished)]
    found = Solved(solutions, rows, most_pruned, {} if is_last else most)
    if checkpoint:
        checkpoint.save_solutions({"solved": {}, "seconds": 0.0, "all": found.to_plain()})
    return found


def solve_each(variants, teacher, calibration, ridges, runtime, checkpoint, kept, started):
    """Solve what is not kept in a checkpoint yet: {pair: [tensors, for each ridge]}; see `solve`.

    Args:
        kept: what the checkpoint has: "solved" {block: {variant: …}}; added to.
        started: when solving began, by `runtime.now`.
    """
    there = kept["solved"]

    def save():
        kept["seconds"] = runtime.now() - started
        checkpoint.save_solutions(kept)

    def after_block(solved):
        for pair, each in solved.items():
            there.setdefault(pair.block, {})[pair.variant] = each
        if checkpoint and checkpoint.is_due():
            save()

    known = {pair: there[pair.block][pair.variant] for pair in variants if pair.variant in there.get(pair.block, {})}
    missing = {pair: variant for pair, variant in variants.items() if pair not in known}
    try:
        new = reconstruct_with_each(teacher, missing, calibration, runtime, ridges=ridges, after_block=after_block)
    except interruption.Interrupted:
        if checkpoint and there:
            save()
        raise
    device = runtime.device
    known = {pair: [{n: t.to(device) for n, t in own.items()} for own in each] for pair, each in known.items()}
    solved = known | new
    return {pair: solved[pair] for pair in variants}


def find_most_pruned(variants, candidates, best, so_far, copies):
    """The variant of each block that keeps least, {block: MostPruned}; of several the last.

    Args:
        candidates: {pair: [pruned tensors, solutions …]}; `best`: {pair: which of them has the least error}.
        so_far: the same of variants that came before.
        copies: whether the tensors are needed for longer than those of the candidates, which are trained in place.
    """
    least = {name: each.kept for name, each in so_far.items()}
    most = {}
    for pair, variant in variants.items():
        kept = sum(int(keep.sum()) for keep in variant.keeps.values())
        if kept <= least.get(pair.block, kept):
            least[pair.block], most[pair.block] = kept, pair
    new = {
        name: MostPruned(least[name], candidates[pair][0], candidates[pair][best[pair]]) for name, pair in most.items()
    }
    return so_far | ({name: each.copied() for name, each in new.items()} if copies else new)


def measure_most_pruned(most, teacher, blocks, examples, runtime):
    """Whether solving blocks one by one helps a model composed of them: measured for each block's most pruned variant.

    Args:
        most: {block: MostPruned}.
    Returns:
        {"pruned", "solved": {"loss", "kl"}} of the two models on the held-out examples.
    """
    found = {
        name: score_composed(teacher, blocks, tensors, examples, runtime)
        for name, tensors in (
            ("pruned", {block: each.pruned for block, each in most.items()}),
            ("solved", {block: each.solved for block, each in most.items()}),
        )
    }
    losses = {name: scores["loss"] for name, scores in found.items()}
    if losses["solved"] > losses["pruned"]:
        runtime.talk.say(
            f"the model of the most pruned variants has a higher loss with the solutions ({losses['solved']:.4f}) than "
            f"without them ({losses['pruned']:.4f}), though its blocks' errors fell: give more examples with "
            "--calibration, or a larger --ridge"
        )
    return found
