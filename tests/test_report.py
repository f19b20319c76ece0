"""What a model costs, worked by hand for the tiny models; reports of evaluations."""

import contextlib
import os
import re

import pytest
import torch
import transformers
from helpers import fails, outcome, read_json, run
from tiny import RUNTIME, build_model, distilbert_config

from common.evaluation import answers as evaluation
from common.evaluation import cost as report
from common.models.compact import make_compact
from common.models.load import load_model
from common.models.saving import save_model
from common.runtime.devices import Runtime

STATED = {
    "t5": {"batch_size": 8, "input_tokens": 32, "output_tokens": 32},
    "distilbert": {"batch_size": 8, "input_tokens": 128},
}
FIGURES = ["parameters", "nonzero_parameters", "bytes_on_disk", "bytes_in_memory", "multiply_adds", "seconds_per_batch"]
PER_TOKEN = ["seconds_per_generated_token", "seconds_per_generated_token_of_32"]
EVALUATE = {"t5": "evaluate-t5.py", "distilbert": "evaluate-distilbert.py"}
# The tiny T5: an embedding of 64 · 32, six attention modules of 4 · 24 · 32, four feed-forward modules of 2 · 48 · 32,
# position biases of 2 · 32 · 4 and 12 norms of 32. Its embedding is the head as well.
T5_SIZE = 2048 + 6 * 3072 + 4 * 3072 + 256 + 12 * 32
# The tiny DistilBERT with 128 positions: embeddings of (64 + 128) · 32 and a norm of 2 · 32; two layers of four
# Linears of 32 · 33, two of 48 · 33 and 32 · 49, and two norms; a head of 32 · 33 and 2 · 33.
DISTILBERT_SIZE = 192 * 32 + 64 + 2 * (4 * 1056 + 1584 + 1568 + 128) + 1056 + 66


def build(kind):
    """A tiny model that takes an input of the stated length; DistilBERT's usual tiny one has 64 positions."""
    if kind != "distilbert":
        return build_model(kind)
    torch.manual_seed(0)
    config = distilbert_config(max_position_embeddings=128)
    return transformers.DistilBertForSequenceClassification(config).eval()


def saved(path, model):
    """A model that was saved and loaded again."""
    save_model(path, model, {})
    return load_model(path)


@torch.no_grad()
def without(model, heads, neurons):
    """A compact copy of a T5 or DistilBERT that has lost the first heads and neurons of every module."""
    for name, module in model.named_modules():
        if name.endswith(("Attention", "attention")):
            rows = [linear for linear in module.children() if isinstance(linear, torch.nn.Linear)]
            width = rows[0].out_features // 4
            for linear in rows[:3]:
                linear.weight[: heads * width] = 0
                if linear.bias is not None:
                    linear.bias[: heads * width] = 0
            rows[3].weight[:, : heads * width] = 0
        elif name.endswith(("DenseReluDense", "ffn")):
            rows = [linear for linear in module.children() if isinstance(linear, torch.nn.Linear)]
            rows[-1].weight[:, :neurons] = 0
    return make_compact(model, {})[0]


# --- multiply-adds ---------------------------------------------------------------------------------------------


def t5_products(heads, neurons, inner):
    """By hand, for 32 tokens on each side; `inner`: Linears before a feed-forward module's last."""
    width, tokens = heads * 6, 32
    projections = 4 * tokens * 32 * width  # q, k, v and o, of as many queries as keys
    scores, context = tokens * tokens * width, tokens * tokens * width
    attention = projections + scores + context
    feed_forward = (inner + 1) * tokens * 32 * neurons
    encoder, decoder = attention + feed_forward, 2 * attention + feed_forward
    return 2 * encoder + 2 * decoder + tokens * 32 * 64  # the last: logits of 64 pieces for each position


def distilbert_products(heads, neurons):
    """By hand, for 128 tokens: the classifier reads the first alone."""
    width, tokens = heads * 8, 128
    attention = 4 * tokens * 32 * width + 2 * tokens * tokens * width
    return 2 * (attention + 2 * tokens * 32 * neurons) + 32 * 32 + 32 * 2


PRODUCTS = {
    "t5": lambda heads, neurons: t5_products(heads, neurons, inner=1),
    "t5-gated": lambda heads, neurons: t5_products(heads, neurons, inner=2),
    "distilbert": distilbert_products,
}


@pytest.mark.parametrize("attention, kind", [("as loaded", kind) for kind in PRODUCTS] + [("eager", "t5")])
def test_multiply_adds_are_those_of_the_formula(tmp_path, kind, attention):
    """Scores and context are counted whichever way attention is computed."""
    loaded = saved(tmp_path / "m", build(kind))
    if attention != "as loaded":
        loaded.model.set_attn_implementation(attention)
    assert report.multiply_adds(loaded) == PRODUCTS[kind](4, 48)


@pytest.mark.parametrize("heads, neurons", [(1, 24), (3, 47)])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_compact_models_are_those_of_the_formula_with_its_heads_and_neurons(tmp_path, kind, heads, neurons):
    loaded = saved(tmp_path / "m", without(build(kind), heads, neurons))
    assert report.multiply_adds(loaded) == PRODUCTS[kind](4 - heads, 48 - neurons)


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["folder", "file.pth"])
@pytest.mark.parametrize(
    "kind, parameters, buffers", [("t5", T5_SIZE, 0), ("distilbert", DISTILBERT_SIZE, 8 * 128)]
)  # DistilBERT's numbers of its positions, int64
def test_sizes_of_a_model(tmp_path, kind, parameters, buffers, output):
    """Parameters worked by hand; of the file by os.path. 100 entries of one weight are made zero beforehand."""
    model = build(kind)
    with torch.no_grad():
        next(module for module in model.modules() if isinstance(module, torch.nn.Linear)).weight.view(-1)[:100] = 0
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
    assert zeros >= 100
    sizes = report.sizes(saved(tmp_path / output, model))
    weights = tmp_path / output / "model.safetensors" if output == "folder" else tmp_path / output
    assert sizes == {
        "parameters": parameters,
        "nonzero_parameters": parameters - zeros,
        "bytes_on_disk": os.path.getsize(weights),
        "bytes_in_memory": 4 * parameters + buffers,
    }
    assert sizes["bytes_on_disk"] > 4 * parameters


@pytest.mark.parametrize("kind, head, neuron, buffers", [("t5", 768, 64, 0), ("distilbert", 4 * 256 + 24, 65, 1024)])
def test_a_compact_model_is_smaller_by_its_heads_and_neurons(tmp_path, kind, head, neuron, buffers):
    """By hand: a head of 4 matrices (and 3 biases), a neuron of a row and a column (and a bias), in every module.

    The T5 is plain: a head's 32 position biases are gone too, in each stack.
    """
    whole, attention, forward = {"t5": (T5_SIZE - 2 * 32, 6, 4), "distilbert": (DISTILBERT_SIZE, 2, 2)}[kind]
    left = whole - attention * head - forward * 20 * neuron
    loaded = saved(tmp_path / "m", without(build(kind), 1, 20))
    sizes = report.sizes(loaded)
    assert (sizes["parameters"], sizes["bytes_in_memory"]) == (left, 4 * left + buffers)
    assert sizes["bytes_on_disk"] == os.path.getsize(tmp_path / "m" / "model.safetensors")


# --- --report --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(workshop, tmp_path_factory):
    """A folder with, for "t5" and "distilbert", KIND/original and KIND/compact, which was composed of it."""
    folder = tmp_path_factory.mktemp("models")
    for kind in EVALUATE:
        record = {part: {"folder": str(workshop / part / kind)} for part in ("tokenizer", "data")}
        (folder / kind).mkdir()
        save_model(folder / kind / "original", build(kind), record)
        with contextlib.chdir(folder / kind):
            run("config_generator.py -m original --attention 0.25 --linear 0.3 --feed-forward 0.5 -n 1")
            run("prune_scheme_generator.py")
            run("prune.py -m original -o pruned")
            run("compose_model.py -m original -p pruned -n 0 -o compact --compact")
    return folder


def command(kind, model):
    return f"{EVALUATE[kind]} -m {model} --limit 8" + (" --max-new-tokens 4" if kind == "t5" else "")


def positive_seconds(figures, of):
    return all(
        isinstance(figures[name][of], float) and 0 < figures[name][of] < 60
        for name in figures
        if name.startswith("seconds")
    )


@pytest.mark.parametrize("kind", EVALUATE)
def test_a_compact_model_is_reported_beside_the_original_that_its_record_names(models, tmp_path, kind):
    """By hand: 3 of 4 heads and 24 of 48 neurons are left. Figures of each model alone are tested above."""
    path, compact = tmp_path / "made" / "report.json", models / kind / "compact"
    result = run(f"{command(kind, compact)} --report {path}")
    assert result.pop("report") == str(path) and result.pop("took")
    content = read_json(path)
    assert content["evaluation"] == result
    assert {"bleu" if kind == "t5" else "accuracy", "examples", "parameters"} <= result.keys()
    assert (content["input"], content["rounds"], content["model"]) == (STATED[kind], 1, str(compact))
    assert os.path.samefile(content["original"], models / kind / "original")
    figures = content["figures"]
    assert list(figures) == FIGURES + PER_TOKEN * (kind == "t5")
    for name, each in figures.items():
        assert each.keys() == {"model", "original", "ratio"}
        assert each["ratio"] == round(each["model"] / each["original"], 4), name
    whole, head, neuron, attention, forward = {
        "t5": (T5_SIZE, 768, 64, 6, 4),
        "distilbert": (DISTILBERT_SIZE, 1048, 65, 2, 2),
    }[kind]
    left = whole - attention * head - forward * 24 * neuron
    assert figures["parameters"] == {"model": left, "original": whole, "ratio": round(left / whole, 4)}
    for of, folder in (("model", compact), ("original", models / kind / "original")):
        assert figures["bytes_on_disk"][of] == os.path.getsize(folder / "model.safetensors")
        assert figures["bytes_in_memory"][of] == 4 * figures["parameters"][of] + (1024 if kind == "distilbert" else 0)
        loaded = load_model(folder).model
        assert figures["nonzero_parameters"][of] == sum(int((p != 0).sum()) for p in loaded.parameters())
        assert positive_seconds(figures, of)
    assert result["parameters"] == left


def test_seconds_are_medians_of_what_is_measured_after_the_warm_up(models, monkeypatch):
    """By hand: a clock that advances by 1, 2, 3, … s; two models in turn, one figure each, two turns of warm-up.

    The seconds of the first are then 1, 3 | 5, 7, 9, those of the second 2, 4 | 6, 8, 10, and its parts are two.
    """
    monkeypatch.setattr(report, "ROUNDS", 3)
    monkeypatch.setattr(report, "WARM_UP", 2)
    runs, clock = [], [0.0]

    def run():
        runs.append(1)
        clock[0] += len(runs)

    monkeypatch.setattr(report, "ways_to_run", lambda parts: {"seconds_per_batch": (run, parts)})
    monkeypatch.setattr(Runtime, "now", lambda self: clock[0])
    assert report.speeds({"model": 1, "original": 2}, RUNTIME) == {
        "model": {"seconds_per_batch": 7.0},
        "original": {"seconds_per_batch": 4.0},
    }
    assert len(runs) == 10


def test_the_timed_translation_has_the_stated_length(models, monkeypatch):
    """A model that would end at once is made to go on: 32 tokens after the start, over which the seconds are spread."""
    loaded = load_model(models / "t5" / "compact")
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()
        loaded.model.lm_head.weight[1] = 1.0  # the end token
    run, parts = report.ways_to_run(loaded)["seconds_per_generated_token"]
    assert run().shape == (1, 33) and parts == 32
    run, parts = report.ways_to_run(loaded)["seconds_per_generated_token_of_32"]
    assert run().shape == (32, 33) and parts == 32 * 32
    run, parts = report.ways_to_run(loaded)["seconds_per_batch"]
    assert run().logits.shape == (8, 32, 64) and parts == 1


@pytest.mark.parametrize("kind", EVALUATE)
def test_a_model_whose_original_is_unknown_is_reported_alone(models, tmp_path, kind):
    code, result, err = outcome(f"{command(kind, models / kind / 'original')} --report {tmp_path}/report.json")
    assert code == 0
    assert f"{tmp_path}/report.json: the original is not known, so the figures stand alone; name it" in err
    assert re.search(rf"\nparameters, M +{result['parameters'] / 1e6:.4g} +- +-\n", err)
    content = read_json(tmp_path / "report.json")
    assert content["original"] is None and content["figures"]["parameters"]["model"] == result["parameters"]
    assert {(figure["original"], figure["ratio"]) for figure in content["figures"].values()} == {(None, None)}
    assert positive_seconds(content["figures"], "model")


@pytest.mark.parametrize("kind", EVALUATE)
def test_several_models_end_in_one_table(models, tmp_path, kind):
    """Oracles: the result, and the compact model's report. By hand: two labels occur among the first eight reviews."""
    paths = [models / kind / name for name in ("original", "compact")]
    more = f"{paths[1]} --report {tmp_path}/{{name}}.json"
    code, result, err = outcome(command(kind, paths[0]).replace(" --limit", f" {more} --limit"))
    lines = err.splitlines()
    head, *rows = next(lines[n : n + 3] for n, line in enumerate(lines) if line.startswith("model "))
    main, other = ("bleu", "chrf") if kind == "t5" else ("accuracy", "f1")
    assert code == 0 and head.split()[:3] == ["model", main, other] and max(map(len, [head, *rows])) <= 100
    for row, path, each in zip(rows, paths, result["models"]):
        (begin, end), scores = row.split()[0].split("…"), [each[main], *each["intervals"][main], each[other]]
        assert str(path).startswith(begin) and str(path).endswith(end) and 2 * len(begin) <= len(end)
        assert [float(cell.strip("[],")) for cell in row.split()[1:5]] == pytest.approx(scores, abs=0.0051)
    figures = read_json(tmp_path / "compact.json")["figures"]
    shown = [name for name in figures if name in ("bytes_on_disk", "parameters") or name.startswith("seconds")]
    ratios = [float(cell[1:]) for cell in rows[1].split() if cell.startswith("×")]
    assert sorted(ratios) == pytest.approx(sorted(figures[name]["ratio"] for name in shown), abs=0.0051)
    if kind == "distilbert":
        assert [(each["f1_classes"], each["f1_left_out"]) for each in result["models"]] == [(2, [])] * 2


def test_another_models_original_is_refused(models, other_model, monkeypatch, tmp_path):
    """Before anything is translated."""
    monkeypatch.setattr(evaluation, "translate", lambda *_, **__: pytest.fail("was called"))
    compact = models / "t5" / "compact"
    err = fails(f"{command('t5', compact)} --report {tmp_path}/report.json --original {other_model}")
    assert f"{other_model}: is not the original of {compact}" in err and "--original" in err
    assert not (tmp_path / "report.json").exists()
