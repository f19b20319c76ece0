"""The one training loop, for blocks, for whole models, and for all variants within models composed of them.

A learner is a set of parameters that is trained on its own: the only one of a whole model or library, or one for every
variant of every block. An objective's `losses` says what each learner loses on a batch, in a `losses.Loss` for each, or
in validation one for each of its parts.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from common.data.batching import evaluation_batches, training_batches
from common.data.examples import Examples
from common.models.checks import is_finite
from common.runtime import plan, signals
from common.runtime.devices import Runtime
from common.runtime.errors import UserError
from common.runtime.progress import duration
from common.runtime.settings import TrainingSettings
from common.training.checkpoints import Checkpoint
from common.training.learner import NEVER_A_NUMBER, Learner
from common.training.losses import ModelObjective, Objective, Pass, RunningLosses
from common.training.stats import EpochSeconds

VERSION = 2  # of model-level training, part of the key of every output; raise it when results change


class Measure(NamedTuple):
    """A metric that is measured after every epoch; `of` gives its value, called with what to call after every batch."""

    name: str
    of: Callable[[Callable[[], None]], float]


@signals.deferred()
def fit(
    learners: dict[Hashable, Learner],
    objective: Objective,
    train: Examples,
    validation: Examples,
    recipe: TrainingSettings,
    runtime: Runtime,
    checkpoint: Checkpoint,
    *,
    rows: Iterable[EpochSeconds] = (),
    measure: Measure | None = None,
    on_epoch: Callable[[list[EpochSeconds]], None] = lambda rows: None,
    on_finished: Callable[[Hashable, Learner], None] = lambda name, learner: None,
) -> list[EpochSeconds]:
    """Train all learners, validating after every epoch and before the first; returns the seconds of all epochs.

    A signal ends the training after a batch, once its state is saved (see `signals`).

    Args:
        objective: what the learners lose, such as `losses.ModelObjective` and `teacher.BlockObjective`.
        checkpoint: written after every epoch, and within it as often as it is due; resumed from.
        rows: of the epochs that the learners have behind them (`Learner.restart_from`).
        measure: a metric of the only learner's model, by which its best epoch is chosen; without it by the loss.
        on_finished: called with (name, learner), its best weights restored, as soon as a learner is done.
    Raises:
        UserError: a validation loss is no finite number before any training; see also `Learner.restore_best`.
    """
    resumed, within = checkpoint.resume(learners)
    rows, going = resumed or list(rows), dict(learners)
    while True:
        for name in [name for name, learner in going.items() if learner.finished]:
            learner = going.pop(name)
            learner.restore_best()
            on_finished(name, learner)
        if not going:
            return rows
        epoch = rows[-1].epoch + 1 if rows else 0
        last_epoch = max(learner.last_epoch for learner in going.values())
        count = max(going.values(), key=lambda learner: learner.last_epoch).trained
        label = f"epoch {count(epoch)} of {count(last_epoch)}"
        running = RunningLosses(going)
        save = partial(save_within, checkpoint, learners, rows, running, runtime)
        if epoch > 0:
            # Dropout depends on (seed, epoch) and the process alone: resuming is exact.
            torch.manual_seed(recipe.seed * 100_003 + epoch + runtime.processes.number * 1_000_003)
            if within:
                running.load_state(within, runtime)
                within = None
            resumed_at = running.done
            order = training_batches(train, recipe.batch_size, recipe.seed, epoch, recipe.epoch_size)
            run_pass(going, objective, train, order, runtime, label, running, save)
        trained = running.result(runtime.processes)
        save = partial(save, validating=True)
        validated = validate(going, objective, validation, recipe, runtime, save, f"{label}, validation")
        metric, seconds = None, validated.seconds
        if measure:
            started = runtime.now()
            metric = measure.of(save) if all(map(math.isfinite, validated.losses.values())) else float("nan")
            seconds += runtime.now() - started
        for name, learner in going.items():
            loss = validated.losses[name]
            if epoch == 0 and not math.isfinite(loss):
                raise UserError(NEVER_A_NUMBER if len(learners) == 1 else f"{name}: {NEVER_A_NUMBER}")
            learner.observe(epoch, trained.losses[name], loss, validated.parts[name], metric)
            if not math.isfinite(loss) and not all(map(is_finite, learner.parameters.values())):
                learner.finished = True  # they will never be numbers again
                runtime.talk.say(
                    f"epoch {count(epoch)}: the weights are no longer finite numbers; those of epoch "
                    f"{count(learner.best_epoch)} are kept. A lower --lr may help"
                )
        rows.append(EpochSeconds(epoch, trained.seconds, seconds))
        planned = plan.current()
        if planned and epoch > 0:  # those after it are like it
            planned.steps += len(order) * (last_epoch - epoch + 1) - resumed_at
            after = (last_epoch - epoch) * (trained.seconds + seconds)
            planned.skipped += after
            planned.count("epochs after it", last_epoch - epoch, after)
            for learner in going.values():
                learner.finished = True
        mean, left = sum(validated.losses.values()) / len(going), (last_epoch - epoch) * (trained.seconds + seconds)
        runtime.talk.remark(
            f"epoch {count(epoch)}: validation loss {mean:.4f}"
            + (f" (mean of {len(going)} variants)" if len(learners) > 1 else "")
            + (f", {measure.name} {metric:.4f}" if measure else "")
            + (f", {trained.seconds:.1f} s" if epoch else "")
            + (f"; at most {duration(left)} left" if epoch and left else "")
        )
        on_epoch(rows)  # before the checkpoint: a run that is stopped in between does this epoch's again
        checkpoint.save(learners, rows)
        if runtime.processes.any(signals.came())[0]:
            signals.stop()


def save_within(checkpoint, learners, rows, running, runtime, validating=False):
    """After a batch: save the state if that is due or a signal came, and stop if one came; all processes at once.

    Validation begins again. Of several processes each has its own number of batches there: a signal waits for its end.
    """
    if validating and runtime.processes.count > 1:
        return
    came, due = runtime.processes.any(signals.came(), checkpoint.is_due() and not validating)
    if came or due:
        if rows:  # else nothing has been done yet
            checkpoint.save(learners, rows, running.state(runtime))
        if came:
            signals.stop()


def run_pass(
    learners: dict[Hashable, Learner],
    objective: Objective,
    examples: Examples,
    order: list[list[int]],
    runtime: Runtime,
    label: str,
    running: RunningLosses,
    after_batch: Callable[[], None] = lambda: None,
    training: bool = True,
) -> None:
    """Take the examples through all learners, batch by batch; in training, every loss is a step.

    The losses are added to `running`; so many batches of `order` as it has already are left out.
    """
    running.start(runtime)
    for positions in runtime.talk.progress(order[running.done :], label, running.status, examples.tokens_in):
        pieces = pieces_of(positions, examples, runtime) if training else [(positions, 1.0)]
        for piece, share in pieces:
            for loss in objective.losses(examples.batch(piece, runtime.device), learners, training):
                if training:
                    is_last = piece is pieces[-1][0]
                    learners[loss.learner].step(loss.value * share, is_last, runtime.processes)
                if share:
                    running.add(loss)
        running.done += 1
        after_batch()
    running.count_seconds(runtime)


def pieces_of(positions: list[int], examples: Examples, runtime: Runtime) -> list[tuple[list[int], float]]:
    """This process's part of a batch in pieces, each with its share of the batch's labels, whose mean the loss is.

    A process without an example of its own takes one whose share is 0, so that its gradients are there for the sum.
    """
    total, mine = examples.labels_in(positions), runtime.processes.share(positions)
    pieces = [mine[start :: runtime.pieces] for start in range(runtime.pieces)]
    return [(piece, examples.labels_in(piece) / total) for piece in pieces if piece] or [(positions[:1], 0.0)]


def validate(
    learners: dict[Hashable, Learner],
    objective: Objective,
    examples: Examples,
    recipe: TrainingSettings,
    runtime: Runtime,
    after_batch: Callable[[], None] = lambda: None,
    label: str = "validation",
) -> Pass:
    """Take validation examples through all learners, each process its share of the batches."""
    order, running = runtime.processes.share(evaluation_batches(examples, recipe.batch_size)), RunningLosses(learners)
    run_pass(learners, objective, examples, order, runtime, label, running, after_batch, training=False)
    return running.result(runtime.processes)


def steps_of(examples: Examples, recipe: TrainingSettings) -> int:
    """Optimizer steps of a whole run."""
    return recipe.epochs * -(-min(recipe.epoch_size or len(examples), len(examples)) // recipe.batch_size)


def fit_model(
    model: torch.nn.Module,
    train: Examples,
    validation: Examples,
    recipe: TrainingSettings,
    runtime: Runtime,
    checkpoint: Checkpoint,
) -> tuple[Learner, list[EpochSeconds]]:
    """Train all parameters of a model that nothing is removed from; it ends with its best weights, in `eval()`."""
    learner = Learner(dict(model.named_parameters()), {}, recipe, steps_of(train, recipe))
    rows = fit({"model": learner}, ModelObjective(model, recipe), train, validation, recipe, runtime, checkpoint)
    model.eval()
    return learner, rows
