"""The experiments: their tables and pictures by hand, and the bash scripts on tiny models."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, is_one_line, load_script, read_json, touched

QUICK = {"--data-args": "--batch-size 8", "--block-args": "--method reconstruct", "--model-args": "--epochs 1"}
SUFFIXES = {"l1": "", "reconstruction": "-reconstruction"}  # of what is made from a criterion's library
WAYS = ("baseline", "composed", "composed-reconstruction")


# --- the bash scripts ------------------------------------------------------------------------------------------


def experiment_run(script, *arguments):
    """Run an experiment with this interpreter, from a foreign folder."""
    interpreters = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = [str(word) for word in (*arguments, *(part for pair in QUICK.items() for part in pair))]
    return subprocess.run(
        ["bash", ROOT / "experiments" / script, *given],
        cwd="/",
        text=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"PATH": interpreters, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def composability(workshop, tmp_path_factory):
    """composability.sh on the tiny T5, for two configurations; its folder has a space in its name."""
    out = tmp_path_factory.mktemp("experiment") / "two configurations"
    arguments = ("t5", "-m", workshop / "model" / "t5", "-o", out)
    done = experiment_run("composability.sh", *arguments, "--attention", "0.25 0.5", "--linear", "0.3 0.5")
    assert done.returncode == 0, done.stderr
    return out, arguments, done.stdout


def test_an_experiment_ends_with_its_table_and_pictures(composability):
    """Oracle: the evaluations' own files."""
    out, _, printed = composability
    assert printed == (out / "table.txt").read_text()
    rows = read_json(out / "table.json")["configurations"]
    assert [(row["criterion"], row["attention_rate"], row["linear_rate"]) for row in rows] == [
        (criterion, *rates) for rates in ((0.25, 0.3), (0.5, 0.5)) for criterion in ("l1", "reconstruction")
    ]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    evaluated = [each for line in lines for each in line.get("models", []) if "bleu" in each]
    scores = {Path(each["model"]).name.removesuffix(".pth"): each for each in evaluated}
    for row in rows:
        n, suffix = row["configuration"], SUFFIXES[row["criterion"]]
        names = {
            "dense": "t5",
            "pruned": f"pruned-{n}",
            "block-tuned": f"tuned{suffix}-{n}",
            "baseline": f"baseline-{n}",
            "composed": f"composed{suffix}-{n}",
        }
        assert row["quality"] == {way: scores[name]["bleu"] for way, name in names.items()}
    for name in ("loss.png", "pareto.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_both_criteria_remove_as_much(composability):
    """Oracle: the pruned libraries' records."""
    out, _, _ = composability
    by_l1, by_criterion = (
        read_json(out / f"pruned{suffix}" / "record.json")["variants"] for suffix in SUFFIXES.values()
    )
    assert by_l1.keys() == by_criterion.keys()
    for name, entry in by_l1.items():
        other = by_criterion[name]
        for counted in ("heads_removed", "weights_removed_by_rate"):
            assert entry[counted] == other[counted]
        assert entry["made_from"]["saliency"] == "l1"
        assert set(other["made_from"]["criteria"].values()) == {"reconstruction"}


def test_an_experiment_makes_only_what_changed_again(composability):
    """The second of two configurations gets another rate. Oracle: the files, their times of change included."""
    out, arguments, _ = composability
    expensive = [
        *(f"{way}-{n}.pth" for way in WAYS for n in range(2)),
        *(f"report-{way}-{n}.json" for way in WAYS for n in range(2)),
    ]
    libraries = [f"{stage}{suffix}" for stage in ("pruned", "tuned") for suffix in SUFFIXES.values()]
    kept = {folder: touched(out / folder) for folder in libraries}
    before = {name: (out / name).stat().st_mtime_ns for name in expensive}

    configurations = read_json(out / "conf.json")
    configurations["configs"][1]["encoder.block.0.layer.1.DenseReluDense.wi"] = 0.75
    (out / "conf.json").write_text(json.dumps(configurations))
    done = experiment_run("composability.sh", *arguments)
    assert done.returncode == 0, done.stderr
    after = {name: (out / name).stat().st_mtime_ns for name in expensive}
    assert {name for name in expensive if after[name] != before[name]} == {name for name in expensive if "-1" in name}
    for folder, files in kept.items():
        new = {path for path, time in touched(out / folder).items() if files.get(path) != time}
        assert {Path(path).name for path in new} == {
            "record.json",
            "encoder.block.0.layer.1.DenseReluDense.wi-1152_wo-768.npy",
        }


def test_l1_alone_makes_nothing_again_and_leaves_the_other_criterion_out(composability):
    """Oracle: the files' times of change, and the table of both criteria."""
    out, arguments, _ = composability
    rows = read_json(out / "table.json")["configurations"]
    before = touched(out)
    done = experiment_run("composability.sh", *arguments, "--criterion", "l1")
    assert done.returncode == 0, done.stderr
    changed = {Path(path).name for path, time in touched(out).items() if before.get(path) != time}
    assert changed <= {"results.jsonl", "table.txt", "table.json", "pareto.png", "loss.png"}
    assert read_json(out / "table.json")["configurations"] == [row for row in rows if row["criterion"] == "l1"]
    assert "reconstruction" not in done.stdout


def test_an_experiment_ends_with_a_stages_refusal(workshop, tmp_path):
    """The stage's own exit code and line, and nothing after it."""
    done = experiment_run("composability.sh", "t5", "-m", tmp_path / "none", "-o", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert is_one_line(done.stderr) and "config_generator.py: error:" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]
    assert (tmp_path / "out" / "results.jsonl").read_text() == ""


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
    assert output.read_bytes() == (chain / "conf_prune.json").read_bytes()
    assert not (tmp_path / "late.json").exists()


def test_a_search_experiment_ends_with_its_table(workshop, tmp_path):
    """By l1, which refuses flags of data. Oracle: the searched configurations' costs, against the uniform ones'."""
    done = experiment_run(
        "search.sh",
        "distilbert",
        "-m",
        workshop / "model" / "distilbert",
        "-o",
        tmp_path,
        "--attention",
        "0 0.5",
        "--linear",
        "0 0.5",
        "--budgets-of",
        "1 3",
        "--criterion",
        "l1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "table.txt").read_text()
    report = read_json(tmp_path / "search.json")
    assert [each["configuration"] for each in report["uniform"]] == [1, 3]
    for uniform, searched in zip(report["uniform"], report["searched"], strict=True):
        assert searched["fraction"] <= uniform["fraction"]
    *_, last = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [each["examples"] for each in json.loads(last)["models"]] == [16] * 4


def test_help_lists_the_variables_and_an_unknown_flag_is_refused():
    done = subprocess.run(["bash", ROOT / "experiments" / "search.sh", "--help"], text=True, capture_output=True)
    assert done.returncode == 0 and "--budgets-of" in done.stdout and "(default: 5 9 10 13 14)" in done.stdout
    for flags in (["--budget", "1"], ["--linear"], ["bart"], ["--criterion", "l2"]):
        done = subprocess.run(["bash", ROOT / "experiments" / "search.sh", *flags], text=True, capture_output=True)
        assert done.returncode == 2 and is_one_line(done.stderr) and flags[0] in done.stderr


# --- the table -------------------------------------------------------------------------------------------------

HEADER = "epoch,train_loss,val_loss,train_seconds,val_seconds\n"
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
    """What composability.sh leaves for two configurations of two blocks, made up; the second has other ratios."""
    files = {
        "conf_prune.json": {
            "requested": [
                {"attention": 0.25, "linear": 0.3, "feed_forward": 0.5},
                {"attention": 0.5, "linear": 0.3, "feed_forward": 0.5},
            ],
            "configs": [{"a": "heads-1", "f": "neurons-24"}, {"a": "heads-2", "f": "neurons-24"}],
        },
        "report-t5.json": {"evaluation": {"bleu": 40.0}, "original": None},
    }
    for n in range(2):
        files[f"report-baseline-{n}.json"] = {"evaluation": {"bleu": 10.0 * n + 2}}
        files[f"report-composed-{n}.json"] = {
            "evaluation": {"bleu": 10.0 * n + 3},
            "original": "/somewhere/t5",
            "figures": {
                name: {"model": 1, "original": 2, "ratio": round(ratio + n / 100, 4)} for name, ratio in RATIOS.items()
            },
        }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    # The baseline is at its best, 2.0, after 10 + 1 s and 10 + 1 s; composed gets there in 5 + 1 s, or not at all.
    for n, composed in enumerate(("0,,3.0,0,0\n1,2.5,1.9,5,1\n", "0,,3.0,0,0\n1,2.5,2.1,5,1\n")):
        (tmp_path / f"baseline-{n}.csv").write_text(HEADER + "0,,4.0,0,0\n1,3,2.5,10,1\n2,2,2.0,10,1\n3,1,2.2,10,1\n")
        (tmp_path / f"composed-{n}.csv").write_text(HEADER + composed)
    models = [
        {"model": f"{name}-{n}", "bleu": 10.0 * n + i} for n in range(2) for i, name in enumerate(("pruned", "tuned"))
    ]
    results = [
        {"blocks_with_reuse": 3, "blocks_without_reuse": 4},
        {"fine_tuned": 3, "seconds": 6.0, "output": "tuned"},
        {"skipped": 3},
        {"models": models},
        {"fine_tuned": 1, "seconds": 1.0, "output": "tuned"},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    (tmp_path / "blocks-blocks.csv").write_text("block,variant,seconds\na,heads-1,1.0\na,heads-2,2.0\nf,neurons-24,3\n")
    return tmp_path


def test_columns_lie_below_each_other():
    aligned = load_script("experiments/summarize.py").aligned
    assert aligned([["a", "bb", "c"], ["dddd", "e", "f"]]) == ["a     bb  c", "dddd  e   f"]
    assert aligned([["a", ""], ["bb", ""]]) == ["a", "bb"]


def test_the_table_has_the_rates_the_qualities_and_the_ratios(experiment):
    """The ratios of report-composed-N.json stand in the text, under their names, a line a configuration."""
    summarize = load_script("experiments/summarize.py")
    summary = summarize.summarize(experiment)
    assert [row["cost"]["parameters"]["ratio"] for row in summary["configurations"]] == [0.61, 0.62]
    lines = summarize.as_text(summary).splitlines()
    assert lines[0] == "quality: bleu"
    assert lines[2].split("  ")[0] == "0: attention 0.25, linear 0.3, feed-forward 0.5"
    assert lines[2].split()[-14:-9] == ["40.0", "0.0", "1.0", "2.0", "3.0"]
    assert lines[2].endswith("2.0000, epoch 2, 22 s  epoch 1, 6 s") and lines[3].endswith("no (2.1000)")
    title = lines.index("the composed models' size and time, relative to the original:")
    heads = [
        "configuration",
        "parameters",
        "non-zeros",
        "bytes on disk",
        "in memory",
        "multiply-adds",
        "seconds a batch",
        "a generated token",
    ]
    assert lines[title + 1] == "  ".join(heads)
    for n in range(2):
        line = lines[title + 2 + n]
        starts = [lines[title + 1].index(head) for head in heads]
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None])]
        assert cells == [str(n), *(f"{ratio + n / 100:.2f}" for ratio in RATIOS.values())]
    assert "blocks to fine-tune: 3 with reuse, 4 without" in lines


def test_a_figure_that_no_model_has_is_no_column(experiment):
    """Classifiers generate no tokens."""
    for n in range(2):
        path = experiment / f"report-composed-{n}.json"
        content = read_json(path)
        del content["figures"]["seconds_per_generated_token"]
        path.write_text(json.dumps(content))
    summarize = load_script("experiments/summarize.py")
    text = summarize.as_text(summarize.summarize(experiment))
    assert "a generated token" not in text and "1.07" not in text and "0.86" in text


def test_another_criterion_has_rows_of_its_own(experiment):
    """What l1 and the criterion have in common stands once. Block level 5 s; composed, 2 s and 3 s until as good."""
    for n in range(2):
        report = read_json(experiment / f"report-composed-{n}.json") | {"evaluation": {"bleu": 10.0 * n + 5}}
        (experiment / f"report-composed-reconstruction-{n}.json").write_text(json.dumps(report))
        stats = HEADER + f"0,,3.0,0,0\n1,2.5,1.5,{n + 1},1\n"
        (experiment / f"composed-reconstruction-{n}.csv").write_text(stats)
    (experiment / "blocks-reconstruction-blocks.csv").write_text((experiment / "blocks-blocks.csv").read_text())
    with open(experiment / "results.jsonl", "a") as lines:
        models = [{"model": f"tuned-reconstruction-{n}", "bleu": 10.0 * n + 4} for n in range(2)]
        for result in ({"models": models}, {"fine_tuned": 3, "seconds": 5.0, "output": "tuned-reconstruction"}):
            lines.write(json.dumps(result) + "\n")
    summarize = load_script("experiments/summarize.py")
    summary = summarize.summarize(experiment, "reconstruction")
    sweeps = summary["sweep_seconds"]
    assert sweeps["l1"] == summarize.summarize(experiment)["sweep_seconds"]["l1"]
    assert sweeps["reconstruction"]["composed_with_reuse"] == 5 + 2 + 3
    lines = summarize.as_text(summary).splitlines()
    assert lines[4].split()[-13:-7] == ["l1", "40.0", "10.0", "11.0", "12.0", "13.0"]
    assert lines[5].split("  ")[0] == "1: attention 0.5, linear 0.3, feed-forward 0.5"
    assert lines[5].split()[-7:] == ["reconstruction", "14.0", "15.0", "epoch", "1,", "3", "s"]
    assert [line.split()[:2] for line in lines[9:13]] == [
        [str(n), criterion] for n in range(2) for criterion in ("l1", "reconstruction")
    ]
    assert "  composed, reconstruction, with reuse         10.0   (block level 5.0)" in lines


def test_seconds_of_the_sweep_by_hand(experiment):
    """Block level: 7 s with reuse, of which the variants' own are 6; without, (1 + 1 + 3) + (1 + 2 + 3).

    The baselines take 22 s each until they are best. Composed, 6 s until as good, and 6 s without getting there.
    """
    sweep = load_script("experiments/summarize.py").summarize(experiment)["sweep_seconds"]["l1"]
    assert sweep == {
        "baseline": 44.0,
        "composed_with_reuse": 7 + 12,
        "composed_without_reuse": 11 + 12,
        "block_level_with_reuse": 7.0,
        "block_level_without_reuse": 11.0,
        "not_reached": [1],
    }


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
    conf = {"modules": {"a": {}, "a.o": {}, "b": {}}, "configs": [{"a": 0.5, "a.o": 0.9, "b": 0}, {"a": 0.25}]}
    files = {"search.json": report, "conf.json": conf}
    results = [
        {"fine_tuned": 3, "seconds": 6.0, "output": "library"},
        {"fine_tuned": 1, "seconds": 1.0, "output": "library"},
    ]
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


def test_without_fine_tuning_its_columns_are_left_out(search_folder):
    lines = (search_folder / "results.jsonl").read_text().splitlines(keepends=True)
    (search_folder / "results.jsonl").write_text("".join(line for line in lines if ".pth" not in line))
    search_report = load_script("experiments/search_report.py")
    lines = search_report.as_text(search_report.summarize(search_folder)).splitlines()
    assert "finetuned" not in lines[1] and lines[2].split()[-2:] == ["10.0", "20.0"]


def test_a_searchs_pictures_show_its_rates_and_its_predictions(search_folder, tmp_path):
    """Oracle: the values that matplotlib was given."""
    from matplotlib import pyplot

    search_report = load_script("experiments/search_report.py")
    summary = search_report.summarize(search_folder)
    search_report.draw_rates(read_json(search_folder / "conf.json"), summary, tmp_path / "rates.png")
    axis = pyplot.gcf().axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "a.o"]  # b keeps everything
    assert axis.images[0].get_array().tolist() == [[0.5, 0.25], [0.9, 0.0]]
    search_report.draw_prediction(read_json(search_folder / "search.json"), tmp_path / "prediction.png")
    points = pyplot.gcf().axes[0].collections[0].get_offsets().tolist()
    assert points == [[0, 0], [1, 5], [2, 4], [3, 9]]
    for name in ("rates.png", "prediction.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    pyplot.close("all")
