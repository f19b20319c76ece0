"""Pruning one block by the criteria of its heads, neurons and weights."""

import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant, parameter_masks
from common.composing.configurations import SIZES
from common.pruning.l1 import L1
from common.pruning.masks import keep_largest


def prune_block(
    block: Block, tensors: dict[str, torch.Tensor], removed: dict, criteria: dict | None = None
) -> tuple[Variant, dict[str, int]]:
    """Prune one block: whole heads, whole neurons, and single weights of Linears.

    A removed head or neuron loses its rows (and biases) in the inner Linears and its columns in the output Linear, on
    top of the weights that these lose at their own rates.

    Args:
        tensors: {"q.weight": tensor, "q.bias": …}, the block's own, by Linear name.
        removed: {"heads": heads removed, "neurons": neurons removed, "weights": {Linear: weights removed}}. It fits the
            block, see `compose.check_counts`.
        criteria: {kind of parts: their criterion, see `criteria.Criterion`}; None for l1.
    Returns:
        (the variant, {Linear: weights removed by its own rate, measured on the masks}).
    """
    criteria = criteria or dict.fromkeys(SIZES, L1(block, tensors))
    out = block.output
    size = tensors[f"{out}.weight"].shape[1]
    features = torch.ones(size, dtype=torch.bool, device=tensors[f"{out}.weight"].device)  # inputs of it that stay
    if removed["heads"]:
        # A head's width is the output Linear's inputs over the heads; T5 lets it differ from d_model over the heads.
        kept_heads = keep_largest(criteria["attention"].head_scores(), removed["heads"])
        features = kept_heads.repeat_interleave(size // block.heads)
    elif removed.get("neurons"):
        features = keep_largest(criteria["feed_forward"].neuron_scores(), removed["neurons"])
    keeps, by_rate = {}, {}
    for name in block.linears:
        weight, count = tensors[f"{name}.weight"], removed["weights"].get(name)
        keep = torch.ones_like(weight, dtype=torch.bool)
        if count:
            keep = criteria["linear"].weight_mask(name, count, features, keeps)
        if name in removed["weights"]:
            by_rate[name] = int((~keep).sum())
        keeps[name] = keep & (features[None, :] if name == out else features.repeat(block.folds)[:, None])
    masks = parameter_masks(block, keeps)
    # where, not a product, which would leave -0.0 in the place of negative weights
    pruned = {
        name: torch.where(masks[name], tensor.detach(), 0) if name in masks else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    return Variant(block, pruned, keeps), by_rate


def count_removed(block: Block, keeps: dict[str, torch.Tensor]) -> dict:
    """What masks remove of a block: a head if they do all its rows of q, a neuron if they do all its weights."""
    rows, heads, neurons = block.by_role(keeps), 0, 0
    if block.heads:
        heads = int((~rows[0].reshape(block.heads, -1)).all(dim=1).sum())
    if block.neurons:
        kept = torch.stack([keeps[block.output].any(dim=0), *(keep.any(dim=1) for keep in rows)]).any(dim=0)
        neurons = int((~kept).sum())
    return {
        "heads_removed": heads,
        "neurons_removed": neurons,
        "weights_removed": {linear: int((~keep).sum()) for linear, keep in keeps.items()},
    }
