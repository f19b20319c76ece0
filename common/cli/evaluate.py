"""What the two evaluation scripts do with what a model answers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.cli.flags import settings_from
from common.cli.open import Opened, open_study
from common.cli.paths import models_to_evaluate
from common.data.examples import Examples
from common.data.metrics import CONFIDENCE, Scored, intervals
from common.data.tasks import TASKS
from common.evaluation import tables
from common.evaluation.cards import check_card, update_card
from common.evaluation.cost import Reported, original_of, write_reports
from common.runtime.errors import UserError
from common.runtime.files import check_apart, real
from common.runtime.processes import own_number
from common.runtime.progress import Talk
from common.runtime.records import check_report, write_json_lines
from common.runtime.settings import EvaluationSettings


class Answered(NamedTuple):
    """What a model answered to all examples.

    `answers`: as the task's `scored` takes them; `shown`: of each {name: JSON value}, for --save-predictions;
    `settings`: {name: JSON value}, how they were found, for the result; `note`: a sentence that people should read.
    """

    answers: list
    shown: list[dict]
    seconds: float
    settings: dict = {}
    note: str | None = None


def evaluate(args, script: str, answer: Callable[[Opened, Examples], Answered]) -> dict:
    """Evaluate the models of the flags one after another, and report what they cost where that is asked for.

    Args:
        script: the one that does it, which the models' tasks must be evaluated by.
    Returns:
        the result of the only model, or {"models": [result, …]}.
    Raises:
        UserError: before any work, where a path or flag is wrong; a model is for another task.
    """
    settings, paths = settings_from(args, EvaluationSettings), models_to_evaluate(args.model)
    if settings.original and not settings.report:
        raise UserError("--original: goes with --report")
    if settings.test_file and settings.split != "test":
        raise UserError(f"--test-file: goes with --split test, not {settings.split}")
    if settings.update_card and args.limit:
        raise UserError(f"--update-card: a card is for all examples of the split; leave out --limit {args.limit}")
    reports = files_of(settings.report, "--report", paths)
    predictions = files_of(settings.save_predictions, "--save-predictions", paths)
    check_apart(
        {"--report": list(reports.values()), "--save-predictions": list(predictions.values())},
        {"-m": paths, "-t": args.tokenizer, "--data": args.data, "--test-file": settings.test_file},
    )
    for path in paths:
        check_report(reports.get(path), script)
        check_report(predictions.get(path), script, lines=True)
        if settings.update_card:
            check_card(path)
    results, reported, known, notes, talk = [], [], {}, {}, Talk(args.quiet or own_number() > 0)
    for path in talk.progress(paths, "models") if len(paths) > 1 else paths:
        opened = open_study(args, path, script, talk)
        loaded = opened.loaded
        if settings.update_card and (teacher := opened.source.answers_of(settings.split)):
            raise UserError(
                f"--update-card: references are the answers of {teacher}; agreement with them is no quality"
            )
        if settings.report:  # it is measured after all models have been evaluated, beside the others
            known |= {real(path): loaded} if loaded.is_module else {}
            original = original_of(loaded, settings.original, opened.runtime.device, known)
        examples = opened.split(settings.split)
        answered = answer(opened, examples)
        scored = loaded.task.scored(answered.answers, examples.texts, examples.targets)
        results.append(result_of(opened, path, examples, answered, scored, settings))
        bounds = results[-1].get("intervals", {})
        scores = [f"{metric} {tables.score(results[-1][metric], bounds.get(metric))}" for metric in loaded.task.metrics]
        say = talk.say if len(paths) == 1 else talk.remark
        say(f"{path}: {', '.join(scores)} on {len(examples)} examples of {opened.source}")
        agreed = results[-1].get("agreement_with")
        agreement = agreed and f"the references are the answers of {agreed}; scores are agreement with it, not quality"
        for note in filter(None, (answered.note, scored.note, agreement)):
            notes.setdefault(note, []).append(str(path))
        if settings.update_card and opened.runtime.processes.is_first:
            results[-1]["card"] = update_card(path, results[-1], opened.source)
        if settings.save_predictions and opened.runtime.processes.is_first:
            write_json_lines(predictions[path], [{"script": script, **row} for row in answered.shown])
            results[-1]["predictions"] = predictions[path]
        if settings.report:
            reported.append(Reported(reports[path], loaded, original, dict(results[-1])))
            results[-1]["report"] = reports[path]
    figures = write_reports(reported, opened.runtime) if reported and opened.runtime.processes.number == 0 else {}
    tell(results, figures, notes, talk)
    return results[0] if len(results) == 1 else {"models": results}


def tell(results: list[dict], figures: dict[str, dict], notes: dict[str, list[str]], talk: Talk) -> None:
    """Tell the results on stderr, several in a table for each task, and what is to be known of them.

    Args:
        figures: see `cost.write_reports`.
        notes: {note: the models that it is of}.
    """
    lines = tables.of_costs(figures[results[0]["model"]]) if len(results) == 1 and figures else []
    for name in dict.fromkeys(result["task"] for result in results if len(results) > 1):
        lines += tables.of_models(TASKS[name], [result for result in results if result["task"] == name], figures)
    for note, models in notes.items():
        lines += tables.wrapped(f"{'all' if len(models) == len(results) > 1 else ', '.join(models)}: {note}")
    for line in lines:
        talk.say(line)


def result_of(
    opened: Opened, path: Path, examples: Examples, answered: Answered, scored: Scored, settings: EvaluationSettings
) -> dict:
    """The result for a model, as JSON values."""
    task = opened.loaded.task
    bounds = intervals(scored, settings.bootstrap) if settings.bootstrap else {}
    answers_of = opened.source.answers_of(settings.split)
    return {
        "model": str(path),
        "task": task.name,
        "data": str(opened.source),
        "split": settings.split,
        **({"agreement_with": answers_of} if answers_of else {}),
        "examples": len(examples),
        "max_length": examples.longest,
        "at_max_length": examples.at_longest(),
        "device": str(opened.runtime.device),
        "precision": opened.runtime.precision if opened.loaded.is_module else opened.loaded.model.precision,
        **scored.scores(),
        **({"intervals": bounds, "confidence": CONFIDENCE, "resamples": settings.bootstrap} if bounds else {}),
        **scored.signatures(),
        **answered.settings,
        **opened.loaded.counts,
        "bytes_on_disk": opened.loaded.bytes_on_disk,
        "examples_per_second": round(len(examples) / answered.seconds, 2),
    }


def files_of(template: str | None, flag: str, paths: list[Path]) -> dict[Path, str]:
    """Where a file of each model goes, {path: file}; `{name}` in the template stands for the model's name.

    Raises:
        UserError: two models would have one file, as those of two folders that are called alike.
    """
    if template is None:
        return {}
    places = {path: Path(os.path.abspath(path)) for path in paths}  # "." has no name
    names = {path: place.stem if place.suffix == ".pth" else place.name for path, place in places.items()}
    files = {path: template.replace("{name}", name) for path, name in names.items()}
    for file in files.values():
        alike = [str(other) for other in files if files[other] == file]
        if len(alike) > 1:
            remedy = "which stands for the model's name"
            if "{name}" in template:
                remedy = "and models that are called alike are evaluated one by one, with a file each"
            raise UserError(f"{flag} {template}: {' and '.join(alike)} would have one file; use {{name}}, {remedy}")
    return files
