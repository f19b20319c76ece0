"""Models whose removed heads and neurons are gone, not just zero: the families of T5, BART and BERT.

This file needs torch and transformers alone. A copy of it goes into the folder of every compact model, which then loads
wherever these two are, with `trust_remote_code=True`; in a process that has imported the suite it loads without.

A compact config is the original's and, by the dotted path of a block's root module, what is left: `kept_heads`, the
numbers that the heads have in the original, and `kept_neurons`, a count. A module that is not named is whole. Where no
head or neuron is left, the block is left out: its Linears have no weights, and it adds its output Linear's bias alone.
`layouts` says, by the class of a root module, where a block's Linears lie in it and which attribute is a head's width:
{"inner": [path, ...], "output": path, "width": path}. Not every module has all inner ones; a neuron has no width.

A further family is a call of `compact_classes`.
"""

from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch import nn
from transformers.models.umt5.modeling_umt5 import UMT5Attention
from transformers.utils.versions import require_version

require_version("transformers>=5.24")  # earlier ones would compute something else


# --- making modules smaller --------------------------------------------------------------------------------------


def make_smaller(model, config):
    """Give the modules as many heads and neurons as the config says. The right weights are loaded afterwards."""
    for name, heads in (config.kept_heads or {}).items():
        keep_parts(model.get_submodule(name), heads, config.layouts)
    for name, neurons in (config.kept_neurons or {}).items():
        keep_parts(model.get_submodule(name), range(neurons), config.layouts)


def keep_parts(module, parts, layouts):
    """Make the root module of a block smaller, in place, to some of its heads or neurons.

    Its class says which: a BartAttention loses heads, and a BartEncoderLayer neurons, although it contains attention
    too. `parts` are places among the heads or neurons that are there. The Linears are cut to size, whichever the parts
    are; only T5's attention must know which of its heads they are.
    """
    layout = layout_of(module, layouts)
    out, width = module.get_submodule(layout["output"]), len(parts)
    if "width" in layout:
        owner, _, size = layout["width"].rpartition(".")
        owner = module.get_submodule(owner)
        width *= getattr(owner, size)
        if hasattr(module, "relative_attention_num_buckets"):  # T5's and its kin's
            note_heads(module, parts)
        sizes = dict.fromkeys(("n_heads", "num_heads", "num_attention_heads"), len(parts))
        sizes |= dict.fromkeys(("inner_dim", "all_head_size", "dim"), width)
        for name in sizes.keys() & vars(owner).keys():
            setattr(owner, name, sizes[name])
        if not width and not isinstance(owner, CompactT5Attention):
            put_before(owner, AttentionWithoutHeads, "WithoutHeads")
            owner.output_linear = layout["output"] if owner is module else None
    shrink([module.get_submodule(name) for name in inner_linears(module, layouts)], out, width)


def inner_linears(module, layouts):
    """The names of the Linears in the root module of a block whose rows are its heads' or neurons'."""
    names = dict(module.named_modules())
    return [name for name in layout_of(module, layouts)["inner"] if name in names]


def layout_of(module, layouts):
    """The layout of the block that a module is the root of: `layouts` has it by the name of its class."""
    return next(layouts[base.__name__] for base in type(module).__mro__ if base.__name__ in layouts)


@torch.no_grad()
def shrink(inner, out, width):
    """Cut what lies between some Linears and the one that they feed down to `width`, or a multiple where they are
    several in one."""
    for linear in inner:
        linear.out_features = rows = width * (linear.out_features // out.in_features)
        linear.weight = nn.Parameter(linear.weight[:rows].clone())  # (rows, in)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[:rows].clone())
    out.in_features = width
    out.weight = nn.Parameter(out.weight[:, :width].clone())  # (out, width)


# --- attention without heads -------------------------------------------------------------------------------------


def put_before(module, mixin, suffix):
    """Let a class, a `Mixin`, go before a module's own."""
    plain = type(module)
    bases = plain.__bases__ if issubclass(plain, Mixin) else (plain,)
    module.__class__ = joined(f"{plain.__name__}{suffix}", (mixin, *bases))


@cache
def joined(name, bases):
    """The one class of a name that is made of others, and is none of a module."""
    return type(name, bases, {})


def blank(name, bases):
    """An object of such a class, without attributes."""
    return object.__new__(joined(name, bases))


class Mixin:
    """Put before a module's class: a pickle or a copy holds the classes that its own is made of."""

    def __reduce__(self):
        return blank, (type(self).__name__, type(self).__bases__), vars(self)


class AttentionWithoutHeads(Mixin):
    """Put before the class of an attention module without heads, whose own `forward` fails to reshape empty tensors.

    It returns (output, None), where others have their probabilities. `output_linear` is the name of the output Linear
    in the module; None if it lies elsewhere, as BERT's does.
    """

    def forward(
        self, hidden_states, *args, key_value_states=None, encoder_hidden_states=None, cache=None, **kwargs
    ):  # umT5 has the other name
        if key_value_states is None and encoder_hidden_states is None:
            count_tokens(self, hidden_states, cache)
        output = hidden_states[..., :0]  # (batch, length, 0): what no heads make
        if self.output_linear is not None:
            output = self.get_submodule(self.output_linear)(output)  # zeros, and its bias
        return output, None


def count_tokens(attention, hidden_states, cache):
    """Let a self-attention's cache, if there is one, count the tokens although there are no heads.

    A cache is as long as what its first layer holds. If that were nothing, generation would go silently wrong. So one
    number a token, whichever it is, stands for the keys and values.

    Args:
        hidden_states: of the new tokens, (batch, length, d_model).
    Returns:
        (how many tokens there were before, how many keys a head would see now).
    """
    length = hidden_states.shape[1]
    if cache is None:
        return 0, length
    cache = getattr(cache, "self_attention_cache", cache)
    before = cache.get_seq_length(attention.layer_idx) + 0  # a static cache's is a tensor, which it goes on to change
    token = hidden_states[:, None, :, :1]  # (batch, 1 head, length, width 1)
    keys, _ = cache.update(token, token, attention.layer_idx)
    return before, keys.shape[2]


# --- T5 ----------------------------------------------------------------------------------------------------------


def note_heads(attention, heads):
    """Make T5's attention, or its kin's, one that knows which heads it has, and let it keep some, by their places."""
    if not hasattr(attention, "kept_heads"):
        put_before(attention, CompactUMT5Attention if isinstance(attention, UMT5Attention) else CompactT5Attention, "")
        attention.kept_heads, attention.all_heads = list(range(attention.n_heads)), attention.n_heads
    attention.kept_heads = [attention.kept_heads[head] for head in heads]
    attention._index = attention._whole_bias = None


class SomeHeads(Mixin):
    """What the attention of T5 and its kin has of the relative position bias, once it has only some of its heads."""

    def _own(self, position_bias):
        """The kept heads' part of (1, all heads, queries, keys)."""
        if self.n_heads == self.all_heads:
            return position_bias
        if self._index is None or self._index.device != position_bias.device:
            with torch.inference_mode(False):  # made in inference mode, it could not be trained with afterwards
                self._index = torch.tensor(self.kept_heads, dtype=torch.long, device=position_bias.device)
        return position_bias.index_select(1, self._index)


class CompactUMT5Attention(SomeHeads):
    """Put before the class of umT5's attention, where each layer makes a bias of its own."""

    def compute_bias(self, *args, **kwargs):
        return self._own(super().compute_bias(*args, **kwargs))


class CompactT5Attention(SomeHeads):
    """Put before the class of T5's or mT5's attention by `note_heads`.

    The layers of a stack share the relative position bias that the first of them makes. It stays at full width, (1, all
    heads, queries, keys), and each layer takes the heads that it has.
    """

    def compute_bias(self, *args, **kwargs):
        self._whole_bias = super().compute_bias(*args, **kwargs)
        return self._own(self._whole_bias)

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, cache=None, **kwargs):
        shared = position_bias
        if key_value_states is not None:
            # Cross-attention has none. T5 shares zeros of the first layer's heads; one zero is right for any number.
            position_bias = shared = hidden_states.new_zeros(1, 1, 1, 1)
        elif position_bias is not None:
            position_bias = self._own(position_bias)
        if self.n_heads:
            output, bias, *weights = super().forward(
                hidden_states, mask, key_value_states, position_bias, cache=cache, **kwargs
            )
        else:
            output, bias, weights = self.o(hidden_states[..., :0]), None, [None]
            before, keys = (0, 0) if key_value_states is not None else count_tokens(self, hidden_states, cache)
            if shared is None and self.has_relative_attention_bias:
                self.compute_bias(hidden_states.shape[1], keys, hidden_states.device, before)
        if shared is None and self.has_relative_attention_bias:  # a stack's first layer
            shared, self._whole_bias = self._whole_bias, None
        return output, bias if shared is None else shared, *weights  # without either: a layer that is run alone


# --- configs and models ------------------------------------------------------------------------------------------


@dataclass(repr=False, eq=False)
class CompactConfig:
    """What a compact config adds to the original's."""

    layouts: dict | None = None
    kept_heads: dict | None = None
    kept_neurons: dict | None = None


class CompactModel:
    """What a compact model adds to the original's class."""

    def __init__(self, config):
        super().__init__(config)
        make_smaller(self, config)


def compact_classes(original):
    """The compact counterparts of a model class of transformers and of its config class, known to the auto classes.

    Both get the name of the original, with "Compact" before it.
    """
    config_class = type(
        f"Compact{original.config_class.__name__}",
        (CompactConfig, original.config_class),
        {
            "__doc__": f"A {original.config_class.__name__} and what is left of each module.",
            "model_type": f"compact-{original.config_class.model_type}",
        },
    )
    model_class = type(
        f"Compact{original.__name__}",
        (CompactModel, original),
        {
            "__doc__": f"A {original.__name__} with as many heads and neurons in each module as its config says.",
            "config_class": config_class,
        },
    )
    auto_model = transformers.AutoModelForSeq2SeqLM
    if original.__name__.endswith("ForSequenceClassification"):
        auto_model = transformers.AutoModelForSequenceClassification
    config_class.register_for_auto_class()  # saving puts this file into the folder
    model_class.register_for_auto_class(auto_model)
    # Once more where the suite and a folder's copy of this file meet in one process.
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_model.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


for original in (
    transformers.T5ForConditionalGeneration,
    transformers.MT5ForConditionalGeneration,
    transformers.UMT5ForConditionalGeneration,
    transformers.BartForConditionalGeneration,
    transformers.MBartForConditionalGeneration,
    transformers.M2M100ForConditionalGeneration,
    transformers.MarianMTModel,
    transformers.PegasusForConditionalGeneration,
    transformers.BertForSequenceClassification,
    transformers.RobertaForSequenceClassification,
    transformers.XLMRobertaForSequenceClassification,
    transformers.ElectraForSequenceClassification,
    transformers.DebertaV2ForSequenceClassification,
    transformers.DistilBertForSequenceClassification,
    transformers.ModernBertForSequenceClassification,
):
    globals().update({made.__name__: made for made in compact_classes(original)})
