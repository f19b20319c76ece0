"""What a pass over examples has found so far, and how long the rest of a run takes."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from common.runtime.devices import Runtime, elapsed
from common.runtime.processes import ALONE, Processes
from common.runtime.progress import duration
from common.training.checkpoints import text_of
from common.training.learner import EpochSeconds
from common.training.objectives import Loss

RUNNING_BATCHES = 50  # the loss that progress is told with is the mean of so many


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


class TimeLeft(NamedTuple):
    """What a run has still to do, for the time that this takes.

    `epochs`: after this one; `train_batches`, `validation_batches`: of an epoch; `sooner`: whether the run may stop
    before its last epoch, so that the time is the most it takes; `before`: the seconds of the epoch before this one.
    """

    epochs: int
    train_batches: int
    validation_batches: int
    sooner: bool
    before: EpochSeconds | None

    def seconds(self, trained: "RunningLosses", validated: "RunningLosses | None" = None) -> float | None:
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

    def status(self, trained: "RunningLosses", validated: "RunningLosses | None" = None) -> str:
        """The loss of the last batches and the time left. This waits for the device."""
        found = trained if validated is None else validated
        loss = f"loss {found.running_loss():.4f}, " if found.done else ""
        return (loss + self._left(self.seconds(trained, validated))).removesuffix(", ")

    def after(self, seconds: float | None) -> str:
        """The time left at the end of an epoch that took so many seconds; "" if there is none, or it is not known."""
        return f"; {self._left(self.epochs * seconds)}" if self.epochs and seconds is not None else ""

    def _left(self, seconds):
        return "" if seconds is None else f"{'at most ' * self.sooner}{duration(seconds)} left"


class Pass(NamedTuple):
    """What a pass over examples found: mean loss and own seconds of each learner, and the seconds of all of it.

    `parts`: {learner: {part: mean loss}}.
    """

    losses: dict[Hashable, float]
    own_seconds: dict[Hashable, float]
    seconds: float
    parts: dict[Hashable, dict[str, float]]


class RunningLosses:
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
