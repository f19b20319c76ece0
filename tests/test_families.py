"""Every family through every stage, and a family that is added as CONTRIBUTING.md says."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from helpers import ROOT, fails, read_json, run, snippets
from huggingface_hub.dataclasses import strict
from oracles import logits, same_state
from tiny import CLASSIFIERS, DEBERTA, MODELS, MODERN, QUIET, build_model, build_tokenizer, lively, padded_batch
from transformers.modeling_outputs import SequenceClassifierOutput

from common.blocks import defaults as studies
from common.blocks import families
from common.blocks.calls import block_calls
from common.blocks.find import find_blocks
from common.blocks.tensors import block_tensors
from common.composing.library import Library
from common.evaluation import cost as report
from common.models import load as models
from common.models import modeling_compact
from common.models.checks import check_config
from common.models.compact import make_compact
from common.models.downloading import download
from common.models.load import load_model
from common.models.saving import save_model
from common.runtime.records import make_record

CHAIN = {  # the tiny model of a row of docs/families.md, and of a second kind of DeBERTa
    **{name: name for name in families.FAMILIES},
    "t5": "t5-flan",  # gated, with a head of its own; tests/conftest.py's chain has the plain one
    "deberta-v2, share_att_key false": "deberta-v2-unshared",
}


def run_all_stages(kind, workshop):
    """Run the stages in the working folder, for one configuration: {name: result}."""
    lively(kind).save_pretrained("model/m")
    build_tokenizer(kind).save_pretrained("tokenizer/m")
    shutil.copytree(workshop / "data" / ("distilbert" if kind in CLASSIFIERS else "t5"), "data/m")
    record = {"tokenizer": {"folder": "../tokenizer/m"}, "data": {"folder": "../data/m"}}
    Path("model/m/record.json").write_text(json.dumps(record))
    block_level, model_level = "block-level_finetuning.py --method", "model-level_finetuning.py -n 0 --epochs 1"
    evaluate = "distilbert.py" if kind in CLASSIFIERS else "t5.py --max-new-tokens 8"
    search = "--search reconstruct -c conf.json --budget 0.9 --measure parameters --rounds 0 --score-examples 8"
    commands = {
        "configure": "config_generator.py --attention 0.5 --linear 0.3 --feed-forward 0.5 -n 1",
        "scheme": "prune_scheme_generator.py",
        "l1": "prune.py",
        "reconstruction": "prune.py --criterion reconstruction -o chosen",
        "reconstruct": f"{block_level} reconstruct --batch-size 16 -o reconstruct",
        "train": f"{block_level} train --epochs 1 --batch-size 16 -o train",
        "joint": f"{block_level} joint --lr 0.001 --epochs 3 --batch-size 8",
        "composed": "compose_model.py -n 0 -o composed",
        "compact": "compose_model.py -n 0 -o compact --compact",
        "tuned": f"{model_level} --batch-size 16 -o tuned.pth",
        "tuned compact": f"{model_level} --batch-size 16 -o tuned-compact --compact",
        "evaluate": f"evaluate-{evaluate} -m composed compact --limit 8 --report {{name}}.json",
        "search": f"config_generator.py {search} --batch-size 16 -o found.json",
    }
    return {name: run(command) for name, command in commands.items()}


def errors(folder, library):
    """(before, after) of each variant on held-out data."""
    variants = read_json(folder / library / "record.json")["variants"].values()
    assert variants
    return [(entry["nmse_before"], entry["nmse_after"]) for entry in variants]


def was_pruned(kind, folder, results):
    """By hand: of 4 heads 2 can go, of 48 neurons 24."""
    for criterion in ("l1", "reconstruction"):
        (rates,) = results[criterion]["configurations"]
        assert rates["attention"] == rates["feed_forward"] == {"requested": 0.5, "measured": 0.5}


def was_solved(kind, folder, results):
    assert all(after < before for before, after in errors(folder, "reconstruct"))


def was_trained(kind, folder, results):
    assert all(after <= before for before, after in errors(folder, "train"))
    assert results["train"]["nmse_after"] < results["train"]["nmse_before"]


def was_tuned_together(kind, folder, results):
    """The first row is of the pruned models, the second of the solved ones, before any training."""
    with open(folder / "modules-finetuned.csv", newline="") as handle:
        losses = [float(row["val_loss"]) for row in csv.DictReader(handle)]
    assert min(losses[2:]) < max(losses[:2])


def was_composed(kind, folder, results):
    """Oracle: the library's own files."""
    record, model = read_json(folder / "composed" / "record.json"), load_model(folder / "composed").model
    blocks, library = find_blocks(model), Library.open(folder / "modules-finetuned", record["original"]["fingerprint"])
    assert record["variants"].keys() == blocks.keys()
    for name, variant in record["variants"].items():
        tensors = library.read(blocks[name], variant).tensors
        assert tensors.keys() == block_tensors(model, blocks[name]).keys()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in block_tensors(model, blocks[name]).items())


def was_compact(kind, folder, results):
    """Oracle: the composed model, whose removed heads and neurons are zero."""
    dense, compact = (load_model(folder / name).model for name in ("composed", "compact"))
    assert results["compact"]["parameters"] < results["composed"]["parameters"]
    with torch.no_grad():
        expected, found = (model(**padded_batch(kind)).logits for model in (dense, compact))
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if dense.can_generate():
        for beams in (1, 3):
            assert generated(compact, kind, beams) == generated(dense, kind, beams)


def generated(model, kind, beams):
    batch = padded_batch(kind)
    return model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, do_sample=False, max_new_tokens=8
    ).tolist()


def was_tuned(kind, folder, results):
    """Oracle: the masks in the file, and the figures of the composed compact model."""
    tuned = load_model(folder / "tuned.pth")
    assert tuned.masks and not any(tuned.model.get_parameter(name)[~mask].any() for name, mask in tuned.masks.items())
    for name in ("tuned", "tuned compact"):
        assert results[name]["val_loss"] <= results[name]["val_loss_before"]
    assert results["tuned compact"]["parameters"] == results["compact"]["parameters"]


def was_evaluated(kind, folder, results):
    """The same model has the same score, and costs less if it is compact."""
    metric = "accuracy" if kind in CLASSIFIERS else "bleu"
    composed, compact = (each[metric] for each in results["evaluate"]["models"])
    assert composed == compact
    figures = read_json(folder / "compact.json")["figures"]
    assert figures["multiply_adds"]["ratio"] < 0.95 and figures["bytes_on_disk"]["ratio"] < 0.95


def was_searched(kind, folder, results):
    (figures,) = results["search"]["found"]
    assert figures["fraction"] <= 0.9 and figures["kl"] > 0 == results["search"]["dense"]["kl"]


CHECKS = (
    was_pruned,
    was_solved,
    was_trained,
    was_tuned_together,
    was_composed,
    was_compact,
    was_tuned,
    was_evaluated,
    was_searched,
)


@pytest.mark.parametrize(
    "row", [row if row in ("t5", "bart", "bert") else pytest.param(row, marks=pytest.mark.slow) for row in CHAIN]
)
def test_a_family_goes_through_all_stages(row, workshop, here):
    results = run_all_stages(CHAIN[row], workshop)
    for check in CHECKS:
        check(CHAIN[row], here, results)


def test_what_is_not_saved_is_not_trained(model_of):
    """Marian's positions are sinusoids that its files leave out. Oracle: the files' own keys."""
    folder = model_of("marian")
    model = load_model(folder).model
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    assert not frozen & safetensors.torch.load_file(folder / "model.safetensors").keys()
    compact, _ = make_compact(model, {})
    assert {name for name, parameter in compact.named_parameters() if not parameter.requires_grad} == frozen


# --- what is special ------------------------------------------------------------------------------------------------

REAL = {  # model type: (class of its config, what checkpoints on the hub have beside its defaults, tokens at most)
    "roberta": ("RobertaConfig", dict(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5), 512),
    "xlm-roberta": ("XLMRobertaConfig", dict(max_position_embeddings=514, output_past=True, vocab_size=250002), 512),
    "electra": ("ElectraConfig", dict(summary_type="first", summary_use_proj=True), 512),
    "deberta-v2": (
        "DebertaV2Config",
        DEBERTA | dict(position_buckets=256, vocab_size=128100, legacy=True, pooler_dropout=0, attention_head_size=64),
        None,
    ),
    "modernbert": ("ModernBertConfig", MODERN | dict(reference_compile=None, local_attention=128), 8192),
    "mbart": ("MBartConfig", dict(scale_embedding=True, decoder_start_token_id=2, forced_bos_token_id=5), 1024),
    "m2m_100": ("M2M100Config", dict(scale_embedding=True, decoder_start_token_id=2, encoder_layerdrop=0.05), 1024),
    "pegasus": (
        "PegasusConfig",
        dict(static_position_embeddings=True, extra_pos_embeddings=1, num_beams=8, task_specific_params={"a": {}}),
        1024,
    ),
    "mt5": ("MT5Config", dict(tie_word_embeddings=False, tokenizer_class="T5Tokenizer"), None),
    "umt5": ("UMT5Config", dict(tie_word_embeddings=False, scalable_attention=True), None),
    "t5": ("T5Config", dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu", n_positions=512), None),
}


@pytest.mark.parametrize("model_type", REAL)
def test_the_config_of_a_usual_checkpoint_is_accepted(model_type):
    """Written to JSON as transformers does, and as checkpoints have it. And how many tokens there are positions for."""
    name, special, positions = REAL[model_type]
    config_class = getattr(transformers, name)
    for settings in (config_class().to_dict() | special, config_class(**special).to_dict()):
        check_config(json.loads(json.dumps(settings)))
        assert families.FAMILIES[model_type].positions(config_class.from_dict(settings)) == positions


def test_the_longest_input_of_a_roberta_does_not_crash(tmp_path):
    """It has 66 position embeddings, of which the first two are never used. Oracle: the model itself, one token on."""
    build_model("roberta").save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.positions == 64 == report.stated_input(loaded)["input_tokens"]
    loaded.model(**report.example_batch(loaded, 1))
    ids = torch.full((1, 65), 5)
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids))


REASONS = {
    "share one block's parameters": ["Albert"],
    "share a Linear head by head": ["Deberta"],
    "its layers shorten the text": ["Funnel"],
    "its attention has no Linears": ["XLNet"],
    "cuts the text into windows": ["LED", "Longformer", "LongT5", "BigBird", "BigBirdPegasus"],
    "it is a decoder alone": ["GPT2", "Llama", "Qwen2"],
    "not supported; known are t5, ": ["Blenderbot", "ViT"],
}


@pytest.mark.parametrize("reason, name", [(reason, name) for reason, names in REASONS.items() for name in names])
def test_other_model_types_are_refused_with_the_reason(reason, name, tmp_path):
    settings = getattr(transformers, f"{name}Config")().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for command in (
        f"config_generator.py -m {tmp_path} --attention 0.5 --linear 0 -n 1",
        f"download_model.py --checkpoint {tmp_path} -o {tmp_path}/m",
    ):
        err = fails(command)
        assert f"model type {settings['model_type']!r} is not supported" in err and reason in err


@pytest.mark.parametrize(
    "kind, head",
    [
        ("bart", "BartForSequenceClassification"),
        ("t5", "T5ForSequenceClassification"),
        ("t5", "T5EncoderModel"),
        ("modernbert", "ModernBertForTokenClassification"),
    ],
)
def test_a_model_with_another_head_is_refused(kind, head, tmp_path):
    """Weights of the last one have the names and shapes of a classifier's of whole texts."""
    getattr(transformers, head)(build_model(kind).config).save_pretrained(tmp_path)
    build_tokenizer(kind).save_pretrained(tmp_path)
    for command in (
        f"config_generator.py -m {tmp_path} --attention 0.5 --linear 0 -n 1",
        f"download_model.py --checkpoint {tmp_path} -o {tmp_path}/m",
    ):
        assert f"'architectures': {head} has another head than" in fails(command)


def test_pegasus_positions_are_computed_where_a_file_lacks_them_and_never_trained(tmp_path):
    """Oracle: a new model's positions."""
    model = build_model("pegasus")
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    positions = {name for name in weights if "embed_positions" in name}
    safetensors.torch.save_file(
        {name: tensor for name, tensor in weights.items() if name not in positions},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    build_tokenizer("pegasus").save_pretrained(tmp_path)
    for found in (load_model(tmp_path).model, download(str(tmp_path), "pegasus", QUIET)[0].model):
        assert same_state(found, model)
    frozen = {name for name, parameter in load_model(tmp_path).model.named_parameters() if not parameter.requires_grad}
    assert frozen == positions and len(positions) == 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_beyond_a_window_changes_nothing(attention):
    """In a window all of whose tokens are padding, attention has nothing to look at. Oracle: the shorter text alone."""
    model = build_model("modernbert")
    model.set_attn_implementation(attention)
    real = torch.arange(40) < torch.tensor([[40], [6]])
    ids = torch.randint(5, 60, (2, 40), generator=torch.Generator().manual_seed(0)) * real
    output = model(input_ids=ids, attention_mask=real.long(), labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    alone = model(input_ids=ids[1:, :6], attention_mask=real[1:, :6].long()).logits
    torch.testing.assert_close(output.logits[1:], alone, rtol=1e-5, atol=1e-5)


def test_token_types_of_pairs_reach_the_blocks():
    """Oracle: the hidden states of the model itself."""
    model, batch = build_model("electra"), padded_batch("electra")
    batch["token_type_ids"] = (torch.arange(7) > 2).long().expand(2, 7)
    (first, *_) = find_blocks(model).values()
    (call,) = block_calls(model, [first], batch)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[0]
    assert torch.equal(call.inputs["self.query"], hidden)
    del batch["token_type_ids"]
    (other,) = block_calls(model, [first], batch)
    assert not torch.equal(other.inputs["self.query"], hidden)


@pytest.mark.parametrize("kind", ["bart", "marian"])
def test_a_bias_of_the_logits_goes_along(kind, tmp_path):
    """It is a buffer, zero in a new model and not in trained ones. Oracle: the model that was saved."""
    model, batch = build_model(kind), padded_batch(kind)
    before = models.fingerprint(model)
    model.final_logits_bias.copy_(torch.linspace(-3, 3, model.config.vocab_size))
    assert models.fingerprint(model) != before
    with torch.no_grad():
        expected = model(**batch).logits
        for name in ("folder", "file.pth"):
            save_model(tmp_path / name, model, make_record("a script", {}))
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
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = snippets(text.partition("### A family of models\n")[2].partition("\n### ")[0])
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
    code = recipe_code()
    assert set(code) == {"common/blocks/families.py", "common/models/modeling_compact.py"}
    exec(code["common/blocks/families.py"], vars(families))
    found = {name: ToyForSequenceClassification}
    exec(code["common/models/modeling_compact.py"], vars(modeling_compact), found)
    for name, made in found.items():
        monkeypatch.setattr(modeling_compact, name, made, raising=False)


def test_the_recipe_for_a_family_followed_literally(toy_family, model_of, here):
    """Oracle: the masked model, for the compact one; the error before, for the closed form and the gradients."""
    model_of("toy")
    run("config_generator.py --attention 0.25 0.5 --linear 0 0.3 --feed-forward 0.25 0.5 -n 2")
    run("prune_scheme_generator.py")
    run("prune.py")
    run("block-level_finetuning.py --batch-size 8 --lr 0.001")
    assert {block.name: block.linears for block in find_blocks(build_model("toy")).values()} == {
        "toy.layers.0.mixer": ("q", "k", "v", "o"),
        "toy.layers.0.feed_forward": ("up", "down"),
        "toy.layers.1.mixer": ("q", "k", "v", "o"),
        "toy.layers.1.feed_forward": ("up", "down"),
    }
    record = read_json(Path("modules-finetuned/record.json"))
    assert len(record["variants"]) == 8
    assert all(entry["nmse_after"] < entry["nmse_before"] for entry in record["variants"].values())
    run("compose_model.py -n 0 1 -o composed-{n}")
    compact = run("compose_model.py -n 0 1 -o compact-{n} --compact")["models"]
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
    run("model-level_finetuning.py -n 0 --epochs 1 --batch-size 8")
    assert 0 <= run("evaluate-distilbert.py -m model-finetuned/0 compact-1")["models"][1]["accuracy"] <= 1
