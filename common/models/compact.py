"""Making a model really smaller: taking out the heads and feed-forward neurons that no longer do anything.

A head is taken out if its value projection or its columns of the out-projection are zero, a neuron if its row in an
inner Linear or its column in the output Linear is. What is left computes the same function, up to the order of sums.
It is of an ordinary class where one can say it (see `plain`), else of one of ours (see `modeling_compact`).
"""

import copy

import torch

from common.blocks.calls import features
from common.blocks.families import family_of
from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors
from common.models import modeling_compact
from common.models.checks import class_named
from common.models.plain import PARTS, NotPlain, Plain, ordinary_class, ordinary_settings

VERSION = 2  # part of the key of every output; raise it when results change


@torch.no_grad()
def make_compact(model: torch.nn.Module, masks: dict[str, torch.Tensor]) -> tuple:
    """A copy of a model, which may be compact already, without what does nothing in it; and its masks.

    `masks`: {parameter name: bool mask}, True = kept.
    """
    full = model.state_dict()
    state, masks = dict(full), dict(masks)
    kept_heads, kept_neurons = (dict(getattr(model.config, name, None) or {}) for name in PARTS)
    layouts = layouts_of(model.config)

    def cut(name, kept):
        for tensors in (state, masks):
            if name in tensors:
                tensors[name] = tensors[name][kept]

    for block in find_blocks(model).values():
        inner, out = modeling_compact.inner_linears(model.get_submodule(block.root), layouts), block.output
        if block.kind == "attention":
            works = working_heads(block, block_tensors(model, block))
            numbers = kept_heads.get(block.root, range(block.heads))
            kept_heads[block.root] = [numbers[head] for head in works.nonzero().flatten().tolist()]
            works = works.repeat_interleave(state[f"{block.root}.{out}.weight"].shape[1] // block.heads)
        else:
            works, constant = working_neurons(model, block)
            kept_neurons[block.root] = int(works.sum())
            if constant is not None:
                state[f"{block.root}.{out}.bias"] = state[f"{block.root}.{out}.bias"] + constant
        works = works.cpu()  # masks may lie elsewhere than the model
        for linear in inner:
            for name in ("weight", "bias"):
                cut(f"{block.root}.{linear}.{name}", works.repeat(block.folds))
        cut(f"{block.root}.{out}.weight", (slice(None), works))

    state |= copy.deepcopy({name: tensor for name, tensor in state.items() if tensor is full.get(name)})
    parameters = dict(model.named_parameters())
    try:
        plain = Plain(model, kept_heads, kept_neurons)
        of_class = ordinary_class(model)
        config, state, masks = of_class.config_class(**plain.settings), plain.state(state), plain.state(masks)
        parameters = {plain.renamed(name): parameter for name, parameter in parameters.items()}
    except NotPlain:
        of_class = class_named(f"Compact{type(model).__name__.removeprefix('Compact')}")
        left = {"layouts": layouts, "kept_heads": kept_heads, "kept_neurons": kept_neurons}
        config = of_class.config_class(**ordinary_settings(model.config), **left)
    smaller = of_class.from_pretrained(
        None, config=config, state_dict=state, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(parameters[name].requires_grad)  # loading makes all of them trainable
    if model.can_generate():
        smaller.generation_config = model.generation_config
    return smaller.to(model.device).train(model.training), masks


def layouts_of(config) -> dict[str, dict]:
    """Where a model's blocks lie, as compact configs hold it, see `modeling_compact`."""
    layouts = {}
    for name, layout in family_of(config).layouts.items():
        layouts[name] = {"inner": list(dict.fromkeys(layout.roles)), "output": layout.output}
        if layout.kind == "attention":
            layouts[name]["inner"] += layout.beside
            layouts[name]["width"] = layout.width
    return layouts


def working_heads(block, tensors):
    """Which heads have a part in an attention block's output, bool (heads,)."""
    silent = (block.by_role(tensors, ".weight")[2] == 0).all(dim=1)  # (heads * width,)
    if block.has_bias:
        silent &= block.by_role(tensors, ".bias")[2] == 0
    unread = (tensors[f"{block.output}.weight"] == 0).all(dim=0)  # (heads * width,)
    return ~(silent.view(block.heads, -1).all(dim=1) | unread.view(block.heads, -1).all(dim=1))


def working_neurons(model, block):
    """(which neurons' part in a feed-forward block's output depends on its input, bool (neurons,),
    what the others add to the output, (d_model,), or None if that is nothing).
    """
    tensors = block_tensors(model, block)
    inner, out = block.inner, block.output
    unread = (tensors[f"{out}.weight"] == 0).all(dim=0)  # (neurons,)
    empty = torch.stack([(rows == 0).all(dim=1) for rows in block.by_role(tensors, ".weight")])  # (roles, neurons)
    probe = torch.linspace(-1, 1, tensors[f"{inner[0]}.weight"].shape[1]).to(tensors[f"{out}.weight"])
    values = features(model, block, tensors, probe[None])[0]  # (neurons,)
    # With no weights in any inner Linear, a neuron is constant; without those of one of a gated block's two, it is
    # so if that takes it to zero (as it does wherever the activation function passes through the origin).
    constant = empty.all(dim=0) | (empty.any(dim=0) & (values == 0))
    if f"{out}.bias" not in tensors:
        constant &= values == 0
    gone = unread | constant
    added = tensors[f"{out}.weight"][:, gone] @ values[gone]
    return ~gone, added if bool(added.any()) else None
