"""Joint fine-tuning: all variants of all blocks at once, within models that are composed of them at random.

Each step draws one variant for every block, composes that model, and takes one ordinary step on the task's loss. The
variants of a block begin at their own closed-form solutions and share one update:

    variant v = mask_v · (solution_v + update of the block)

so that each learns from all draws of its block, and the optimizer's state is that of one model. At a multiple of the
rate the shared parameters (embeddings, norms, position biases, head) are trained with them. A step costs what a step of
a whole model costs, and every composition comes out good, also one that was never drawn.

One path at a time is from single-path one-shot (Guo et al., arXiv 1904.00420), sub-networks that share their weights
from once-for-all (arXiv 1908.09791), DynaBERT (arXiv 2004.04037) and MatFormer (arXiv 2310.07707). There the weights
themselves are shared; here it is what they learn, since each variant's closed form differs.
"""

import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant, aliasing_copy, block_tensors, parameter_masks, set_shared, shared_parameters
from common.composing.scheme import DENSE, Pair
from common.runtime.settings import TrainingSettings
from common.training.block_level.sampling import Sampling
from common.training.learner import Learner
from common.training.losses import ModelObjective


class Supernet:
    """The original, in which every block can be any of its variants, and what of it is trained.

    It is called as the model is, with the variants of the last `compose`. Nothing of the original is copied but the
    shared parameters, if they are trained.
    """

    def __init__(
        self,
        original: torch.nn.Module,
        blocks: dict[str, Block],
        new: dict[Pair, Variant],
        old: dict[Pair, Variant],
        shared: dict[str, torch.Tensor] | None = None,
        updates: dict[str, dict[str, torch.Tensor]] | None = None,
    ):
        """
        Args:
            new: the variants to train, as they begin.
            old: those that they are trained among, and which stay as they are.
            shared: {parameter: tensor}, those that the old variants were trained with; they then stay, too.
            updates: {block: {"q.weight": tensor}}, what the old variants were updated by: new ones begin with it.
        """
        self.model, self.blocks = aliasing_copy(original), blocks
        self.config, device = self.model.config, self.model.device
        self.new, self.old = ({pair: variant.to(device) for pair, variant in each.items()} for each in (new, old))
        self.masks = {pair: parameter_masks(variant.block, variant.keeps) for pair, variant in self.new.items()}
        self.updates = {}
        for name in dict.fromkeys(pair.block for pair in new):
            own, given = block_tensors(self.model, blocks[name]), (updates or {}).get(name, {})
            self.updates[name] = {
                path: given[path].to(device) if path in given else torch.zeros_like(tensor)
                for path, tensor in own.items()
            }
        self.shared = {name: self.model.get_parameter(name) for name in shared_parameters(original, blocks)}
        set_shared(self.model, shared or {})
        self.inside = {}

    def pairs(self) -> list[Pair]:
        """All variants: those that are trained, and the old ones."""
        return [*self.old, *self.new]

    def make_learner(self, recipe: TrainingSettings, total_steps: int, shared_factor: float) -> Learner:
        """The learner of the updates and, at a multiple of the rate, of the shared parameters; 0 leaves them."""
        parameters = {
            f"{name}/{path}": update.requires_grad_()
            for name, updates in self.updates.items()
            for path, update in updates.items()
        }
        shares = {}
        if shared_factor:
            set_shared(self.model, {name: tensor.clone() for name, tensor in self.shared.items()})
            shares = dict.fromkeys(self.shared, shared_factor)
            parameters |= {name: tensor.requires_grad_() for name, tensor in self.shared.items()}
        return Learner(parameters, {}, recipe, total_steps, shares)

    def start_from(self, solutions: dict[Pair, dict[str, torch.Tensor]]) -> None:
        """Give new variants other tensors to begin with."""
        for pair, tensors in solutions.items():
            self.new[pair] = self.new[pair]._replace(tensors=tensors).to(self.model.device)

    def tensors(self, pair: Pair) -> dict[str, torch.Tensor]:
        """A variant's tensors as they are now, by name within the block."""
        if pair in self.old:
            return self.old[pair].tensors
        solution, masks, updates = self.new[pair].tensors, self.masks[pair], self.updates[pair.block]
        updated = {name: tensor + updates[name] for name, tensor in solution.items()}
        return {name: torch.where(masks[name], t, 0.0) if name in masks else t for name, t in updated.items()}

    @torch.no_grad()
    def fold(self) -> dict[Pair, Variant]:
        """The new variants as they are now, in the memory of what they began with: nothing can be computed after."""
        for pair, variant in self.new.items():
            for name, tensor in self.tensors(pair).items():
                variant.tensors[name].copy_(tensor)
        return self.new

    def compose(self, choice: dict[str, str]) -> None:
        """Choose the variants that calls are to compute with, {block: variant}; `DENSE` is the original's own."""
        self.inside = {name: variant for name, variant in choice.items() if variant != DENSE}

    def __call__(self, **inputs):
        """What the composed model gives for a batch."""
        tensors = {
            f"{self.blocks[name].root}.{path}": tensor
            for name, variant in self.inside.items()
            for path, tensor in self.tensors(Pair(name, variant)).items()
        }
        return torch.func.functional_call(self.model, tensors, kwargs=inputs, tie_weights=False)

    def train(self, mode: bool) -> None:
        """As a model's."""
        self.model.train(mode)


class JointObjective:
    """The task's loss of composed models: of a drawn one for each step, in validation of fixed ones."""

    def __init__(
        self,
        supernet: Supernet,
        recipe: TrainingSettings,
        sampling: Sampling,
        compositions: dict[str, dict[str, str]],
        teacher: torch.nn.Module | None = None,
    ):
        """
        Args:
            sampling: the rule that draws the composition of each step, one of `sampling.SAMPLING`.
            compositions: {name: {block: variant}}, those that validation measures.
        """
        self.supernet, self.sampling, self.compositions = supernet, sampling, compositions
        self.model_objective = ModelObjective(supernet, recipe, teacher)

    def losses(self, batch, learners, training):
        """The `Loss` of the only learner; in validation one for each composition, which is its part."""
        if training:
            (learner,) = learners.values()
            self.supernet.compose(self.sampling.draw(learner.steps))
            yield from self.model_objective.losses(batch, learners, training)
            return
        for name, choice in self.compositions.items():
            self.supernet.compose(choice)
            for loss in self.model_objective.losses(batch, learners, training):
                yield loss._replace(part=name)
