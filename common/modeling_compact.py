"""T5 and DistilBERT whose removed heads and neurons are gone, not just zero.

This file needs torch and transformers alone. A copy of it goes into the folder of every compact model, which then loads
wherever these two are, with `trust_remote_code=True`; in a process that has imported the suite it loads without.

A compact config is the original's and, by the name of the module, what is left: `kept_heads`, the original's numbers of
the heads, and `kept_neurons`, a count. A module that is not named is whole.

In a saved `config.json` a notice stands for the activation function, whose name is kept beside it. So a plain class
that is given the folder refuses at once and says what to do; it would otherwise tell of shapes that don't fit.
"""

import copy

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention
from transformers.models.t5.modeling_t5 import T5Attention

NOTICE = (
    "a-compact-model, too small for this class: load it with "
    "transformers.{}.from_pretrained(FOLDER, trust_remote_code=True)"
)


class CompactT5Config(T5Config):
    """A T5Config and what is left of each module."""

    model_type = "compact-t5"

    kept_heads: dict | None = None
    kept_neurons: dict | None = None
    original_activation: str | None = None  # in files only

    def __post_init__(self, **kwargs):
        if self.original_activation is not None:
            self.feed_forward_proj, self.original_activation = self.original_activation, None
        super().__post_init__(**kwargs)

    def to_dict(self):
        return super().to_dict() | {
            "feed_forward_proj": NOTICE.format("AutoModelForSeq2SeqLM"),
            "original_activation": self.feed_forward_proj,
        }


class CompactDistilBertConfig(DistilBertConfig):
    """A DistilBertConfig and what is left of each module."""

    model_type = "compact-distilbert"

    kept_heads: dict | None = None
    kept_neurons: dict | None = None
    original_activation: str | None = None  # in files only

    def __post_init__(self, **kwargs):
        if self.original_activation is not None:
            self.activation, self.original_activation = self.original_activation, None
        super().__post_init__(**kwargs)

    def to_dict(self):
        return super().to_dict() | {
            "activation": NOTICE.format("AutoModelForSequenceClassification"),
            "original_activation": self.activation,
        }


class CompactT5Attention(T5Attention):
    """T5's attention with some of its heads.

    The layers of a stack share the relative position bias that the first of them makes. It stays at full width, (1, all
    heads, queries, keys), and each layer takes the heads that it has.
    """

    def __init__(self, whole):
        """`whole`: the T5Attention that this one takes the place of."""
        super().__init__(whole.config, whole.has_relative_attention_bias, whole.layer_idx, whole.is_causal)
        self.load_state_dict(whole.state_dict())
        self.to(whole.q.weight.device)
        self.kept_heads, self.all_heads = list(range(whole.n_heads)), whole.n_heads
        self._index = self._whole_bias = None

    def keep(self, heads):
        """Keep some heads, by their place among those that are there."""
        self.kept_heads = [self.kept_heads[head] for head in heads]
        self.n_heads = len(self.kept_heads)
        self.inner_dim = self.n_heads * self.key_value_proj_dim
        shrink((self.q, self.k, self.v), self.o, self.inner_dim)
        self._index = None

    def _own(self, position_bias):
        """The kept heads' part of (1, all heads, queries, keys)."""
        if self.n_heads == self.all_heads:
            return position_bias
        if self._index is None or self._index.device != position_bias.device:
            with torch.inference_mode(False):  # made in inference mode, it could not be trained with afterwards
                self._index = torch.tensor(self.kept_heads, device=position_bias.device)
        return position_bias.index_select(1, self._index)

    def compute_bias(self, *args, **kwargs):
        self._whole_bias = super().compute_bias(*args, **kwargs)
        return self._own(self._whole_bias)

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
    ):
        shared = position_bias
        if key_value_states is not None:
            # Cross-attention has none. T5 shares zeros of the first layer's heads; one zero is right for any number.
            position_bias = shared = hidden_states.new_zeros(1, 1, 1, 1)
        elif position_bias is not None:
            position_bias = self._own(position_bias)
        output, bias, weights = super().forward(
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        if shared is None:  # a stack's first layer, or one that is run alone
            shared, self._whole_bias = (self._whole_bias, None) if self.has_relative_attention_bias else (bias, None)
        return output, shared, weights


class CompactT5ForConditionalGeneration(T5ForConditionalGeneration):
    """T5 with as many heads and neurons in each module as its config says."""

    config_class = CompactT5Config

    def __init__(self, config):
        super().__init__(config)
        for name, module in [pair for pair in self.named_modules() if isinstance(pair[1], T5Attention)]:
            parent, _, own_name = name.rpartition(".")
            setattr(self.get_submodule(parent), own_name, CompactT5Attention(module))
        make_smaller(self, config)


class CompactDistilBertForSequenceClassification(DistilBertForSequenceClassification):
    """DistilBERT with as many heads and neurons in each module as its config says."""

    config_class = CompactDistilBertConfig

    def __init__(self, config):
        super().__init__(config)
        make_smaller(self, config)


def make_smaller(model, config):
    """Give the modules as many heads and neurons as the config says. The right weights are yet to be loaded."""
    for name, heads in (config.kept_heads or {}).items():
        keep_parts(model.get_submodule(name), heads)
    for name, neurons in (config.kept_neurons or {}).items():
        keep_parts(model.get_submodule(name), range(neurons))


def smaller(module, parts):
    """A module that does what some heads or neurons of `module` do; that one stays as it is."""
    is_plain = isinstance(module, T5Attention) and not isinstance(module, CompactT5Attention)
    own = CompactT5Attention(module) if is_plain else copy.deepcopy(module)
    keep_parts(own, parts)
    return own


def keep_parts(module, parts):
    """Make a module smaller, in place, to some of its heads or neurons.

    Its Linears are cut to size, whichever the parts are; only T5's attention must know which of its heads they are.
    """
    if isinstance(module, CompactT5Attention):
        module.keep(parts)
        return
    *inner, out = (child for child in module.children() if isinstance(child, nn.Linear))
    if isinstance(module, DistilBertSelfAttention):
        module.n_heads = len(parts)
        shrink(inner, out, module.n_heads * module.attention_head_size)
    else:
        shrink(inner, out, len(parts))


@torch.no_grad()
def shrink(inner, out, width):
    """Cut what lies between some Linears and the one that they feed down to `width`."""
    for linear in inner:
        linear.out_features = width
        linear.weight = nn.Parameter(linear.weight[:width].clone())  # (width, in)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[:width].clone())
    out.in_features = width
    out.weight = nn.Parameter(out.weight[:, :width].clone())  # (out, width)


for auto_model, compact_class in (
    (AutoModelForSeq2SeqLM, CompactT5ForConditionalGeneration),
    (AutoModelForSequenceClassification, CompactDistilBertForSequenceClassification),
):
    compact_class.config_class.register_for_auto_class()  # saving puts this file into the folder
    compact_class.register_for_auto_class(auto_model)
    # Once more where the suite and a folder's copy of this file meet in one process.
    AutoConfig.register(compact_class.config_class.model_type, compact_class.config_class, exist_ok=True)
    auto_model.register(compact_class.config_class, compact_class, exist_ok=True)
