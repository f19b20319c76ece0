"""What each variant of each block costs: parameters, multiply-adds, bytes or seconds of a model composed of it.

All four are additive over the blocks; what lies outside of them (embeddings, norms, head) is one more number.
Parameters are those that are kept. For the others, heads and neurons count as gone where `compact` takes them out;
single removed weights count for bytes alone.
"""

import math
import statistics
from dataclasses import dataclass

import torch

from common import modeling_compact
from common.architectures import find_blocks, watched
from common.masking import parameter_masks
from common.models import now
from common.report import INPUTS, ROUNDS, WARM_UP, example_batch, multiply_adds
from common.schemes import DENSE


@dataclass(frozen=True)
class Costs:
    """`blocks`: {block: {variant, DENSE among them: cost}}; `rest`: what the model costs outside of its blocks.

    Units: parameters; multiply-adds of one example of the stated lengths; bytes of a compact, sparse weights file,
    without its header; or seconds of a forward pass over a batch of the stated size.
    """

    measure: str
    blocks: dict
    rest: float

    @property
    def original(self):
        """What the original's blocks cost."""
        return sum(each[DENSE] for each in self.blocks.values())

    def of(self, choice):
        """What the blocks of a {block: variant} cost."""
        return sum(self.blocks[block][variant] for block, variant in choice.items())


def count(measure, loaded, keeps, device):
    """The costs of all variants.

    Args:
        measure: "parameters", "multiply-adds", "bytes" or "latency".
        loaded: the original, a `LoadedModel`.
        keeps: {block: {variant: {Linear: bool mask}}}.
    """
    blocks = find_blocks(loaded.model)
    whole = {
        name: {
            linear: torch.ones(getattr(loaded.model.get_submodule(name), linear).weight.shape, dtype=torch.bool)
            for linear in block.linears
        }
        for name, block in blocks.items()
    }
    keeps = {name: {DENSE: whole[name], **keeps.get(name, {})} for name in blocks}
    if measure == "latency":
        return Costs(measure, *_seconds(loaded, blocks, keeps, device))
    if measure == "multiply-adds":
        lengths = _lengths(loaded, blocks)
        own = {
            name: {variant: _products(blocks[name], masks, *lengths[name]) for variant, masks in each.items()}
            for name, each in keeps.items()
        }
        total = multiply_adds(loaded)
    else:
        size = {"parameters": _parameters, "bytes": _bytes}[measure]
        own = {
            name: {variant: size(blocks[name], masks) for variant, masks in each.items()}
            for name, each in keeps.items()
        }
        total = sum(p.numel() for p in loaded.model.parameters()) * (4 if measure == "bytes" else 1)
    return Costs(measure, own, total - sum(each[DENSE] for each in own.values()))


def left(block, masks):
    """Which heads or neurons a variant has left in a compact model: their numbers, (kept,); one at least.

    A head is gone if all its rows of the value projection are, or its columns of the out-projection; a neuron, if its
    row in an inner Linear is, or its column in the output Linear.
    """
    *inner, out = block.linears
    read = masks[out].any(dim=0)
    if block.kind == "attention":
        works = read.view(block.heads, -1).any(dim=1) & masks[inner[-1]].view(block.heads, -1).any(dim=1)
    else:
        works = read & torch.stack([masks[linear].any(dim=1) for linear in inner]).all(dim=0)
    return works.nonzero().flatten() if bool(works.any()) else works.new_zeros(1, dtype=torch.long)


def _compact(block, masks):
    """A variant's masks without the heads and neurons that are gone: {Linear: bool (out, in)}."""
    *inner, out = block.linears
    width = masks[out].shape[1] // (block.heads or block.neurons)
    index = (left(block, masks)[:, None] * width + torch.arange(width)).flatten()
    return {linear: masks[linear][index] for linear in inner} | {out: masks[out][:, index]}


def _parameters(block, masks):
    own_biases = masks[block.linears[-1]].shape[0] if block.has_bias else 0  # the output Linear's, which no mask has
    return sum(int(mask.sum()) for mask in parameter_masks(block, masks).values()) + own_biases


def _bytes(block, masks):
    compact = _compact(block, masks)
    weights = sum(min(4 * mask.numel(), math.ceil(mask.numel() / 8) + 4 * int(mask.sum())) for mask in compact.values())
    return weights + (4 * sum(len(mask) for mask in compact.values()) if block.has_bias else 0)


def _lengths(loaded, blocks):
    """How many tokens enter each block's first Linear, and its second: queries and keys of an attention block."""
    lengths = {}

    def note(block, call):
        first, second = block.linears[:2]
        lengths[block.name] = call.inputs[first].shape[1], call.inputs[second].shape[1]

    with torch.inference_mode(), watched(loaded.model, list(blocks.values()), note):
        loaded.model(**example_batch(loaded, 1))
    return lengths


def _products(block, masks, queries, keys):
    """Multiply-adds of a block's matrix products for so many tokens."""
    compact = _compact(block, masks)
    sizes = [mask.numel() for mask in compact.values()]
    if block.kind == "feed_forward":
        return queries * sum(sizes)
    q, k, v, out = sizes
    width = compact[block.linears[-1]].shape[1]
    return queries * (q + out) + keys * (k + v) + 2 * width * queries * keys  # the last: scores and context


def _seconds(loaded, blocks, keeps, device):
    """Each variant's seconds, measured in its place: with the block's real inputs in a pass over the stated batch.

    Variants with as many heads or neurons left take the same time, and are measured once.

    Returns:
        ({block: {variant: seconds}}, seconds outside of the blocks).
    """
    batch = example_batch(loaded, INPUTS[loaded.family.task]["batch_size"])
    modules, times, whole = {}, {}, []
    for name, block in blocks.items():
        modules[name] = {}
        for masks in keeps[name].values():
            parts = left(block, masks)
            if len(parts) not in modules[name]:
                module = modeling_compact.smaller(loaded.model.get_submodule(name), parts.tolist())
                modules[name][len(parts)] = module.eval()
        times[name] = {size: [] for size in modules[name]}

    def measure(block, call):
        for size, module in modules[block.name].items():
            started = now(device)
            module(*call.args, **call.kwargs)
            times[block.name][size].append(now(device) - started)

    with torch.inference_mode():
        for _ in range(WARM_UP + ROUNDS):
            with watched(loaded.model, list(blocks.values()), measure):
                loaded.family.run(loaded.model, batch | {"labels": batch.get("decoder_input_ids")})
            started = now(device)
            loaded.model(**batch)
            whole.append(now(device) - started)
    median = {
        name: {size: statistics.median(each[WARM_UP:]) for size, each in sizes.items()} for name, sizes in times.items()
    }
    own = {
        name: {variant: median[name][len(left(blocks[name], masks))] for variant, masks in each.items()}
        for name, each in keeps.items()
    }
    return own, max(statistics.median(whole[WARM_UP:]) - sum(each[DENSE] for each in own.values()), 0.0)
