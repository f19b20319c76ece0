"""Searching configurations: what a budget allows, the best choice within it, and the report of a search."""

from collections.abc import Sequence
from typing import NamedTuple

from common.composing.configurations import SIZES, block_of
from common.composing.scheme import DENSE
from common.composing.search import knapsack
from common.composing.search.candidates import Candidates
from common.composing.search.costs import Costs, count
from common.runtime.errors import UserError

UNIFORM = 3  # so many configurations are measured beside the choice that a search finds, if there are as many


def limits(cost: Costs, budgets: Sequence[float]) -> list[float]:
    """What the blocks may cost, for each budget: up to 1 it is a fraction of what the original's do, above it the
    parameters, multiply-adds, bytes or milliseconds of the whole model.

    Raises:
        UserError: a model must cost more than that, whatever its blocks are.
    """
    unit = 1e-3 if cost.measure == "latency" else 1
    found = []
    for budget in budgets:
        found.append(budget * cost.original if budget <= 1 else budget * unit - cost.rest)
        if found[-1] < 0:
            raise UserError(
                f"--budget {budget:g}: is infeasible; what lies outside of the blocks alone costs "
                f"{cost.rest / unit:.6g} ({_unit(cost)}); a budget up to 1 is a fraction of what the blocks cost"
            )
    return found


def _unit(cost):
    return "milliseconds" if cost.measure == "latency" else cost.measure


def check_feasible(cost: Costs, limits: list[float]) -> None:
    """Make sure that there are choices within all limits.

    Raises:
        UserError: naming the range of those that there are.
    """
    least, most = knapsack.cost_range(cost.blocks)
    unit = 1e-3 if cost.measure == "latency" else 1
    for limit in limits:
        if limit < least:
            raise UserError(
                f"--budget: {limit / cost.original:.4g} of what the original's blocks cost is infeasible; the variants "
                f"cost {least / cost.original:.4g} to {most / cost.original:.4g} of it, the whole model "
                f"{(least + cost.rest) / unit:.6g} to {(most + cost.rest) / unit:.6g} ({_unit(cost)})"
            )


class Found(NamedTuple):
    """A choice, {block: variant}, and what is known of it."""

    choice: dict[str, str]
    figures: dict


class Searched(NamedTuple):
    """The costs and scores of all variants, and the best choice for each budget."""

    cost: Costs
    scores: dict[str, dict[str, float]]
    found: list[Found]


def search_budgets(
    candidates: Candidates, *, measure: str, budgets: Sequence[float], uniform: dict[int, dict], rounds: int
) -> Searched:
    """The best choice for each budget, and then for the cost of each of some uniform choices, {number: choice}.

    Args:
        measure: what a budget is counted in, see `costs.count`.
        budgets: see `limits`.
        rounds: see `knapsack.improve`.
    Raises:
        UserError: a budget is infeasible.
    """
    runtime, talk = candidates.runtime, candidates.runtime.talk
    cost = runtime.processes.agree(count(measure, candidates.loaded, candidates.keeps(), runtime.device))
    if cost.excess:
        talk.say(
            f"latency: the blocks took {cost.excess * 1e3:.2f} ms longer than the whole model, whose rest counts as 0; "
            "the machine does other work, so measure again when it is quiet"
        )
    allowed = limits(cost, budgets) + [cost.of(choice) for choice in uniform.values()]
    check_feasible(cost, allowed)
    if not candidates.held_back:
        talk.say(
            f"all {len(candidates.validation)} validation examples are scored on and none are left to hold back, so "
            "what is found is checked on the scoring examples alone; a smaller --score-examples leaves some"
        )
    scores = candidates.scores()
    talk.say(
        f"{candidates.library.folder}: {candidates.scored} variants scored, "
        f"{len(candidates.keys) - candidates.scored} had been scored before"
    )
    return Searched(cost, scores, find(candidates, cost, allowed, scores, rounds=rounds))


def find(candidates: Candidates, cost: Costs, limits: list[float], scores: dict, *, rounds: int) -> list[Found]:
    """The best choice for each of some limits of what its blocks cost, in this order.

    It is the one that the search finds, unless a uniform choice (a configuration within the limit) has a lower
    objective on the held-back examples.

    The figures are:
        of the best choice: "returned", which is "searched" or "uniform N", N being the configuration's number; "cost",
        of the whole model; "fraction", of the original's blocks; "loss" and "kl".
        of the search: "predicted", the objective of the choice that the scores' sum says is best, and "additive", its
        measured one; "history", the measured objective before the first and after each round of exchanges.
        "held_back": the "history" on the held-back examples, and {"loss", "kl"} there of what was "searched" and of the
        best "uniform" choice, with its number as "configuration"; None where no configuration is within the limit.
    """
    started, objective = candidates.runtime.now(), candidates.objective
    variants, found, within = knapsack.efficient(scores, cost.blocks), {}, None

    def real(choice):
        return candidates.real(choice)[objective]

    def held_back(choice):
        return candidates.real_held_back(choice)[objective]

    def conditional(choice):
        nonlocal within
        within = candidates.conditional(choice, variants)
        return within

    for limit in sorted(set(limits), reverse=True):
        additive = start = knapsack.choose(scores, cost.blocks, limit)
        if within:  # what was found out in the model of the budget above
            start = min(additive, knapsack.choose(within, cost.blocks, limit), key=real)
        path = knapsack.improve(start, cost.blocks, limit, real, held_back, conditional, rounds=rounds)
        returned, choice, uniform = "searched", path[-1], best_uniform(candidates, cost, limit, scores)
        if uniform and uniform.figures[objective] < held_back(choice):
            returned, choice = f"uniform {uniform.figures['configuration']}", uniform.choice
        found[limit] = Found(
            choice,
            {
                "returned": returned,
                "cost": cost.of(choice) + cost.rest,
                "fraction": cost.of(choice) / cost.original,
                "predicted": candidates.predicted(additive, scores),
                "additive": real(additive),
                "history": [real(each) for each in path],
                "held_back": {
                    "history": [held_back(each) for each in path],
                    "searched": candidates.real_held_back(path[-1]),
                    "uniform": uniform.figures if uniform else None,
                },
                **candidates.real(choice),
            },
        )
        figures = found[limit].figures
        beside = "no configuration fits"
        if uniform:
            beside = f"uniform {uniform.figures['configuration']}: {uniform.figures[objective]:.4f}"
        candidates.runtime.talk.say(
            f"budget {limit / cost.original:.4f} of the blocks' {cost.measure}: {figures['fraction']:.4f} used by the "
            f"choice returned ({returned}); {objective} of the search {real(path[-1]):.4f} ({figures['additive']:.4f} "
            f"before exchanges, {figures['predicted']:.4f} by the scores' sum), on held-back examples "
            f"{held_back(path[-1]):.4f} ({beside})"
        )
    candidates.seconds["search"] += candidates.runtime.now() - started
    return [found[limit] for limit in limits]


def best_uniform(candidates, cost, limit, scores):
    """The configuration within a limit that has the lowest objective on the held-back examples, of a few.

    These are the ones that cost just the limit, and others up to UNIFORM, which the scores' sum says are best.

    Returns:
        Found, with "configuration" (the number), "loss" and "kl" there; None if none is within the limit.
    """
    within = {n: choice for n, choice in enumerate(candidates.configurations()) if cost.of(choice) <= limit}
    just = [n for n in within if cost.of(within[n]) == limit]
    others = sorted(within.keys() - just, key=lambda n: (candidates.predicted(within[n], scores), n))
    few = just + others[: max(UNIFORM - len(just), 0)]
    measured = [Found(within[n], {"configuration": n, **candidates.real_held_back(within[n])}) for n in few]
    return min(measured, key=lambda each: each.figures[candidates.objective], default=None)


def report(candidates: Candidates, searched: Searched, uniform: dict[int, dict]) -> dict:
    """What a picture needs, as JSON values: variants with scores, errors and costs; searched and uniform choices.

    "validation" is measured on all validation examples, "held_back" on those held back, and the rest on those that the
    scores are from.
    """
    cost, scores, found = searched
    variants = []
    for pair in candidates.keys:
        name, variant = pair
        entry = candidates.library.entry(pair)
        variants.append(
            {
                "block": name,
                "variant": variant,
                "removed": candidates.scheme.blocks[name][variant],
                "loss": entry["score"]["loss"],
                "kl": entry["score"]["kl"],
                "nmse": entry.get("nmse_after"),
                "cost": cost.blocks[name][variant],
                "fraction": cost.blocks[name][variant] / cost.blocks[name][DENSE],
            }
        )
    dense = dict.fromkeys(candidates.blocks, DENSE)
    same = [
        {
            "configuration": n,
            "fraction": cost.of(choice) / cost.original,
            "predicted": candidates.predicted(choice, scores),
            **candidates.real(choice),
            "held_back": candidates.real_held_back(choice),
            "validation": candidates.validate(choice),
        }
        for n, choice in uniform.items()
    ]
    choices = [figures | {"choice": choice, "validation": candidates.validate(choice)} for choice, figures in found]
    return {
        "measure": cost.measure,
        "objective": candidates.objective,
        "original": cost.original,
        "rest": cost.rest,
        "examples": candidates.counts(),
        "dense": candidates.dense()
        | {"held_back": candidates.real_held_back(dense), "validation": candidates.validate(dense)},
        "blocks": {name: each[DENSE] for name, each in cost.blocks.items()},
        "variants": variants,
        "uniform": same,
        "searched": choices,
        "models": [
            {
                "choice": dict(zip(candidates.blocks, key)),
                **values,
                "held_back": candidates.known_held_back.get(key),
                "predicted": candidates.predicted(dict(zip(candidates.blocks, key)), scores),
            }
            for key, values in candidates.known.items()
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
