"""The variants of a library that a model can be composed of: their scores, and the models measured."""

from common.blocks.find import Block, find_blocks
from common.blocks.tensors import alias_block, alias_shared, aliasing_copy, block_tensors
from common.composing.configurations import Configurations
from common.composing.library import Library
from common.composing.scheme import DENSE, Pair, Scheme, make_scheme, nth_choice
from common.data.examples import Examples
from common.evaluation import scoring
from common.evaluation.scoring import score_block
from common.models.load import LoadedModel
from common.runtime.devices import Runtime
from common.runtime.records import digest

FEWER = 4  # rounds of exchanges score variants on so many times fewer examples; what they find is tried on all


def read_keeps(scheme: Scheme, blocks: dict[str, Block], library: Library) -> dict:
    """The masks of a scheme's variants: {block: {variant: {Linear: bool mask}}}."""
    return {
        name: {variant: library.read(blocks[name], variant).keeps for variant in variants}
        for name, variants in scheme.blocks.items()
    }


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
            number: how many of them variants and models are scored on. As many others are held back to check what
                is found, or fewer where there are no more.
            objective: "loss" or "kl", see `score_block`.
        Raises:
            UserError: the library lacks one of them.
        """
        self.loaded, self.library, self.objective = loaded, library, objective
        self.validation, (self.examples, shared) = validation, validation.sample_and_rest(number)
        self.held_back = shared.sample(number)
        self.scheme = make_scheme(configurations)
        self.blocks = find_blocks(loaded.model)
        self.runtime = runtime
        scored_on = [loaded.identity["fingerprint"], library.shared_key(), self.examples.fingerprint()]
        scored_on += [runtime.precision, scoring.VERSION]
        self.keys = {pair: digest([library.entry(pair)["key"], *scored_on]) for pair in self.scheme.variants()}
        self.composed, self.inside = aliasing_copy(loaded.model), dict.fromkeys(self.blocks, DENSE)
        shared = library.read_shared()
        alias_shared(self.composed, shared or {})
        self.has_shared = shared is not None
        self.known = {}  # {choice: {"loss", "kl"}}, on the scoring examples
        self.known_held_back = {} if self.held_back else self.known
        self.scored, self.seconds = 0, {"one pass": None, "scores": 0.0, "search": 0.0}

    def configuration(self, nth, path):
        """The n-th of the configurations, read from `path`, as a {block: variant} of all the model's blocks.

        Raises:
            UserError: there is none.
        """
        return dict.fromkeys(self.blocks, DENSE) | nth_choice(self.scheme, nth, path)

    def configurations(self):
        """Every configuration as such a {block: variant}, in their order."""
        return [dict.fromkeys(self.blocks, DENSE) | choice for choice in self.scheme.configs]

    # A variant is read again wherever it is needed: those of a whole grid may be more than memory holds.

    def tensors(self, name, variant):
        """A block's tensors, on the device."""
        if variant == DENSE:
            return block_tensors(self.loaded.model, self.blocks[name])
        tensors = self.library.read(self.blocks[name], variant).tensors
        return {parameter: tensor.to(self.runtime.device) for parameter, tensor in tensors.items()}

    def keeps(self):
        """{block: {variant: {Linear: bool mask}}}, of the variants that remove something."""
        return read_keeps(self.scheme, self.blocks, self.library)

    def compose(self, choice):
        """The model of a {block: variant}; the same object each time."""
        for name, variant in choice.items():
            if self.inside[name] != variant:
                alias_block(self.composed, self.blocks[name], self.tensors(name, variant))
                self.inside[name] = variant
        return self.composed

    def real(self, choice):
        """{"loss", "kl"} of the composed model, measured on the scoring examples."""
        key = self.key(choice)
        if key not in self.known:
            started = self.runtime.now()
            self.known[key] = self._measure(self.model_of(choice), self.examples)
            if self.seconds["one pass"] is None:
                self.seconds["one pass"] = self.runtime.now() - started
        return self.known[key]

    def real_held_back(self, choice):
        """The same on the held-back examples, or on the scoring ones where none are left to hold back."""
        key = self.key(choice)
        if key not in self.known_held_back:
            self.known_held_back[key] = self._measure(self.model_of(choice), self.held_back or self.examples)
        return self.known_held_back[key]

    def validate(self, choice):
        """{"loss", "kl"} of the composed model on all validation examples."""
        return self._measure(self.model_of(choice), self.validation)

    def key(self, choice):
        """A choice as a key of `known` and `known_held_back`."""
        return tuple(choice[name] for name in self.blocks)

    def _measure(self, model, examples):
        found = score_block(model, self.loaded.model, self.blocks, None, {}, examples, self.runtime)
        return found[None]

    def counts(self):
        """How many examples models are scored on, and how many are held back."""
        return {"scored_on": len(self.examples), "held_back": len(self.held_back)}

    def model_of(self, choice):
        """The model of a choice: the original itself if that is what it comes to, which saves the teacher's passes."""
        is_original = set(choice.values()) == {DENSE} and not self.has_shared
        return self.loaded.model if is_original else self.compose(choice)

    def dense(self):
        """{"loss", "kl"} of the original."""
        return self._measure(self.loaded.model, self.examples) if self.has_shared else self.base()

    def base(self):
        """{"loss", "kl"} of the model that variants are scored in: its blocks are the original's, its rest the
        library's."""
        return self.real(dict.fromkeys(self.blocks, DENSE))

    def scores(self, shard=(0, 1)):
        """By how much each variant alone raises the objective: {block: {variant: number}}.

        Args:
            shard: (I, N), for the I-th of N shares of the blocks alone.
        What a library's record knows already, of the same variant and examples, is taken from there; what is found
        out is written there, block by block.
        """
        base = self.base()
        started = self.runtime.now()
        found = {name: {DENSE: 0.0} for name in self.blocks}
        for name, variants in list(self.scheme.blocks.items())[shard[0] :: shard[1]]:
            todo = [
                variant
                for variant in variants
                if (self.library.entry(Pair(name, variant)).get("score") or {}).get("key")
                != self.keys[Pair(name, variant)]
            ]
            if todo:
                tensors = {variant: self.tensors(name, variant) for variant in todo}
                scores = score_block(
                    self.model_of(dict.fromkeys(self.blocks, DENSE)),
                    self.loaded.model,
                    self.blocks,
                    name,
                    tensors,
                    self.examples,
                    self.runtime,
                )
                self.library.annotate(
                    name,
                    {variant: {"key": self.keys[Pair(name, variant)], **scores[variant]} for variant in todo},
                    writes=self.runtime.processes.is_first,
                )
                self.scored += len(todo)
            for variant in variants:
                found[name][variant] = (
                    self.library.entry(Pair(name, variant))["score"][self.objective] - base[self.objective]
                )
        self.seconds["scores"] += self.runtime.now() - started
        return found

    def predicted(self, choice, scores):
        """The objective of a choice, as the scores' sum has it."""
        return self.base()[self.objective] + sum(scores[name][variant] for name, variant in choice.items())

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
