"""Translation in batches against `generate` on one padded batch, token for token, on tiny random models."""

import json
import random

import pytest
import torch
import transformers
from helpers import edited_json, outcome, run
from oracles import LIMIT, token_rows, translated
from tiny import ENDS, build_model, build_tokenizer, pairs_of, t5_config

from common.blocks.defaults import study_of
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


# --- generation configs --------------------------------------------------------------------------------------------

ENDING = [1, *range(20, 24)]
SETTINGS = {  # each is accepted, and changes what the tiny T5 says
    "length": {"max_length": 6},
    "new": {"max_new_tokens": 4},
    "least": {"min_length": 12},
    "least-new": {"min_new_tokens": 12},
    "ngrams": {"no_repeat_ngram_size": 2},
    "ngrams-of-input": {"encoder_no_repeat_ngram_size": 1},
    "repetition": {"repetition_penalty": 3.0},
    "bad": {"bad_words_ids": [[word] for word in range(6, 16)]},
    "first": {"forced_bos_token_id": 9},
    "last": {"forced_eos_token_id": 1},
    "ends": {"eos_token_id": 1},
    "beams": {"num_beams": 3},
    "longer": {"num_beams": 3, "length_penalty": 4.0},
    "stop": {"num_beams": 3, "early_stopping": True},
    "normed": {"num_beams": 3, "renormalize_logits": True, "repetition_penalty": 3.0},
}
ALL = {"all": {name: value for settings in SETTINGS.values() for name, value in settings.items() if "min" not in name}}


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m_100"])
def test_every_accepted_setting_has_the_effect_that_it_has_in_generate(here, workshop, kind):
    """Oracle: `generate` of the model as `from_pretrained` loads it, on all texts in one batch.

    An answer that is forced to end at the limit is cut short too.
    """
    tokenizer, model = build_tokenizer("t5"), build_model(kind)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.5)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.update(max_length=20, eos_token_id=ENDING, decoder_start_token_id=0)
    prefix = study_of(kind).prefix
    sources = [prefix + source for source, _ in pairs_of(workshop, "test2016")]
    inputs = tokenizer(sources, padding=True, return_tensors="pt", return_token_type_ids=False)
    expected, cut = {}, {}
    for name, settings in ({"usual": {}} | (SETTINGS if kind == "t5" else ALL)).items():
        model.save_pretrained(here / name)
        tokenizer.save_pretrained(here / name)
        file = here / name / "generation_config.json"
        edited_json(file, file, lambda content, settings=settings: content.update(settings))
        loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(here / name).eval()
        tokens = loaded.generate(**inputs)
        expected[name] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ends = ENDING if name != "ends" else [1]
        cut[name] = len(tokens) - sum(any(token in ends for token in row[1:]) for row in tokens.tolist())
    cut |= {"last": cut["usual"]} if kind == "t5" else {}
    flags = f"--data {workshop}/data/t5 --batch-size 64 --bootstrap 0 --save-predictions {{name}}.jsonl"
    results = run(f"evaluate-t5.py -m {' '.join(expected)} {flags}")["models"]
    for name, result in zip(expected, results):
        texts = [json.loads(row)["prediction"] for row in (here / f"{name}.jsonl").read_text().splitlines()]
        assert texts == expected[name], name
        assert name == "usual" or texts != expected["usual"], name
        assert name == "all" or result["cut_short"] == cut[name], name
    assert kind != "t5" or len(set(cut.values())) > 3


def test_answers_that_were_cut_short_are_told(t5, here):
    code, result, err = outcome(f"evaluate-t5.py -m {t5} --max-new-tokens 2 --limit 8 --bootstrap 0")
    assert code == 0 and result["cut_short"] == 8
    told = f"{t5}: more than 1% of the answers were cut short at 2 tokens; allow more with --max-new-tokens"
    assert told in " ".join(err.split())
