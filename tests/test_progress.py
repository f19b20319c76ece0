"""Progress on stderr: what is said of the loss and of the time left, and how often it is asked for."""

import io
import itertools
import re
import threading

import pytest
import torch
from tiny import CPU, build_model, examples, recipe

from common.runtime import progress
from common.runtime.devices import Runtime
from common.runtime.progress import Talk
from common.training.checkpoints import Checkpoint
from common.training.learner import Learner
from common.training.loop import fit, steps_of
from common.training.losses import RUNNING_BATCHES, Loss, ModelObjective, RunningLosses


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic goes on by one second whenever it is looked at; a line may follow another after 15."""
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 15.0)
    seconds = itertools.count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


def test_running_loss_is_that_of_the_last_batches():
    """Oracle: the mean by hand, over learners of the weighted means of their last batches."""
    found = RunningLosses(["a", "b"])
    assert found.status() == ""
    for number in range(RUNNING_BATCHES + 10):
        for name in ("a", "b"):
            value = 100.0 if number < 10 else (2.0 if name == "a" else 4.0 + number % 2)
            found.add(Loss(name, torch.tensor(value), torch.tensor(1.0 + 2 * (number % 2))))
    of_b = (4 * 1 + 5 * 3) / 4
    assert found.status() == f"loss {(2.0 + of_b) / 2:.4f}"


def test_plain_lines_are_sparse_and_say_the_time_left(clock):
    """50 items of a second each, a line each 16 s; what is left is by hand."""
    stream = io.StringIO()
    list(Talk(stream=stream).progress(range(50), "translating"))
    lines = stream.getvalue().splitlines()
    assert lines == ["translating: 14/50, 39 s left", "translating: 30/50, 21 s left", "translating: 46/50, 4 s left"]
    list(Talk(stream=stream).progress(range(20), "epoch 2 of 3", status=lambda: "loss 2.5000"))
    assert stream.getvalue().splitlines()[-1] == "epoch 2 of 3: 14/20, loss 2.5000, 6 s left"


def test_remarks_are_as_rare_as_lines_of_progress(clock):
    """By hand: a look at the clock when the talk begins, one a remark, and one more for a line that is said."""
    stream = io.StringIO()
    talk = Talk(stream=stream)
    for number in range(1, 40):
        talk.remark(f"epoch {number}")
    assert stream.getvalue().splitlines() == ["epoch 16", "epoch 32"]


def test_many_short_loops_within_a_long_one_are_told_of(clock):
    """12 blocks of 5 batches, at 7 looks at the clock a block; by hand, a line every 16 of them."""
    stream = io.StringIO()
    talk = Talk(stream=stream)
    for block in talk.progress(range(12), "scoring"):
        list(talk.progress(range(5), f"block {block}"))
    lines = stream.getvalue().splitlines()
    assert lines[:3] == [
        "scoring: 2/12, 1 min 15 s left",
        "scoring: 4/12, 1 min 4 s left; block 4: 0/5",
        "scoring: 6/12, 49 s left; block 6: 2/5, 4 s left",
    ]
    assert len(lines) == 5


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


def test_training_tells_its_loss_and_the_time_left(tmp_path, monkeypatch, capsys):
    """Told of after every batch here. Oracle: the epochs and batches, counted; nothing goes to stdout."""
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", -1.0)
    model, plan, stream = build_model("t5"), recipe(epochs=2, batch_size=4), io.StringIO()
    data, talk = examples("t5", 8), Talk(stream=stream)
    learner = Learner(dict(model.named_parameters()), {}, plan, steps_of(data, plan))
    checkpoint = Checkpoint(tmp_path / "c", {"model": "key"}, talk)
    fit({"model": learner}, ModelObjective(model, plan), data, data, plan, Runtime(CPU, 4, talk), checkpoint)
    lines = [re.sub(r"\d+\.\d+", "X", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        "epoch 0 of 2, validation: 0/2",
        "epoch 0 of 2, validation: 1/2, loss X, 0 s left",
        "epoch 0: validation loss X",
        "epoch 1 of 2: 0/2",
        "epoch 1 of 2: 1/2, loss X, 0 s left",
        "epoch 1 of 2, validation: 0/2",
        "epoch 1 of 2, validation: 1/2, loss X, 0 s left",
        "epoch 1: validation loss X, X s; at most 0 s left",
        "epoch 2 of 2: 0/2",
        "epoch 2 of 2: 1/2, loss X, 0 s left",
        "epoch 2 of 2, validation: 0/2",
        "epoch 2 of 2, validation: 1/2, loss X, 0 s left",
        "epoch 2: validation loss X, X s",
    ]
    assert capsys.readouterr().out == ""
