"""A Marian with two vocabularies, trained from scratch: its tokenizers, and its way through the stages."""

import math
from pathlib import Path

import pytest
import torch
from helpers import load_script, read_json, run
from tiny import padded_batch, pairs_of

from common.models.load import load_model, load_tokenizer
from common.models.tokenizer import PairedTokenizer
from common.training.scratch import train as from_scratch

TINY = ("--d-model", 32, "--layers", 1, "--vocabulary", 200)
TRAINED = (*TINY, "--epochs", 4, "--batch-size", 16, "--lr", 0.01)


@pytest.fixture(scope="module")
def trained(workshop, tmp_path_factory):
    """A folder with a model that was trained on the tiny data."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ("--data", workshop / "data" / "t5", "-o", folder, "--quiet", *TRAINED)
    assert load_script("download_model.py").main(["seq2seq", *map(str, flags)]) == 0
    return folder


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


def test_what_was_trained_has_two_vocabularies_and_says_how(trained, workshop, monkeypatch):
    monkeypatch.chdir(trained)
    record = read_json(Path("model/seq2seq/record.json"))
    assert record["task"] == "translation" and record["measured"]["epochs"] == 4
    assert (trained / "model" / record["data"]["folder"]).samefile(workshop / "data" / "t5")
    loaded = load_model("model/seq2seq")
    model, tokenizer = loaded.model, load_tokenizer(None, loaded)
    sizes = len(tokenizer.source), len(tokenizer.target)
    assert (model.config.model_type, model.config.vocab_size, model.config.decoder_vocab_size) == ("marian", *sizes)
    assert model.get_encoder().embed_tokens.num_embeddings == sizes[0]
    assert model.lm_head.out_features == sizes[1] and sizes[0] != sizes[1]
    assert record["measured"]["val_loss"] < math.log(sizes[1])  # of guessing
    assert run(f"download_model.py seq2seq --data {workshop}/data/t5", *TRAINED)["skipped"]


def test_it_goes_through_the_stages(trained, monkeypatch):
    monkeypatch.chdir(trained)
    run("config_generator.py --attention 0.5 --linear 0 --feed-forward 0.5 -n 1")
    run("prune_scheme_generator.py")
    run("prune.py")
    run("block-level_finetuning.py --method reconstruct --calibration 32")
    run("compose_model.py -n 0 -o composed")
    run("compose_model.py -n 0 -o compact --compact")
    tuning = ("--epochs", 1, "--epoch-size", 16, "--metric-for-best", "bleu")
    run("model-level_finetuning.py -n 0 -o tuned", *tuning)
    report = ("--limit", 4, "--beams", 2, "--max-new-tokens", 8, "--report", "report-{name}.json")
    scores = run("evaluate-t5.py -m composed compact", *report)
    assert scores["models"][0]["bleu"] == scores["models"][1]["bleu"]
    batch = {name: ids.clamp(max=20) for name, ids in padded_batch("marian").items()}
    with torch.no_grad():
        masked, small = (load_model(path).model(**batch).logits for path in ("composed", "compact"))
    torch.testing.assert_close(small, masked, rtol=1e-5, atol=1e-5)
    adopted = run("download_model.py marian --checkpoint compact --name adopted")
    assert adopted["parameters"] == scores["models"][1]["parameters"]
    assert load_tokenizer(None, load_model("model/adopted"))(text_target="das")["input_ids"]
