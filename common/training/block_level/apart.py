"""Fine-tuning of variants apart: each against the original's block, whatever the others are."""

from collections.abc import Sequence
from dataclasses import replace

from common.blocks.tensors import Variant, parameter_masks
from common.composing.scheme import Pair, by_block
from common.runtime.processes import ALONE
from common.runtime.records import digest
from common.training.block_level.solutions import Solved, solve
from common.training.block_level.stage import BlockStage
from common.training.block_level.teacher import BlockObjective
from common.training.checkpoints import RUN_DIGITS, Checkpoint, text_of
from common.training.learner import Epoch, EpochSeconds, Learner, Recipe
from common.training.loop import fit, steps_of
from common.training.running_losses import Progress
from common.training.stats import seconds_of, write_stats, write_variant_stats
from common.training.tracking import Tracking

VERSION = 1  # of training, part of the key of every output; raise it when results change


def tune_apart(stage: BlockStage) -> dict:
    """Solve or train the variants that are not there yet; returns the result.

    Raises:
        UserError: see `Library.has`, `Library.read`, `solve` and `training.fit`.
    """
    runtime, library = stage.runtime, stage.library
    version = {} if stage.method == "reconstruct" else {"apart_version": VERSION}
    made_from = stage.made_from(stage.pruned.variants(), **version)
    todo = [pair for pair, settings in made_from.items() if not library.has(pair, settings, stage.overwrite)]
    todo = runtime.processes.agree(todo)
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune, {skipped} are there already")
    key = digest({str(pair): settings for pair, settings in made_from.items()})
    run = key[:RUN_DIGITS]
    if not todo:
        return stage.nothing_to_do(skipped, {run})
    checkpoint = stage.open_checkpoint(key, {pair: digest(made_from[pair]) for pair in todo})
    tracking = stage.open_tracking(run)
    tuning = Apart(stage, made_from, checkpoint, tracking, run)
    histories = tuning.solve(todo) if stage.method == "reconstruct" else tuning.train(todo)
    tracking.close()  # of a closed form alone, the trackers are told now: its seconds are known
    checkpoint.remove()
    at_first = [rows[0].val_loss for rows in histories.values()]
    least = {pair: min(row.val_loss for row in rows) for pair, rows in histories.items()} | tuning.errors
    nmse_before, nmse_after = sum(at_first) / len(at_first), sum(least.values()) / len(least)
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
    """The tuning of a library's variants, in one run that may have been interrupted before."""

    def __init__(
        self, stage: BlockStage, made_from: dict[Pair, dict], checkpoint: Checkpoint, tracking: Tracking, run: str
    ):
        """
        Args:
            made_from: of all variants, there already or not, see `Library.write`.
            run: digits of the run's key.
        """
        self.stage, self.made_from, self.checkpoint, self.tracking = stage, made_from, checkpoint, tracking
        self.run = run
        self.errors = {}  # {pair: held-out error of what was written}
        checkpoint.read()  # its notes and past

    def solve(self, todo: Sequence[Pair]) -> dict[Pair, list[Epoch]]:
        """Solve variants, and write those of some blocks before the next blocks are solved; returns all histories."""
        checkpoint, histories = self.checkpoint, {}
        before = [EpochSeconds(*row) for row in checkpoint.notes.get("rows", ())]  # of an interrupted run
        for solved in self.solutions(todo, self.stage.pruned_on_device):
            histories |= solved.histories()
            progress = Progress(added_up(before, solved.rows))
            checkpoint.notes["rows"] = [tuple(row) for row in progress.rows]
            checkpoint.save_past(solved.histories())  # a variant that is there is not solved again
            self.write_stats(histories, progress)
            for pair, solution in solved.solutions.items():
                variant = solved.variants[pair]
                if solution.is_better:
                    variant = variant._replace(tensors=solution.tensors)
                error = solution.after if solution.is_better else solution.before
                self.write(pair, variant, solution.before, error, int(solution.is_better), solution.ridge)
        return self.in_order(histories)

    def train(self, todo: Sequence[Pair]) -> dict[Pair, list[Epoch]]:
        """Go down the gradient, from the solutions if that is the method; returns all histories."""
        stage, checkpoint, processes = self.stage, self.checkpoint, self.stage.runtime.processes
        variants, total_steps = stage.pruned_on_device(todo), steps_of(stage.train, stage.recipe)
        learners = {pair: make_learner(variant, stage.recipe, total_steps) for pair, variant in variants.items()}

        def histories():
            return {pair: learner.history for pair, learner in learners.items()}

        def on_epoch(progress):
            self.write_stats(histories(), progress)
            self.tracking.tell()

        def write(pair, learner):
            variant = variants[pair]._replace(tensors=learner.parameters)
            ridge = checkpoint.notes.get("ridges", {}).get(text_of(pair))
            self.write(pair, variant, learner.history[0].val_loss, learner.best_loss, learner.best_epoch, ridge)

        progress = Progress()
        if stage.method == "both" and (processes.count > 1 or not checkpoint.holds_training()):
            progress.rows = self.start_from_solutions(learners, variants)
            self.write_stats(histories(), progress)
            if processes.count == 1:
                checkpoint.save(learners, progress.rows)
        if processes.count == 1:
            fit(
                learners,
                self.objective(),
                stage.train,
                stage.held_out,
                stage.recipe,
                stage.runtime,
                checkpoint,
                rows=progress.rows,
                on_epoch=on_epoch,
                on_finished=write,
            )
        else:
            progress = self.train_shares(learners, progress.rows)
            checkpoint.save_past(histories())
            self.write_stats(histories(), progress)
            for pair, learner in learners.items():
                write(pair, learner)
        return self.in_order(histories())

    def objective(self) -> BlockObjective:
        return BlockObjective(self.stage.original, self.stage.blocks, self.stage.recipe)

    def solutions(self, todo, read):
        stage = self.stage
        return solve(
            todo, read, stage.original, stage.blocks, stage.calibration, stage.held_out, stage.ridges, stage.runtime
        )

    def start_from_solutions(self, learners: dict[Pair, Learner], variants: dict[Pair, Variant]) -> list[EpochSeconds]:
        """Let the learners go on from the closed form's solutions; returns the seconds."""
        rows, ridges = [], {}
        for solved in self.solutions(list(learners), lambda pairs: {pair: variants[pair] for pair in pairs}):
            restart(learners, solved)
            ridges |= {text_of(pair): solution.ridge for pair, solution in solved.solutions.items()}
            rows = solved.rows
        self.checkpoint.notes["ridges"] = ridges
        return rows

    def train_shares(self, learners: dict[Pair, Learner], rows: list[EpochSeconds]) -> Progress:
        """Train the learners of several processes, each those of its share of the blocks; returns the progress.

        Each keeps a state of its own. In the end all learners have their best weights and histories in all processes.
        """
        stage, processes = self.stage, self.stage.runtime.processes
        owners = {name: number % processes.count for number, name in enumerate(by_block(learners))}
        own = {pair: learner for pair, learner in learners.items() if owners[pair.block] == processes.number}
        checkpoint = self.checkpoint.share(processes.number, processes.count, own)
        alone = replace(stage.runtime, processes=ALONE)
        progress = fit(own, self.objective(), stage.train, stage.held_out, stage.recipe, alone, checkpoint, rows=rows)
        for pair, learner in learners.items():
            for tensor in learner.parameters.values():
                processes.spread(tensor.data, owners[pair.block])
        states = [(learner.history, learner.best_loss, learner.best_epoch) for learner in own.values()]
        gathered = processes.gather((dict(zip(own, states)), progress.rows))
        for found, _ in gathered:
            for pair, state in found.items():
                learners[pair].history, learners[pair].best_loss, learners[pair].best_epoch = state
        checkpoint.remove_alone()
        return Progress(max((rows for _, rows in gathered), key=len))

    def in_order(self, histories: dict[Pair, list[Epoch]]) -> dict[Pair, list[Epoch]]:
        """Those and the ones from before an interruption, in the library's order."""
        past = self.checkpoint.past
        found = {
            pair: histories.get(pair) or [Epoch(*row) for row in past.get(text_of(pair), ())] for pair in self.made_from
        }
        return {pair: history for pair, history in found.items() if history}

    def write_stats(self, histories: dict[Pair, list[Epoch]], progress: Progress) -> None:
        if self.stage.runtime.processes.is_first:
            histories = self.in_order(histories)
            write_stats(self.stage.stats_file, histories, progress, self.run)
            write_variant_stats(self.stage.stats_beside("blocks"), histories, self.run)

    def write(
        self, pair: Pair, variant: Variant, before: float, after: float, best_epoch: int, ridge: float | None
    ) -> None:
        """Write a variant that is done to the library; `before`, `after`: its held-out errors."""
        self.errors[pair] = after
        if self.stage.runtime.processes.is_first:
            self.stage.library.write(
                pair.variant,
                variant,
                self.made_from[pair],
                nmse_before=before,
                nmse_after=after,
                best_epoch=best_epoch,
                **({"ridge": ridge} if len(self.stage.ridges) > 1 and ridge is not None else {}),
            )


def make_learner(variant: Variant, recipe: Recipe, total_steps: int) -> Learner:
    """A learner of a variant's tensors, its removed weights held at zero."""
    parameters = {name: tensor.requires_grad_() for name, tensor in variant.tensors.items()}
    return Learner(parameters, parameter_masks(variant.block, variant.keeps), recipe, total_steps)


def restart(learners: dict[Pair, Learner], solved: Solved) -> None:
    """Let learners go on from solutions."""
    for pair, solution in solved.solutions.items():
        learners[pair].restart_from(solution.tensors, solution.before, solution.after, solved.seconds)


def added_up(before: list[EpochSeconds], rows: list[EpochSeconds]) -> list[EpochSeconds]:
    """The seconds of epochs, over an interruption; `before`: the same epochs, or none."""
    if not before:
        return rows
    return [
        EpochSeconds(row.epoch, row.train + past.train, row.validation + past.validation)
        for row, past in zip(rows, before, strict=True)
    ]
