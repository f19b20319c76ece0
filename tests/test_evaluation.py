"""Translation in batches against `generate` on one padded batch, token for token, on tiny random models."""

import random

import pytest
import torch
import transformers
from oracles import LIMIT, token_rows, translated
from tiny import ENDS, build_tokenizer, t5_config

from common.data.examples import Examples
from common.data.tasks import TASKS
from common.runtime.errors import UserError

CONFIGS = {
    "tied": {},
    "gated": {"feed_forward_proj": "gated-gelu"},
    "unscaled": {"scale_decoder_outputs": False},
    "untied": {},
}  # transformers ties them whatever the config says, so `build` unties them


def build(config="gated", **generation):
    """A tiny T5 with random weights so large that its translations differ, and a generation config."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(t5_config(initializer_factor=3.0, **CONFIGS[config])).eval()
    if config == "untied":
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.generation_config.update(**{"eos_token_id": ENDS} | generation)
    return model


@pytest.fixture(scope="module")
def examples():
    """40 random sources of 2 to 14 tokens, in no order."""
    draw = random.Random(0)
    inputs = [[draw.randrange(3, 64) for _ in range(draw.randint(2, 14))] for _ in range(40)]
    return Examples(TASKS["translation"], inputs, [[1]] * 40, [("", "")] * 40, pad=0)


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


def padded(rows, width):
    return [row + [0] * (width - len(row)) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_tokens_are_those_of_one_padded_batch(config, batch_size, examples):
    model = build(config)
    rows = padded(token_rows(model, examples, batch_size=batch_size), LIMIT + 1)
    assert rows == padded(generated(model, examples), LIMIT + 1)
    lengths = [sum(map(bool, row)) for row in rows]
    assert len(set(lengths)) > 3  # rows end at different times


def test_batches_are_sorted_by_length(examples):
    model, encoded = build(), []
    model.encoder.register_forward_hook(
        lambda _, args, kwargs, output: encoded.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    token_rows(model, examples, batch_size=5)
    # Longest first, each batch padded to its own longest.
    assert encoded == [(5, width) for width in sorted(map(len, examples.inputs), reverse=True)[::5]]


def test_beam_search_is_generates_own(examples):
    model = build()
    rows = padded(token_rows(model, examples, beams=3), LIMIT + 1)
    assert rows == padded(generated(model, examples, beams=3), LIMIT + 1)


def test_outputs_that_are_not_finite_are_refused(examples):
    model = build()
    model.decoder.block[0].layer[0].SelfAttention.o.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="outputs are not finite"):
        translated(model, examples)


def test_text_in_the_order_of_the_examples(examples):
    """The tokenizer's own words, without start, end and padding; the model need not be in `eval()`."""
    model, tokenizer = build(eos_token_id=1), build_tokenizer("t5")
    model.generation_config.suppress_tokens = list(range(len(tokenizer), 64))  # it has no words for these
    expected = tokenizer.batch_decode(generated(model, examples), skip_special_tokens=True)
    assert len(set(expected)) > 20
    assert translated(model.train(), examples, tokenizer=tokenizer) == expected
    assert not model.training
