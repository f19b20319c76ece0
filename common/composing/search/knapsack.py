"""The combination of variants that loses least within a budget: a multiple-choice knapsack, solved exactly by HiGHS.

The problem is chapter 11 of Kellerer, Pferschy and Pisinger, Knapsack Problems (2004).
"""

import contextlib
import os
import sys
from typing import NamedTuple

import numpy as np

from common.runtime.errors import UserError

SCALE = 1e4  # of the largest coefficient: the solver's tolerances are absolute, some 1e-6


class Row(NamedTuple):
    """A condition of a choice: `least` <= the sum of factors <= `most`.

    `terms`: {what is 0 or 1: factor}. A (block, variant) is 1 if it is chosen, any other name what suits all rows.
    """

    terms: dict
    least: float
    most: float


def choose(scores, costs, budget, *, rows=(), current=None, changes=None):
    """The {block: variant} whose scores' sum is smallest, the costs' sum being within the budget to the last bit.

    Args:
        scores, costs: {block: {variant: number}}; lower is better.
        budget: in the costs' unit.
        rows: what else must hold; all variants that they name are among the scores'.
        current, changes: change at most `changes` blocks of the {block: variant} `current`.
    Raises:
        UserError: no combination is within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    pairs = [(block, variant) for block, variants in scores.items() for variant in variants]
    least = sum(min(costs[block][variant] for variant in variants) for block, variants in scores.items())
    score, _ = _above_the_least(scores, pairs)
    cost, unit = _above_the_least(costs, pairs)
    rows = [*rows, *(Row({(block, v): 1 for v in variants}, 1, 1) for block, variants in scores.items())]
    rows.append(Row(dict(zip(pairs, cost)), -np.inf, (budget - least) / unit))
    if changes is not None:
        rows.append(Row(dict.fromkeys(current.items(), 1), len(scores) - changes, np.inf))
    columns = {name: n for n, name in enumerate(dict.fromkeys([*pairs, *(name for row in rows for name in row.terms)]))}
    while True:
        entries = [(factor, n, columns[name]) for n, row in enumerate(rows) for name, factor in row.terms.items()]
        factors, *places = zip(*entries)
        with silent_stdout():
            result = milp(
                np.pad(score, (0, len(columns) - len(pairs))),
                integrality=np.ones(len(columns)),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(
                    coo_array((factors, places), (len(rows), len(columns))),
                    [row.least for row in rows],
                    [row.most for row in rows],
                ),
                options={"mip_rel_gap": 0},
            )
        if result.x is None:
            raise UserError(f"a budget of {budget:.6g} cannot be met: {result.message}")
        chosen = dict(pair for pair, one in zip(pairs, result.x) if one > 0.5)
        if sum(costs[block][variant] for block, variant in chosen.items()) <= budget:
            return chosen
        # Within the solver's tolerance alone, so not this combination. The next one is still the best of the others.
        rows.append(Row(dict.fromkeys(chosen.items(), 1), 0, len(scores) - 1))


def least_cost(costs, rows=()):
    """The least that a combination of {block: {variant: cost}} costs."""
    cheapest = choose(costs, costs, np.inf, rows=rows)
    return sum(costs[block][variant] for block, variant in cheapest.items())


def _above_the_least(values, pairs):
    """By how much each pair's value is above its block's smallest, (pairs,), the largest being SCALE; and the unit."""
    least = {block: min(variants.values()) for block, variants in values.items()}
    above = np.array([values[block][variant] - least[block] for block, variant in pairs], dtype=float)
    unit = above.max() / SCALE or 1.0
    return above / unit, unit


@contextlib.contextmanager
def silent_stdout():
    """While this is open, nothing gets to stdout: the solver has messages there that no option switches off."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as nothing:
        stdout = os.dup(1)
        try:
            os.dup2(nothing.fileno(), 1)
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def efficient(scores, costs):
    """The variants of each block that no other one beats, with a lower score at no higher cost: {block: [variant]}."""
    unbeaten = {}
    for block, variants in scores.items():
        unbeaten[block], least = [], float("inf")
        for variant in sorted(variants, key=lambda variant: (costs[block][variant], scores[block][variant])):
            if scores[block][variant] < least:
                unbeaten[block].append(variant)
                least = scores[block][variant]
    return unbeaten


def improve(chosen, costs, budget, real_loss, held_back_loss, conditional, *, rounds, rows=()):
    """Improve a choice where the blocks' scores don't add up.

    In each round variants are scored again, within the model of the choice so far. By these scores the best exchange
    of any number of blocks is tried out, of half of them at most, and so on down to one. The one that lowers the real
    loss most is taken, if it lowers the loss on held-back examples too. The rounds end where none is.

    Args:
        real_loss, held_back_loss: functions of a choice, the model's loss on the examples that decide and on others.
        conditional: function of a choice: {block: {variant: loss of the model with that one block replaced}}.
        rows: see `choose`.
    Returns:
        [the first choice, and the choice after each round that improved it].
    """
    path = [chosen]
    for _ in range(rounds):
        scores, best, changes = conditional(chosen), chosen, len(chosen)
        while changes:
            candidate = choose(scores, costs, budget, rows=rows, current=chosen, changes=changes)
            best = min(best, candidate, key=real_loss)
            changes //= 2
        if best == chosen or held_back_loss(best) >= held_back_loss(chosen):
            break
        chosen = best
        path.append(chosen)
    return path
