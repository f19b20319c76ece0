"""Greedy translation against transformers' own `generate`, token for token, on tiny random models."""

import random

import pytest
import torch
import transformers
from helpers import ENDS, LIMIT, build_model, build_tokenizer, t5_config, token_rows, translated

from common.data.examples import Examples
from common.data.tasks import TASKS
from common.evaluation import answers as evaluation

CPU = torch.device("cpu")
CONFIGS = {
    "tied": {},
    "gated": {"feed_forward_proj": "gated-gelu"},
    "unscaled": {"scale_decoder_outputs": False},
    "untied": {},
}  # transformers ties them whatever the config says, so `build` unties them


def build(config="gated", attention="sdpa", **generation):
    """A tiny T5 with random weights so large that its translations differ, and a generation config."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(t5_config(initializer_factor=3.0, **CONFIGS[config])).eval()
    if config == "untied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.set_attn_implementation(attention)
    model.generation_config.update(**{"eos_token_id": ENDS} | generation)
    return model


@pytest.fixture(scope="module")
def examples():
    """40 random sources of 2 to 14 tokens, in no order."""
    draw = random.Random(0)
    inputs = [[draw.randrange(3, 64) for _ in range(draw.randint(2, 14))] for _ in range(40)]
    return Examples(TASKS["translation"], inputs, [[1]] * 40, [("", "")] * 40, pad=0)


@pytest.fixture
def together(monkeypatch):
    """A function that sets how many batches the decoder takes at once."""
    return lambda count: monkeypatch.setattr(evaluation, "DECODED_TOGETHER", count)


def generated(model, examples, beams=1):
    """What `generate` makes of all examples in one padded batch: a list of lists of equal length."""
    batch = examples.batch(range(len(examples)))
    return model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_beams=beams,
        do_sample=False,
        max_new_tokens=LIMIT,
    ).tolist()


def padded(rows, pad):
    width = max(map(len, rows))
    return [row + [pad] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("batch_size, batches", [(8, 1), (8, 3), (64, 8), (1, 1)])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_tokens_are_those_of_generate(config, batch_size, batches, examples, together):
    together(batches)
    model = build(config)
    found = token_rows(model, examples, batch_size=batch_size)
    assert padded(found, 0) == generated(model, examples)
    lengths = [len(row) - 1 for row in found]
    assert len(set(lengths)) > 3  # rows end at different times …
    assert any(length == LIMIT and row[-1] not in ENDS for row, length in zip(found, lengths))  # … or not at all


@pytest.mark.parametrize(
    "generation",
    [
        {"eos_token_id": 47},
        {"eos_token_id": None},
        {"decoder_start_token_id": 5},
        {"pad_token_id": 7},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"min_new_tokens": 6},
        {"forced_eos_token_id": 1},
        {"use_cache": False},
    ],
    ids=lambda generation: "-".join(generation),
)
def test_the_generation_config_holds(generation, examples):
    model = build(**generation)
    assert padded(token_rows(model, examples), model.generation_config.pad_token_id) == generated(model, examples)
    assert generated(model, examples) != generated(build(), examples) or "use_cache" in generation


def test_eager_attention(examples):
    """It adds its mask to the scores, where the default's takes booleans too."""
    model = build(attention="eager")
    assert padded(token_rows(model, examples), 0) == generated(model, examples)


def test_a_row_that_has_ended_is_soon_dropped(examples):
    model, encoded, decoded = build(), [], []
    model.encoder.register_forward_hook(
        lambda _, args, kwargs, output: encoded.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model.decoder.register_forward_hook(
        lambda _, args, kwargs, output: decoded.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = token_rows(model, examples, batch_size=5)
    assert [rows for rows, _ in encoded] == [5] * 8
    # Longest first, each batch padded to its own longest.
    assert [width for _, width in encoded] == sorted(map(len, examples.inputs), reverse=True)[::5]
    assert {width for _, width in decoded} == {1}  # the cache holds the rest
    assert decoded[0][0] == 5 * evaluation.DECODED_TOGETHER == 40
    needed = [sum(len(row) > step for row in found) for step in range(1, LIMIT + 1)]  # rows that go on, by step
    assert len(decoded) == LIMIT
    for (rows, _), wanted in zip(decoded, needed):
        assert wanted <= rows < wanted / (1 - evaluation.DROPPED)


def test_beam_search_is_generates_own(examples):
    model = build()
    rows = token_rows(model, examples, beams=3)
    for row, expected in zip(rows, generated(model, examples, beams=3)):
        width = min(len(row), len(expected))  # padded to the longest of different batches
        assert row[:width] == expected[:width] and not any(row[width:] + expected[width:])


def test_text_in_the_order_of_the_examples(examples):
    """The tokenizer's own words, without start, end and padding; the model need not be in `eval()`."""
    model, tokenizer = build(eos_token_id=1), build_tokenizer("t5")
    model.generation_config.suppress_tokens = list(range(len(tokenizer), 64))  # it has no words for these
    expected = tokenizer.batch_decode(generated(model, examples), skip_special_tokens=True)
    assert len(set(expected)) > 20
    assert translated(model.train(), examples, tokenizer=tokenizer) == expected
    assert not model.training


def test_nothing_to_translate():
    assert translated(build_model("t5"), Examples(TASKS["translation"], [], [], [], pad=0)) == []
