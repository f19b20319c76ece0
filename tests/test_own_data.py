"""The user's own model and data: kinds of data, each adopted and evaluated; what is wrong, told in one line.

Oracle for what is read: the rows that were written, by the standard library, pyarrow or the datasets library.
"""

import csv
import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import ROOT, fails, outcome, read_json, run
from tiny import MODELS, build_model, build_tokenizer, t5_config

from common.data.examples import load_examples
from common.data.sources import DataSource
from common.data.splits import read_texts
from common.data.tasks import TASKS
from common.models.load import data_source, load_model, load_tokenizer
from common.runtime.errors import UserError

TRANSLATION, CLASSIFICATION = TASKS["translation"], TASKS["classification"]
PAIRS = [(f"the dog sees a {word}", f"le chien voit {word}, n° {i}") for i, word in enumerate(["cat", "tree"] * 12)]
NAMES = ("negative", "neutral", "positive")
REVIEWS = [(f'good film {i}, "bad" cat', NAMES[i % 3]) for i in range(30)]
NUMBERED = [(text, NAMES.index(label)) for text, label in REVIEWS]
ENTAILED = [((f"the dog sees {i}", "the cat"), i % 3) for i in range(30)]


def checkpoint(folder, kind):
    """A tiny model with its tokenizer, as a user has it: three labels by name, or from text to text."""
    model, tokenizer = build_model(kind), build_tokenizer(kind)
    if kind in ("distilbert", "bert", "roberta"):
        torch.manual_seed(0)
        config = MODELS[kind]().config
        config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
        model = type(model)(config)
    if kind == "bert":  # one that knows which of two texts a token belongs to
        tokenizer = transformers.BertTokenizer(vocab=tokenizer.get_vocab())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_csv(path, names, rows, **layout):
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, **layout).writerows([names, *rows])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_lines(path, lines):
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


# --- kinds of data: each writes its files, and returns its flags -------------------------------------------------


def csv_with_names(folder):
    (folder / "data").mkdir()
    for split in ("train", "test"):
        write_csv(folder / "data" / f"{split}.csv", ["review", "label"], REVIEWS)
    return "--data data --text-column review"


def tsv_without_quotes(folder):
    for name in ("train", "test"):
        write_lines(folder / f"{name}.tsv", ["id\ttext\tlabel", *(f"1\t{text}\t{number}" for text, number in NUMBERED)])
    return "--train-file train.tsv --test-file test.tsv"


def json_lines(folder):
    rows = [{"sentence": text, "gold": number} for text, number in NUMBERED]
    write_jsonl(folder / "some.jsonl", rows)
    return "--data some.jsonl --test-file some.jsonl --text-column sentence --label-column gold"


def parquet_shards(folder):
    import datasets

    (folder / "rows" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        for shard, part in enumerate((PAIRS[:10], PAIRS[10:])):
            table = datasets.Dataset.from_dict({"src": [en for en, _ in part], "tgt": [fr for _, fr in part]})
            table.to_parquet(folder / "rows" / "data" / f"{split}-0000{shard}-of-00002.parquet")
    return "--data rows --source-column src --target-column tgt --prefix ''"


def text_files(folder):
    (folder / "corpus").mkdir()
    for split in ("train", "dev", "test"):
        for end, lines in zip(("en", "fr"), zip(*PAIRS)):
            write_lines(folder / "corpus" / f"{split}.{end}", lines)
    return "--data corpus --source-lang en --target-lang fr --prefix 'translate English to French: '"


def translation_rows(folder):
    write_jsonl(folder / "pairs.json", [{"id": "1", "translation": {"fr": fr, "en": en}} for en, fr in PAIRS])
    return "--train-file pairs.json --test-file pairs.json --source-lang en --target-lang fr --prefix ''"


def hub_with_config(folder):
    return "--data wmt14 --data-config fr-en --source-lang en --target-lang fr --prefix ''"


def one_word_hub(folder):
    return "--data reviews"


def text_pairs(folder):
    rows = [{"premise": one, "hypothesis": other, "label": number} for (one, other), number in ENTAILED]
    write_csv(folder / "nli.csv", rows[0], [row.values() for row in rows])
    return "--train-file nli.csv --test-file nli.csv --text-column premise --text-pair-column hypothesis"


def compressed(folder):
    for end, lines in zip(("en", "fr"), zip(*PAIRS)):
        (folder / f"all.{end}.gz").write_bytes(gzip.compress("".join(f"{line}\r\n" for line in lines).encode()))
    return "--train-file all.en.gz --test-file all.fr.gz --source-lang en --target-lang fr --prefix ''"


def fake_hub(name, config=None, **_):
    """In the place of `datasets.load_dataset` for names of the hub: two data sets that a hub might have."""
    import datasets

    if (name, config) == ("wmt14", "fr-en"):
        rows = {"translation": [{"fr": fr, "en": en} for en, fr in PAIRS]}
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_dict(rows)))
    if (name, config) != ("reviews", None):
        raise ValueError(f"no data set {name} {config}")
    classes = datasets.ClassLabel(names=["positive", "negative", "neutral"])  # not in the model's order
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    rows = {"text": [text for text, _ in REVIEWS], "label": [label for _, label in REVIEWS]}
    rows["label"] = [classes.str2int(label) for label in rows["label"]]
    return datasets.DatasetDict(dict.fromkeys(("train", "test"), datasets.Dataset.from_dict(rows, features=features)))


@pytest.mark.parametrize(
    "write, kind, expected",
    [
        (csv_with_names, "distilbert", NUMBERED),
        (tsv_without_quotes, "distilbert", NUMBERED),
        (json_lines, "distilbert", NUMBERED),
        (parquet_shards, "t5", PAIRS),
        (translation_rows, "t5", PAIRS),
        (hub_with_config, "marian", PAIRS),
        (one_word_hub, "distilbert", NUMBERED),
        (text_pairs, "bert", ENTAILED),
        (compressed, "t5", PAIRS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_model_is_adopted_with_its_data_and_evaluated(here, monkeypatch, write, kind, expected):
    """Everything is said once; the stage after that knows it from the record."""
    checkpoint(here / "mine", kind)
    flags = shlex.split(write(here))
    if "hub" in write.__name__:
        import datasets

        monkeypatch.setattr(datasets, "load_dataset", fake_hub)
    run("download_model.py --checkpoint mine", *flags)
    record = read_json(here / "model" / "mine" / "record.json")
    source = DataSource.from_json(record["data"], "model/mine")
    task = TRANSLATION if expected is PAIRS else CLASSIFICATION
    label2id = {name: number for number, name in enumerate(NAMES)}
    train, validation, test = (
        read_texts(source, split, task, label2id=label2id) for split in ("train", "validation", "test")
    )
    assert test == expected and record["task"] == task.name
    if write is hub_with_config:
        assert train == validation == expected
    else:
        assert sorted(train + validation) == sorted(expected) and len(validation) == (2 if task is TRANSLATION else 3)
    monkeypatch.chdir(here.parent)
    script = "evaluate-t5.py" if task is TRANSLATION else "evaluate-distilbert.py"
    short = ["--max-new-tokens", 3] if task is TRANSLATION else []
    assert run(f"{script} -m {here}/model/mine --limit 4", *short)["examples"] == 4


# --- pairs of texts, labels, prefixes --------------------------------------------------------------------------------


def test_two_texts_are_tokenized_as_a_pair_with_their_types(here):
    """Oracle: the tokenizer alone, on one pair at a time, and the model on it."""
    checkpoint(here / "mine", "bert")
    source = DataSource(train_file="nli.csv", text_column="premise", text_pair_column="hypothesis")
    text_pairs(here)
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / "mine")
    examples = load_examples(source, "train", tokenizer, CLASSIFICATION, label2id={"a": 0, "b": 1, "c": 2})
    for ((one, other), label), ids, types, target in zip(
        examples.texts, examples.inputs, examples.types, examples.targets
    ):
        expected = tokenizer(one, other)
        assert (ids, types, target) == (expected["input_ids"], expected["token_type_ids"], label)
    assert examples.batch([0, 1])["token_type_ids"].tolist() == examples.types[:2] and 1 in examples.types[0]
    assert examples.sample(3).types == [examples.types[examples.texts.index(each)] for each in examples.sample(3).texts]
    source = DataSource(train_file="nli.csv", text_column="premise")
    plain = load_examples(source, "train", tokenizer, CLASSIFICATION, label2id={"a": 0, "b": 1, "c": 2})
    assert plain.types is None and "token_type_ids" not in plain.batch([0])


def test_a_tokenizer_that_tells_more_types_of_tokens_apart_than_the_model_is_refused_until_it_does_not(here):
    """A RoBERTa has one type, a BERT's tokenizer two. By hand; a model without types is given none."""
    checkpoint(here / "mine", "roberta")
    tokenizer = transformers.BertTokenizer(vocab=build_tokenizer("roberta").get_vocab())
    tokenizer.save_pretrained(here / "mine")
    adopt = ("download_model.py --checkpoint mine", *shlex.split(text_pairs(here)))
    assert "mine: tells 2 types of tokens apart, and the model 1: take 'token_type_ids' out of" in fails(*adopt)
    settings = read_json(here / "mine" / "tokenizer_config.json") | {"model_input_names": ["input_ids"]}
    (here / "mine" / "tokenizer_config.json").write_text(json.dumps(settings))
    run(*adopt)
    assert run("evaluate-distilbert.py --limit 4")["examples"] == 4
    source = DataSource(train_file="nli.csv", text_column="premise", text_pair_column="hypothesis")
    assert load_examples(source, "train", tokenizer, CLASSIFICATION, token_types=0).types is None


def test_a_tokenizer_that_does_not_know_the_words_is_told_in_the_first_line(here):
    """By hand: of [CLS] good film [UNK] [UNK] [SEP] a third; nothing is said of the test split."""
    checkpoint(here / "mine", "distilbert")
    for split, text in (("train", "good film xyz qqq"), ("test", "good film")):
        write_csv(here / f"{split}.csv", ["text", "label"], [(text, i % 3) for i in range(30)])
    code, _, err = outcome("download_model.py --checkpoint mine --train-file train.csv --test-file test.csv")
    assert code == 0 and err.startswith("train.csv, test.csv: 33% of the tokens of its train split are unknown to the")
    assert err.count("unknown to the tokenizer") == 2  # its train split, and validation out of that


def test_a_tokenizer_without_a_file_of_its_words_and_without_a_limit(here):
    """ByT5's: bytes, and as many as a text has. Oracle: UTF-8."""
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(t5_config(vocab_size=384)).save_pretrained(here / "mine")
    transformers.ByT5Tokenizer().save_pretrained(here / "mine")
    run("download_model.py --checkpoint mine", *shlex.split(text_files(here)))
    loaded = load_model("model/mine")
    tokenizer = load_tokenizer(None, loaded)
    assert tokenizer.model_max_length > 10**29
    examples = load_examples(data_source(None, loaded), "test", tokenizer, loaded.task)
    assert examples.targets == [[3 + byte for byte in text.encode()] + [1] for _, text in PAIRS]


def test_a_folder_that_was_copied_elsewhere_has_its_tokenizer_and_asks_for_data(here):
    checkpoint(here / "model" / "mine", "t5")
    flags = shlex.split(text_files(here))
    run("download_model.py --checkpoint model/mine --name own", *flags)
    ((here / "far") / "away").mkdir(parents=True)
    folder = shutil.copytree(here / "model" / "own", here / "far" / "away" / "m")
    build_tokenizer("t5").save_pretrained(folder)
    assert "with --data" in fails(f"evaluate-t5.py -m {folder}")
    assert run(f"evaluate-t5.py -m {folder} --data corpus --max-new-tokens 3")["examples"] == len(PAIRS)


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["negative", "Neutral", "POSITIVE"], [0, 1, 2]),
        (["0", "2", "1"], [0, 2, 1]),
        (
            ["negatve", "neutral", "neutral"],
            "a.csv: train: row 1 has label 'negatve', which the model does not know; the data's labels are negatve, ",
        ),
        (["1", "1", "0.5"], "row 3 has label '0.5'"),
    ],
    ids=str,
)
def test_labels_are_the_models_names_or_numbers(here, labels, expected):
    write_csv("a.csv", ["text", "label"], [("x", label) for label in labels])
    write_csv("b.csv", ["text", "label"], [("x", "0")])
    source = DataSource(train_file="a.csv", validation_file="b.csv")
    label2id = {name: number for number, name in enumerate(NAMES)}
    if isinstance(expected, list):
        assert [label for _, label in read_texts(source, "train", CLASSIFICATION, label2id=label2id)] == expected
    else:
        with pytest.raises(UserError, match=re.escape(expected)):
            read_texts(source, "train", CLASSIFICATION, label2id=label2id)


def test_what_looks_like_nothing_or_a_number_stays_text(here):
    """pandas takes NA and null for nothing, and 007 for 7."""
    rows = [("NA", "0"), ("null", "1"), ("007", "0"), ("1.50", "1"), ("True", "0")]
    write_csv("a.csv", ["text", "label"], rows)
    assert read_texts(DataSource(train_file="a.csv", validation_file="a.csv"), "train", CLASSIFICATION) == rows


def test_other_data_at_a_later_stage_are_read_as_the_recorded_ones(here):
    checkpoint(here / "mine", "t5")
    run("download_model.py --checkpoint mine", *shlex.split(text_files(here)))
    (here / "other").mkdir()
    for split in ("train", "test"):
        for end, lines in zip(("en", "fr"), zip(*PAIRS[:7])):
            write_lines(here / "other" / f"{split}.{end}", lines)
    evaluate = ("evaluate-t5.py", "-m", "model/mine", "--max-new-tokens", 3)
    assert run(*evaluate)["examples"] == len(PAIRS)
    assert run(*evaluate, "--data", "other")["examples"] == 7
    again = ("--data", "other", "--source-lang", "en", "--target-lang", "fr", "--prefix", "")
    run("download_model.py --checkpoint model/mine --name again", *again)
    recorded = read_json(here / "model" / "again" / "record.json")["data"]
    assert recorded == {"source_lang": "en", "target_lang": "fr", "prefix": "", "folder": "../other"}
    assert run("evaluate-t5.py -m model/again --max-new-tokens 3")["examples"] == 7


# --- texts without targets, which the model answers -------------------------------------------------------------------


def answered(name):
    return [json.loads(line) for line in Path(f"data/{name}/train.jsonl").read_text().splitlines()]


def test_a_translators_answers_are_its_data_and_scores_are_agreement(here):
    """By the document. Oracle: transformers' generate, a sentence at a time."""
    checkpoint(here / "my-translator", "t5")
    model, tokenizer = build_model("t5").eval(), build_tokenizer("t5")
    model.generation_config.no_repeat_ngram_size = 1  # so that answers end
    model.generation_config.save_pretrained(here / "my-translator")
    write_lines("sentences.txt", [text for text, _ in PAIRS])
    result = walk("Texts without labels or translations", commands=2)
    assert (result["chrf"], result["agreement_with"], result["examples"]) == (100, "my-translator", 2)
    rows = answered("my-translator")
    for row, (text, _) in zip(rows[:4], PAIRS):
        tokens = model.generate(**tokenizer("translate English to French: " + text, return_tensors="pt"), max_length=61)
        assert row == {"en": text, "fr": tokenizer.decode(tokens[0], skip_special_tokens=True)}
    assert len(rows) == len(PAIRS) and len({row["fr"] for row in rows}) > 1
    assert "answers of `my-translator` as targets" in (here / "model" / "my-translator" / "README.md").read_text()
    loaded = load_model("model/my-translator")  # a composed model's record names its data as this one's does
    assert data_source(None, loaded).to_json("composed") == {**loaded.record["data"], "folder": "data/my-translator"}
    write_csv("later.csv", ["en", "fr"], PAIRS)
    code, result, err = outcome("evaluate-t5.py --test-file later.csv --max-new-tokens 3 --limit 4")
    assert code == 0 and "agreement_with" not in result and "agreement" not in err


def test_a_classifiers_answers_are_found_once(here):
    """Oracle: the model on one pair of texts at a time, by transformers."""
    checkpoint(here / "mine", "bert")
    write_jsonl(here / "raw.jsonl", [{"text": one, "other": other} for (one, other), _ in ENTAILED])
    adopt = "download_model.py --checkpoint mine --unlabelled raw.jsonl --text-pair-column other --limit 20"
    assert run(adopt)["answered"] == len(answered("mine")) == 20
    model = transformers.BertForSequenceClassification.from_pretrained(here / "mine")
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / "mine")
    for row in answered("mine"):
        logits = model(**tokenizer(row["text"], row["other"], return_tensors="pt")).logits
        assert row["label"] == NAMES[logits.argmax()]
    code, result, err = outcome("evaluate-distilbert.py --split validation")
    assert (result["accuracy"], result["agreement_with"]) == (1, "mine") and "agreement with it, not quality" in err
    assert "--test-file, or evaluate with --split validation" in fails("evaluate-distilbert.py")
    assert run(adopt)["skipped"]
    shutil.rmtree(here / "model")  # as if it was killed before that
    assert "answered" not in run(adopt)


@pytest.mark.parametrize(
    "name, words",
    [
        ("raw.de", "raw.de: must end with .csv, .tsv, .jsonl, .json, .parquet, .txt, .en (.gz may follow)"),
        (
            "raw.en",
            "raw.en: 0 with answers are too few to hold some out; 4 were left out, as their answer was empty, or",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_and_leaves_nothing(here, name, words):
    checkpoint(here / "mine", "t5")
    write_lines(name, ["the dog"] * 4)
    assert words in fails(f"download_model.py --quiet --checkpoint mine --unlabelled {name}")
    assert not list(here.glob("*/mine"))


# --- what is wrong ---------------------------------------------------------------------------------------------------


FILES = {
    "latin.csv": "text,label\nä,1\n".encode("latin-1"),
    "long.csv": b"text,label\na,1\nb,2,3\n",
    "short.csv": b"label,text\n1,a\n1\n",
    "cut.csv.gz": gzip.compress(b"text,label\na,1\n" * 50)[:-20],
    "broken.json": b'{"text": "a", "label": 1}\n{"text": "a"\n',
    "number.json": b'{"text": 1, "label": 1}\n',
    "junk.parquet": b"junk",
    "notes.doc": b"text",
}


@pytest.mark.parametrize(
    "name, words",
    [
        ("latin.csv", "latin.csv: cannot be read as csv: 'utf-8' codec can't decode"),
        ("long.csv", "long.csv: cannot be read as csv: a row has more fields than the first line"),
        ("short.csv", "short.csv: train: row 2: ['text'] are not all text"),
        ("cut.csv.gz", "cut.csv.gz: cannot be read as csv: Compressed file ended"),
        ("broken.json", "broken.json: line 2: malformed JSON: Expecting ',' delimiter"),
        ("number.json", "number.json: train: row 1: ['text'] are not all text"),
        ("junk.parquet", "junk.parquet: cannot be read as parquet: "),
        ("notes.doc", "notes.doc: must end with .csv, .tsv, .jsonl, .json, .parquet (.gz may follow)"),
        ("none.csv", "none.csv: no such file"),
        (".", ".: is a folder; give a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(here, name, words):
    if name in FILES:
        (here / name).write_bytes(FILES[name])
    write_csv("good.csv", ["text", "label"], [("x", "0")])
    with pytest.raises(UserError) as error:
        read_texts(DataSource(train_file=name, validation_file="good.csv"), "train", CLASSIFICATION)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--data corpus --source-lang en --target-lang de --task summarization", "--prefix: is 'summarize: ' as a t5"),
        (
            "--data corpus --source-lang en --target-lang fr",
            "--prefix: is 'translate English to German: ' as a t5 model was first trained",
        ),
        ("--data corpus --source-lang en", "--source-lang and --target-lang: go together; give both"),
        (
            "--data corpus --source-lang fr --target-lang fr",
            "['fr', 'fr'] are not different columns; give one for each",
        ),
        ("--data corpus --text-column en", "--text-column: has no part in translation, which has --source-lang"),
        ("--data corpus --data-config de-en", "--data-config de-en: belongs to a data set of the hub"),
        ("--task classification", "a t5 model is for translation or summarization, not for classification"),
        ("--name ../x", "--name ../x: must be the plain name of a folder"),
    ],
)
def test_an_adoption_that_cannot_be_is_refused_and_leaves_nothing(here, flags, words):
    checkpoint(here / "mine", "t5")
    text_files(here)
    assert words in fails("download_model.py", "--checkpoint", "mine", *shlex.split(flags))
    assert not (here / "model").exists() and not (here / "tokenizer").exists()


def test_a_missing_test_split_is_asked_for_never_guessed(here):
    checkpoint(here / "mine", "distilbert")
    write_csv("all.csv", ["text", "label"], REVIEWS)
    run("download_model.py --checkpoint mine --data all.csv")
    evaluate = ("evaluate-distilbert.py", "-m", "model/mine")
    write_csv("few.csv", ["text", "label"], REVIEWS[:5])
    few = fails(*evaluate, "--data", "few.csv", "--split", "validation")
    assert "few.csv: too few examples to hold some out of train; give download_model.py a --validation-file" in few
    assert (
        "has no test split; give download_model.py one with --test-file, or evaluate with --split validation"
        in fails(*evaluate)
    )
    assert run(*evaluate, "--split", "validation")["examples"] == 3


@pytest.mark.parametrize(
    "row, words",
    [
        ({"translation": {"en": "a", "fr": "b"}}, "a.jsonl: train: has no language 'de', but ['en', 'fr']; say which"),
        ({"translation": "a"}, "a.jsonl: train: has no language 'en', but []; say which"),
        ({"en": "a", "fr": "b"}, "a.jsonl: train: has no column 'de', but ['en', 'fr']; say which"),
    ],
)
def test_languages_that_are_not_there_are_told_from_those_that_are(here, row, words):
    write_jsonl(here / "a.jsonl", [row])
    source = DataSource(train_file="a.jsonl", validation_file="a.jsonl", source_lang="en", target_lang="de")
    with pytest.raises(UserError, match=re.escape(words)):
        read_texts(source, "train", TRANSLATION)


def test_data_are_named_as_one_would_type_them_and_missing_ones_with_the_flag_for_others(here, monkeypatch):
    """Oracle: the paths from the working folder, by hand."""
    checkpoint(here / "mine", "distilbert")
    (here / "data").mkdir()
    write_csv(here / "data" / "train.csv", ["text", "label"], REVIEWS)
    write_csv(here / "test.csv", ["text", "label"], REVIEWS)
    run("download_model.py --checkpoint mine --data data --test-file test.csv")
    evaluate = "evaluate-distilbert.py -m model/mine"
    assert run(evaluate)["data"] == run(f"{evaluate} --split validation")["data"] == "data"
    (here / "test.csv").rename(here / "later.csv")
    assert "error: test.csv: no such file; name other data with --data, or with --test-file\n" in fails(evaluate)
    assert run(f"{evaluate} --test-file later.csv")["examples"] == 30
    assert "--test-file: goes with --split test" in fails(f"{evaluate} --test-file later.csv --split train")
    monkeypatch.chdir(here / "data")
    assert "error: ../test.csv: no such file" in fails("evaluate-distilbert.py -m ../model/mine")
    monkeypatch.chdir(here)
    (here / "data").rename(here / "moved")  # "data" alone might be a data set of the hub
    err = fails(f"{evaluate} --split validation")
    assert f"error: {here}/data: no such file or folder; name other data with --data\n" in err


def test_what_a_terminal_would_obey_is_escaped_in_messages(here):
    """Labels, columns and languages come from files of others."""
    checkpoint(here / "mine", "distilbert")
    write_jsonl(here / "a.jsonl", [{"text": "x", "label": "a\x1b[31mb\u202e"}])
    err = fails("download_model.py --checkpoint mine --train-file a.jsonl --validation-file a.jsonl")
    assert err.count(r"a\x1b[31mb\u202e") == 2 and "\x1b" not in err  # the label of the row, and the list


# --- the document, as it stands --------------------------------------------------------------------------------------


def walk(title, commands=7):
    """Run the commands of a section of docs/data.md; the last one's result."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = [shlex.split(line) for line in re.findall(r"^\$ python (.+)$", text, re.MULTILINE)]
    assert len(found) == commands
    for script, *arguments in found:
        result = run(script, *arguments)
    return result


def loaded_in_half(of_class):
    """The compact model of a walk, as transformers loads it; its file is in half precision."""
    model, report = of_class.from_pretrained(
        Path("model-finetuned/0"), trust_remote_code=True, output_loading_info=True, dtype="auto"
    )
    assert model.dtype == torch.float16 and not report["missing_keys"] and not report["unexpected_keys"]
    return model


def test_a_three_class_csv_ends_in_a_compact_folder_in_half_precision(here):
    checkpoint(here / "my-classifier", "bert")
    for name in ("feedback.csv", "later.csv"):
        write_csv(name, ["message", "verdict"], REVIEWS)
    result = walk("A classifier and a CSV")
    model = loaded_in_half(transformers.AutoModelForSequenceClassification)
    assert result["examples"] == 30 and model.config.id2label == dict(enumerate(NAMES))
    assert 0 < result["parameters"] == sum(p.numel() for p in model.parameters())
    original = transformers.AutoModelForSequenceClassification.from_pretrained(here / "my-classifier")
    assert result["parameters"] < original.num_parameters()
