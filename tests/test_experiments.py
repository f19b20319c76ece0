"""The experiments: their tables and pictures by hand, and the bash scripts on tiny models."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, is_one_line, load_script, read_json

QUICK = {
    "composability.sh": {"--data-args": "--batch-size 8", "--block-args": "--epochs 1", "--model-args": "--epochs 1"},
    "search.sh": {"--data-args": "--batch-size 8", "--model-args": "none", "--search-args": "--rounds 0"},
}
# --- the bash scripts ------------------------------------------------------------------------------------------


def experiment_run(script, *arguments):
    """What an experiment prints, run with this interpreter from a foreign folder."""
    interpreters = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = [str(word) for word in (*arguments, *(part for pair in QUICK[script].items() for part in pair))]
    done = subprocess.run(
        ["bash", ROOT / "experiments" / script, *given],
        cwd="/",
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PATH": interpreters, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_experiment_ends_with_its_table_and_pictures(t5, tmp_path):
    """Two configurations of the tiny T5, in a folder with a space in its name; composed models are not fine-tuned.

    Oracle: the evaluations' and the stages' own results.
    """
    out = tmp_path / "two configurations"
    rates = ("--attention", "0.25 0.5", "--linear", "0.3 0.5")
    printed = experiment_run("composability.sh", "t5", "-m", t5, "-o", out, *rates)
    assert printed == (out / "table.txt").read_text()
    table = read_json(out / "table.json")
    rows = table["configurations"]
    assert [(row["attention_rate"], row["linear_rate"]) for row in rows] == [(0.25, 0.3), (0.5, 0.5)]
    assert "feed_forward_rate" not in rows[0]  # its default is for the default rates of the others
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    of_models = [entry for line in lines for entry in line.get("models", [])]
    scores = {Path(entry["model"]).name.removesuffix(".pth"): entry["bleu"] for entry in of_models if "bleu" in entry}
    trained = {entry["output"]: entry for entry in of_models if "val_loss_before" in entry}
    for row in rows:
        n = row["configuration"]
        names = {"pruned": f"pruned-{n}", "baseline": f"baseline-{n}", "composed": f"composed-reconstruction-{n}"}
        assert row["quality"] == {way: scores[name] for way, name in {"dense": "t5", **names}.items()}
        baseline, composed = (trained[f"{names[way]}.pth"] for way in ("baseline", "composed"))
        assert (composed["epochs"], composed["val_loss_before"]) == (0, composed["val_loss"])
        assert row["val_loss"]["composed"] == pytest.approx(composed["val_loss"])
        assert row["val_loss"]["baseline"] == pytest.approx(baseline["val_loss"])
    (block_level,) = (line for line in lines if "fine_tuned" in line)
    assert block_level["shared"] == "trained"  # jointly
    pruned = {line["output"]: line["seconds"] for line in lines if "pruned" in line}
    assert table["seconds"]["library"] == {
        "pruning": pruned["pruned-reconstruction"],
        "fine_tuning": block_level["seconds"],
    }
    assert table["seconds"]["baselines"]["pruning"] == pruned["pruned-l1"]
    assert table["seconds"]["composed"] == {"fine_tuning": 0}
    for name in ("timeline.png", "pareto.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_stages_run_in_one_process_until_one_fails(chain, tmp_path):
    """Words that a shell would split, a stage that works, a refusal, and a line that is not reached."""
    output = tmp_path / "a b 'c'.json"
    lines = [
        shlex.join(["prune_scheme_generator.py", "-i", str(chain / "conf.json"), "-o", str(output), "--quiet"]),
        "",
        shlex.join(["prune_scheme_generator.py", "-i", str(tmp_path / "none.json")]),
        shlex.join(["prune_scheme_generator.py", "-i", str(chain / "conf.json"), "-o", str(tmp_path / "late.json")]),
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / "stages.py"],
        text=True,
        capture_output=True,
        input="\n".join(lines),
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and is_one_line(done.stderr) and "none.json" in done.stderr
    assert json.loads(done.stdout)["output"] == str(output)
    assert read_json(output)["configs"] == read_json(chain / "conf_prune.json")["configs"]
    assert not (tmp_path / "late.json").exists()


def test_a_search_experiment_ends_with_its_table(workshop, tmp_path):
    """By l1, which refuses flags of data. Oracle: the searched configurations' costs, against the uniform ones'."""
    grid = ("--attention", "0 0.5", "--linear", "0 0.5", "--budgets-of", "1 3", "--criterion", "l1")
    printed = experiment_run("search.sh", "distilbert", "-m", workshop / "model" / "distilbert", "-o", tmp_path, *grid)
    assert printed == (tmp_path / "table.txt").read_text()
    report = read_json(tmp_path / "search.json")
    assert [uniform["configuration"] for uniform in report["uniform"]] == [1, 3]
    for uniform, searched in zip(report["uniform"], report["searched"], strict=True):
        assert searched["fraction"] <= uniform["fraction"]
    *_, last = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [model["examples"] for model in json.loads(last)["models"]] == [16] * 5


def test_help_lists_the_variables_and_an_unknown_flag_is_refused():
    done = subprocess.run(["bash", ROOT / "experiments" / "search.sh", "--help"], text=True, capture_output=True)
    assert done.returncode == 0 and "--budgets-of" in done.stdout and "(default: 5 9 10 13 14)" in done.stdout
    for flags in (["--budget", "1"], ["--linear"], ["bart"], ["--criterion", "l2"]):
        done = subprocess.run(["bash", ROOT / "experiments" / "search.sh", *flags], text=True, capture_output=True)
        assert done.returncode == 2 and is_one_line(done.stderr) and flags[0] in done.stderr


# --- the table -------------------------------------------------------------------------------------------------

HEADER = "epoch,train_loss,val_loss,train_seconds,val_seconds,run\n"
RATIOS = {
    "parameters": 0.61,
    "nonzero_parameters": 0.52,
    "bytes_on_disk": 0.63,
    "bytes_in_memory": 0.64,
    "multiply_adds": 0.75,
    "seconds_per_batch": 0.86,
    "seconds_per_generated_token": 1.07,
}


@pytest.fixture
def experiment(tmp_path):
    """What composability.sh leaves for three configurations of two blocks, made up; each has other ratios."""
    requested = [{"attention": rate, "linear": 0.3, "feed_forward": 0.5} for rate in (0.25, 0.5, 0.75)]
    files = {"conf_prune.json": {"requested": requested}, "report-t5.json": {"evaluation": {"bleu": 40.0}}}
    for n in range(3):
        files[f"report-baseline-{n}.json"] = {"evaluation": {"bleu": 10.0 * n + 2}}
        files[f"report-composed-reconstruction-{n}.json"] = {
            "evaluation": {"bleu": (3.0, 13.0, 21.0)[n]},
            "original": "/somewhere/t5",
            "figures": {
                name: {"model": 1, "original": 2, "ratio": round(ratio + n / 100, 4)} for name, ratio in RATIOS.items()
            },
        }
        # The baseline is at its best, 2.0, after 10 + 1 s and 10 + 1 s; what epoch 0 took is measuring alone.
        curve = "0,,4.0,0,7\n1,3,2.5,10,1\n2,2,2.0,10,1\n3,1,2.2,10,1\n"
        (tmp_path / f"baseline-{n}.csv").write_text(HEADER + curve)
        (tmp_path / f"composed-reconstruction-{n}.csv").write_text(HEADER + f"0,,{(1.9, 2.0, 2.1)[n]},0,7\n")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    library = "0,,9.0,0.0,1.0,one\n1,3.0,2.0,17.0,2.0,one\n0,,9.0,0.0,0.5,two\n1,3.0,2.0,1.5,0.0,two\n"
    (tmp_path / "library-reconstruction.csv").write_text(HEADER + library)  # two runs: 20 s and 2 s
    results = [
        {"blocks_with_reuse": 4, "blocks_without_reuse": 6},
        {"pruned": 4, "seconds": 0.5, "output": "pruned-l1"},
        {"pruned": 3, "seconds": 3.0, "output": "pruned-reconstruction"},
        {"fine_tuned": 2, "seconds": 12.0, "output": "library-reconstruction"},  # killed before, after 8 s
        {"skipped": 3},
        {"models": [{"model": f"pruned-{n}", "bleu": 10.0 * n} for n in range(3)]},
        {"pruned": 1, "seconds": 1.0, "output": "pruned-reconstruction"},
        {"fine_tuned": 1, "seconds": 2.0, "output": "library-reconstruction"},
        {"fine_tuned": 0, "seconds": 2.0, "output": "library-reconstruction"},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    return tmp_path


def columns(lines, at):
    """The table whose head is line `at`: {title: [cell, …]}, each as wide as its column."""
    starts = [0, *(match.end() for match in re.finditer("  +", lines[at]))]
    ends = [*starts[1:], None]
    rows = lines[at + 1 : lines.index("", at)]
    cut = [[line[start:end].strip() for line in (lines[at], *rows)] for start, end in zip(starts, ends)]
    return {title: cells for title, *cells in cut}


def test_the_table_has_the_rates_the_qualities_and_the_ratios(experiment):
    """Those of the made-up files, under their names, a line a configuration."""
    summarize = load_script("experiments/summarize.py")
    lines = summarize.as_text(summarize.summarize(experiment, "reconstruction")).splitlines()
    assert lines[0].startswith("quality: bleu, of the original 40.0; ")
    rates = ("attention 0.25", "attention 0.5", "attention 0.75")
    assert columns(lines, 1) == {
        "configuration": [f"{n}: {rate}, linear 0.3, feed-forward 0.5" for n, rate in enumerate(rates)],
        "non-zeros": ["0.52", "0.53", "0.54"],
        "multiply-adds": ["0.75", "0.76", "0.77"],
        "pruned": ["0.0", "10.0", "20.0"],
        "baseline": ["2.0", "12.0", "22.0"],
        "composed": ["3.0", "13.0", "21.0"],
        "loss, baseline": ["2.0000"] * 3,
        "loss, composed": ["1.9000", "2.0000", "2.1000"],
        "baseline's seconds": ["22.0"] * 3,
    }
    title = lines.index("the composed models' size and time, relative to the original:")
    assert columns(lines, title + 1) == {
        "configuration": ["0", "1", "2"],
        "parameters": ["0.61", "0.62", "0.63"],
        "bytes on disk": ["0.63", "0.64", "0.65"],
        "in memory": ["0.64", "0.65", "0.66"],
        "seconds a batch": ["0.86", "0.87", "0.88"],
        "a generated token": ["1.07", "1.08", "1.09"],
    }
    assert "blocks to fine-tune: 4 with reuse, 6 without" in lines
    assert lines[-1].endswith("in 2 of 3 by bleu, in 2 of 3 by validation loss")


def test_seconds_of_the_sweep_by_hand(experiment):
    """Baselines 0.5 + 3 · 22; library 3 + 1 and 20 + 2: 26 of 66.5, as long as 1.2 of 3. Two baselines take 44.5."""
    summarize = load_script("experiments/summarize.py")
    summary = summarize.summarize(experiment, "reconstruction")
    assert summary["seconds"] == {
        "baselines": {"pruning": 0.5, "fine_tuning": 66.0},
        "library": {"pruning": 4.0, "fine_tuning": 22.0},
        "composed": {"fine_tuning": 0.0},
    }
    assert summary["cheaper_from"] == 2
    lines = [" ".join(line.split()) for line in summarize.as_text(summary).splitlines()]
    assert "3 baselines, one after the other 66.5 (pruning by l1 0.5)" in lines
    assert "one library 26.0 (pruning by reconstruction 4.0)" in lines
    assert "3 models composed of it 0.0" in lines
    assert any("0.39 of the baselines' time, as long as 1.2 of them; cheaper from 2 " in line for line in lines)


# --- the timeline ----------------------------------------------------------------------------------------------


def test_the_timeline_shows_what_is_there_when(experiment):
    """Oracle: matplotlib's own artists. Without finishing, all composed models are there at once, after 26 s."""
    summarize = load_script("experiments/summarize.py")
    (axis,) = summarize.draw_timeline(summarize.summarize(experiment, "reconstruction")).axes
    lines = {line.get_marker(): line.get_xydata().tolist() for line in axis.lines}
    assert lines["o"] == [[26, 3], [26, 13], [26, 21]]
    assert lines["s"] == [[22.5, 2], [44.5, 12], [66.5, 22]]
    assert {line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"} == {40.0}


# --- the table of a search -------------------------------------------------------------------------------------


@pytest.fixture
def search_folder(tmp_path, monkeypatch):
    """What search.sh leaves for two budgets, made up."""
    monkeypatch.syspath_prepend(ROOT / "experiments")  # where the script finds its neighbour

    def measured(loss, **more):
        return {"loss": loss + 0.5, "kl": 0.1, "validation": {"loss": loss, "kl": 0.1}, "fraction": 0.5, **more}

    searched = {"predicted": 0.1, "additive": 0.3, "history": [0.3, 0.2], "choice": {"a": "dense"}}
    report = {
        "measure": "parameters",
        "objective": "kl",
        "dense": measured(1.0),
        "blocks": {"a": 10, "b": 10},
        "variants": [{}] * 3,
        "uniform": [measured(3.0, configuration=9), measured(2.0, configuration=4)],
        "searched": [measured(1.5, **searched), measured(1.75, **searched)],
        "models": [{"predicted": x, "kl": y, "loss": -y} for x, y in ((0, 0), (1, 5), (2, 4), (3, 9))],
        "seconds": {"one pass": 2.0, "scores": 8.0, "search": 5.0},
    }
    modules = {
        "a": {"kind": "attention", "heads": 4},
        "a.o": {"kind": "linear", "weights": 100, "block": "a", "linear": "o"},
    }
    conf = {"modules": modules, "configs": [{"a": 0.5, "a.o": 0.9}, {"a": 0.25}]}
    files = {"search.json": report, "conf.json": conf}
    results = []
    (tmp_path / "blocks.csv").write_text(f"{HEADER}0,,3.0,0.0,1.0\n1,,2.0,4.0,2.0\n")
    for suffix, more in (("", 0), (".pth", 5)):
        models = [] if suffix else [{"model": "/somewhere/t5", "bleu": 40.0}]
        for way, bleu, numbers in (("uniform", 10.0, (9, 4)), ("searched", 20.0, (0, 1))):
            models += [{"model": f"{way}-{n}{suffix}", "bleu": bleu + more + i} for i, n in enumerate(numbers)]
        results.append({"models": models})
    for way, loss, numbers in (("uniform", 1.25, (9, 4)), ("searched", 1.35, (0, 1))):
        runs = [{"output": f"{way}-{n}.pth", "val_loss": loss, "val_loss_before": 2.0} for n in numbers]
        results.append({"models": runs})
    files["results.jsonl"] = results
    for name, content in files.items():
        lines = content if name.endswith("l") else [content]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_searchs_table_by_hand(search_folder):
    """Gaps of 2 and 1 to the original, of which 1.5 and 0.25 are closed. Ranks 0 1 2 3 and 0 2 1 3: 1 - 6 · 2 / 60."""
    search_report = load_script("experiments/search_report.py")
    summary = search_report.summarize(search_folder)
    assert [row["gap_closed"] for row in summary["budgets"]] == [0.75, 0.25]
    assert summary["rank_correlation"] == pytest.approx(0.8) and summary["library_seconds"] == 7.0
    text = search_report.as_text(summary)
    lines = text.splitlines()
    assert "dense: loss 1.0000, bleu 40.0" in lines[0]
    assert lines[2].split() == ["0.500", "3.0000", "1.5000", "75%", "10.0", "20.0", "15.0", "25.0", "1.2500", "1.3500"]
    assert lines[3].split()[3:5] == ["25%", "11.0"]
    assert "library 4, scores 4, search 2" in text and "(2.0 s each)" in text and "over the 4 models" in text
