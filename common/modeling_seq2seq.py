"""An encoder-decoder in the shape of `torch.nn.Transformer`, with embeddings and vocabularies of its own.

Its queries, keys, values and outputs are Linears apart, so that heads can be removed. Layers are normalised after each
sum, the encoder and the decoder once more at the end; positions are sinusoids that are added to the embeddings, which
are scaled by the square root of the width (Vaswani et al., arXiv 1706.03762).

This file needs torch and transformers alone, of a version that `NEEDS_TRANSFORMERS` says. A copy of it goes into the
folder of every such model, which then loads wherever these two are, with `trust_remote_code=True`; in a process that
has imported the suite it loads without.

A compact model is one that has fewer heads and neurons, as its config says. `kept_heads` and `kept_neurons` are those
of `modeling_compact`: by the dotted path of a block, the numbers that its heads have in the original, or a count.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IGNORED = -100  # the label of padding
NEEDS_TRANSFORMERS = ">=5.23"  # said in files; seen to load with 5.23.0 and 5.24.0


class Seq2SeqConfig(PreTrainedConfig):
    """`vocab_size` is the target's vocabulary, that of what the model generates."""

    model_type = "seq2seq"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "num_hidden_layers": "decoder_layers",
    }

    def __init__(
        self,
        source_vocab_size=8000,
        vocab_size=8000,
        d_model=512,
        heads=8,
        encoder_layers=3,
        decoder_layers=3,
        feed_forward_size=512,
        dropout=0.1,
        unk_token_id=0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        is_encoder_decoder=True,
        tie_word_embeddings=False,
        kept_heads=None,
        kept_neurons=None,
        **kwargs,
    ):
        self.source_vocab_size, self.vocab_size = source_vocab_size, vocab_size
        self.d_model, self.heads = d_model, heads
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.feed_forward_size = feed_forward_size
        self.dropout = dropout
        self.unk_token_id, self.decoder_start_token_id = unk_token_id, decoder_start_token_id
        self.kept_heads, self.kept_neurons = kept_heads, kept_neurons
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            decoder_start_token_id=decoder_start_token_id,
            is_encoder_decoder=is_encoder_decoder,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def to_dict(self):
        return super().to_dict() | {"needs_transformers": NEEDS_TRANSFORMERS}


# --- layers ------------------------------------------------------------------------------------------------------


def eager_attention(module, queries, keys, values, mask, dropout=0.0, scaling=1.0, **ignored):
    """Attention that tells its probabilities: (context (batch, length, heads, width), probabilities)."""
    scores = queries @ keys.transpose(2, 3) * scaling  # (batch, heads, length, keys)
    probabilities = (scores if mask is None else scores + mask).softmax(-1)
    context = nn.functional.dropout(probabilities, dropout, module.training) @ values
    return context.transpose(1, 2), probabilities


class Seq2SeqAttention(nn.Module):
    """Attention over the same tokens, or over the encoder's states, with a cache of keys and values."""

    is_causal = False  # the mask says what is seen

    def __init__(self, config, layer_idx):
        super().__init__()
        if config.d_model % config.heads:
            raise ValueError(f"'heads': {config.heads} do not divide the width {config.d_model}")
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.width = config.heads, config.d_model // config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.d_model, config.d_model) for _ in range(4))

    def keep(self, heads):
        """Have only so many heads; their right weights are loaded afterwards."""
        self.heads = heads
        shrink(self.q, self.k, self.v, out=self.o, width=heads * self.width)

    def forward(self, hidden_states, attention_mask=None, key_value_states=None, cache=None):
        """
        Args:
            hidden_states: (batch, length, d_model).
            attention_mask: is added to the scores, (batch or 1, 1, length or 1, keys).
            key_value_states: of the encoder, (batch, keys, d_model), in cross-attention.
            cache: an EncoderDecoderCache.
        Returns:
            (output, probabilities): (batch, length, d_model); (batch, heads, length, keys), or None unless the
            attention implementation is "eager".
        """
        keys, values = self._keys_and_values(hidden_states, key_value_states, cache)
        if not self.heads:
            return self.o(hidden_states[..., :0]), None  # its bias
        queries = self._parted(self.q(hidden_states))  # (batch, heads, length, width)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        rate = self.config.dropout if self.training else 0.0
        context, probabilities = attend(
            self, queries, keys, values, attention_mask, dropout=rate, scaling=self.width**-0.5
        )
        return self.o(context.flatten(2)), probabilities

    def _keys_and_values(self, hidden_states, key_value_states, cache):
        """Of all tokens so far, or of the encoder's states; (batch, heads, keys, width) each."""
        states = hidden_states if key_value_states is None else key_value_states
        if cache is not None and key_value_states is not None:
            cached = cache.cross_attention_cache
            if cache.is_updated.get(self.layer_idx):
                return cached.layers[self.layer_idx].keys, cached.layers[self.layer_idx].values
            cache.is_updated[self.layer_idx] = True
        elif cache is not None:
            cached = cache.self_attention_cache
        if self.heads:
            keys, values = self._parted(self.k(states)), self._parted(self.v(states))
        else:  # a cache is as long as what its first layer holds: a number a token stands for what is not there
            keys = values = states[:, None, :, :1]
        return (keys, values) if cache is None else cached.update(keys, values, self.layer_idx)

    def _parted(self, states):
        """(batch, length, heads * width) as (batch, heads, length, width)."""
        return states.unflatten(-1, (self.heads, self.width)).transpose(1, 2)


class Seq2SeqFeedForward(nn.Module):
    """Two Linears with a ReLU between them."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.wi = nn.Linear(config.d_model, config.feed_forward_size)
        self.wo = nn.Linear(config.feed_forward_size, config.d_model)

    def keep(self, neurons):
        """Have only so many neurons; their right weights are loaded afterwards."""
        shrink(self.wi, out=self.wo, width=neurons)

    def forward(self, hidden_states):
        return self.wo(dropout(self.wi(hidden_states).relu(), self.dropout, self.training))


@torch.no_grad()
def shrink(*inner, out, width):
    """Cut what lies between some Linears and the one that they feed down to `width`."""
    for linear in inner:
        linear.out_features = width
        linear.weight = nn.Parameter(linear.weight[:width].clone())
        linear.bias = nn.Parameter(linear.bias[:width].clone())
    out.in_features = width
    out.weight = nn.Parameter(out.weight[:, :width].clone())


class Seq2SeqLayer(nn.Module):
    """A layer of the encoder, or with cross-attention one of the decoder."""

    def __init__(self, config, layer_idx, is_decoder):
        super().__init__()
        self.dropout = config.dropout
        self.self_attention, self.self_norm = Seq2SeqAttention(config, layer_idx), nn.LayerNorm(config.d_model)
        self.cross_attention = None
        if is_decoder:
            self.cross_attention, self.cross_norm = Seq2SeqAttention(config, layer_idx), nn.LayerNorm(config.d_model)
        self.feed_forward, self.final_norm = Seq2SeqFeedForward(config), nn.LayerNorm(config.d_model)

    def forward(self, states, mask, encoded=None, encoded_mask=None, cache=None):
        states = self._added(states, self.self_attention(states, mask, cache=cache)[0], self.self_norm)
        if self.cross_attention is not None:
            attended, _ = self.cross_attention(states, encoded_mask, key_value_states=encoded, cache=cache)
            states = self._added(states, attended, self.cross_norm)
        return self._added(states, self.feed_forward(states), self.final_norm)

    def _added(self, states, change, norm):
        return norm(states + dropout(change, self.dropout, self.training))


# --- stacks ------------------------------------------------------------------------------------------------------


def additive(mask, dtype):
    """A mask as it is added to scores: of (batch, keys), 1 = seen, as (batch, 1, 1, keys). None and others stay."""
    if mask is None or mask.ndim == 4:
        return mask
    return (1 - mask[:, None, None].to(dtype)) * torch.finfo(dtype).min


def sinusoids(first, length, embeddings):
    """Vectors of so many positions, from `first` on, (length, width): sines at even places, cosines at odd ones."""
    width, dtype = embeddings.shape[-1], torch.promote_types(embeddings.dtype, torch.float32)
    positions = torch.arange(first, first + length, device=embeddings.device, dtype=dtype)[:, None]
    rates = torch.arange(0, width, 2, device=embeddings.device, dtype=dtype) * (-math.log(10000) / width)
    angles = positions * rates.exp()  # (length, half the width, rounded up)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width].to(embeddings.dtype)


class Seq2SeqStack(nn.Module):
    """The encoder or the decoder: embeddings, layers, and a norm at the end."""

    def __init__(self, config, vocabulary, layers, is_decoder):
        super().__init__()
        self.dropout, self.is_decoder = config.dropout, is_decoder
        self.embedding = nn.Embedding(vocabulary, config.d_model)
        self.layers = nn.ModuleList(Seq2SeqLayer(config, number, is_decoder) for number in range(layers))
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, input_ids, attention_mask=None, encoded=None, encoded_mask=None, cache=None, **ignored):
        """
        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), of the decoder's (batch, length with what the cache holds); 1 = seen. An
                additive one (batch, 1, 1, length) of the encoder.
            encoded: the encoder's states, (batch, source length, d_model), for the decoder, and their mask.
        Returns:
            BaseModelOutput with the states, (batch, length, d_model).
        """
        past = 0 if cache is None else cache.get_seq_length()
        length = input_ids.shape[1]
        embeddings = self.embedding(input_ids) * math.sqrt(self.embedding.embedding_dim)
        states = dropout(embeddings + sinusoids(past, length, embeddings), self.dropout, self.training)
        mask = additive(attention_mask, states.dtype)
        if self.is_decoder and length > 1:
            later = torch.ones(length, past + length, dtype=torch.bool, device=states.device).triu(past + 1)
            causal = torch.zeros_like(later, dtype=states.dtype).masked_fill(later, torch.finfo(states.dtype).min)
            mask = causal[None, None] if mask is None else torch.minimum(mask, causal)
        encoded_mask = additive(encoded_mask, states.dtype)
        for layer in self.layers:
            states = layer(states, mask, encoded, encoded_mask, cache)
        return BaseModelOutput(self.norm(states))


class Seq2SeqModel(nn.Module):
    """The encoder and the decoder, without the head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Seq2SeqStack(config, config.source_vocab_size, config.encoder_layers, is_decoder=False)
        self.decoder = Seq2SeqStack(config, config.vocab_size, config.decoder_layers, is_decoder=True)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        cache=None,
        use_cache=False,
    ):
        """
        Returns:
            (the decoder's states (batch, length, d_model), the encoder's, the cache or None).
        """
        encoded = self.encoder(input_ids, attention_mask)[0] if encoder_outputs is None else encoder_outputs[0]
        if use_cache and cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states = self.decoder(decoder_input_ids, decoder_attention_mask, encoded, attention_mask, cache)[0]
        return states, encoded, cache


class Seq2SeqForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model with a Linear over the target's vocabulary, which shares no weights with the embeddings."""

    config_class = Seq2SeqConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = Seq2SeqModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)
        for kept in (config.kept_heads, config.kept_neurons):
            for name, parts in (kept or {}).items():
                self.get_submodule(name).keep(parts if isinstance(parts, int) else len(parts))
        self.post_init()

    def _init_weights(self, module):
        """Xavier-uniform matrices, as `torch.nn.Transformer` has them; biases are zero."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def get_encoder(self, modality=None):
        return self.model.encoder

    def get_decoder(self):
        return self.model.decoder

    def get_input_embeddings(self):
        return self.model.encoder.embedding

    def set_input_embeddings(self, value):
        self.model.encoder.embedding = value

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_decoder_input_ids_from_labels(self, labels):
        """Labels (batch, length) one to the right, with the start token before them."""
        inputs = labels.roll(1, dims=1)
        inputs[:, 0] = self.config.decoder_start_token_id
        return inputs.masked_fill(inputs == IGNORED, self.config.pad_token_id)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        **ignored,
    ):
        """
        Args:
            input_ids: (batch, source length); `attention_mask`: of the same shape, 1 = seen.
            decoder_input_ids: (batch, length); without them the labels, shifted.
            cache: of what was decoded before; `past_key_values` until transformers 5.23.
            labels: (batch, length), IGNORED for padding.
        """
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        states, encoded, cache = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values if cache is None else cache,
            use_cache=bool(use_cache) and labels is None,
        )
        logits = self.lm_head(states)  # (batch, length, vocabulary)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        name = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"
        return Seq2SeqLMOutput(loss=loss, logits=logits, encoder_last_hidden_state=encoded, **{name: cache})


# --- compact models ----------------------------------------------------------------------------------------------


class CompactSeq2SeqConfig(Seq2SeqConfig):
    """A Seq2SeqConfig that says what is left of each block."""

    model_type = "compact-seq2seq"


class CompactSeq2SeqForConditionalGeneration(Seq2SeqForConditionalGeneration):
    """A Seq2SeqForConditionalGeneration with as many heads and neurons in each block as its config says."""

    config_class = CompactSeq2SeqConfig


for each in (Seq2SeqForConditionalGeneration, CompactSeq2SeqForConditionalGeneration):
    each.config_class.register_for_auto_class()  # saving puts this file into the folder
    each.register_for_auto_class("AutoModelForSeq2SeqLM")
    # Once more where the suite and a folder's copy of this file meet in one process.
    AutoConfig.register(each.config_class.model_type, each.config_class, exist_ok=True)
    AutoModelForSeq2SeqLM.register(each.config_class, each, exist_ok=True)
