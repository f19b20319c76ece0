"""Texts without targets, which the model's own answers become: sequence-level distillation (arXiv 1606.07947)."""

from pathlib import Path

from common.cli.open import Opened, longest_answer, search_of
from common.data.sources import UNLABELLED
from common.data.splits import stratified_holdout
from common.evaluation.answers import class_logits, translate
from common.runtime.errors import UserError
from common.runtime.files import atomic_folder
from common.runtime.records import write_json_lines, write_record

VERSION = 1  # of the answers, part of the key of what holds them; raise it when they change
BATCH_SIZE = 64  # as in an evaluation


def write_answers(opened: Opened, path: Path, record: dict) -> dict[str, float]:
    """Let a model answer its source's texts, and write both as the training split of a data folder.

    Left out are texts whose answer is empty, or was cut short. The model goes to the device of its runtime.

    Returns:
        {"answered", "left_out": counts of texts, "answering_seconds"}; the counts go into the folder's record too.
    Raises:
        UserError: see `Opened.split`; or too few answers are left.
    """
    source, task, model = opened.source, opened.loaded.task, opened.loaded.model.to(opened.runtime.device)
    examples = opened.split(UNLABELLED)
    if task.has_labels:
        logits, seconds = class_logits(model, examples, opened.runtime)
        answers = [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
    else:
        search = search_of(opened.loaded)
        answers, cut, seconds = translate(model, opened.tokenizer, examples, opened.runtime, **search)
        answers = ["" if is_cut else answer for answer, is_cut in zip(answers, cut)]
    answered = [(text, answer) for (text, _), answer in zip(examples.texts, answers) if answer.strip()]
    counts = {"answered": len(answered), "left_out": len(answers) - len(answered)}
    why = f"as their answer was empty, or had not ended after {longest_answer(opened.loaded)} tokens"
    left_out = f"; {counts['left_out']:,} were left out, {why}" if counts["left_out"] else ""
    labels = [answer if task.has_labels else "" for _, answer in answered]
    if not answered or not (source.validation_file or stratified_holdout(labels)):
        raise UserError(f"{source.unlabelled}: {len(answered)} with answers are too few to hold some out{left_out}")
    with atomic_folder(path) as folder:
        rows = [(*(text if isinstance(text, tuple) else (text,)), answer) for text, answer in answered]
        write_json_lines(folder / "train.jsonl", [dict(zip(source.columns(task), row)) for row in rows])
        write_record(folder, record | counts)
    opened.runtime.talk.say(f"{path}: {len(rows):,} texts were answered in {seconds:.0f} seconds, as targets{left_out}")
    return counts | {"answering_seconds": round(seconds, 2)}
