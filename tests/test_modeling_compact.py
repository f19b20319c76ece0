"""Compact models of every family against the full-size models that they are cut from.

The oracle is transformers' own class, with zeros for the weights and biases of the heads and neurons that are gone. Its
blocks are written down here by hand, and so are the shapes that are left.
"""

import copy
import io
import json
import pickle
import random
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from common.models import modeling_compact
from common.models.compact import layouts_of

# --- tiny models -------------------------------------------------------------------------------------------------

T5_SETTINGS = dict(
    vocab_size=64, d_model=32, d_kv=6, num_heads=4, d_ff=48, num_layers=3, pad_token_id=0, decoder_start_token_id=0
)  # 4 heads of 6: the inner width is not d_model, nor divides it
BART_SETTINGS = dict(
    vocab_size=64,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=8,
    encoder_ffn_dim=48,
    decoder_ffn_dim=40,
    max_position_embeddings=64,
)
MARIAN_SETTINGS = BART_SETTINGS | dict(
    pad_token_id=63, decoder_start_token_id=63, activation_function="swish", scale_embedding=True
)  # as the checkpoints of OPUS-MT have it

MODELS = {  # kind: (model class, settings)
    "t5": ("T5ForConditionalGeneration", T5_SETTINGS),
    "t5-gated": (
        "T5ForConditionalGeneration",
        T5_SETTINGS | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "bart": ("BartForConditionalGeneration", BART_SETTINGS),
    "marian-two-vocabularies": (
        "MarianMTModel",
        MARIAN_SETTINGS | dict(share_encoder_decoder_embeddings=False, vocab_size=70, decoder_vocab_size=64),
    ),
    "bert": (
        "BertForSequenceClassification",
        dict(
            vocab_size=64,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=3,
            intermediate_size=48,
            max_position_embeddings=64,
            num_labels=3,
        ),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        dict(vocab_size=64, dim=32, n_heads=4, n_layers=3, hidden_dim=48, max_position_embeddings=64, num_labels=3),
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        dict(
            vocab_size=64,
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=3,
            intermediate_size=48,
            max_position_embeddings=64,
            local_attention=4,
            global_attn_every_n_layers=2,
            attention_bias=True,
            mlp_bias=True,
            num_labels=3,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
            pad_token_id=0,
        ),
    ),
}
MODELS |= {f"{kind}-left-out": MODELS[kind] for kind in ("t5", "bart", "bert", "modernbert")}
KINDS = list(MODELS)  # of those "left-out", whole blocks go
WRITERS = [kind for kind, (name, _) in MODELS.items() if "Classification" not in name]  # those that generate
TIED = ["bart", "bart-left-out"]
AUTO_MODELS = {
    kind: "AutoModelForSeq2SeqLM" if kind in WRITERS else "AutoModelForSequenceClassification" for kind in KINDS
}
ENDS = [1, *range(45, 50)]  # so many end tokens make random models end some rows early


class Block(NamedTuple):
    inner: tuple[str, ...]  # Linears, as dotted paths within the root module
    out: str
    parts: int  # heads or neurons
    is_attention: bool = True
    folds: int = 1  # roles that share a Linear, one after the other


def blocks(kind):
    """{root module: Block}"""
    found = {}
    if kind.startswith("t5"):
        inner = ("wi_0", "wi_1") if kind.startswith("t5-gated") else ("wi",)
        for layer in range(3):
            for side, names in (
                ("encoder", ["0.SelfAttention"]),
                ("decoder", ["0.SelfAttention", "1.EncDecAttention"]),
            ):
                root = f"{side}.block.{layer}.layer"
                found |= {f"{root}.{name}": Block(("q", "k", "v"), "o", 4) for name in names}
                found[f"{root}.{len(names)}.DenseReluDense"] = Block(inner, "wo", 48, False)
    elif kind in WRITERS:
        linears = ("q_proj", "k_proj", "v_proj"), "out_proj"
        for layer in range(2):
            for side, heads, neurons in (("encoder", 4, 48), ("decoder", 8, 40)):
                root = f"model.{side}.layers.{layer}"
                found[f"{root}.self_attn"] = Block(*linears, heads)
                if side == "decoder":
                    found[f"{root}.encoder_attn"] = Block(*linears, heads)
                found[root] = Block(("fc1",), "fc2", neurons, False)
    for layer in range(3):
        if kind.startswith("bert"):
            root = f"bert.encoder.layer.{layer}"
            found[f"{root}.attention"] = Block(("self.query", "self.key", "self.value"), "output.dense", 4)
            found[root] = Block(("intermediate.dense",), "output.dense", 48, False)
        elif kind.startswith("distilbert"):
            root = f"distilbert.transformer.layer.{layer}"
            found[f"{root}.attention"] = Block(("q_lin", "k_lin", "v_lin"), "out_lin", 4)
            found[f"{root}.ffn"] = Block(("lin1",), "lin2", 48, False)
        elif kind.startswith("modernbert"):
            root = f"model.layers.{layer}"
            found[f"{root}.attn"] = Block(("Wqkv",), "Wo", 4, folds=3)
            found[f"{root}.mlp"] = Block(("Wi",), "Wo", 48, False, folds=2)
    return found


@torch.no_grad()
def full_size(kind):
    """A model in which every head, neuron and bias counts, and whose translations differ."""
    torch.manual_seed(0)
    name, settings = MODELS[kind]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**settings)).eval()
    if kind.startswith("t5"):  # tied, it would echo
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower() and parameter.requires_grad:  # Marian's positions are fixed
            parameter.normal_(std=0.3)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    if model.can_generate():
        model.generation_config.eos_token_id = ENDS
    return model


def drawn_cut(kind):
    """{root module: numbers of the parts that are kept}, different ones everywhere; every fourth module is whole.

    Where blocks are left out, these are all of the first layer, where T5 makes its position biases, and a decoder's
    second self-attention.
    """
    draw, cut = random.Random(kind), {}
    for number, (root, block) in enumerate(blocks(kind).items()):
        if kind.endswith("left-out") and (re.search(r"\d", root)[0] == "0" or number == 7):
            cut[root] = []
        elif number % 4 != (0 if kind == "t5-gated" else 1):  # T5: the first layer, whose position bias others use
            cut[root] = sorted(draw.sample(range(block.parts), draw.randint(1, block.parts - 1)))
    return cut


def what_is_left(kind):
    """A compact config's own settings."""
    cut, of = drawn_cut(kind), blocks(kind)
    return {
        "layouts": layouts_of(getattr(transformers, MODELS[kind][0]).config_class()),
        "kept_heads": {root: kept for root, kept in cut.items() if of[root].is_attention},
        "kept_neurons": {root: len(kept) for root, kept in cut.items() if not of[root].is_attention},
    }


def rows_of(model, root, block, kept):
    """Which rows of the inner Linears, and columns of the output one, belong to some parts."""
    size = model.get_submodule(f"{root}.{block.out}").in_features
    width = size // block.parts
    columns = [part * width + i for part in kept for i in range(width)]
    rows = [fold * size + column for fold in range(block.folds) for column in columns]
    return torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


@torch.no_grad()
def masked_and_compact(kind):
    """A model with zeros for what is gone; the compact one; and the weights that this one was given, cut by hand."""
    masked, of = full_size(kind), blocks(kind)
    state = copy.deepcopy(masked.state_dict())
    for root, kept in drawn_cut(kind).items():
        block = of[root]
        out = masked.get_submodule(f"{root}.{block.out}")
        rows, columns = rows_of(masked, root, block, kept)
        gone = torch.ones(out.in_features, dtype=torch.bool)
        gone[columns] = False
        for name in (f"{root}.{linear}.{part}" for linear in block.inner for part in ("weight", "bias")):
            if name in state:
                masked.get_parameter(name)[gone.repeat(block.folds)] = 0
                state[name] = state[name][rows]
        out.weight[:, gone] = 0
        state[f"{root}.{block.out}.weight"] = state[f"{root}.{block.out}.weight"][:, columns]
    compact_class = getattr(modeling_compact, f"Compact{MODELS[kind][0]}")
    settings = {name: value for name, value in masked.config.to_dict().items() if name not in ("model_type", "dtype")}
    compact, report = compact_class.from_pretrained(
        None,
        config=compact_class.config_class(**settings, **what_is_left(kind)),
        state_dict=copy.deepcopy(state),
        output_loading_info=True,
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    if compact.can_generate():
        compact.generation_config = copy.deepcopy(masked.generation_config)
    return masked, compact.eval(), state


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """(kind, masked model, compact model, its state as cut by hand)"""
    return request.param, *masked_and_compact(request.param)


def batch(kind):
    """Five examples of 9, 7, 4, 2 tokens and one."""
    generator = torch.Generator().manual_seed(0)
    real = torch.tensor([[position < length for position in range(9)] for length in (9, 7, 4, 2, 1)])
    padding = MODELS[kind][1].get("pad_token_id", 1 if kind.startswith("bart") else 0)
    ids = torch.randint(3, 62, (5, 9), generator=generator).masked_fill(~real, padding)
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    if kind in WRITERS:
        inputs["decoder_input_ids"] = torch.randint(3, 62, (5, 6), generator=generator)
    return inputs


def through_torch(model):
    """What `torch.save` makes of a whole model, read again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def logits(model, kind):
    return model(**batch(kind)).logits


def translations(model, kind, **search):
    """Token ids; no token may come twice, because a random model tends to repeat one forever."""
    inputs = {name: tensor for name, tensor in batch(kind).items() if name != "decoder_input_ids"}
    return model.generate(**inputs, **search, do_sample=False, max_new_tokens=12, no_repeat_ngram_size=1).tolist()


def same_state(model, expected):
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


# --- the same function -------------------------------------------------------------------------------------------


def test_weights_are_the_given_ones_and_tied_where_the_config_says_so(case):
    """Oracle: the state dict that was cut by hand, and the original's ties."""
    kind, masked, compact, state = case
    assert same_state(compact, state)
    for model in (masked, compact):
        assert len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters())) == (
            3 if kind in TIED else 1 if kind == "marian-two-vocabularies" else 2 if kind.startswith("t5") else 0
        )


def test_logits_stay(case):
    kind, masked, compact, _ = case
    for attention in ("eager", "sdpa"):
        masked.set_attn_implementation(attention)
        compact.set_attn_implementation(attention)
        expected = logits(masked, kind)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits(compact, kind), expected, rtol=0, atol=1e-4)  # a wrong head costs 1e-2
    for copied in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact)), through_torch(compact)):
        assert torch.equal(logits(copied, kind), logits(compact, kind)) and type(copied) is type(compact)


SEARCHES = [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}]


def test_translations_stay(case):
    """Oracle: the masked model's token ids, by every search."""
    kind, masked, compact, _ = case
    if kind not in WRITERS:
        pytest.skip("it classifies")
    found = []
    for search in SEARCHES:
        found.append(translations(masked, kind, **search))
        assert translations(compact, kind, **search) == found[-1], search
    greedy, uncached, static, _ = found
    assert greedy == uncached == static
    assert len({tuple(row) for row in greedy}) > 3 and len({token for row in greedy for token in row}) > 12


@pytest.mark.parametrize("kind", ["t5", "bart-left-out", "bert", "modernbert"])
def test_gradients_of_what_is_left_stay(kind):
    """Oracle: the masked model's gradients, cut by hand.

    A run in inference mode comes first: what it leaves behind must not get in the way of training.
    """
    masked, compact, _ = masked_and_compact(kind)
    inputs = batch(kind)
    labels = inputs.pop("decoder_input_ids") if kind in WRITERS else torch.tensor([0, 1, 2, 1, 0])
    with torch.inference_mode():
        compact(**inputs, labels=labels)
    gradients = []
    for model in (masked, compact):
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    expected, of = gradients[0], blocks(kind)
    for root, kept in drawn_cut(kind).items():
        block, (rows, columns) = of[root], rows_of(masked, root, of[root], kept)
        for name in (f"{root}.{linear}.{part}" for linear in block.inner for part in ("weight", "bias")):
            if name in expected:
                expected[name] = expected[name][rows]
        expected[f"{root}.{block.out}.weight"] = expected[f"{root}.{block.out}.weight"][:, columns]
    assert gradients[1].keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is None:  # Marian's positions; shared embeddings that are not shared
            assert gradients[1][name] is None or "embed_positions" in name  # loading made these trainable
        elif gradient.numel():  # of a block that is left out, there is nothing
            atol = 1e-4 * gradient.abs().max().item() + 1e-6  # that of a key bias is zero but for rounding
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=atol)


# --- on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
    """(kind, masked model, compact model, its folder)"""
    kind, masked, compact, _ = case
    folder = tmp_path_factory.mktemp("saved") / kind
    compact.save_pretrained(folder)
    return kind, masked, compact, folder


def test_it_comes_back(saved):
    kind, masked, compact, folder = saved
    expected = logits(compact, kind)
    own = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"}
    for loader in (type(compact), getattr(transformers, AUTO_MODELS[kind])):
        loaded = loader.from_pretrained(folder)
        assert type(loaded) is type(compact) and same_state(loaded, compact.state_dict())
        assert torch.equal(logits(loaded, kind), expected)
        assert {name: getattr(loaded.config, name) for name in what_is_left(kind)} == what_is_left(kind)
        for name in masked.config.to_dict().keys() - own:
            assert getattr(loaded.config, name) == getattr(masked.config, name), name


def test_its_files_are_the_originals_and_what_is_left(saved, tmp_path):
    """By hand: what config.json has beside, and instead of, the original's; no weight is under another name."""
    kind, masked, compact, folder = saved
    masked.save_pretrained(tmp_path)
    plain, own = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    name, config_name = MODELS[kind][0], type(masked.config).__name__
    assert own == plain | what_is_left(kind) | {
        "architectures": [f"Compact{name}"],
        "auto_map": {
            "AutoConfig": f"modeling_compact.Compact{config_name}",
            AUTO_MODELS[kind]: f"modeling_compact.Compact{name}",
        },
        "model_type": f"compact-{masked.config.model_type}",
    }
    names = []
    for path in (tmp_path, folder):
        with safe_open(path / "model.safetensors", "pt") as weights:
            names.append(set(weights.keys()))
    assert names[0] == names[1]
    assert (folder / "modeling_compact.py").read_bytes() == Path(modeling_compact.__file__).read_bytes()
