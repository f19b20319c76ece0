"""What a script's flags name, opened: the model, its tokenizer and data, and how to run it.

This is the one file of `common/` that knows parsed arguments, but for `cli`, which defines them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import FINE_TUNED, MODELS, Talk, refuse_unused
from common.data import Examples, load_examples
from common.devices import Runtime, resolve_device
from common.errors import UserError
from common.evaluation import parameter_counts
from common.files import real
from common.models import LoadedModel, data_source, load_model, load_tokenizer
from common.processes import join
from common.records import check_report
from common.report import Reported, original_of, write_reports
from common.tasks import TASKS
from common.tracking import Tracking, check_trackers
from common.training import Recipe, last_rate, steps_of


@dataclass(frozen=True)
class Opened:
    """A model that a script was given, and what belongs to it."""

    loaded: LoadedModel
    runtime: Runtime
    tokenizer: object = None
    source: str | None = None  # of the data

    def split(self, args, name: str) -> Examples:
        """A split of its data: "train", "validation" or "test"."""
        return load_examples(
            self.source,
            name,
            self.tokenizer,
            self.loaded.task,
            prefix=self.loaded.study.prefix,
            classes=self.loaded.model.config.num_labels,
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
    return Opened(loaded, Runtime(device, getattr(args, "batch_size", 1), talk, processes))


def open_study(args, path: str | Path | None = None, task: str | None = None) -> Opened:
    """The same with its tokenizer and where its data are.

    Args:
        task: what the model must be for.
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
    if task not in (None, own.name):
        raise UserError(f"{opened.loaded.path}: is a {own.name} model; evaluate it with {own.evaluated_by}")
    tokenizer, source = open_tokenizer(args, opened.loaded), data_source(args.data, opened.loaded)
    if source is None:
        raise UserError(f"{opened.loaded.path}: its record names no data; give a folder or a hub id with --data")
    return Opened(opened.loaded, opened.runtime, tokenizer, source)


def open_tokenizer(args, loaded: LoadedModel):
    """The tokenizer of a flag -t: a tokenizer, or a folder that holds one alone; without the flag the model's own.

    Raises:
        UserError: there is none.
    """
    path = None if args.tokenizer is None else _the_one(args.tokenizer, "tokenizer_config.json", "tokenizer", "-t")
    return load_tokenizer(path, loaded)


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
    folder = Path(args.track_dir) if args.track_dir else Path(output).parent / "runs"
    if args.track:
        check_trackers(args.track, folder)
    else:
        refuse_unused(args, ["track_dir"], "goes with --track")
    return folder


def open_tracking(args, output, stats_file, run: str, recipe: Recipe, train: Examples, runtime: Runtime) -> Tracking:
    """The trackers of --track for one run of training; of several processes the first alone has them."""
    settings = {"output": str(output), "examples": len(train), **recipe.to_json()}
    rate = partial(last_rate, recipe, steps_of(train, recipe))
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


def evaluate(args, task: str, measure: Callable[[Opened, Examples], tuple[dict, float]]) -> dict:
    """Evaluate the models of the flags one after another, and report what they cost where that is asked for.

    Args:
        task: what the models must be for.
        measure: gives the scores of a model, {name: value}, and the seconds that took.
    Returns:
        the result of the only model, or {"models": [result, …]}.
    Raises:
        UserError: before any work, where a path or flag is wrong; a model is for another task.
    """
    paths = models_to_evaluate(args.model)
    if args.original and not args.report:
        raise UserError("--original: goes with --report")
    reports = _reports(args.report, paths, TASKS[task].evaluated_by)
    results, reported, known, talk = [], [], {}, Talk(args.quiet)
    for path in paths:
        with talk.waiting(f"loading {path}"):
            opened = open_study(args, path, task)
        loaded = opened.loaded
        if args.report:  # it is measured after all models have been evaluated, beside the others
            known.setdefault(real(path), loaded)
            original = original_of(loaded, args.original, opened.runtime.device, known)
        with talk.waiting(f"reading {opened.source} ({args.split} split), and tokenizing it"):
            examples = opened.split(args, args.split)
        with talk.waiting(f"evaluating {path} on {len(examples):,} examples"):
            scores, seconds = measure(opened, examples)
        results.append(
            {
                "model": str(path),
                "split": args.split,
                "examples": len(examples),
                **scores,
                **parameter_counts(loaded.model),
                "examples_per_second": round(len(examples) / seconds, 2),
            }
        )
        if args.report:
            reported.append(Reported(reports[path], loaded, original, dict(results[-1])))
            results[-1]["report"] = reports[path]
    if reported:
        write_reports(reported, opened.runtime)
    return results[0] if len(results) == 1 else {"models": results}


def _reports(template, paths, script):
    """Where each model's report goes, {path: file}; `{name}` in the template stands for the model's name."""
    if template is None:
        return {}
    files = {path: template.replace("{name}", path.stem if path.suffix == ".pth" else path.name) for path in paths}
    if len(set(files.values())) < len(files):
        raise UserError(f"--report {template}: several models would have one report; use {{name}}, or other names")
    for file in files.values():
        check_report(file, script)
    return files
