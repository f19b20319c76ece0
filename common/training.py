"""The one training loop, for blocks and for whole models.

A learner is a set of parameters that is trained on its own: the only one of a whole model, or one for every variant
of every block. In each batch `run_batch` hands every learner its loss; for blocks that happens inside a single
teacher pass, so that one pass serves all variants.
"""

from dataclasses import asdict, dataclass, field

import torch

from common.architectures import token_mask, watched
from common.data import evaluation_batches, training_batches
from common.errors import UserError
from common.masking import HeldMasks
from common.models import now

BETAS = (0.9, 0.98)  # of AdamW; the runs are short, and 0.999 would remember their first steps to the end


@dataclass(frozen=True)
class Recipe:
    """How to train.

    `epoch_size` in examples, None = all; `lr` is the peak rate; `warmup` a fraction of all steps; `early_stop` in
    epochs, 0 = never; `target_loss`: stop once the validation loss is no higher, None = never; `distill` and
    `dropout`: see `model_batch`.
    """

    epochs: int
    batch_size: int
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

    def to_json(self):
        return asdict(self)


def recipe_from(args, default_lr, **others):
    """The recipe of a script's training flags (`cli.add_training_flags`)."""
    return Recipe(
        args.epochs,
        args.batch_size,
        args.lr or default_lr,
        args.warmup,
        args.weight_decay,
        args.clip,
        args.early_stop,
        args.precision,
        args.seed,
        args.epoch_size,
        **others,
    )


# --- learners --------------------------------------------------------------------------------------------------


class Learner:
    """Parameters, their masks, their optimizer, and the best state they have been in.

    Removed weights stay at exactly zero: gradients are masked before clipping, weights after each step.
    """

    def __init__(self, parameters, masks, recipe, total_steps):
        """
        Args:
            parameters: {name: tensor to train}, on their device.
            masks: {name: bool tensor}, True = kept; names that are absent are free.
            total_steps: optimizer steps in the whole run, for the learning-rate schedule.
        """
        self.parameters, self.recipe, self.total_steps = parameters, recipe, total_steps
        self.held = HeldMasks(parameters, masks)
        fused = next(iter(parameters.values())).device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=BETAS, fused=fused
        )
        self.steps = 0
        self.last_epoch = recipe.epochs
        self.best, self.best_loss, self.best_epoch = None, float("inf"), None
        self.history = []  # (epoch, train loss, validation loss, seconds of this learner alone)
        self.finished = False

    def step(self, loss):
        """One optimizer step down the gradient of a scalar loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * schedule(self.steps, self.total_steps, self.recipe.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.held.mask_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        self.optimizer.step()
        self.held.apply()
        self.steps += 1

    def observe(self, epoch, train_loss, val_loss, seconds):
        """Note an epoch's losses; keep the weights if they are the best so far; decide whether to stop."""
        self.history.append((epoch, train_loss, val_loss, seconds))
        if val_loss < self.best_loss:
            self.best_loss, self.best_epoch = val_loss, epoch
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        patience, target = self.recipe.early_stop, self.recipe.target_loss
        self.finished = (
            epoch >= self.last_epoch
            or bool(patience and epoch - (self.best_epoch or 0) >= patience)
            or (target is not None and val_loss <= target)
        )

    def restart_from(self, tensors, before, after, seconds):
        """Count a closed-form solution as epoch 1, and go on from the better of it and the weights so far.

        Args:
            tensors: {name: solution}.
            before, after: validation loss of the weights so far and of the solution.
            seconds: what the solution took.
        """
        self.last_epoch = self.recipe.epochs + 1
        self.observe(0, float("nan"), before, 0.0)
        previous = self.best
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
            self.observe(1, float("nan"), after, seconds)
            if self.best is previous and previous is not None:
                for name, parameter in self.parameters.items():
                    parameter.copy_(previous[name])

    @torch.no_grad()
    def restore_best(self):
        """Put the best weights back.

        Raises:
            UserError: no epoch had a finite validation loss, not even the first, before any training.
            RuntimeError: a removed weight is not zero, which would be a bug.
        """
        if self.best is None:
            raise UserError(
                "the validation loss was never a number, not even before training: the model or the data are damaged"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(self.best[name])
        if not self.held.intact():
            raise RuntimeError("a removed weight is not zero")

    def state(self):
        """Everything that a resumed run needs, as plain tensors, numbers and strings."""
        return {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "last_epoch": self.last_epoch,
            "best": self.best,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "history": self.history,
            "finished": self.finished,
        }

    @torch.no_grad()
    def load_state(self, state):
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("steps", "last_epoch", "best", "best_loss", "best_epoch", "history", "finished"):
            setattr(self, name, state[name])


def schedule(step, total, warmup):
    """Factor on the peak learning rate: linear rise over `warmup * total` steps, then linear fall towards 0."""
    rise = warmup * total
    return (step + 1) / (rise + 1) if step < rise else (total - step) / max(total - rise, 1)


# --- the loop --------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """What a run has done so far. `rows`: (epoch, train_seconds, val_seconds)."""

    rows: list = field(default_factory=list)

    @property
    def epoch(self):
        return self.rows[-1][0] if self.rows else -1

    @property
    def seconds(self):
        """Training and validation, over all epochs."""
        return sum(train + val for _, train, val in self.rows)


def fit(
    learners,
    run_batch,
    train,
    validation,
    recipe,
    *,
    device,
    talk,
    checkpoint,
    rows=(),
    on_epoch=None,
    on_finished=None,
):
    """Train all learners, validating after every epoch and before the first.

    Args:
        learners: {name: Learner}.
        run_batch: called with (batch, active learners, consume, training); must call consume(name, compute) once
            for each active learner, where compute() returns (loss, weight): a scalar tensor, and what it counts for
            in the epoch's mean.
        train, validation: `data.Examples`.
        checkpoint: a `Checkpoint`; written after every epoch, and resumed from.
        rows: of the epochs that the learners have behind them (`Learner.restart_from`).
        on_epoch: called with the Progress after every epoch.
        on_finished: called with (name, learner), its best weights restored, as soon as a learner is done.
    Returns:
        the Progress.
    """
    progress = Progress(checkpoint.resume(learners, talk) or list(rows))
    val_order = evaluation_batches(validation, recipe.batch_size)
    handed_over = set()

    def run(examples, order, active, label, training):
        losses = {name: [] for name in active}
        seconds = dict.fromkeys(active, 0.0)

        def consume(name, compute):
            started = now(device)
            loss, weight = compute()
            if training:
                with torch.autocast(device.type, enabled=False):  # autocast is for the forward pass alone
                    active[name].step(loss)
            losses[name].append(torch.stack([loss.detach().float() * weight, torch.as_tensor(weight, device=device)]))
            seconds[name] += now(device) - started

        started = now(device)
        for positions in talk.progress(order, label):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False):
                run_batch(examples.batch(positions, device), active, consume, training)
        total = now(device) - started
        sums = {name: torch.stack(parts).cpu().double().sum(0) for name, parts in losses.items()}
        return {name: (both[0] / both[1]).item() for name, both in sums.items()}, seconds, total

    while True:
        active = {name: learner for name, learner in learners.items() if not learner.finished}
        for name, learner in learners.items():
            if learner.finished and name not in handed_over:
                learner.restore_best()
                if on_finished:
                    on_finished(name, learner)
                handed_over.add(name)
        if not active:
            break
        epoch = progress.epoch + 1
        train_loss, own_seconds, train_seconds = dict.fromkeys(active, float("nan")), dict.fromkeys(active, 0.0), 0.0
        if epoch > 0:
            torch.manual_seed(recipe.seed * 100_003 + epoch)  # dropout hangs on (seed, epoch) alone: resume is exact
            order = training_batches(train, recipe.batch_size, recipe.seed, epoch, recipe.epoch_size)
            train_loss, own_seconds, train_seconds = run(train, order, active, f"epoch {epoch}", True)
        with torch.no_grad():
            val_loss, own_val_seconds, val_seconds = run(validation, val_order, active, "validation", False)
        for name, learner in active.items():
            learner.observe(epoch, train_loss[name], val_loss[name], own_seconds[name] + own_val_seconds[name])
        progress.rows.append((epoch, train_seconds, val_seconds))
        mean = sum(val_loss.values()) / len(val_loss)
        talk.say(
            f"epoch {epoch}: validation loss {mean:.4f}"
            + (f" (mean of {len(val_loss)} variants)" if len(learners) > 1 else "")
            + (f", {train_seconds:.1f} s" if epoch else "")
        )
        if on_epoch:  # before the checkpoint: a run that is stopped in between does this epoch's again
            on_epoch(progress)
        checkpoint.save(learners, progress.rows)
    return progress


def steps_of(examples, recipe):
    """Optimizer steps of a whole run."""
    size = min(recipe.epoch_size or len(examples), len(examples))
    return recipe.epochs * -(-size // recipe.batch_size)


# --- what run_batch can be -------------------------------------------------------------------------------------


def model_batch(model, teacher=None, distill=0.0, dropout=False):
    """`run_batch` for a whole model.

    The loss is the task's mean cross-entropy, over tokens or examples; in training, with a share of `distill`, the
    divergence KL(teacher || model) of the predicted distributions takes its place (Hinton et al., arXiv 1503.02531,
    at temperature 1). Validation is by the task's loss alone, so that runs with and without compare.

    Args:
        teacher: the original model; needed if `distill` > 0.
        dropout: train with the model's own.
    """
    if teacher is not None:
        teacher.eval()  # dropout would make the targets noisy

    def run_batch(batch, active, consume, training):
        def compute():
            output = model(**batch)
            real = batch["labels"] != -100  # (batch,) or (batch, length)
            loss = output.loss
            if training and distill:
                with torch.no_grad():
                    wanted = teacher(**batch).logits[real].float().log_softmax(-1)
                divergence = torch.nn.functional.kl_div(
                    output.logits[real].float().log_softmax(-1), wanted, reduction="batchmean", log_target=True
                )
                loss = (1 - distill) * loss + distill * divergence
            return loss, real.sum().float()

        for name, learner in active.items():
            model.train(training and dropout)
            consume(name, compute)

    return run_batch


def block_batch(teacher, family, blocks):
    """`run_batch` for block variants: learners are named (block name, variant).

    The teacher runs once, in `eval()` and without gradients; whenever one of its blocks has run, all active
    variants of that block are trained on its very inputs and output, and are done before the teacher goes on.
    The loss is the mean squared error over real tokens, divided by the mean square of the teacher's output, so
    that no block drowns another.
    """
    teacher.eval()  # dropout would make the targets noisy
    teacher.requires_grad_(False)

    def run_batch(batch, active, consume, training):
        variants = {}
        for block_name, variant in active:
            variants.setdefault(block_name, []).append((block_name, variant))

        def visit(block, call):
            real = token_mask(block, batch)
            target = call.output[real].float()  # (tokens, d_model)
            power = target.pow(2).sum()
            for name in variants[block.name]:

                def compute(parameters=active[name].parameters):
                    with torch.set_grad_enabled(training):
                        output = call.replay(parameters)[real].float()
                        return (output - target).pow(2).sum() / power, power

                with torch.set_grad_enabled(training):
                    consume(name, compute)

        with torch.no_grad(), watched(teacher, [blocks[name] for name in variants], visit):
            family.run(teacher, batch)

    return run_batch
