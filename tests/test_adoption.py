"""Adopting models of others with --checkpoint: what is adopted works everywhere, the rest is refused."""

import json
import os

import pytest
import torch
from helpers import edited_json, fails, outcome, read_json, run
from oracles import same_state
from safetensors.torch import save_file
from tiny import build_model, build_tokenizer

from common.models.load import load_model
from common.models.saving import save_model

ADOPT = "download_model.py --checkpoint mine --quiet"


@pytest.fixture
def mine(here):
    """mine(kind, weights): a folder with a tiny model, saved with those settings, and its tokenizer; the model."""

    def make(kind, model=None, **saving):
        model = model or build_model(kind)
        model.save_pretrained(here / "mine", **saving)
        build_tokenizer(kind).save_pretrained(here / "mine")
        return model

    return make


def change(path, **settings):
    edited_json(path, path, lambda content: content.update(settings))


@pytest.mark.parametrize(
    "kind, file, settings, words",
    [
        ("bert", "config.json", {"pruned_heads": {"0": [1]}}, "took heads out of this model"),
        ("bert", "config.json", {"model_type": None}, "has no 'model_type'; add one of t5"),
        ("bert", "config.json", {"torch_dtype": "torch.float16"}, "where a type such as 'float16' belongs"),
        ("bart", "config.json", {"decoder_start_token_id": None}, "'decoder_start_token_id'"),
        ("t5", "generation_config.json", {"do_sample": True}, "'do_sample': true is not supported"),
        ("t5", "generation_config.json", {"guidance_scale": 0}, "'guidance_scale': 0 is not supported"),
        ("t5", "generation_config.json", {"remove_invalid_values": True}, "'remove_invalid_values'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_stage_could_use_is_refused_at_once(mine, here, kind, file, settings, words):
    mine(kind)
    change(here / "mine" / file, **settings)
    assert words in fails(ADOPT)
    assert not (here / "model").exists() or not any((here / "model").iterdir())
    assert not (here / "tokenizer").exists() or not any((here / "tokenizer").iterdir())


def test_an_adapter_that_was_never_merged_is_refused(mine, here):
    mine("bert")
    (here / "mine" / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2)}, here / "mine" / "adapter_model.safetensors")
    assert "adapter_config.json" in (err := fails(ADOPT)) and "merge it first" in err
    assert "merge it first" in fails("config_generator.py -m mine --attention 0.5 --linear 0.5 -n 1")


def test_a_generation_config_with_settings_of_sampling_can_be_saved_again(mine, here):
    """transformers refuses to save one that was changed since it was loaded."""
    mine("t5")
    settings = {"temperature": 0.9, "top_p": 0.6, "do_sample": False}
    change(here / "mine" / "generation_config.json", **settings)
    run(ADOPT)
    save_model(here / "again", load_model(here / "model" / "mine").model, {})
    written = read_json(here / "again" / "generation_config.json")
    assert {name: written[name] for name in settings} == settings


def test_the_type_of_weights_as_older_configs_have_it(mine, here):
    model = mine("distilbert", build_model("distilbert").half())
    change(here / "mine" / "config.json", dtype=None, torch_dtype="float16")
    run(ADOPT)
    loaded = load_model(here / "model" / "mine")
    assert loaded.dtype == "float16" and same_state(loaded.model, model.float())


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded bin"])
def test_layouts_of_weights(mine, here, layout):
    """Oracle: the model that was saved. Today's shards, and the files of older transformers."""
    model = mine("bert", max_shard_size="20KB" if layout == "sharded" else "1GB")
    if "bin" in layout:
        (here / "mine" / "model.safetensors").unlink()
        names = sorted(model.state_dict())
        files = {"pytorch_model.bin": names}
        if layout == "sharded bin":
            files = {f"pytorch_model-{i + 1:05}-of-00002.bin": names[i::2] for i in range(2)}
            index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
            (here / "mine" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in files.items():
            torch.save({name: model.state_dict()[name] for name in part}, here / "mine" / file)
    run(ADOPT)
    assert same_state(load_model(here / "model" / "mine").model, model)


class Code:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_no_code_in_a_bin_is_run(mine, here):
    mine("bert")
    (here / "mine" / "model.safetensors").unlink()
    torch.save({"classifier.bias": Code()}, here / "mine" / "pytorch_model.bin")
    assert "mine: cannot be loaded as a model" in fails(ADOPT)
    assert not (here / "ran").exists()


def test_zeros_that_would_come_back_are_told(mine, here):
    """Oracle: counted by the names of T5's Linears."""
    model = build_model("t5")
    for name, weight in model.named_parameters():
        if name.rpartition(".")[0].endswith((".q", ".k", ".v")):
            weight.data[::2] = 0
    linears = (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi.weight", ".wo.weight")
    blocks = [weight for name, weight in model.named_parameters() if name.endswith(linears)]
    share = sum(int((weight == 0).sum()) for weight in blocks) / sum(weight.numel() for weight in blocks)
    mine("t5", model)
    code, _, err = outcome("download_model.py --checkpoint mine")
    assert code == 0 and f"mine: {share:.0%} of its blocks' weights are zero; fine-tuning keeps those" in err
    build_model("t5").save_pretrained(here / "mine")
    code, _, err = outcome("download_model.py --checkpoint mine --name whole")
    assert code == 0 and "are zero" not in err
