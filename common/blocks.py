"""Blocks: finding them in a model, getting and setting their tensors, watching and replaying a call of them.

Which modules are blocks is in `families`. A block's Linears may lie anywhere in its root module, which may hold other
things too; its output is what its last Linear returns, before any residual sum or norm.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.func import functional_call
from torch.nn.functional import linear as apply_linear

from common.data import Batch
from common.errors import UserError
from common.families import family_of
from common.tasks import IGNORED


@dataclass(frozen=True)
class Block:
    """One attention or feed-forward sublayer."""

    name: str  # in configurations, schemes and libraries
    root: str  # dotted path of the module that holds the Linears
    kind: str  # "attention" or "feed_forward"
    inner: tuple[str, ...]  # dotted paths within the root, of the Linears whose rows are the heads' or neurons'
    output: str  # and of the output Linear, whose columns are theirs
    heads: int  # 0 for a feed-forward block
    neurons: int  # 0 for an attention block
    side: str  # whose tokens flow through it: "encoder" or "decoder"
    has_bias: bool
    between: Callable | None = None  # of a feed-forward block, see `families.FeedForward`
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()  # of its tensors, by name; empty where they are not known

    @property
    def linears(self) -> tuple[str, ...]:
        """All of its Linears."""
        return *self.inner, self.output

    @property
    def queries(self) -> str:
        """The Linear of an attention block's queries; so `keys` and `values`."""
        return self.inner[0]

    @property
    def keys(self) -> str:
        return self.inner[1]

    @property
    def values(self) -> str:
        return self.inner[2]


class Variant(NamedTuple):
    """A block pruned in one way. `tensors`: {"q.weight": tensor}; `keeps`: {"q": bool (out, in)}, True = kept."""

    block: Block
    tensors: dict[str, torch.Tensor]
    keeps: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> "Variant":
        """The same on a device."""
        tensors, keeps = ({name: t.to(device) for name, t in each.items()} for each in self[1:])
        return Variant(self.block, tensors, keeps)


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
        is_attention = layout.kind == "attention"
        found.append(
            Block(
                name=f"{root}.{layout.name}" if layout.name else root,
                root=root,
                kind=layout.kind,
                inner=layout.inner,
                output=layout.output,
                heads=_attribute(module, layout.heads) if is_attention else 0,
                neurons=0 if is_attention else module.get_submodule(layout.output).in_features,
                side="decoder" if family.decoder and f"{root}.".startswith(f"{family.decoder}.") else "encoder",
                has_bias=module.get_submodule(layout.inner[0]).bias is not None,
                between=None if is_attention else layout.between,
                shapes=tuple(
                    (f"{linear}.{name}", tuple(parameter.shape))
                    for linear in (*layout.inner, layout.output)
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


def block_tensors(model: torch.nn.Module, block: Block) -> dict[str, torch.Tensor]:
    """The parameters of a block's Linears by name within the block ("q.weight"), not copied."""
    root = model.get_submodule(block.root)
    return {
        f"{linear}.{name}": parameter
        for linear in block.linears
        for name, parameter in root.get_submodule(linear).named_parameters()
    }


def sharing_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that shares the memory of its parameters, and does not train them.

    Give it others by `share_block` and `share_rest`, which leave the model's own alone; what copies into its parameters
    changes the model.
    """
    shared = {id(each): torch.nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def share_block(model: torch.nn.Module, block: Block, tensors: dict[str, torch.Tensor]) -> None:
    """Let a block of a `sharing_copy` have the memory of tensors, or of copies on its device.

    Raises:
        UserError: see `set_block`.
    """
    own = _own_like(model, block, tensors)
    for name, tensor in tensors.items():
        own[name].data = tensor.detach().to(own[name].device)


@torch.no_grad()
def set_block(model: torch.nn.Module, block: Block, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors in the place of a block's own.

    Raises:
        UserError: the names or shapes are not the block's.
    """
    own = _own_like(model, block, tensors)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _own_like(model, block, tensors):
    """A block's own tensors, once those given are sure to be like them."""
    own = block_tensors(model, block)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != shapes:
        raise UserError(f"block {block.name}: holds tensors {given} where the model has {shapes}")
    return own


def rest_of(model: torch.nn.Module, blocks: dict[str, Block]) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of a model that lie in none of its blocks, by name, not copied; tied ones once."""
    inside = {id(tensor) for block in blocks.values() for tensor in block_tensors(model, block).values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


@torch.no_grad()
def set_rest(model: torch.nn.Module, rest: dict[str, torch.Tensor]) -> None:
    """Put tensors in the place of a model's parameters outside of its blocks.

    Raises:
        UserError: the names or shapes are not the model's.
    """
    for parameter, tensor in _rest_pairs(model, rest):
        parameter.copy_(tensor)


@torch.no_grad()
def share_rest(model: torch.nn.Module, rest: dict[str, torch.Tensor]) -> None:
    """Let a `sharing_copy` have the memory of tensors, or of copies on its device, outside of its blocks.

    Raises:
        UserError: see `set_rest`.
    """
    for parameter, tensor in _rest_pairs(model, rest):
        parameter.data = tensor.detach().to(parameter.device)


def _rest_pairs(model, rest):
    """[(parameter, the tensor that it gets)]"""
    own = dict(model.named_parameters())
    for name, tensor in rest.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(f"the rest of the model: holds {name} {tuple(tensor.shape)}, which is not the model's")
    return [(own[name], tensor) for name, tensor in rest.items()]


def token_mask(block: Block, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of a block's output are real: bool (batch, length). Padding belongs in no loss or statistic."""
    return batch["labels"] != IGNORED if block.side == "decoder" else batch["attention_mask"].bool()


def real_rows(block: Block, batch: Batch, some: torch.Tensor | None = None) -> torch.Tensor:
    """The same as numbers for `data.rows_of`, int64 (tokens,) on the batch's device.

    Args:
        some: positions, on the CPU; of these alone, counted as they stand there.
    """
    mask = token_mask(block, batch.host)
    return batch.numbers(mask if some is None else mask[:, some])


def features(
    model: torch.nn.Module, block: Block, tensors: dict[str, torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """What enters a feed-forward block's output Linear, (…, neurons), for rows (…, d_model) and the block's tensors."""
    outputs = [_apply(tensors, linear, rows) for linear in block.inner]
    return block.between(model.get_submodule(block.root), *outputs)


def _apply(tensors, linear, rows):
    return apply_linear(rows, tensors[f"{linear}.weight"], tensors.get(f"{linear}.bias"))


# --- calls -----------------------------------------------------------------------------------------------------


@dataclass
class BlockCall:
    """One call of a model's block: what went in, what came out, and the means to run it with other tensors.

    `args`, `kwargs`: of an attention block's root module: hidden states, mask, position bias, cross-attention states.
    T5 needs all of them: without its position bias a block silently computes something else.
    `inputs`: {Linear: what entered it, (batch, length, in)}, of an attention block; of a feed-forward block its first
    Linear's alone. `output`: (batch, length, d_model). `probabilities`: of an attention block, (batch, heads, length,
    keys), or None where the attention implementation does not return them.
    """

    model: torch.nn.Module
    block: Block
    inputs: dict[str, torch.Tensor]
    args: tuple = ()
    kwargs: dict | None = None
    output: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None

    def replay(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The block's output (batch, length, d_model) on the very same inputs, with `tensors` for its own."""
        if self.block.kind == "feed_forward":
            rows = features(self.model, self.block, tensors, self.inputs[self.block.inner[0]])
            return _apply(tensors, self.block.output, rows)
        root, found = self.model.get_submodule(self.block.root), []
        output = root.get_submodule(self.block.output)
        handle = output.register_forward_hook(lambda module, args, output: found.append(output))
        try:
            functional_call(root, tensors, self.args, self.kwargs)
        finally:
            handle.remove()
        return found[0]


def watch(
    model: torch.nn.Module, blocks: Iterable[Block], batch: dict[str, torch.Tensor], visit: Callable[[BlockCall], None]
) -> None:
    """Run all blocks of a model on a batch; `visit(call)` is called as soon as one of `blocks` has run."""
    handles = [handle for block in blocks for handle in _hooks(model, block, visit)]
    try:
        family_of(model.config).run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model, block, visit):
    """Hooks that note a block's calls: begun at its root or its first Linear, ended when all of it is known."""
    root, first, out = model.get_submodule(block.root), block.inner[0], block.output
    call = None

    def begin(module, args, kwargs):
        nonlocal call
        call = BlockCall(model, block, {}, args, kwargs)

    def note_input(linear):
        def hook(module, args):
            call.inputs.setdefault(linear, args[0])  # the first; DeBERTa's go on to project positions

        return hook

    def note_output(module, args, output):
        call.output = output
        if block.kind == "feed_forward":
            visit(call)

    def end(module, args, output):
        call.probabilities = output[-1]
        visit(call)

    if block.kind == "feed_forward":
        inner = root.get_submodule(first)
        yield inner.register_forward_pre_hook(begin, with_kwargs=True)
        yield inner.register_forward_pre_hook(note_input(first))
        yield root.get_submodule(out).register_forward_hook(note_output)
    else:
        yield root.register_forward_pre_hook(begin, with_kwargs=True)
        for linear in block.linears:
            yield root.get_submodule(linear).register_forward_pre_hook(note_input(linear))
        yield root.get_submodule(out).register_forward_hook(note_output)
        yield root.register_forward_hook(end)


def block_calls(model: torch.nn.Module, blocks: Iterable[Block], batch: dict[str, torch.Tensor]) -> list[BlockCall]:
    """One run of a model on a batch: the calls of some of its blocks, in the order of execution.

    What all of them read and wrote is held at once: of an attention block three tensors (batch, length, d_model), or
    of the inner width, and of a feed-forward block two. That is less than a training step of the model holds.
    """
    calls = []
    watch(model, blocks, batch, calls.append)
    return calls
