"""--track: what trackers are told, read back from TensorBoard's event files."""

import csv

import pytest
from helpers import fails, run
from tiny import recipe

from common.runtime.settings import TRACKERS
from common.training.learner import schedule
from common.training.tracking import last_rate

TRAIN = "model-level_finetuning.py -m {0} -p {1}/tuned -c {1}/conf.json -n 0 -o m.pth --epochs 3 --batch-size 8"
BLOCKS = "block-level_finetuning.py -m {0} -p {1}/pruned -o library --method {2} --epochs 3 --batch-size 8"


def events(folder):
    """{figure: {epoch: value}} in the only run in a folder, by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (path,) = folder.iterdir()
    reader = accumulator.EventAccumulator(str(path / "composable-pruning"))
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def figures_in(stats):
    """The same of a stats CSV, empty cells left out."""
    figures = {}
    for row in csv.DictReader(stats.read_text().splitlines()):
        for column, cell in row.items():
            if cell and column not in ("epoch", "run"):
                figures.setdefault(column, {})[int(row["epoch"])] = pytest.approx(float(cell), rel=1e-6)
    return figures


@pytest.mark.parametrize("command, stats", [(TRAIN, "m.csv"), (BLOCKS, "library.csv")])
@pytest.mark.parametrize("method", ["train", "reconstruct"])
def test_tensorboard_has_the_figures_of_the_csv(t5, chain, here, command, stats, method):
    """Oracle: the CSV. The rate of each epoch's last step comes on top, where something trains."""
    run(command.format(t5, chain, method) + " --track tensorboard")
    figures = events(here / "runs")
    rates = figures.pop("learning_rate", {})
    assert figures == figures_in(here / stats) and list(rates) == [*figures.get("train_loss", {})]
    assert sorted(rates.values(), reverse=True) == [*rates.values()]


def test_rate_of_the_last_step():
    """Oracle: the schedule, step by step; 4 steps an epoch."""
    plan = recipe(epochs=3, lr=0.5, warmup=0.25)
    steps = [plan.lr * schedule(step, 12, plan.warmup) for step in range(12)]
    assert [last_rate(plan, 12, epoch) for epoch in (1, 2, 3)] == [steps[3], steps[7], steps[11]]


def test_a_tracker_that_is_not_installed(t5, chain, here):
    """Oracle: accelerate's own lists."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    assert {*TRACKERS} == {*map(str, LOGGER_TYPE_TO_CLASS)}
    absent = next(name for name in TRACKERS if name not in map(str, get_available_trackers()))
    command = TRAIN.format(t5, chain)
    assert f"--track {absent}: is not installed here; pip install" in fails(f"{command} --track {absent}")


def test_a_tracker_that_fails_ends_no_training(t5, chain, here, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    monkeypatch.setattr(TensorBoardTracker, "log", lambda *args, **kwargs: 1 / 0)
    run(TRAIN.format(t5, chain) + " --track tensorboard")
    assert [*figures_in(here / "m.csv")["val_loss"]] == [0, 1, 2, 3]
