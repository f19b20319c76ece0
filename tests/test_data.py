"""Batches counted by hand, hold-outs against the definition, texts against plain reading of the files."""

import json
import random

import pytest
import torch
from tiny import PREFIX, build_tokenizer

from common.data.batching import evaluation_batches, training_batches
from common.data.examples import Examples, load_examples
from common.data.splits import read_texts, stratified_holdout
from common.data.tasks import TASKS

TRANSLATION, CLASSIFICATION = TASKS["translation"], TASKS["classification"]


def examples_of_lengths(lengths):
    return Examples(CLASSIFICATION, [[7] * length for length in lengths], [0] * len(lengths), [], 0)


def random_lengths(size, seed=0):
    rng = random.Random(seed)
    return [rng.randint(1, 60) for _ in range(size)]


def padding(lengths, batches):
    """How many cells of the padded batches hold no token."""
    return sum(max(lengths[i] for i in batch) - lengths[i] for batch in batches for i in batch)


# --- batching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, batch_size", [(1, 4), (10, 4), (500, 8)])
@pytest.mark.parametrize("order", [lambda e, b: training_batches(e, b, 3, 2), evaluation_batches])
def test_batches_cover_every_example_once(order, size, batch_size):
    batches = order(examples_of_lengths(random_lengths(size)), batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(size))
    assert len(batches) == -(-size // batch_size) and max(map(len, batches)) <= batch_size


def test_training_order_depends_on_seed_and_epoch_alone():
    examples = examples_of_lengths(random_lengths(200))
    first = training_batches(examples, 8, 0, 1)
    random.seed(5)
    torch.manual_seed(5)
    random.random()
    assert training_batches(examples_of_lengths(random_lengths(200)), 8, 0, 1) == first
    others = [training_batches(examples, 8, seed, epoch) for seed, epoch in ((0, 2), (1, 1), (1, 2), (11, 1), (1, 11))]
    assert all(other != first for other in others) and all(a != b for a in others for b in others if a is not b)


def test_short_epochs_show_every_example_once_before_any_twice():
    examples = examples_of_lengths(random_lengths(100))
    seen = [i for epoch in range(1, 11) for batch in training_batches(examples, 8, 0, epoch, size=30) for i in batch]
    assert sorted(seen) == sorted(3 * list(range(100)))  # 10 epochs of 30 are three passes
    assert len(set(seen[:90])) == 90


def test_training_batches_hold_a_fraction_of_the_padding_of_random_ones():
    lengths = random_lengths(2000)
    order = list(range(2000))
    random.Random(0).shuffle(order)
    at_random = padding(lengths, [order[start : start + 8] for start in range(0, 2000, 8)])
    assert padding(lengths, training_batches(examples_of_lengths(lengths), 8, 0, 1)) < at_random / 5


# --- one batch -----------------------------------------------------------------------------------------------------


def test_a_translation_batch_by_hand():
    examples = Examples(TRANSLATION, [[5, 6, 1], [7, 1], [9]], [[4, 1], [8, 8, 8, 1], [9]], [], 0)
    batch = examples.batch([1, 0])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[7, 1, 0], [5, 6, 1]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[8, 8, 8, 1], [4, 1, -100, -100]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_a_classification_batch_by_hand():
    batch = Examples(CLASSIFICATION, [[2, 5, 3], [2, 3]], [1, 0], [], 9).batch([0, 1])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 5, 3], [2, 3, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [1, 0],
    }


def test_a_token_that_equals_the_filler_is_still_a_token():
    assert Examples(CLASSIFICATION, [[0, 5], [0]], [1, 0], [], 0).batch([0, 1])["attention_mask"].tolist() == [
        [1, 1],
        [1, 0],
    ]


def test_the_fingerprint_tells_what_a_model_is_shown():
    base = Examples(TRANSLATION, [[1], [2]], [[3], [4]], [("a", "b")], 0)
    assert base.fingerprint() == Examples(TRANSLATION, [[1], [2]], [[3], [4]], [], 0).fingerprint()
    for inputs, targets in (([[1], [3]], [[3], [4]]), ([[1], [2]], [[3], [5]]), ([[2], [1]], [[4], [3]])):
        assert Examples(TRANSLATION, inputs, targets, [], 0).fingerprint() != base.fingerprint()


# --- the held-out part ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [{0: 33, 1: 7, 2: 60}, {0: 3}], ids=str)
def test_the_holdout_is_a_tenth_of_every_label(counts):
    labels = [label for label, count in counts.items() for _ in range(count)]
    random.Random(1).shuffle(labels)
    held_out = stratified_holdout(labels)
    for label, count in counts.items():
        assert sum(labels[i] == label for i in held_out) == round(count / 10)
    assert held_out == stratified_holdout(labels)


# --- reading -------------------------------------------------------------------------------------------------------

PAIRS = [
    ("A dog runs.", "Ein Hund läuft."),
    ('Two girls, "tall" ones.', "Zwei Mädchen, „große“."),
    ("tabs\tand  spaces", "groß\u2028getrennt"),
    ("x", "ß"),
]


def write_pairs(folder, stem="train", pairs=PAIRS):
    for column, language in enumerate(("en", "de")):
        text = "".join(f"{pair[column]}\n" for pair in pairs)
        (folder / f"{stem}.{language}").write_text(text, encoding="utf-8")


def write_rows(folder, split, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("split, stem", [("train", "train"), ("validation", "val"), ("test", "test2016")])
def test_translations_through_torchtext_are_the_files_lines(tmp_path, split, stem):
    write_pairs(tmp_path, stem)
    assert read_texts(tmp_path, split, TRANSLATION) == PAIRS  # nothing but this split's files is there


def test_reviews_without_a_validation_file_hold_a_tenth_of_train_out(tmp_path):
    rows = [{"text": f"review {i}", "label": i % 2} for i in range(60)]
    write_rows(tmp_path, "train", rows)
    write_rows(tmp_path, "test", [{"text": "never used", "label": 0}])
    train, validation = (read_texts(tmp_path, split, CLASSIFICATION) for split in ("train", "validation"))
    assert [label for _, label in validation].count(0) == [label for _, label in validation].count(1) == 3
    assert sorted(train + validation) == sorted((row["text"], row["label"]) for row in rows)
    assert not set(train) & set(validation) and read_texts(tmp_path, "test", CLASSIFICATION) == [("never used", 0)]


# --- tokenizing ----------------------------------------------------------------------------------------------------


def test_the_prefix_stands_in_front_of_every_t5_input_and_no_target(workshop):
    """Oracle: the tokenizer alone, on the prefix and on the plain texts."""
    tokenizer = build_tokenizer("t5")
    examples = load_examples(workshop / "data" / "t5", "train", tokenizer, TRANSLATION, prefix=PREFIX)
    prefix = tokenizer("translate English to German:", add_special_tokens=False)["input_ids"]
    assert len(prefix) == 4 and tokenizer.unk_token_id not in prefix
    assert len(examples) == 48
    for (english, german), inputs, targets in zip(examples.texts, examples.inputs, examples.targets):
        assert inputs == prefix + tokenizer(english)["input_ids"]
        assert targets == tokenizer(german)["input_ids"] and targets[-1] == tokenizer.eos_token_id


def test_distilbert_inputs_have_no_prefix_and_labels_stay_labels(workshop):
    tokenizer = build_tokenizer("distilbert")
    examples = load_examples(workshop / "data" / "distilbert", "test", tokenizer, CLASSIFICATION)
    for (text, label), inputs, target in zip(examples.texts, examples.inputs, examples.targets):
        assert inputs == tokenizer(text)["input_ids"] and target == label
    assert examples.pad == tokenizer.pad_token_id == 0 and set(examples.targets) == {0, 1}


def test_long_texts_are_cut_to_the_length_and_still_end_as_they_should(workshop):
    tokenizer = build_tokenizer("t5")
    examples = load_examples(workshop / "data" / "t5", "train", tokenizer, TRANSLATION, prefix=PREFIX, max_length=5)
    assert {len(ids) for ids in examples.inputs} == {5} == {len(ids) for ids in examples.targets}
    assert {ids[-1] for ids in examples.inputs + examples.targets} == {tokenizer.eos_token_id}


@pytest.mark.parametrize("limit, size", [(7, 7), (1000, 48), (None, 48)])
def test_a_limit_takes_the_same_sample_every_time_in_the_files_order(workshop, limit, size):
    folder = workshop / "data" / "t5"
    samples = []
    for seed in (1, 2):
        random.seed(seed)
        samples.append(
            load_examples(folder, "train", build_tokenizer("t5"), TRANSLATION, prefix=PREFIX, limit=limit).texts
        )
    rest = iter(read_texts(folder, "train", TRANSLATION))
    assert samples[0] == samples[1] and len(samples[0]) == size
    assert all(pair in rest for pair in samples[0])  # a subsequence: `in` uses the iterator up


@pytest.mark.parametrize("size", [7, 30])
def test_a_sample_and_its_rest_are_disjoint_and_are_all(size):
    """Oracle: the list of all examples, each of which is told by its text."""
    names = [str(i) for i in range(20)]
    whole = Examples(CLASSIFICATION, [[i] for i in range(20)], [i % 2 for i in range(20)], names, pad=0)
    sample, rest = whole.sample_and_rest(size)
    assert len(sample) == min(size, 20) and not set(sample.texts) & set(rest.texts)
    assert sorted(sample.texts + rest.texts, key=int) == names
    assert sample == whole.sample(size) == whole.sample_and_rest(size)[0]  # the same ones every time
    for part in (sample, rest):
        positions = [int(text) for text in part.texts]
        assert positions == sorted(positions) and part.inputs == [[i] for i in positions]
        assert part.targets == [i % 2 for i in positions] and (part.task, part.pad) == (whole.task, whole.pad)


@pytest.mark.parametrize("own, words, length", [(10, 300, 10), (10**30, 300, 256), (512, 300, 256), (512, 20, 22)])
def test_the_default_length_is_the_smaller_of_the_tokenizers_and_the_tasks(tmp_path, own, words, length):
    """256 for classification; 22 are 20 words between [CLS] and [SEP]."""
    write_rows(tmp_path, "test", [{"text": "good " * words, "label": 1}])
    tokenizer = build_tokenizer("distilbert")
    tokenizer.model_max_length = own
    assert len(load_examples(tmp_path, "test", tokenizer, CLASSIFICATION).inputs[0]) == length
