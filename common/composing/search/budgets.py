"""Searching configurations: what a budget allows, the best choice within it, and the report of a search."""

from collections.abc import Sequence
from typing import NamedTuple

from common.composing.configurations import SIZES, block_of
from common.composing.scheme import DENSE
from common.composing.search import knapsack
from common.composing.search.candidates import HELD_BACK, SCORED_ON, VALIDATION, Candidates, costs_of, read_masks
from common.composing.search.costs import Costs
from common.composing.search.plain import PlainChoices
from common.runtime.errors import UserError

UNIFORM = 3  # so many configurations are measured beside the choice that a search finds, if there are as many


def limits(
    cost: Costs, budgets: Sequence[float], uniform: dict[int, dict], among: PlainChoices | None = None
) -> list[float]:
    """What the blocks may cost, for each budget: up to 1 it is a fraction of what the original's do, above it the
    parameters, multiply-adds, bytes or milliseconds of the whole model; and for each of some {number: choice}, as much
    as that. A UserError if none of the choices costs as little."""
    unit, name = (1e-3, "milliseconds") if cost.measure == "latency" else (1, cost.measure)
    least = knapsack.least_cost(cost.blocks, among.rows if among else ())
    allowed = {
        f"--budget {budget:g}": budget * cost.original if budget <= 1 else budget * unit - cost.rest
        for budget in budgets
    } | {f"--budget-of {n}": cost.of(choice) for n, choice in uniform.items()}
    for flag, limit in allowed.items():
        if limit < least:
            raise UserError(
                f"{flag}: is infeasible; the blocks' variants cost {least / cost.original:.4g} to 1 of what the "
                f"original's cost, the whole model {(least + cost.rest) / unit:.6g} to "
                f"{(cost.original + cost.rest) / unit:.6g} ({name}){' where it is plain' if among else ''}"
            )
    return list(allowed.values())


class Found(NamedTuple):
    choice: dict[str, str]  # {block: variant}
    figures: dict


class Searched(NamedTuple):
    """The costs and scores of all variants, and the best choice for each budget."""

    cost: Costs
    scores: dict[str, dict[str, dict]]
    found: list[Found]


def search_budgets(
    candidates: Candidates,
    *,
    measure: str,
    budgets: Sequence[float],
    uniform: dict[int, dict],
    rounds: int,
    plain: bool,
) -> Searched:
    """The best choice for each budget, and then for the cost of each of some uniform choices, {number: choice}.

    `measure`: see `costs_of`; `budgets`, and the UserError of one that is infeasible: see `limits`; `rounds`: see
    `knapsack.improve`; `plain`: only choices whose compact models are plain, see `PlainChoices`.
    """
    runtime, talk = candidates.runtime, candidates.runtime.talk
    with talk.waiting(f"measuring what {len(candidates.keys)} variants cost ({measure})"):
        masks = read_masks(candidates.scheme, candidates.blocks, candidates.library)
        cost = runtime.processes.agree(costs_of(measure, candidates.loaded, masks, candidates.library, runtime, plain))
    among = PlainChoices(candidates.loaded, candidates.blocks, masks, candidates.library.folder) if plain else None
    allowed = limits(cost, budgets, uniform, among)
    if not candidates.held_back:
        talk.say(
            f"all {len(candidates.examples)} validation examples are scored on and none are left to hold back, so "
            "what is found is checked on the scoring examples alone; a smaller --score-examples leaves some"
        )
    scores = candidates.scores()
    talk.say(
        f"{candidates.library.folder}: {candidates.scored} variants scored, "
        f"{len(candidates.keys) - candidates.scored} had been scored before"
    )
    return Searched(cost, scores, find(candidates, cost, allowed, candidates.rises(scores), rounds=rounds, among=among))


def find(
    candidates: Candidates,
    cost: Costs,
    limits: list[float],
    rises: dict,
    *,
    rounds: int,
    among: PlainChoices | None = None,
) -> list[Found]:
    """The best choice, of all or `among` some, for each of some limits of what its blocks cost, in this order.

    It is the one that the search finds, unless a uniform choice (a configuration within the limit) has a lower
    objective on the held-back examples.

    The figures are, of the best choice: "cost", of the whole model; "fraction", of the original's blocks; "loss"; "kl".
    Of the search: "predicted", the objective of the choice that is best by the sum of `rises`, and "additive", its
    measured one; "history", the measured objective before the first and after each round of exchanges.
    """
    started, objective = candidates.runtime.now(), candidates.objective
    rows = among.rows if among else ()
    efficient, best, within = rises if among else knapsack.efficient(rises, cost.blocks), {}, None
    choices = {n: choice for n, choice in enumerate(candidates.configurations()) if not among or choice in among}

    def measured(choice):
        return candidates.measured(choice)[objective]

    def held_back(choice):
        return candidates.measured(choice, HELD_BACK)[objective]

    def conditional(choice):
        nonlocal within
        within = candidates.conditional(choice, efficient)
        return within

    for limit in candidates.runtime.talk.progress(sorted(set(limits), reverse=True), "budgets"):
        additive = start = knapsack.choose(rises, cost.blocks, limit, rows=rows)
        if within:  # what was found out in the model of the budget above
            start = min(additive, knapsack.choose(within, cost.blocks, limit, rows=rows), key=measured)
        path = knapsack.improve(start, cost.blocks, limit, measured, held_back, conditional, rounds=rounds, rows=rows)
        returned, choice, uniform = "searched", path[-1], best_uniform(candidates, choices, cost, limit, rises)
        if uniform and uniform.figures[objective] < held_back(choice):
            returned, choice = f"uniform {uniform.figures['configuration']}", uniform.choice
        figures = {
            "returned": returned,
            "cost": cost.of(choice) + cost.rest,
            "fraction": cost.of(choice) / cost.original,
            "predicted": candidates.predicted(additive, rises),
            "additive": measured(additive),
            "history": [measured(step) for step in path],
            "held_back": {
                "history": [held_back(step) for step in path],
                "searched": candidates.measured(path[-1], HELD_BACK),
                "uniform": uniform.figures if uniform else None,
            },
            **candidates.measured(choice),
        }
        best[limit] = Found(choice, figures)
        candidates.runtime.talk.say(
            f"budget {limit / cost.original:.4f} of the blocks' {cost.measure}: {figures['fraction']:.4f} used by the "
            f"choice returned ({returned}); {objective} {figures[objective]:.4f}, on held-back examples "
            f"{held_back(choice):.4f}"
        )
    candidates.seconds["search"] += candidates.runtime.now() - started
    return [best[limit] for limit in limits]


def best_uniform(candidates, choices, cost, limit, rises):
    """Of some configurations {number: choice} within a limit, the one with the lowest objective on the held-back
    examples, of up to UNIFORM that the sum of `rises` says are best, and those that cost just the limit; or None."""
    within = {n: choice for n, choice in choices.items() if cost.of(choice) <= limit}
    just = [n for n in within if cost.of(within[n]) == limit]
    others = sorted(within.keys() - just, key=lambda n: (candidates.predicted(within[n], rises), n))
    numbers = just + others[: max(UNIFORM - len(just), 0)]
    measured = [Found(within[n], {"configuration": n, **candidates.measured(within[n], HELD_BACK)}) for n in numbers]
    return min(measured, key=lambda uniform: uniform.figures[candidates.objective], default=None)


def report(candidates: Candidates, searched: Searched, uniform: dict[int, dict]) -> dict:
    """What a picture needs, as JSON values: variants with scores, errors and costs; searched and uniform choices."""
    cost, scores, found = searched
    rises = candidates.rises(scores)

    def elsewhere(choice):
        samples = {"held_back": HELD_BACK, "validation": VALIDATION}
        return {name: candidates.measured(choice, sample) for name, sample in samples.items()}

    variants = [
        {
            **pair._asdict(),
            "removed": candidates.scheme.blocks[pair.block][pair.variant],
            **{name: scores[pair.block][pair.variant][name] for name in ("loss", "kl")},
            "nmse": candidates.library.entry(pair).get("nmse_after"),
            "cost": cost.blocks[pair.block][pair.variant],
            "fraction": cost.blocks[pair.block][pair.variant] / (cost.blocks[pair.block][DENSE] or 1),
        }
        for pair in candidates.keys
    ]
    return {
        "measure": cost.measure,
        "objective": candidates.objective,
        "original": cost.original,
        "rest": cost.rest,
        "examples": candidates.counts(),
        "dense": candidates.dense() | elsewhere(candidates.dense_choice),
        "blocks": {name: costs[DENSE] for name, costs in cost.blocks.items()},
        "variants": variants,
        "uniform": [
            {
                "configuration": n,
                "fraction": cost.of(choice) / cost.original,
                "predicted": candidates.predicted(choice, rises),
                **candidates.measured(choice),
                **elsewhere(choice),
            }
            for n, choice in uniform.items()
        ],
        "searched": [
            figures | {"choice": choice, "validation": candidates.measured(choice, VALIDATION)}
            for choice, figures in found
        ],
        "models": [
            {
                "choice": dict(zip(candidates.blocks, key)),
                **values,
                "held_back": candidates.measured_on[HELD_BACK].get(key),
                "predicted": candidates.predicted(dict(zip(candidates.blocks, key)), rises),
            }
            for key, values in candidates.measured_on[SCORED_ON].items()
        ],
        "seconds": candidates.seconds,
    }


def rates_of(choice, candidates, modules):
    """A choice as a configuration, {module: rate}: rates that remove just what its variants do."""
    config = {}
    for name, module in modules.items():
        block = block_of(name, module)
        removed = candidates.scheme.blocks[block][choice[block]] if choice[block] != DENSE else {"weights": {}}
        parts = SIZES[module["kind"]]
        count = removed["weights"].get(module["linear"], 0) if parts == "weights" else removed.get(parts, 0)
        config[name] = count / module[parts]
    return config
