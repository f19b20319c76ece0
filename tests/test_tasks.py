"""Every task from end to end: evaluation with all its metrics, saved predictions, and the best epoch by a metric."""

import csv
import json

import pytest
import torch
from helpers import fails, outcome, read_json, run
from transformers import AutoTokenizer

from common.data.examples import Examples
from common.data.tasks import TASKS
from common.models.load import load_model

LANGUAGES = {"source_lang": "en", "target_lang": "de"}  # the tiny translations as texts and their summaries


@pytest.fixture
def model_for(model_of):
    """model_for(task): the folder of a tiny model whose record says its task."""

    def make(task):
        folder = model_of("distilbert" if task == "classification" else "bart")
        record = read_json(folder / "record.json") | {"task": task}
        if task == "summarization":
            record["data"] |= LANGUAGES
        (folder / "record.json").write_text(json.dumps(record))
        return folder

    return make


def edit_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | changes))


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_has_its_metrics_and_their_intervals(model_for, tmp_path, task):
    """Oracle: the scores (tested in test_metrics.py) of the predictions that were saved."""
    model, file = model_for(task.name), tmp_path / "predictions.jsonl"
    report = ("--save-predictions", file, "--report", tmp_path / "report.json")
    result = run(f"{task.evaluated_by} -m {model}", *report)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answers, references = [row["prediction"] for row in rows], [row["reference"] for row in rows]
    pairs = [(row["input"], row["reference"]) for row in rows]
    assert tuple(result["intervals"]) == task.metrics
    for name, value in task.scored(answers, pairs, references).scores().items():
        lower, upper = result["intervals"][name]
        assert result[name] == pytest.approx(value) and lower - 1e-9 <= value <= upper + 1e-9
    assert max(upper - lower for lower, upper in result["intervals"].values()) > 0
    expected = {"task": task.name, "split": "test", "examples": 16, "max_length": 64, "precision": "fp32"}
    assert result.items() >= (expected | {"resamples": 1000, "confidence": 0.95}).items()  # 64: the model's positions
    assert result["data"].endswith(f"data/{model.name}")
    assert read_json(tmp_path / "report.json")["evaluation"].items() <= result.items()


@pytest.mark.parametrize(
    "task, longest, fill",
    [(TASKS["translation"], 5, 3), (TASKS["classification"], 5, 2), (TASKS["summarization"], 200, 1)],
)
def test_examples_that_fill_the_length_are_counted(task, longest, fill):
    """By hand: inputs of 4, 5 and 9 tokens and targets of 128, 5 and 2; a summary is cut at 128 tokens."""
    targets = [0, 1, 0] if task.has_labels else [[1] * 128, [1] * 5, [1] * 2]
    assert Examples(task, [[1] * 4, [1] * 5, [1] * 9], targets, [], 0, longest).at_longest() == fill


def test_texts_that_are_cut_are_told_of(model_for):
    """The tiny captions have more than 3 tokens each."""
    model = model_for("translation")
    code, result, err = outcome(f"evaluate-t5.py -m {model} --max-length 3 --limit 9")
    assert (code, result["at_max_length"]) == (0, 9)
    assert "9 of the 9 examples of its test split fill 3 tokens, and are cut there if they are longer" in err


def test_predictions_of_a_classifier_have_the_models_own_names(model_for, tmp_path):
    """The probabilities' largest is the prediction; oracle of one of them: the model by itself, without padding."""
    model, file = model_for("classification"), tmp_path / "predictions.jsonl"
    edit_config(model, id2label={"0": "schlecht", "1": "gut"}, label2id={"schlecht": 0, "gut": 1})
    result = run(f"evaluate-distilbert.py -m {model} --save-predictions {file}")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [row["reference"] for row in rows] == ["schlecht", "gut"] * 8
    assert sum(row["prediction"] == row["reference"] for row in rows) / 16 == result["accuracy"]
    for row in rows:
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
        assert list(row["probabilities"]) == ["schlecht", "gut"]
    loaded = load_model(model).model
    tokens = AutoTokenizer.from_pretrained(model.parent.parent / "tokenizer" / "distilbert")(
        rows[3]["input"], return_tensors="pt"
    )
    with torch.no_grad():
        logits = loaded(input_ids=tokens["input_ids"]).logits[0]
    assert list(rows[3]["probabilities"].values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"problem_type": "multi_label_classification"}, "multi_label_classification is not supported"),
        ({"problem_type": "regression"}, "regression is not supported"),
        ({"id2label": {"0": "x"}, "label2id": {"x": 0}}, "regression is not supported"),
    ],
)
def test_other_kinds_of_classifiers_are_refused(model_for, changes, words):
    model = model_for("classification")
    edit_config(model, **changes)
    err = fails(f"evaluate-distilbert.py -m {model}")
    assert f"{model}: config.json: " in err and words in err


# --- the best epoch by a metric ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, metric", [("summarization", "rouge_l"), ("classification", "f1")])
def test_the_best_epoch_by_a_metric(model_for, tmp_path, monkeypatch, task, metric):
    """The figure in the stats is that of the evaluation of what was saved, on the validation split."""
    monkeypatch.chdir(tmp_path)
    model = ("-m", model_for(task))
    run("config_generator.py", *model, "--attention", 0.5, "--linear", 0.3, "-n", 1)
    run("prune_scheme_generator.py")
    run("prune.py", *model, "-o", "pruned")
    tuning = ("-n", 0, "-p", "pruned", "-o", "tuned", "--batch-size", 8, "--metric-for-best", metric)
    result = run("model-level_finetuning.py", *model, *tuning, "--epochs", 3, "--lr", 0.003)
    with open("tuned.csv", encoding="utf-8", newline="") as handle:
        values = [float(row[metric]) for row in csv.DictReader(handle)]
    assert len(values) == 4 and result["best_epoch"] in [n for n, value in enumerate(values) if value == max(values)]
    assert (result[f"val_{metric}_before"], result[f"val_{metric}"]) == (values[0], max(values))
    script = TASKS[task].evaluated_by
    evaluated = run(f"{script} -m tuned --split validation --bootstrap 0")
    assert evaluated[metric] == pytest.approx(max(values))
    assert read_json(tmp_path / "tuned" / "record.json")["made_from"]["metric_for_best"] == metric
