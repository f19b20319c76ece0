"""Scores against the model with the block really replaced; costs against the composed model and its compact copy.

The scores' oracle runs one example at a time, so that nothing is ever padded, through a copy of the model.
"""

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import CLASSIFIERS, QUIET, RUNTIME, distilbert_config, lively

from common.blocks.calls import block_calls
from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors, parameter_counts, set_block
from common.composing.scheme import DENSE
from common.composing.search import costs, timing
from common.data.examples import Examples
from common.data.tasks import TASKS
from common.evaluation.cost import count_products, multiply_adds
from common.evaluation.scoring import Replaceable, score_block
from common.models.compact import make_compact
from common.models.load import LoadedModel
from common.models.saving import save_model
from common.pruning.prune_block import prune_block
from common.runtime.devices import Runtime

KINDS = ["t5", "t5-gated", "distilbert", "modernbert"]
CPU = torch.device("cpu")
COUNT = 5
OPTIONS = {"runtime": Runtime(CPU, 2, QUIET)}  # batches of 2, 2 and 1


def random_examples(kind):
    """Inputs of 2 to 9 tokens and targets of 1 to 6, or classes."""
    draw = random.Random(0)

    def tokens(least, most):
        return [draw.randrange(3, 64) for _ in range(draw.randint(least, most))]

    inputs = [tokens(2, 9) for _ in range(COUNT)]
    if kind in CLASSIFIERS:
        return Examples(TASKS["classification"], inputs, [i % 2 for i in range(COUNT)], [("", 0)] * COUNT, pad=0)
    return Examples(TASKS["translation"], inputs, [tokens(1, 6) for _ in range(COUNT)], [("", "")] * COUNT, pad=0)


def pruned_and_shaken(model, block):
    """Two variants of a block: half its heads or neurons gone, and all its tensors multiplied by random numbers."""
    own = block_tensors(model, block)
    half = {"heads": block.heads // 2, "neurons": block.neurons // 2, "weights": {}}
    torch.manual_seed(1)
    return {
        "half": prune_block(block, own, half)[0].tensors,
        "shaken": {name: tensor.detach() * torch.randn_like(tensor) for name, tensor in own.items()},
    }


@torch.no_grad()
def log_probabilities(model, examples):
    """Of every real token or example, each example run alone: (tokens, classes)."""
    rows = []
    for source, target in zip(examples.inputs, examples.targets):
        decoder = {}
        if examples.task.name == "translation":
            decoder = {"decoder_input_ids": torch.tensor([[0, *target[:-1]]])}
        rows.append(model(input_ids=torch.tensor([source]), **decoder).logits.flatten(0, -2))
    return torch.cat(rows).double().log_softmax(-1)


def expected_score(model, teacher, examples):
    """{"loss", "kl"} by torch's own cross-entropy and divergence."""
    found, wanted = log_probabilities(model, examples), log_probabilities(teacher, examples)
    flat = sum(examples.targets, []) if examples.task.name == "translation" else examples.targets
    divergence = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / len(flat)
    return {"loss": torch.nn.functional.cross_entropy(found, torch.tensor(flat)).item(), "kl": divergence.item()}


def with_block(model, block, tensors):
    replaced = copy.deepcopy(model)
    set_block(replaced, block, tensors)
    return replaced


def close(score):
    return pytest.approx(score, rel=0, abs=1e-5)


# --- scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_with_the_block_replaced(kind):
    """Oracle: torch's cross_entropy and kl_div on the logits of a copy whose block was overwritten."""
    model, examples = lively(kind), random_examples(kind)
    own = expected_score(model, model, examples)
    differences = []
    blocks = find_blocks(model)
    for name, block in blocks.items():
        variants = pruned_and_shaken(model, block)
        scores = score_block(model, model, blocks, name, variants, examples, **OPTIONS)
        assert list(scores) == [None, *variants]
        assert scores[None] == close(own) and scores[None]["kl"] == 0
        for variant, tensors in variants.items():
            expected = expected_score(with_block(model, block, tensors), model, examples)
            assert scores[variant] == close(expected), (name, variant)
            differences += [abs(expected["loss"] - own["loss"]), expected["kl"]]
    assert min(differences) > 1e-4  # each block's replacement is well above the tolerance


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_scores_within_a_composed_model_diverge_from_the_teacher(kind):
    """The model has its first and its last block replaced already. Oracle: a copy with one more of its own."""
    teacher, examples = lively(kind), random_examples(kind)
    model, blocks = copy.deepcopy(teacher), find_blocks(teacher)
    names = list(blocks)
    for name in (names[0], names[-1]):
        set_block(model, blocks[name], pruned_and_shaken(teacher, blocks[name])["half"])
    composed = expected_score(model, teacher, examples)
    assert composed["kl"] > 1e-3
    for name in names:
        shaken = pruned_and_shaken(teacher, blocks[name])["shaken"]
        scores = score_block(model, teacher, blocks, name, {"shaken": shaken}, examples, **OPTIONS)
        expected = expected_score(with_block(model, blocks[name], shaken), teacher, examples)
        assert scores == {None: close(composed), "shaken": close(expected)}, name


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_scoring_leaves_the_model_as_it_was(kind, fails):
    """Also when it ends early, at a tensor of a wrong shape. Oracle: the state and the logits of before."""
    model, examples = lively(kind), random_examples(kind)
    blocks = find_blocks(model)
    name = list(blocks)[2]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    logits = log_probabilities(model, examples)
    variants = pruned_and_shaken(model, blocks[name])
    if fails:
        variants["half"] = {
            key: tensor[:, :5] if tensor.dim() == 2 else tensor for key, tensor in variants["half"].items()
        }
        with pytest.raises(RuntimeError, match="shape"):
            score_block(model, model, blocks, name, variants, examples, **OPTIONS)
    else:
        score_block(model, model, blocks, name, variants, examples, **OPTIONS)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert torch.equal(log_probabilities(model, examples), logits)


@pytest.mark.parametrize("kind, place", [("t5", 0), ("t5", 2), ("t5", 7), ("t5", 9), ("distilbert", 1)])
def test_what_comes_before_the_block_is_not_computed_again(kind, place):
    """Oracle: torch's flop counter, on the whole model and on each block alone."""
    model, examples = lively(kind), random_examples(kind)
    blocks, batch = find_blocks(model), examples.batch([0, 1])
    with torch.no_grad():
        calls = {call.block.name: call for call in block_calls(model, blocks.values(), batch)}
        own = {name: block_tensors(model, block) for name, block in blocks.items()}
        alone = {
            name: count_products(lambda call=call: call.replay(own[call.block.name])) for name, call in calls.items()
        }
        name = list(calls)[place]
        with Replaceable(model, blocks).opened() as replaceable:
            replaceable.run(batch)
            found = count_products(lambda: replaceable.run_with(name, own[name], batch))
        assert found == count_products(lambda: model(**batch)) - sum(list(alone.values())[:place])


# --- costs -----------------------------------------------------------------------------------------------------


def all_different(kind):
    """A tiny model without a single zero, that takes an input of the stated length."""
    if kind != "distilbert":
        model = lively(kind)
        if kind in CLASSIFIERS:
            torch.nn.init.normal_(model.classifier.bias)
    else:
        model = transformers.DistilBertForSequenceClassification(distilbert_config(max_position_embeddings=128)).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("layer_norm.weight" in name.lower()), std=0.3)
    assert nonzeros(model) == sum(parameter.numel() for parameter in model.parameters())
    return model


def grid_variants(model, rates=(0, 0.3, 0.6)):
    """All combinations of heads or neurons and unstructured rates: {block: {name: Variant}}."""
    variants = {}
    for name, block in find_blocks(model).items():
        own = block_tensors(model, block)
        variants[name] = {}
        for part in (0, 1, 3) if block.kind == "attention" else (0, 11, 40):
            for each in rates:
                linears = (block.output,) if block.kind == "attention" else block.linears
                removed = {
                    "heads": part if block.kind == "attention" else 0,
                    "neurons": 0 if block.kind == "attention" else part,
                    "weights": {linear: round(each * own[f"{linear}.weight"].numel()) for linear in linears},
                }
                if part or each:
                    variants[name][f"{part}_{each}"] = prune_block(block, own, removed)[0]
    return variants


def masks_of(variants):
    return {name: {variant: found.keeps for variant, found in each.items()} for name, each in variants.items()}


def composed_of(model, variants, choice):
    """A copy of the model with the chosen variants in it."""
    composed = copy.deepcopy(model)
    for name, variant in choice.items():
        if variant != DENSE:
            set_block(composed, find_blocks(composed)[name], variants[name][variant].tensors)
    return composed


def chosen(variants, seed):
    """A random choice; 0: the original."""
    draw = random.Random(seed)
    return {name: draw.choice([DENSE, *each]) if seed else DENSE for name, each in variants.items()}


def nonzeros(model):
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def stored_bytes(model, folder):
    """The size of a model's weights file without its header: 8 bytes that tell the header's length, and the header."""
    save_model(folder, model, {})
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])["__metadata__"]
    return len(content) - 8 - length


def costs_of(measure, model, variants, choices):
    """The whole model's cost of each choice."""
    cost = costs.count(measure, LoadedModel(model, Path("model")), masks_of(variants))
    return [cost.of(choice) + cost.rest for choice in choices]


def composed_and_compact(model, variants, choices):
    for choice in choices:
        composed = composed_of(model, variants, choice)
        yield composed, make_compact(composed, {})[0]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_the_composed_models_nonzeros(kind):
    """Oracle: torch's count of the non-zeros of all its parameters."""
    model = all_different(kind)
    variants = grid_variants(model)
    choices = [chosen(variants, seed) for seed in range(4)]
    found = costs_of("parameters", model, variants, choices)
    assert found == [nonzeros(composed_of(model, variants, choice)) for choice in choices]
    assert found[0] == max(found) and len(set(found)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_compact_models_weights_file(kind, tmp_path):
    """Oracle: the size of the file of its compact copy, less what its own first eight bytes say of the header."""
    model = all_different(kind)
    variants = grid_variants(model)
    choices = [chosen(variants, seed) for seed in range(4)]
    found = costs_of("bytes", model, variants, choices)
    assert found == [
        stored_bytes(compact, tmp_path / "compact") for _, compact in composed_and_compact(model, variants, choices)
    ]
    assert found[0] == max(found) and len(set(found)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_are_those_of_the_compact_model(kind):
    """Oracle: what torch's FlopCounterMode counts in a forward pass of the composed model's compact copy."""
    model = all_different(kind)
    variants = grid_variants(model)
    choices = [chosen(variants, seed) for seed in range(3)]
    found = costs_of("multiply-adds", model, variants, choices)
    assert found == [
        multiply_adds(LoadedModel(compact, Path("compact")))
        for _, compact in composed_and_compact(model, variants, choices)
    ]
    assert found[0] == max(found) and len(set(found)) == 3


@pytest.mark.parametrize("kind, plain", [("t5", False), ("t5", True), ("distilbert", True)])
def test_seconds_are_those_of_whole_models_divided_among_blocks_that_are_alike(kind, plain, monkeypatch):
    """Models take a second a parameter, so that the oracle counts those of variants without single weights removed.

    By hand: the output Linears' 32 biases stay; the two or three norms of 32 weights of a T5's layer count, with
    `plain`, to its self-attention.
    """
    model = all_different(kind)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    variants = grid_variants(model, rates=(0,))
    timed = []

    def compare(loaded, others, runtime):
        seconds = {
            name: float(parameter_counts(other)["parameters"]) for name, other in {None: model, **others}.items()
        }
        timed.append(others)
        return seconds[None], {name: seconds[None] - seconds[name] for name in others}

    monkeypatch.setattr(timing, "compare", compare)
    library = SimpleNamespace(record={})
    library.note = library.record.__setitem__
    loaded, masks = LoadedModel(model, Path("model")), masks_of(variants)
    cost, again = (timing.latency(loaded, masks, library, RUNTIME, plain=plain) for _ in range(2))
    expected = costs.count("parameters", loaded, masks)
    for name, of_block in expected.blocks.items():
        beside = (64 if "encoder" in name else 96) * (plain and "SelfAttention" in name) if kind == "t5" else -32
        assert cost.blocks[name] == {variant: parameters + beside for variant, parameters in of_block.items()}
    assert cost.original + cost.rest == expected.original + expected.rest and again == cost and len(timed) == 1
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    torch.set_num_threads(2)
    timing.latency(loaded, masks, library, RUNTIME, plain=plain)
    torch.set_num_threads(1)
    assert len(timed) == 2  # it is another machine
