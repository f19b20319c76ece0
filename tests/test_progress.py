"""Progress on stderr: what is said of the loss and of the time left, and how often it is asked for."""

import contextlib
import io
import itertools
import math
import re
import threading

import pytest
import torch
from helpers import build_model, recipe, run

from common.data.examples import Examples
from common.data.tasks import TASKS
from common.runtime import progress
from common.runtime.devices import Runtime
from common.runtime.progress import Talk, duration
from common.training.checkpoints import Checkpoint
from common.training.learner import EpochSeconds, Learner
from common.training.loop import fit, steps_of
from common.training.objectives import Loss, ModelObjective
from common.training.running_losses import RUNNING_BATCHES, RunningLosses, TimeLeft


class Terminal(io.StringIO):
    def isatty(self):
        return True


def tally(seconds, done):
    found = RunningLosses(["a"])
    found.seconds, found.done = seconds, done
    return found


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic goes on by one second whenever it is looked at."""
    seconds = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7501, "2 h 5 min"),
        (4 * 86400 + 7 * 3600 + 3000, "4 d 7 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_time_left_over_all_epochs_by_hand():
    """10 training batches of 2 s and 4 validation batches of 0.5 s an epoch: an epoch takes 22 s."""
    ahead = TimeLeft(3, 10, 4, False, EpochSeconds(0, 0.0, 2.0))
    assert ahead.seconds(tally(2.0, 1)) == 18 + 2 + 3 * 22
    assert ahead.seconds(tally(20.0, 10)) == 2 + 3 * 22
    assert ahead.seconds(tally(20.0, 10), tally(0.5, 1)) == 1.5 + 3 * 22
    last = ahead._replace(epochs=0)
    assert last.seconds(tally(20.0, 10), tally(2.0, 4)) == 0
    first = TimeLeft(0, 0, 4, False, None)  # nothing to train, and nothing validated before
    assert first.seconds(tally(0.0, 0), tally(0.5, 1)) == 1.5


def test_time_left_is_not_made_up():
    """Before the first training batch nobody knows what one takes."""
    ahead = TimeLeft(3, 10, 4, False, EpochSeconds(0, 0.0, 2.0))
    assert ahead.seconds(tally(0.0, 0)) is None
    assert ahead._replace(before=None).seconds(tally(2.0, 1)) is None
    assert TimeLeft(3, 0, 4, False, None).seconds(tally(0.0, 0), tally(1.0, 2)) is None
    assert ahead.after(None) == "" and ahead._replace(epochs=0).after(9.0) == ""


def test_running_loss_is_that_of_the_last_batches():
    """Oracle: the mean by hand, over learners of the weighted means of their last batches."""
    found = RunningLosses(["a", "b"])
    assert math.isnan(found.running_loss())
    for number in range(RUNNING_BATCHES + 10):
        for name in ("a", "b"):
            value = 100.0 if number < 10 else (2.0 if name == "a" else 4.0 + number % 2)
            found.add(Loss(name, torch.tensor(value), torch.tensor(1.0 + 2 * (number % 2))))
    of_b = (4 * 1 + 5 * 3) / 4
    assert found.running_loss() == pytest.approx((2.0 + of_b) / 2)


def test_a_bar_asks_for_the_loss_once_an_interval(clock):
    """Oracle: counting. Looked at once a batch, the clock says that 3 s have passed at every third batch."""
    stream, asked = Terminal(), []

    def status():
        asked.append(len(asked))
        return f"loss {len(asked)}"

    assert list(Talk(stream=stream).progress(range(30), "epoch 1 of 2", status=status)) == list(range(30))
    assert len(asked) == 10
    assert "epoch 1 of 2:" in stream.getvalue() and "loss 1" in stream.getvalue()


def test_plain_lines_are_sparse_and_say_the_time_left(clock):
    """50 items of a second each, a line each 16 s; what is left is by hand."""
    stream = io.StringIO()
    list(Talk(stream=stream).progress(range(50), "translating"))
    lines = stream.getvalue().splitlines()
    assert lines == ["translating: 15/50, 37 s left", "translating: 31/50, 20 s left", "translating: 47/50, 3 s left"]
    list(Talk(stream=stream).progress(range(20), "epoch 2 of 3", status=lambda: "loss 2.5000, 9 s left"))
    assert stream.getvalue().splitlines()[-1] == "epoch 2 of 3: 15/20, loss 2.5000, 9 s left"


def test_a_long_wait_is_told_of_and_a_short_one_is_not(monkeypatch):
    """Long is none at all, and then ever so long."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "WAIT_SECONDS", 1e6)
    with Talk(stream=stream).waiting("loading model"):
        pass
    assert stream.getvalue() == ""
    monkeypatch.setattr(progress, "WAIT_SECONDS", 0.0)
    said = threading.Event()
    talk = Talk(stream=stream)
    monkeypatch.setattr(talk, "say", lambda text: (stream.write(text), said.set()))
    with talk.waiting("loading model"):
        assert said.wait(30)
    assert stream.getvalue() == "loading model"


def test_an_evaluation_says_what_it_waits_for(workshop, monkeypatch):
    """As if all took long. Oracle: the order in which it has to happen, and the result."""
    said = []

    @contextlib.contextmanager
    def waiting(self, text):
        said.append(text)
        yield

    monkeypatch.setattr(Talk, "waiting", waiting)
    model = workshop / "model" / "distilbert"
    result = run(f"evaluate-distilbert.py -m {model}")
    assert said == [
        f"loading {model}",
        f"reading {model.parent / '../data/distilbert'} (test split), and tokenizing it",
        f"evaluating {model} on {result['examples']} examples",
    ]


@pytest.mark.parametrize("early_stop, left", [(5, "at most ")])
def test_training_tells_its_loss_and_the_time_left(tmp_path, monkeypatch, capsys, early_stop, left):
    """Told of after every batch here. Oracle: the epochs and batches, counted; nothing goes to stdout."""
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_SECONDS", -1.0)
    model, plan = build_model("t5"), recipe(epochs=2, batch_size=4, early_stop=early_stop)
    tokens = [[3 + i % 5, 4, 5, 1] for i in range(8)]
    data = Examples(TASKS["translation"], tokens, tokens, [], 0)
    stream = io.StringIO()
    learner = Learner(dict(model.named_parameters()), {}, plan, steps_of(data, plan))
    fit(
        {"model": learner},
        ModelObjective(model, plan),
        data,
        data,
        plan,
        Runtime(torch.device("cpu"), 4, Talk(stream=stream)),
        Checkpoint(tmp_path / "c", "0" * 12, {"model": "key"}),
    )
    lines = [re.sub(r"\d+\.\d+", "X", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "epoch 0 of 2, validation: 0/2",
        "epoch 0 of 2, validation: 1/2, loss X",
        "epoch 0: validation loss X",
        "epoch 1 of 2: 0/2",
        f"epoch 1 of 2: 1/2, loss X, {left}0 s left",
        f"epoch 1 of 2, validation: 0/2, {left}0 s left",
        f"epoch 1 of 2, validation: 1/2, loss X, {left}0 s left",
        f"epoch 1: validation loss X, X s; {left}0 s left",
        "epoch 2 of 2: 0/2",
        f"epoch 2 of 2: 1/2, loss X, {left}0 s left",
        f"epoch 2 of 2, validation: 0/2, {left}0 s left",
        f"epoch 2 of 2, validation: 1/2, loss X, {left}0 s left",
        "epoch 2: validation loss X, X s",
    ]
    assert capsys.readouterr().out == ""
