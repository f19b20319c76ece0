"""What was measured of a model, in the metadata of its card: `model-index`, as Hugging Face's hub reads it."""

import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from common.data.sources import DataSource
from common.data.tasks import TASKS
from common.evaluation.pictures import metric_name
from common.models.publishing import pipeline_tag
from common.runtime.errors import UserError, as_user_error
from common.runtime.files import check_writable, write_bytes
from common.runtime.records import CARD_NAME, RECORD_NAME, read_record

DIGITS = 4
ON_THE_HUB = {"bleu": "sacrebleu", "matthews": "matthews_correlation"}  # metrics that are called otherwise there
ON_THE_HUB |= {f"rouge_{kind}": "rouge" for kind in ("1", "2", "l")}


def check_card(folder: Path) -> None:
    """Make sure, before any work, that a model's card can be added to."""
    card, record = folder / CARD_NAME, folder / RECORD_NAME
    if not card.is_file():
        raise UserError(f"--update-card: {folder} has no card, {CARD_NAME}; evaluate it without the flag")
    if record.is_file() and CARD_NAME in read_record(record).get("files", {}):
        raise UserError(f"{record}: has a digest of the card, as none has today; make the model again")
    check_writable(card, is_file=True)
    read_card(card)


def read_card(path: Path) -> ModelCard:
    with as_user_error(path, "has metadata that are no model card's"):
        return ModelCard.load(path)


def update_card(folder: Path, result: dict, source: DataSource) -> str:
    """Write the scores of an evaluation's result into a card, atomically, in place of those of the same metrics on the
    same split; what else is in it stays. Returns the card's path."""
    path = folder / CARD_NAME
    card, scores = read_card(path), scores_of(result, source)
    measured = {identity(score) for score in scores}
    others = [score for score in card.data.eval_results or [] if identity(score) not in measured]
    card.data.eval_results = others + scores
    card.data.model_name = card.data.model_name or folder.absolute().name
    write_bytes(path, str(card).encode())
    return str(path)


def identity(score: EvalResult) -> tuple:
    """What makes two scores one that was measured twice; those that the hub has verified are not ours."""
    return (*score.unique_identifier, score.metric_type, score.metric_name, score.verified)


def scores_of(result: dict, source: DataSource) -> list[EvalResult]:
    """The scores of a result, as the hub has them."""
    data, intervals = source.file(result["split"]) or source.data, result.get("intervals", {})
    name = Path(data).name if os.path.exists(data) else data
    return [
        EvalResult(
            task_type=pipeline_tag(result["task"]),
            dataset_type=name,
            dataset_name=name,
            dataset_config=source.data_config,
            dataset_split=result["split"],
            metric_type=ON_THE_HUB.get(metric, metric),
            metric_name=metric_name(metric),
            metric_value=round(float(result[metric]), DIGITS),
            metric_args={"interval": [round(end, DIGITS) for end in intervals[metric]]} if intervals else None,
        )
        for metric in TASKS[result["task"]].metrics
    ]
