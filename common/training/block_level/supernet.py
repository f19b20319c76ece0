"""Joint fine-tuning: all variants of all blocks at once, within models that are composed of them at random.

Each step draws one variant for every block, composes that model, and takes one ordinary step on the task's loss. It
updates those variants, and at a share of the rate the shared parameters (embeddings, norms, position biases, head).
A step costs what a step of a whole model costs, and every composition comes out good, also one that was never drawn.

The idea of one path at a time is from single-path one-shot (Guo et al., arXiv 1904.00420); see also once-for-all (arXiv
1908.09791) and DynaBERT (arXiv 2004.04037). There the sub-networks share their weights. Here each variant has its own.
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
            new: the variants to train; their tensors are trained in place.
            old: those that they are trained among, and which stay as they are.
            shared: {parameter: tensor}, those that the old variants were trained with; they then stay, too.
        """
        self.model, self.blocks, self.new = aliasing_copy(original), blocks, new
        self.shared = {name: self.model.get_parameter(name) for name in shared_parameters(original, blocks)}
        self.own = {name: block_tensors(self.model, block) for name, block in blocks.items()}
        self.inside = dict.fromkeys(blocks, DENSE)
        set_shared(self.model, shared or {})
        self.tensors = {
            pair: {
                name: torch.nn.Parameter(tensor, requires_grad=pair in new)
                for name, tensor in variant.to(self.model.device).tensors.items()
            }
            for pair, variant in {**old, **new}.items()
        }

    def make_learner(self, recipe: TrainingSettings, total_steps: int, shared_factor: float) -> Learner:
        """The learner of the new variants and, at a multiple of the rate, of the shared parameters; 0 leaves them."""
        parameters = {_key(pair, name): tensor for pair in self.new for name, tensor in self.tensors[pair].items()}
        masks = {
            _key(pair, name): mask
            for pair, (block, _, keeps) in self.new.items()
            for name, mask in parameter_masks(block, keeps).items()
        }
        shares = {}
        if shared_factor:
            set_shared(self.model, {name: tensor.clone() for name, tensor in self.shared.items()})
            shares = {_key("", name): shared_factor for name in self.shared}
            parameters |= {_key("", name): tensor.requires_grad_() for name, tensor in self.shared.items()}
        return Learner(parameters, masks, recipe, total_steps, shares)

    @torch.no_grad()
    def start_from(self, tensors: dict[Pair, dict[str, torch.Tensor]]) -> None:
        """Give the new variants other tensors to begin with."""
        for pair, solution in tensors.items():
            for name, tensor in solution.items():
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
        self.model_objective = ModelObjective(supernet.model, recipe, teacher)

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
