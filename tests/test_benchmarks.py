"""The benchmark programs: their arithmetic on examples worked by hand, and one tiny run of each."""

import contextlib
import csv
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT, build_model, lively, load_script, loss_per_token, padded_batch, pairs_of, t5_config
from helpers import examples as random_examples
from matplotlib import image

from common.blocks import prunable_modules
from common.errors import UserError
from common.models import LoadedModel
from common.training import Learner

sys.path.insert(0, str(ROOT / "benchmarks"))
import block_level
import compact
import composability
import guarantees
import joint_memory
import joint_step
import saving
import selection
import side_by_side
import small_models

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


def test_epochs_to_a_target():
    assert composability.first_at_most(BASELINE, 3.5) == (1, True)
    assert composability.first_at_most(BASELINE, 5.0) == (0, True)  # as it was before training
    assert composability.first_at_most(BASELINE, 1.9) == (3, False)  # never: the whole run


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
        "baseline_epochs": 1,
        "baseline_seconds": 10.0,
        "composed_epochs": 1,
        "composed_seconds": 8.0,
        "composed": "reached",
    }
    assert comparisons[1]["best"] == {
        "loss": 3.0,
        "baseline_epochs": 1,
        "baseline_seconds": 10.0,
        "composed_epochs": 1,
        "composed_seconds": 7.0,
        "composed": "not reached",
    }
    gains = composability.gain(comparisons, block_seconds=4.0)
    best = {
        "ratio": pytest.approx((30 + 10) / (4 + 16 + 7), abs=1e-4),
        "baseline_epochs": 3 + 1,
        "baseline_seconds": 40.0,
        "composed_epochs": 2 + 1,
        "composed_seconds": 23.0,
        "not_reached": [1],
    }
    early = {
        "ratio": pytest.approx((10 + 10) / (4 + 8 + 7), abs=1e-4),
        "baseline_epochs": 1 + 1,
        "baseline_seconds": 20.0,
        "composed_epochs": 1 + 1,
        "composed_seconds": 15.0,
        "not_reached": [1],
    }
    assert gains == {"best": best, "epoch 1": early, "epoch 2": early, "epoch 3": best}
    # By hand: 4 epochs of 100 examples against a joint run of 250 and 3 epochs, the calibration passes left out.
    assert composability.in_examples(gains["best"], epoch_size=100, joint_examples=250) == {
        "ratio": round(400 / (250 + 300), 4),
        "baseline": 400,
        "joint": 250,
        "composed": 300,
    }


def test_composed_models_that_start_good_enough_cost_the_block_level_alone():
    comparison = composability.compare(BASELINE, [(1.9, 0.0)])
    assert composability.gain([comparison], 15.0)["best"]["ratio"] == 30 / 15
    assert composability.gain([comparison], 0.0)["best"]["ratio"] is None  # nothing to divide by


def test_projection_scales_the_library_by_its_variants_and_all_else_by_the_configurations():
    """By hand: 4 configurations cost 40 s and 2 s; 10 of the grid's 15 variants cost 21 s, of which 12 s are joint."""
    best = {"ratio": 1.7391, "baseline_seconds": 40.0, "composed_seconds": 2.0, "not_reached": [3]}
    measured = {
        "way": "joint",
        "configurations": 4,
        "variants": 10,
        "block_seconds": 21.0,
        "with_reuse": {"best": best},
        "in_examples": {"baseline": 400, "joint": 100, "composed": 20},
    }
    (projected,) = composability.projections(measured, [4, 50, 2], grid=15)  # 4 was measured
    assert (projected["projected"], projected["configurations"]) == (True, 50)
    assert projected["in_seconds"] == {
        "ratio": round(500 / (31.5 + 25), 4),
        "baseline": 500.0,
        "library": 31.5,
        "composed": 25.0,
    }
    assert projected["in_examples"]["ratio"] == round(5000 / (150 + 250), 4)
    assert projected["not_reached"] == [3] and "15 variants" in projected["assumption"]


def test_variants_in_the_grid():
    """By hand: the tiny T5 has 6 attention blocks of 4 heads and 4 feed-forward blocks."""
    modules = prunable_modules(build_model("t5"))
    assert composability.variants_in_grid(modules, [0.25, 0.5], [0.3, 0.5, 0.7]) == 6 * 2 * 3 + 4 * 3
    assert composability.variants_in_grid(modules, [0.25, 0.3], [0.3, 0.5]) == 6 * 2 + 4 * 2  # both remove one head


def test_length_of_a_joint_run():
    assert composability.joint_epochs(100, available=290) == (1, 100)
    assert composability.joint_epochs(290, available=290) == (1, 290)
    assert composability.joint_epochs(301, available=100) == (4, 76)  # 304: whole epochs of one size


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


def test_first_at_most_of_losses_alone():
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


def in_this_process(script, *arguments):
    """What `composability.stage` does, without a process for each stage."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if load_script(script).main([str(argument) for argument in arguments]):
            raise UserError(f"{script} has failed")
    return json.loads(said.getvalue())


def sweep(workshop, folder, capsys, *more):
    """Run the sweep for one and two configurations of the tiny T5."""
    return lines(
        composability,
        capsys,
        *("-m", workshop / "model" / "t5", "-o", folder, "--counts", 2, 1, "--seed", 1, "--batch-size", 8),
        *("--attention", 0.25, 0.5, "--linear", 0.3, 0.5, "--epochs", 2, "--epoch-size", 16, "--project", 50),
        *("--model-args", "--early-stop 0 --lr 1e-3", *more),
    )


def files(folder):
    """When each model and table there was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".npy", ".pth", ".csv")}


def train_seconds(path):
    return [float(row["train_seconds"]) for row in read_csv(path)]


def check_composed(figures, folder, way, names):
    """That composed models stop as soon as they are as good as their baseline's best.

    Args:
        names: {(library, configuration): name of the stats CSV}, in the order of the figures.
    """
    best = [min(each["val_loss"]) for each in figures if each["figure"] == "baseline"]
    for nth, loss in enumerate(best):
        assert loss == min(float(row["val_loss"]) for row in read_csv(folder / f"baseline-{nth}.csv"))
    composed = [each for each in figures if each["figure"] == "composed" and each["way"] == way]
    assert [(each["library"], each["configuration"]) for each in composed] == list(names)
    for each, name in zip(composed, names.values()):
        losses, target = each["val_loss"], best[each["configuration"]]
        assert losses == [float(row["val_loss"]) for row in read_csv(folder / f"{name}.csv")]
        assert each["targets"]["best"]["loss"] == target
        assert all(loss > target for loss in losses[:-1])
        assert each["targets"]["best"]["composed"] == ("reached" if losses[-1] <= target else "not reached")


def test_composability_of_blocks_tuned_jointly(workshop, tmp_path, capsys, monkeypatch):
    """In one process; another test starts the scripts as the program does."""
    monkeypatch.setattr(composability, "stage", in_this_process)
    code, _, err = sweep(workshop, tmp_path / "none", capsys, "--joint-args", "--epochs 3")
    assert code == 2 and "--joint-examples" in err
    folder = tmp_path / "sweep"
    more = ("--joint-examples", 64, 16, "--joint-args", "--calibration 16 --lr 1e-3")  # for two and for one
    code, figures, err = sweep(workshop, folder, capsys, *more)
    assert (code, err) == (0, "")
    one, two = ["baseline", "composed", "sweep"], ["baseline", "composed", "composed", "sweep", "sweep"]
    assert [each["figure"] for each in figures] == ["setting", *one, *two, "picture"]
    check_composed(
        figures,
        folder,
        "joint",
        {("joint-1", 0): "joint-1-0", ("joint-2", 0): "joint-2-0", ("joint-2", 1): "joint-2-1"},
    )
    of_one, of_two, projected = (each for each in figures if each["figure"] == "sweep")
    # 48 examples in the training split: 64 are two epochs of 32.
    for n, figure, examples, epochs in ((1, of_one, 16, 1), (2, of_two, 64, 2)):
        chosen = json.loads((folder / f"chosen-{n}.json").read_text())["seconds"]
        _, closed_form, *joint = train_seconds(folder / f"joint-{n}.csv")
        assert chosen > 0 and closed_form > 0 and len(joint) == epochs
        assert figure["block_seconds"] == pytest.approx(chosen + closed_form + sum(joint), abs=2e-3)
        best = figure["with_reuse"]["best"]
        baseline = composed = composed_epochs = baseline_epochs = 0
        for nth in range(n):
            rows = read_csv(folder / f"baseline-{nth}.csv")
            losses = [float(row["val_loss"]) for row in rows]
            epoch = losses.index(min(losses))
            baseline += sum(train_seconds(folder / f"baseline-{nth}.csv")[: epoch + 1])
            baseline_epochs += epoch
            ours = train_seconds(folder / f"joint-{n}-{nth}.csv")
            composed += sum(ours)
            composed_epochs += len(ours) - 1
        ours = chosen + closed_form + sum(joint) + composed
        assert best["ratio"] == pytest.approx(baseline / ours, rel=0.02)
        assert figure["in_examples"] == {
            "ratio": round(16 * baseline_epochs / (examples + 16 * composed_epochs), 4),
            "baseline": 16 * baseline_epochs,
            "joint": examples,
            "composed": 16 * composed_epochs,
        }
        composed_as_is = [len(train_seconds(folder / f"joint-{n}-{nth}.csv")) == 1 for nth in range(n)]
        assert figure["reached_as_composed"] == sum(composed_as_is)
        library = json.loads((folder / f"joint-{n}" / "record.json").read_text())
        assert {each["made_from"]["method"] for each in library["variants"].values()} == {"joint"}
        assert len(library["variants"]) == figure["variants"]
    assert (projected["projected"], projected["configurations"], projected["measured_configurations"]) == (True, 50, 2)
    growth = (6 * 2 * 2 + 4 * 2) / of_two["variants"]  # of the grid: 6 attention blocks, 4 feed-forward blocks
    examples = of_two["in_examples"]
    assert projected["in_examples"]["ratio"] == pytest.approx(
        25 * examples["baseline"] / (growth * examples["joint"] + 25 * examples["composed"]), rel=1e-3
    )
    height, width = image.imread(folder / "ratio.png").shape[:2]
    assert width > height > 400

    before = files(folder)
    assert sweep(workshop, folder, capsys, *more) == (0, figures, "")
    assert files(folder) == before  # nothing was made again
    (folder / "chosen-1.json").unlink()  # as if it had been interrupted while choosing: it is done again
    code, again, err = sweep(workshop, folder, capsys, *more)
    assert (code, err) == (0, "") and (folder / "chosen-1.json").is_file()
    changed = {path.parent.name for path, time in files(folder).items() if before[path] != time}
    assert changed == {"chosen-1"}  # the same choice, so that the rest stays
    code, _, err = sweep(workshop, folder, capsys, "--joint-examples", 32)
    assert code == 2 and "joint-1" in err  # a library of another length is not replaced unasked
    (folder / "joint-2.csv").unlink()
    code, _, err = sweep(workshop, folder, capsys, *more)
    assert code == 2 and "joint-2.csv" in err  # never a ratio from seconds that are lost


def test_composability_of_blocks_tuned_apart(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(composability, "stage", in_this_process)
    folder = tmp_path / "sweep"
    more = ("--ways", "apart", "--block-args", "--epochs 1 --calibration 16")
    code, figures, err = sweep(workshop, folder, capsys, *more)
    assert (code, err) == (0, "")
    one = ["baseline", "composed", "sweep"]
    assert [each["figure"] for each in figures] == ["setting", *one, *one, "sweep", "picture"]
    assert figures[0]["data"].endswith("t5") and figures[0]["block_args"] == "--epochs 1 --calibration 16"
    check_composed(figures, folder, "apart", {("tuned", 0): "composed-0", ("tuned", 1): "composed-1"})
    for n, figure in ((1, figures[3]), (2, figures[6])):
        assert (figure["configurations"], figure["blocks_without_reuse"]) == (n, 10 * n)
        assert (
            figure["variants"]
            == len(read_csv(folder / "blocks-1-blocks.csv")) / 3
            + (n - 1) * len(read_csv(folder / "blocks-2-blocks.csv")) / 3
        )  # epoch 0, the closed form, and one more
        seconds = sum(sum(train_seconds(folder / f"blocks-{step}.csv")) for step in range(1, n + 1))
        assert figure["block_seconds"] == pytest.approx(seconds, abs=2e-3)
        best = figure["with_reuse"]["best"]
        assert best["ratio"] == pytest.approx(best["baseline_seconds"] / (seconds + best["composed_seconds"]), rel=0.01)
        assert figure["with_reuse"]["epoch 2"] == best
    assert figures[3]["block_seconds_without_reuse"] == pytest.approx(figures[3]["block_seconds"], abs=2e-3)

    before = files(folder)
    assert sweep(workshop, folder, capsys, *more) == (0, figures, "")
    assert files(folder) == before  # nothing was made again
    (folder / "blocks-1-blocks.csv").unlink()
    code, _, err = sweep(workshop, folder, capsys, *more)
    assert code == 2 and "start again" in err  # never a ratio from seconds that are lost


def test_stages_are_the_suites_own_scripts(chain, tmp_path, capfd):
    scheme = tmp_path / "conf_prune.json"
    result = composability.stage("prune_scheme_generator.py", "-i", chain / "conf.json", "-o", scheme)
    assert result["configurations"] == 3
    assert scheme.read_bytes() == (chain / "conf_prune.json").read_bytes()
    assert capfd.readouterr().out == ""  # stdout is the program's own
    with pytest.raises(UserError, match="prune_scheme_generator.py ended with exit code 2"):
        composability.stage("prune_scheme_generator.py", "-i", tmp_path / "absent.json", "-o", scheme)


def test_joint_step(workshop, capsys):
    code, (setting, figures), err = lines(
        joint_step, capsys, "-m", workshop / "model" / "t5", "--rounds", 2, "--batch-size", 8, "--linear", 0.3, 0.5
    )
    assert (code, err) == (0, "") and setting["threads"] == 1
    assert figures["variants"] == 6 * 2 * 2 + 4 * 2  # attention and feed-forward blocks of the tiny T5
    attention, feed_forward = 4 * 24 * 32, 2 * 48 * 32  # weights of a block
    assert figures["parameters_of_variants"] == 6 * 4 * attention + 4 * 2 * feed_forward
    for spread in (figures["joint_over_model_level"], figures["noise"]):
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]


def test_side_by_side_takes_fewer_operations(capsys):
    """One variant is trained alike both ways. Of several each adds as much as the first, or hardly anything."""
    code, (setting, *figures), err = lines(
        side_by_side, capsys, "--width", 32, "--batch-size", 2, "--rounds", 2, "--blocks", 3, "--variants", 1, 2, 6
    )
    assert (code, err) == (0, "") and (setting["threads"], setting["width"], setting["blocks"]) == (1, 32, 3)
    assert [each["variants_of_a_block"] for each in figures] == [1, 2, 6]
    apart, together = ([each["operations"][way] for each in figures] for way in side_by_side.WAYS)
    (original,) = {each["operations_of_the_original"] for each in figures}
    assert apart[0] == together[0] > original > 0
    of_one = apart[0] - original
    assert [each - original for each in apart] == pytest.approx([of_one, 2 * of_one, 6 * of_one], rel=0.2)
    assert together[2] - together[1] == 4 * 3  # four more variants of three blocks: each clips its own gradients
    assert apart[2] - original > 3 * (together[2] - original)
    for each in figures:
        assert each["operations_ratio"] == round(each["operations"][side_by_side.WAYS[0]] / together.pop(0), 3)
        assert each["seconds_of_copies"] > 0 and all(seconds > 0 for seconds in each["seconds"].values())


def test_operations_are_what_computes_something():
    """By hand: a sum and a product; neither views nor empty tensors, and an operation in place."""
    tensor = torch.ones(4, 3)
    with side_by_side.Operations() as counted:
        (tensor.t()[1:].sum() * tensor.view(12)[0]).unsqueeze(0)
        torch.empty_like(tensor).expand(2, 4, 3).unbind()
        tensor.add_(1)
    assert counted.count == 3


def test_joint_memory(capsys, monkeypatch):
    """Oracle: the bytes of the tensors that the learner and the model really hold."""
    held = {}

    def observe(learner, epoch, *figures):
        inner(learner, epoch, *figures)
        if epoch == 1:  # all is in memory: the last gradients, too
            moments = [state[name] for state in learner.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
            held["moments"] = sum(tensor.nbytes for tensor in moments)
            held["best_weights"] = sum(tensor.nbytes for tensor in learner.best.values())
            held["masks"] = sum(mask.nbytes for mask in learner.held.masks.values())
            held["trained"] = sum(tensor.nbytes for tensor in learner.parameters.values())

    def clip(parameters, most):  # in a step, before they are let go of
        parameters = list(parameters)
        held["gradients"] = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        return clip_grad_norm(parameters, most)

    inner, clip_grad_norm = Learner.observe, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(Learner, "observe", observe)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setitem(joint_memory.SHAPES, "small", (32, 48, 2, 4))
    code, (setting, figures), err = lines(joint_memory, capsys, "--size", "small", "--batch-size", 4)
    assert (code, err) == (0, "") and setting["variants"] == 5 * (6 + 4) and setting["steps"] == 5 + 1
    variants, model = 5 * (6 * 4 * 256 * 32 + 4 * 2 * 48 * 32), figures["parameters"]
    rest = model - variants // 5  # 5 variants of every block; the rest is in no block
    assert figures["parameters_of_variants"] == variants
    parts = joint_memory.formula(variants, model, rest)
    assert {name: parts[name] for name in ("moments", "best_weights", "gradients")} == {
        name: held[name] for name in ("moments", "best_weights", "gradients")
    }
    assert parts["masks"] == held["masks"] and parts["weights"] + 4 * rest == held["trained"]
    assert (parts["original"], parts["rest_of_its_own"]) == (4 * model, 4 * rest)
    assert figures["formula_gib"] == pytest.approx(sum(parts.values()) / 2**30, abs=1e-3)
    assert figures["peak_gib"] > figures["formula_gib"] and len(figures["seconds_of_steps"]) == 6


def test_saving(capsys, monkeypatch):
    """All ways take the same steps. Memory is that of this process here, which does not fall."""
    monkeypatch.setitem(joint_memory.SHAPES, "small", (32, 48, 2, 4))
    monkeypatch.setattr(saving, "get_context", lambda kind: None)
    monkeypatch.setattr(saving, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    small = ("--batch-size", 8, "--length", 6, "--steps", 2, "--rounds", 2)
    code, (setting, *ways, done), err = lines(saving, capsys, *small)
    assert (
        (code, err) == (0, "") and setting["threads"] == 1 and [each["way"] for each in ways] == list(saving.WAYS)[:4]
    )
    for way in ways:
        assert way["loss"] == pytest.approx(ways[0]["loss"], rel=1e-5) and way["seconds_of_a_step"] > 0
        assert way["peak_gib"] == pytest.approx(way["beyond_state_gib"] + done["state_gib"], abs=2e-3)
    assert done["state_gib"] == pytest.approx(16 * done["parameters"] / 2**30, abs=1e-3)


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


# --- what the guarantees cost ------------------------------------------------------------------------------------


def test_guarantees(capsys, tmp_path):
    """By hand: the same code against itself; the file of weights has the asked-for size."""
    arguments = ("--variants", 3, "--width", 8, "--megabytes", 1, "--rounds", 1, "--against", ROOT)
    code, (_, result), err = lines(guarantees, capsys, *arguments)
    assert (code, err) == (0, "") and (result["variants"], result["weights_megabytes"]) == (3, 1)
    for part in ("write", "read"):
        seconds = result[f"{part}_seconds"]
        assert (
            seconds.keys() == {"here", "against"} and min(seconds.values()) > 0 and result[f"{part}_ratio"]["min"] > 0
        )
    code, _, err = lines(guarantees, capsys, "--against", tmp_path)
    assert code == 2 and str(tmp_path) in err


# --- the small models of the studies -------------------------------------------------------------------------------


def test_bert_from_distilbert_is_the_same_encoder():
    """Oracle: DistilBERT's own hidden states; and what its classifier makes of BERT's pooled state."""
    distilbert, batch = lively("distilbert"), padded_batch("distilbert")
    model = small_models.bert_from(distilbert).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = distilbert.distilbert(**inputs).last_hidden_state  # (batch, length, dim)
        found = model.bert(**inputs).last_hidden_state
        logits = distilbert.classifier(distilbert.pre_classifier(expected[:, 0]).tanh())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-5, atol=1e-5)


def fitting_t5():
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(t5_config(d_kv=8)).eval()  # 4 heads of 8, and d_model is 32


def test_marian_from_t5_is_nearly_the_same_model(tokenizer):
    """Oracle: T5's own logits, once what has no counterpart is taken out.

    That is Marian's positions and T5's position biases. Marian's norms subtract the mean, so T5 is given weights that
    write none to the stream. What is left is that Marian's stream has the same size at every token.
    """
    model, data = fitting_t5(), random_examples("t5", 12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_attention_bias.weight"):
                parameter.zero_()
            elif name.endswith((".o.weight", ".wo.weight")):
                parameter -= parameter.mean(0, keepdim=True)
            elif name == "shared.weight":
                parameter -= parameter.mean(1, keepdim=True)
                parameter *= 1 / parameter.pow(2).mean(1, keepdim=True).sqrt()
        batch = data.batch(range(len(data)))
        marian = small_models.marian_from(model, small_models.stream_sizes(model, batch)).eval()
        for side in ("encoder", "decoder"):
            marian.get_submodule(f"model.{side}.embed_positions").weight.zero_()
        found, expected = marian(**batch).logits, model(**batch).logits
    real = batch["labels"] != -100
    assert torch.corrcoef(torch.stack([found[real].flatten(), expected[real].flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("family", ["bert", "marian"])
def test_small_models(family, workshop, capsys, tmp_path):
    """Oracle: the suite's own evaluation, of the folder and with the data that its record names."""
    kind = {"bert": "distilbert", "marian": "t5"}[family]
    folder, start = tmp_path / family, workshop / "model" / kind
    if family == "marian":
        start = tmp_path / "start"
        fitting_t5().save_pretrained(start)
    arguments = (family, "--start", start, "-t", workshop / "tokenizer" / kind, "--data", workshop / "data" / kind)
    arguments += ("-o", folder, "--epochs", 2, "--batch-size", 8)
    code, (result,), err = lines(small_models, capsys, *arguments)
    assert (code, err, result["skipped"]) == (0, "", False)
    code, (again,), _ = lines(small_models, capsys, *arguments)
    assert (code, again["skipped"]) == (0, True)
    script, metric = {"bert": ("evaluate-distilbert.py", "accuracy"), "marian": ("evaluate-t5.py", "bleu")}[family]
    _, (scores,), _ = lines(load_script(script), capsys, "-m", folder, "--split", "validation")
    assert scores[metric] == pytest.approx(result[f"validation_{metric}"])
    assert scores["parameters"] == result["parameters"]


def test_small_models_begin_with_the_right_family(workshop, capsys, tmp_path):
    start = ("--start", workshop / "model" / "t5", "--data", workshop / "data" / "t5", "-o", tmp_path / "bert")
    for family, wanted in (("bert", "needs a distilbert"), ("marian", "heads that have d_model in all")):
        code, found, err = lines(small_models, capsys, family, *start)
        assert code == 2 and found == [] and wanted in err
