"""What training makes smaller: the protocol, the loss of a whole model, and the losses of a pass so far."""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from common.blocks.families import decoder_inputs
from common.data.examples import Batch, rows_of
from common.runtime.devices import Runtime, computing
from common.runtime.processes import ALONE, Processes
from common.runtime.settings import TrainingSettings
from common.training.learner import Learner, text_of

RUNNING_BATCHES = 50  # the loss that progress is told with is the mean of so many


class Loss(NamedTuple):
    """What a learner loses on a batch, or a `part` of a validation: a scalar, and its weight in the epoch's mean."""

    learner: Hashable
    value: torch.Tensor
    weight: torch.Tensor
    part: str | None = None


class Objective(Protocol):
    """What each learner loses on a batch."""

    def losses(self, batch: Batch, learners: dict[Hashable, Learner], training: bool) -> Iterator[Loss]:
        """A loss for each learner, or in validation one for each of its parts."""


class ModelObjective:
    """The loss of a whole model, for the only learner there is.

    It is the task's mean cross-entropy, over tokens or examples. In training the teacher's predictions take the labels'
    place as targets, with the recipe's share `distill` (Hinton et al., arXiv 1503.02531, at temperature 1). Validation
    is by the labels alone, so that runs with and without compare.
    """

    def __init__(self, model: torch.nn.Module, recipe: TrainingSettings, teacher: torch.nn.Module | None = None):
        """`teacher`: the original model; needed if the recipe distils."""
        self.model, self.recipe, self.teacher = model, recipe, teacher
        # T5 would otherwise fill a cache of keys and values, which nothing reads here.
        self.settings = {"use_cache": False} if model.config.is_encoder_decoder else {}
        if teacher is not None:
            teacher.eval()  # dropout would make the targets noisy

    def losses(self, batch: Batch, learners: dict[Hashable, Learner], training: bool) -> Iterator[Loss]:
        """The `Loss` of the only learner; its weight is the number of tokens or examples."""
        (name,) = learners
        self.model.train(training and self.recipe.dropout)
        distill, real = self.recipe.distill if training else 0.0, batch.labelled()
        with forward(batch["labels"].device, self.recipe, training):
            if distill:
                loss = self.distilled(batch, real, distill)
            else:
                loss = self.model(**batch, **self.settings).loss
        yield Loss(name, loss, torch.full((), float(len(real)), device=loss.device))

    def distilled(self, batch: Batch, real: torch.Tensor, share: float) -> torch.Tensor:
        """The mean cross-entropy with targets that are the teacher's predictions with a share, and the labels."""
        inputs, labels = dict(batch), batch["labels"]
        del inputs["labels"]  # or the model would compute a loss of its own
        if self.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = decoder_inputs(self.teacher, labels)
        with torch.no_grad():
            targets = share * rows_of(self.teacher(**inputs, **self.settings).logits, real).float().softmax(-1)
            numbers = labels.flatten()[real][:, None]  # (tokens, 1)
            targets.scatter_add_(1, numbers, torch.full_like(numbers, 1 - share, dtype=targets.dtype))
        predicted = rows_of(self.model(**inputs, **self.settings).logits, real).float()  # (tokens, classes)
        return torch.nn.functional.cross_entropy(predicted, targets)


@contextlib.contextmanager
def forward(device: torch.device, recipe: TrainingSettings, training: bool) -> Iterator[None]:
    """The mode of a forward pass: gradients in training alone, and the recipe's precision."""
    with torch.set_grad_enabled(training), computing(device, recipe.precision):
        yield


class Pass(NamedTuple):
    """What a pass over examples found: the mean loss of each learner, that of each of its parts, and the seconds."""

    losses: dict[Hashable, float]
    parts: dict[Hashable, dict[str, float]]
    seconds: float


class RunningLosses:
    """The losses of a pass so far. It can be saved after any batch, with the state of dropout's random numbers."""

    def __init__(self, names: Iterable[Hashable]):
        self.losses = {name: {} for name in names}  # {learner: {part: [(loss * weight, weight), as (batches, 2)]}}
        self.seconds, self.done = 0.0, 0  # `done`: batches

    def add(self, loss: Loss) -> None:
        """Count a loss."""
        value = loss.value.detach().float()
        pair = torch.stack([value * loss.weight, loss.weight])[None]  # (1, 2)
        self.losses[loss.learner].setdefault(loss.part, []).append(pair)

    def start(self, runtime: Runtime) -> None:
        """Let the clock run from here."""
        self.started = runtime.now()

    def count_seconds(self, runtime: Runtime) -> None:
        """Count the seconds since the start or the last count."""
        now = runtime.now()
        self.seconds, self.started = self.seconds + now - self.started, now

    def result(self, processes: Processes = ALONE) -> Pass:
        """The means over all processes; NaN of a pass without batches."""
        losses, parts = {}, {}
        for name, rows in self.losses.items():
            mine, sums = {part: torch.cat(pairs).cpu().double().sum(0) for part, pairs in rows.items()}, {}
            for share in processes.gather(mine):
                for part, pair in share.items():
                    sums[part] = sums[part] + pair if part in sums else pair
            total, weight = sum(sums.values(), torch.zeros(2, dtype=torch.float64))
            losses[name] = (total / weight).item()
            parts[name] = {part: (pair[0] / pair[1]).item() for part, pair in sums.items() if part is not None}
        return Pass(losses, parts, self.seconds)

    def status(self) -> str:
        """The mean loss of the last batches over all learners and parts. This waits for the device."""
        last = [torch.cat(pairs[-RUNNING_BATCHES:]).sum(0) for rows in self.losses.values() for pairs in rows.values()]
        if not last:
            return ""
        sums = torch.stack(last).double().cpu()  # (learners and parts, 2)
        return f"loss {(sums[:, 0] / sums[:, 1]).mean().item():.4f}"

    def state(self, runtime: Runtime) -> dict:
        """All of it as plain values and tensors; of all processes, in each of them."""
        self.count_seconds(runtime)
        device, losses = runtime.device, {}
        mine = {
            text_of(name): {part: torch.cat(pairs).cpu() for part, pairs in rows.items()}
            for name, rows in self.losses.items()
        }
        for share in runtime.processes.gather(mine):
            for name, rows in share.items():
                for part, pairs in rows.items():
                    losses.setdefault(name, {}).setdefault(part, []).append(pairs)
        random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {
            "losses": {name: {part: torch.cat(pairs) for part, pairs in rows.items()} for name, rows in losses.items()},
            "seconds": self.seconds,
            "done": self.done,
            "random": runtime.processes.gather(random),
        }

    def load_state(self, state: dict, runtime: Runtime) -> None:
        """Go on from there. What was found goes on in the first process."""
        device, number = runtime.device, runtime.processes.number
        for name in self.losses if number == 0 else ():
            rows = state["losses"].get(text_of(name), {})
            self.losses[name] = {part: [pairs.to(device)] for part, pairs in rows.items()}
        self.seconds, self.done = state["seconds"], state["done"]
        if number < len(state["random"]):
            random, on_device = state["random"][number]
            torch.set_rng_state(random)
            if on_device is not None and device.type == "cuda":
                torch.cuda.set_rng_state(on_device, device)
