"""The documents against the code: links, flags, tables, examples of files; recipes, followed."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SCRIPTS, load_script, read_json, section, snippets

from common.blocks.defaults import study_of
from common.blocks.families import FAMILIES, REFUSED
from common.data.tasks import TASKS

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
FOREIGN = {  # flags of other programs
    *("--nproc-per-node", "--multi_gpu", "--array", "--ntasks", "--gres", "--requeue"),  # torchrun, accelerate, Slurm
    *("--kills", "--damages", "--case", "--rounds"),  # benchmarks
}
PACKAGES = ("runtime", "data", "blocks", "models", "evaluation", "composing", "pruning", "training", "cli")


def text_of(path):
    return path.read_text(encoding="utf-8")


def table_below(text, *header):
    """The rows of the Markdown table with these columns, cells without backticks."""
    lines = text.partition("| " + " | ".join(header) + " |\n")[2].splitlines()[1:]
    end = next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[:end]]


def anchors(path):
    """Those that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(path)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_exist(path, monkeypatch):
    """What is removed may be named in the changelog alone."""
    known = set(FOREIGN)
    for script in SCRIPTS:
        for action in load_script(script).build_parser()._actions:
            known.update(action.option_strings)
    for script in (ROOT / "experiments").glob("*.sh"):
        known |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^([a-z_]+)=", text_of(script), re.MULTILINE)}
    text = text_of(path).partition("### Removed")[0]
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | {"--help"}


def test_the_tables_of_families_and_tasks_are_the_codes():
    families = text_of(ROOT / "docs" / "families.md")
    rows = table_below(families, "model type", "class", "tasks")
    assert rows == [
        [name, next(iter(family.model_classes.values())), ", ".join(family.model_classes)]
        for name, family in FAMILIES.items()
    ]
    for name, reason in REFUSED.items():
        assert f"`{name}`" in families and reason in " ".join(families.split())
    measuring = section("docs/how-it-works.md", "Measuring")
    rows = table_below(measuring, "task", "script", "metrics, the main one first")
    assert [row[:2] for row in rows] == [[task.name, task.evaluated_by] for task in TASKS.values()]
    for row, task in zip(rows, TASKS.values()):
        metrics = row[2].split(", ")
        assert metrics[0] == task.metric and sorted(metrics) == sorted(task.metrics)


def test_the_table_of_defaults_is_the_codes():
    rows = table_below(
        section("docs/how-it-works.md", "Defaults"),
        *("model type", "task", "method", "calibration", "rate", "most", "shared", "apart"),
        "dropout",
    )
    named = {tuple(row[:2]): row[2:] for row in rows}
    for name, family in FAMILIES.items():
        for task in family.model_classes:
            row = next(named[kind, task] for kind in (name, "others", "all") if (kind, task) in named)
            study = study_of(name, task)
            assert [study.method, str(study.calibration)] == row[:2], (name, task)
            rates = [study.lr, study.most, study.shared_rate, study.block_lr]
            assert rates == [float(cell) for cell in row[2:6]], (name, task)
            assert study.dropout == (row[6] == "yes")


def test_rates_grow_with_the_run_and_fall_with_the_width():
    """By hand, from the document: for 200 steps, and twice for what was only pruned."""
    study = study_of("t5", "translation")
    for start, width, steps, rate, multiple in (
        ("tuned", 128, 200, 1e-3, 2),
        ("tuned", 512, 200, 2.5e-4, 2),
        ("tuned", 128, 50, 3.5355339e-4, 1),
        ("tuned", 128, 1, 2.5e-4, 1),
        ("tuned", 128, 10**6, 2.5e-3, 4),
        ("pruned", 128, 450, 3e-3, 3),
        ("pruned", 128, 10**6, 5e-3, 4),
        ("block", 256, 450, 5e-3, 0),
    ):
        assert study.rates(start, width, steps) == pytest.approx((rate, multiple))


def test_every_file_of_common_has_its_place_in_the_document():
    packages = re.split(r"^### ", section("docs/architecture.md", "Packages"), flags=re.MULTILINE)[1:]
    for text in packages:
        files = (ROOT / "common" / text.splitlines()[0]).rglob("*.py")
        assert set(re.findall(r"`(\w+\.py)`", text.partition("`__main__.py`")[0])) == {
            path.name for path in files if path.name != "__init__.py"
        }
    assert [text.splitlines()[0] for text in packages] == list(PACKAGES)


def test_the_examples_of_files_have_the_files_keys(chain):
    def example(title):
        return json.loads(re.search(r"```json\n(.*?)```", section("docs/formats.md", title), re.DOTALL)[1])

    assert example("conf.json").keys() == read_json(chain / "conf.json").keys()
    assert example("conf_prune.json").keys() == read_json(chain / "conf_prune.json").keys()
    entries = read_json(chain / "tuned" / "record.json")["variants"].values()
    assert all(example("Libraries").keys() <= entry.keys() for entry in entries)
    rows = table_below(section("docs/formats.md", "OUTPUT.pth"), "key", "content")
    content = torch.load(chain / "tuned-0.pth", weights_only=True)
    assert {key for row in rows for key in row[0].split(", ")} == content.keys()
    header = (chain / "tuned-0.csv").read_text().splitlines()[0]
    assert f"\n{header}\n" in section("docs/formats.md", "Stats")


# --- recipes of CONTRIBUTING.md, followed; that of a family is followed in test_families.py -------------------------

FOLLOWED = ("A pruning criterion", "A task and a metric", "A sampling rule for joint fine-tuning")


def follow(title, copy):
    """Add a recipe's code to a copy of the suite: each block at the end of the file that its first line names."""
    text = text_of(ROOT / "CONTRIBUTING.md").partition(f"\n### {title}\n")[2].partition("\n### ")[0]
    for code in snippets(text):
        with open(copy / code.splitlines()[0].removeprefix("# "), "a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")


@pytest.fixture
def results(tmp_path, workshop):
    """Every recipe followed in one copy, and stages that use what they add: a result for each stage."""
    for name in ("common", "experiments", *SCRIPTS):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for title in FOLLOWED:
        follow(title, tmp_path)
    script = text_of(tmp_path / "block-level_finetuning.py")
    (call,) = re.findall(r"tune_jointly\(.*\)", script)
    (tmp_path / "block-level_finetuning.py").write_text(script.replace(call, f'{call[:-1]}, sampling="free")'))
    stages = f"""
        download_model.py --checkpoint {workshop}/model/t5 -t {workshop}/tokenizer/t5 --task simplification \
            --data {workshop}/data/t5 --source-lang en --target-lang de
        config_generator.py --attention 0.25 --linear 0.5 --feed-forward 0.25 -n 1
        prune_scheme_generator.py
        prune.py --criterion wanda
        block-level_finetuning.py --epochs 1
        model-level_finetuning.py -n 0 --epochs 1
        evaluate-t5.py --save-predictions answers.jsonl"""
    process = subprocess.run(
        [sys.executable, "experiments/stages.py"],
        **dict(cwd=tmp_path, input=stages.replace("\\\n", ""), text=True, capture_output=True, timeout=120),
    )
    assert process.returncode == 0, process.stderr
    results = map(json.loads, process.stdout.splitlines()[::2])  # what was run stands behind each
    return dict(zip(re.findall(r"^ +([\w-]+\.py)", stages, re.MULTILINE), results, strict=True))


def test_the_recipes_followed_literally(results, tmp_path):
    """Oracles: by hand, of 4 heads 1 goes, of 48 neurons 12; of the metric, the predictions beside their references."""
    (rates,) = results["prune.py"]["configurations"]
    assert rates["attention"]["measured"] == rates["feed_forward"]["measured"] == 0.25
    assert rates["linear"]["measured"] == 0.5
    for entry in read_json(tmp_path / "modules-pruned" / "record.json")["variants"].values():
        assert set(entry["made_from"]["criteria"].values()) == {"wanda"} and entry["made_from"]["wanda_version"] == 1
    for entry in read_json(tmp_path / "modules-finetuned" / "record.json")["variants"].values():
        assert entry["made_from"]["sampling"] == "free"  # jointly, as for translation
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    scores = results["evaluate-t5.py"]
    assert scores["exact"] == sum(answer["prediction"] == answer["reference"] for answer in answers) / 16
    assert set(scores["intervals"]) == {"bleu", "chrf", "exact"}
