"""The benchmark programs: their arithmetic on examples worked by hand, and one tiny run of each."""

import contextlib
import csv
import io
import json
import sys
from pathlib import Path

import pytest
from helpers import ROOT, build_model, load_script, loss_per_token, pairs_of
from matplotlib import image

from common.blocks import prunable_modules
from common.errors import UserError
from common.models import LoadedModel

sys.path.insert(0, str(ROOT / "benchmarks"))
import block_level
import compact
import composability
import selection

BASELINE = [(5.0, 0.0), (3.0, 10.0), (4.0, 20.0), (2.0, 30.0)]  # losses and seconds after epochs 0 to 3
COMPOSED = [(3.5, 0.0), (2.5, 8.0), (2.0, 16.0)]


def lines(program, capsys, *arguments):
    """Run a benchmark in this process: its exit code, its JSON lines, and what it says on stderr."""
    capsys.readouterr()
    code = program.main([*map(str, arguments), "--quiet"])
    out, err = capsys.readouterr()
    return code, [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()], err


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


# --- the sweep's arithmetic ------------------------------------------------------------------------------------


def test_curve_sums_the_training_seconds_alone():
    rows = [
        {"val_loss": "5.5", "train_seconds": "0.0", "val_seconds": "9"},
        {"val_loss": "", "train_seconds": "2.5", "val_seconds": "9"},  # not a number: it diverged
        {"val_loss": "3.0", "train_seconds": "1.5", "val_seconds": "9"},
    ]
    assert composability.read_curve(rows) == [(5.5, 0.0), (float("inf"), 2.5), (3.0, 4.0)]


def test_seconds_to_a_target():
    assert composability.seconds_to(BASELINE, 3.5) == (10.0, True)
    assert composability.seconds_to(BASELINE, 5.0) == (0.0, True)  # as it was before training
    assert composability.seconds_to(BASELINE, 1.9) == (30.0, False)  # never: the whole run


def test_targets_are_the_lowest_losses_so_far():
    assert composability.targets(BASELINE) == {"best": 2.0, "epoch 1": 3.0, "epoch 2": 3.0, "epoch 3": 2.0}


def test_ratio_of_two_configurations():
    """By hand: the second stops after an epoch, and its composed run ends at 3.2 after 7 s, short of 3."""
    comparisons = [
        composability.compare(BASELINE, COMPOSED),
        composability.compare([(4.0, 0.0), (3.0, 10.0)], [(3.5, 0.0), (3.2, 7.0)]),
    ]
    assert comparisons[0]["epoch 2"] == {
        "loss": 3.0,
        "baseline_seconds": 10.0,
        "composed_seconds": 8.0,
        "composed": "reached",
    }
    assert comparisons[1]["best"] == {
        "loss": 3.0,
        "baseline_seconds": 10.0,
        "composed_seconds": 7.0,
        "composed": "not reached",
    }
    gains = composability.gain(comparisons, block_seconds=4.0)
    best = {
        "ratio": pytest.approx((30 + 10) / (4 + 16 + 7), abs=1e-4),
        "baseline_seconds": 40.0,
        "composed_seconds": 23.0,
        "not_reached": [1],
    }
    early = {
        "ratio": pytest.approx((10 + 10) / (4 + 8 + 7), abs=1e-4),
        "baseline_seconds": 20.0,
        "composed_seconds": 15.0,
        "not_reached": [1],
    }
    assert gains == {"best": best, "epoch 1": early, "epoch 2": early, "epoch 3": best}


def test_composed_models_that_start_good_enough_cost_the_block_level_alone():
    comparison = composability.compare(BASELINE, [(1.9, 0.0)])
    assert composability.gain([comparison], 15.0)["best"]["ratio"] == 30 / 15
    assert composability.gain([comparison], 0.0)["best"]["ratio"] is None  # nothing to divide by


def test_own_seconds_of_variants():
    """By hand: 3 s each of the closed form, and three quarters of the gradient epoch's, a quarter being validation."""
    rows = [
        {"epoch": "0", "train_loss": "", "train_seconds": "0.0", "val_seconds": "0.0"},
        {"epoch": "1", "train_loss": "", "train_seconds": "6.0", "val_seconds": "2.0"},
        {"epoch": "2", "train_loss": "0.1", "train_seconds": "3.0", "val_seconds": "1.0"},
    ]
    variant_rows = [
        {"block": block, "variant": "v", "epoch": epoch, "seconds": seconds}
        for block, times in (("a", "031"), ("b", "032"))
        for epoch, seconds in zip("012", times)
    ]
    own = composability.own_seconds(rows, variant_rows)
    assert own == {("a", "v"): 3.75, ("b", "v"): 4.5}
    configs = [{"a": "v", "b": "v"}, {"a": "v", "b": "dense"}]
    assert composability.without_reuse(configs, own, teacher_seconds=0.75) == (0.75 + 3.75 + 4.5) + (0.75 + 3.75)
    # gradients alone: epoch 0 is nothing but validation
    rows[0]["val_seconds"] = "1.0"
    assert composability.own_seconds(
        [rows[0], rows[2]],
        [
            {"block": "a", "variant": "v", "epoch": "0", "seconds": "1"},
            {"block": "a", "variant": "v", "epoch": "2", "seconds": "1"},
        ],
    ) == {("a", "v"): 0.75}


@pytest.mark.parametrize("kind, count", [("t5", 4), ("distilbert", 2)])
def test_configurations_have_one_rate_of_a_kind_a_layer(kind, count):
    """By hand: two layers in each stack of the tiny models, whose names hold the layer's number first."""
    modules = prunable_modules(build_model(kind))
    grids = {"attention": [0.25, 0.5], "linear": [0.3, 0.5, 0.7]}
    configs = composability.draw(modules, 8, *grids.values(), seed=3)
    assert configs[:5] == composability.draw(modules, 5, *grids.values(), seed=3)  # more only come behind
    seen = set()
    for config in configs:
        layers = {}
        for name, rate in config.items():
            number = name.index(next(part for part in name.split(".") if part.isdigit()))
            layers.setdefault((name[: number + 1], modules[name]["kind"]), set()).add(rate)
        assert config.keys() == modules.keys() and len(layers) == 2 * count
        assert all(len(rates) == 1 and rates <= set(grids[kind]) for (_, kind), rates in layers.items())
        seen |= {(kind, *rates) for (_, kind), rates in layers.items()}
    assert len(seen) == 5  # every rate was drawn


def test_first_at_most():
    assert block_level.first_at_most([3.0, 2.0, 1.0], 2.0) == 1
    assert block_level.first_at_most([3.0, 2.0], 1.5) is None


# --- tiny runs -------------------------------------------------------------------------------------------------


def test_block_level(workshop, chain, teacher, tokenizer, capsys):  # noqa: F811
    code, (setting, passes, closed_form, gradients, equal, first, second), err = lines(
        block_level,
        capsys,
        "-m",
        workshop / "model" / "t5",
        "--attention",
        0.25,
        0.5,
        "--linear",
        0.3,
        0.3,
        "--calibration",
        16,
        "--held-out",
        8,
        "--gradient-epochs",
        2,
        "--reuse-examples",
        8,
        "--batch-size",
        8,
        "--rounds",
        1,
        "--full-epoch",
    )
    assert (code, err) == (0, "")
    assert setting["variants"] == 6 * 2 + 4  # as in conf.json of the `chain`: the feed-forward blocks are shared
    assert setting["calibration"] == 16 and setting["threads"] == 1 and setting["model"].endswith("t5")
    for figures in (passes, closed_form, gradients):
        numerator, denominator, *_ = figures["seconds"].values()
        assert figures["ratio"]["median"] == pytest.approx(numerator / denominator, rel=0.05)  # both are rounded
    assert passes["ratio_to_a_pass_with_head_and_loss"]["median"] == pytest.approx(
        passes["seconds"]["closed form"] / passes["seconds"]["with its head and loss"], rel=0.05
    )

    errors = equal["held_out_nmse"]
    assert [(kind, error["variants"]) for kind, error in errors.items()] == [
        ("all", 16),
        ("attention", 12),
        ("feed_forward", 4),
    ]
    for error in errors.values():
        curve, goal = error["gradients_by_epoch"], error["closed_form"]
        assert curve[0] == pytest.approx(error["pruned"], rel=1e-3) and curve == sorted(curve, reverse=True)
        assert error["reached_in_epoch"] == next((i for i, value in enumerate(curve) if value <= goal), None)
    reached, seconds = errors["all"]["reached_in_epoch"], equal["seconds"]
    assert equal["reached"] == (reached is not None) and ("lower bound" in equal["ratio_is"]) == (reached is None)
    assert equal["ratio"] == pytest.approx(
        seconds["gradients_by_epoch"][-1] * 2 / sum(seconds["closed form"]), rel=0.05
    )

    assert len(first["validation_loss"]) == 5 and first["validation_examples"] == 16
    assert (second["configuration"], second["attention"], second["linear"]) == (1, 0.5, 0.3)
    dense = loss_per_token(teacher, tokenizer, pairs_of(workshop, "val"))
    assert first["validation_loss"]["dense"] == pytest.approx(dense, rel=1e-5)
    baseline = read_csv(chain / "pruned-0.csv")  # by model-level_finetuning.py, before its first epoch
    assert first["validation_loss"]["pruned"] == pytest.approx(float(baseline[0]["val_loss"]), rel=1e-5)


def test_block_level_needs_a_trained_model_for_losses(capsys):
    code, figures, err = lines(block_level, capsys, "--only", "equal-error")
    assert (code, figures) == (2, []) and "-m" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "kind, figures",
    [("t5", ["seconds_per_batch", "seconds_per_generated_token"]), ("distilbert", ["seconds_per_batch"])],
)
def test_compact(capsys, monkeypatch, kind, figures):
    """Oracle for the sizes: weights counted by hand, half of what the blocks have."""
    whole = build_model(kind)
    monkeypatch.setattr(compact, "random_model", lambda *_: LoadedModel(whole, Path("tiny")))
    monkeypatch.setitem(compact.SIZES, kind, (4, 8))
    code, (setting, *forward, step), err = lines(compact, capsys, "--model-type", kind, "--rounds", 2)
    assert (code, err) == (0, "")
    half = {
        "t5": (6 * 4 * 24 * 32 + 4 * 2 * 48 * 32) // 2,
        # Biases of out-projections and output Linears stay.
        "distilbert": (2 * (4 * 32 * 32 + 3 * 32) + 2 * (2 * 48 * 32 + 48)) // 2,
    }[kind]
    parameters = setting["parameters"]
    assert parameters["original"] - parameters["compact"] == half
    assert [each["figure"] for each in forward] == figures
    for each in forward:
        counts, median = each["multiply_adds"], each["speed_up"]["median"]
        assert each["promised_speed_up"] == pytest.approx(counts["original"] / counts["compact"], abs=1e-4)
        assert each["promised_speed_up"] > 1.1
        assert each["share_of_promise"] == pytest.approx(median / each["promised_speed_up"], rel=1e-3)
    # A batch of 8 of the tiny model's inputs: DistilBERT's has 64 positions, T5's are of 32 tokens on each side.
    expected = {
        "t5": 8 * (32 * (6 * 4 * 24 * 32 + 4 * 2 * 48 * 32) + 6 * 2 * 32 * 32 * 24 + 32 * 64 * 32),
        "distilbert": 8 * (2 * 64 * (4 * 32 * 32 + 2 * 48 * 32) + 2 * 2 * 64 * 64 * 32 + 32 * 34),
    }[kind]
    assert forward[0]["multiply_adds"]["original"] == expected
    for spread in (*(each["speed_up"] for each in forward), step["ratio"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_composability(workshop, tmp_path, capsys, monkeypatch):
    """In one process; the next test starts the scripts as the program does."""

    def stage(script, *arguments):
        with contextlib.redirect_stdout(io.StringIO()):
            if load_script(script).main([str(argument) for argument in arguments]):
                raise UserError(f"{script} has failed")

    monkeypatch.setattr(composability, "stage", stage)
    folder = tmp_path / "sweep"
    arguments = (
        "-m",
        workshop / "model" / "t5",
        "-o",
        folder,
        "--counts",
        2,
        1,
        "--attention",
        0.25,
        0.5,
        "--linear",
        0.3,
        0.5,
        "--epochs",
        2,
        "--epoch-size",
        16,
        "--batch-size",
        8,
        "--seed",
        1,
        "--block-args",
        "--epochs 1 --calibration 16",
        "--model-args",
        "--early-stop 0 --lr 1e-3",
    )
    code, figures, err = lines(composability, capsys, *arguments)
    assert (code, err) == (0, "")
    assert [each["figure"] for each in figures] == ["setting", "configuration", "sweep", "configuration", "sweep"]
    setting, *configurations = figures[0], figures[1], figures[3]
    assert setting["data"].endswith("t5") and setting["block_args"] == "--epochs 1 --calibration 16"

    for n, configuration in enumerate(configurations):
        curves = {name: read_csv(folder / f"{name}-{n}.csv") for name in ("baseline", "composed")}
        for name, rows in curves.items():
            assert configuration[name]["val_loss"] == [float(row["val_loss"]) for row in rows]
        best, losses = min(configuration["baseline"]["val_loss"]), configuration["composed"]["val_loss"]
        assert configuration["targets"]["best"]["loss"] == best
        assert all(loss > best for loss in losses[:-1])  # it stopped as soon as it was as good
        assert configuration["targets"]["best"]["composed"] == ("reached" if losses[-1] <= best else "not reached")
    for n, sweep in ((1, figures[2]), (2, figures[4])):
        assert (sweep["configurations"], sweep["blocks_without_reuse"]) == (n, 10 * n)
        assert (
            sweep["blocks_with_reuse"]
            == len(read_csv(folder / "blocks-1-blocks.csv")) / 3
            + (n - 1) * len(read_csv(folder / "blocks-2-blocks.csv")) / 3
        )  # epoch 0, the closed form, and one more
        seconds = sum(
            float(row["train_seconds"]) for step in range(1, n + 1) for row in read_csv(folder / f"blocks-{step}.csv")
        )
        assert sweep["block_seconds"] == pytest.approx(seconds, abs=2e-3)
        best = sweep["with_reuse"]["best"]
        assert best["ratio"] == pytest.approx(best["baseline_seconds"] / (seconds + best["composed_seconds"]), rel=0.01)
        assert sweep["with_reuse"]["epoch 2"] == best
    assert figures[2]["block_seconds_without_reuse"] == pytest.approx(figures[2]["block_seconds"], abs=2e-3)
    height, width = image.imread(folder / "ratio.png").shape[:2]
    assert width > height > 400

    models = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npy", ".pth", ".csv")}
    assert lines(composability, capsys, *arguments) == (0, figures, "")
    assert models == {path: path.stat().st_mtime_ns for path in models}  # nothing was made again
    (folder / "blocks-1-blocks.csv").unlink()
    code, _, err = lines(composability, capsys, *arguments)
    assert code == 2 and "start again" in err  # never a ratio from seconds that are lost


def test_stages_are_the_suites_own_scripts(chain, tmp_path, capfd):
    scheme = tmp_path / "conf_prune.json"
    composability.stage("prune_scheme_generator.py", "-i", chain / "conf.json", "-o", scheme)
    assert scheme.read_bytes() == (chain / "conf_prune.json").read_bytes()
    assert capfd.readouterr().out == ""  # stdout is the program's own
    with pytest.raises(UserError, match="prune_scheme_generator.py ended with exit code 2"):
        composability.stage("prune_scheme_generator.py", "-i", tmp_path / "absent.json", "-o", scheme)


def test_selection(workshop, teacher, tokenizer, capsys):
    code, (setting, *rows, result), err = lines(
        selection,
        capsys,
        *("-m", workshop / "model" / "t5", "--attention", 0.25, "--feed-forward", 0.5, "--linear", 0.5, 0.8),
        *("--calibration", 16, "--batch-size", 8, "--rounds", 1),
    )
    assert (code, err) == (0, "")
    dense = loss_per_token(teacher, tokenizer, pairs_of(workshop, "val"))
    assert setting["dense"]["loss"] == pytest.approx(dense, abs=1e-4) and setting["dense"]["kl"] == 0
    *tables, first, second = rows
    assert [(row["criterion"], row["rates"]) for row in tables] == [
        (criterion, rates)
        for criterion in ("l1", "reconstruction")
        for rates in ({"attention": 0.25, "feed_forward": 0.5}, {"linear": 0.5}, {"linear": 0.8})
    ]
    assert all(row["kl"] > 0 and row["seconds"]["closed form"] >= 0 for row in tables)
    assert (first["rates"], second["rates"]) == (1, 2) and min(first["ratio"]["min"], second["ratio"]["min"]) > 0
    assert result["model"].endswith("t5")


def test_selection_needs_as_many_rates_of_heads_as_of_neurons(workshop, capsys):
    code, found, err = lines(selection, capsys, "-m", workshop / "model" / "t5", "--attention", 0.5)
    assert code == 2 and found == [] and "as many rates" in err
