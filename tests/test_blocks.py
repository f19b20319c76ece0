"""Blocks found by name, and replays against the block's own output in a plain run of the whole model."""

import copy

import pytest
import torch
from tiny import CLASSIFIERS, MODELS, build_model, padded_batch

from common.blocks.calls import block_calls, token_mask
from common.blocks.find import find_blocks, prunable_modules
from common.blocks.tensors import aliasing_copy, block_tensors, set_block, set_shared, shared_parameters
from common.runtime.errors import UserError

KINDS = [
    "t5",
    "t5-gated",
    "bart",
    "bert",
    "distilbert",
    "deberta-v2",
    "modernbert",
]  # each with modules of a kind of its own


def plain_outputs(model, batch, names):
    """What the named modules give in an ordinary forward pass of the whole model: {name: hidden states}."""
    outputs, handles = {}, []
    for name in names:

        def hook(module, args, output, name=name):
            outputs[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return outputs


def output_linear(block):
    return f"{block.root}.{block.output}"


# --- where the blocks are ------------------------------------------------------------------------------------------

QKVO = ("q", "k", "v", "o")


def t5_blocks(forward):
    """(name, linears, heads, side) of every block of the tiny T5, written out by hand."""
    expected = []
    for i in range(2):
        expected += [
            (f"encoder.block.{i}.layer.0.SelfAttention", QKVO, 4, "encoder"),
            (f"encoder.block.{i}.layer.1.DenseReluDense", forward, 0, "encoder"),
        ]
    for i in range(2):
        expected += [
            (f"decoder.block.{i}.layer.0.SelfAttention", QKVO, 4, "decoder"),
            (f"decoder.block.{i}.layer.1.EncDecAttention", QKVO, 4, "decoder"),
            (f"decoder.block.{i}.layer.2.DenseReluDense", forward, 0, "decoder"),
        ]
    return expected


def modernbert_blocks():
    expected = []
    for i in range(2):
        expected += [
            (f"model.layers.{i}.attn", ("Wqkv", "Wo"), 4, "encoder"),
            (f"model.layers.{i}.mlp", ("Wi", "Wo"), 0, "encoder"),
        ]
    return expected


def distilbert_blocks():
    expected = []
    for i in range(2):
        expected += [
            (f"distilbert.transformer.layer.{i}.attention", ("q_lin", "k_lin", "v_lin", "out_lin"), 4, "encoder"),
            (f"distilbert.transformer.layer.{i}.ffn", ("lin1", "lin2"), 0, "encoder"),
        ]
    return expected


def bert_blocks(base="bert", projections=("self.query", "self.key", "self.value")):
    """The out-projection lies in another module than q, k and v, the feed-forward Linears in two."""
    expected = []
    for i in range(2):
        layer = f"{base}.encoder.layer.{i}"
        expected += [
            (f"{layer}.attention", (*projections, "output.dense"), 4, "encoder"),
            (f"{layer}.feed_forward", ("intermediate.dense", "output.dense"), 0, "encoder"),
        ]
    return expected


def bart_blocks():
    """The feed-forward Linears lie in the layer, beside the attention modules."""
    expected, qkvo = [], ("q_proj", "k_proj", "v_proj", "out_proj")
    for side, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        for i in range(2):
            layer = f"model.{side}.layers.{i}"
            expected += [(f"{layer}.{name}", qkvo, 4, side) for name in attentions]
            expected.append((f"{layer}.feed_forward", ("fc1", "fc2"), 0, side))
    return expected


DEBERTA_LINEARS = ("self.query_proj", "self.key_proj", "self.value_proj")
EXPECTED = {
    "t5": t5_blocks(("wi", "wo")),
    "distilbert": distilbert_blocks(),
    **{kind: bert_blocks(base) for kind, base in (("bert", "bert"), ("electra", "electra"))},
    "modernbert": modernbert_blocks(),
    **{kind: bert_blocks("roberta") for kind in ("roberta", "xlm-roberta")},
    **{kind: bert_blocks("deberta", DEBERTA_LINEARS) for kind in ("deberta-v2", "deberta-v2-unshared")},
    **{kind: t5_blocks(("wi_0", "wi_1", "wo")) for kind in ("t5-gated", "t5-flan", "mt5", "umt5")},
    **{kind: bart_blocks() for kind in ("bart", "mbart", "m2m_100", "marian", "pegasus")},
}


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_by_hand(kind):
    """Whatever else is a Linear, such as a classifier's dense layer, is in no block."""
    blocks, expected = find_blocks(build_model(kind)), EXPECTED[kind]
    assert [(b.name, b.linears, b.heads, b.side) for b in blocks.values()] == expected
    for name, block in blocks.items():
        assert block.name == name and block.has_bias == ("t5" not in kind and kind != "modernbert")
        assert block.kind == ("attention" if block.heads else "feed_forward")


def test_prunable_modules_of_a_t5_layer_by_hand():
    """o is d_model 32 by 4 heads of 6; wi and wo are 48 by 32. The attention module stands for q, k and v."""
    modules = prunable_modules(build_model("t5"))
    layer, forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    assert list(modules)[:4] == [layer, f"{layer}.o", f"{forward}.wi", f"{forward}.wo"]
    assert list(modules.values())[:4] == [
        {"kind": "attention", "heads": 4},
        {"kind": "linear", "weights": 768, "block": layer, "linear": "o"},
        {"kind": "linear", "weights": 1536, "block": forward, "linear": "wi"},
        {"kind": "linear", "weights": 1536, "block": forward, "linear": "wo"},
    ]
    assert len(modules) == 2 * 4 + 2 * 6


# --- get and replace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_tensors_are_the_models_own_and_come_back_through_set_block(kind):
    model, other = build_model(kind), build_model(kind)
    torch.manual_seed(1)
    for block in find_blocks(model).values():
        tensors = block_tensors(model, block)
        assert {key.rpartition(".")[0] for key in tensors} == set(block.linears)
        new = {key: torch.randn_like(tensor) for key, tensor in tensors.items()}
        set_block(model, block, new)
        state = model.state_dict()
        assert all(torch.equal(state[f"{block.root}.{key}"], new[key]) for key in new)
        set_block(model, block, block_tensors(other, block))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_sharing_copy_takes_no_memory_and_leaves_the_model_alone(kind):
    """Oracle: a deep copy that the same tensors are copied into."""
    model, batch = build_model(kind), padded_batch(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alias, twin, blocks = aliasing_copy(model), copy.deepcopy(model), find_blocks(model)
    own = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in alias.named_parameters()} == own
    assert not any(parameter.requires_grad for parameter in alias.parameters())
    torch.manual_seed(1)
    first, *others = blocks.values()
    new = {name: 0.1 * torch.randn_like(tensor) for name, tensor in block_tensors(model, first).items()}
    shared = {
        name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in shared_parameters(model, blocks).items()
    }
    set_block(alias, first, new)
    set_shared(alias, shared)
    with torch.no_grad():
        for name, tensor in ({f"{first.root}.{name}": tensor for name, tensor in new.items()} | shared).items():
            twin.get_parameter(name).copy_(tensor)
        assert torch.equal(alias(**batch).logits, twin(**batch).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    given = {tensor.data_ptr() for tensor in new.values()}
    assert {tensor.data_ptr() for tensor in block_tensors(alias, first).values()} == given
    elsewhere = aliasing_copy(copy.deepcopy(model).to("meta"))
    set_block(elsewhere, first, new)  # whose tensors are on the CPU
    set_shared(elsewhere, shared)
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}
    with pytest.raises(UserError, match="holds tensors"):
        set_block(alias, others[0], {})
    with pytest.raises(UserError, match="the shared parameters: holds x"):
        set_shared(alias, {"x": torch.zeros(1)})


# --- replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_replays_what_its_output_linear_gives_in_a_plain_run(kind):
    """And with other tensors what a copy of the model with these in it gives. Feed-forward blocks are visited alone."""
    model, batch = build_model(kind), padded_batch(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model)
    expected = plain_outputs(model, batch, map(output_linear, blocks.values()))
    with torch.no_grad():
        calls = block_calls(model, blocks.values(), batch)
        for call in calls:
            wanted, own = expected[output_linear(call.block)], block_tensors(model, call.block)
            assert torch.equal(call.output, wanted), call.block.name
            assert torch.equal(call.replay(own), wanted), call.block.name
            torch.manual_seed(2)
            tensors = {name: 0.1 * torch.randn_like(tensor) for name, tensor in own.items()}
            twin = copy.deepcopy(model)
            set_block(twin, call.block, tensors)
            (other,) = plain_outputs(twin, batch, [output_linear(call.block)]).values()
            assert torch.equal(call.replay(tensors), other), call.block.name
            assert not torch.allclose(other, wanted), call.block.name
        assert [call.block for call in calls] == list(blocks.values())
        named = [block for block in blocks.values() if block.kind == "feed_forward"]
        assert [call.block for call in block_calls(model, named, batch)] == named
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_has_gradients_for_its_own_tensors_only(kind):
    model, batch = build_model(kind).requires_grad_(False), padded_batch(kind)
    with torch.no_grad():
        calls = block_calls(model, find_blocks(model).values(), batch)
    for call in calls:
        own = block_tensors(model, call.block)
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
        call.replay(tensors).pow(2).sum().backward()
        key_bias = f"{call.block.linears[1]}.bias"  # of an attention block: it moves all of a row's scores alike
        for name, tensor in tensors.items():
            assert tensor.grad.abs().sum() > 0 or name == key_bias, (call.block.name, name)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, name, expected",
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention", [[1] * 7, [1] * 4 + [0] * 3]),
        ("t5", "decoder.block.1.layer.1.EncDecAttention", [[1] * 6, [1] * 3 + [0] * 3]),
        ("distilbert", "distilbert.transformer.layer.0.ffn", [[1] * 7, [1] * 4 + [0] * 3]),
    ],
)
def test_real_tokens_by_hand(kind, name, expected):
    mask = token_mask(find_blocks(build_model(kind))[name], padded_batch(kind))
    assert mask.dtype == torch.bool and mask.int().tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_reach_the_real_tokens_of_any_block(kind):
    """Three more columns of padding change no block's output at real tokens: what the masks promise."""
    model, batch = build_model(kind), padded_batch(kind)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
        "labels": batch["labels"]
        if kind in CLASSIFIERS
        else torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
    }
    blocks, real = find_blocks(model), []
    for one in (batch, wider):
        with torch.no_grad():
            calls = block_calls(model, blocks.values(), one)
        real.append({call.block.name: call.output[token_mask(call.block, one)] for call in calls})
    for name in blocks:
        torch.testing.assert_close(real[1][name], real[0][name], rtol=1e-4, atol=1e-5)
