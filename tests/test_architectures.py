"""Blocks found by name, and replays against the block's own output in a plain run of the whole model."""

import copy

import pytest
import torch
from conftest import build_model, distilbert_config, t5_config

from common.architectures import (
    FAMILIES,
    block_tensors,
    family_of,
    find_blocks,
    prunable_modules,
    set_block,
    token_mask,
    watched,
)
from common.errors import UserError

KINDS = ["t5", "t5-gated", "distilbert"]


def padded_batch(kind):
    """Two examples of random tokens, the second shorter than the first in source and target."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(2, 64, (2, 7), generator=generator), torch.ones(2, 7, dtype=torch.int64)
    ids[1, 4:], mask[1, 4:] = 0, 0
    labels = torch.tensor([1, 0])
    if kind != "distilbert":
        labels = torch.randint(2, 64, (2, 6), generator=generator)
        labels[1, 3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_outputs(model, batch, names):
    """What the named modules give in an ordinary forward pass of the whole model: {name: hidden states}."""
    outputs, handles = {}, []
    for name in names:

        def hook(module, args, output, name=name):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return outputs


def hook_count(model):
    return sum(len(module._forward_hooks) for module in model.modules())


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


def distilbert_blocks():
    expected = []
    for i in range(2):
        expected += [
            (f"distilbert.transformer.layer.{i}.attention", ("q_lin", "k_lin", "v_lin", "out_lin"), 4, "encoder"),
            (f"distilbert.transformer.layer.{i}.ffn", ("lin1", "lin2"), 0, "encoder"),
        ]
    return expected


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("t5", t5_blocks(("wi", "wo"))),
        ("t5-gated", t5_blocks(("wi_0", "wi_1", "wo"))),
        ("distilbert", distilbert_blocks()),
    ],
    ids=KINDS,
)
def test_blocks_by_hand(kind, expected):
    blocks = find_blocks(build_model(kind))
    assert [(b.name, b.linears, b.heads, b.side) for b in blocks.values()] == expected
    for name, block in blocks.items():
        assert block.name == name and block.has_bias == (kind == "distilbert")
        assert block.kind == ("attention" if block.heads else "feed_forward")


def test_prunable_modules_of_a_t5_layer_by_hand():
    """o is d_model 32 by 4 heads of 6; wi and wo are 48 by 32. The attention module stands for q, k and v."""
    modules = prunable_modules(build_model("t5"))
    layer, forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    assert list(modules)[:4] == [layer, f"{layer}.o", f"{forward}.wi", f"{forward}.wo"]
    assert list(modules.values())[:4] == [
        {"kind": "attention", "heads": 4},
        {"kind": "linear", "weights": 768},
        {"kind": "linear", "weights": 1536},
        {"kind": "linear", "weights": 1536},
    ]
    assert len(modules) == 2 * 4 + 2 * 6


@pytest.mark.parametrize("kind, attention, linear", [("t5-gated", 6, 18), ("distilbert", 2, 6)])
def test_prunable_modules_are_counted_by_kind(kind, attention, linear):
    kinds = [module["kind"] for module in prunable_modules(build_model(kind)).values()]
    assert (kinds.count("attention"), kinds.count("linear")) == (attention, linear)


def test_a_model_type_that_is_not_known_is_named():
    config = t5_config()
    config.model_type = "bart"
    with pytest.raises(UserError, match="model type 'bart' is not supported; known are t5, distilbert"):
        family_of(config)
    assert family_of(distilbert_config()) is FAMILIES["distilbert"]


# --- get and replace -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_blocks_tensors_are_the_models_own_and_come_back_through_set_block(kind):
    model, other = build_model(kind), build_model(kind)
    torch.manual_seed(1)
    for name, block in find_blocks(model).items():
        tensors = block_tensors(model, block)
        assert {f"{name}.{key}" for key in tensors} == {
            key for key in model.state_dict() if key.startswith(f"{name}.") and "relative" not in key
        }
        new = {key: torch.randn_like(tensor) for key, tensor in tensors.items()}
        set_block(model, block, new)
        state = model.state_dict()
        assert all(torch.equal(state[f"{name}.{key}"], new[key]) for key in new)
        set_block(model, block, block_tensors(other, block))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors | {"wi.weight": tensors["wi.weight"].T},
        lambda tensors: tensors | {"wi.weight": tensors["wi.weight"][:1]},  # would broadcast
        lambda tensors: tensors | {"wi.bias": torch.zeros(48)},
        lambda tensors: {"wi.weight": tensors["wi.weight"]},
    ],
    ids=["transposed", "one row", "extra", "missing"],
)
def test_tensors_that_are_not_the_blocks_are_refused_and_nothing_is_changed(spoil):
    model = build_model("t5")
    block = find_blocks(model)["encoder.block.0.layer.1.DenseReluDense"]
    before = {name: tensor.clone() for name, tensor in block_tensors(model, block).items()}
    with pytest.raises(UserError, match=r"block encoder\.block\.0\.layer\.1\.DenseReluDense: holds tensors"):
        set_block(model, block, spoil({name: torch.zeros_like(tensor) for name, tensor in before.items()}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in block_tensors(model, block).items())


# --- replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_replays_what_it_gives_in_a_plain_run(kind):
    model, batch = build_model(kind), padded_batch(kind)
    blocks = find_blocks(model)
    expected = plain_outputs(model, batch, blocks)
    seen = []

    def visit(block, call):
        seen.append(block.name)
        assert torch.equal(call.output, expected[block.name]), block.name
        assert torch.equal(call.replay(block_tensors(model, block)), expected[block.name]), block.name

    with torch.no_grad(), watched(model, blocks.values(), visit):
        family_of(model.config).run(model, batch)
    assert sorted(seen) == sorted(blocks) and len(seen) == len(blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_with_other_tensors_is_a_copy_of_the_module_with_these(kind):
    """Oracle: a deep copy whose parameters are overwritten, run on the same arguments."""
    model, batch = build_model(kind), padded_batch(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(2)
    compared = []

    def visit(block, call):
        tensors = {name: torch.randn_like(tensor) for name, tensor in block_tensors(model, block).items()}
        twin = copy.deepcopy(call.module)
        twin._forward_hooks.clear()
        with torch.no_grad():
            for name, tensor in tensors.items():
                twin.get_parameter(name).copy_(tensor)
        output = twin(*call.args, **call.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        assert torch.equal(call.replay(tensors), output), block.name
        assert not torch.allclose(output, call.output), block.name
        compared.append(block.name)

    with torch.no_grad(), watched(model, find_blocks(model).values(), visit):
        family_of(model.config).run(model, batch)
    assert len(compared) == len(find_blocks(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_replay_has_gradients_for_its_own_tensors_only():
    model, batch = build_model("t5"), padded_batch("t5")
    block = find_blocks(model)["decoder.block.1.layer.0.SelfAttention"]
    model.requires_grad_(False)

    def visit(block, call):
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in block_tensors(model, block).items()}
        with torch.enable_grad():
            call.replay(tensors).pow(2).sum().backward()
        assert all(tensor.grad.abs().sum() > 0 for tensor in tensors.values())

    with torch.no_grad(), watched(model, [block], visit):
        family_of(model.config).run(model, batch)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_named_blocks_are_visited_and_the_hooks_are_gone_afterwards():
    model, batch = build_model("t5"), padded_batch("t5")
    wanted = [block for block in find_blocks(model).values() if block.kind == "feed_forward"]
    seen = []
    with torch.no_grad(), watched(model, wanted, lambda block, call: seen.append(block)):
        assert hook_count(model) == len(wanted)
        family_of(model.config).run(model, batch)
    assert seen == wanted and hook_count(model) == 0


def test_the_hooks_are_gone_after_an_exception_and_the_next_run_is_watched_again():
    model, batch = build_model("distilbert"), padded_batch("distilbert")
    blocks, seen = find_blocks(model).values(), []

    def fail(block, call):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), watched(model, blocks, fail):
        family_of(model.config).run(model, batch)
    assert hook_count(model) == 0
    with watched(model, blocks, lambda block, call: seen.append(block)):
        family_of(model.config).run(model, batch)
    assert len(seen) == len(blocks)


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, last, heads",
    [
        ("t5", "decoder", ["lm_head"]),
        ("t5-gated", "decoder", ["lm_head"]),
        ("distilbert", "distilbert", ["pre_classifier", "classifier"]),
    ],
)
def test_a_run_ends_in_the_models_last_hidden_state_without_the_head(kind, last, heads):
    model, batch = build_model(kind), padded_batch(kind)
    expected = plain_outputs(
        model,
        batch,
        [f"{last}.final_layer_norm" if last == "decoder" else "distilbert.transformer.layer.1.output_layer_norm"],
    )
    calls, states = [], []
    for name in heads:
        model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    model.get_submodule(last).register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
    with torch.no_grad():
        family_of(model.config).run(model, batch)
        assert calls == []
        model(**batch)  # the counters do count
    assert len(calls) == len(heads)
    assert torch.equal(states[0], *expected.values()) and torch.equal(states[0], states[1])


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


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_padding_does_not_reach_the_real_tokens_of_any_block(kind):
    """Three more columns of padding change no block's output at real tokens: what the masks promise."""
    model, batch = build_model(kind), padded_batch(kind)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 3), value=5),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 3)),
        "labels": batch["labels"]
        if kind == "distilbert"
        else torch.nn.functional.pad(batch["labels"], (0, 3), value=-100),
    }
    blocks, real = find_blocks(model), []
    for one in (batch, wider):
        found = {}

        def visit(block, call):
            found[block.name] = call.output[token_mask(block, one)]

        with torch.no_grad(), watched(model, blocks.values(), visit):
            family_of(model.config).run(model, one)
        real.append(found)
    for name in blocks:
        torch.testing.assert_close(real[1][name], real[0][name], rtol=1e-4, atol=1e-5)
