"""Models on disk: what comes back against what was saved, fingerprints against each other."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import without_digests
from oracles import same_state
from tiny import build_model, build_tokenizer

from common.models.load import data_source, fingerprint, load_model, load_tokenizer, reference, resolve
from common.models.saving import damage, is_made, read_measured, save_model
from common.runtime.devices import resolve_device
from common.runtime.errors import UserError
from common.runtime.records import digest

KINDS = ["t5", "t5-gated", "distilbert"]
OUTPUTS = ["folder", "file.pth"]


# --- fingerprints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_change_of_any_weight_changes_the_fingerprint(kind):
    model = build_model(kind)
    prints = [fingerprint(model)]
    assert prints[0] == fingerprint(build_model(kind))
    for parameter in model.parameters():
        last = parameter.data.view(-1)[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(before, torch.tensor(torch.inf)))
        prints.append(fingerprint(model))
        last.copy_(before)
    assert len(set(prints)) == len(prints) == 1 + len(list(model.parameters()))
    assert fingerprint(model) == prints[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_fingerprint_is_the_same_from_a_folder_and_a_file(tmp_path, kind):
    model = build_model(kind)
    for output in OUTPUTS:
        save_model(tmp_path / output, model, {})
        assert fingerprint(load_model(tmp_path / output).model) == fingerprint(model), output


@pytest.mark.parametrize("kind, dtype", [("t5", torch.float16), ("distilbert", torch.bfloat16)])
def test_narrow_weights_have_the_fingerprint_of_their_float32_values(tmp_path, kind, dtype):
    narrow = build_model(kind).to(dtype)
    narrow.save_pretrained(tmp_path / "narrow")
    loaded = load_model(tmp_path / "narrow").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert fingerprint(loaded) == fingerprint(narrow) == fingerprint(build_model(kind).to(dtype).float())
    assert fingerprint(loaded) != fingerprint(build_model(kind))


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_model_comes_back_bit_for_bit(tmp_path, kind, output):
    model = build_model(kind).train()
    record = {"key": "k", "quality": {"bleu": 1.5}, "tokenizer": None}
    if kind != "distilbert":
        model.generation_config.num_beams = 3
        model.generation_config.max_length = 77
    save_model(tmp_path / output, model, record)
    loaded = load_model(tmp_path / output)
    assert same_state(loaded.model, model) and without_digests(loaded.record) == record
    assert not any(module.training for module in loaded.model.modules())
    assert type(loaded.model) is type(model)
    if kind != "distilbert":
        assert (loaded.model.generation_config.num_beams, loaded.model.generation_config.max_length) == (3, 77)
        assert loaded.model.get_input_embeddings().weight is loaded.model.lm_head.weight  # still tied


def test_a_folder_is_one_of_hugging_face_and_holds_the_tokenizer(tmp_path):
    """Oracle: transformers' own Auto classes."""
    model, tokenizer = build_model("t5"), build_tokenizer("t5")
    save_model(tmp_path / "m", model, {"key": "k"}, tokenizer=tokenizer)
    assert same_state(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m"), model)
    text = "the dog sees a cat"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")(text).input_ids == tokenizer(text).input_ids
    assert [path.name for path in (tmp_path / "m").glob("*.bin")] == []
    assert without_digests(json.loads((tmp_path / "m" / "record.json").read_text())) == {"key": "k"}


# --- what is there already -----------------------------------------------------------------------------------------

MADE_FROM = {"model": "fingerprint", "lr": 0.1}
RECORD = {"script": "compose_model.py", "key": digest(MADE_FROM), "made_from": MADE_FROM, "measured": {"val_loss": 1.0}}


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_model_that_is_there_is_known_by_its_record(tmp_path, output):
    path = tmp_path / output
    assert not is_made(path, MADE_FROM, False, "compose_model.py")
    save_model(path, build_model("t5"), RECORD)
    assert is_made(path, MADE_FROM, False, "compose_model.py") and read_measured(path) == {"val_loss": 1.0}
    with pytest.raises(UserError, match="lr: 0.1 there, 0.2 asked for"):
        is_made(path, MADE_FROM | {"lr": 0.2}, False, "compose_model.py")
    assert not is_made(path, MADE_FROM | {"lr": 0.2}, True, "compose_model.py")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no such output of this script"):
            is_made(path, MADE_FROM, overwrite, "model-level_finetuning.py")


def flip_last_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "output, spoil",
    [
        ("folder", lambda path: (path / "model.safetensors").unlink()),
        ("folder", lambda path: flip_last_bit(path / "model.safetensors")),
        ("folder", lambda path: flip_last_bit(path / "config.json")),
        ("folder", lambda path: change_record(path, key="other", measured=None)),
        ("file.pth", lambda path: flip_in_weights(path)),
    ],
    ids=["no weights", "weights", "config", "record", "pth"],
)
def test_a_damaged_model_does_not_count_as_done_and_overwrite_mends_it(tmp_path, output, spoil):
    path = tmp_path / output
    save_model(path, build_model("t5"), RECORD)
    assert damage(path) is None
    spoil(path)
    assert str(path) in damage(path)
    with pytest.raises(UserError, match="--overwrite"):
        is_made(path, MADE_FROM, False, "compose_model.py")
    assert not is_made(path, MADE_FROM, True, "compose_model.py")
    with pytest.raises(UserError, match=str(path)):
        load_model(path)


def change_record(folder, **changes):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | changes))


def flip_in_weights(path):
    """Flip a bit of a weight within a `.pth`; torch itself checks no sums."""
    weight = build_model("t5").state_dict()["shared.weight"].numpy().tobytes()
    content = path.read_bytes()
    place = content.index(weight)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


# --- references ----------------------------------------------------------------------------------------------------


def test_references_hold_when_the_whole_tree_moves(tmp_path):
    tree = tmp_path / "old"
    for name in ("model/x", "tokenizer/x", "data/x"):
        (tree / name).mkdir(parents=True)
    names = {name: reference(tree / name / "x", tree / "model" / "x") for name in ("tokenizer", "data")}
    beside = reference(tree / "tokenizer" / "x", tree / "results.pth")
    tree.rename(tmp_path / "new")
    for name, found in names.items():
        assert (tmp_path / "new" / name / "x").samefile(resolve(found, tmp_path / "new" / "model" / "x"))
    assert (tmp_path / "new" / "tokenizer" / "x").samefile(resolve(beside, tmp_path / "new" / "results.pth"))


def test_data_come_from_the_flag_the_record_or_the_family_in_this_order(workshop):
    loaded = load_model(workshop / "model" / "t5")
    assert data_source("given", loaded).data == "given"
    assert (workshop / "data" / "t5").samefile(data_source(None, loaded).data)
    loaded.record = {}
    assert data_source(None, loaded).data == "bentrevett/multi30k"


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_comes_from_the_flag_the_models_folder_or_the_record_in_this_order(tmp_path, workshop):
    """The three hold different vocabularies, so the length tells which it was."""
    folder = shutil.copytree(workshop / "model" / "t5", tmp_path / "model" / "t5")
    lengths = {}
    for name, extra in (("given", 1), ("tokenizer/t5", 2), ("model/t5", 3)):
        tokenizer = build_tokenizer("t5")
        tokenizer.add_tokens([f"extra{i}" for i in range(extra)])
        tokenizer.save_pretrained(tmp_path / name)
        lengths[name] = len(tokenizer)
    loaded = load_model(folder)
    assert len(load_tokenizer(tmp_path / "given", loaded)) == lengths["given"]
    assert len(load_tokenizer(None, loaded)) == lengths["model/t5"]
    (folder / "tokenizer_config.json").unlink()
    assert len(load_tokenizer(None, loaded)) == lengths["tokenizer/t5"]


@pytest.mark.parametrize(
    "given, words", [("absent", "download_model.py saves one to ./tokenizer/"), (None, "give its folder with -t")]
)
def test_an_absent_tokenizer_is_reported_with_the_remedy(tmp_path, given, words):
    save_model(tmp_path / "m", build_model("t5"), {"tokenizer": {"folder": "gone"}})
    with pytest.raises(UserError) as error:
        load_tokenizer(given and tmp_path / given, load_model(tmp_path / "m"))
    assert "is not a tokenizer folder" in str(error.value) and words in str(error.value)


# --- devices and downloads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "cuda:99", "xla"])
def test_a_device_that_is_not_there_is_reported_in_one_line(name):
    with pytest.raises(UserError, match=f"--device {name}: cannot be used here") as error:
        resolve_device(name)
    assert "\n" not in str(error.value)


def test_auto_is_cuda_if_there_is_one_else_cpu(monkeypatch):
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device("auto").type == kind
    assert resolve_device("cpu") == torch.device("cpu")
