"""What is trained on its own: parameters with their masks, their optimizer and the best state they have been in."""

from collections.abc import Hashable

import torch

from common.models.checks import is_finite
from common.pruning.masks import HeldMasks
from common.runtime.errors import UserError
from common.runtime.processes import ALONE, Processes
from common.runtime.settings import TrainingSettings
from common.training.stats import Epoch

NEVER_A_NUMBER = "the validation loss was never a number, not even before training: the model or the data are damaged"
PLAIN = ("steps", "last_epoch", "best", "best_loss", "best_metric", "best_epoch", "finished")  # of a learner's state


class Learner:
    """Parameters, their masks, their optimizer, and the best state they have been in.

    Removed weights stay at exactly zero: gradients are masked before clipping, weights after each step. A parameter
    that had no part in a loss is left alone by its step, decay and moments included.
    """

    def __init__(
        self,
        parameters: dict[str, torch.Tensor],
        masks: dict[str, torch.Tensor],
        recipe: TrainingSettings,
        total_steps: int,
        shares: dict[str, float] | None = None,
    ):
        """
        Args:
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
            betas=(0.9, recipe.beta2),
            fused=fused,
        )
        self.steps = 0
        self.last_epoch = recipe.epochs
        self.best, self.best_loss, self.best_metric, self.best_epoch = None, float("inf"), None, None
        self.history: list[Epoch] = []
        self.finished = False

    def step(self, loss: torch.Tensor, is_whole: bool = True, processes: Processes = ALONE) -> None:
        """One optimizer step down the gradient of a scalar loss, summed over the processes.

        If the loss is not `is_whole`, and not the last part of it either, the step waits for the others.
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

    @torch.no_grad()
    def observe(
        self,
        epoch: int,
        train_loss: float,
        val_loss: float,
        parts: dict[str, float] | None = None,
        metric: float | None = None,
    ) -> None:
        """Note an epoch's figures; keep the weights if they are the best so far; decide whether to stop.

        Of a `metric`, the higher is better; of equal ones, the lower loss is. None: the loss alone decides.
        """
        self.history.append(Epoch(epoch, train_loss, val_loss, parts or {}, metric))
        if metric is None or self.best is None:
            is_better = val_loss < self.best_loss
        else:
            is_better = (metric, -val_loss) > (self.best_metric, -self.best_loss)  # never if it is NaN
        if is_better:
            self.best_loss, self.best_metric, self.best_epoch = val_loss, metric, epoch
            if self.best is None:
                self.best = {name: torch.empty_like(parameter) for name, parameter in self.parameters.items()}
            for name, parameter in self.parameters.items():  # into their place: there is never a second copy
                self.best[name].copy_(parameter)
        patience, target = self.recipe.early_stop, self.recipe.target_loss
        self.finished = (
            epoch >= self.last_epoch
            or bool(patience and epoch - (self.best_epoch or 0) >= patience)
            or (target is not None and val_loss <= target)
        )

    def count_as_epoch(self, epoch: int, val_loss: float, parts: dict[str, float] | None = None) -> None:
        """Count what the learner holds now as an epoch before any training: 0, or 1 for a start found otherwise."""
        self.last_epoch = self.recipe.epochs + 1
        self.observe(epoch, float("nan"), val_loss, parts)

    def trained(self, epoch: int) -> int:
        """How many epochs of training an epoch is the end of: a closed form that was counted as one is none."""
        return max(epoch - (self.last_epoch - self.recipe.epochs), 0)

    @torch.no_grad()
    def restart_from(self, tensors: dict[str, torch.Tensor], before: float, after: float) -> None:
        """Count a closed-form solution as epoch 1, and go on from the better of it and the weights so far.

        `before`, `after`: validation loss of the weights so far and of the solution.
        """
        self.count_as_epoch(0, before)
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        self.count_as_epoch(1, after)
        for name, better in (self.best or {}).items():
            self.parameters[name].copy_(better)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights back.

        Raises:
            UserError: no epoch had a finite validation loss, or the best weights are not all finite.
            RuntimeError: a removed weight is not zero, which would be a bug.
        """
        if self.best is None:
            raise UserError(NEVER_A_NUMBER)
        if not all(map(is_finite, self.best.values())):
            raise UserError("the best weights are not all finite numbers: the model is damaged, or --lr is too high")
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
        if not self.held.intact():
            raise RuntimeError("a removed weight is not zero")

    def state(self) -> dict:
        """Everything that a resumed run needs, as plain tensors, numbers and strings."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "history": [tuple(row) for row in self.history],
            **{name: getattr(self, name) for name in PLAIN},
        }

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """Go on from there."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [Epoch(*row) for row in state["history"]]
        for name in PLAIN:
            setattr(self, name, state[name])


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear rise over `warmup * total` steps, then linear fall towards 0."""
    rise = warmup * total
    return (step + 1) / (rise + 1) if step < rise else (total - step) / max(total - rise, 1)


def text_of(name: Hashable) -> str:
    """A learner's name, a string or a pair of them, as a string."""
    return name if isinstance(name, str) else " ".join(name)
