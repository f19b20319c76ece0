"""Searching configurations for budgets with config_generator.py: grids, the chain of scripts, and what is refused.

In the tiny T5 an attention block has 4 heads and 4 · 24 · 32 = 3072 weights, a feed-forward block 48 neurons and 2 · 48
· 32 = 3072 weights: ten blocks, 30720 weights. The grid removes half of the heads or neurons, half of the weights, both
or nothing.
"""

import contextlib
import io
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import transformers
from helpers import files_in, is_one_line, load_script, outcome, read_json, run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import loss_per_token
from tiny import PREFIX, T5_BLOCKS, pairs_of

from common.composing.configurations import Configurations, grid_rates, read_configurations
from common.composing.scheme import make_scheme
from common.composing.search import budgets, timing
from common.data.examples import load_examples
from common.models.load import load_model, load_tokenizer

ALL = 30720  # weights of the tiny T5's blocks


# --- grids -----------------------------------------------------------------------------------------------------

RATES = st.lists(st.integers(0, 9).map(lambda n: n / 10), min_size=1, max_size=4, unique=True)


@settings(max_examples=40, deadline=None)
@given(attention=RATES, linear=RATES, feed_forward=st.none() | RATES)
def test_a_grid_has_every_pair_of_rates_and_no_more_configurations_than_that_takes(attention, linear, feed_forward):
    """Oracle: the pairs themselves; the longer of the two lists must meet each linear rate."""
    rates = grid_rates(attention, linear, feed_forward)
    assert {(each["attention"], each["linear"]) for each in rates} == set(itertools.product(attention, linear))
    if feed_forward:
        assert {(each["feed_forward"], each["linear"]) for each in rates} == set(
            itertools.product(feed_forward, linear)
        )
    assert all(("feed_forward" in each) == bool(feed_forward) for each in rates)
    assert len(rates) == len(linear) * max(len(attention), len(feed_forward or []))


# --- rates -----------------------------------------------------------------------------------------------------

MODULES = {
    "a": {"kind": "attention", "heads": 12},
    "a.o": {"kind": "linear", "weights": 1001, "block": "a", "linear": "o"},
    "f": {"kind": "feed_forward", "neurons": 47},
    "f.wi": {"kind": "linear", "weights": 1363, "block": "f", "linear": "wi"},
    "f.wo": {"kind": "linear", "weights": 10**9 + 7, "block": "f", "linear": "wo"},
}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_choices_rates_remove_just_what_its_variants_do(data):
    """Oracle: `make_scheme`, which names a variant by what its rates remove. Blocks from different configurations."""
    rates = st.fixed_dictionaries({name: st.just(0) | st.floats(0, 0.9) for name in MODULES})
    configs = data.draw(st.lists(rates, min_size=2, max_size=3))
    scheme = make_scheme(Configurations({}, MODULES, configs))
    choice = {block: data.draw(st.sampled_from(["dense", *scheme.blocks.get(block, ())])) for block in ("a", "f")}
    config = budgets.rates_of(choice, SimpleNamespace(scheme=scheme), MODULES)
    again = make_scheme(Configurations({}, MODULES, [config]))
    assert again.configs == [choice]
    assert all(
        removed == scheme.blocks[block][variant]
        for block, each in again.blocks.items()
        for variant, removed in each.items()
    )


# --- the chain of scripts --------------------------------------------------------------------------------------

GRID = "--attention 0 0.5 --linear 0 0.5 --feed-forward 0 0.5 --grid"


def make_grid(folder, model):
    """From a grid to a fine-tuned library of its variants."""
    run(f"config_generator.py -m {model} -o {folder}/grid.json {GRID}")
    run(f"prune_scheme_generator.py -i {folder}/grid.json -o {folder}/scheme.json")
    run(f"prune.py -m {model} -c {folder}/scheme.json -o {folder}/pruned")
    tuning = f"-p {folder}/pruned -o {folder}/tuned --stats {folder}/blocks.csv --calibration 16 --batch-size 8"
    run(f"block-level_finetuning.py -m {model} {tuning} --method reconstruct")


def searching(folder, model, out, *more):
    """The arguments of a search in a grid's folder."""
    files = ("-c", folder / "grid.json", "--search", folder / "tuned", "-o", folder / out)
    return ("config_generator.py", "-m", model, *files, "--batch-size", 8, *more)


BUDGETS = ("--budget", 0.45, 25000, "--budget-of", 1, 2)  # the last two: see test_the_grids_configurations


@pytest.fixture(scope="module")
def grid(workshop, tmp_path_factory):
    """The folder of the tiny T5's grid and library."""
    folder = tmp_path_factory.mktemp("grid")
    make_grid(folder, workshop / "model" / "t5")
    return folder


@pytest.fixture(scope="module")
def found(workshop, grid):
    """The folder in which four configurations have been searched for; result.json holds what the script said."""
    script, *arguments = searching(
        grid,
        workshop / "model" / "t5",
        "conf.json",
        *BUDGETS,
        "--objective",
        "loss",
        "--report",
        grid / "report.json",
        "--quiet",
    )
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert load_script(script).main([*map(str, arguments)]) == 0
    (grid / "result.json").write_text(out.getvalue())
    return grid


@pytest.fixture
def copied(found, tmp_path):
    """A copy of that folder, with all scores in its library's record."""
    return shutil.copytree(found, tmp_path / "copy")


@pytest.fixture
def refuses(copied, workshop):
    """refuses(out, *more): a search's one line on stderr, once it is sure that no file was touched or made."""

    def run(out, *more):
        before = files_in(copied)
        code, result, err = outcome(*searching(copied, workshop / "model" / "t5", out, *more))
        assert "Traceback" not in err, err
        assert (code, result) == (2, None)
        assert is_one_line(err) and ": error: " in err, err
        assert files_in(copied) == before
        return err

    return run


def kept_weights(library, block, variant):
    """How many weights a variant's masks keep, by numpy alone."""
    if variant == "dense":
        return 3072
    arrays = np.load(library / f"{block}.{variant}.npy", allow_pickle=False)
    return sum(int(arrays[name].sum()) for name in arrays.dtype.names if name.endswith(".keep"))


def test_the_grids_configurations(grid):
    """By hand, what --budget-of refers to: 1 halves heads and neurons, 2 all Linears."""
    configs = read_json(grid / "scheme.json")["configs"]
    assert [set(config.values()) for config in configs] == [
        {"dense"},
        {"heads-2", "neurons-24"},
        {"o-384", "wi-768_wo-768"},
        {"heads-2_o-384", "neurons-24_wi-768_wo-768"},
    ]


def test_what_is_found_is_an_ordinary_configurations_file(grid, found):
    """Its rates give just the chosen variants, and all of these are in the library. Oracle: the grid's scheme."""
    configurations = read_configurations(found / "conf.json")
    scheme, made = make_scheme(configurations), read_json(grid / "scheme.json")["blocks"]
    assert scheme.configs == [each["choice"] for each in read_json(found / "report.json")["searched"]]
    assert len(scheme.configs) == 4 and all(set(config) == set(T5_BLOCKS) for config in scheme.configs)
    assert all(
        removed == made[block][variant] for block, each in scheme.blocks.items() for variant, removed in each.items()
    )
    source = read_json(grid / "grid.json")
    written = read_json(found / "conf.json")
    assert (written["model"], written["modules"]) == (source["model"], source["modules"])
    assert len({json.dumps(config) for config in scheme.configs}) > 2  # it does depend on the budget


def test_found_models_compose_from_the_library_and_keep_within_the_budget(workshop, found, tmp_path, tokenizer):
    """Oracles: the non-zeros of the file, read by safetensors; the loss of one pair at a time; the masks' sums."""
    model, result = workshop / "model" / "t5", read_json(found / "result.json")
    before, configs = files_in(found), read_json(found / "scheme.json")["configs"]
    limits = [
        0.45 * ALL,
        None,
        *(sum(kept_weights(found / "tuned", *pair) for pair in configs[n].items()) for n in (1, 2)),
    ]
    assert limits[-2:] == [ALL / 2, 6 * (2304 + 384) + 4 * 1536]  # by hand
    for n, (limit, figures) in enumerate(zip(limits, result["found"], strict=True)):
        made = run(
            f"compose_model.py -m {model} -p {found}/tuned -c {found}/conf.json -n {n} -o {tmp_path}/composed-{n}"
        )
        tensors = safetensors.torch.load_file(tmp_path / f"composed-{n}" / "model.safetensors")
        nonzeros = {name: int(tensor.count_nonzero()) for name, tensor in tensors.items()}
        in_blocks = sum(
            count
            for name, count in nonzeros.items()
            if name.rpartition(".")[0].rpartition(".")[0] in T5_BLOCKS and "bias" not in name
        )
        assert sum(nonzeros.values()) == figures["cost"] == made["nonzero_parameters"]
        assert in_blocks / ALL == pytest.approx(figures["fraction"], rel=1e-12)
        assert sum(nonzeros.values()) <= 25000 if limit is None else in_blocks <= limit
        composed = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"composed-{n}").eval()
        loss = loss_per_token(composed, tokenizer, pairs_of(workshop, "val"))
        assert figures["loss"] == pytest.approx(loss, abs=1e-5)
        assert figures["history"][-1] == figures["loss"]
        assert all(after < before for before, after in itertools.pairwise(figures["history"]))
    assert files_in(found) == before  # no new variant, no other score


def test_the_predicted_sum_is_the_best_of_all(found):
    """Two oracles: the configuration whose cost was the budget; and the knapsack by dynamic programming.

    All costs are multiples of one, so the smallest sum for each cost can be told block by block.
    """
    report = read_json(found / "report.json")
    dense = report["dense"]["loss"]
    options = {block: {("dense", 3072): 0.0} for block in T5_BLOCKS}
    for each in report["variants"]:
        options[each["block"]][each["variant"], each["cost"]] = each["loss"] - dense
    best = {0: 0.0}
    for each in options.values():
        better = {}
        for (cost, total), ((_, more), score) in itertools.product(best.items(), each.items()):
            better[cost + more] = min(better.get(cost + more, float("inf")), total + score)
        best = better
    uniform = {each["configuration"]: each for each in report["uniform"]}
    limits = [0.45 * ALL, 25000 - report["rest"], *(uniform[n]["fraction"] * ALL for n in (1, 2))]
    for limit, figures in zip(limits, report["searched"], strict=True):
        expected = dense + min(total for cost, total in best.items() if cost <= limit + 0.5)
        assert figures["predicted"] == pytest.approx(expected, rel=1e-9)
        assert figures["fraction"] * ALL <= limit + 1e-6
    for configuration, figures in zip((1, 2), report["searched"][2:]):
        assert figures["predicted"] <= uniform[configuration]["predicted"] + 1e-12
        assert figures["fraction"] <= uniform[configuration]["fraction"]


# --- scores are kept -------------------------------------------------------------------------------------------


def test_a_second_run_scores_nothing_and_finds_the_same(workshop, copied):
    """Oracle: the first run's figures, its configuration, and the files."""
    before, first = files_in(copied), read_json(copied / "result.json")
    result = run(*searching(copied, workshop / "model" / "t5", "again.json", "--budget", 25000, "--objective", "loss"))
    assert (first["scored"], result["scored"]) == (30, 0)
    assert result["found"] == first["found"][1:2] and result["dense"] == first["dense"]
    again = copied / "again.json"
    assert read_json(again)["configs"] == read_json(copied / "conf.json")["configs"][1:2]
    written = files_in(copied)
    del written[again]
    assert written == before


def test_seconds_are_kept_beside_the_scores(workshop, copied, monkeypatch):
    """Oracle: the first search; the second one must not measure."""
    search = searching(copied, workshop / "model" / "t5", "c.json", "--measure", "latency", "--rounds", 0, "--budget")
    (first,) = run(*search, 1)["found"]
    assert 0 < first["cost"] < 60 and first["fraction"] <= 1
    monkeypatch.setattr(timing, "compare", None)
    assert run(*search, 1000 * first["cost"] + 1)["found"][0]["cost"] <= first["cost"] + 1e-3


# --- held-back examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored_on, held_back", [(12, 4)])
def test_what_is_found_is_checked_on_examples_that_nothing_was_scored_on(
    workshop, copied, tokenizer, scored_on, held_back
):
    """Oracle: the loss of one pair at a time of the composed models, on the fixed sample and on some of the rest."""
    model, data = workshop / "model" / "t5", workshop / "data" / "t5"
    more = ("--budget-of", 1, 2, "--objective", "loss", "--score-examples", scored_on, "--rounds", 2)
    result = run(*searching(copied, model, "some.json", *more, "--report", copied / "some-report.json"))
    report = read_json(copied / "some-report.json")
    assert result["examples"] == report["examples"] == {"scored_on": scored_on, "held_back": held_back}

    loaded = load_model(model)
    validation = load_examples(data, "validation", load_tokenizer(None, loaded), loaded.task, prefix=PREFIX)
    sample, rest = validation.sample_and_rest(scored_on)
    unseen = rest.sample(held_back).texts
    assert len(unseen) == held_back and sorted(sample.texts + rest.texts) == sorted(pairs_of(workshop, "val"))

    def losses(configurations, n):
        out = copied / f"{configurations}-{n}"
        composing = ("-m", model, "-p", copied / "tuned", "-c", copied / configurations, "-n", n, "-o", out)
        run("compose_model.py", *composing)
        composed = transformers.AutoModelForSeq2SeqLM.from_pretrained(out).eval()
        return [pytest.approx(loss_per_token(composed, tokenizer, pairs), abs=1e-5) for pairs in (sample.texts, unseen)]

    for n, (figures, uniform) in enumerate(zip(result["found"], report["uniform"], strict=True)):
        there = figures["held_back"]
        options = {"searched": there["searched"], f"uniform {there['uniform']['configuration']}": there["uniform"]}
        best = options[figures["returned"]]["loss"]
        assert best == min(each["loss"] for each in options.values()) <= uniform["held_back"]["loss"]
        assert [figures["loss"], best] == losses("some.json", n)
        assert [uniform["loss"], uniform["held_back"]["loss"]] == losses("grid.json", uniform["configuration"])
        assert figures["fraction"] <= uniform["fraction"] and there["history"][-1] == there["searched"]["loss"]
        for history in (figures["history"], there["history"]):
            assert all(after < before for before, after in itertools.pairwise(history))
    dense = loss_per_token(loaded.model, tokenizer, unseen)
    assert report["dense"]["held_back"] == {"loss": pytest.approx(dense, abs=1e-5), "kl": 0}


# --- what is refused -------------------------------------------------------------------------------------------


def test_an_infeasible_budget_names_the_range(refuses, copied):
    """By hand, the smallest that each block can be; the scheme's variants' masks, summed by numpy."""
    blocks = read_json(copied / "scheme.json")["blocks"]
    least = sum(
        min(kept_weights(copied / "tuned", block, variant) for variant in each) for block, each in blocks.items()
    )
    rest = 64 * 32 + 2 * 32 * 4 + 12 * 32
    for budget in (0.01, least / ALL - 1e-4, least + rest - 1):
        err = refuses("none.json", "--budget", 0.9, budget)
        assert "--budget" in err and f"{least / ALL:.4g} to 1 of what" in err
        assert f"{least + rest} to {ALL + rest}" in err and "parameters" in err
