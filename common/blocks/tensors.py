"""The tensors of a model's blocks, and of what lies outside of them: getting, setting and sharing them."""

import copy
from typing import NamedTuple

import torch

from common.blocks.find import Block, find_blocks
from common.runtime.errors import UserError


class Variant(NamedTuple):
    """A block pruned in one way. `tensors`: {"q.weight": tensor}; `keeps`: {"q": bool (out, in)}, True = kept."""

    block: Block
    tensors: dict[str, torch.Tensor]
    keeps: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> "Variant":
        """The same on a device."""
        tensors, keeps = ({name: t.to(device) for name, t in each.items()} for each in self[1:])
        return Variant(self.block, tensors, keeps)


def block_tensors(model: torch.nn.Module, block: Block) -> dict[str, torch.Tensor]:
    """The parameters of a block's Linears by name within the block ("q.weight"), not copied."""
    root = model.get_submodule(block.root)
    return {
        f"{linear}.{name}": parameter
        for linear in block.linears
        for name, parameter in root.get_submodule(linear).named_parameters()
    }


def aliasing_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model that shares the memory of its parameters, and does not train them.

    Give it others by `set_block` and `set_shared`, which leave the model's own alone; what copies into its
    parameters changes the model.
    """
    shared = {id(each): torch.nn.Parameter(each.detach(), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def set_block(model: torch.nn.Module, block: Block, tensors: dict[str, torch.Tensor]) -> None:
    """Let a block have the memory of tensors, or of copies on its device, in place of its own.

    Raises:
        UserError: the names or shapes are not the block's.
    """
    parameters = block_tensors(model, block)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != shapes:
        raise UserError(f"block {block.name}: holds tensors {given} where the model has {shapes}")
    for name, tensor in tensors.items():
        parameters[name].data = tensor.detach().to(parameters[name].device)


def shared_parameters(model: torch.nn.Module, blocks: dict[str, Block]) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of a model that lie in none of its blocks, by name, not copied; tied ones once."""
    inside = {id(tensor) for block in blocks.values() for tensor in block_tensors(model, block).values()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


@torch.no_grad()
def set_shared(model: torch.nn.Module, shared: dict[str, torch.Tensor]) -> None:
    """Let a model's parameters outside of its blocks have the memory of tensors, or of copies on their device.

    Raises:
        UserError: the names or shapes are not the model's.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in shared.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"the shared parameters: holds {name} {tuple(tensor.shape)}, which is not the model's")
    for name, tensor in shared.items():
        parameters[name].data = tensor.detach().to(parameters[name].device)


def parameter_masks(block: Block, keeps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks by parameter name, a removed head's or neuron's biases included: {"q.weight": bool (out, in), "q.bias":
    (out,)}.

    The biases follow from the weights: a row of q, k or v is removed only with its head, as a whole; a neuron has lost
    all its weights, those that come in and those that go out. Biases elsewhere are never pruned.
    """
    masks = {f"{name}.weight": keep for name, keep in keeps.items()}
    inner, out = block.inner, block.output
    if block.has_bias and block.kind == "attention":
        masks |= {f"{name}.bias": keeps[name].any(dim=1) for name in inner}
    elif block.has_bias:
        used = torch.stack([keeps[out].any(dim=0), *(keep.any(dim=1) for keep in block.by_role(keeps))]).any(dim=0)
        masks |= {f"{name}.bias": used.repeat(block.folds) for name in inner}
    return masks


@torch.no_grad()
def share_of_zeros(model: torch.nn.Module) -> float:
    """The share of the blocks' weights, biases left out, that are zero, 0-1."""
    tensors = [tensor for block in find_blocks(model).values() for tensor in block_tensors(model, block).values()]
    weights = [tensor for tensor in tensors if tensor.dim() > 1]
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)


@torch.no_grad()
def parameter_counts(model) -> dict[str, float]:
    """{"parameters", "nonzero_parameters", "sparsity"} of a model; tied parameters count once."""
    total = sum(p.numel() for p in model.parameters())
    nonzero = sum(int(torch.count_nonzero(p)) for p in model.parameters())
    return {"parameters": total, "nonzero_parameters": nonzero, "sparsity": 1 - nonzero / total}
