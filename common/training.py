"""The one training loop, for blocks, for whole models, and for all variants within models composed of them.

A learner is a set of parameters that is trained on its own: the only one of a whole model or library, or one for every
variant of every block. An objective says what each learner loses on a batch; for blocks that takes a single teacher
pass, which serves all variants.
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from common import interruption
from common.batching import Tokens, epoch_ends, evaluation_batches, training_batches
from common.checkpoints import Checkpoint, text_of
from common.data import Examples, rows_of
from common.devices import Runtime, computing, elapsed
from common.errors import UserError
from common.layers import Layers
from common.masks import HeldMasks
from common.processes import ALONE, Processes
from common.progress import duration

NEVER_A_NUMBER = "the validation loss was never a number, not even before training: the model or the data are damaged"
RUNNING_BATCHES = 50  # the loss that progress is told with is the mean of so many
BETAS = (0.9, 0.98)  # of AdamW; the runs are short, and 0.999 would remember their first steps to the end


@dataclass(frozen=True)
class Recipe:
    """How to train.

    `batch_size` in examples, or as `Tokens`; `epoch_size` in examples, None = all; `lr` is the peak rate; `warmup` a
    fraction of all steps; `early_stop` in epochs, 0 = never; `target_loss`: stop once the validation loss is no
    higher, None = never; `distill` and `dropout`: see `ModelObjective`.
    """

    epochs: int
    batch_size: int | Tokens
    lr: float
    warmup: float
    weight_decay: float
    clip: float
    early_stop: int
    precision: str
    seed: int
    epoch_size: int | None = None
    target_loss: float | None = None
    distill: float = 0.0
    dropout: bool = False

    def to_json(self) -> dict:
        size = self.batch_size
        return asdict(self) | {"batch_size": size.to_json() if isinstance(size, Tokens) else size}


class Epoch(NamedTuple):
    """A learner's figures of an epoch. `train_loss` is NaN where nothing was trained; `seconds`: its own alone.

    `parts`: {name: validation loss of this part}, where the validation has parts; `metric`: None if none is measured.
    """

    epoch: int
    train_loss: float
    val_loss: float
    seconds: float
    parts: dict[str, float] = {}
    metric: float | None = None


class EpochSeconds(NamedTuple):
    """What an epoch of all learners together took."""

    epoch: int
    train: float
    validation: float


# --- learners --------------------------------------------------------------------------------------------------


class Learner:
    """Parameters, their masks, their optimizer, and the best state they have been in.

    Removed weights stay at exactly zero: gradients are masked before clipping, weights after each step. A parameter
    that had no part in a loss is left alone by its step, decay and moments included.
    """

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        masks: dict[str, torch.Tensor],
        recipe: Recipe,
        total_steps: int,
        shares: dict[str, float] | None = None,
    ):
        """
        Args:
            parameters: {name: tensor to train}, on their device.
            masks: {name: bool tensor}, True = kept; names that are absent are free.
            total_steps: optimizer steps in the whole run, for the learning-rate schedule.
            shares: {name: factor on the learning rate}; 1 for names that are absent.
        """
        self.parameters, self.recipe, self.total_steps = parameters, recipe, total_steps
        self.held = HeldMasks(parameters, masks)
        fused = next(iter(parameters.values())).device.type in ("cpu", "cuda")
        groups = {}
        for name, parameter in parameters.items():
            groups.setdefault((shares or {}).get(name, 1.0), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "share": share} for share, group in groups.items()],
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            betas=BETAS,
            fused=fused,
        )
        self.steps = 0
        self.last_epoch = recipe.epochs
        self.best, self.best_loss, self.best_metric, self.best_epoch = None, float("inf"), None, None
        self.history: list[Epoch] = []
        self.finished = False

    def step(self, loss: torch.Tensor, is_whole: bool = True, processes: Processes = ALONE) -> None:
        """One optimizer step down the gradient of a scalar loss, summed over the processes.

        Args:
            is_whole: whether that is all of the loss, or the last part of it; if not, the step waits for the others.
        """
        loss.backward()
        if not is_whole:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.recipe.lr * schedule(self.steps, self.total_steps, self.recipe.warmup)
        processes.add([p.grad for p in self.parameters.values() if p.grad is not None])
        self.held.mask_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)  # those that have a gradient
        self.optimizer.step()
        self.held.apply()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def move(self, name: str, device: torch.device) -> None:
        """Move one parameter, its mask and its moments to a device; a gradient is dropped."""
        parameter = self.parameters[name]
        parameter.grad, parameter.data = None, parameter.data.to(device)
        self.held.move(name, device)
        state = self.optimizer.state.get(parameter, {})
        state |= {key: value.to(device) for key, value in state.items()}

    def observe(
        self,
        epoch: int,
        train_loss: float,
        val_loss: float,
        seconds: float,
        parts: dict[str, float] | None = None,
        metric: float | None = None,
    ) -> None:
        """Note an epoch's figures; keep the weights if they are the best so far; decide whether to stop.

        Args:
            metric: the higher, the better; of equal ones, the lower loss is. None: the loss alone decides.
        """
        self.history.append(Epoch(epoch, train_loss, val_loss, seconds, parts or {}, metric))
        if metric is None or self.best is None:
            is_better = val_loss < self.best_loss
        else:
            is_better = (metric, -val_loss) > (self.best_metric, -self.best_loss)  # never if it is NaN
        if is_better:
            self.best_loss, self.best_metric, self.best_epoch = val_loss, metric, epoch
            self._keep_as_best()
        patience, target = self.recipe.early_stop, self.recipe.target_loss
        self.finished = (
            epoch >= self.last_epoch
            or bool(patience and epoch - (self.best_epoch or 0) >= patience)
            or (target is not None and val_loss <= target)
        )

    @torch.no_grad()
    def _keep_as_best(self):
        """Copy the weights; into the place of the last best ones, so that there is never a second copy."""
        if self.best is None:
            self.best = {name: torch.empty_like(parameter) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            self.best[name].copy_(parameter)

    def count_as_epoch(
        self,
        epoch: int,
        val_loss: float,
        seconds: float,
        parts: dict[str, float] | None = None,
        metric: float | None = None,
    ) -> None:
        """Count what the learner holds now as an epoch before any training: 0, or 1 for a start found otherwise.

        Args:
            seconds: what finding it took.
        """
        self.last_epoch = self.recipe.epochs + 1
        self.observe(epoch, float("nan"), val_loss, seconds, parts, metric)

    @torch.no_grad()
    def restart_from(self, tensors: dict[str, torch.Tensor], before: float, after: float, seconds: float) -> None:
        """Count a closed-form solution as epoch 1, and go on from the better of it and the weights so far.

        Args:
            tensors: {name: solution}.
            before, after: validation loss of the weights so far and of the solution.
            seconds: what the solution took.
        """
        self.count_as_epoch(0, before, 0.0)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        self.count_as_epoch(1, after, seconds)
        for name, better in (self.best or {}).items():
            self.parameters[name].copy_(better)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights back.

        Raises:
            UserError: no epoch had a finite validation loss, not even the first, before any training; or the best
                weights are not all finite.
            RuntimeError: a removed weight is not zero, which would be a bug.
        """
        if self.best is None:
            raise UserError(NEVER_A_NUMBER)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in self.best.values()):
            raise UserError("the best weights are not all finite numbers: the model is damaged, or --lr is too high")
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
        if not self.held.intact():
            raise RuntimeError("a removed weight is not zero")

    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values())

    def state(self) -> dict:
        """Everything that a resumed run needs, as plain tensors, numbers and strings."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "last_epoch": self.last_epoch,
            "best": self.best,
            "best_loss": self.best_loss,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
            "history": [tuple(row) for row in self.history],
            "finished": self.finished,
        }

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("steps", "last_epoch", "best", "best_loss", "best_epoch", "finished"):
            setattr(self, name, state[name])
        self.best_metric = state.get("best_metric")  # a checkpoint from before there was one has none
        self.history = [Epoch(*row) for row in state["history"]]


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear rise over `warmup * total` steps, then linear fall towards 0."""
    rise = warmup * total
    return (step + 1) / (rise + 1) if step < rise else (total - step) / max(total - rise, 1)


def last_rate(recipe: Recipe, ends: list[int], epoch: int) -> float:
    """The learning rate of the last step of an epoch, counted from 1 over those that train.

    Args:
        ends: see `epoch_steps`.
    """
    return recipe.lr * schedule(ends[epoch - 1] - 1, ends[-1], recipe.warmup)


# --- the loop --------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """What a learner loses on a batch: a scalar, and what it counts for in the epoch's mean (a scalar too).

    `part`: which part of a validation this is, where it has several; their mean is the learner's loss.
    """

    learner: Hashable
    value: torch.Tensor
    weight: torch.Tensor
    part: str | None = None


class Measure(NamedTuple):
    """A metric that is measured after every epoch: its name, and what gives its value.

    `of` is called with what is to be called after every batch.
    """

    name: str
    of: Callable[[Callable[[], None]], float]


@dataclass
class Progress:
    """What a run has done so far."""

    rows: list[EpochSeconds] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return self.rows[-1].epoch if self.rows else -1

    @property
    def seconds(self) -> float:
        """Training and validation, over all epochs."""
        return sum(row.train + row.validation for row in self.rows)


class Ahead(NamedTuple):
    """What a run has still to do, for the time that this takes.

    `epochs`: after this one; `train_batches`, `validation_batches`: of an epoch; `sooner`: whether the run may stop
    before its last epoch, so that the time is the most it takes; `before`: the seconds of the epoch before this one.
    """

    epochs: int
    train_batches: int
    validation_batches: int
    sooner: bool
    before: EpochSeconds | None

    def seconds(self, trained: "Tally", validated: "Tally | None" = None) -> float | None:
        """Seconds left over all epochs, from those of the batches so far; None while that is not known."""
        done, validation = (0 if validated is None else validated.done), None
        if self.before:  # all of it: the longest batches come first
            validation = self.before.validation
        elif done:
            validation = validated.seconds / done * self.validation_batches
        if validation is None or (not trained.done and (self.epochs or self.train_batches)):
            return None
        training = trained.seconds / trained.done * self.train_batches if trained.done else 0.0
        of_this_epoch = validation * (1 - done / self.validation_batches)
        if validated is None:
            of_this_epoch += training * (1 - trained.done / self.train_batches)
        return of_this_epoch + self.epochs * (training + validation)

    def status(self, trained: "Tally", validated: "Tally | None" = None) -> str:
        """The loss of the last batches and the time left. This waits for the device."""
        found = trained if validated is None else validated
        loss = f"loss {found.running_loss():.4f}, " if found.done else ""
        return (loss + self._left(self.seconds(trained, validated))).removesuffix(", ")

    def after(self, seconds: float | None) -> str:
        """The time left at the end of an epoch that took so many seconds; "" if there is none, or it is not known."""
        return f"; {self._left(self.epochs * seconds)}" if self.epochs and seconds is not None else ""

    def _left(self, seconds):
        return "" if seconds is None else f"{'at most ' * self.sooner}{duration(seconds)} left"


@interruption.deferred()
def fit(
    learners: dict[Hashable, Learner],
    objective,
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

    A signal ends the training after a batch, once its state is saved (see `interruption`).

    Args:
        learners: by name.
        objective: has `begin(batch, learners)`, which does what all learners share, and `losses(begun, learners,
            training)`, which yields a `Loss` for each of them. See `ModelObjective` and `teacher.BlockObjective`.
            `divides`: whether processes share the examples of a batch; if not, each has learners of its own.
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
        tally, order = Tally(going), []
        if epoch > 0:
            # Dropout depends on (seed, epoch) and the process alone: resuming is exact.
            torch.manual_seed(recipe.seed * 100_003 + epoch + runtime.processes.number * 1_000_003)
            if within:
                tally.load_state(within, runtime)
                within = None
            order = training_batches(train, recipe.batch_size, recipe.seed, epoch, recipe.epoch_size)

        save = partial(save_within, checkpoint, learners, progress, tally, runtime)
        last_epoch = max(learner.last_epoch for learner in going.values())
        sooner = bool(recipe.early_stop or recipe.target_loss is not None)
        batches = len(order), len(validation_order(objective, validation, recipe, runtime))
        ahead = Ahead(last_epoch - epoch, *batches, sooner, progress.rows[-1] if progress.rows else None)
        label = f"epoch {epoch} of {last_epoch}"
        if epoch > 0:
            run_pass(going, objective, train, order, runtime, label, tally, save, status=ahead.status)
        trained = tally.result(runtime.processes)
        measured = validate(
            going,
            objective,
            validation,
            recipe,
            runtime,
            partial(save, validating=True),
            label=f"{label}, validation",
            status=partial(ahead.status, tally),
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
            + ahead.after(trained.seconds + measured.seconds if epoch else None)
        )
        if on_epoch:  # before the checkpoint: a run that is stopped in between does this epoch's again
            on_epoch(progress)
        checkpoint.save(learners, progress.rows)
        if runtime.processes.any(interruption.came())[0]:
            interruption.stop()


def save_within(checkpoint, learners, progress, tally, runtime, validating=False):
    """After a batch: save the state if that is due or a signal came, and stop if one came; all processes at once.

    Validation keeps the state that it began with, and begins again. Of several processes each has its own number of
    batches there, so that a signal waits for its end.
    """
    if validating and runtime.processes.count > 1:
        return
    came, due = runtime.processes.any(interruption.came(), checkpoint.is_due() and not validating)
    if came or due:
        if progress.rows:  # else nothing has been done yet
            checkpoint.save(learners, progress.rows, tally.state(runtime))
        if came:
            interruption.stop()


class Pass(NamedTuple):
    """What a pass over examples found: mean loss and own seconds of each learner, and the seconds of all of it.

    `parts`: {learner: {part: mean loss}}.
    """

    losses: dict[Hashable, float]
    own_seconds: dict[Hashable, float]
    seconds: float
    parts: dict[Hashable, dict[str, float]]


class Tally:
    """What a pass has found so far. It can be saved after any batch, with the state of dropout's random numbers."""

    def __init__(self, names: Iterable[Hashable]):
        self.found = {name: {} for name in names}  # {learner: {part: [(loss * weight, weight), as (batches, 2)]}}
        self.own_seconds = dict.fromkeys(self.found, 0.0)
        self.seconds, self.done = 0.0, 0  # `done`: batches
        self.laps = []  # [(learner, start, end)] that a GPU may not have come to yet

    def add(self, loss: Loss) -> None:
        """Count a loss."""
        value = loss.value.detach().float()
        pair = torch.stack([value * loss.weight, loss.weight])[None]  # (1, 2)
        self.found[loss.learner].setdefault(loss.part, []).append(pair)

    def time(self, learner: Hashable | None, start, end) -> None:
        """Count the time between two marks (`Runtime.mark`), as a learner's own or, of None, as what all share."""
        self.laps.append((learner, start, end))
        if isinstance(start, float):
            self._settle()

    def _settle(self):
        for learner, start, end in self.laps:
            seconds = elapsed(start, end)
            self.seconds += seconds
            if learner is not None:
                self.own_seconds[learner] += seconds
        self.laps.clear()

    def result(self, processes: Processes = ALONE) -> Pass:
        """The means, over what all processes found; NaN of a pass without batches."""
        self._settle()
        losses, parts = dict.fromkeys(self.found, float("nan")), {name: {} for name in self.found}
        for name, pairs in self.found.items():
            sums = {part: torch.cat(each).cpu().double().sum(0) for part, each in pairs.items()}  # (2,) each
            sums = _added(processes.gather(sums)) if processes.count > 1 else sums
            if sums:
                total, weight = sum(sums.values())
                losses[name] = (total / weight).item()
            parts[name] = {part: (each[0] / each[1]).item() for part, each in sums.items() if part is not None}
        return Pass(losses, self.own_seconds, self.seconds, parts)

    def running_loss(self) -> float:
        """Mean loss of the last batches over all learners and parts; NaN of none. It waits for the device."""
        self._settle()
        last = [torch.cat(pairs[-RUNNING_BATCHES:]).sum(0) for parts in self.found.values() for pairs in parts.values()]
        if not last:
            return float("nan")
        sums = torch.stack(last).double().cpu()  # (learners and parts, 2)
        return (sums[:, 0] / sums[:, 1]).mean().item()

    def state(self, runtime: Runtime) -> dict:
        """All of it as plain values and tensors; of all processes, in each of them."""
        self._settle()
        device = runtime.device
        found = {
            text_of(name): {part: torch.cat(each).cpu() for part, each in pairs.items()}
            for name, pairs in self.found.items()
        }
        random = torch.get_rng_state()
        random_on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        for other in runtime.processes.gather(found)[1:]:
            for name, parts in other.items():
                for part, rows in parts.items():
                    found[name][part] = torch.cat([found[name][part], rows]) if part in found[name] else rows
        return {
            "found": found,
            "own_seconds": {text_of(name): seconds for name, seconds in self.own_seconds.items()},
            "seconds": self.seconds,
            "done": self.done,
            "random": runtime.processes.gather((random, random_on_device)),
        }

    def load_state(self, state: dict, runtime: Runtime) -> None:
        """Go on from there. What was found goes on in the first process."""
        device, number = runtime.device, runtime.processes.number
        for name in self.found if number == 0 else ():
            self.found[name] = {part: [each.to(device)] for part, each in state["found"][text_of(name)].items()}
        self.own_seconds = {name: state["own_seconds"][text_of(name)] for name in self.found}
        self.seconds, self.done = state["seconds"], state["done"]
        if number < len(state["random"]):
            random, on_device = state["random"][number]
            torch.set_rng_state(random)
            if on_device is not None and device.type == "cuda":
                torch.cuda.set_rng_state(on_device, device)


def _added(found):
    """[{part: sums}] of several processes, added up."""
    sums = {}
    for each in found:
        for part, own in each.items():
            sums[part] = sums[part] + own if part in sums else own
    return sums


def run_pass(
    learners: dict[Hashable, Learner],
    objective,
    examples: Examples,
    order: list[list[int]],
    runtime: Runtime,
    label: str,
    tally: Tally,
    after_batch: Callable[[], None] = lambda: None,
    *,
    training: bool = True,
    status: Callable[[Tally], str] | None = None,
) -> None:
    """Take the examples through all learners, batch by batch; in training, every loss is a step.

    Args:
        order: the positions of each batch's examples.
        tally: what is found is added to it; so many batches as it has already are left out.
        status: what to say of the tally now and then.
    """
    told = partial(status, tally) if status else None
    for positions in runtime.talk.progress(order[tally.done :], label, status=told):
        pieces = pieces_of(positions, examples, runtime) if training and objective.divides else [(positions, 1.0)]
        for piece, share in pieces:
            started = runtime.mark()
            begun = objective.begin(examples.batch(piece, runtime.device), learners)
            ended = runtime.mark()
            tally.time(None, started, ended)
            for loss in objective.losses(begun, learners, training):
                if training:
                    processes = runtime.processes if objective.divides else ALONE
                    learners[loss.learner].step(loss.value * share, piece is pieces[-1][0], processes)
                if share:
                    tally.add(loss)
                started, ended = ended, runtime.mark()
                tally.time(loss.learner, started, ended)
        tally.done += 1
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
    objective,
    examples: Examples,
    recipe: Recipe,
    runtime: Runtime,
    after_batch: Callable[[], None] = lambda: None,
    *,
    label: str = "validation",
    status: Callable[[Tally], str] | None = None,
) -> Pass:
    """Take validation examples through all learners; see `run_pass`."""
    order, tally = validation_order(objective, examples, recipe, runtime), Tally(learners)
    run_pass(learners, objective, examples, order, runtime, label, tally, after_batch, training=False, status=status)
    return tally.result(runtime.processes)


def validation_order(objective, examples: Examples, recipe: Recipe, runtime: Runtime) -> list[list[int]]:
    """The positions of this process's batches in a validation."""
    order = evaluation_batches(examples, recipe.batch_size)
    return runtime.processes.share(order) if objective.divides else order


def steps_of(examples: Examples, recipe: Recipe) -> int:
    """Optimizer steps of a whole run."""
    ends = epoch_steps(examples, recipe)
    return ends[-1] if ends else 0


def epoch_steps(examples: Examples, recipe: Recipe) -> list[int]:
    """Optimizer steps until the end of each epoch."""
    return epoch_ends(examples, recipe.batch_size, recipe.seed, recipe.epochs, recipe.epoch_size)


@contextlib.contextmanager
def forward(device: torch.device, recipe: Recipe, training: bool) -> Iterator[None]:
    """The mode of a forward pass: gradients in training alone, and the recipe's precision."""
    with torch.set_grad_enabled(training), computing(device, recipe.precision):
        yield


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
    objective = ModelObjective(model, recipe, **runtime.layers())
    progress = fit({"model": learner}, objective, train, validation, recipe, runtime, checkpoint)
    model.eval()
    return learner, progress


class ModelObjective:
    """The loss of a whole model, for the only learner there is.

    It is the task's mean cross-entropy, over tokens or examples; in training, with the recipe's share `distill`, the
    divergence KL(teacher || model) of the predicted distributions takes its place (Hinton et al., arXiv 1503.02531,
    at temperature 1). Validation is by the task's loss alone, so that runs with and without compare.
    """

    divides = True  # the loss of a batch is the mean of its examples', which processes can share

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        teacher: torch.nn.Module | None = None,
        *,
        checkpointing: bool = False,
        compiling: bool = False,
    ):
        """
        Args:
            teacher: the original model; needed if the recipe distils.
            checkpointing, compiling: how layers run in training, the teacher's too; see `layers.Layers`. Validation
                runs the model as it is.
        Raises:
            UserError: nothing can be compiled here.
        """
        self.model, self.recipe, self.teacher = model, recipe, teacher
        self.layers = Layers(model, checkpointing=checkpointing, compiling=compiling)
        self.teachers_layers = None if teacher is None else Layers(teacher, compiling=compiling)
        # T5 would otherwise fill a cache of keys and values, which nothing reads here.
        self.settings = {"use_cache": False} if model.config.is_encoder_decoder else {}
        if teacher is not None:
            teacher.eval()  # dropout would make the targets noisy

    def begin(self, batch, learners):
        """Nothing is shared: the batch as it is."""
        return batch

    def losses(self, batch, learners, training):
        """The `Loss` of the only learner; its weight is the number of tokens or examples."""
        (name,) = learners
        self.model.train(training and self.recipe.dropout)
        distill = self.recipe.distill if training else 0.0
        precision = self.recipe.precision
        with forward(batch["labels"].device, self.recipe, training):
            with self.layers.running(precision) if training else contextlib.nullcontext():
                output = self.model(**batch, **self.settings)
            real, loss = batch.labelled(), output.loss
            if distill:
                with torch.no_grad(), self.teachers_layers.running(precision):
                    wanted = rows_of(self.teacher(**batch, **self.settings).logits, real).float().log_softmax(-1)
                found = rows_of(output.logits, real).float().log_softmax(-1)  # (tokens, classes)
                divergence = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
                loss = (1 - distill) * loss + distill * divergence
        yield Loss(name, loss, torch.full((), float(len(real)), device=loss.device))
