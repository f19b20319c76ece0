"""What each variant of each block costs: parameters, multiply-adds or bytes of a model composed of it.

These, and the seconds of `timing`, are additive over the blocks. Parameters are those that are kept. For the others,
heads and neurons count as gone where `compact` takes them out, and single removed weights count as there.
"""

from dataclasses import dataclass

import torch

from common.blocks.calls import block_calls
from common.blocks.find import Block, find_blocks
from common.blocks.tensors import block_tensors, parameter_masks
from common.composing.scheme import DENSE
from common.evaluation.cost import example_batch, multiply_adds
from common.models.load import LoadedModel


@dataclass(frozen=True)
class Costs:
    """`blocks`: {block: {variant, DENSE among them: cost}}; `rest`: what the model costs outside of its blocks.

    Units: parameters; multiply-adds of one example of the stated lengths; bytes of a compact weights file in float32,
    without its header; or seconds, see `timing`.
    """

    measure: str
    blocks: dict[str, dict[str, float]]
    rest: float

    @property
    def original(self):
        """What the original's blocks cost."""
        return sum(costs[DENSE] for costs in self.blocks.values())

    def of(self, choice):
        """What the blocks of a {block: variant} cost."""
        return sum(self.blocks[block][variant] for block, variant in choice.items())


def count(measure: str, loaded: LoadedModel, keeps: dict) -> Costs:
    """The costs of all variants of an original, {block: {variant: {Linear: bool mask}}}, in "parameters",
    "multiply-adds" or "bytes"."""
    blocks = find_blocks(loaded.model)
    keeps = {name: {DENSE: _dense(loaded.model, block), **keeps.get(name, {})} for name, block in blocks.items()}
    lengths = _lengths(loaded, blocks) if measure == "multiply-adds" else None
    size = {
        "parameters": _parameters,
        "bytes": _bytes,
        "multiply-adds": lambda block, masks: _products(block, masks, *lengths[block.name]),
    }[measure]
    costs = {
        name: {variant: size(blocks[name], masks) for variant, masks in variants.items()}
        for name, variants in keeps.items()
    }
    parameters = sum(p.numel() for p in loaded.model.parameters())
    total = multiply_adds(loaded) if lengths else parameters * (4 if measure == "bytes" else 1)
    return Costs(measure, costs, total - sum(variants[DENSE] for variants in costs.values()))


def _dense(model, block):
    """Masks that remove nothing."""
    tensors = block_tensors(model, block)
    return {linear: torch.ones(tensors[f"{linear}.weight"].shape, dtype=torch.bool) for linear in block.linears}


def working_parts(block, masks):
    """Which heads or neurons a variant has in a compact model, bool (heads or neurons,)."""
    read, rows = masks[block.output].any(dim=0), [mask.any(dim=1) for mask in block.by_role(masks)]
    if block.kind == "attention":
        return read.view(block.heads, -1).any(dim=1) & rows[2].view(block.heads, -1).any(dim=1)
    return read & torch.stack(rows).all(dim=0)


def _compact(block, masks):
    """A variant's masks without the heads and neurons that are gone: {Linear: bool (out, in)}."""
    out = block.output
    works = working_parts(block, masks).repeat_interleave(masks[out].shape[1] // (block.heads or block.neurons))
    rows = works.repeat(block.folds)
    return {linear: masks[linear][rows] for linear in block.inner} | {out: masks[out][:, works]}


def _parameters(block, masks):
    own_biases = masks[block.output].shape[0] if block.has_bias else 0  # the output Linear's, which no mask has
    return sum(int(mask.sum()) for mask in parameter_masks(block, masks).values()) + own_biases


def _bytes(block, masks):
    compact = _compact(block, masks).values()
    return 4 * sum(mask.numel() + (len(mask) if block.has_bias else 0) for mask in compact)


def _lengths(loaded: LoadedModel, blocks: dict[str, Block]) -> dict[str, tuple[int, int]]:
    """How many tokens enter each block, and of an attention block how many keys there are (else the same)."""
    with torch.inference_mode():
        calls = block_calls(loaded.model, blocks.values(), _runnable(example_batch(loaded, 1)))
    lengths = {}
    for call in calls:
        block = call.block
        linears = (block.queries, block.keys) if block.kind == "attention" else (block.inner[0], block.inner[0])
        lengths[block.name] = tuple(call.inputs[linear].shape[1] for linear in linears)
    return lengths


def _runnable(batch):
    """An example batch as a family's `run` takes it, which makes the decoder's input out of labels."""
    return batch | {"labels": batch.get("decoder_input_ids")}


def _products(block, masks, queries, keys):
    """Multiply-adds of a block's matrix products for so many tokens."""
    compact = _compact(block, masks)
    out, width = compact[block.output].numel(), compact[block.output].shape[1]
    sizes = [mask.numel() for mask in block.by_role(compact)]
    if block.kind == "feed_forward":
        return queries * (sum(sizes) + out)
    q, k, v = sizes
    return queries * (q + out) + keys * (k + v) + 2 * width * queries * keys  # the last: scores and context
