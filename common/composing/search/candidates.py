"""The variants of a library that a model can be composed of: their scores, and the models measured."""

from common.blocks.find import Block, find_blocks
from common.blocks.tensors import aliasing_copy, block_tensors, set_block, set_shared
from common.composing.configurations import Configurations
from common.composing.library import Library
from common.composing.scheme import DENSE, Pair, Scheme, make_scheme
from common.composing.search.costs import Costs, count
from common.composing.search.timing import latency
from common.data.examples import Examples
from common.evaluation import scoring
from common.evaluation.scoring import score_block
from common.models.load import LoadedModel
from common.runtime.devices import Runtime
from common.runtime.records import digest

FEWER = 4  # rounds of exchanges score variants on so many times fewer examples; what they find is tried on all
SCORED_ON, HELD_BACK, VALIDATION = "scored on", "held back", "validation"  # samples of the examples


def read_masks(scheme: Scheme, blocks: dict[str, Block], library: Library) -> dict:
    """The masks of a scheme's variants: {block: {variant: {Linear: bool (out, in)}}}."""
    return {
        name: {variant: library.read(blocks[name], variant).keeps for variant in variants}
        for name, variants in scheme.blocks.items()
    }


def costs_of(measure: str, loaded: LoadedModel, masks: dict, library: Library, runtime: Runtime, plain=False) -> Costs:
    """See `costs.count` and `timing.latency`."""
    if measure == "latency":
        return latency(loaded, masks, library, runtime, plain=plain)
    return count(measure, loaded, masks)


def sizes(
    loaded: LoadedModel, configurations: Configurations, library: Library, measure: str, runtime: Runtime
) -> list[float]:
    """What the blocks of each configuration's model cost (see `costs_of`), as a fraction of the original's."""
    scheme, blocks = make_scheme(configurations), find_blocks(loaded.model)
    cost = costs_of(measure, loaded, read_masks(scheme, blocks, library), library, runtime)
    return [cost.of(dict.fromkeys(blocks, DENSE) | choice) / cost.original for choice in scheme.configs]


class Candidates:
    """The variants that a model can be composed of. A choice is a {block: variant, or "dense"} of all its blocks."""

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
            configurations: those whose variants are the candidates; the library has all of these, or a UserError.
            number: how many validation examples are scored on. As many others are held back to check what is found.
            objective: "loss" or "kl", see `score_block`.
        """
        self.loaded, self.library, self.objective, self.runtime = loaded, library, objective, runtime
        self.examples, others = validation.sample_and_rest(number)
        self.held_back = others.sample(number)
        self.samples = {SCORED_ON: self.examples, HELD_BACK: self.held_back or self.examples, VALIDATION: validation}
        self.measured_on = {sample: {} for sample in self.samples}  # {sample: {choice's key: {"loss", "kl"}}}
        if not self.held_back:
            self.measured_on[HELD_BACK] = self.measured_on[SCORED_ON]
        self.scheme, self.blocks = make_scheme(configurations), find_blocks(loaded.model)
        scored_on = [loaded.identity["fingerprint"], library.shared_key(), self.examples.fingerprint()]
        scored_on += [runtime.precision, scoring.VERSION]
        self.keys = {pair: digest([library.entry(pair)["key"], *scored_on]) for pair in self.scheme.variants()}
        self.dense_choice = dict.fromkeys(self.blocks, DENSE)
        self.composed, self.inside = aliasing_copy(loaded.model), dict(self.dense_choice)
        set_shared(self.composed, library.read_shared() or {})
        self.has_shared = library.shared_key() is not None
        self.scored, self.seconds = 0, {"one pass": None, "scores": 0.0, "search": 0.0}

    def configurations(self) -> list[dict[str, str]]:
        """The choice of every configuration, in their order."""
        return [self.dense_choice | choice for choice in self.scheme.configs]

    # A variant is read again wherever it is needed: those of a whole grid may be more than memory holds.

    def tensors(self, name, variant):
        """A block's tensors, on the device."""
        if variant == DENSE:
            return block_tensors(self.loaded.model, self.blocks[name])
        tensors = self.library.read(self.blocks[name], variant).tensors
        return {parameter: tensor.to(self.runtime.device) for parameter, tensor in tensors.items()}

    def model_of(self, choice):
        """The model of a choice, the same object each time; or the original itself, which saves passes."""
        if choice == self.dense_choice and not self.has_shared:
            return self.loaded.model
        for name, variant in choice.items():
            if self.inside[name] != variant:
                set_block(self.composed, self.blocks[name], self.tensors(name, variant))
                self.inside[name] = variant
        return self.composed

    def measured(self, choice, sample=SCORED_ON):
        """{"loss", "kl"} of the model of a choice, on a sample of the examples."""
        known, key = self.measured_on[sample], tuple(choice[name] for name in self.blocks)
        if key not in known:
            started = self.runtime.now()
            known[key] = self._score(self.model_of(choice), self.samples[sample])[None]
            if self.seconds["one pass"] is None:
                self.seconds["one pass"] = self.runtime.now() - started
        return known[key]

    def _score(self, model, examples, name=None, variants=()):
        """See `score_block`."""
        tensors = {variant: self.tensors(name, variant) for variant in variants}
        return score_block(model, self.loaded.model, self.blocks, name, tensors, examples, self.runtime)

    def counts(self):
        """How many examples models are scored on, and how many are held back."""
        return {"scored_on": len(self.examples), "held_back": len(self.held_back)}

    def dense(self):
        """{"loss", "kl"} of the original."""
        return self._score(self.loaded.model, self.examples)[None] if self.has_shared else self.base()

    def base(self):
        """{"loss", "kl"} of the model that variants are scored in: the original with shared parameters."""
        return self.measured(self.dense_choice)

    def scores(self) -> dict[str, dict[str, dict]]:
        """What each variant alone does to the model: {block: {variant: {"loss", "kl"}}}. The library keeps it."""
        self.base()
        started, scores, unscored = self.runtime.now(), {}, {}
        for name, variants in self.scheme.blocks.items():
            known = scores[name] = {
                variant: self.library.entry(Pair(name, variant)).get("score") for variant in variants
            }
            new = [
                variant for variant in variants if (known[variant] or {}).get("key") != self.keys[Pair(name, variant)]
            ]
            unscored |= {name: new} if new else {}
        for name in self.runtime.talk.progress(list(unscored), "scoring"):
            measured = self._score(self.model_of(self.dense_choice), self.examples, name, unscored[name])
            new = {variant: {"key": self.keys[Pair(name, variant)], **measured[variant]} for variant in unscored[name]}
            if self.runtime.processes.is_first:
                self.library.annotate(name, new)
            scores[name] |= new
            self.scored += len(new)
        self.seconds["scores"] += self.runtime.now() - started
        return scores

    def rises(self, scores) -> dict[str, dict[str, float]]:
        """By how much each variant alone raises the objective, with `scores` as above: {block: {variant: number}}."""
        base = self.base()[self.objective]
        return {
            name: {DENSE: 0.0}
            | {variant: score[self.objective] - base for variant, score in scores.get(name, {}).items()}
            for name in self.blocks
        }

    def predicted(self, choice, rises):
        """The objective of a choice, as the variants' sum has it."""
        return self.base()[self.objective] + sum(rises[name][variant] for name, variant in choice.items())

    def conditional(self, choice, variants):
        """The objective of the composed model with one block replaced, on a part of the examples: {block: {variant:
        number}}, of `variants` {block: [variant]} and of the choice's."""
        examples, objectives = self.examples.sample(max(len(self.examples) // FEWER, 1)), {}
        for name in self.runtime.talk.progress(list(self.blocks), "scoring"):
            others = [variant for variant in variants[name] if variant != choice[name]]
            scores = self._score(self.model_of(choice), examples, name, others)
            scores = {choice[name]: scores.pop(None), **scores}
            objectives[name] = {variant: score[self.objective] for variant, score in scores.items()}
        return objectives
