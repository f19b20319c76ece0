"""Layers that are computed again in the backward pass, or compiled: the oracle is the same step without that."""

import copy
import shutil

import pytest
import torch
from helpers import CLASSIFIERS, CPU, MODELS, QUIET, build_model, examples, fails, outcome, padded_batch, recipe, run
from torch._dynamo.utils import counters

from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors, parameter_masks
from common.composing.scheme import Pair
from common.models.compact import make_compact
from common.pruning.prune_block import prune_block
from common.runtime.devices import Runtime
from common.training import layers
from common.training.block_level import JointObjective, Supernet
from common.training.layers import Layers, layers_of
from common.training.loop import run_pass
from common.training.objectives import ModelObjective
from common.training.running_losses import RunningLosses

MODES = [True, False]


def names_of(model):
    return {id(module): name for name, module in model.named_modules()}


@pytest.mark.parametrize(
    "kind, stacks",
    [
        ("t5", ["encoder.block", "decoder.block"]),
        ("bart", ["model.encoder.layers", "model.decoder.layers"]),
        ("distilbert", ["distilbert.transformer.layer"]),
        ("deberta-v2-unshared", ["deberta.encoder.layer"]),
    ],
)
def test_the_layers_of_a_model_by_hand(kind, stacks):
    model = build_model(kind)
    expected = [f"{stack}.{n}" for stack in stacks for n in (0, 1)]
    assert [names_of(model)[id(layer)] for layer in layers_of(model)] == expected


@pytest.mark.parametrize("kind", MODELS)
def test_all_blocks_lie_in_layers(kind):
    model = build_model(kind)
    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    assert all(id(model.get_submodule(block.root)) in inside for block in find_blocks(model).values())


def compact(kind):
    """A model in which the first attention block has no heads left, and the others fewer than before."""
    model, masks = build_model(kind), {}
    for number, block in enumerate(find_blocks(model).values()):
        removed = {"heads": block.heads // (number % 2 + 1), "neurons": block.neurons // 2, "weights": {}}
        variant, _ = prune_block(block, block_tensors(model, block), removed)
        with torch.no_grad():
            for name, tensor in variant.tensors.items():
                block_tensors(model, block)[name].copy_(tensor)
        masks |= {f"{block.root}.{name}": mask for name, mask in parameter_masks(block, variant.keeps).items()}
    return make_compact(model, masks)[0].eval()


def step(model, kind, checkpointing, compiling=False, **settings):
    """Loss, gradients and the state of the random numbers after a forward and a backward pass."""
    torch.manual_seed(7)
    objective = ModelObjective(
        model, recipe(**settings), build_model(kind), checkpointing=checkpointing, compiling=compiling
    )
    ((_, loss, *_),) = objective.losses(padded_batch(kind), {"x": None}, training=True)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, torch.get_rng_state()


def same_step(found, expected):
    (loss, gradients, state), (other_loss, others, other_state) = found, expected
    assert torch.equal(loss, other_loss) and torch.equal(state, other_state)
    assert gradients.keys() == others.keys() and sum(each is not None and bool(each.any()) for each in others.values())
    for name, gradient in others.items():
        assert (gradient is None) == (gradients[name] is None), name
        assert gradient is None or torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("kind", ["t5", "umt5", "bart", "bert", "distilbert", "deberta-v2"])
def test_gradients_are_the_same_bit_for_bit(kind):
    found, expected = (step(build_model(kind), kind, again, dropout=True, distill=0.5) for again in MODES)
    same_step(found, expected)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_gradients_of_compact_models_are_the_same(kind):
    model = compact(kind)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build_model(kind).parameters())
    found, expected = (step(copy.deepcopy(model), kind, again) for again in MODES)
    same_step(found, expected)


def test_gradients_in_bfloat16_are_the_same():
    same_step(*(step(build_model("t5"), "t5", again, precision="bf16") for again in MODES))


def test_what_is_computed_again_is_computed_in_the_precision_of_the_forward_pass():
    """On GPUs tf32 rounds; here the setting alone is looked at, in both passes."""
    model, seen = build_model("t5"), []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda *_: seen.append("outside"))
        layer.layer[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    step(model, "t5", True, precision="tf32")
    assert seen == ["outside", "high"] * 4 + ["high"] * 4 and torch.get_float32_matmul_precision() == "highest"


def kept(model, kind, checkpointing):
    """Bytes that a forward pass keeps for the gradients, beside the parameters; whatever shares memory counts once."""
    own, found = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive, objective = [], ModelObjective(model, recipe(dropout=False), checkpointing=checkpointing)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        losses = list(objective.losses(padded_batch(kind), {"x": None}, training=True))
    assert len(losses) == 1 and alive
    return sum(found.values())


def deeper(kind, layers):
    """A model of so many layers on each side."""
    config = copy.deepcopy(build_model(kind).config)
    for name in ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, layers)
    return type(build_model(kind))(config).eval()


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_of_a_further_layer_its_input_alone_is_kept(kind):
    """By hand: (2, 7) source tokens, of an encoder-decoder (2, 6) target tokens too, of width 32."""
    for checkpointing in MODES:
        more = kept(deeper(kind, 4), kind, checkpointing) - kept(deeper(kind, 3), kind, checkpointing)
        inputs = 4 * 32 * 2 * (7 if kind in CLASSIFIERS else 7 + 6)
        assert more == inputs if checkpointing else more > 5 * inputs, checkpointing


def test_nothing_is_left_in_the_model():
    model, batch = build_model("t5"), padded_batch("t5")
    before = {name: set(vars(module)) for name, module in model.named_modules()}

    def is_clean():
        return {name: set(vars(module)) for name, module in model.named_modules()} == before

    objective = ModelObjective(model, recipe(), checkpointing=True)
    for loss in objective.losses(batch, {"x": None}, training=True):
        assert is_clean()  # before the backward pass, in which the layers run again
        loss.value.backward()
    assert is_clean() and all(torch.equal(a, b) for a, b in zip(copy.deepcopy(model).parameters(), model.parameters()))
    with pytest.raises(KeyboardInterrupt), Layers(model, checkpointing=True).running("fp32"):
        assert not is_clean()
        raise KeyboardInterrupt
    assert is_clean()


def test_validation_is_as_ever(monkeypatch, traced):
    objective = ModelObjective(build_model("t5"), recipe(), checkpointing=True, compiling=True)
    monkeypatch.setattr(Layers, "running", lambda *_: pytest.fail("the layers run as they are there"))
    assert len(list(objective.losses(padded_batch("t5"), {"x": None}, training=False))) == 1


@pytest.mark.parametrize("checkpointing", MODES)
def test_a_model_that_is_trained_fills_no_cache(monkeypatch, checkpointing):
    """A cache would be added to again when a layer is computed again."""
    model = build_model("t5")
    monkeypatch.setattr("transformers.cache_utils.DynamicLayer.update", lambda *_, **__: pytest.fail("a cache"))
    assert step(model, "t5", checkpointing)[0].isfinite()


def joint_run(kind, old=(), steps=3, **options):
    """Some batches, each with another composition and in two pieces: what was learned, the loss and the supernet."""
    precision = options.pop("precision", "fp32")
    torch.manual_seed(3)
    model, every = build_model(kind), {}
    for name, block in find_blocks(model).items():
        for variant, heads in (("a", 1), ("b", 2)):
            removed = {"heads": heads * bool(block.heads), "weights": {block.output: 100}}
            every[Pair(name, variant)], _ = prune_block(block, block_tensors(model, block), removed)
    there = {pair: each for pair, each in every.items() if pair.variant in old}
    supernet = Supernet(model, find_blocks(model), {p: v for p, v in every.items() if p not in there}, there)
    others = {"distill": options.pop("distill", 0.5), "dropout": options.pop("dropout", True)}
    plan = recipe(precision=precision, **others)
    learner = supernet.make_learner(plan, steps, 0.0 if old else 1.0)
    objective = JointObjective(supernet, plan, {}, model, **options)
    runtime, tally = Runtime(CPU, 4, QUIET, pieces=2), RunningLosses(["x"])
    order = [[4 * number + n for n in range(4)] for number in range(steps)]
    run_pass({"x": learner}, objective, examples(kind, 4 * steps), order, runtime, "", tally)
    assert learner.steps == steps
    return learner.parameters, tally.result().losses["x"], supernet


@pytest.mark.parametrize("kind, old, precision", [("t5", ("a",), "fp32"), ("distilbert", (), "bf16")])
def test_joint_fine_tuning_in_pieces_is_the_same(kind, old, precision):
    runs = [joint_run(kind, old, precision=precision, checkpointing=again) for again in MODES]
    (left, loss, _), (right, other_loss, _) = runs
    assert loss == other_loss and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_model_fine_tuned_so_is_the_same_file_and_need_not_be_made_again(t5, chain, here):
    files = f"-m {t5} -p {chain}/pruned -c {chain}/conf.json -n 1"
    command = f"model-level_finetuning.py {files} --epochs 1 --batch-size 8 --dropout"
    before, after = run(f"{command} -o left"), run(f"{command} -o right --checkpointing --accumulate 1")
    assert before["val_loss"] == after["val_loss"] and not after["skipped"]
    assert run(f"{command} -o left --checkpointing")["skipped"]
    left, right = ((here / side / "model.safetensors").read_bytes() for side in ("left", "right"))
    assert left == right


def test_joint_fine_tuning_alone_takes_the_flag(t5, chain, here):
    err = fails(f"block-level_finetuning.py -m {t5} -p {chain}/pruned --checkpointing -o a --method train")
    assert "--checkpointing: goes with --method joint" in err


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced as for compiling, and then run by PyTorch's own operators: in seconds."""
    monkeypatch.setattr(layers, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    layers.check_compiler.cache_clear()
    yield lambda: counters["stats"]["unique_graphs"]
    layers.check_compiler.cache_clear()
    torch._dynamo.reset()


def near_step(found, expected, rtol=1e-4, atol=1e-5):
    (loss, gradients, _), (other_loss, others, _) = found, expected
    torch.testing.assert_close(loss, other_loss, rtol=rtol, atol=atol)
    assert any(each is not None and bool(each.any()) for each in others.values())
    for name, gradient in others.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                gradients[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_compiled_layers_make_the_same_step_and_leave_nothing_in_the_model(traced):
    model, plain = build_model("bert"), build_model("bert")
    found = step(model, "bert", True, compiling=True, dropout=False, distill=0.5)
    near_step(found, step(build_model("bert"), "bert", False, dropout=False, distill=0.5))
    assert traced() > 1
    for name, module in model.named_modules():
        assert set(vars(module)) == set(vars(plain.get_submodule(name))), name
    assert copy.deepcopy(model).state_dict().keys() == plain.state_dict().keys()


def test_a_compact_model_can_be_compiled(traced):
    model = compact("bert")
    near_step(*(step(copy.deepcopy(model), "bert", again, compiling=again) for again in MODES))
    assert traced() > 1


@pytest.mark.slow
def test_bfloat16_and_dropout_go_with_compiling_and_checkpointing(traced):
    settings = {"precision": "bf16", "dropout": True}
    found, expected = (step(build_model("bert"), "bert", again, again, **settings) for again in MODES)
    near_step(found, expected, rtol=0.05, atol=0.02)


@pytest.mark.slow
def test_batches_of_other_lengths_and_other_compositions_are_not_compiled_again(traced):
    """Oracle: the same run without compiling. Each step has another composition, and its pieces have other lengths."""
    expected, loss, _ = joint_run("t5", steps=4, dropout=False, distill=0.0)
    found, other_loss, _ = joint_run("t5", steps=4, dropout=False, distill=0.0, compiling=True, checkpointing=True)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    # By hand: the trial; and of two stacks the first layer, which makes the position bias, and the others, with padding
    # and without. The layers ran 4 * 2 * 4 times.
    assert 2 * 2 < traced() <= 1 + 2 * 2 * 2 and counters["graph_break"] == {}


def test_where_nothing_can_be_compiled_one_line_says_so_before_the_work(t5, chain, here, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(layers, "BACKEND", broken)
    monkeypatch.setattr(layers, "OPTIONS", {})
    layers.check_compiler.cache_clear()
    files = f"-m {t5} -p {chain}/pruned -c {chain}/conf.json -n 0 -o out"
    _, result, err = outcome(f"model-level_finetuning.py {files} --compile")
    layers.check_compiler.cache_clear()
    assert result is None and list(here.iterdir()) == []
    assert "error: --compile: cannot be used here, leave it out" in err and "no C++ compiler" in err
    assert "much more" not in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_for_real_the_step_is_the_same_with_its_dropout():
    """The layers of DistilBERT have the same code, so that one is compiled."""
    layers.check_compiler.cache_clear()
    found, expected = (step(build_model("distilbert"), "distilbert", False, compiling=each) for each in MODES)
    near_step(found, expected)
