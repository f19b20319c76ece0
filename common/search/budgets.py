"""Searching configurations: scoring a library's variants, and picking those that lose least within a budget."""

import copy
from typing import NamedTuple

from common.blocks import block_tensors, find_blocks, set_block
from common.data import Examples
from common.devices import Runtime
from common.errors import UserError
from common.library import Library
from common.models import LoadedModel
from common.records import digest
from common.schemes import DENSE, SIZES, Configurations, Pair, block_of, make_scheme, nth_choice
from common.search import knapsack
from common.search.costs import Costs
from common.search.scoring import score_block

FEWER = 4  # rounds of exchanges score variants on so many times fewer examples; what they find is tried on all


class Candidates:
    """The variants that a model can be composed of, and what they do to its loss."""

    def __init__(
        self,
        loaded: LoadedModel,
        configurations: Configurations,
        library: Library,
        validation: Examples,
        runtime: Runtime,
        *,
        number: int,
        objective: str,
    ):
        """
        Args:
            loaded: the original.
            configurations: those whose variants are the candidates.
            library: holds these.
            validation: not examples that anything was trained on.
            number: how many of them variants and models are scored on.
            objective: "loss" or "kl", see `score_block`.
        Raises:
            UserError: the library lacks a variant.
        """
        self.loaded, self.library, self.objective = loaded, library, objective
        self.validation, self.examples = validation, validation.sample(number)
        self.scheme = make_scheme(configurations)
        self.blocks = find_blocks(loaded.model)
        self.runtime = runtime
        scored_on = [library.record["model"]["fingerprint"], self.examples.fingerprint()]
        self.keys = {pair: digest([library.entry(pair)["key"], *scored_on]) for pair in self.scheme.variants()}
        self.composed, self.inside = copy.deepcopy(loaded.model), dict.fromkeys(self.blocks, DENSE)
        self.known = {}  # {choice: {"loss", "kl"}}
        self.scored, self.seconds = 0, {"one pass": None, "scores": 0.0, "search": 0.0}

    def configuration(self, nth, path):
        """The n-th of the configurations, read from `path`, as a {block: variant} of all the model's blocks.

        Raises:
            UserError: there is none.
        """
        return dict.fromkeys(self.blocks, DENSE) | nth_choice(self.scheme, nth, path)

    # A variant is read again wherever it is needed: those of a whole grid may be more than memory holds.

    def tensors(self, name, variant):
        """A block's tensors, on the device."""
        if variant == DENSE:
            return block_tensors(self.loaded.model, self.blocks[name])
        tensors = self.library.read(self.blocks[name], variant).tensors
        return {parameter: tensor.to(self.runtime.device) for parameter, tensor in tensors.items()}

    def keeps(self):
        """{block: {variant: {Linear: bool mask}}}, of the variants that remove something."""
        return {
            name: {variant: self.library.read(self.blocks[name], variant).keeps for variant in variants}
            for name, variants in self.scheme.blocks.items()
        }

    def compose(self, choice):
        """The model of a {block: variant}; the same object each time."""
        for name, variant in choice.items():
            if self.inside[name] != variant:
                set_block(self.composed, self.blocks[name], self.tensors(name, variant))
                self.inside[name] = variant
        return self.composed

    def real(self, choice):
        """{"loss", "kl"} of the composed model, measured."""
        key = tuple(choice[name] for name in self.blocks)
        if key not in self.known:
            started = self.runtime.now()
            self.known[key] = self._measure(choice, self.examples)
            if self.seconds["one pass"] is None:
                self.seconds["one pass"] = self.runtime.now() - started
        return self.known[key]

    def validate(self, choice):
        """{"loss", "kl"} of the composed model on all validation examples."""
        return self._measure(choice, self.validation)

    def _measure(self, choice, examples):
        model = self.compose(choice) if set(choice.values()) != {DENSE} else self.loaded.model  # one pass, not two
        return score_block(model, self.loaded.model, self.blocks, None, {}, examples, self.runtime)[None]

    def dense(self):
        """{"loss", "kl"} of the original."""
        return self.real(dict.fromkeys(self.blocks, DENSE))

    def scores(self):
        """By how much each variant alone raises the objective: {block: {variant: number}}.

        What the library's record knows already, of the same variant and examples, is taken from there; what is found
        out is written there, block by block.
        """
        dense = self.dense()
        started = self.runtime.now()
        found = {name: {DENSE: 0.0} for name in self.blocks}
        for name, variants in self.scheme.blocks.items():
            todo = [
                variant
                for variant in variants
                if (self.library.entry(Pair(name, variant)).get("score") or {}).get("key")
                != self.keys[Pair(name, variant)]
            ]
            if todo:
                tensors = {variant: self.tensors(name, variant) for variant in todo}
                scores = score_block(
                    self.loaded.model, self.loaded.model, self.blocks, name, tensors, self.examples, self.runtime
                )
                self.library.annotate(
                    name, {variant: {"key": self.keys[Pair(name, variant)], **scores[variant]} for variant in todo}
                )
                self.scored += len(todo)
            for variant in variants:
                found[name][variant] = (
                    self.library.entry(Pair(name, variant))["score"][self.objective] - dense[self.objective]
                )
        self.seconds["scores"] += self.runtime.now() - started
        return found

    def predicted(self, choice, scores):
        """The objective of a choice, as the scores' sum has it."""
        return self.dense()[self.objective] + sum(scores[name][variant] for name, variant in choice.items())

    def conditional(self, choice, variants):
        """The objective of the composed model with one block replaced, on some of the examples.

        Args:
            variants: those that are worth it, {block: [variant]}.
        Returns:
            {block: {variant: number}}, of these and of the choice's own.
        """
        examples, found = self.examples.sample(max(len(self.examples) // FEWER, 1)), {}
        for name in self.blocks:
            others = [variant for variant in variants[name] if variant != choice[name]]
            scores = score_block(
                self.compose(choice),
                self.loaded.model,
                self.blocks,
                name,
                {variant: self.tensors(name, variant) for variant in others},
                examples,
                self.runtime,
            )
            found[name] = {
                choice[name] if variant is None else variant: score[self.objective] for variant, score in scores.items()
            }
        return found


def limits(cost: Costs, budgets: list[float]) -> list[float]:
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
                f"--budget: {limit / cost.original:.4g} of what the original's blocks cost is infeasible; the library's"
                f" variants cost {least / cost.original:.4g} to {most / cost.original:.4g} of it, the whole model "
                f"{(least + cost.rest) / unit:.6g} to {(most + cost.rest) / unit:.6g} ({_unit(cost)})"
            )


class Found(NamedTuple):
    """A choice, {block: variant}, and what is known of it."""

    choice: dict[str, str]
    figures: dict


def find(candidates: Candidates, cost: Costs, limits: list[float], scores: dict, *, rounds: int) -> list[Found]:
    """The best choice for each of some limits of what its blocks cost, in this order.

    The figures are: "cost", of the whole model; "fraction", of the original's blocks; "predicted",
        the objective of the choice that the scores' sum says is best, and "additive", its measured one; "history", the
        measured objective before the first and after each round of exchanges that lowered it; "loss" and "kl", of the
        choice.
    """
    started, objective = candidates.runtime.now(), candidates.objective
    variants, found, within = knapsack.efficient(scores, cost.blocks), {}, None

    def real(choice):
        return candidates.real(choice)[objective]

    def conditional(choice):
        nonlocal within
        within = candidates.conditional(choice, variants)
        return within

    for limit in sorted(set(limits), reverse=True):
        additive = choice = knapsack.choose(scores, cost.blocks, limit)
        if within:  # what was found out in the model of the budget above
            choice = min(additive, knapsack.choose(within, cost.blocks, limit), key=real)
        choice, history = knapsack.improve(choice, cost.blocks, limit, real, conditional, rounds=rounds)
        found[limit] = Found(
            choice,
            {
                "cost": cost.of(choice) + cost.rest,
                "fraction": cost.of(choice) / cost.original,
                "predicted": candidates.predicted(additive, scores),
                "additive": real(additive),
                "history": history,
                **candidates.real(choice),
            },
        )
        figures = found[limit].figures
        candidates.runtime.talk.say(
            f"budget {limit / cost.original:.4f} of the blocks' {cost.measure}: {figures['fraction']:.4f} used, "
            f"{objective} {real(choice):.4f} ({figures['additive']:.4f} before exchanges, {figures['predicted']:.4f} "
            "by the scores' sum)"
        )
    candidates.seconds["search"] += candidates.runtime.now() - started
    return [found[limit] for limit in limits]


def report(candidates, cost, scores, found, uniform):
    """What a picture needs, as JSON values: variants with scores, errors and costs; searched and uniform choices.

    "validation" is measured on all validation examples, the rest on those that the scores are from.
    """
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
    same = [
        {
            "configuration": n,
            "fraction": cost.of(choice) / cost.original,
            "predicted": candidates.predicted(choice, scores),
            **candidates.real(choice),
            "validation": candidates.validate(choice),
        }
        for n, choice in uniform.items()
    ]
    searched = [figures | {"choice": choice, "validation": candidates.validate(choice)} for choice, figures in found]
    return {
        "measure": cost.measure,
        "objective": candidates.objective,
        "original": cost.original,
        "rest": cost.rest,
        "dense": candidates.dense() | {"validation": candidates.validate(dict.fromkeys(candidates.blocks, DENSE))},
        "blocks": {name: each[DENSE] for name, each in cost.blocks.items()},
        "variants": variants,
        "uniform": same,
        "searched": searched,
        "models": [
            {
                "choice": dict(zip(candidates.blocks, key)),
                **values,
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
