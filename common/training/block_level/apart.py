"""Fine-tuning of variants apart: each against the original's block, whatever the others are."""

from collections.abc import Iterator, Sequence

from common.blocks.tensors import Variant, parameter_masks
from common.composing.scheme import Pair
from common.runtime.errors import UserError
from common.runtime.records import digest
from common.training.block_level.solutions import add_seconds, levels_of, solve, solve_in_context, typical_solutions
from common.training.block_level.stage import BlockStage, beside
from common.training.block_level.teacher import BlockObjective
from common.training.checkpoints import Checkpoint
from common.training.learner import Learner, text_of
from common.training.loop import fit, steps_of
from common.training.stats import (
    RUN_DIGITS,
    Epoch,
    EpochSeconds,
    read_seconds_of_epochs,
    read_variant_stats,
    seconds_of,
    write_stats,
    write_variant_stats,
)

VERSION = 2  # of training, part of the key of every output; raise it when results change


def tune_apart(stage: BlockStage) -> dict:
    """Solve or train the variants that are not there yet; returns the result.

    A `UserError` for a training in several processes.
    """
    runtime, library, is_solved = stage.runtime, stage.library, stage.method == "reconstruct"
    if runtime.processes.count > 1 and not is_solved:
        raise UserError(f"--method {stage.method}: runs in one process; start it without torchrun")
    made_from = stage.made_from(**({} if is_solved else {"apart_version": VERSION}))
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, stage.overwrite)]
    todo = runtime.processes.agree(todo)
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune, {skipped} are there already")
    run = digest({str(pair): settings for pair, settings in made_from.items()})[:RUN_DIGITS]
    if not todo:
        return stage.nothing_to_do(skipped, {run})
    library.expect(stage.blocks, todo)
    tuning = Apart(stage, made_from, todo, run)
    if is_solved:
        tuning.solve()
    else:
        tuning.train()
    tuning.tracking.close()  # of a closed form alone, the trackers are told now: its seconds are known
    histories = tuning.histories
    before = [history[0].val_loss for history in histories.values()]
    after = {pair: min(row.val_loss for row in history) for pair, history in histories.items()} | tuning.errors
    nmse_before, nmse_after = sum(before) / len(before), sum(after.values()) / len(after)
    runtime.talk.say(f"{library.folder}: mean held-out error {nmse_before:.4f} -> {nmse_after:.4f}")
    return {
        "fine_tuned": len(todo),
        "skipped": skipped,
        "nmse_before": nmse_before,
        "nmse_after": nmse_after,
        "seconds": seconds_of(stage.stats_file, {run}),
        "stats": stage.stats_file,
    }


class Apart:
    """The tuning of a library's variants, in one run that may have been interrupted before.

    `histories`: of the variants that the run has come to, also before an interruption, as the stats tell it.
    """

    def __init__(self, stage: BlockStage, made_from: dict[Pair, dict], todo: Sequence[Pair], run: str):
        """`made_from`: of all variants, see `Library.write`; `todo`: those not there yet; `run`: digits of the key."""
        self.stage, self.made_from, self.todo, self.run = stage, made_from, todo, run
        self.tracking, self.errors = stage.open_tracking(run), {}  # {pair: held-out error of what was written}
        past = read_variant_stats(beside(stage.stats_file, "blocks"), run)
        self.histories = {pair: past[pair] for pair in made_from if pair in past and pair not in todo}

    def solve(self) -> None:
        """Solve variants, and write those of some blocks before the next blocks are solved."""
        stage, before, solving = self.stage, [], solve(self.stage, self.todo)
        if stage.rounds:
            checkpoint = self.open_checkpoint()
            solving, before = self.among_pruned(checkpoint)
        if self.histories:  # of an interrupted run
            before = read_seconds_of_epochs(stage.stats_file, self.run)
        for solutions, seconds in solving:
            if before:
                seconds = [add_seconds(*rows) for rows in zip(seconds, before)]
            self.note({pair: solution.history for pair, solution in solutions.items()}, seconds)
            variants, measured = {}, {}
            for pair, solution in solutions.items():
                variants[pair] = solution.pruned._replace(tensors=solution.best)
                error = min(solution.before, solution.after)
                measured[pair] = self.measured(solution.before, error, int(solution.is_better), solution.ridge)
            self.write(variants, measured)
        if stage.rounds:
            checkpoint.remove()

    def among_pruned(self, checkpoint: Checkpoint) -> tuple[Iterator, list[EpochSeconds]]:
        """The solutions among pruned blocks, as `solve` yields them, and the seconds of what is needed before.

        That is kept in the checkpoint, so that an interrupted run solves in the same contexts.
        """
        stage, levels = self.stage, levels_of(self.stage)
        spent, _ = checkpoint.resume({})
        if not spent:
            typical, spent = typical_solutions(stage, self.todo, levels)
            checkpoint.notes |= {text_of(pair): tensors for pair, tensors in typical.items()}
            checkpoint.save({}, spent)
        typical = {pair: checkpoint.notes[text_of(pair)] for level in levels for pair in level.beside.values()}
        return solve_in_context(stage, self.todo, levels, typical), spent

    def open_checkpoint(self) -> Checkpoint:
        return self.stage.open_checkpoint({pair: digest(self.made_from[pair]) for pair in self.todo})

    def train(self) -> None:
        """Go down the gradient, from the solutions if that is the method."""
        stage = self.stage
        variants, total_steps = stage.pruned_on_device(self.todo), steps_of(stage.train, stage.recipe)
        learners = {}
        for pair, (block, tensors, keeps) in variants.items():
            parameters = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
            learners[pair] = Learner(parameters, parameter_masks(block, keeps), stage.recipe, total_steps)

        def note(seconds):
            self.note({pair: learner.history for pair, learner in learners.items()}, seconds)

        def on_epoch(seconds):
            note(seconds)
            self.tracking.tell()

        def write(pair, learner):
            variant = variants[pair]._replace(tensors=learner.parameters)
            ridge = checkpoint.notes.get(text_of(pair))
            before = learner.history[0].val_loss
            self.write({pair: variant}, {pair: self.measured(before, learner.best_loss, learner.best_epoch, ridge)})

        checkpoint = self.open_checkpoint()
        seconds = []
        if stage.method == "both" and checkpoint.content is None:
            for solutions, seconds_so_far in solve(stage, self.todo):
                seconds = seconds_so_far
                for pair, solution in solutions.items():
                    learners[pair].restart_from(solution.tensors, solution.before, solution.after)
                    checkpoint.notes[text_of(pair)] = solution.ridge
            note(seconds)
            checkpoint.save(learners, seconds)
        seconds = fit(
            learners,
            BlockObjective(stage.original, stage.blocks, stage.recipe),
            stage.train,
            stage.held_out,
            stage.recipe,
            stage.runtime,
            checkpoint,
            rows=seconds,
            on_epoch=on_epoch,
            on_finished=write,
        )
        note(seconds)  # a resumed run may have had no further epoch
        checkpoint.remove()

    def note(self, histories: dict[Pair, list[Epoch]], seconds: list[EpochSeconds]) -> None:
        """Write the stats, with these histories in them, in the library's order."""
        histories = self.histories | histories
        self.histories = {pair: histories[pair] for pair in self.made_from if pair in histories}
        if self.stage.runtime.processes.is_first:
            write_stats(self.stage.stats_file, self.histories, seconds, self.run)
            write_variant_stats(beside(self.stage.stats_file, "blocks"), self.histories, self.run)

    def measured(self, before: float, after: float, best_epoch: int, ridge: float | None) -> dict:
        """What the record says of a variant that is done; `before`, `after`: its held-out errors."""
        figures = {"nmse_before": before, "nmse_after": after, "best_epoch": best_epoch}
        return figures | ({"ridge": ridge} if len(self.stage.ridges) > 1 and ridge is not None else {})

    def write(self, variants: dict[Pair, Variant], measured: dict[Pair, dict]) -> None:
        """Write variants that are done to the library."""
        self.errors |= {pair: figures["nmse_after"] for pair, figures in measured.items()}
        if self.stage.runtime.processes.is_first:
            self.stage.library.write(variants, self.made_from, measured)
