"""Model cards: what they say is what the records say, their snippet runs, and the hub's own reader understands them."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from helpers import ROOT, build_model, load_script, read_json
from huggingface_hub import ModelCard

from common.compact import make_compact
from common.models import load_model, save_model
from common.records import make_record, write_record

SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def written(workshop, tmp_path_factory):
    """A configuration of each tiny model, composed and fine-tuned, compact: {name: folder}."""
    folder = tmp_path_factory.mktemp("cards")

    def run(script, *arguments):
        assert load_script(script).main([*map(str, arguments), "--quiet"]) == 0

    for kind in ("t5", "distilbert"):
        model, conf, library = workshop / "model" / kind, folder / f"{kind}.json", folder / f"{kind}-pruned"
        rates = ["--attention", 0, 0.5, "--linear", 0, 0.25, "--feed-forward", 0, 0.5]
        run("config_generator.py", "-m", model, "-o", conf, *rates, "-n", 2)
        run("prune_scheme_generator.py", "-i", conf, "-o", folder / f"{kind}-scheme.json")
        run("prune.py", "-m", model, "-c", folder / f"{kind}-scheme.json", "-o", library)
        flags = ["-m", model, "-p", library, "-c", conf, "-n", 1]
        run("compose_model.py", *flags, "-o", folder / f"{kind}-composed", "--compact", "--dtype", "bfloat16")
        tuning = ["--epochs", 1, "--batch-size", 8, "--seed", 3]
        run("model-level_finetuning.py", *flags, *tuning, "-o", folder / f"{kind}-tuned")
    return folder


def card_of(folder):
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("kind", ["t5", "distilbert"])
def test_a_card_says_what_the_model_is(written, kind):
    """Oracle: the hub's own reader of cards for the header, and the record."""
    header = card_of(written / f"{kind}-composed").data.to_dict()
    translates = kind == "t5"
    assert header == {
        "base_model": kind,
        "library_name": "transformers",
        "metrics": ["bleu" if translates else "accuracy"],
        "pipeline_tag": "translation" if translates else "text-classification",
        "tags": ["composable-pruning", "pruned", "compact"],
        **({"language": ["en", "de"]} if translates else {}),
    }
    text = card_of(written / f"{kind}-tuned").text
    record = read_json(written / f"{kind}-tuned" / "record.json")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"By `model-level_finetuning.py` of composable-pruning {version}" in text
    for said in ("epochs 1", "batch size 8", "seed 3", "(pruned), saliency l1", "Configuration 1, mean rates: "):
        assert said in text, said
    assert f"| validation loss | {record['measured']['val_loss']:.6g} |" in text
    assert f"transformers {record['versions']['transformers']}" in text
    nonzero = load_model(written / f"{kind}-tuned").record["measured"]["nonzero_parameters"]
    assert f"{nonzero:,} of them not zero" in text


def test_what_was_removed_is_counted_on_the_masks(written):
    """By hand: half of the heads and neurons, and with them all their weights; a quarter of what is left of the rest.

    The tiny T5 has 6 attention blocks of 4 heads (4 Linears of 24 x 32) and 4 feed-forward ones of 48 neurons.
    """
    removed = read_json(written / "t5-tuned" / "record.json")["removed"]
    assert removed["attention"]["heads"] == [12, 24] and removed["feed_forward"]["neurons"] == [96, 192]
    weights, of = removed["attention"]["weights"]
    assert of == 6 * 4 * 24 * 32 and of // 2 < weights < of // 2 + of // 4
    weights, of = removed["feed_forward"]["weights"]
    assert of == 4 * 2 * 48 * 32 and of // 2 < weights < of // 2 + of // 4
    text = card_of(written / "t5-tuned").text
    assert "| attention: heads | 12 | 24 |" in text and f"| feed-forward: weights | {weights:,} | {of:,} |" in text


@pytest.mark.parametrize("name", ["t5-composed", "distilbert-tuned"])
def test_the_snippet_runs_as_it_stands(written, tmp_path, name):
    """In a process that knows nothing of the suite, in the folder that the model lies in."""
    text = card_of(written / name).text
    (snippet,) = SNIPPET.findall(text)
    assert ("trust_remote_code=True" in snippet) == ("composed" in name)
    assert ("It needs transformers >=4.56." in text) == ("composed" in name)
    environment = {each: value for each, value in os.environ.items() if each != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=written,
        text=True,
        capture_output=True,
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.strip()
    assert printed in ("LABEL_0", "LABEL_1") if name.startswith("distil") else printed.startswith("[")


def test_cards_name_no_place_of_this_machine_and_come_out_the_same(written, workshop, tmp_path):
    for card in written.glob("*/README.md"):
        assert (
            str(written) not in card.read_text()
            and str(workshop) not in card.read_text()
            and "/" not in str(card_of(card.parent).data.base_model)
        )
    model = build_model("t5")
    record = make_record("download_model.py", {"checkpoint": str(tmp_path)}, task="translation", base_model="a/b")
    for name in ("one", "two"):
        save_model(tmp_path / name / "m", model, record)
    one, two = ((tmp_path / name / "m" / "README.md").read_text() for name in ("one", "two"))
    assert one == two and str(tmp_path) not in one and "base_model: a/b" in one


def test_a_license_is_only_said_where_it_is_known(succeeds, workshop, tmp_path):
    """That of the card in the adopted folder goes through all stages."""
    checkpoint = tmp_path / "mine"
    model, tokenizer = load_model(workshop / "model" / "t5").model, workshop / "tokenizer" / "t5"
    model.save_pretrained(checkpoint)
    for path in tokenizer.iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\nMine.\n")
    succeeds("download_model.py", "t5", "--checkpoint", checkpoint, "-o", tmp_path, "--name", "adopted")
    adopted, conf = tmp_path / "model" / "adopted", tmp_path / "conf.json"
    assert (card_of(adopted).data.license, card_of(adopted).data.base_model) == ("apache-2.0", "mine")
    succeeds("config_generator.py", "-m", adopted, "-o", conf, "--attention", 0.5, "--linear", 0.5, "-n", 1)
    succeeds("prune_scheme_generator.py", "-i", conf, "-o", tmp_path / "scheme.json")
    succeeds("prune.py", "-m", adopted, "-c", tmp_path / "scheme.json", "-o", tmp_path / "pruned")
    succeeds("compose_model.py", "-m", adopted, "-p", tmp_path / "pruned", "-c", conf, "-n", 0, "-o", tmp_path / "c")
    card = card_of(tmp_path / "c")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "mine")
    assert "# mine, pruned" in card.text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"---\n: : :\n---\n", b"---\nlicense: [1]\n---\n", b"no header"])
def test_whatever_a_card_from_elsewhere_holds_is_no_license(tmp_path, content):
    save_model(tmp_path / "m", build_model("distilbert"), {})
    (tmp_path / "m" / "README.md").write_bytes(content)
    write_record(tmp_path / "m", {})
    assert load_model(tmp_path / "m").license == {}


@pytest.mark.parametrize("kind", ["bart", "marian", "bert"])
def test_every_family_has_a_card(tmp_path, kind):
    """Without a record it says what the model is and how to load it, and no more."""
    save_model(tmp_path / "plain", build_model(kind), {})
    save_model(tmp_path / "compact", make_compact(build_model(kind), {})[0], {})
    for name in ("plain", "compact"):
        card = card_of(tmp_path / name)
        assert card.data.to_dict() == {
            "library_name": "transformers",
            "tags": ["composable-pruning", *(["compact"] if name == "compact" else [])],
        }
        assert f'folder = "{name}"' in card.text and "The weights are float32." in card.text
