"""Fine-tuning of all variants of a library jointly, within models that are composed of them; see `supernet`."""

import math
from dataclasses import dataclass
from pathlib import Path

from common.composing.compose import check_model
from common.composing.configurations import read_configurations
from common.composing.scheme import Pair, make_scheme
from common.models.load import LoadedModel
from common.runtime.devices import give_back_memory
from common.runtime.errors import UserError
from common.runtime.records import digest
from common.training.block_level.solutions import solve
from common.training.block_level.stage import BlockStage
from common.training.block_level.supernet import JointObjective, Supernet, sample_compositions
from common.training.checkpoints import RUN_DIGITS, Checkpoint
from common.training.learner import NEVER_A_NUMBER, Learner
from common.training.loop import fit, steps_of, validate
from common.training.running_losses import Progress
from common.training.stats import seconds_of, write_composition_stats, write_stats, write_variant_stats
from common.training.tracking import Tracking

VERSION = 1  # part of the key of every output; raise it when results change
USUAL = "conf.json"  # whose configurations quality is measured on, if it is there


def tune_jointly(stage: BlockStage, configurations: list[dict[str, str]], *, shared_rate: float) -> dict:
    """Train all variants within composed models, and the rest of the model with them; returns the result.

    Args:
        configurations: {block: variant} each, those that quality is measured on.
        shared_rate: the learning rate of the rest of the model, as a share of the variants'; 0 leaves it.
    Raises:
        UserError: see `Library.has`, `Library.read`, `solve` and `training.fit`.
    """
    library, runtime = stage.library, stage.runtime
    settings = {"joint_version": VERSION, "shared_rate": shared_rate}
    made_from = stage.made_from(stage.pruned.variants(), **settings)
    todo = runtime.processes.agree(missing(library, made_from, stage.overwrite))
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune together, {skipped} are there already")
    if not todo:
        return stage.nothing_to_do(skipped, {library.run(pair)[:RUN_DIGITS] for pair in made_from})
    old = [pair for pair in library.variants() if pair not in todo]
    run = run_of(library, todo, old)
    trains_shared = not old and shared_rate > 0
    supernet = open_supernet(stage, todo, old)
    if trains_shared:
        library.check_shared(supernet.shared)
    learner = supernet.make_learner(
        stage.recipe, steps_of(stage.train, stage.recipe), shared_rate if trains_shared else 0
    )
    compositions = sample_compositions(configurations, todo, supernet.tensors, stage.recipe.seed)
    checkpoint, tracking = stage.open_checkpoint(run, {"library": run}), stage.open_tracking(run[:RUN_DIGITS])
    Jointly(stage, supernet, learner, compositions, checkpoint, tracking, run[:RUN_DIGITS]).train()
    tracking.close()
    if runtime.processes.is_first:
        library.write_together(
            {pair: supernet.new[pair]._replace(tensors=supernet.tensors[pair]) for pair in todo},
            {pair: own | {"run": run} for pair, own in todo.items()},
            supernet.shared if trains_shared else {},
            stage.settings() | settings | {"run": run},
        )
    checkpoint.remove()
    before, after = learner.history[0].val_loss, learner.best_loss
    runtime.talk.say(
        f"{library.folder}: mean loss of {len(compositions)} composed models {before:.4f} -> {after:.4f} "
        f"(epoch {learner.best_epoch})"
    )
    return {
        "fine_tuned": len(todo),
        "skipped": skipped,
        "shared": "trained" if trains_shared else "kept",
        "val_loss_before": before,
        "val_loss": after,
        "best_epoch": learner.best_epoch,
        "compositions": next(row.parts for row in learner.history if row.epoch == learner.best_epoch),
        "seconds": seconds_of(stage.stats_file, {run[:RUN_DIGITS]}),
        "stats": stage.stats_file,
    }


@dataclass
class Jointly:
    """The training of a supernet, in one run that may have been interrupted before.

    `compositions`: {name: {block: variant}}, those that quality is measured on. `run`: digits of the run's key.
    """

    stage: BlockStage
    supernet: Supernet
    learner: Learner
    compositions: dict[str, dict[str, str]]
    checkpoint: Checkpoint
    tracking: Tracking
    run: str

    def train(self) -> None:
        """From the closed form's solutions, unless the checkpoint is of what came after."""
        stage, learners, progress = self.stage, {"library": self.learner}, Progress()
        objective = JointObjective(self.supernet, stage.recipe, self.compositions, stage.original)
        if not self.checkpoint.holds_training():
            self.start_from_solutions(objective, progress)
            self.checkpoint.save(learners, progress.rows)
        fit(
            learners,
            objective,
            stage.train,
            stage.held_out,
            stage.recipe,
            stage.runtime,
            self.checkpoint,
            rows=progress.rows,
            on_epoch=self.write_losses,
        )

    def start_from_solutions(self, objective: JointObjective, progress: Progress) -> None:
        """Solve all variants, and count the pruned weights and the solutions as the first two epochs."""
        stage, histories = self.stage, {}
        self.count_as_epoch(0, objective, 0.0)
        for solved in solve(
            list(self.supernet.new),
            stage.pruned_on_device,
            stage.original,
            stage.blocks,
            stage.calibration,
            stage.held_out,
            stage.ridges,
            stage.runtime,
        ):
            self.supernet.start_from(solved.better())
            histories |= solved.histories()
            progress.rows = solved.rows
        del solved
        give_back_memory()  # of the solutions, before the optimizer needs as much and more
        self.count_as_epoch(1, objective, progress.rows[-1].train)
        if stage.runtime.processes.is_first:
            write_variant_stats(stage.stats_beside("blocks"), histories, self.run)
        self.write_losses(progress)

    def count_as_epoch(self, epoch: int, objective: JointObjective, seconds: float) -> None:
        """Count what the learner holds as an epoch before any training.

        Raises:
            UserError: the loss is no number before anything was done.
        """
        stage = self.stage
        found = validate({"library": self.learner}, objective, stage.held_out, stage.recipe, stage.runtime)
        if epoch == 0 and not math.isfinite(found.losses["library"]):
            raise UserError(NEVER_A_NUMBER)
        self.learner.count_as_epoch(epoch, found.losses["library"], seconds, found.parts["library"])

    def write_losses(self, progress: Progress) -> None:
        stage, history = self.stage, self.learner.history
        if not stage.runtime.processes.is_first:
            return
        write_stats(stage.stats_file, {"library": history}, progress, self.run)
        write_composition_stats(stage.stats_beside("compositions"), history, self.run)
        self.tracking.tell()


def open_supernet(stage: BlockStage, todo: dict[Pair, dict], old: list[Pair]) -> Supernet:
    """The variants to train, among those that are there and the rest of the model that these were trained with."""
    new, among = stage.variants(stage.pruned, todo), stage.variants(stage.library, old)
    shared = stage.library.read_shared() if old else None
    return Supernet(stage.original, stage.blocks, new, among, shared)


def missing(library, made_from: dict[Pair, dict], overwrite: bool) -> dict[Pair, dict]:
    """The variants to train, {pair: what each is made from}; one that is there stays, whatever it was trained with."""
    todo = {
        pair: settings
        for pair, settings in made_from.items()
        if not library.has(pair, settings | {"run": library.run(pair)}, overwrite)
    }
    return todo if library.shared_is_intact() else made_from


def run_of(library, todo: dict[Pair, dict], among: list[Pair]) -> str:
    """What identifies a joint run: all that is trained in it, and what that is trained among, as a digest."""
    trained = {str(pair): settings for pair, settings in todo.items()}
    return digest([trained, {str(pair): library.entry(pair)["key"] for pair in among}])


def read_configurations_of(loaded: LoadedModel, path: str | None) -> list[dict[str, str]]:
    """The configurations of a model in a conf.json, {block: variant} each.

    Args:
        path: None for ./conf.json, which need not be there, nor be this model's.
    Raises:
        UserError: it cannot be read, or is another model's.
    """
    if path is None and not Path(USUAL).exists():
        return []
    configurations = read_configurations(path or USUAL)
    if path is not None:
        check_model(configurations.model, loaded, path)
    elif configurations.model != loaded.identity:
        return []
    return make_scheme(configurations).configs
