"""Which weights go: exact-k masks, the l1 criterion, and keeping removed weights at zero through training.

A mask is a bool tensor named `keep`: True = kept. Exactly k entries are removed, chosen by rank, ties by position
(the earlier goes first), never by a threshold, which would remove more than asked wherever weights tie.
"""

import torch

from common.blocks import Block, Variant
from common.schemes import SIZES


def keep_largest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """Keep all but the `removed` smallest scores.

    Where no scores tie, this is the mask of `torch.nn.utils.prune.l1_unstructured` for scores |W|.

    Args:
        scores: tensor of any shape.
        removed: how many to remove, 0 <= removed <= scores.numel().
    Returns:
        bool tensor of the same shape, True = kept.
    Raises:
        ValueError: removed is out of range.
    """
    if not 0 <= removed <= scores.numel():
        raise ValueError(f"cannot remove {removed} of {scores.numel()}")
    order = torch.argsort(scores.flatten(), stable=True)
    keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:removed]] = False
    return keep.view(scores.shape)


def head_scores(q, k, v, heads):
    """l1 norm of every head's rows in the three projections together.

    Args:
        q, k, v: weights of shape (heads * head_dim, d_model).
    Returns:
        float64 tensor of shape (heads,). Double precision, so that the ranking does not depend on the order of sums.
    """
    rows = torch.cat([w.detach().view(heads, -1) for w in (q, k, v)], dim=1)  # (heads, 3 * head_dim * d_model)
    return rows.abs().sum(dim=1, dtype=torch.float64)


def neuron_scores(inner, out):
    """l1 norm of every feed-forward neuron: of its row in the inner Linears and its column in the output Linear.

    Args:
        inner: weights of shape (neurons, d_model); out: weight of shape (d_model, neurons).
    Returns:
        float64 tensor of shape (neurons,).
    """
    rows = torch.cat([*(w.detach() for w in inner), out.detach().T], dim=1)  # (neurons, d_model * Linears)
    return rows.abs().sum(dim=1, dtype=torch.float64)


class L1:
    """The study's own criterion: the smallest magnitudes go first. It needs no data.

    A criterion ranks the parts of one block. `heads` and `neurons` give a score to each, and what scores least goes
    first; `weights` says which of a Linear's weights stay.
    """

    def __init__(self, block: Block, tensors: dict[str, torch.Tensor]):
        """`tensors`: the block's own, by parameter name."""
        self.block, self.tensors = block, tensors
        *inner, out = block.linears
        self.inner = [tensors[f"{name}.weight"] for name in inner]
        self.out = tensors[f"{out}.weight"]

    def heads(self) -> torch.Tensor:
        """(heads,)"""
        return head_scores(*self.inner, self.block.heads)

    def neurons(self) -> torch.Tensor:
        """(neurons,)"""
        return neuron_scores(self.inner, self.out)

    def weights(self, linear: str, removed: int, features: torch.Tensor, keeps: dict) -> torch.Tensor:
        """Which weights of a Linear stay, bool (out, in).

        Args:
            removed: how many do not.
            features: bool, the output Linear's inputs that stay. Here weights are ranked over the whole Linear.
            keeps: {Linear: bool (out, in)}, the masks of the block's Linears before this one.
        """
        return keep_largest(self.tensors[f"{linear}.weight"].abs(), removed)


def prune_block(
    block: Block, tensors: dict[str, torch.Tensor], removed: dict, criteria: dict | None = None
) -> tuple[Variant, dict[str, int]]:
    """Prune one block: whole heads, whole neurons, and single weights of Linears.

    A removed head loses its rows (and biases) in q, k and v and its columns in the out-projection; these go on top of
    the weights that the out-projection loses at its own rate. So it is with neurons: their rows (and biases) in the
    inner Linears and their columns in the output Linear.

    Args:
        tensors: {"q.weight": tensor, "q.bias": …}, the block's own, by Linear name.
        removed: {"heads": heads removed, "neurons": neurons removed, "weights": {Linear: weights removed}}. It fits the
            block, see `composition.check_variant`.
        criteria: {"attention", "feed_forward", "linear": what ranks these kinds of parts, see `L1`}; None for l1.
    Returns:
        (the variant, {Linear: weights removed by its own rate, measured on the masks}).
    """
    criteria = criteria or dict.fromkeys(SIZES, L1(block, tensors))
    *inner, out = block.linears
    size = tensors[f"{out}.weight"].shape[1]
    features = torch.ones(size, dtype=torch.bool, device=tensors[f"{out}.weight"].device)  # inputs of it that stay
    if removed["heads"]:
        # A head's width is the output Linear's inputs over the heads; T5 lets it differ from d_model over the heads.
        kept_heads = keep_largest(criteria["attention"].heads(), removed["heads"])
        features = kept_heads.repeat_interleave(size // block.heads)
    elif removed.get("neurons"):
        features = keep_largest(criteria["feed_forward"].neurons(), removed["neurons"])
    keeps, by_rate = {}, {}
    for name in block.linears:
        weight, count = tensors[f"{name}.weight"], removed["weights"].get(name)
        keep = torch.ones_like(weight, dtype=torch.bool)
        if count:
            keep = criteria["linear"].weights(name, count, features, keeps)
        if name in removed["weights"]:
            by_rate[name] = int((~keep).sum())
        keeps[name] = keep & (features[None, :] if name == out else features[:, None])
    masks = parameter_masks(block, keeps)
    # where, not a product, which would leave -0.0 in the place of negative weights
    pruned = {
        name: torch.where(masks[name], tensor.detach(), 0) if name in masks else tensor.detach().clone()
        for name, tensor in tensors.items()
    }
    return Variant(block, pruned, keeps), by_rate


def parameter_masks(block: Block, keeps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks by parameter name, a removed head's or neuron's biases included: {"q.weight": bool (out, in), "q.bias":
    (out,)}.

    The biases follow from the weights: a row of q, k or v is removed only with its head, as a whole; a neuron has lost
    all its weights, those that come in and those that go out. Biases elsewhere are never pruned.
    """
    masks = {f"{name}.weight": keep for name, keep in keeps.items()}
    *inner, out = block.linears
    if block.has_bias and block.kind == "attention":
        masks |= {f"{name}.bias": keeps[name].any(dim=1) for name in inner}
    elif block.has_bias:
        used = torch.stack([keeps[out].any(dim=0), *(keeps[name].any(dim=1) for name in inner)]).any(dim=0)
        masks |= {f"{name}.bias": used for name in inner}
    return masks


class HeldMasks:
    """Keeps the removed entries of some parameters at exactly zero while they are trained.

    Call `mask_gradients` after the backward pass and before clipping, and `apply` after each optimizer step. The first
    keeps removed entries out of the gradient norm and of the optimizer's moments. With AdamW and SGD that is enough: a
    gradient that was ±0 from the first step on leaves their moments ±0, decay multiplies a +0 by 1 - lr * decay > 0
    or adds a ±0 to the gradient, and +0 plus or minus ±0 is +0. The second makes sure, whatever the optimizer is, for
    about a hundredth of a step.
    """

    def __init__(self, parameters, masks):
        """`parameters` and `masks` are {name: tensor} of equal shapes; a parameter without a mask is left free."""
        self.parameters = {n: p for n, p in parameters.items() if n in masks and not bool(masks[n].all())}
        # The bool masks' own memory, read as ones and zeros. A product with them takes a quarter longer than one with
        # floats, of which joint fine-tuning would have to hold four bytes a weight; with bools twice as long.
        self.masks = {n: masks[n].to(p.device).view(torch.uint8) for n, p in self.parameters.items()}

    def _stepped(self):
        """The parameters that have a gradient, and their masks."""
        return [(p, self.masks[name]) for name, p in self.parameters.items() if p.grad is not None]

    @torch.no_grad()
    def mask_gradients(self):
        pairs = [(p.grad, mask) for p, mask in self._stepped()]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs)))

    @torch.no_grad()
    def apply(self):
        """To the parameters that have a gradient; the others have not been stepped."""
        pairs = self._stepped()
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs)))

    def move(self, name, device):
        """Move a parameter's mask, if it has one."""
        if name in self.masks:
            self.masks[name] = self.masks[name].to(device)

    def intact(self):
        """Whether every removed entry is exactly zero."""
        return all(bool((p.detach()[m == 0] == 0).all()) for p, m in zip(self.parameters.values(), self.masks.values()))
