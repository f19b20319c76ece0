"""ONNX Runtime: its answers against those of transformers, and its folders in the stages."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import fails, read_json, run, snippets
from tiny import ENDS, bart_settings, build_tokenizer, classifier, cut, t5_config

from common.models.compact import make_compact
from common.models.load import load_model
from common.models.saving import save_for_engine
from common.runtime.errors import UserError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SENTENCES, LONGEST = 100, 12
ONE_LAYER = dict(encoder_layers=1, decoder_layers=1)
MODELS = {
    "t5": lambda: transformers.T5ForConditionalGeneration(t5_config(num_layers=1, num_decoder_layers=1)),
    "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**bart_settings() | ONE_LAYER)),
}


def inputs_of(model, count):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(24, 45, (count, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(1, 10, (count, 1), generator=generator)
    return {"input_ids": ids.masked_fill(~mask, model.config.pad_token_id), "attention_mask": mask.long()}


def written(name, model, task, quantization="float32"):
    """What answers of a folder of the compact form of a model."""
    tokenizer = build_tokenizer("t5" if model.can_generate() else "distilbert")
    save_for_engine("onnx", name, make_compact(model, {})[0], {"task": task}, tokenizer, quantization)
    return load_model(name, to_run=True).model


def printed(folder):
    """What the snippet of a folder's card prints in a process of its own."""
    code = snippets((folder / "README.md").read_text())
    done = subprocess.run([sys.executable, "-c", *code], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind, way", [("t5", "uneven"), ("marian", "left out")])
def test_translations_are_those_of_transformers(kind, way, here, workshop):
    """Oracle: `generate` of the masked model; some of Marian's attentions have no heads left."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    cut(model, kind, way)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    generation = model.generation_config
    generation.no_repeat_ngram_size, generation.bad_words_ids, generation.eos_token_id = 2, [[9], [10, 11]], ENDS[1:]
    running, inputs = written("m", model, "translation"), inputs_of(model, SENTENCES)
    for beams in (1, 4):
        search = {"num_beams": beams, "do_sample": False, "max_new_tokens": LONGEST, **inputs}
        expected, found = model.generate(**search), running.generate(**search)
        same = sum(map(torch.equal, expected, found)) if expected.shape == found.shape else 0
        assert same >= 0.98 * SENTENCES, beams  # sums in another order; random weights make near ties
        assert len({*map(tuple, expected.tolist())}) > SENTENCES // 3
    if kind == "t5":
        data = f"--data {workshop}/data/t5 --limit 8"
        assert run(f"evaluate-t5.py -m m {data} --report report.json")["precision"] == "float32"
        figures = read_json(here / "report.json")["figures"]
        assert figures.keys() >= {"bytes_on_disk", "seconds_per_generated_token"} and "seconds_per_batch" not in figures
        assert figures["bytes_on_disk"]["model"] == sum(file.stat().st_size for file in (here / "m").glob("*.onnx"))
    text = "translate English to German: A text." if kind == "t5" else "A text."
    tokenizer = build_tokenizer("t5")
    generation.no_repeat_ngram_size, generation.bad_words_ids = 0, [[9]]  # what the snippet does
    answer = model.generate(**tokenizer([text], return_tensors="pt"), num_beams=1, do_sample=False, max_new_tokens=60)
    assert printed(here / "m") == tokenizer.decode(answer[0], skip_special_tokens=True)


def test_a_classifiers_logits_are_those_of_transformers(here):
    """Oracle: the masked BERT, with types of tokens and without."""
    torch.manual_seed(0)
    model = classifier("Bert", num_hidden_layers=1).eval()
    cut(model, "bert", "uneven")
    running, inputs = written("m", model, "classification"), inputs_of(model, 20)
    for types in ({}, {"token_type_ids": (inputs["input_ids"] > 30).long()}):
        with torch.no_grad():
            expected = model(**inputs, **types).logits
        assert torch.allclose(running(**inputs, **types).logits, expected, atol=1e-4)
    assert printed(here / "m") in model.config.id2label.values()


def test_int8_of_a_float16_model_in_the_stages(model_of, here):
    """Oracle: the same configuration as a folder for transformers."""
    model = model_of("distilbert")
    half = transformers.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float16)
    half.save_pretrained(model)
    run(f"config_generator.py -m {model} --attention 0.5 --linear 0.25 --feed-forward 0.5 -n 1")
    run("prune_scheme_generator.py")
    run(f"prune.py -m {model} -o pruned")
    composing = f"compose_model.py -m {model} -p pruned -n 0"
    whole = run(f"{composing} -o whole --compact --dtype float32")
    made = run(f"{composing} -o small --format onnx --quantization int8")
    assert (made["format"], made["quantization"], made["parameters"]) == ("onnx", "int8", whole["parameters"])
    scores = run("evaluate-distilbert.py -m whole small --report {name}.json")["models"]
    assert [score["precision"] for score in scores] == ["fp32", "int8"]
    assert scores[0]["parameters"] == scores[1]["parameters"] == made["parameters"]
    figures = read_json(here / "small.json")["figures"]
    assert figures["bytes_on_disk"]["model"] == (here / "small" / "model.onnx").stat().st_size
    assert figures.keys() == {"parameters", "nonzero_parameters", "bytes_on_disk", "seconds_per_batch"}
    exact, rounded = (load_model(name, to_run=True).model for name in ("whole", "small"))
    inputs = inputs_of(exact, 20)
    with torch.no_grad():
        expected = exact(**inputs).logits
    spread = float(expected.max() - expected.min())
    assert torch.allclose(rounded(**inputs).logits, expected, rtol=0, atol=0.1 * spread)
    assert "can be evaluated, and no more" in fails("config_generator.py -m small --attention 0.5 --linear 0.5 -n 1")


def test_what_cannot_be_written_is_refused(model_of, workshop, here, monkeypatch):
    """Before any work where that can be."""
    composing = f"compose_model.py -m {workshop}/model/t5 -p p -c c.json -n 0 -o m --format onnx"
    assert "--quantization int16: of --format onnx it is float32 or int8" in fails(f"{composing} --quantization int16")
    model = MODELS["t5"]().eval()
    model.decoder.block[0].layer[1].EncDecAttention.o.weight.data.zero_()
    with pytest.raises(UserError, match="no cross-attention has heads left"):
        written("m", model, "translation")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "ONNX Runtime is not installed; pip install" in fails(composing)
    assert not (here / "m").exists()
