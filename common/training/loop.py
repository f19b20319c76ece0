"""The one training loop, for blocks, for whole models, and for all variants within models composed of them.

A learner is a set of parameters that is trained on its own: the only one of a whole model or library, or one for every
variant of every block. An objective says what each learner loses on a batch; for blocks that takes a single teacher
pass, which serves all variants.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from common.data.batching import epoch_ends, evaluation_batches, training_batches
from common.data.examples import Examples
from common.runtime import signals
from common.runtime.devices import Runtime
from common.runtime.errors import UserError
from common.runtime.processes import ALONE
from common.training.checkpoints import Checkpoint
from common.training.learner import NEVER_A_NUMBER, EpochSeconds, Learner, Recipe
from common.training.objectives import ModelObjective, Objective
from common.training.running_losses import Pass, Progress, RunningLosses, TimeLeft

VERSION = 1  # of model-level training, part of the key of every output; raise it when results change


class Measure(NamedTuple):
    """A metric that is measured after every epoch: its name, and what gives its value.

    `of` is called with what is to be called after every batch.
    """

    name: str
    of: Callable[[Callable[[], None]], float]


@signals.deferred()
def fit(
    learners: dict[Hashable, Learner],
    objective: Objective,
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    runtime: Runtime,
    checkpoint: Checkpoint,
    *,
    rows: Iterable[EpochSeconds] = (),
    measure: Measure | None = None,
    on_epoch: Callable[[Progress], None] | None = None,
    on_finished: Callable[[Hashable, Learner], None] | None = None,
) -> Progress:
    """Train all learners, validating after every epoch and before the first.

    A signal ends the training after a batch, once its state is saved (see `signals`).

    Args:
        learners: by name.
        objective: what they lose, such as `objectives.ModelObjective` and `teacher.BlockObjective`.
        checkpoint: written after every epoch, and within it as often as it is due; resumed from.
        rows: of the epochs that the learners have behind them (`Learner.restart_from`).
        measure: a metric of the only learner's model, by which its best epoch is chosen; without it by the loss.
        on_epoch: called after every epoch.
        on_finished: called with (name, learner), its best weights restored, as soon as a learner is done.
    Raises:
        UserError: a validation loss is no finite number before any training; see also `Learner.restore_best`.
    """
    done, within = checkpoint.resume(learners, runtime.talk)
    progress = Progress([EpochSeconds(*row) for row in done or rows])
    going = dict(learners)
    while True:
        for name in [name for name, learner in going.items() if learner.finished]:
            learner = going.pop(name)
            learner.restore_best()
            if on_finished:
                on_finished(name, learner)
        if not going:
            return progress
        epoch = progress.epoch + 1
        running, order = RunningLosses(going), []
        if epoch > 0:
            # Dropout depends on (seed, epoch) and the process alone: resuming is exact.
            torch.manual_seed(recipe.seed * 100_003 + epoch + runtime.processes.number * 1_000_003)
            if within:
                running.load_state(within, runtime)
                within = None
            order = training_batches(train, recipe.batch_size, recipe.seed, epoch, recipe.epoch_size)

        save = partial(save_within, checkpoint, learners, progress, running, runtime)
        last_epoch = max(learner.last_epoch for learner in going.values())
        sooner = bool(recipe.early_stop or recipe.target_loss is not None)
        batches = len(order), len(validation_order(objective, validation, recipe, runtime))
        time_left = TimeLeft(last_epoch - epoch, *batches, sooner, progress.rows[-1] if progress.rows else None)
        label = f"epoch {epoch} of {last_epoch}"
        if epoch > 0:
            run_pass(going, objective, train, order, runtime, label, running, save, status=time_left.status)
        trained = running.result(runtime.processes)
        measured = validate(
            going,
            objective,
            validation,
            recipe,
            runtime,
            partial(save, validating=True),
            label=f"{label}, validation",
            status=partial(time_left.status, running),
        )
        metric = None
        if measure and all(map(math.isfinite, measured.losses.values())):
            started = runtime.now()
            metric = measure.of(partial(save, validating=True))
            measured = measured._replace(seconds=measured.seconds + runtime.now() - started)
        elif measure:
            metric = float("nan")
        for name, learner in going.items():
            loss = measured.losses[name]
            if epoch == 0 and not math.isfinite(loss):
                raise UserError(NEVER_A_NUMBER if len(learners) == 1 else f"{name}: {NEVER_A_NUMBER}")
            own_seconds = trained.own_seconds[name] + measured.own_seconds[name]
            learner.observe(epoch, trained.losses[name], loss, own_seconds, measured.parts[name], metric)
            if not math.isfinite(loss) and not learner.is_finite():
                learner.finished = True  # they will never be numbers again
                runtime.talk.say(
                    f"epoch {epoch}: the weights are no longer finite numbers; those of epoch {learner.best_epoch} are "
                    "kept. A lower --lr may help"
                )
        progress.rows.append(EpochSeconds(epoch, trained.seconds, measured.seconds))
        mean = sum(measured.losses.values()) / len(going)
        runtime.talk.say(
            f"epoch {epoch}: validation loss {mean:.4f}"
            + (f" (mean of {len(going)} variants)" if len(learners) > 1 else "")
            + (f", {measure.name} {metric:.4f}" if measure else "")
            + (f", {trained.seconds:.1f} s" if epoch else "")
            + time_left.after(trained.seconds + measured.seconds if epoch else None)
        )
        if on_epoch:  # before the checkpoint: a run that is stopped in between does this epoch's again
            on_epoch(progress)
        checkpoint.save(learners, progress.rows)
        if runtime.processes.any(signals.came())[0]:
            signals.stop()


def save_within(checkpoint, learners, progress, running, runtime, validating=False):
    """After a batch: save the state if that is due or a signal came, and stop if one came; all processes at once.

    Validation keeps the state that it began with, and begins again. Of several processes each has its own number of
    batches there, so that a signal waits for its end.
    """
    if validating and runtime.processes.count > 1:
        return
    came, due = runtime.processes.any(signals.came(), checkpoint.is_due() and not validating)
    if came or due:
        if progress.rows:  # else nothing has been done yet
            checkpoint.save(learners, progress.rows, running.state(runtime))
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
    *,
    training: bool = True,
    status: Callable[[RunningLosses], str] | None = None,
) -> None:
    """Take the examples through all learners, batch by batch; in training, every loss is a step.

    Args:
        order: the positions of each batch's examples.
        running: what is found is added to it; so many batches as it has already are left out.
        status: what to say of that now and then.
    """
    told = partial(status, running) if status else None
    for positions in runtime.talk.progress(order[running.done :], label, status=told):
        pieces = pieces_of(positions, examples, runtime) if training and objective.divides else [(positions, 1.0)]
        for piece, share in pieces:
            started = runtime.mark()
            begun = objective.begin(examples.batch(piece, runtime.device), learners)
            ended = runtime.mark()
            running.time(None, started, ended)
            for loss in objective.losses(begun, learners, training):
                if training:
                    processes = runtime.processes if objective.divides else ALONE
                    learners[loss.learner].step(loss.value * share, piece is pieces[-1][0], processes)
                if share:
                    running.add(loss)
                started, ended = ended, runtime.mark()
                running.time(loss.learner, started, ended)
        running.done += 1
        after_batch()


def pieces_of(positions: list[int], examples: Examples, runtime: Runtime) -> list[tuple[list[int], float]]:
    """This process's part of a batch in pieces, each with its share of the batch's labels, whose mean the loss is.

    The losses of all pieces of all processes, times these shares, add up to that of the batch. A process without an
    example of its own takes one whose share is 0, so that its gradients are there for the sum.
    """
    total, mine = examples.labels_in(positions), runtime.processes.share(positions)
    pieces = [mine[start :: runtime.pieces] for start in range(runtime.pieces)]
    return [(each, examples.labels_in(each) / total) for each in pieces if each] or [(positions[:1], 0.0)]


def validate(
    learners: dict[Hashable, Learner],
    objective: Objective,
    examples: Examples,
    recipe: Recipe,
    runtime: Runtime,
    after_batch: Callable[[], None] = lambda: None,
    *,
    label: str = "validation",
    status: Callable[[RunningLosses], str] | None = None,
) -> Pass:
    """Take validation examples through all learners; see `run_pass`."""
    order, running = validation_order(objective, examples, recipe, runtime), RunningLosses(learners)
    run_pass(learners, objective, examples, order, runtime, label, running, after_batch, training=False, status=status)
    return running.result(runtime.processes)


def validation_order(objective: Objective, examples: Examples, recipe: Recipe, runtime: Runtime) -> list[list[int]]:
    """The positions of this process's batches in a validation."""
    order = evaluation_batches(examples, recipe.batch_size)
    return runtime.processes.share(order) if objective.divides else order


def steps_of(examples: Examples, recipe: Recipe) -> int:
    """Optimizer steps of a whole run."""
    ends = epoch_steps(examples, recipe)
    return ends[-1] if ends else 0


def epoch_steps(examples: Examples, recipe: Recipe) -> list[int]:
    """Optimizer steps until the end of each epoch."""
    return epoch_ends(examples, recipe.batch_size, recipe.epochs, recipe.epoch_size)


def fit_model(
    model: torch.nn.Module,
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    runtime: Runtime,
    checkpoint: Checkpoint,
) -> tuple[Learner, Progress]:
    """Train all parameters of a model that nothing is removed from; it ends with its best weights, in `eval()`."""
    learner = Learner(dict(model.named_parameters()), {}, recipe, steps_of(train, recipe))
    objective = ModelObjective(model, recipe)
    progress = fit({"model": learner}, objective, train, validation, recipe, runtime, checkpoint)
    model.eval()
    return learner, progress
