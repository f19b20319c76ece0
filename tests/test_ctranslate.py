"""CTranslate2: its translations against those of transformers, and its folders in the stages."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import edited_json, fails, read_json, run, snippets
from tiny import ENDS, bart_settings, build_model, build_tokenizer, cut

from common.blocks.find import find_blocks
from common.models.compact import make_compact
from common.models.ctranslate import search_options, with_equal_heads
from common.models.load import load_model
from common.models.saving import save_for_engine
from common.models.tokenizer import PairedTokenizer

SENTENCES, LONGEST, MANY_ENDS = 200, 12, ENDS[1:]


def two_vocabularies():
    settings = bart_settings(decoder_vocab_size=60, share_encoder_decoder_embeddings=False, tie_word_embeddings=False)
    torch.manual_seed(0)
    return transformers.MarianMTModel(transformers.MarianConfig(**settings)).eval()


MODELS = {kind: lambda kind=kind: build_model(kind) for kind in ("t5", "t5-flan", "mt5", "umt5", "bart", "marian")}
MODELS |= {kind: lambda kind=kind: build_model(kind) for kind in ("mbart", "pegasus", "m2m_100")}
MODELS["marian-2"] = two_vocabularies


def talkative(kind, way):
    """A model of random weights whose translations differ, and end at different times; cut in one of three ways."""
    model = MODELS[kind]()
    cut(model, kind, way)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.copy_(torch.randn_like(head))
    generation = model.generation_config
    generation.eos_token_id, generation.min_new_tokens, generation.no_repeat_ngram_size = MANY_ENDS, 2, 2
    start = model.config.decoder_start_token_id  # transformers counts it among what is not to come again
    generation.repetition_penalty, generation.bad_words_ids = 1.2, [[9], [10, 11], [start]]
    generation.forced_eos_token_id = 1 if kind == "bart" else None
    return model


def make_simple(generation):
    """Without what the engine weighs otherwise in a beam search. After a forced token it takes no empty answer."""
    least = None if generation.forced_bos_token_id is None else 2
    generation.update(min_new_tokens=least, no_repeat_ngram_size=0, repetition_penalty=1.0, bad_words_ids=None)
    generation.eos_token_id = 20


def tokens_and_masks(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(24, 45, (SENTENCES, 9), generator=generator)  # to the engine, an end alone is an empty text
    mask = torch.arange(9) < torch.randint(1, 10, (SENTENCES, 1), generator=generator)
    return {"input_ids": ids.masked_fill(~mask, model.config.pad_token_id), "attention_mask": mask.long()}


def until_end(rows):
    """Rows of tokens without what follows the first end, which both sides fill in their own way."""
    ends = ({*MANY_ENDS} & {*row} for row in rows)
    return [row[: min(map(row.index, end)) + 1] if end else row for row, end in zip(rows, ends)]


PROGRAM = """
import json, sys, ctranslate2
sources, options = (json.load(open(name)) for name in sys.argv[1:3])
prefix = options.pop("target_prefix")
translator = ctranslate2.Translator(sys.argv[3])
prefixes = [prefix] * len(sources) if prefix else None
results = translator.translate_batch(sources, prefixes, return_end_token=True, **options)
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps([result.hypotheses[0] for result in results]))
"""


@pytest.mark.parametrize("kind", MODELS)
def test_translations_are_those_of_transformers(kind, here):
    """Oracle: `generate` of the masked model, which ends a beam search as CTranslate2 does (early_stopping). A greedy
    search has what a generation config can ask for."""
    lengths = set()
    for way in ("even", "uneven", "left out"):
        masked, tokenizer = talkative(kind, way), build_tokenizer("t5")
        if kind == "marian-2":
            tokenizer = PairedTokenizer(tokenizer, tokenizer)
        compact, _ = make_compact(masked, {})
        save_for_engine("ctranslate2", way, compact, {"task": "translation"}, tokenizer, "float32")
        translator, inputs = load_model(way, to_run=True).model, tokens_and_masks(masked)
        for beams in (1, 4):
            if beams > 1:
                make_simple(masked.generation_config)
                translator.options = search_options(masked.generation_config, translator.target)
                translator.options.pop("target_prefix")
            search = {"num_beams": beams, "do_sample": False, "max_new_tokens": LONGEST, **inputs}
            expected = until_end(masked.generate(**search, early_stopping=beams > 1)[:, 1:].tolist())
            found = until_end(translator.generate(**search)[:, 1:].tolist())
            same = sum(one == other for one, other in zip(expected, found))
            assert same >= 0.99 * SENTENCES, (way, beams)  # sums in another order; random weights make near ties
            lengths.update(map(len, expected))
    assert len(lengths) > 3


def test_it_needs_nothing_but_the_folder(here):
    """Oracle: the same translator within this process."""
    model = talkative("t5", "uneven")
    save_for_engine(
        "ctranslate2", "m", make_compact(model, {})[0], {"task": "translation"}, build_tokenizer("t5"), "int8"
    )
    translator, inputs = load_model("m", to_run=True).model, tokens_and_masks(model)
    options = search_options(model.generation_config, translator.target) | {"max_decoding_length": 8, "beam_size": 3}
    rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist())
    sources = [[translator.source[token] for token, real in zip(*row) if real] for row in rows]
    (here / "sources").write_text(json.dumps(sources))
    (here / "options").write_text(json.dumps(options))
    command = [sys.executable, "-c", PROGRAM, "sources", "options", "m"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [[translator.numbers[token] for token in row] for row in json.loads(done.stdout)]
    expected = translator.generate(**inputs, num_beams=3, max_new_tokens=8)[:, 1:].tolist()
    assert until_end(found) == until_end(expected)


def test_heads_of_zeros_are_as_few_as_the_engine_needs():
    """By hand: of a T5's encoder heads 0 and 3 in one layer and 1 in the other stay, three slots; of its decoder 2."""
    model = build_model("t5")
    kept = {"encoder.block.0.layer.0": {0, 3}, "encoder.block.1.layer.0": {1}}
    for name, block in find_blocks(model).items():
        if block.heads:
            stay = next((heads for start, heads in kept.items() if name.startswith(start)), {2, 3})
            out = model.get_submodule(f"{name}.o").weight
            gone = torch.tensor([head not in stay for head in range(4)]).repeat_interleave(6)
            out.data[:, gone] = 0
    compact, _ = make_compact(model, {})
    padded, heads = with_equal_heads(compact)
    assert heads == {"encoder": (3, 6), "decoder": (2, 6)}
    first, second = (padded.encoder.block[layer].layer[0].SelfAttention for layer in range(2))
    whole = model.encoder.block[0].layer[0].SelfAttention
    assert torch.equal(first.q.weight.view(3, 6, 32)[[0, 2]], whole.q.weight.view(4, 6, 32)[[0, 3]])
    assert not first.q.weight.view(3, 6, 32)[1].any() and not second.o.weight.view(32, 3, 6)[:, [0, 2]].any()
    assert torch.equal(first.relative_attention_bias.weight, whole.relative_attention_bias.weight[:, [0, 1, 3]])


def test_the_stages_write_and_evaluate_it(model_of, here):
    """Oracle: the same configuration as a folder for transformers."""
    model = model_of("t5")
    run(f"config_generator.py -m {model} --attention 0.5 --linear 0.25 --feed-forward 0.5 -n 1")
    run("prune_scheme_generator.py")
    run(f"prune.py -m {model} -o pruned")
    composing, form = f"compose_model.py -m {model} -p pruned -n 0", "--format ctranslate2"
    whole = run(f"{composing} -o whole --compact")
    made = run(f"{composing} -o engine {form}")
    assert (made["format"], made["quantization"], made["parameters"]) == ("ctranslate2", "float32", whole["parameters"])
    assert run(f"{composing} -o engine {form}") == made
    assert "pass --overwrite" in fails(f"{composing} -o engine {form} --quantization int8")
    tuning = f"model-level_finetuning.py -m {model} -p pruned -n 0 --epochs 1 --batch-size 8"
    tuned = run(f"{tuning} -o tuned --compact")
    small = run(f"{tuning} -o small {form} --quantization int8")
    assert small["val_loss"] == tuned["val_loss"] and run(f"{tuning} -o small {form} --quantization int8")["skipped"]

    flags = "--limit 16 --save-predictions {name}.jsonl --report {name}-report.json"
    scores = run(f"evaluate-t5.py -m whole engine tuned small {flags}")["models"]
    lines = [(here / f"{name}.jsonl").read_text() for name in ("whole", "engine", "tuned", "small")]
    assert lines[0] == lines[1] and scores[0]["bleu"] == scores[1]["bleu"]
    assert [score["precision"] for score in scores] == ["fp32", "float32", "fp32", "int8_float32"]
    assert scores[0]["cut_short"] == scores[1]["cut_short"] and scores[3]["parameters"] == small["parameters"]
    figures = read_json(here / "small-report.json")["figures"]
    times = {"seconds_per_generated_token", "seconds_per_generated_token_of_32"}
    assert figures.keys() == {"parameters", "nonzero_parameters", "bytes_on_disk"} | times
    assert figures["bytes_on_disk"]["model"] == (here / "small" / "model.bin").stat().st_size
    assert figures["parameters"]["ratio"] == pytest.approx(small["parameters"] / 33408, abs=1e-4)

    done = subprocess.run(
        [sys.executable, "-c", *snippets((here / "small" / "README.md").read_text())], text=True, capture_output=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert "can be evaluated, and no more" in fails("config_generator.py -m small --attention 0.5 --linear 0.5 -n 1")
    assert "it can be evaluated, and no more" in fails("evaluate-t5.py -m small --original engine --report r.json")


def test_what_the_engine_cannot_do_is_refused(model_of, workshop, here, monkeypatch):
    """Before any work, in one line that names what can be done instead."""
    flags = "--attention 0.5 --linear 0.25 -n 1"
    for kind in ("distilbert", "t5"):
        model = model_of(kind)
        run(f"config_generator.py -m {model} {flags} -o {kind}.json")
        run(f"prune_scheme_generator.py -i {kind}.json -o {kind}-scheme.json")
        run(f"prune.py -m {model} -c {kind}-scheme.json -o {kind}-pruned")
    composing = "compose_model.py -m model/{0} -p {0}-pruned -c {0}.json -n 0 -o m"
    engine = f"{composing} --format ctranslate2"
    assert "no head for classification; take --format onnx" in fails(engine.format("distilbert"))
    assert "--dtype: goes with folders for transformers" in fails(f"{engine.format('t5')} --dtype float16")
    assert "--quantization: goes with --format ctranslate2 or onnx" in fails(
        f"{composing.format('t5')} --quantization int8"
    )
    assert "m.pth is a .pth, and it is a folder" in fails(engine.format("t5").replace("m --f", "m.pth --f"))
    edited_json(
        here / "model" / "t5" / "generation_config.json",
        here / "model" / "t5" / "generation_config.json",
        lambda content: content.update(encoder_no_repeat_ngram_size=3),
    )
    assert "'encoder_no_repeat_ngram_size': CTranslate2 has none" in fails(engine.format("t5"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "CTranslate2 is not installed; pip install" in fails(engine.format("t5"))
    assert not (here / "m").exists()
