"""Tiny models, tokenizers and data, built from configs: offline, in well under a second each."""

import contextlib
import json
import shutil
import signal

import pytest
import torch
from helpers import run
from tiny import CLASSIFIERS, KINDS, build_model, build_tokenizer, make_workshop, t5_config, transformers

from common.evaluation import cost as report
from common.runtime import progress

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)
progress.WAIT_SECONDS = 1e6  # else a slow machine would have two lines on stderr where a refusal is to have one
report.ROUNDS, report.WARM_UP = 1, 0  # seconds are not looked at
torch.set_num_threads(1)  # the models are far too small for more


@pytest.fixture(autouse=True)
def tried_here_alone(request, monkeypatch):
    """Where that is looked at, folders are tried in a process of their own; elsewhere it takes a second for each."""
    if request.module.__name__ not in ("test_afresh", "test_ctranslate", "test_onnx"):
        monkeypatch.setattr("common.cli.open.afresh_check", lambda *_: None)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with, for "t5" and "distilbert", model/KIND, tokenizer/KIND and data/KIND."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="session")
def t5(workshop):
    """The folder of the tiny T5, whose record names its tokenizer and data."""
    return workshop / "model" / "t5"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the working folder as long as the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def chain(workshop, tmp_path_factory):
    """Every stage run once on the tiny T5, for three configurations: the folder that holds the outputs."""
    folder = tmp_path_factory.mktemp("chain")
    with contextlib.chdir(folder):
        model = f"-m {workshop}/model/t5"
        run(f"config_generator.py {model} --attention 0.25 0.5 0.25 --linear 0.3 0.3 0.5 -n 3")
        run("prune_scheme_generator.py")
        run(f"prune.py {model} -o pruned")
        training = "--epochs 2 --batch-size 8"
        run(f"block-level_finetuning.py {model} -p pruned -o tuned --stats blocks.csv --method train {training}")
        for n in range(3):
            run(f"compose_model.py {model} -p tuned -n {n} -o composed-{n}")
        for library in ("pruned", "tuned"):
            files = f"-o {library}-0.pth --stats {library}-0.csv"
            run(f"model-level_finetuning.py {model} -p {library} -n 0 {files} {training}")
    return folder


@pytest.fixture
def model_of(workshop, tmp_path):
    """model_of(kind): the folder of a tiny model whose record names a tokenizer and data of the workshop."""

    def make(kind):
        like = "distilbert" if kind in CLASSIFIERS else "t5"
        folder = tmp_path / "model" / kind
        build_model(kind).save_pretrained(folder)
        build_tokenizer(kind).save_pretrained(tmp_path / "tokenizer" / kind)
        shutil.copytree(workshop / "data" / like, tmp_path / "data" / kind)
        record = {"tokenizer": {"folder": f"../tokenizer/{kind}"}, "data": {"folder": f"../data/{kind}"}}
        (folder / "record.json").write_text(json.dumps(record))
        return folder

    return make


@pytest.fixture(scope="session")
def teacher(workshop):
    return transformers.T5ForConditionalGeneration.from_pretrained(workshop / "model" / "t5").eval()


@pytest.fixture(scope="session")
def tokenizer(workshop):
    return transformers.AutoTokenizer.from_pretrained(workshop / "tokenizer" / "t5")


@pytest.fixture(scope="session")
def other_model(workshop, tmp_path_factory):
    """A tiny T5 of the workshop's shape, with other weights."""
    folder = tmp_path_factory.mktemp("other") / "t5"
    torch.manual_seed(1)
    transformers.T5ForConditionalGeneration(t5_config()).save_pretrained(folder)
    shutil.copy(workshop / "model" / "t5" / "record.json", folder)
    return folder


@pytest.fixture(params=KINDS)
def setting(request):
    """(model with biases that matter, its family's name)"""
    model = build_model(request.param)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lin.bias") or "lin1.bias" in name or "lin2.bias" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, KINDS[request.param]
