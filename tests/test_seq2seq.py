"""The Seq2Seq model: against `torch.nn.Transformer`, its generation, its folders, and its training from scratch."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    CPU,
    ENDS,
    LIMIT,
    QUIET,
    build_model,
    examples,
    load_script,
    padded_batch,
    pairs_of,
    read_json,
    same_state,
    seq2seq_config,
    token_rows,
)

from common import from_scratch
from common.blocks import find_blocks
from common.checkpoints import Checkpoint
from common.compact import make_compact
from common.errors import UserError
from common.model_files import check_config
from common.modeling_seq2seq import Seq2SeqForConditionalGeneration
from common.models import load_model, load_tokenizer
from common.paired_tokenizer import PairedTokenizer

TINY = ("--d-model", 32, "--layers", 1, "--feed-forward-size", 48, "--vocabulary", 60)
TRAINED = (*TINY, "--epochs", 4, "--batch-size", 16, "--lr", 0.01)


def random_model(**changes):
    """A tiny model whose weights, biases and norms are all random."""
    torch.manual_seed(0)
    model = Seq2SeqForConditionalGeneration(seq2seq_config(**changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# --- the model -----------------------------------------------------------------------------------------------------


def torch_transformer(model):
    """A `torch.nn.Transformer` with the model's weights."""
    config = model.config
    twin = torch.nn.Transformer(
        config.d_model,
        config.heads,
        config.encoder_layers,
        config.decoder_layers,
        config.feed_forward_size,
        batch_first=True,
        dtype=torch.float64,
    ).eval()

    def attention(theirs, ours):
        projections = (ours.q, ours.k, ours.v)
        theirs.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        theirs.in_proj_bias.copy_(torch.cat([each.bias for each in projections]))
        theirs.out_proj.load_state_dict(ours.o.state_dict())

    with torch.no_grad():
        for theirs, ours in ((twin.encoder, model.model.encoder), (twin.decoder, model.model.decoder)):
            theirs.norm.load_state_dict(ours.norm.state_dict())
            for layer, own in zip(theirs.layers, ours.layers):
                norms = [own.self_norm, own.final_norm]
                attention(layer.self_attn, own.self_attention)
                if own.cross_attention is not None:
                    attention(layer.multihead_attn, own.cross_attention)
                    norms.insert(1, own.cross_norm)
                for number, norm in enumerate(norms, start=1):
                    getattr(layer, f"norm{number}").load_state_dict(norm.state_dict())
                layer.linear1.load_state_dict(own.feed_forward.wi.state_dict())
                layer.linear2.load_state_dict(own.feed_forward.wo.state_dict())
    return twin


def embedded(embedding, ids):
    """What the paper says, number by number: (batch, length, d_model)."""
    length, width = ids.shape[1], embedding.embedding_dim
    positions = torch.tensor(
        [
            [(math.sin, math.cos)[i % 2](place / 10000 ** ((i - i % 2) / width)) for i in range(width)]
            for place in range(length)
        ],
        dtype=torch.float64,
    )
    return embedding(ids) * math.sqrt(width) + positions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_it_computes_what_torchs_transformer_does(attention):
    """Oracle: `torch.nn.Transformer` with the same weights, in float64; torch's cross-entropy."""
    model, batch = random_model(decoder_layers=3).double(), padded_batch("seq2seq")
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    targets = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    assert targets[1].tolist() == [0, *batch["labels"][1, :3].tolist(), 0, 0]  # start token, labels, padding
    padding = batch["attention_mask"] == 0
    states = torch_transformer(model)(
        embedded(model.model.encoder.embedding, batch["input_ids"]),
        embedded(model.model.decoder.embedding, targets),
        tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(targets.shape[1], dtype=torch.float64),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    expected, found = model.lm_head(states), model(**batch)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-10)
    real = batch["labels"] != -100
    loss = torch.nn.functional.cross_entropy(expected[real], batch["labels"][real])
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=0)  # in float32


def test_its_initial_weights_are_torchs():
    """Oracle: the bounds of Xavier's uniform distribution. Padding embeddings are learnt as any other."""
    model = build_model("seq2seq")
    bound = math.sqrt(6 / (32 + 48))
    largest = model.model.encoder.layers[0].feed_forward.wi.weight.abs().max().item()
    assert 0.95 * bound < largest <= bound
    assert not model.lm_head.bias.any() and bool((model.model.decoder.norm.weight == 1).all())


# --- generation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_greedy_search_with_and_without_a_cache_is_a_plain_loop():
    """Oracle: the whole prefix through the model again for each token, one example at a time."""
    model, data = random_model(), examples("seq2seq", 6)
    model.generation_config.eos_token_id = ENDS
    for ids in data.inputs:
        source, tokens = torch.tensor([ids]), [0]
        while len(tokens) <= LIMIT and (len(tokens) == 1 or tokens[-1] not in ENDS):
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
        for use_cache in (True, False):
            settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": LIMIT, "use_cache": use_cache}
            assert model.generate(source, **settings)[0].tolist() == tokens
        assert token_rows(model, data)[data.inputs.index(ids)] == tokens  # padded among others, as it is evaluated


@torch.no_grad()
def test_beam_search_that_keeps_everything_finds_the_best_sequence():
    """Oracle: all sequences of a tiny vocabulary, scored one by one."""
    model = random_model(vocab_size=5)
    model.generation_config.update(eos_token_id=1, pad_token_id=0)
    source, longest = torch.tensor([[7, 9, 20]]), 3

    def score(tokens):
        inputs = torch.tensor([[0, *tokens[:-1]]])
        logits = model(input_ids=source, decoder_input_ids=inputs).logits.log_softmax(-1)[0]
        return sum(logits[place, token].item() for place, token in enumerate(tokens))

    whole = [each[: each.index(1) + 1] if 1 in each else each for each in itertools.product(range(5), repeat=longest)]
    best = max(set(whole), key=score)
    settings = {"num_beams": 80, "length_penalty": 0.0, "max_new_tokens": longest, "do_sample": False}
    for use_cache in (True, False):
        found = model.generate(source, use_cache=use_cache, **settings)[0].tolist()
        assert found[1 : 1 + len(best)] == list(best)


# --- compact -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_compact_model_computes_what_the_masked_one_does():
    """Oracle: the masked model. The decoder's first block loses all heads: its cache must go on counting tokens."""
    model, data = random_model(), examples("seq2seq", 6)
    model.generation_config.eos_token_id = ENDS
    layer, other = model.model.decoder.layers[0], model.model.encoder.layers[1]
    layer.self_attention.o.weight.zero_()
    layer.cross_attention.o.weight[:, :8] = 0
    other.self_attention.o.weight[:, 8:24] = 0
    other.feed_forward.wo.weight[:, :20] = 0
    model.model.encoder.layers[0].feed_forward.wo.weight.zero_()
    compact, _ = make_compact(model, {})
    assert compact.config.kept_heads["model.decoder.layers.0.self_attention"] == []
    assert compact.config.kept_heads["model.decoder.layers.0.cross_attention"] == [1, 2, 3]
    assert compact.config.kept_heads["model.encoder.layers.1.self_attention"] == [0, 3]
    assert compact.config.kept_neurons["model.encoder.layers.1.feed_forward"] == 28
    assert compact.config.kept_neurons["model.encoder.layers.0.feed_forward"] == 0
    assert len(find_blocks(compact)) == len(find_blocks(model)) - 2
    batch = padded_batch("seq2seq")
    torch.testing.assert_close(compact(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    for beams in (1, 3):
        assert token_rows(compact, data, beams=beams) == token_rows(model, data, beams=beams)
    again, _ = make_compact(compact, {})
    assert again.config.kept_heads == compact.config.kept_heads and same_state(again, compact)


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_a_vocabulary_gives_back_what_it_was_made_of(workshop):
    """Oracle: the texts themselves."""
    texts = [german for _, german in pairs_of(workshop, "train")]
    tokenizer = from_scratch.bpe(texts, 60, 128)
    assert len(tokenizer) <= 60 and tokenizer.convert_tokens_to_ids(list(from_scratch.SPECIAL)) == [0, 1, 2, 3]
    for text in (*texts, "Hund Katze Kind"):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 3 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert 0 in tokenizer("日本")["input_ids"]
    again = from_scratch.bpe(texts, 60, 128)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_pair_reads_with_the_source_and_writes_with_the_target():
    source, target = (from_scratch.bpe([text] * 2, 60, 128) for text in ("the dog sees", "das Tier sieht"))
    pair = PairedTokenizer(source, target)
    assert pair("the dog")["input_ids"] == source("the dog")["input_ids"]
    ids = pair(text_target=["das Tier"])["input_ids"]
    assert ids == [target("das Tier")["input_ids"]] != [source("das Tier")["input_ids"]]
    assert pair.batch_decode(ids, skip_special_tokens=True) == ["das Tier"]


# --- from scratch, and on ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    """A folder with a model that was trained on the tiny data."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--data", workshop / "data" / "t5", "-o", folder, "--quiet", *TRAINED)
    assert load_script("download_model.py").main(["seq2seq", *map(str, flags)]) == 0
    return folder


def test_what_was_trained_says_how_and_is_kept(trained, workshop, succeeds, monkeypatch):
    monkeypatch.chdir(trained)
    record = read_json(Path("model/seq2seq/record.json"))
    assert record["task"] == "translation" and record["measured"]["epochs"] == 4
    assert record["tokenizer"] == {"folder": "../tokenizer/seq2seq"}
    assert (trained / "model" / record["data"]["folder"]).samefile(workshop / "data" / "t5")
    loaded = load_model("model/seq2seq")
    tokenizer = load_tokenizer(None, loaded)
    config = loaded.model.config
    assert (config.source_vocab_size, config.vocab_size) == (len(tokenizer.source), len(tokenizer.target))
    assert record["measured"]["val_loss"] < math.log(config.vocab_size)  # of guessing
    data = ("--data", workshop / "data" / "t5")
    assert succeeds("download_model.py", "seq2seq", *data, *TRAINED)["skipped"]


def test_it_goes_through_the_stages_with_its_two_tokenizers(trained, succeeds, monkeypatch):
    monkeypatch.chdir(trained)
    succeeds("config_generator.py", "--attention", 0.5, "--linear", 0, "--feed-forward", 0.5, "-n", 1)
    succeeds("prune_scheme_generator.py")
    succeeds("prune.py")
    succeeds("block-level_finetuning.py", "--method", "reconstruct", "--calibration", 32)
    succeeds("compose_model.py", "-n", 0, "-o", "composed")
    succeeds("compose_model.py", "-n", 0, "-o", "compact", "--compact")
    scores = succeeds("evaluate-t5.py", "-m", "composed", "compact", "--limit", 4, "--beams", 2, "--max-new-tokens", 8)
    assert scores["models"][0]["bleu"] == scores["models"][1]["bleu"]
    batch = padded_batch("seq2seq")
    batch = {name: ids.clamp(max=20) for name, ids in batch.items()}
    with torch.no_grad():
        masked, small = (load_model(path).model(**batch).logits for path in ("composed", "compact"))
    torch.testing.assert_close(small, masked, rtol=1e-5, atol=1e-5)
    adopted = succeeds("download_model.py", "seq2seq", "--checkpoint", "compact", "--name", "adopted")
    assert adopted["parameters"] == scores["models"][1]["parameters"]
    assert load_tokenizer(None, load_model("model/adopted"))(text_target="das")["input_ids"]


PROGRAM = """
import sys, torch, transformers
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
source, target = (transformers.AutoTokenizer.from_pretrained(folder) for folder in sys.argv[2:])
tokens = model.generate(**source("the dog sees a cat", return_tensors="pt", return_token_type_ids=False),
                        max_new_tokens=8, do_sample=False)
print(tokens[0].tolist(), target.decode(tokens[0], skip_special_tokens=True), sep="|")
assert not any(name.split(".")[0] == "common" for name in sys.modules)
"""


def test_its_folders_load_without_the_suite(trained, tmp_path):
    """Oracle: the suite's own reading."""
    parts = [trained / "model/seq2seq", trained / "tokenizer/seq2seq", trained / "tokenizer/seq2seq/target"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, parts)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = load_model(parts[0])
    tokenizer = load_tokenizer(None, loaded)
    ids = torch.tensor([tokenizer("the dog sees a cat")["input_ids"]])
    tokens = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]
    assert done.stdout.strip() == f"{tokens[0].tolist()}|{text}".strip()


def test_a_training_that_was_stopped_goes_on_to_the_same_model(workshop, tmp_path, monkeypatch):
    """Oracle: the training that was not."""
    settings = dict(d_model=32, layers=1, feed_forward_size=48, vocabulary=60, epochs=2, batch_size=16, lr=1e-3)

    def train(name):
        checkpoint = Checkpoint(tmp_path / name, "0" * 64, {"model": "0" * 64})
        return from_scratch.train(
            workshop / "data" / "t5", settings, precision="fp32", seed=0, device=CPU, talk=QUIET, checkpoint=checkpoint
        )

    whole, _, measured = train("whole")
    save = Checkpoint.save

    def stop_after_one(self, learners, rows, partial=None):
        save(self, learners, rows, partial)
        if rows[-1][0] == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    resumed, _, again = train("stopped")
    assert same_state(resumed, whole) and again["val_loss"] == measured["val_loss"]


def test_only_our_own_model_types_may_name_code(call, tmp_path, monkeypatch):
    for config, is_own in ((seq2seq_config(), True), (transformers.T5Config(), False)):
        settings = json.loads(config.to_json_string()) | {"auto_map": {"AutoConfig": "code.Config"}}
        if is_own:
            assert check_config("config.json", settings) == "seq2seq"
        else:
            with pytest.raises(UserError, match="'auto_map' names code"):
                check_config("config.json", settings)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("download_model.py", "t5", "--d-model", 64)
    assert code == 2 and "--d-model: is for a seq2seq model that is trained here" in err
