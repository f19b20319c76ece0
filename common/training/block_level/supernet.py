"""Joint fine-tuning: all variants of all blocks at once, within models that are composed of them at random.

Each step draws one variant for every block, composes that model, and takes one ordinary step on the task's loss. It
updates those variants, and at a share of the rate the rest of the model (embeddings, norms, position biases, head),
which all compositions have in common. A step costs what a step of a whole model costs, however many variants there are.
No variant is tuned against inputs that it will not see again, and every composition comes out good, also one that was
never drawn.

The idea of one path at a time is from single-path one-shot (Guo et al., arXiv 1904.00420); see also once-for-all (arXiv
1908.09791) and DynaBERT (arXiv 2004.04037). There the sub-networks share their weights. Here each variant has its own.
"""

import random
from collections.abc import Iterable

import torch

from common.blocks.find import Block
from common.blocks.tensors import (
    Variant,
    alias_shared,
    aliasing_copy,
    block_tensors,
    parameter_masks,
    shared_parameters,
)
from common.composing.scheme import DENSE, Pair, by_block
from common.training.learner import Learner, Recipe
from common.training.objectives import ModelObjective

COMPOSITIONS = 8  # how many validation measures
NEW_SHARE = 0.5  # of the draws of a block that has new variants and old ones, the new have at least so much


class Supernet:
    """The original, in which every block can be any of its variants, and what of it is trained.

    Blocks are not copied. A variant's tensors become the parameters of the block's Linears; the original's own are put
    back in the same way.
    """

    def __init__(
        self,
        original: torch.nn.Module,
        blocks: dict[str, Block],
        new: dict[Pair, Variant],
        old: dict[Pair, Variant],
        shared: dict[str, torch.Tensor] | None = None,
    ):
        """
        Args:
            blocks: all of the original's.
            new: the variants to train; their tensors are trained in place.
            old: those that they are trained among, and which stay as they are.
            shared: {parameter: tensor}, those that the old variants were trained with; they then stay, too.
        """
        self.model, self.blocks, self.new = aliasing_copy(original), blocks, new
        own = dict(self.model.named_parameters())
        self.shared = {name: own[name] for name in shared_parameters(original, blocks)}
        self.own = {name: block_tensors(self.model, block) for name, block in blocks.items()}
        self.inside = dict.fromkeys(blocks, DENSE)
        alias_shared(self.model, shared or {})
        self.tensors = {
            pair: {
                name: torch.nn.Parameter(tensor, requires_grad=pair in new)
                for name, tensor in variant.to(self.model.device).tensors.items()
            }
            for pair, variant in {**old, **new}.items()
        }

    def make_learner(self, recipe: Recipe, total_steps: int, shared_factor: float) -> Learner:
        """The learner of the new variants and, at a multiple of the rate, of the shared parameters; 0 leaves them."""
        parameters = {_key(pair, name): tensor for pair in self.new for name, tensor in self.tensors[pair].items()}
        masks = {
            _key(pair, name): mask
            for pair, (block, _, keeps) in self.new.items()
            for name, mask in parameter_masks(block, keeps).items()
        }
        shares = {}
        if shared_factor:
            alias_shared(self.model, {name: tensor.clone() for name, tensor in self.shared.items()})
            shares = {_key("", name): shared_factor for name in self.shared}
            parameters |= {_key("", name): tensor.requires_grad_() for name, tensor in self.shared.items()}
        return Learner(parameters, masks, recipe, total_steps, shares)

    @torch.no_grad()
    def start_from(self, tensors: dict[Pair, dict[str, torch.Tensor]]) -> None:
        """Give the new variants other tensors to begin with."""
        for pair, own in tensors.items():
            for name, tensor in own.items():
                self.tensors[pair][name].copy_(tensor)

    def compose(self, choice: dict[str, str]) -> None:
        """Put variants into their blocks, {block: variant}; `DENSE` is the original's own."""
        for name, variant in choice.items():
            if self.inside[name] == variant:
                continue
            root = self.model.get_submodule(self.blocks[name].root)
            for path, tensor in (self.own[name] if variant == DENSE else self.tensors[Pair(name, variant)]).items():
                linear, _, parameter = path.rpartition(".")
                setattr(root.get_submodule(linear), parameter, tensor)
            self.inside[name] = variant


def _key(pair, name):
    """The name that a learner has for a variant's parameter; for a shared one, the pair is ""."""
    return f"{pair}/{name}"


def variants_by_block(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """{block: [variant]}, in the order of the pairs."""
    return {block: [pair.variant for pair in own] for block, own in by_block(pairs).items()}


class Draws:
    """Which composition each step trains; it depends on the seed and the step's number alone.

    Where all of a block's variants are new, every one is drawn once before any is drawn again, in an order of its own
    each time (evenly, as FairNAS asks for, arXiv 1907.01845). Where some are old, the draw is free.
    """

    def __init__(self, new: Iterable[Pair], among: Iterable[Pair], seed: int):
        """
        Args:
            new: the variants to train.
            among: all that there are, these included.
        """
        new, self.seed = set(new), seed
        self.new = variants_by_block(pair for pair in among if pair in new)
        self.old = variants_by_block(pair for pair in among if pair not in new)

    def choice(self, step: int) -> dict[str, str]:
        """{block: variant}, of the blocks that have any; at least one variant is new."""
        rng = random.Random(f"{self.seed}/step {step}")
        while True:
            chosen = {name: self._draw(rng, step, name) for name in {**self.new, **self.old}}
            if any(variant in self.new.get(name, ()) for name, variant in chosen.items()):
                return chosen

    def _draw(self, rng, step, name):
        new, old = self.new.get(name, []), self.old.get(name, [])
        if new and not old:
            turn, place = divmod(step, len(new))
            return random.Random(f"{self.seed}/{name}/{turn}").sample(new, len(new))[place]
        share = max(NEW_SHARE, len(new) / len(new + old)) if new else 0.0
        return rng.choice(new if rng.random() < share else old)


class JointObjective:
    """The task's loss of composed models: of a drawn one for each step, in validation of some fixed ones."""

    divides = True  # see `objectives.ModelObjective`

    def __init__(
        self,
        supernet: Supernet,
        recipe: Recipe,
        compositions: dict[str, dict[str, str]],
        teacher: torch.nn.Module | None = None,
    ):
        """
        Args:
            compositions: {name: {block: variant}}, those that validation measures.
            teacher: see `objectives.ModelObjective`.
        """
        self.supernet, self.compositions = supernet, compositions
        self.draws = Draws(supernet.new, supernet.tensors, recipe.seed)
        self.whole = ModelObjective(supernet.model, recipe, teacher)

    def begin(self, batch, learners):
        """Nothing is shared: the batch as it is."""
        return batch

    def losses(self, batch, learners, training):
        """The `Loss` of the only learner; in validation one for each composition, which is its part."""
        if training:
            (learner,) = learners.values()
            self.supernet.compose(self.draws.choice(learner.steps))
            yield from self.whole.losses(batch, learners, training)
            return
        for name, choice in self.compositions.items():
            self.supernet.compose(choice)
            for loss in self.whole.losses(batch, learners, training):
                yield loss._replace(part=name)


def sample_compositions(
    configurations: Iterable[dict[str, str]], new: Iterable[Pair], among: Iterable[Pair], seed: int
) -> dict[str, dict[str, str]]:
    """The compositions that quality is measured on: the configurations, and where these are few, random ones.

    All have a new variant, or they would tell nothing of the training. The random ones have new variants wherever there
    are any.

    Args:
        configurations: {block: variant} each; those with a variant that is not there are passed over.
        new, among: see `Draws`.
    Returns:
        {name: {block: variant}}, "configuration N" and "drawn N", COMPOSITIONS of them or as many as differ.
    """
    new, there = set(new), set(among)
    found = {}
    for n, choice in enumerate(configurations):
        pairs = {Pair(*item) for item in choice.items() if item[1] != DENSE}
        if pairs <= there and pairs & new and len(found) < COMPOSITIONS:
            found[f"configuration {n}"] = choice
    candidates = variants_by_block(among) | variants_by_block(pair for pair in among if pair in new)
    rng, drawn = random.Random(f"{seed}/compositions"), 0
    for _ in range(4 * COMPOSITIONS):
        choice = {name: rng.choice(variants) for name, variants in candidates.items()}
        if len(found) < COMPOSITIONS and choice not in found.values():
            found[f"drawn {drawn}"] = choice
            drawn += 1
    return found
