"""Models for many languages: what their tokenizers are told, what their answers begin with, and what is refused."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from helpers import fails, run
from tiny import seq2seq

from common.data.examples import load_examples
from common.data.sources import DataSource
from common.data.tasks import TASKS
from common.models.languages import set_languages
from common.models.load import data_source, load_model, load_tokenizer
from common.runtime.errors import UserError

GERMAN, FRENCH = ["ein Hund rennt im Park", "zwei Hund rennt"], ["un chien court dans le parc", "deux chien court"]
WORDS = sorted({word for text in GERMAN + FRENCH for word in text.split()})
PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
CODES = {  # of German and French
    "MBart": ("de_DE", "fr_XX"),
    "MBart50": ("de_DE", "fr_XX"),
    "Nllb": ("deu_Latn", "fra_Latn"),
    "M2M100": ("de", "fr"),
}


def pieces_of(folder):
    """A sentencepiece model of the texts, written into a folder: its pieces without special ones."""
    with open(folder / "spm", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(GERMAN + FRENCH), model_writer=handle, vocab_size=33, minloglevel=2
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm"))
    return [model.id_to_piece(i) for i in range(3, model.get_piece_size())]


def tokenizer_of(kind, folder, **settings):
    """A tiny tokenizer that nobody told any language."""
    if kind == "Nllb":
        names = [*(piece for piece, _ in PIECES[:4]), *sorted({"▁", *"".join(WORDS)})]
        return transformers.NllbTokenizer(vocab={name: i for i, name in enumerate(names)}, **settings)
    if kind != "M2M100":
        return getattr(transformers, f"{kind}Tokenizer")(vocab=PIECES, **settings)
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces_of(folder)]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return transformers.M2M100Tokenizer(folder / "vocab.json", folder / "spm", **settings)


def model_of(kind, tokenizer, generation=None):
    """A tiny model for many languages, as checkpoints are: an mBART does not say what answers begin with."""
    first = None if kind == "MBart" else 2
    special = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=first)
    torch.manual_seed(0)
    name = "M2M100" if kind in ("Nllb", "M2M100") else "MBart"
    tokens = 1 + max(tokenizer.get_vocab().values())
    if kind == "M2M100":
        tokens = max(tokens, 1 + max(tokenizer.lang_code_to_id.values()))
    model = seq2seq(name, generation, vocab_size=tokens, **special).eval()
    with torch.no_grad():  # answers are of words, not of languages
        model.get_input_embeddings().weight[len(PIECES) :] *= 0.1
    return model


def write(kind, generation=None, **settings):
    """A checkpoint `m`, and German and French text files in `corpus`."""
    Path("corpus").mkdir()
    tokenizer = tokenizer_of(kind, Path("."), **settings)
    tokenizer.save_pretrained("m")
    model_of(kind, tokenizer, generation).save_pretrained("m")
    for split in ("train", "val", "test"):
        for language, texts in (("de", GERMAN), ("fr", FRENCH)):
            Path(f"corpus/{split}.{language}").write_text("".join(f"{text}\n" for text in texts * 15))


ADOPT = "download_model.py --checkpoint m --data corpus --source-lang de --target-lang fr"


@pytest.mark.parametrize("kind", CODES)
def test_tokens_and_translations_are_those_of_transformers_alone(kind, here):
    """Oracle: the tokenizer of transformers made for two languages, and `generate` begun as is documented."""
    write(kind)
    run(ADOPT)
    source, target = CODES[kind]
    alone = transformers.AutoTokenizer.from_pretrained(Path("m"), src_lang=source, tgt_lang=target)
    code = alone(text_target="a")["input_ids"][-1 if kind == "MBart" else 0]
    assert alone.convert_ids_to_tokens(code).strip("_") == target
    loaded = load_model("model/m")
    examples = load_examples(data_source(None, loaded), "test", load_tokenizer(None, loaded), loaded.task)
    assert examples.inputs == alone(GERMAN * 15)["input_ids"]
    assert examples.targets == alone(text_target=FRENCH * 15)["input_ids"]

    run("evaluate-t5.py -m model/m --max-new-tokens 9 --save-predictions out.jsonl")
    predictions = [json.loads(line)["prediction"] for line in Path("out.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(Path("m"))
    begun = {"decoder_start_token_id": code} if kind == "MBart" else {"forced_bos_token_id": code}
    tokens = model.generate(**alone(GERMAN, return_tensors="pt", padding=True), **begun, max_new_tokens=9)
    assert predictions == alone.batch_decode(tokens, skip_special_tokens=True) * 15
    assert all(predictions) and begun.items() <= loaded.model.generation_config.to_dict().items()


# --- which language is meant -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, pair, expected",
    [
        ("Nllb", ("es", "et"), ("spa_Latn", "est_Latn")),  # Spanish is no est_Latn, although that begins with "es"
        ("Nllb", ("zho_Hant", "fa"), ("zho_Hant", "pes_Arab")),
        ("MBart", ("zh-CN", "eng"), ("zh_CN", "en_XX")),
        ("M2M100", ("de", "spa"), ("de", "es")),
    ],
)
def test_languages_are_found_among_the_tokenizers_own(tmp_path, kind, pair, expected):
    """By hand: ISO 639."""
    tokenizer, source = tokenizer_of(kind, tmp_path), DataSource(**said(*pair))
    model = model_of(kind, tokenizer)
    assert set_languages(tokenizer, model, source, TASKS["translation"]) == expected
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == expected


def said(source, target):
    return {"source_lang": source, "target_lang": target}


@pytest.mark.parametrize(
    "kind, given, settings, words",
    [
        ("Nllb", said("zh", "de"), {}, "--source-lang zh: may be several of the tokenizer's"),
        ("Nllb", said("de", "no"), {}, "--target-lang no: is none of the tokenizer's"),
        (
            "Nllb",
            said("de", "fr"),
            {"legacy_behaviour": True},
            "'legacy_behaviour': true puts languages where NLLB has",
        ),
        ("MBart50", {"source_column": "a", "target_column": "b"}, {}, "--source-lang and --target-lang: say which of"),
        ("MBart50", said("fr", "de"), {}, "--target-lang: is de_DE (20), but the model's answers begin with fr_XX"),
    ],
)
def test_what_may_be_another_language_is_refused(tmp_path, kind, given, settings, words):
    tokenizer = tokenizer_of(kind, tmp_path, **settings)
    model = model_of(kind, tokenizer, {"forced_bos_token_id": tokenizer.convert_tokens_to_ids("fr_XX")})
    with pytest.raises(UserError) as told:
        set_languages(tokenizer, model, DataSource(**given), TASKS["translation"])
    assert words in str(told.value)


def test_a_marian_with_several_targets_needs_one_in_front(tmp_path):
    """Without a mark such as >>fra<< it translates into any of them."""
    names = ["</s>", "<unk>", ">>fra<<", ">>deu<<", *pieces_of(tmp_path), "<pad>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    pieces, source = str(tmp_path / "spm"), DataSource()
    tokenizer = transformers.MarianTokenizer(vocab=str(tmp_path / "vocab.json"), source_spm=pieces, target_spm=pieces)
    with pytest.raises(UserError, match=r"--prefix: must begin with .* \(>>fra<<, >>deu<<\)"):
        set_languages(tokenizer, None, source, TASKS["translation"])
    assert set_languages(tokenizer, None, DataSource(prefix=">>fra<< "), TASKS["translation"]) is None
    assert tokenizer(">>fra<< ein")["input_ids"][0] == 2


def test_what_was_told_stays_with_the_model_and_its_tokenizer(here):
    """Where columns have other names, and where the languages could be several but the folder knows."""
    write("MBart50", src_lang="de_DE", tgt_lang="fr_XX")
    rows = [{"a": german, "b": french} for german, french in zip(GERMAN, FRENCH)] * 15
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("download_model.py --checkpoint m --train-file data.jsonl --source-column a --target-column b")
    told = fails("download_model.py --checkpoint model/m --name n --data corpus --source-lang fr --target-lang de")
    assert "--target-lang: is de_DE" in told and "begin with fr_XX, by its 'forced_bos_token_id'" in told
