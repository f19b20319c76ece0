"""What is composed in joint fine-tuning: at each step, by a rule of the table `SAMPLING`, and for validation.

Another rule is a class as `Sampling` describes it, and an entry in the table.
"""

import random
from collections.abc import Iterable
from typing import Protocol

from common.composing.scheme import DENSE, Pair, by_block

COMPOSITIONS = 8  # how many validation measures
NEW_SHARE = 0.5  # of the draws of a block that has new variants and old ones, the new have at least so much


class Sampling(Protocol):
    """A rule that draws a composition for each step."""

    def __init__(self, new: dict[str, list[str]], old: dict[str, list[str]], seed: int):
        """`new`, `old`: {block: variants}, those to train, and those that they are trained among."""

    def draw(self, step: int) -> dict[str, str]:
        """{block: variant}, at least one of them new; by the seed and the step alone, so that resuming is exact."""


class Even:
    """Every variant of a block is drawn once before any is drawn again, in an order of its own each time.

    FairNAS asks for that (arXiv 1907.01845). Where some of a block's variants are old, the draw is free.
    """

    def __init__(self, new: dict[str, list[str]], old: dict[str, list[str]], seed: int):
        self.new, self.old, self.seed = new, old, seed

    def draw(self, step: int) -> dict[str, str]:
        rng = random.Random(f"{self.seed}/step {step}")
        while True:
            choice = {name: self._draw(rng, step, name) for name in {**self.new, **self.old}}
            if any(variant in self.new.get(name, ()) for name, variant in choice.items()):
                return choice

    def _draw(self, rng, step, name):
        new, old = self.new.get(name, []), self.old.get(name, [])
        if new and not old:
            turn, place = divmod(step, len(new))
            return random.Random(f"{self.seed}/{name}/{turn}").sample(new, len(new))[place]
        share = max(NEW_SHARE, len(new) / len(new + old)) if new else 0.0
        return rng.choice(new if rng.random() < share else old)


SAMPLING = {"even": Even}


def make_sampling(rule: str, new: Iterable[Pair], among: Iterable[Pair], seed: int) -> Sampling:
    """The rule of that name. `new`: the variants to train; `among`: all that there are, these included."""
    new = set(new)
    parts = [[pair for pair in among if (pair in new) == is_new] for is_new in (True, False)]
    return SAMPLING[rule](*map(variants_by_block, parts), seed)


def variants_by_block(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """{block: [variant]}, in the order of the pairs."""
    return {block: [pair.variant for pair in group] for block, group in by_block(pairs).items()}


def sample_compositions(
    configurations: Iterable[dict[str, str]], new: Iterable[Pair], among: Iterable[Pair], seed: int
) -> dict[str, dict[str, str]]:
    """The compositions that quality is measured on: the configurations that have a new variant, then random ones.

    The random ones have new variants wherever there are any.

    Args:
        configurations: {block: variant} each; those with a variant that is not there are passed over.
        new, among: see `make_sampling`.
    Returns:
        {name: {block: variant}}, "configuration N" and "drawn N", COMPOSITIONS of them or as many as differ.
    """
    new, all_pairs = set(new), set(among)
    compositions = {}
    for n, choice in enumerate(configurations):
        pairs = {Pair(*item) for item in choice.items() if item[1] != DENSE}
        if pairs <= all_pairs and pairs & new and len(compositions) < COMPOSITIONS:
            compositions[f"configuration {n}"] = choice
    candidates = variants_by_block(among) | variants_by_block(pair for pair in among if pair in new)
    rng, drawn = random.Random(f"{seed}/compositions"), 0
    for _ in range(4 * COMPOSITIONS):
        choice = {name: rng.choice(variants) for name, variants in candidates.items()}
        if len(compositions) < COMPOSITIONS and choice not in compositions.values():
            compositions[f"drawn {drawn}"] = choice
            drawn += 1
    return compositions
