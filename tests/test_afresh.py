"""A folder is loaded in a process of its own before it takes its place; what does not work there is not kept."""

import re

import pytest
from helpers import fails, run
from safetensors.torch import load_file, save_file
from tiny import build_tokenizer

from common.models import saving, trial


@pytest.fixture
def composing(t5, chain, here):
    return f"compose_model.py -m {t5} -p {chain}/tuned -c {chain}/conf.json -n 1 -o out"


def scaled(folder):
    """The weights of one Linear are others than those in memory."""
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"] *= 3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_code(folder):
    (folder / "modeling_compact.py").unlink()


def other_tokenizer(folder):
    build_tokenizer("distilbert").save_pretrained(folder)


def cut_short(folder):
    (folder / "model.bin").write_bytes((folder / "model.bin").read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, form, words",
    [
        (scaled, "--compact", r"its logits are \d+% of their range off"),
        (without_code, "--compact", "modeling_compact.py"),
        (other_tokenizer, "--compact", "its tokenizer reads 'A text.' as"),
        (cut_short, "--format ctranslate2", "RuntimeError: "),
    ],
)
def test_a_folder_that_does_not_work_is_not_kept(composing, here, monkeypatch, damage, form, words):
    """Damaged behind the stage's back, as a mistake of ours or of a library would do it."""
    write = saving.write_record
    monkeypatch.setattr(saving, "write_record", lambda folder, record: (write(folder, record), damage(folder)))
    err = fails(f"{composing} {form}")
    assert "out: not written: loaded in a process of its own" in err
    assert re.search(words, err)
    assert list(here.iterdir()) == []


def test_a_process_that_dies_is_told_and_the_next_folder_has_another(composing, here, monkeypatch):
    trial.fresh_process.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(trial.afresh, "__file__", here / "none.py")
        assert "the process ended with code 2" in fails(f"{composing} --compact")
    assert run(f"{composing} --compact")["plain"] is False
