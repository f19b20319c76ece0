"""Smaller vocabularies, for each kind of tokenizer: the same pieces, logits and translations as the original's."""

import json
import random
from collections import Counter
from functools import partial

import pytest
import torch
import transformers
from helpers import fails, read_json, run
from tiny import DEBERTA, ROBERTA, caption, classifier, seq2seq, t5_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from common.data.examples import Examples
from common.data.tasks import TASKS
from common.models.tokenizer import PairedTokenizer, read_tokenizer, vocabularies
from common.models.vocabulary import DATA, check_same, choose_vocabulary
from common.runtime.errors import UserError
from common.training.scratch.train import bpe, marian_config

ROWS = 8  # of a model's embeddings that its tokenizer has no tokens for
# Texts of which the data are a few, so that most of a vocabulary can go.
TEXTS = [caption(random.Random(number)) for number in range(60)]
WORDS = sorted({word for pair in TEXTS for text in pair for word in text.split()})
LETTERS = sorted({letter for word in WORDS for letter in word})
START = ["<s>", "<pad>", "</s>", "<unk>"]


def unigram(start, end=()):
    """Pieces with scores: special tokens, words, parts of words, letters."""
    parts = sorted({word[i : i + 3] for word in WORDS for i in range(len(word) - 2)})
    pieces = {f"▁{word}": -4 - len(word) / 9 for word in WORDS} | {part: -5 - i / 99 for i, part in enumerate(parts)}
    pieces |= {"▁": -6.0} | {letter: -7 - i / 99 for i, letter in enumerate(LETTERS)}
    return [*((token, 0.0) for token in start), *pieces.items(), *((token, 0.0) for token in end)]


def mbart(tokenizer_class=transformers.MBartTokenizer):
    codes = tokenizer_class().all_special_tokens
    vocabulary = unigram(START, [code for code in codes if "_" in code] + ["<mask>"])
    return tokenizer_class(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE")


def with_byte_fallback():
    """Its letters are bytes alone."""
    pieces = unigram(["<pad>", "</s>", "<unk>"], [f"<0x{number:02X}>" for number in range(256)])
    pieces = [(piece, score) for piece, score in pieces if piece not in LETTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return fast(tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tokenizer, trainers.BpeTrainer(special_tokens=START, initial_alphabet=alphabet, show_progress=False))
    model = read(tokenizer)
    return transformers.RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def nllb():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    train(tokenizer, trainers.BpeTrainer(vocab_size=150, special_tokens=START, show_progress=False))
    merges = {"merges": [tuple(merge) for merge in read(tokenizer)["merges"]]}
    languages = {"src_lang": "eng_Latn", "tgt_lang": "deu_Latn"}
    return transformers.NllbTokenizer(vocab=read(tokenizer)["vocab"], **merges, **languages)


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    train(tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    return transformers.BertTokenizer(vocab=read(tokenizer)["vocab"], do_lower_case=False)


def train(tokenizer, trainer):
    tokenizer.train_from_iterator([text for pair in TEXTS for text in pair], trainer)


def read(tokenizer):
    return json.loads(tokenizer.to_str())["model"]


def fast(tokenizer, **special):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def word_level():
    """A word that no text has stands before the padding token, from whose number RoBERTa counts positions."""
    tokens = {token: i for i, token in enumerate(["[CLS]", "never", "[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")


def t5_model(size, tokenizer=None):
    model = transformers.T5ForConditionalGeneration(t5_config(vocab_size=size, initializer_factor=3.0))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))  # tied, it would echo
    return model


def bart_like(name, **settings):
    def make(size, tokenizer):
        ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "eos")}
        language = {"MBart": "de_DE", "M2M100": "deu_Latn"}.get(name)
        answers = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(language)} if language else {}
        ids |= {"decoder_start_token_id": ids["eos_token_id"]}
        model = seq2seq(name, answers, vocab_size=size, **ids, **settings)
        if name != "M2M100":  # which has none
            torch.nn.init.normal_(model.final_logits_bias)
        return model

    return make


def marian(sizes, tokenizer):
    shape = {"layers": 1, "feed_forward_size": 48, "d_model": 32}
    config = marian_config(tokenizer, shape)
    config.vocab_size, config.decoder_vocab_size = sizes
    model = transformers.MarianMTModel(config)
    torch.nn.init.normal_(model.final_logits_bias)
    return model


def bert_like(name, **settings):
    return lambda size, tokenizer: classifier(name, vocab_size=size, **settings)


KINDS = {  # kind: (tokenizer, model)
    "Unigram, T5": (
        lambda: transformers.T5Tokenizer(
            vocab=unigram(["<pad>", "</s>", "<unk>"], ["<extra_id_1>", "<extra_id_0>"]), extra_ids=2
        ),
        t5_model,
    ),
    "Unigram, mBART": (mbart, bart_like("MBart")),
    "Unigram, mBART-50": (partial(mbart, transformers.MBart50Tokenizer), bart_like("MBart")),
    "Unigram, Pegasus": (
        lambda: transformers.PegasusTokenizer(
            vocab=unigram(["<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk_2>", "<unk>"]), offset=3
        ),
        bart_like("Pegasus"),
    ),
    "Unigram, XLM-R": (
        lambda: transformers.XLMRobertaTokenizer(vocab=unigram(START, ["<mask>"])),
        bert_like("XLMRoberta", **ROBERTA | {"max_position_embeddings": 66}),
    ),
    "Unigram, DeBERTa": (
        lambda: transformers.DebertaV2Tokenizer(vocab=unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ["[MASK]"])),
        bert_like("DebertaV2", **DEBERTA),
    ),
    "Unigram with bytes": (with_byte_fallback, t5_model),
    "byte-level BPE, BART": (byte_level, bart_like("Bart")),
    "byte-level BPE, RoBERTa": (byte_level, bert_like("Roberta", **ROBERTA | {"max_position_embeddings": 66})),
    "two BPEs, Marian": (lambda: PairedTokenizer(*(bpe(texts, 150, 128) for texts in zip(*TEXTS))), marian),
    "WordPiece, BERT": (wordpiece, bert_like("Bert")),
    "BPE, NLLB": (nllb, bart_like("M2M100")),
    "words, RoBERTa": (
        word_level,
        bert_like("Roberta", **ROBERTA | {"pad_token_id": 2, "max_position_embeddings": 67}),
    ),
}


def opened(kind, folder):
    """(a kind's model, and its tokenizer as it is read from a folder)."""
    make_tokenizer, make_model = KINDS[kind]
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    if isinstance(tokenizer, PairedTokenizer):
        sizes = [len(tokenizer.source) + ROWS, len(tokenizer.target) + ROWS]
        both = [read_tokenizer(path, size) for path, size in zip((folder, folder / "target"), sizes)]
        return make_model(sizes, tokenizer).eval(), PairedTokenizer(*both)
    tokenizer = read_tokenizer(folder, 10**6)
    return make_model(len(tokenizer) + ROWS, tokenizer).eval(), tokenizer


def examples(tokenizer, model, pairs):
    task = TASKS["translation" if model.can_generate() else "classification"]
    inputs = tokenizer([source for source, _ in pairs])["input_ids"]
    targets = task.targets([target if model.can_generate() else 1 for _, target in pairs], tokenizer)
    return Examples(task, inputs, targets, pairs, tokenizer.pad_token_id)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_the_data_are_read_as_before_and_what_stays_has_the_same_logits(kind, tmp_path):
    """Oracles: the original's tokenizer, its logits of the tokens that stay, and its own choice among these."""
    model, tokenizer = opened(kind, tmp_path / "before")
    data = TEXTS[:2]
    before = examples(tokenizer, model, data)
    vocabulary = choose_vocabulary(DATA, model, tokenizer, before)
    smaller, (kept, target_kept) = vocabulary.trim(model), vocabulary.kept
    assert len(target_kept) < vocabularies(model.config)[1] - ROWS - 10
    assert smaller.get_input_embeddings().num_embeddings == smaller.config.vocab_size == len(kept)

    smaller.save_pretrained(tmp_path / "after")
    vocabulary.tokenizer.save_pretrained(tmp_path / "after")
    smaller = type(smaller).from_pretrained(tmp_path / "after").eval()
    if isinstance(tokenizer, PairedTokenizer):
        sides = zip((tmp_path / "after", tmp_path / "after" / "target"), vocabulary.kept)
        after = PairedTokenizer(*(read_tokenizer(path, len(numbers)) for path, numbers in sides))
    else:
        after = read_tokenizer(tmp_path / "after", len(kept))
    reread = examples(after, model, data)
    check_same(before, reread, vocabulary)
    assert [[kept[token] for token in row] for row in reread.inputs] == before.inputs

    batch, new_batch = before.batch(range(2)), reread.batch(range(2))
    with torch.no_grad():
        expected, logits = model(**batch).logits, smaller(**new_batch).logits
    if not model.can_generate():
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
        return
    assert [[target_kept[token] for token in row] for row in reread.targets] == before.targets
    torch.testing.assert_close(logits, expected[..., target_kept], rtol=0, atol=1e-6)
    gone = sorted(set(range(expected.shape[-1])) - set(target_kept))
    search = {"do_sample": False, "num_beams": 1, "max_new_tokens": 12}
    del batch["labels"], new_batch["labels"]
    translations = model.generate(**batch, **search, suppress_tokens=gone)
    assert [[target_kept[token] for token in row] for row in smaller.generate(**new_batch, **search)] == (
        translations.tolist()
    )
    assert after.batch_decode(reread.targets, skip_special_tokens=True) == (
        tokenizer.batch_decode(before.targets, skip_special_tokens=True)
    )


def test_other_texts_can_still_be_spelt_and_any_data_is_read_as_before(kind, tmp_path):
    """Oracle: the original's tokenizer, for data drawn at random; what it knows by letters or bytes stays known."""
    model, tokenizer = opened(kind, tmp_path)
    draw = random.Random(0)
    for _ in range(5):
        data = draw.sample(TEXTS, 3)
        before = examples(tokenizer, model, data)
        vocabulary = choose_vocabulary(DATA, model, tokenizer, before)
        check_same(before, examples(vocabulary.tokenizer, model, data), vocabulary)
    if not kind.startswith("words"):
        source = getattr(vocabulary.tokenizer, "source", vocabulary.tokenizer)
        rows = source([source for source, _ in TEXTS])["input_ids"]
        assert not any(source.unk_token_id in row for row in rows)


@pytest.mark.parametrize("kind", ["Unigram, T5", "two BPEs, Marian", "WordPiece, BERT"])
def test_a_number_of_tokens_is_kept_to_and_the_most_frequent_ones_stay(kind, tmp_path):
    """Oracle: the counts in the data."""
    model, tokenizer = opened(kind, tmp_path)
    before = examples(tokenizer, model, TEXTS)
    least = choose_vocabulary(DATA, model, tokenizer, examples(tokenizer, model, [("e", "e")])).kept[0]
    vocabulary = choose_vocabulary(len(least) + 9, model, tokenizer, before)
    assert all(len(kept) <= len(least) + 9 for kept in vocabulary.kept)
    counts = Counter(token for row in before.inputs for token in row if token not in least)
    if not model.can_generate():
        assert set(vocabulary.kept[0]) - set(least) == {token for token, _ in counts.most_common(9)}
    with pytest.raises(UserError, match="tokens stay in any case"):
        choose_vocabulary(10, model, tokenizer, before)


def test_the_stages_write_a_folder_with_a_tokenizer_of_its_own(chain, t5, here):
    """Oracle: the same commands without the flag. Of 64 rows of embeddings the data need some 30."""
    flags = f"-m {t5} -p {chain}/tuned -c {chain}/conf.json -n 0"
    whole = run(f"compose_model.py {flags} -o whole --compact")
    small = run(f"compose_model.py {flags} -o small --compact --vocabulary data")
    known = small["vocabulary"]["vocabulary_after"]
    assert known < small["vocabulary"]["vocabulary_before"] < 64
    assert small["parameters"] == whole["parameters"] - 32 * (64 - known)
    assert small["vocabulary"]["tokens_after"] == small["vocabulary"]["tokens_before"]
    record = read_json(here / "small" / "record.json")
    assert record["vocabulary"] == small["vocabulary"] and record["made_from"]["vocabulary"] == "data"
    assert f"{known} tokens" in (here / "small" / "README.md").read_text()
    assert len(read_tokenizer("small", known)) == known

    (here / "small").rename(here / "moved")
    evaluate = "evaluate-t5.py --split train --limit 8 --max-new-tokens 8"
    scores = run(f"{evaluate} -m whole moved --report report-{{name}}.json")["models"]
    assert scores[1]["parameters"] == small["parameters"] and scores[1]["chrf"] == pytest.approx(scores[0]["chrf"])
    assert "knows" in fails(f"{evaluate} -m moved -t {t5.parent.parent}/tokenizer/t5")

    tune = f"model-level_finetuning.py {flags} --epochs 1 --batch-size 8 -o tuned"
    tuned = run(f"{tune} --vocabulary data --distill 0.5 --metric-for-best chrf")
    assert tuned["val_loss_before"] < run(f"{tune}-whole --distill 0.5")["val_loss_before"]  # of fewer classes
    assert run(f"{tune} --vocabulary data --distill 0.5 --metric-for-best chrf")["skipped"]
    assert "vocabulary: 'data' there, null asked for" in fails(f"{tune} --distill 0.5 --metric-for-best chrf")
    assert run("evaluate-t5.py -m tuned --limit 4 --max-new-tokens 4")["parameters"] == tuned["parameters"]


def test_what_cannot_be_rewritten_is_refused_by_name(chain, t5, here):
    flags = f"-m {t5} -p {chain}/tuned -c {chain}/conf.json -n 0"
    assert "tokens stay in any case" in fails(f"compose_model.py {flags} --vocabulary 3")
    assert "holds no tokenizer" in fails(f"compose_model.py {flags} --vocabulary data -o a.pth")
    assert "--data: is read for --vocabulary alone" in fails(f"compose_model.py {flags} --data x")
    assert "a number of tokens, or data" in fails(f"compose_model.py {flags} --vocabulary all")
    with pytest.raises(UserError, match="ByT5Tokenizer has no tokenizer.json"):
        model, tokenizer = t5_model(400), transformers.ByT5Tokenizer()
        choose_vocabulary(DATA, model, tokenizer, examples(tokenizer, model, TEXTS))
