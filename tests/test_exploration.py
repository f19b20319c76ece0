"""The smallest configuration that is good enough: brute force, sizes and losses counted by hand, and tiny runs.

Untrained models translate nothing well. Where a run needs models of different quality, that is taken to be 10 minus the
validation loss, and 5 more for the original, which is no better than the others otherwise.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, read_json, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import loss_per_token
from tiny import RUNTIME, pairs_of

from common.blocks.find import find_blocks
from common.blocks.tensors import parameter_counts
from common.composing.compose import choose, compose
from common.composing.configurations import read_configurations
from common.composing.library import Library
from common.composing.scheme import make_scheme
from common.composing.search import sizes
from common.data import metrics
from common.evaluation import answers as evaluation
from common.evaluation.scoring import score_block
from common.models.load import load_model
from experiments.smallest import find_smallest

# --- the order ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data(), count=st.integers(1, 12))
def test_the_smallest_is_found_as_by_brute_force(data, count):
    """Oracle: each configuration compared with all that come before it."""
    few = st.integers(0, 5)  # ties are frequent
    size, loss, quality = (data.draw(st.lists(few, min_size=count, max_size=count)) for _ in range(3))
    wanted = data.draw(few)
    order = sorted(range(count), key=lambda n: (size[n], n))
    promising = [n for i, n in enumerate(order) if all(loss[n] < loss[before] for before in order[:i])]
    good = [n for n in promising if quality[n] >= wanted]
    found = find_smallest(order, loss.__getitem__, quality.__getitem__, wanted)
    assert found.found == (good[0] if good else None)
    assert found.looked_at == (order[: order.index(good[0]) + 1] if good else order)
    assert found.measured == [n for n in promising if n in found.looked_at]


# --- what is measured --------------------------------------------------------------------------------------------


def kept_weights(library, block, variant):
    """Weights that a module file keeps, by numpy."""
    fields = np.load(library / f"{block}.{variant}.npy")
    return sum(int(fields[name].sum()) for name in fields.dtype.names if name.endswith(".keep"))


def fractions(folder, library):
    """The part of the blocks' weights that each configuration of a folder keeps, by numpy."""
    scheme = read_json(folder / "conf_prune.json")
    whole = 6 * 4 * 24 * 32 + 4 * 2 * 48 * 32  # of the tiny T5: none is dense
    return [sum(kept_weights(library, *pair) for pair in config.items()) / whole for config in scheme["configs"]]


def test_sizes_are_the_kept_weights(workshop, chain):
    loaded = load_model(workshop / "model" / "t5")
    library = Library.open(chain / "tuned", loaded.identity["fingerprint"])
    configurations = read_configurations(chain / "conf.json")
    found = sizes(loaded, configurations, library, "parameters", RUNTIME)
    assert found == pytest.approx(fractions(chain, chain / "tuned"), rel=1e-12)
    assert len(set(found)) == 3


@pytest.fixture
def by_loss(monkeypatch):
    """Quality by the loss, see above. Returns a list that grows by an entry for each model measured."""
    measured = []

    def translate(model, tokenizer, examples, runtime, **_):
        measured.append(model)
        is_original = parameter_counts(model)["sparsity"] < 0.01
        loss = score_block(model, model, find_blocks(model), None, {}, examples, runtime)[None]["loss"]
        return [repr(10 - loss + 5 * is_original)] * len(examples), 0, 1.0

    monkeypatch.setattr(evaluation, "translate", translate)

    def keep_first(scored, answers, references):
        scored.answer = answers[0]

    monkeypatch.setattr(metrics.Translations, "__init__", keep_first)
    monkeypatch.setattr(metrics.Translations, "scores", lambda scored: {"bleu": float(scored.answer)})
    return measured


@pytest.fixture
def brute(workshop, chain, teacher, tokenizer):
    """(size, quality) of each of the chain's three models, and the original's quality, by numpy and pair by pair."""
    pairs = pairs_of(workshop, "val")
    loaded = load_model(workshop / "model" / "t5")
    models = []
    for choice, size in zip(
        choose(loaded, chain / "tuned", chain / "conf.json", range(3)), fractions(chain, chain / "tuned")
    ):
        model = load_model(workshop / "model" / "t5").model
        compose(model, choice)
        models.append((size, 10 - loss_per_token(model, tokenizer, pairs)))
    return models, 10 - loss_per_token(teacher, tokenizer, pairs) + 5


def explore(t5, chain, more):
    files = f"-p {chain}/tuned -c {chain}/conf.json -o found.json --report report.json"
    return run(f"experiments/explore.py -m {t5} {files} --batch-size 8 {more}")


def test_the_smallest_of_three_models(t5, chain, here, by_loss, brute):
    """Three drops: one that all models are within, one that only the best is, and one that none is."""
    models, dense = brute
    by_quality = sorted(models, key=lambda model: model[1])
    drops = [dense - by_quality[0][1] + 1e-3, dense - by_quality[-1][1] + 1e-3, dense - by_quality[-1][1] - 1e-3]
    result = explore(t5, chain, f"--score-examples 99 --drop {' '.join(map(str, drops))}")
    assert result["dense"] == pytest.approx(dense, rel=1e-5)
    assert (result["examples"], result["configurations"]) == ({"loss": 16, "quality": 16}, 3)
    conf = read_json(chain / "conf.json")
    for drop, found, config in zip(drops, result["found"], read_json(here / "found.json")["configs"], strict=True):
        good = [model for model in models if model[1] >= dense - drop]
        size, quality = min(good) if good else by_quality[-1]
        assert found["good_enough"] == bool(good)
        assert found["kept"] == pytest.approx(size, rel=1e-12) and found["quality"] == pytest.approx(quality, rel=1e-5)
        assert found["loss"] == pytest.approx(10 - quality, rel=1e-5)  # all examples are scored on
        assert config == conf["configs"][found["configuration"]]
        assert found["looked_at"] == (sum(each[0] <= size for each in models) if good else 3)
    report = read_json(here / "report.json")
    assert [row["kept"] for row in report["configurations"]] == sorted(size for size, _ in models)
    seconds = sum(row["loss_seconds"] for row in report["configurations"])
    assert result["found"][-1]["seconds"]["losses"] == pytest.approx(seconds, abs=1e-3)


def test_what_a_report_holds_is_not_measured_again(t5, chain, here, by_loss):
    first = explore(t5, chain, "--drop 0")
    once, before = len(by_loss), read_json(here / "report.json")
    assert once == 1 + first["found"][0]["measured"] > 1
    assert explore(t5, chain, "--drop 0") == first
    assert len(by_loss) == once + 1 and read_json(here / "report.json") == before  # the original's alone
    explore(t5, chain, "--drop 0 --max-length 5 --overwrite")
    assert len(by_loss) > once + 2  # other examples


def test_quality_is_what_the_evaluation_says(t5, chain, here):
    """BLEU this time, of random models: next to nothing, and so within 100 of the original's."""
    (found,) = explore(t5, chain, "--drop 100")["found"]
    n = found["configuration"]
    assert found["good_enough"] and n == int(np.argmin(fractions(chain, chain / "tuned")))
    assert found["quality"] == run(f"evaluate-t5.py -m {chain}/composed-{n} --split validation")["bleu"]


# --- the bash script ---------------------------------------------------------------------------------------------


def test_explore_ends_with_the_smallest_model_and_its_table(t5, tmp_path):
    """Oracles: numpy for the size, the evaluation script for the qualities, and the model's own parameters."""
    out = tmp_path / "the smallest"
    given = ("t5", "-m", t5, "-o", out, "--number", 4, "--drop", 100, "--data-args", "--batch-size 8")
    given += ("--block-args", "--epochs 1 --calibration 16", "--attention", "0.25 0.5", "--linear", "0.3 0.7")
    done = subprocess.run(
        ["bash", ROOT / "experiments" / "explore.sh", *map(str, given)],
        cwd="/",
        text=True,
        capture_output=True,
        timeout=600,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    table = read_json(out / "table.json")
    size = fractions(out, out / "library")
    assert (table["configuration"], table["kept"]) == (int(np.argmin(size)), pytest.approx(min(size), rel=1e-12))
    assert (table["good_enough"], table["fine_tuned"], table["looked_at"], table["measured"]) == (True, False, 1, 1)
    for split in ("validation", "test"):
        evaluated = run(f"evaluate-t5.py -m '{out}/smallest' --split {split} --batch-size 8")
        assert evaluated["bleu"] == table["quality"]["smallest"][split]
    variants = make_scheme(read_configurations(out / "conf.json")).configs[table["configuration"]]
    assert read_json(out / "smallest" / "record.json")["variants"] == variants
    assert len(read_json(out / "smallest" / "config.json")["kept_heads"]) == 6
    assert done.stdout == (out / "table.txt").read_text()
    assert f'<tr id="smallest-{table["configuration"]}"' in (out / "report.html").read_text()
    told = "good enough as composed; of 4 configurations 1 were looked at (loss) and 1 measured (bleu)"
    text = " ".join(done.stdout.split())
    assert told in text and f"configuration {table['configuration']} kept 1.000 {min(size):.3f}" in text
