"""Fine-tuning of all variants of a library jointly, within models that are composed of them; see `supernet`."""

import math
from pathlib import Path

from common.composing.compose import check_model
from common.composing.configurations import read_configurations
from common.composing.scheme import make_scheme
from common.models.load import LoadedModel
from common.runtime.devices import give_back_memory
from common.runtime.errors import UserError
from common.runtime.records import digest
from common.training.block_level.sampling import make_sampling, sample_compositions
from common.training.block_level.solutions import solve
from common.training.block_level.stage import BlockStage, beside
from common.training.block_level.supernet import JointObjective, Supernet
from common.training.learner import NEVER_A_NUMBER, Learner
from common.training.loop import fit, steps_of, validate
from common.training.stats import (
    RUN_DIGITS,
    EpochSeconds,
    seconds_of,
    write_composition_stats,
    write_stats,
    write_variant_stats,
)

VERSION = 2  # part of the key of every output; raise it when results change
USUAL = "conf.json"  # whose configurations quality is measured on, if it is there


def tune_jointly(stage: BlockStage, configurations: list[dict[str, str]], *, sampling: str = "even") -> dict:
    """Train the variants that are not there yet within composed models; returns the result.

    They are trained among those that are there, which stay as they are, and begin with what these have learnt. If there
    are none, the shared parameters are trained with them.

    `configurations`: {block: variant} each, those that quality is measured on. `sampling`: a name in `SAMPLING`.
    """
    library, runtime, recipe = stage.library, stage.runtime, stage.recipe
    settings = {"joint_version": VERSION, "sampling": sampling}
    made_from = stage.made_from(**settings)
    todo = {
        pair: made
        for pair, made in made_from.items()
        if not library.has(pair, made | {"run": library.run(pair)}, stage.overwrite)
    }
    # one that is there stays, whatever it was trained with
    todo = runtime.processes.agree(todo if library.is_intact_beside() else made_from)
    skipped = len(made_from) - len(todo)
    runtime.talk.say(f"{len(todo)} variants to fine-tune together, {skipped} are there already")
    if not todo:
        return stage.nothing_to_do(skipped, {library.run(pair)[:RUN_DIGITS] for pair in made_from})
    old = [pair for pair in library.variants() if pair not in todo]
    key = digest(  # all that is trained, and all that it is trained among
        [
            {str(pair): settings for pair, settings in todo.items()},
            {str(pair): library.entry(pair)["key"] for pair in old},
        ]
    )
    run = key[:RUN_DIGITS]
    supernet = Supernet(
        stage.original,
        stage.blocks,
        stage.variants(stage.pruned, todo),
        stage.variants(library, old),
        library.read_shared() if old else None,
        library.read_updates() if old else None,
    )
    trains_shared = not old and recipe.shared_rate > 0
    if trains_shared:
        library.check_shared(supernet.shared)
    learner = supernet.make_learner(recipe, steps_of(stage.train, recipe), recipe.shared_rate if trains_shared else 0)
    learners = {"library": learner}
    library.expect(stage.blocks, todo, learner.parameters.values())
    compositions = sample_compositions(configurations, todo, supernet.pairs(), recipe.seed)
    rule = make_sampling(sampling, todo, supernet.pairs(), recipe.seed)
    objective = JointObjective(supernet, recipe, rule, compositions, stage.original)
    checkpoint, tracking = stage.open_checkpoint({"library": key}), stage.open_tracking(run)

    def on_epoch(seconds):
        if runtime.processes.is_first:
            write_stats(stage.stats_file, {"library": learner.history}, seconds, run)
            write_composition_stats(beside(stage.stats_file, "compositions"), learner.history, run)
            tracking.tell()

    seconds = []
    if checkpoint.content is None:
        seconds = start_from_solutions(stage, supernet, learner, objective, run)
        on_epoch(seconds)
        checkpoint.notes |= {str(pair): variant.tensors for pair, variant in supernet.new.items()}
        checkpoint.save(learners, seconds)
    else:
        supernet.start_from({pair: checkpoint.notes[str(pair)] for pair in todo})
    fit(learners, objective, stage.train, stage.held_out, recipe, runtime, checkpoint, rows=seconds, on_epoch=on_epoch)
    tracking.close()
    if runtime.processes.is_first:
        library.write(
            supernet.fold(),
            {pair: made | {"run": key} for pair, made in todo.items()},
            shared=supernet.shared if trains_shared else None,
            updates=supernet.updates,
            beside_made_from=stage.settings() | settings | {"run": key},
        )
    checkpoint.remove()
    before, after = learner.history[0].val_loss, learner.best_loss
    runtime.talk.say(
        f"{library.folder}: mean loss of {len(compositions)} composed models {before:.4f} -> {after:.4f} "
        f"(epoch {learner.trained(learner.best_epoch)})"
    )
    return {
        "fine_tuned": len(todo),
        "skipped": skipped,
        "shared": "trained" if trains_shared else "kept",
        "val_loss_before": before,
        "val_loss": after,
        "best_epoch": learner.best_epoch,
        "compositions": next(row.parts for row in learner.history if row.epoch == learner.best_epoch),
        "seconds": seconds_of(stage.stats_file, {run}),
        "stats": stage.stats_file,
    }


def start_from_solutions(
    stage: BlockStage, supernet: Supernet, learner: Learner, objective: JointObjective, run: str
) -> list[EpochSeconds]:
    """Solve all variants; count the pruned weights and the solutions as the first two epochs, whose seconds it returns.

    A `UserError` if the loss is no number before that.
    """

    def count_as_epoch(epoch):
        validated = validate({"library": learner}, objective, stage.held_out, stage.recipe, stage.runtime)
        if epoch == 0 and not math.isfinite(validated.losses["library"]):
            raise UserError(NEVER_A_NUMBER)
        learner.count_as_epoch(epoch, validated.losses["library"], validated.parts["library"])

    count_as_epoch(0)
    pruned, histories = {pair: variant.tensors for pair, variant in supernet.new.items()}, {}
    for solutions, seconds_so_far in solve(stage, list(supernet.new)):
        seconds = seconds_so_far
        supernet.start_from({pair: solution.tensors for pair, solution in solutions.items() if solution.is_better})
        histories |= {pair: solution.history for pair, solution in solutions.items()}
    del solutions
    give_back_memory()  # of the solutions, before the optimizer needs as much and more
    count_as_epoch(1)
    if learner.best_epoch == 0:
        supernet.start_from(pruned)
    if stage.runtime.processes.is_first:
        write_variant_stats(beside(stage.stats_file, "blocks"), histories, run)
    return seconds


def read_configurations_of(loaded: LoadedModel, path: str | None) -> list[dict[str, str]]:
    """The configurations of a model in a conf.json, {block: variant} each.

    `path`: None for ./conf.json, which need not be there, nor be this model's; a `UserError` if another one is not.
    """
    if path is None and not Path(USUAL).exists():
        return []
    configurations = read_configurations(path or USUAL)
    if path is not None:
        check_model(configurations.model, loaded, path)
    elif configurations.model != loaded.identity:
        return []
    return make_scheme(configurations).configs
