"""Blocks: finding them in a model, getting and setting their tensors, watching and replaying a call of them.

Which modules are blocks is in `families`. A block's Linears may lie anywhere in its root module, which may hold other
things too; its output is what its last Linear returns, before any residual sum or norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.blocks.families import family_of


@dataclass(frozen=True)
class Block:
    """One attention or feed-forward sublayer."""

    name: str  # in configurations, schemes and libraries
    root: str  # dotted path of the module that holds the Linears
    kind: str  # "attention" or "feed_forward"
    roles: tuple[str, ...]  # dotted paths within the root, of the Linears whose rows are the heads' or neurons'
    output: str  # and of the output Linear, whose columns are theirs
    heads: int  # 0 for a feed-forward block
    neurons: int  # 0 for an attention block
    side: str  # whose tokens flow through it: "encoder" or "decoder"
    has_bias: bool
    between: Callable | None = None  # of a feed-forward block, see `families.FeedForward`
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # of its tensors, by name; empty where they are not known

    @property
    def inner(self) -> tuple[str, ...]:
        """The Linears of its roles, each once."""
        return tuple(dict.fromkeys(self.roles))

    @property
    def linears(self) -> tuple[str, ...]:
        """All of its Linears."""
        return *self.inner, self.output

    @property
    def queries(self) -> str:
        """The Linear of an attention block's queries; so `keys` and `values`."""
        return self.roles[0]

    @property
    def keys(self) -> str:
        return self.roles[1]

    @property
    def values(self) -> str:
        return self.roles[2]

    @property
    def folds(self) -> int:
        """How many roles' rows each inner Linear has, one role after the other."""
        return len(self.roles) // len(self.inner)

    def by_role(self, tensors: dict[str, torch.Tensor], ending: str = "") -> list[torch.Tensor]:
        """Views of each role's rows, (heads * width or neurons, …), of {Linear + ending: tensor}."""
        return [rows for linear in self.inner for rows in tensors[f"{linear}{ending}"].chunk(self.folds)]


def find_blocks(model: torch.nn.Module) -> dict[str, Block]:
    """All blocks of a model by name, in the order of their output Linears among its modules.

    What a compact model has left out, with no head or neuron, is no block: there is nothing to prune or to tune in it.
    """
    family = family_of(model.config)
    position = {name: number for number, (name, _) in enumerate(model.named_modules())}
    found = []
    for root, module in model.named_modules():
        layout = next((family.layouts[c.__name__] for c in type(module).__mro__ if c.__name__ in family.layouts), None)
        if layout is None:
            continue
        is_attention, size = layout.kind == "attention", module.get_submodule(layout.output).in_features
        found.append(
            Block(
                name=f"{root}.{layout.name}" if layout.name else root,
                root=root,
                kind=layout.kind,
                roles=layout.roles,
                output=layout.output,
                heads=size // _attribute(module, layout.width) if is_attention else 0,
                neurons=0 if is_attention else size,
                side="decoder" if family.decoder and f"{root}.".startswith(f"{family.decoder}.") else "encoder",
                has_bias=module.get_submodule(layout.roles[0]).bias is not None,
                between=None if is_attention else layout.between,
                shapes=tuple(
                    (f"{linear}.{name}", tuple(parameter.shape))
                    for linear in dict.fromkeys((*layout.roles, layout.output))
                    for name, parameter in module.get_submodule(linear).named_parameters()
                ),
            )
        )
    found.sort(key=lambda block: position[f"{block.root}.{block.output}"])
    return {block.name: block for block in found if block.heads or block.neurons}


def _attribute(module, path):
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def prunable_modules(model: torch.nn.Module, neurons: bool = False) -> dict[str, dict]:
    """What a configuration can give a rate to, in the form of `conf.json`'s "modules".

    `neurons`: list the feed-forward modules too, whose neurons can be removed.
    """
    modules = {}
    for block in find_blocks(model).values():
        if block.kind == "attention":
            modules[block.name] = {"kind": "attention", "heads": block.heads}
        elif neurons:
            modules[block.name] = {"kind": "feed_forward", "neurons": block.neurons}
        for linear in (block.output,) if block.kind == "attention" else block.linears:
            weights = model.get_submodule(f"{block.root}.{linear}").weight.numel()
            modules[f"{block.root}.{linear}"] = {
                "kind": "linear",
                "weights": weights,
                "block": block.name,
                "linear": linear,
            }
    return modules
