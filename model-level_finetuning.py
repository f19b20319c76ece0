#!/usr/bin/env python3
"""Fine-tune the composed models of some configurations, removed weights held at zero (or taken out, --compact).

With the pruned library this is the baseline, with the fine-tuned library the composed run; nothing else differs.
"""

import copy
import sys
from functools import partial
from pathlib import Path

from common.cli.flags import (
    DATA,
    FINE_TUNED,
    TRACKING,
    TRAINING,
    Parser,
    add_compute,
    add_configurations,
    add_seed,
    add_settings,
    check_form,
    flags_given,
    numbered,
)
from common.cli.launch import launch
from common.cli.paths import check_inputs
from common.cli.values import number
from common.runtime.files import check_apart, check_writable
from common.runtime.records import digest
from common.runtime.settings import TrackingSettings, TrainingDataSettings, TrainingSettings

NAME = "model-level_finetuning.py"  # in records


def build_parser():
    parser = Parser(
        __doc__,
        example="model-level_finetuning.py -p modules-pruned -n 0 1 -o 'baseline-{n}' --epochs 2",
        next_stage="evaluate-t5.py or evaluate-distilbert.py",
        overwrite=True,
        shared=True,
        planned=True,
    )
    add_configurations(
        parser, library_help="the pruned library (baseline) or the fine-tuned one", output=f"{FINE_TUNED}/{{n}}"
    )
    add_settings(parser, TrainingDataSettings, DATA)
    add_settings(parser, TrainingSettings, TRAINING, epochs=3)
    parser.group(TRAINING).add_argument(
        "--metric-for-best",
        default="loss",
        metavar="METRIC",
        help="what the best epoch, and early stopping, are chosen by: the validation loss, or a metric of the task, "
        "measured after every epoch (bleu, chrf; rouge_1, rouge_2, rouge_l; accuracy, f1, matthews)",
    )
    parser.group(TRAINING).add_argument(
        "--target-loss", type=number(float, above=0), help="stop as soon as the validation loss is no higher than this"
    )
    add_seed(parser)
    add_compute(parser)
    add_settings(parser, TrackingSettings, TRACKING)
    return parser


def run(args):
    check_form(args)
    check_inputs(args)
    outputs = numbered(args.output, "-o", args.nth)
    stats_files = numbered(args.stats or f"{str(Path(args.output)).removesuffix('.pth')}.csv", "--stats", args.nth)
    repositories = numbered(args.push_to_hub, "--push-to-hub", args.nth) if args.push_to_hub else {}
    check_apart(
        {"-o": list(outputs.values()), "--stats": list(stats_files.values())},
        {"-m": args.model, "-p": args.library, "-c": args.configurations, "-t": args.tokenizer, "--data": args.data},
    )
    from common.cli.open import open_quality, open_study, open_vocabulary, training_settings
    from common.composing.compose import choose
    from common.composing.library import PRUNED
    from common.models.publishing import check_push, push
    from common.training.stats import check_stats
    from common.training.tracking import check_trackers

    for nth in args.nth:
        check_trackers(args.track, outputs[nth])
        check_writable(outputs[nth], is_file=outputs[nth].endswith(".pth"))
        check_stats(stats_files[nth])
    check_push(repositories.values())
    opened = open_study(args)
    choices = choose(opened.loaded, args.library, args.configurations, args.nth)
    opened = open_vocabulary(args, opened)
    train, validation = opened.split("train"), opened.split("validation")
    start = "pruned" if choices[0].library.record["stage"] == PRUNED else "tuned"
    recipe = training_settings(args, opened.loaded, start, train)
    quality = open_quality(args.metric_for_best, opened, validation)
    results = [
        finetune(
            args,
            opened,
            choice,
            train,
            validation,
            recipe,
            quality,
            outputs[choice.nth],
            stats_files[choice.nth],
            is_last=choice is choices[-1],
        )
        for choice in choices
    ]
    for result in results if repositories and opened.runtime.processes.is_first else []:
        repository = repositories[result["configuration"]]
        result["pushed_to"] = push(result["output"], repository, opened.runtime.talk)
    return results[0] if len(results) == 1 else {"models": results}


def finetune(args, opened, choice, train, validation, recipe, quality, output, stats_file, is_last):
    """Compose a configuration's model, fine-tune and save it, unless it is there; returns the result.

    The last one is made of the original itself, unless that teaches it, so that there is no second model in memory.
    """
    from common.blocks.find import find_blocks
    from common.blocks.tensors import shared_parameters
    from common.cli.open import form_from, open_tracking
    from common.composing.compose import compose, removed_parts
    from common.models.saving import check_range, is_made, read_measured, round_to
    from common.models.trial import check_half, trial_batch
    from common.training import loop
    from common.training.checkpoints import Checkpoint
    from common.training.learner import Learner
    from common.training.loop import Measure, fit, steps_of, validate
    from common.training.losses import ModelObjective
    from common.training.stats import RUN_DIGITS, read_stats, seconds_of, write_stats

    loaded, talk, processes = opened.loaded, opened.runtime.talk, opened.runtime.processes
    form = form_from(args, opened)
    trained_from = {
        "model": loaded.identity["fingerprint"],
        "variants": choice.keys(),
        **recipe.to_json(),
        "training_examples": train.fingerprint(),
        "validation_examples": validation.fingerprint(),
        **form.structure(),
        "training_version": loop.VERSION,
        **(quality.to_json() if quality else {}),
    }
    made_from = trained_from | form.to_json()
    key = digest(trained_from)  # of the run: for another type of the weights it need not be done again
    run = key[:RUN_DIGITS]
    if processes.agree(is_made(output, made_from, args.overwrite, NAME) and read_stats(stats_file, run)):
        talk.say(f"{output}: is there already, made from the same inputs and settings")
        Checkpoint(output, {}, talk, processes).remove()
        there = {
            "output": output,
            "configuration": choice.nth,
            "skipped": True,
            **read_measured(output),
            **form.figures(),
        }
        return {**there, "seconds": seconds_of(stats_file, {run}), "stats": stats_file}

    model = loaded.model if is_last and not recipe.distill else copy.deepcopy(loaded.model)
    masks = compose(model, choice)
    removed = removed_parts(model, masks)
    check_range(output, model, form.rounded)  # else the work might be for nothing
    model, masks = form.made(model, masks)
    if form.is_half:
        check_half(output, model, trial_batch(model, validation))
    shares = dict.fromkeys(shared_parameters(model, find_blocks(model)), recipe.shared_rate)
    learner = Learner(dict(model.named_parameters()), masks, recipe, steps_of(train, recipe), shares)
    teacher = form.teacher(loaded.model) if recipe.distill else None
    objective = ModelObjective(model, recipe, teacher)
    checkpoint = Checkpoint(output, {"model": key}, talk, processes)
    tracking = open_tracking(args, output, stats_file, run, recipe, train, opened.runtime)

    def on_epoch(rows):
        if processes.is_first:
            write_stats(stats_file, {"model": learner.history}, rows, run, quality and quality.metric)
            tracking.tell()

    rows = fit(
        {"model": learner},
        objective,
        train,
        validation,
        recipe,
        opened.runtime,
        checkpoint,
        measure=Measure(quality.metric, partial(quality.of, model)) if quality else None,
        on_epoch=on_epoch,
    )
    tracking.close()
    measured = {
        "val_loss_before": learner.history[0].val_loss,
        "val_loss": learner.best_loss,
        "best_epoch": learner.best_epoch,
        "epochs": rows[-1].epoch,
    }
    if quality:
        name = f"val_{quality.metric}"
        measured |= {f"{name}_before": learner.history[0].metric, name: learner.best_metric}
    if form.is_half:
        check_half(output, model, trial_batch(model, validation))
    if form.rounded != "float32":  # what is measured is what is written
        round_to(output, model, form.rounded)
        after = validate({"model": learner}, objective, validation, recipe, opened.runtime)
        measured |= {"val_loss": after.losses["model"], "val_loss_float32": learner.best_loss}
        if quality:
            measured |= {name: quality.of(model), f"{name}_float32": learner.best_metric}
    measured |= save(form, opened, choice, model, masks, removed, measured, made_from, output, args)
    checkpoint.remove()
    talk.say(
        f"{output}: validation loss {measured['val_loss_before']:.4f} -> {measured['val_loss']:.4f} "
        f"(epoch {learner.best_epoch}{'' if learner.best_epoch else ': kept as composed'})"
    )
    return {
        "output": output,
        "configuration": choice.nth,
        "skipped": False,
        **measured,
        **form.figures(),
        "seconds": seconds_of(stats_file, {run}),
        "stats": stats_file,
    }


def save(form, opened, choice, model, masks, removed, measured, made_from, output, args):
    """Save a fine-tuned model with its record, which says what was measured; returns its counts of parameters and its
    form."""
    from common.composing.compose import composed_record

    counts = form.measured(model)
    record = composed_record(
        NAME,
        made_from,
        choice,
        opened.loaded,
        output,
        opened.tokenizer,
        opened.source,
        removed,
        flags=flags_given(args, nth=[choice.nth]),
        measured=measured | counts,
        **form.figures(),
    )
    if opened.runtime.processes.number == 0:
        form.save(output, model.eval(), record, masks, opened.tokenizer)
    return counts


def main(argv=None):
    return launch(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
