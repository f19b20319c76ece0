"""--track: what trackers are told, read back from TensorBoard's event files, and a run that goes on."""

import csv

import pytest
from helpers import as_arguments, good_flags, is_one_line, recipe

from common import tracking
from common.checkpoints import Checkpoint
from common.cli import TRACKERS
from common.training import last_rate, schedule

SCRIPTS = ["model-level_finetuning.py", "block-level_finetuning.py"]
FIGURES = {"train_loss", "val_loss", "train_seconds", "val_seconds", "learning_rate"}


@pytest.fixture
def tracked(workshop, chain, tmp_path):
    """tracked(script, changes): arguments of a script that writes to tmp_path and is tracked by TensorBoard."""
    pytest.importorskip("tensorboard")

    def make(script, changes=()):
        flags = good_flags(script, workshop, chain, tmp_path) | {"--track": "tensorboard", "--epochs": 3}
        return as_arguments(flags | dict(changes))

    return make


def events(folder):
    """{figure: {step: [values]}} in the only run in a folder, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = [path for path in folder.iterdir() if path.is_dir()]
    reader = EventAccumulator(str(run))
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            found.setdefault(tag, {}).setdefault(event.step, []).append(event.value)
    return found


def figures_in(stats):
    """The same of a stats CSV, empty cells left out."""
    found = {}
    with open(stats, newline="") as handle:
        for row in csv.DictReader(handle):
            for column, cell in row.items():
                if cell and column not in ("epoch", "run"):
                    found.setdefault(column, {})[int(row["epoch"])] = [pytest.approx(float(cell), rel=1e-6)]
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_has_the_figures_of_the_csv(call, tracked, tmp_path, script):
    """Oracles: the CSV, and the schedule for the rate of each epoch's last step. The run is named by the output."""
    code, result, err = call(script, *tracked(script))
    assert code == 0, err
    found = events(tmp_path / "runs")
    assert set(found) == FIGURES
    rates = found.pop("learning_rate")
    assert found == figures_in(tmp_path / "stats.csv")
    assert list(rates) == [1, 2, 3] and rates[1][0] > rates[2][0] > rates[3][0] > 0
    (run,) = (tmp_path / "runs").iterdir()
    last = (tmp_path / "stats.csv").read_text().split(",")[-1].strip()
    assert run.name.endswith(f".{last}") and len(last) == 12


def test_rate_of_the_last_step():
    """Oracle: the schedule, step by step; 4 steps an epoch."""
    plan = recipe(epochs=3, lr=0.5, warmup=0.25)
    steps = [plan.lr * schedule(step, 12, plan.warmup) for step in range(12)]
    assert [last_rate(plan, [4, 8, 12], epoch) for epoch in (1, 2, 3)] == [steps[3], steps[7], steps[11]]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_goes_on_repeats_no_step(call, tracked, tmp_path, monkeypatch, script, when):
    """Stopped around the saving of epoch 1, after the tracker was told of it. Oracle: the CSV."""
    original, calls = Checkpoint.save, []

    def stop(self, *arguments):
        calls.append(1)
        if when == "after" or len(calls) != 2:
            original(self, *arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", stop)
        code, _, err = call(script, *tracked(script))
    assert code == 130, err
    assert list(events(tmp_path / "runs")["val_loss"]) == [0, 1]
    code, _, err = call(script, *tracked(script))
    assert code == 0 and "resuming after epoch" in err
    found = events(tmp_path / "runs")
    assert found["val_loss"] == figures_in(tmp_path / "stats.csv")["val_loss"]
    assert [len(values) for values in found["learning_rate"].values()] == [1, 1, 1]


def test_a_closed_form_alone_is_tracked_too(call, tracked, tmp_path):
    script = "block-level_finetuning.py"
    changes = {"--method": "reconstruct", "--track-dir": tmp_path / "boards"}
    arguments = tracked(script, changes)
    code, _, err = call(script, *arguments)
    assert code == 0, err
    assert events(tmp_path / "boards") == figures_in(tmp_path / "stats.csv")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tracker_that_is_not_installed(call, workshop, chain, tmp_path, script):
    """Oracle: accelerate's own list of what is there. Nothing is written."""
    from accelerate.tracking import get_available_trackers

    absent = next(name for name in ("swanlab", "aim", "clearml") if name not in map(str, get_available_trackers()))
    flags = good_flags(script, workshop, chain, tmp_path) | {"--track": absent}
    code, result, err = call(script, *as_arguments(flags))
    assert (code, result) == (2, None) and is_one_line(err)
    assert f"--track {absent}: is not installed here; pip install {absent}" in err
    assert list(tmp_path.iterdir()) == []


def test_flags_of_tracking_go_together(call, tracked, tmp_path):
    script = "model-level_finetuning.py"
    (tmp_path / "file").write_text("mine")
    code, _, err = call(script, *tracked(script, {"--track-dir": tmp_path / "file"}))
    assert code == 2 and is_one_line(err) and "is a file where a folder belongs" in err
    arguments = tracked(script, {"--track-dir": tmp_path / "runs"})
    at = arguments.index("--track")
    code, _, err = call(script, *arguments[:at], *arguments[at + 2 :])
    assert code == 2 and is_one_line(err) and "--track-dir: goes with --track" in err
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_the_trackers_are_those_of_accelerate():
    """Oracle: accelerate's own table."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert {*TRACKERS} == {*map(str, LOGGER_TYPE_TO_CLASS)}


def test_a_tracker_that_fails_ends_no_training(call, tracked, tmp_path, monkeypatch):
    """Oracle: the CSV of all epochs, and one line about it."""
    start = tracking._start

    def broken(*arguments):
        tracker = start(*arguments)
        monkeypatch.setattr(tracker, "log", lambda figures, step: 1 / 0)
        return tracker

    monkeypatch.setattr(tracking, "_start", broken)
    code, _, err = call("model-level_finetuning.py", *tracked("model-level_finetuning.py"))
    assert code == 0 and list(figures_in(tmp_path / "stats.csv")["val_loss"]) == [0, 1, 2, 3]
    assert err.count("tensorboard: is told of nothing more (ZeroDivisionError: division by zero)") == 1
