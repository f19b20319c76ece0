"""The table of model families: where a model's blocks are, and how to run them.

A family is one entry in `FAMILIES` (and, for --compact, a call in `modeling_compact`). What its models are used for,
and what suits them, is in `defaults`. Nothing else in the suite knows a model type by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from common.runtime.errors import UserError

COMPACT = "compact-"  # in front of a model type: heads and neurons are gone, see `modeling_compact`


@dataclass(frozen=True)
class Attention:
    """An attention block: the module of some class, with its query, key, value and output Linear somewhere in it.

    Dotted paths within the module: of the Linears, and of the attribute that says how wide a head is. A Linear that is
    named several times has the rows of all these roles, one role after the other. The block's output is what `output`
    returns.
    """

    queries: str
    keys: str
    values: str
    output: str
    width: str
    beside: tuple[str, ...] = ()  # Linears that some models have, whose rows are the heads' too; they are never pruned
    kind = "attention"
    name = ""  # the block is named after its module

    @property
    def roles(self) -> tuple[str, ...]:
        """The Linears whose rows are the heads'."""
        return self.queries, self.keys, self.values


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: Linears of a module, which may hold other things too.

    `roles`, `output`: dotted paths within the module, of one inner Linear or several, which have the same input, and of
    the output Linear. An inner Linear that is named several times has several rows a neuron, as `Attention`'s.
    `between`: (module, output of each inner Linear): what enters the output Linear, entry by entry, without dropout.
    `name`: what is added to the module's name; "" where the module holds nothing else.
    """

    roles: tuple[str, ...]
    output: str
    between: Callable
    name: str = ""
    kind = "feed_forward"


@dataclass(frozen=True)
class Family:
    """What the suite must know of a model type.

    `model_classes`: {task: class in transformers, or of our own}, the usual task first.
    `layouts`: {class name of a module: its block}.
    `run`: (model, batch): every block, but neither the head nor the loss.
    `decoder`: the part of the model whose blocks see the target's tokens; "" if it has none.
    `positions`: (config): how many tokens there are positions for; None where they are relative.
    `norm_first`: whether the hidden states are normalized before a block, and not after its output was added to them.
    What a config counts, by the names of its settings, see `plain`:
    `heads`: the heads of every attention; None where it ties their number to the hidden size.
    `neurons`: {side: the neurons of every feed-forward block}.
    `layers`: {side: the layers}, where one without blocks passes on what it gets: no norm after it, no biases.
    """

    model_classes: dict[str, str]
    layouts: dict[str, Attention | FeedForward]
    run: Callable
    decoder: str = ""
    positions: Callable = lambda config: getattr(config, "max_position_embeddings", None)
    norm_first: bool = False
    heads: str | None = None
    neurons: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        """What can translate can summarize: to the model it is one task."""
        if "translation" in self.model_classes:
            self.model_classes.setdefault("summarization", self.model_classes["translation"])


def decoder_inputs(model, labels):
    """The decoder's inputs (batch, length) that a model makes of labels, which are shifted by one."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    from transformers.models.bart.modeling_bart import shift_tokens_right  # M2M100's is the same

    return shift_tokens_right(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def _run_t5(model, batch):
    encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    # The causal mask alone keeps target padding, which is at the end, out of the real positions.
    model.decoder(
        input_ids=model._shift_right(batch["labels"]),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=batch["attention_mask"],
        use_cache=False,
    )


def _run_encoder_decoder(model, batch):
    model.base_model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=decoder_inputs(model, batch["labels"]),
        use_cache=False,
    )


def _run_encoder(model, batch, **settings):
    """Pairs of texts have token types, unless the model or its tokenizer knows none."""
    names = {"input_ids", "attention_mask", "token_type_ids"} & batch.keys()
    model.base_model(**{name: batch[name] for name in names}, **settings)


def _run_deberta(model, batch):
    _run_encoder(model, batch, output_attentions=True)  # its attention returns no probabilities otherwise


def _t5_like(prefix: str) -> dict:
    """Blocks of a T5-like model; the gated feed-forward is that of T5 1.1 and later."""
    return {
        f"{prefix}Attention": Attention("q", "k", "v", "o", width="key_value_proj_dim"),
        f"{prefix}DenseActDense": FeedForward(("wi",), "wo", lambda module, hidden: module.act(hidden)),
        f"{prefix}DenseGatedActDense": FeedForward(
            ("wi_0", "wi_1"), "wo", lambda module, gate, hidden: module.act(gate) * hidden
        ),
    }


def _t5_family(prefix: str) -> Family:
    return Family(
        {"translation": f"{prefix}ForConditionalGeneration"},
        _t5_like(prefix),
        _run_t5,
        decoder="decoder",
        norm_first=True,
        heads="num_heads",
        neurons={"encoder": "d_ff", "decoder": "d_ff"},
        layers={"encoder": "num_layers", "decoder": "num_decoder_layers"},
    )


def _bart_like(prefix: str) -> dict:
    """Blocks of a BART-like model: its feed-forward Linears lie in the layer itself."""
    feed_forward = FeedForward(("fc1",), "fc2", lambda layer, hidden: layer.activation_fn(hidden), "feed_forward")
    return {
        f"{prefix}Attention": Attention("q_proj", "k_proj", "v_proj", "out_proj", width="head_dim"),
        f"{prefix}EncoderLayer": feed_forward,
        f"{prefix}DecoderLayer": feed_forward,
    }


def _bert_like(prefix: str, projections=("query", "key", "value"), **beside) -> dict:
    """Blocks of a BERT-like model: the Linears of either lie in several modules. Its head and pooler are no blocks."""
    return {
        f"{prefix}Attention": Attention(
            *(f"self.{name}" for name in projections), "output.dense", width="self.attention_head_size", **beside
        ),
        f"{prefix}Layer": FeedForward(
            ("intermediate.dense",),
            "output.dense",
            lambda layer, hidden: layer.intermediate.intermediate_act_fn(hidden),
            "feed_forward",
        ),
    }


def _bart_family(prefix: str, head: str = "ForConditionalGeneration", *, norm_first: bool = False) -> Family:
    return Family(
        {"translation": f"{prefix}{head}"},
        _bart_like(prefix),
        _run_encoder_decoder,
        decoder="model.decoder",
        norm_first=norm_first,
        neurons={"encoder": "encoder_ffn_dim", "decoder": "decoder_ffn_dim"},
    )


def _bert_family(prefix: str, **settings) -> Family:
    classes = {"classification": f"{prefix}ForSequenceClassification"}
    return Family(classes, _bert_like(prefix), _run_encoder, neurons={"encoder": "intermediate_size"}, **settings)


def _gated_modernbert(module, hidden):
    gated, gate = hidden.chunk(2, dim=-1)
    return module.act(gated) * gate


def _after_padding(config):
    """RoBERTa counts positions from the one after the padding token's number."""
    if config.pad_token_id is None or config.pad_token_id + 1 >= config.max_position_embeddings:
        raise UserError(
            f"config.json: 'pad_token_id': {config.pad_token_id} where a number below 'max_position_embeddings' belongs"
        )
    return config.max_position_embeddings - config.pad_token_id - 1


def _if_biased(config):
    """DeBERTa has positions of its own only where its input is biased by them."""
    return config.max_position_embeddings if config.position_biased_input else None


FAMILIES = {
    "t5": _t5_family("T5"),
    "mt5": _t5_family("MT5"),
    "umt5": _t5_family("UMT5"),
    "bart": _bart_family("Bart"),
    "mbart": _bart_family("MBart", norm_first=True),
    "m2m_100": _bart_family("M2M100", norm_first=True),  # and NLLB
    "marian": _bart_family("Marian", "MTModel"),
    "pegasus": _bart_family("Pegasus", norm_first=True),
    "distilbert": Family(
        {"classification": "DistilBertForSequenceClassification"},
        {
            "DistilBertSelfAttention": Attention("q_lin", "k_lin", "v_lin", "out_lin", width="attention_head_size"),
            "FFN": FeedForward(("lin1",), "lin2", lambda module, hidden: module.activation(hidden)),
        },
        _run_encoder,
        neurons={"encoder": "hidden_dim"},
    ),
    "bert": _bert_family("Bert"),
    "roberta": _bert_family("Roberta", positions=_after_padding),
    "xlm-roberta": _bert_family("XLMRoberta", positions=_after_padding),
    "electra": _bert_family("Electra"),
    "deberta-v2": replace(
        _bert_family("DebertaV2", positions=_if_biased),
        layouts=_bert_like(
            "DebertaV2", ("query_proj", "key_proj", "value_proj"), beside=("self.pos_query_proj", "self.pos_key_proj")
        ),
        run=_run_deberta,
    ),
    "modernbert": Family(
        {"classification": "ModernBertForSequenceClassification"},
        {
            "ModernBertAttention": Attention("Wqkv", "Wqkv", "Wqkv", "Wo", width="head_dim"),
            "ModernBertMLP": FeedForward(("Wi", "Wi"), "Wo", _gated_modernbert),
        },
        _run_encoder,
        neurons={"encoder": "intermediate_size"},
        norm_first=True,
    ),
}
REFUSED = {  # model types that look as if they belonged here
    "albert": "all of its layers share one block's parameters, so no layer can be pruned on its own",
    "deberta": "its queries, keys and values share a Linear head by head; versions 2 and 3 are supported",
    "funnel": "its layers shorten the text, so that a block's tokens are not those of the input",
    "xlnet": "its attention has no Linears",
    **dict.fromkeys(
        ("led", "longformer", "longt5", "big_bird", "bigbird_pegasus"),
        "its attention cuts the text into windows, so that a block's tokens or probabilities are not its",
    ),
}


def family_name(model_type: str) -> str:
    """The name of a model type's family, a compact model's or not.

    Raises:
        UserError: the suite does not know the model type.
    """
    name = model_type.removeprefix(COMPACT)
    if name in REFUSED:
        raise UserError(f"model type {model_type!r} is not supported: {REFUSED[name]}")
    if name not in FAMILIES:
        reason = ": it is a decoder alone, and not an encoder or encoder-decoder" if _only_continues(name) else ""
        raise UserError(f"model type {model_type!r} is not supported{reason}; known are {', '.join(FAMILIES)}")
    return name


def _only_continues(model_type):
    """Whether transformers has a model type for causal language modelling, and for nothing else that writes or fills
    gaps."""
    from transformers.models.auto import modeling_auto as auto

    others = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() | auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - others


def family_named(model_type: str) -> Family:
    """The family of a model type, see `family_name`."""
    return FAMILIES[family_name(model_type)]


def family_of(config) -> Family:
    """The family of a transformers config, a compact model's or not.

    Raises:
        UserError: the suite does not know the model type.
    """
    return family_named(config.model_type)
