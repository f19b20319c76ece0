"""What a script's flags name, opened: the model, its tokenizer and data, and how to run it.

This is the one file of `common/` that knows parsed arguments, but for `cli`, which defines them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.blocks.tensors import parameter_counts
from common.cli.flags import FINE_TUNED, MODELS, SPLITS
from common.data.examples import Examples, load_examples
from common.data.metrics import CONFIDENCE, intervals
from common.data.sources import DataSource, check_source
from common.data.splits import has_split
from common.evaluation.answers import Quality
from common.evaluation.cost import Reported, original_of, write_reports
from common.models import compact
from common.models.load import LoadedModel, data_source, load_model, load_tokenizer
from common.runtime.devices import Runtime, resolve_device
from common.runtime.errors import UserError
from common.runtime.files import check_apart, real
from common.runtime.processes import join, own_number
from common.runtime.progress import Talk
from common.runtime.records import check_report, write_json_lines
from common.training.learner import Recipe, last_rate
from common.training.loop import epoch_steps
from common.training.tracking import Tracking, check_trackers

METRIC_EXAMPLES = 256  # of what is generated: enough to tell epochs apart, and takes seconds
TRIED = 100  # examples of each split that are read when a model is adopted


@dataclass(frozen=True)
class Opened:
    """A model that a script was given, and what belongs to it."""

    loaded: LoadedModel
    runtime: Runtime
    tokenizer: object = None
    source: DataSource | None = None

    def split(self, args, name: str) -> Examples:
        """A split of its data: "train", "validation" or "test"."""
        return load_examples(
            self.source,
            name,
            self.tokenizer,
            self.loaded.task,
            prefix=self.loaded.prefix(self.source),
            label2id=self.loaded.label2id,
            positions=self.loaded.positions,
            max_length=args.max_length,
            limit=args.limit,
        )


def open_model(args, path: str | Path | None = None) -> Opened:
    """The model at `path`, or that of the flags -m and --device.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    device = resolve_device(args.device)
    loaded = load_model(path or the_model(args.model), device)
    processes = join(device)
    talk = Talk(args.quiet or not processes.is_first)
    how = {"pieces": getattr(args, "accumulate", 1), "precision": getattr(args, "precision", "fp32")}
    return Opened(loaded, Runtime(device, getattr(args, "batch_size", 1), talk, processes, **how))


def open_study(args, path: str | Path | None = None, script: str | None = None) -> Opened:
    """The same with its tokenizer and where its data are.

    Args:
        script: the evaluation script that the model's task must be one of.
    Raises:
        UserError: something of it is not there, or the model is for another task, or has too few positions for the
            flags.
    """
    opened = open_model(args, path)
    own = opened.loaded.task
    for flag in ("max_length", "max_new_tokens"):
        most, given = opened.loaded.positions, getattr(args, flag, None)
        if given and most and given > most:
            raise UserError(f"--{flag.replace('_', '-')} {given}: {opened.loaded.path} has positions for {most} tokens")
    if script not in (None, own.evaluated_by):
        raise UserError(f"{opened.loaded.path}: is a {own.name} model; evaluate it with {own.evaluated_by}")
    tokenizer, source = open_tokenizer(args, opened.loaded), data_source(args.data, opened.loaded)
    if source is None:
        raise UserError(f"{opened.loaded.path}: its record names no data; give a folder or a hub id with --data")
    check_source(source, own)
    opened.loaded.prefix(source)  # refuses what cannot be known
    return Opened(opened.loaded, opened.runtime, tokenizer, source)


def check_data(loaded: LoadedModel, tokenizer, source: DataSource) -> list[str]:
    """Make sure, with a few examples of each split, that a model can be used on its data.

    Returns:
        the splits, those that are made left out.
    Raises:
        UserError: see `splits.read_texts` and `examples.load_examples`.
    """
    check_source(source, loaded.task)
    prefix = loaded.prefix(source)
    there = [split for split in SPLITS if has_split(source, split, loaded.task)]
    for split in dict.fromkeys(["train", "validation", *there]):
        load_examples(
            source,
            split,
            tokenizer,
            loaded.task,
            prefix=prefix,
            label2id=loaded.label2id,
            positions=loaded.positions,
            limit=TRIED,
        )
    return there


def longest_answer(loaded: LoadedModel, wanted: int | None = None) -> int:
    """How many tokens a model may generate: as many as are wanted, or as its task's answers have, if they fit."""
    return wanted or min(loaded.task.longest_answer, loaded.positions or loaded.task.longest_answer)


def quality_from(args, opened: Opened, validation: Examples) -> Quality | None:
    """The metric of the flag --metric-for-best, to be measured on a sample of the validation examples.

    Returns:
        None for the loss.
    Raises:
        UserError: it is no metric of the task.
    """
    task = opened.loaded.task
    if args.metric_for_best == "loss":
        return None
    if args.metric_for_best not in task.metrics:
        raise UserError(
            f"--metric-for-best {args.metric_for_best}: of {task.name} it is one of loss, {', '.join(task.metrics)}"
        )
    examples = validation if task.has_labels else validation.sample(METRIC_EXAMPLES)
    return Quality(args.metric_for_best, examples, opened.tokenizer, opened.runtime, longest_answer(opened.loaded))


def open_tokenizer(args, loaded: LoadedModel):
    """The tokenizer of a flag -t: a tokenizer, or a folder that holds one alone; without the flag the model's own.

    Raises:
        UserError: there is none.
    """
    path = None if args.tokenizer is None else _the_one(args.tokenizer, "tokenizer_config.json", "tokenizer", "-t")
    return load_tokenizer(path, loaded)


@dataclass(frozen=True)
class Form:
    """How a model is written."""

    compact: bool
    dtype: str

    def to_json(self) -> dict:
        """Its part of what a model is made from."""
        return {**self.structure(), "dtype": self.dtype}

    def structure(self) -> dict:
        """The part of it that training depends on."""
        return {"compact": self.compact} | ({"compact_version": compact.VERSION} if self.compact else {})


def form_from(args, loaded: LoadedModel) -> Form:
    """The form of a script's flags (`cli.add_configuration_flags`); the type is the original's if they say none."""
    return Form(args.compact, args.dtype or loaded.dtype)


def recipe_from(args, default_lr: float, **others) -> Recipe:
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


def tracking_folder(args, output: str | Path) -> Path:
    """Where the trackers of --track keep their files on the training of `output`.

    Raises:
        UserError: a tracker is not installed, or the folder cannot be written to.
    """
    folder = Path(output).parent / "runs"
    if args.track:
        check_trackers(args.track, folder)
    return folder


def open_tracking(args, output, stats_file, run: str, recipe: Recipe, train: Examples, runtime: Runtime) -> Tracking:
    """The trackers of --track for one run of training; of several processes the first alone has them."""
    settings = {"output": str(output), "examples": len(train), **recipe.to_json()}
    rate = partial(last_rate, recipe, epoch_steps(train, recipe))
    names = args.track if runtime.processes.is_first else []
    folder = tracking_folder(args, output)
    return Tracking(names, folder, output, run, stats_file, rate, settings, runtime.talk)


def the_model(given: str | None) -> Path:
    """The model of a flag -m: a model, or a folder that holds one alone. Without the flag that is ./model.

    Raises:
        UserError: there is none, or several.
    """
    return _the_one(given or MODELS, "config.json", "model", "-m")


def models_to_evaluate(given: list[str] | None) -> list[Path]:
    """The models of a flag -m that takes several; without it the fine-tuned ones, or else the only one there is."""
    if given:
        return [the_model(path) for path in given]
    there = Path(FINE_TUNED).glob("*")
    found = [path for path in there if path.suffix == ".pth" or (path / "config.json").is_file()]
    return sorted(found, key=lambda path: (len(path.stem), path.name)) or [the_model(None)]  # 2 before 10


def _the_one(path, mark, what, flag):
    """`path` itself, unless it is a folder without `mark` that holds one alone that has it."""
    path = Path(path)
    if not path.is_dir() or (path / mark).is_file():
        return path
    found = sorted(each for each in path.iterdir() if (each / mark).is_file())
    if len(found) > 1:
        names = ", ".join(str(each) for each in found)
        raise UserError(f"{path}: holds several {what}s; say which one with {flag} ({names})")
    return found[0] if found else path


# --- the two evaluation scripts ----------------------------------------------------------------------------------


class Answered(NamedTuple):
    """What a model answered to all examples.

    `answers`: as the task's `scored` takes them; `shown`: of each {name: JSON value}, for --save-predictions;
    `settings`: {name: JSON value}, how they were found, for the result.
    """

    answers: list
    shown: list[dict]
    seconds: float
    settings: dict = {}


def evaluate(args, script: str, answer: Callable[[Opened, Examples], Answered]) -> dict:
    """Evaluate the models of the flags one after another, and report what they cost where that is asked for.

    Args:
        script: the one that does it, which the models' tasks must be evaluated by.
    Returns:
        the result of the only model, or {"models": [result, …]}.
    Raises:
        UserError: before any work, where a path or flag is wrong; a model is for another task.
    """
    paths = models_to_evaluate(args.model)
    if args.original and not args.report:
        raise UserError("--original: goes with --report")
    reports = _files_of(args.report, "--report", paths)
    predictions = _files_of(args.save_predictions, "--save-predictions", paths)
    check_apart(
        {"--report": list(reports.values()), "--save-predictions": list(predictions.values())},
        {"-m": paths, "-t": args.tokenizer, "--data": args.data},
    )
    for path in paths:
        check_report(reports.get(path), script)
        check_report(predictions.get(path), script, lines=True)
    results, reported, known, talk = [], [], {}, Talk(args.quiet or own_number() > 0)
    for path in paths:
        with talk.waiting(f"loading {path}"):
            opened = open_study(args, path, script)
        loaded = opened.loaded
        if args.report:  # it is measured after all models have been evaluated, beside the others
            known.setdefault(real(path), loaded)
            original = original_of(loaded, args.original, opened.runtime.device, known)
        with talk.waiting(f"reading {opened.source} ({args.split} split), and tokenizing it"):
            examples = opened.split(args, args.split)
        with talk.waiting(f"evaluating {path} on {len(examples):,} examples"):
            answered = answer(opened, examples)
        scored = loaded.task.scored(answered.answers, examples.texts, examples.targets)
        scores, sure = scored.scores(), intervals(scored, args.bootstrap) if args.bootstrap else {}
        results.append(
            {
                "model": str(path),
                "task": loaded.task.name,
                "data": str(opened.source),
                "split": args.split,
                "examples": len(examples),
                "max_length": examples.longest,
                "device": str(opened.runtime.device),
                "precision": opened.runtime.precision,
                **scores,
                **({"intervals": sure, "confidence": CONFIDENCE, "resamples": args.bootstrap} if sure else {}),
                **scored.signatures(),
                **answered.settings,
                **parameter_counts(loaded.model),
                "examples_per_second": round(len(examples) / answered.seconds, 2),
            }
        )
        told = ", ".join(_told(name, value, sure.get(name)) for name, value in scores.items())
        talk.say(f"{path}: {told} on {len(examples)} examples of {opened.source}")
        if args.save_predictions and opened.runtime.processes.is_first:
            write_json_lines(predictions[path], [{"script": script, **row} for row in answered.shown])
            results[-1]["predictions"] = predictions[path]
        if args.report:
            reported.append(Reported(reports[path], loaded, original, dict(results[-1])))
            results[-1]["report"] = reports[path]
    if reported and opened.runtime.processes.is_first:
        write_reports(reported, opened.runtime)
    return results[0] if len(results) == 1 else {"models": results}


def _told(metric, value, interval):
    """A score for the conversation: "bleu 26.04 [24.87, 27.20]"."""
    digits = 2 if max(map(abs, [value, *(interval or ())])) > 1 else 4
    return f"{metric} {value:.{digits}f}" + (
        f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    )


def _files_of(template, flag, paths):
    """Where a file of each model goes, {path: file}; `{name}` in the template stands for the model's name."""
    if template is None:
        return {}
    files = {path: template.replace("{name}", path.stem if path.suffix == ".pth" else path.name) for path in paths}
    if len(set(files.values())) < len(files):
        raise UserError(f"{flag} {template}: several models would have one file; use {{name}}, or other names")
    return files
