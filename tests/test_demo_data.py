"""The demos' made-up data that come with the suite, and how a demo is built of them."""

import json
import sys
from collections import Counter

import pytest
from helpers import run

from common.data.splits import read_texts
from common.data.tasks import TASKS
from common.training.scratch import demo

BUILD = sys.modules["common.training.scratch.demo"]
FOLDERS = pytest.mark.parametrize("family, task", [("t5", "translation"), ("distilbert", "classification")])


def test_they_stay_below_a_megabyte():
    assert sum(path.stat().st_size for folder in BUILD.DATA.values() for path in folder.iterdir()) < 850_000


@FOLDERS
def test_no_text_occurs_twice_within_or_across_splits(family, task):
    splits = [read_texts(BUILD.DATA[family], split, TASKS[task]) for split in ("train", "validation", "test")]
    assert list(map(len, splits[1:])) == {"t5": [400, 400], "distilbert": [300, 500]}[family]
    assert Counter(text for split in splits for text, _ in split).most_common(1)[0][1] == 1


def test_labels_are_balanced_in_every_split():
    for split in ("train", "validation", "test"):
        labels = [label for _, label in read_texts(BUILD.DATA["distilbert"], split, TASKS["classification"])]
        assert 2 * sum(labels) == len(labels) and set(labels) == {0, 1}


@FOLDERS
def test_the_seed_is_of_training_and_the_data_are_as_they_are(family, task, tmp_path, monkeypatch):
    short = tmp_path / "short"
    short.mkdir()
    for path in BUILD.DATA[family].iterdir():
        (short / path.name).write_text(
            "".join(path.read_text(encoding="utf-8").splitlines(True)[:24]), encoding="utf-8"
        )
    monkeypatch.setitem(BUILD.DATA, family, short)
    monkeypatch.setitem(BUILD.SCHEDULES, f"{family}-demo", {"epochs": 1, "batch_size": 16, "lr": 1e-3})
    for seed in (0, 1):
        result = run(f"download_model.py {family}-demo -o", tmp_path / str(seed), "--seed", seed, "--quiet")
        assert not result["skipped"]
    first, second = (tmp_path / str(seed) / "data" / f"{family}-demo" for seed in (0, 1))
    records = [json.loads((folder / "record.json").read_text()) for folder in (first, second)]
    assert records[0]["files"] == records[1]["files"]
    assert {path.name for path in first.iterdir()} == {path.name for path in short.iterdir()} | {"record.json"}
    weights = [
        (tmp_path / str(seed) / "model" / f"{family}-demo" / "model.safetensors").read_bytes() for seed in (0, 1)
    ]
    assert weights[0] != weights[1]
    assert demo.VERSION
