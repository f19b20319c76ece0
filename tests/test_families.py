"""BERT, BART and Marian through every stage, and a family that is added as docs/architecture.md says."""

import csv
import re
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from helpers import (
    CLASSIFIERS,
    ENDS,
    LIMIT,
    MODELS,
    ROOT,
    build_model,
    examples,
    logits,
    padded_batch,
    read_json,
    token_rows,
)
from huggingface_hub.dataclasses import strict
from transformers.modeling_outputs import SequenceClassifierOutput

from common import families, modeling_compact, models, studies
from common.blocks import find_blocks
from common.compact import make_compact
from common.models import load_model
from common.records import make_record

KINDS = ("bert", "bart", "marian", "seq2seq")
EVALUATE = {kind: "evaluate-distilbert.py" if kind in CLASSIFIERS else "evaluate-t5.py" for kind in KINDS}
METRIC = {"evaluate-distilbert.py": "accuracy", "evaluate-t5.py": "bleu"}


@pytest.fixture
def library_of(model_of, tmp_path, succeeds, monkeypatch):
    """library_of(kind, *methods): a model's folder, beside which two configurations are pruned and fine-tuned."""

    def make(kind, *flags):
        model = model_of(kind)
        monkeypatch.chdir(tmp_path)
        rates = ("--attention", 0.25, 0.5, "--linear", 0, 0.3, "--feed-forward", 0.25, 0.5)
        succeeds("config_generator.py", *rates, "-n", 2)
        succeeds("prune_scheme_generator.py")
        succeeds("prune.py")
        succeeds("block-level_finetuning.py", "--batch-size", 8, "--lr", 0.001, *flags)
        return model

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_goes_through_every_stage(kind, library_of, succeeds, tmp_path):
    """Oracles: the masked model for the compact one and the sparse file; the files' own counts for what is gone."""
    library_of(kind, "--method", "joint")
    with open(tmp_path / "modules-finetuned.csv", newline="") as handle:
        losses = [float(row["val_loss"]) for row in csv.DictReader(handle)]
    assert min(losses[2:]) < losses[0]  # of composed models: joint fine-tuning
    succeeds("block-level_finetuning.py", "--batch-size", 8, "--method", "both", "-o", "apart")
    record = read_json(tmp_path / "apart" / "record.json")
    assert all(each["nmse_after"] < each["nmse_before"] for each in record["variants"].values())

    composed = succeeds("compose_model.py", "-n", 0, 1, "-o", "composed-{n}")["models"]
    compact = succeeds("compose_model.py", "-n", 0, 1, "-o", "compact-{n}", "--compact")["models"]
    succeeds("compose_model.py", "-n", 1, "-o", "sparse", "--sparse")
    for n in (0, 1):
        assert compact[n]["parameters"] < composed[n]["parameters"]
        torch.testing.assert_close(logits(f"compact-{n}", kind), logits(f"composed-{n}", kind), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits("sparse", kind), logits("composed-1", kind))

    succeeds("model-level_finetuning.py", "-n", 0, "--epochs", 1, "--batch-size", 8, "-o", "tuned.pth")
    tuned = load_model("tuned.pth")
    assert tuned.masks and not any(tuned.model.get_parameter(name)[~mask].any() for name, mask in tuned.masks.items())
    small = succeeds("model-level_finetuning.py", "-n", 1, "--epochs", 1, "--batch-size", 8, "--compact")
    assert small["parameters"] == compact[1]["parameters"]

    evaluate = EVALUATE[kind]
    scores = succeeds(evaluate, "-m", "composed-1", "compact-1", "tuned.pth", "model", "--report", "{name}.json")
    composed_score, compact_score, _, dense = (each[METRIC[evaluate]] for each in scores["models"])
    assert composed_score == compact_score and dense >= 0
    report = read_json(tmp_path / "compact-1.json")["figures"]
    assert report["multiply_adds"]["ratio"] < 0.9 and report["seconds_per_batch"]["ratio"] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", ["latency", "parameters"])
def test_a_family_is_searched(kind, measure, library_of, succeeds, tmp_path):
    library_of(kind, "--method", "reconstruct", "--calibration", 32)
    found = succeeds(
        *("config_generator.py", "--search", "modules-finetuned", "-c", "conf.json", "-o", "found.json"),
        *("--budget", 0.9, "--measure", measure, "--score-examples", 8, "--rounds", 0, "--batch-size", 8),
    )
    (figures,) = found["found"]
    assert figures["fraction"] <= 0.9 and figures["kl"] > 0 == found["dense"]["kl"]
    succeeds("compose_model.py", "-c", "found.json", "-n", 0, "-o", "best", "--compact")


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_greedy_decoding_is_generates_own(kind):
    """Oracle: `generate`, one example at a time, so that nothing is padded."""
    model, data = build_model(kind), examples("t5", 12)
    model.generation_config.eos_token_id = ENDS
    expected = [
        model.generate(torch.tensor([ids]), do_sample=False, num_beams=1, max_new_tokens=LIMIT)[0].tolist()
        for ids in data.inputs
    ]
    assert token_rows(model, data) == expected and len({len(row) for row in expected}) > 1


def test_what_is_not_saved_is_not_trained(model_of):
    """Marian's positions are sinusoids that its files leave out. Oracle: the files' own keys."""
    folder = model_of("marian")
    model = load_model(folder).model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    assert not frozen & safetensors.torch.load_file(folder / "model.safetensors").keys()
    compact, _ = make_compact(model, {})
    assert {name for name, parameter in compact.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_a_bias_of_the_logits_goes_along(kind, tmp_path):
    """It is a buffer, zero in a new model and not in trained ones. Oracle: the model that was saved."""
    model, batch = build_model(kind), padded_batch(kind)
    before = models.fingerprint(model)
    model.final_logits_bias.copy_(torch.linspace(-3, 3, model.config.vocab_size))
    assert models.fingerprint(model) != before
    with torch.no_grad():
        expected = model(**batch).logits
        for name in ("folder", "sparse", "file.pth"):
            models.save_model(tmp_path / name, model, make_record("a script", {}), sparse=name == "sparse")
            assert torch.equal(load_model(tmp_path / name).model(**batch).logits, expected), name
        compact, _ = make_compact(model, {})
        torch.testing.assert_close(compact(**batch).logits, expected, rtol=1e-5, atol=1e-5)


# --- a family that is added as the recipe says ----------------------------------------------------------------------


@strict
class ToyConfig(transformers.PreTrainedConfig):
    model_type = "toy"

    vocab_size: int = 64
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 48
    hidden_act: str = "gelu"
    max_position_embeddings: int = 64
    pad_token_id: int | None = 0


class ToyMixer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.q, self.k, self.v, self.o = (torch.nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, states, mask):
        batch, length, _ = states.shape
        q, k, v = (
            each(states).view(batch, length, -1, self.width).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) / self.width**0.5
        probabilities = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(
            -1
        )  # (batch, heads, length, length)
        return self.o((probabilities @ v).transpose(1, 2).reshape(batch, length, -1)), probabilities


class ToyLayer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixer = ToyMixer(config)
        self.up = torch.nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = torch.nn.GELU()
        self.down = torch.nn.Linear(config.intermediate_size, config.hidden_size)
        self.first, self.second = (torch.nn.LayerNorm(config.hidden_size) for _ in range(2))

    def forward(self, states, mask):
        states = states + self.mixer(self.first(states), mask)[0]
        return states + self.down(self.act(self.up(self.second(states))))


class ToyPreTrainedModel(transformers.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    _supports_sdpa = True


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, attention_mask):
        states = self.embedding(input_ids)
        for layer in self.layers:
            states = layer(states, attention_mask.bool())
        return states


class ToyForSequenceClassification(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.classifier(self.toy(input_ids, attention_mask)[:, 0])
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def recipe_code():
    """The code blocks of the recipe, {name of the file: code}, by their first line."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    recipe = text.partition("## Recipe: a family")[2].partition("\n## ")[0]
    blocks = [
        textwrap.dedent(block)
        for block in re.findall(r"( *)```python\n(.*?)```", recipe, re.DOTALL)
        for block in block[1:]
    ]
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks}


@pytest.fixture
def toy_family(monkeypatch):
    """Transformers with the made-up model type, and the suite with what the recipe has one add."""
    transformers.AutoConfig.register("toy", ToyConfig, exist_ok=True)
    name = "ToyForSequenceClassification"
    monkeypatch.setattr(models.transformers, name, ToyForSequenceClassification, raising=False)
    monkeypatch.setitem(MODELS, "toy", lambda: ToyForSequenceClassification(ToyConfig()))
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES.copy())
    monkeypatch.setattr(models, "FAMILIES", families.FAMILIES)
    monkeypatch.setattr(studies, "FAMILIES", families.FAMILIES)
    monkeypatch.setattr(modeling_compact, "LAYOUTS", modeling_compact.LAYOUTS.copy())
    code = recipe_code()
    assert set(code) == {"families", "modeling_compact"}
    exec(code["families"], vars(families))
    found = {name: ToyForSequenceClassification}
    exec(code["modeling_compact"], vars(modeling_compact), found)
    for name, made in found.items():
        monkeypatch.setattr(modeling_compact, name, made, raising=False)


def test_the_recipe_for_a_family_followed_literally(toy_family, library_of, succeeds):
    """Oracle: the masked model, for the compact one; the error before, for the closed form and the gradients."""
    library_of("toy")
    assert {block.name: block.linears for block in find_blocks(build_model("toy")).values()} == {
        "toy.layers.0.mixer": ("q", "k", "v", "o"),
        "toy.layers.0.feed_forward": ("up", "down"),
        "toy.layers.1.mixer": ("q", "k", "v", "o"),
        "toy.layers.1.feed_forward": ("up", "down"),
    }
    record = read_json(Path("modules-finetuned/record.json"))
    assert len(record["variants"]) == 8
    assert all(each["nmse_after"] < each["nmse_before"] for each in record["variants"].values())
    succeeds("compose_model.py", "-n", 0, 1, "-o", "composed-{n}")
    compact = succeeds("compose_model.py", "-n", 0, 1, "-o", "compact-{n}", "--compact")["models"]
    for n in (0, 1):
        torch.testing.assert_close(
            logits(f"compact-{n}", "bert"), logits(f"composed-{n}", "bert"), rtol=1e-5, atol=1e-5
        )
        assert compact[n]["parameters"] < sum(p.numel() for p in build_model("toy").parameters())
    model = build_model("toy")
    with torch.no_grad():
        model.toy.layers[0].mixer.o.weight.zero_()
        model.toy.layers[1].down.weight.zero_()
        small, batch = make_compact(model, {})[0], padded_batch("bert")
        torch.testing.assert_close(small(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert list(find_blocks(small)) == ["toy.layers.0.feed_forward", "toy.layers.1.mixer"]
    succeeds("model-level_finetuning.py", "-n", 0, "--epochs", 1, "--batch-size", 8)
    assert 0 <= succeeds("evaluate-distilbert.py", "-m", "model-finetuned/0", "compact-1")["models"][1]["accuracy"] <= 1


def test_the_two_tables_of_layouts_agree():
    """`modeling_compact` goes into models' folders, so it cannot read `families`."""
    for family in families.FAMILIES.values():
        for name, layout in family.layouts.items():
            *inner, out = layout.linears
            found = modeling_compact.LAYOUTS[name]
            assert (found.inner, found.out, found.heads) == (tuple(inner), out, getattr(layout, "heads", "")), name
