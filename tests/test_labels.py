"""Labels by one rule, whatever the file: names win, and what is not the model's is refused. Expected values by hand."""

import json
import re
from pathlib import Path

import pytest
import transformers
from helpers import fails, outcome, run
from tiny import build_model, build_tokenizer

from common.data.labels import WithoutLabels, class_numbers
from common.data.sources import DataSource
from common.data.splits import read_texts
from common.data.tasks import TASKS
from common.models.checks import check_single_label
from common.runtime.errors import UserError

MOODS = {"negative": 0, "neutral": 1, "positive": 2}
STARS = {"1": 0, "2": 1, "3": 2, "4": 3, "5": 4}
NAMELESS = {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


@pytest.mark.parametrize(
    "labels, classes, label2id, expected",
    [
        (["negative", "Neutral", "POSITIVE"], [], MOODS, [0, 1, 2]),
        ([2, "1", 0.0, "2.0"], [], MOODS, [2, 1, 0, 2]),
        ([1, "4", 5.0, "3.0"], [], STARS, [0, 3, 4, 2]),  # of classes called by numbers a number is the name
        ([0, 1, 2], ["positive", "negative", "neutral"], MOODS, [2, 0, 1]),
        ([0, 1], ["Negative", "Positive"], MOODS, [0, 2]),
        ([0, 1, 2], ["positive", "negative", "neutral"], NAMELESS, [0, 1, 2]),  # the model does not name any
        ([2, 1, 0], ["0", "1", "2"], MOODS, [2, 1, 0]),  # the data do not
        (["LABEL_2", 1], [], NAMELESS, [2, 1]),
        ([True, False, "True"], [], {"false": 0, "true": 1}, [1, 0, 1]),
        ([-1, 0, 1], [], {"-1": 0, "0": 1, "1": 2}, [0, 1, 2]),
    ],
)
def test_a_label_is_one_class_however_it_is_written(labels, classes, label2id, expected):
    assert class_numbers("a", labels, classes, label2id) == expected


@pytest.mark.parametrize(
    "labels, classes, label2id, words",
    [
        (
            [1, 0],
            [],
            STARS,
            "row 2 has label 0, which the model does not know; the data's labels are 0, 1, the model's 1,",
        ),
        (
            [2, 0, 1],
            ["entailment", "neutral", "contradiction"],
            {"contradiction": 0, "neutral": 1, "entails": 2},
            "row 2 has label 'entailment', which the model does not know; the data's labels are entailment, neutral, "
            "contradiction, the model's contradiction, neutral, entails; call them alike",
        ),
        (["positive", "negatve"], [], MOODS, "row 2 has label 'negatve'"),
        (["negative"], [], NAMELESS, "row 1 has label 'negative'"),
        ([True, False], [], MOODS, "row 1 has label true"),
        ([1.0, 0.5], [], MOODS, "row 2 has label 0.5"),
        ([0, 3], [], MOODS, "row 2 has label 3"),
        ([0, -1], [], MOODS, "a: row 2 has no label, but -1; take such rows out"),
        ([0, None], [], {**MOODS, "none": 3}, "a: row 2 has no label, but null; take"),
        ([[0]], [], MOODS, "row 1 has label a list of 1"),
    ],
)
def test_a_label_that_is_none_of_the_models_is_refused_with_both_lists(labels, classes, label2id, words):
    with pytest.raises(UserError, match=re.escape(words)):
        class_numbers("a", labels, classes, label2id)


@pytest.mark.parametrize("labels", [[-1, -1], [-1.0, "-1"], [None, float("nan"), ""]])
def test_labels_that_are_not_there_are_told_from_wrong_ones(labels):
    with pytest.raises(WithoutLabels, match="a: has no labels"):
        class_numbers("a", labels, ["negative", "positive"], MOODS)


@pytest.mark.parametrize(
    "id2label, label2id",
    [({0: "Yes", 1: "yes"}, None), ({0: "a", 1: "a"}, {"a": 1}), ({0: "yes", 1: "no"}, {"yes": 1, "no": 0})],
)
def test_names_that_do_not_tell_the_models_classes_apart_are_refused(id2label, label2id):
    config = transformers.DistilBertConfig(id2label=id2label)
    config.label2id = label2id
    with pytest.raises(UserError, match="config.json: classes 0 and 1 are both called"):
        check_single_label(config)
    config.id2label, config.label2id = {0: "yes", 1: "no"}, {"LABEL_0": 0, "LABEL_1": 1, "no": 1}
    check_single_label(config)  # two names of one class are none of two classes


@pytest.mark.parametrize("row", [{"text": "x", "label": -1}, {"text": "x"}], ids=["-1", "no column"])
def test_a_test_split_without_labels_is_told_of_and_never_evaluated(here, row):
    """As GLUE's are."""
    build_model("distilbert").save_pretrained("mine")
    build_tokenizer("distilbert").save_pretrained("mine")
    Path("data").mkdir()
    for split, rows in (("train", [{"text": "x", "label": i % 2} for i in range(20)]), ("test", [row] * 5)):
        Path("data", f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    code, _, err = outcome("download_model.py --checkpoint mine --data data")
    assert code == 0 and "data: can be read; splits that are there: train\n" in err
    told = next(line for line in err.splitlines() if line.startswith("data: test: has no "))
    assert told.endswith(", or evaluate with --split validation")
    assert told in fails("evaluate-distilbert.py -m model/mine")
    assert run("evaluate-distilbert.py -m model/mine --split validation")["examples"] == 2
    Path("data/train.jsonl").write_text(json.dumps(row) + "\n")
    assert "data: train: has no " in fails("download_model.py --checkpoint mine --data data --name other")


def test_rows_have_the_same_classes_and_splits_in_every_kind_of_file(here):
    """The same 60 rows in five kinds, in a folder and as a file; the CSV's names as ClassLabels in one more."""
    import datasets
    import pandas

    rows = [{"text": f"film {i}", "label": i % 4 + 1} for i in range(60)]
    table = "".join("{text}\t{label}\n".format(**row) for row in ({"text": "text", "label": "label"}, *rows))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    feature = datasets.ClassLabel(names=list("54321"))
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    named = datasets.Dataset.from_list([row | {"label": 5 - row["label"]} for row in rows], features)
    shuffled = pandas.DataFrame(rows).sample(frac=1, random_state=0)
    write = {
        "csv": lambda path: path.write_text(table.replace("\t", ",")),
        "tsv": lambda path: path.write_text(table),
        "jsonl": lambda path: path.write_text(lines),
        "json": lambda path: path.write_text(json.dumps(rows)),
        "parquet": pandas.DataFrame(rows).to_parquet,
        "named.parquet": named.to_parquet,
        "index.parquet": shuffled.to_parquet,  # pandas writes its index as one more column
    }
    same = []
    for kind, write_to in write.items():
        (here / kind).mkdir()
        write_to(here / kind / f"train.{kind.rpartition('.')[2]}")
        sources = [DataSource(data=kind), *(DataSource(train_file=str(path)) for path in (here / kind).iterdir())]
        for source in sources:
            train, held_out = (
                read_texts(source, split, TASKS["classification"], label2id=STARS) for split in ("train", "validation")
            )
            assert sorted(train + held_out) == sorted((row["text"], row["label"] - 1) for row in rows)
            same.append(held_out)
    assert all(held_out == same[0] for held_out in same[:-2])  # the last one's rows are in another order
