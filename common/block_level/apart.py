"""Fine-tuning of variants apart: each against the original's block, whatever the others are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from common.block_level.portions import Course, Portion
from common.block_level.solutions import MostPruned, solve
from common.blocks import Block, Variant
from common.checkpoints import Checkpoint, text_of
from common.data import Examples
from common.devices import Runtime
from common.library import Library
from common.masks import parameter_masks
from common.processes import ALONE
from common.scheme import Pair, by_block
from common.teacher import BlockObjective
from common.training import Epoch, EpochSeconds, Learner, Progress, Recipe, fit, steps_of

VERSION = 1  # part of the key of every output; raise it when results change


@dataclass
class Apart:
    """All that the tuning of variants needs, one portion after another.

    `method`: "reconstruct" takes the closed form's solutions, "train" goes down the gradient, "both" does so from the
    solutions.
    """

    method: str
    teacher: torch.nn.Module
    blocks: dict[str, Block]  # all of the teacher's
    pruned: Library
    library: Library  # the one to write to
    made_from: dict[Pair, dict]  # see `Library.write`
    train: Examples
    calibration: Examples
    held_out: Examples
    ridges: Sequence[float]
    recipe: Recipe
    runtime: Runtime
    checkpoint: Checkpoint
    course: Course
    write_stats: Callable[[dict[Pair, list[Epoch]], Progress], None]  # given those of all portions so far
    after_epoch: Callable[[], None]
    errors: dict[Pair, float] = field(default_factory=dict)  # held-out, of what was written

    def tune(self, portion: Portion) -> None:
        """Solve or train the variants of a portion, write them to the library, and let go of them.

        Raises:
            UserError: see `Library.read`, `solve` and `training.fit`.
        """
        processes = self.runtime.processes
        variants, total_steps = self.read(portion.todo), steps_of(self.train, self.recipe)
        learners = {pair: make_learner(variant, self.recipe, total_steps) for pair, variant in variants.items()}
        before = {}  # losses of variants that were solved and written before an interruption

        def histories():
            return before | {pair: learner.history for pair, learner in learners.items()}

        def tell(progress):
            if processes.is_first:
                self.write_stats(self.course.histories(histories()), self.course.progress(progress))

        def on_epoch(progress):
            tell(progress)
            self.after_epoch()

        def write(pair, learner):
            self.errors[pair] = learner.best_loss
            if processes.is_first:
                self.write(pair, variants[pair]._replace(tensors=learner.parameters), learner)

        progress = Progress()
        if self.method != "train" and (processes.count > 1 or not self.checkpoint.holds_training()):
            before, progress.rows = self.start_from_solutions(learners, variants, portion)
            tell(progress)
        if self.method != "reconstruct" and processes.count == 1:
            progress = fit(
                learners,
                BlockObjective(self.teacher, self.blocks, self.recipe),
                self.train,
                self.held_out,
                self.recipe,
                self.runtime,
                self.checkpoint,
                rows=progress.rows,
                on_epoch=on_epoch,
                on_finished=write,
            )
        else:
            if self.method != "reconstruct":
                progress = self.train_shares(learners, progress.rows)
                tell(progress)
            else:
                for learner in learners.values():
                    learner.restore_best()
            for pair, learner in learners.items():
                write(pair, learner)
        self.course.finish(portion, histories(), progress)

    def read(self, pairs: Sequence[Pair]) -> dict[Pair, Variant]:
        """The pruned variants, on the device."""
        return {pair: self.pruned.read(self.blocks[pair.block], pair.variant).to(self.runtime.device) for pair in pairs}

    def write(self, pair: Pair, variant: Variant, learner: Learner) -> None:
        """Write a variant that is done to the library."""
        self.library.write(
            pair.variant,
            variant,
            self.made_from[pair],
            nmse_before=learner.history[0].val_loss,
            nmse_after=learner.best_loss,
            best_epoch=learner.best_epoch,
            **({"ridge": self.checkpoint.notes["ridges"][text_of(pair)]} if len(self.ridges) > 1 else {}),
        )

    def start_from_solutions(
        self, learners: dict[Pair, Learner], variants: dict[Pair, Variant], portion: Portion
    ) -> tuple[dict[Pair, list[Epoch]], list[EpochSeconds]]:
        """Solve the variants of a portion, and let the learners go on from the solutions.

        Returns:
            (losses of those that were solved and written before an interruption, seconds of all).
        """
        notes = self.checkpoint.notes
        so_far = {name: MostPruned(*each) for name, each in notes.get("so_far", {}).items()}
        solved = solve(
            variants,
            self.teacher,
            self.blocks,
            self.calibration,
            self.held_out,
            self.ridges,
            self.runtime,
            self.checkpoint,
            so_far=so_far,
            is_last=portion.is_last,
        )
        for pair, learner in learners.items():
            found = solved.solutions[pair]
            learner.restart_from(found.tensors, found.before, found.after, solved.own_seconds)
        notes = self.checkpoint.notes
        notes["ridges"] = {text_of(pair): found.ridge for pair, found in solved.solutions.items()}
        if portion.is_last:
            notes["most_pruned"] = solved.most_pruned
        if so_far or solved.so_far:
            notes["so_far"] = {name: tuple(each) for name, each in solved.so_far.items()}
        return {pair: rows for pair, rows in solved.histories().items() if pair not in learners}, solved.rows

    def train_shares(self, learners: dict[Pair, Learner], rows: list[EpochSeconds]) -> Progress:
        """Train the learners of several processes, each those of its share of the blocks; returns the progress.

        Each keeps a state of its own. In the end all learners have their best weights and histories in all processes.
        """
        processes, alone = self.runtime.processes, replace(self.runtime, processes=ALONE)
        owners = {name: number % processes.count for number, name in enumerate(by_block(learners))}
        own = {pair: learner for pair, learner in learners.items() if owners[pair.block] == processes.number}
        checkpoint = self.checkpoint.share(processes.number, processes.count, own)
        objective = BlockObjective(self.teacher, self.blocks, self.recipe)
        progress = fit(own, objective, self.train, self.held_out, self.recipe, alone, checkpoint, rows=rows)
        for pair, learner in learners.items():
            for tensor in learner.parameters.values():
                processes.spread(tensor.data, owners[pair.block])
        states = [(each.history, each.best_loss, each.best_epoch) for each in own.values()]
        gathered = processes.gather((dict(zip(own, states)), progress.rows))
        for found, _ in gathered:
            for pair, state in found.items():
                learners[pair].history, learners[pair].best_loss, learners[pair].best_epoch = state
        checkpoint.remove_alone()
        return Progress(max((rows for _, rows in gathered), key=len))


def make_learner(variant: Variant, recipe: Recipe, total_steps: int) -> Learner:
    """A learner of a variant's tensors, its removed weights held at zero."""
    parameters = {name: tensor.requires_grad_() for name, tensor in variant.tensors.items()}
    return Learner(parameters, parameter_masks(variant.block, variant.keeps), recipe, total_steps)
