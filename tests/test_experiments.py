"""The experiments: their tables and pages by hand, and the bash scripts on tiny models."""

import html.parser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from helpers import ROOT, fails, is_one_line, read_json, run

from experiments import composability_report, search_report
from experiments.drawing import alone

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
        timeout=600,
        env=os.environ | {"PATH": interpreters, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plan_of_an_experiment_writes_nothing_and_adds_up(t5, tmp_path):
    """By hand: 48 examples are 6 batches, twice. What explore.py looks at is not known before."""
    given = ("-m", t5, "--number", 2, "--data-args", "--batch-size 8", "-o", tmp_path / "out")
    code = subprocess.run(
        ["bash", ROOT / "experiments" / "explore.sh", "t5", "--plan", *map(str, given)],
        text=True,
        capture_output=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    lines = code.stderr.splitlines()
    assert code.returncode == 0 and list(tmp_path.iterdir()) == []
    assert re.fullmatch(r"block-level_finetuning.py +12 steps .* MiB on disk  \d+ missing", lines[-2])
    assert lines[-1].startswith("in all ") and "explore.py, and what follows" in code.stderr


def test_an_experiment_ends_with_its_table_and_page(t5, tmp_path):
    """Two configurations of the tiny T5, in a folder with a space in its name; composed models are not fine-tuned.

    Oracle: the evaluations' and the stages' own results.
    """
    out = tmp_path / "two configurations"
    rates = ("--attention", "0.25 0.5", "--linear", "0.3 0.5")
    printed = experiment_run("composability.sh", "t5", "-m", t5, "-o", out, *rates)
    assert printed == (out / "table.txt").read_text()
    table = read_json(out / "table.json")
    rows = table["configurations"]
    assert table["missing"] == []
    assert [(row["attention_rate"], row["linear_rate"]) for row in rows] == [(0.25, 0.3), (0.5, 0.5)]
    assert "feed_forward_rate" not in rows[0]  # its default is for the default rates of the others
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    of_models = [entry for line in lines for entry in line.get("models", [])]
    scores = {Path(entry["model"]).name.removesuffix(".pth"): entry["bleu"] for entry in of_models if "bleu" in entry}
    trained = {entry["output"]: entry for entry in of_models if "val_loss_before" in entry}
    assert table["original"]["quality"] == scores["t5"]
    for row in rows:
        n = row["configuration"]
        names = {"pruned": f"pruned-{n}", "baseline": f"baseline-{n}", "composed": f"composed-reconstruction-{n}"}
        names["matched"] = f"baseline-reconstruction-{n}"
        assert row["quality"] == {way: scores[name] for way, name in names.items()}
        baseline, matched, composed = (trained[f"{names[way]}.pth"] for way in ("baseline", "matched", "composed"))
        assert (composed["epochs"], composed["val_loss_before"]) == (0, composed["val_loss"])
        assert row["val_loss"]["composed"] == pytest.approx(composed["val_loss"])
        assert row["val_loss"]["baseline"] == pytest.approx(baseline["val_loss"])
        assert row["val_loss"]["matched"] == pytest.approx(matched["val_loss"])
    (block_level,) = (line for line in lines if "fine_tuned" in line)
    assert block_level["shared"] == "trained"  # jointly
    pruned = {line["output"]: line["seconds"] for line in lines if "pruned" in line}
    assert table["seconds"]["library"] == {
        "pruning": pruned["pruned-reconstruction"],
        "fine_tuning": block_level["seconds"],
    }
    assert table["seconds"]["baselines"]["pruning"] == pruned["pruned-l1"]
    assert table["seconds"]["composed"] == {"fine_tuning": 0}
    (experiment,) = {line["experiment"] for line in lines if "command" in line}
    assert table["made"]["experiment"] == experiment and str(out) in shlex.split(experiment)
    assert table["made"]["commands"][-1].startswith(f"python {ROOT}/evaluate-t5.py -m ")
    assert (out / "report.html").read_text().count('<tr id="composed-') == 2


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
    result, ran = map(json.loads, done.stdout.splitlines())
    assert result["output"] == str(output) and shlex.split(ran["command"]) == shlex.split(lines[0])
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
    *_, last, _ = (tmp_path / "results.jsonl").read_text().splitlines()
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
    "seconds_per_generated_token_of_32": 0.97,
}


@pytest.fixture
def experiment(tmp_path):
    """What composability.sh leaves for three configurations of two blocks, made up; each has other ratios."""
    requested = [{"attention": rate, "linear": 0.3, "feed_forward": 0.5} for rate in (0.25, 0.5, 0.75)]
    conf = {
        "model": {"name": "t5 & <b>", "type": "t5"},
        "modules": {"a": {"kind": "attention"}, "a.o": {"kind": "linear"}},
    }
    conf["configs"] = [{"a": rate["attention"], "a.o": rate["linear"]} for rate in requested]
    files = {"conf.json": conf, "conf_prune.json": {"requested": requested}}
    files["report-t5.json"] = {"evaluation": {"bleu": 40.0, "split": "test"}}
    for n in range(3):
        for way, bleu in {"baseline": 10.0 * n + 2, "composed-reconstruction": (3.0, 13.0, 21.0)[n]}.items():
            more = 0.5 * (way == "baseline")
            ratios = {name: round(ratio + n / 100 + more, 4) for name, ratio in RATIOS.items()}
            files[f"report-{way}-{n}.json"] = {
                "evaluation": {"bleu": bleu, "intervals": {"bleu": [bleu - 1, bleu + 1.5]}},
                "original": "/somewhere/t5",
                "figures": {
                    name: {"model": 2 * ratio, "original": 2, "ratio": ratio} for name, ratio in ratios.items()
                },
            }
        # The baseline is at its best, 2.0, after 10 + 1 s and 10 + 1 s; what epoch 0 took is measuring alone.
        curve = "0,,4.0,0,7\n1,3,2.5,10,1\n2,2,2.0,10,1\n3,1,2.2,10,1\n"
        (tmp_path / f"baseline-{n}.csv").write_text(HEADER + curve)
        (tmp_path / f"composed-reconstruction-{n}.csv").write_text(HEADER + f"0,,{(1.9, 2.0, 2.1)[n]},0,7\n")
        (tmp_path / f"baseline-reconstruction-{n}.csv").write_text(HEADER + f"0,,3.0,0,7\n1,2,1.9{n},8,1\n")
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
        {"models": [{"model": f"baseline-reconstruction-{n}.pth", "bleu": 9.0 * n + 3.5} for n in range(3)]},
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
    lines = composability_report.as_text(composability_report.summarize(experiment)).splitlines()
    assert lines[0].startswith("Composed of one library, 2 of 3 models are at ") and max(map(len, lines)) <= 100
    assert columns(lines, lines.index("quality: bleu, of the original 40.0") + 1) == {
        "": ["0", "1", "2"],
        "attention": ["0.25", "0.5", "0.75"],
        "linear": ["0.3"] * 3,
        "feed-forward": ["0.5"] * 3,
        "non-zeros": ["0.52", "0.53", "0.54"],
        "multiply-adds": ["0.75", "0.76", "0.77"],
        "pruned": ["0.0", "10.0", "20.0"],
        "baseline": ["2.0", "12.0", "22.0"],
        "matched": ["3.5", "12.5", "21.5"],
        "composed": ["3.0", "13.0", "21.0"],
    }
    title = lines.index("validation loss, and each baseline's seconds of fine-tuning:")
    assert columns(lines, title + 1) == {
        "": ["0", "1", "2"],
        "loss, baseline": ["2.0000"] * 3,
        "loss, matched": ["1.9000", "1.9100", "1.9200"],
        "loss, composed": ["1.9000", "2.0000", "2.1000"],
        "seconds, baseline": ["22.0"] * 3,
        "seconds, matched": ["9.0"] * 3,
    }
    title = lines.index("the composed models' size and time, relative to the original:")
    assert columns(lines, title + 1) == {
        "": ["0", "1", "2"],
        "parameters": ["0.61", "0.62", "0.63"],
        "on disk": ["0.63", "0.64", "0.65"],
        "in memory": ["0.64", "0.65", "0.66"],
        "time a batch": ["0.86", "0.87", "0.88"],
        "time a token": ["1.07", "1.08", "1.09"],
        "a token of 32": ["0.97", "0.98", "0.99"],
    }
    assert "blocks to fine-tune: 4 with reuse, 6 without" in lines
    assert lines[-2].endswith("its baseline in 2 of 3 by bleu, in 2 of 3 by validation loss")
    assert lines[-1].endswith("its matched baseline in 1 of 3 by bleu, in 1 of 3 by validation loss")


def test_seconds_of_the_sweep_by_hand(experiment):
    """Baselines 0.5 + 3 · 22; library 3 + 1 and 20 + 2: 26 of 66.5, as long as 1.2 of 3. Two baselines take 44.5."""
    summary = composability_report.summarize(experiment)
    assert summary["seconds"] == {
        "baselines": {"pruning": 0.5, "fine_tuning": 66.0},
        "library": {"pruning": 4.0, "fine_tuning": 22.0},
        "composed": {"fine_tuning": 0.0},
    }
    assert summary["cheaper_from"] == 2
    lines = [" ".join(line.split()) for line in composability_report.as_text(summary).splitlines()]
    assert "3 baselines, one after the other 66.5 (pruning by l1 0.5)" in lines
    assert "one library 26.0 (pruning by reconstruction 4.0)" in lines
    assert "3 models composed of it 0.0" in lines
    assert any("0.39 of the baselines' time, as long as 1.2 of them; cheaper from 2 " in line for line in lines)


# --- the page --------------------------------------------------------------------------------------------------

EMPTY = {"meta", "link", "input"}
SAID = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")  # by a browser, of mistakes


class Page(html.parser.HTMLParser):
    """A page as its tags stand: what is opened is closed. `rows`: of the tables, {id: [[text, data-value]]}."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.rows, self.scopes, self.text, self.sources = [], [], [], {}, [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += filter(None, [given.get("id")])
        self.links += filter(None, [given.get("href")])
        self.sources += [given[name] for name in ("src", "srcset", "action") if name in given]
        if tag == "tr":
            self.row = []
            self.rows |= {given["id"]: self.row} if "id" in given else {}
        if tag in ("td", "th"):
            self.row.append(["", given.get("data-value")])
            self.scopes += [given.get("scope")] * (tag == "th")
        self.open += [tag] * (tag not in EMPTY)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""
        if "td" in self.open or "th" in self.open:
            self.row[-1][0] += data


def page_of(folder):
    run("experiments/report.py", folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_page_is_well_formed_and_has_every_model_and_number(experiment):
    """Oracle: table.json, and the made-up name of the model, which is text."""
    page, table = page_of(experiment), read_json(experiment / "table.json")
    assert len(set(page.ids)) == len(page.ids) and set(page.scopes) == {"col", "row"}
    assert {link.removeprefix("#") for link in page.links} <= {*page.ids, "data:,"} and page.sources == []
    assert "t5 & <b> (t5)" in page.text
    assert len(table["configurations"]) == 3 and "original" in page.rows
    for row in table["configurations"]:
        for way in ("baseline", "composed", "matched"):
            cells = page.rows[f"{way}-{row['configuration']}"]
            figures = [row["cost"][way][name]["model"] for name in RATIOS if way in row["cost"]]
            before = [row["quality"]["pruned"]] * (way == "baseline")
            expected = [*before, row["quality"][way], row["val_loss"][way], *figures, row[way]["seconds"]]
            assert sorted(float(value) for _, value in cells if value) == sorted(expected)
            low, high = row["interval"][way] or (0, 0)
            interval = f"{low:.1f} to {high:.1f}" if high else ""
            assert f"{row['quality'][way]:.1f}{interval}" in [text for text, _ in cells]
            assert cells[1][0] == f"attention {row['attention_rate']:g}, linear 0.3, feed-forward 0.5"
    assert "2 of 3 models are at least as good" in page.text and "took 26.0 s" in page.text


def test_a_page_names_what_is_missing(experiment):
    """A configuration whose baseline was not evaluated is in no sum: 0.5 + 2 · 22 s."""
    (experiment / "report-baseline-1.json").unlink()
    page = page_of(experiment)
    assert "Configuration 1 is left out, also of the sums: report-baseline-1.json missing." in page.text
    assert "composed-1" not in page.rows and "instead of 44.5 s" in page.text


@pytest.mark.parametrize(
    "why",
    [
        "no finished experiment",
        "name one with --criterion",
        "no page of this suite",
        "no table.json of this version",
        "searched-0 not evaluated yet",
    ],
)
def test_what_no_page_can_be_made_of_is_refused(experiment, why):
    if why.startswith("no finished"):
        (experiment / "conf_prune.json").unlink()
    elif why.startswith("name one"):
        (experiment / "report-composed-l1-0.json").write_text("{}")
    elif why.startswith("no table"):
        experiment = experiment / "table.json"
        experiment.write_text('{"experiment": "composability"}')
    elif why.startswith("searched"):
        found = {"uniform": [], "searched": [{}]}
        (experiment / "search.json").write_text(json.dumps(found))
        (experiment / "conf_prune.json").unlink()
    else:
        (experiment / "report.html").write_text("<p>mine</p>")
    assert why in fails("experiments/report.py", experiment)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_in_a_browser_sorts_filters_and_asks_for_nothing(experiment):
    """Oracles: the qualities in order, of which the original's is the highest; the browser's log and its requests."""
    page_of(experiment)
    shown = "[...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden).map(row => row.id)"
    head = "[...document.querySelectorAll('#table thead th')].find(each => each.textContent === 'BLEU')"
    with Browser() as browser:
        browser.open(experiment / "report.html", width=390)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        rising = [
            "baseline-0",
            "composed-0",
            "matched-0",
            "baseline-1",
            "matched-1",
            "composed-1",
            "composed-2",
            "matched-2",
        ]
        rising += ["baseline-2", "original"]
        for state, order in (("ascending", rising), ("descending", rising[::-1])):
            browser.run(f"{head}.querySelector('button').click()")
            assert browser.run(f"{head}.ariaSort") == state and browser.run(shown) == order
        browser.run("words.value = 'composed 0.75'; words.dispatchEvent(new Event('input'))")
        assert browser.run(shown) == ["composed-2"] and browser.run("count.textContent") == "1 of 10 shown"
        browser.run("point = document.querySelector('svg a[data-row=baseline-0]'); point.id = 'point'")
        browser.run("point.dispatchEvent(new MouseEvent('mouseenter'))")
        assert "baseline 0: attention 0.25" in browser.run("tip.textContent")
        assert browser.run("document.getElementById('baseline-0').classList.contains('lit')")
        browser.run("point.dispatchEvent(new MouseEvent('click', {bubbles: true}))")
        assert browser.run("location.hash") == "#baseline-0" and len(browser.run(shown)) == 10
        told = browser.told
    asked = [each["params"]["request"]["url"] for each in told if each.get("method") == "Network.requestWillBeSent"]
    assert asked == [(experiment / "report.html").as_uri()]
    assert not [each for each in told if each.get("method") in SAID]


def test_the_readmes_table_and_picture_are_those_of_the_demos_figures():
    """Oracle: experiments/demo.json, the table.json of a run."""
    summary = read_json(ROOT / "experiments" / "demo.json")
    (table,) = re.findall(r"```\n(quality: .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = composability_report.as_text(summary).splitlines()
    assert [line for line in table.splitlines() if line not in (*lines, "...")] == []
    assert (ROOT / "experiments" / "demo.svg").read_text() == alone(composability_report.timeline(summary))


# --- the pictures ----------------------------------------------------------------------------------------------


def marks(svg, series):
    """The middles of a series' points in a picture, without those in its legend."""
    drawn = re.findall(rf'mark {series}" transform="translate\(([\d.]+) ([\d.]+)\)', svg)
    return [tuple(map(float, each)) for each in drawn]


def test_the_timeline_shows_what_is_there_when(experiment):
    """Oracle: distances by hand. Without finishing, all composed models are there at once, after 26 s."""
    svg = composability_report.timeline(composability_report.summarize(experiment))
    composed, baseline = marks(svg, "composed"), marks(svg, "baseline")
    (x,) = {x for x, _ in composed}
    seconds = [22.5, 44.5, 66.5]
    unit = (baseline[2][0] - baseline[0][0]) / 44  # of a second
    assert [place - x for place, _ in baseline] == pytest.approx([unit * (each - 26) for each in seconds], abs=0.2)
    unit = (baseline[0][1] - baseline[2][1]) / 20  # of a BLEU; upwards is less
    assert [composed[0][1] - y for _, y in composed] == pytest.approx([0, 10 * unit, 18 * unit], abs=0.2)
    assert "the original" in svg and "95 % interval" in svg and "number of the configuration" in svg


# --- the table of a search -------------------------------------------------------------------------------------


@pytest.fixture
def search_folder(tmp_path):
    """What search.sh leaves for two budgets, made up."""

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
    conf = {"model": {"name": "t5", "type": "t5"}, "modules": modules, "configs": [{"a": 0.5, "a.o": 0.9}, {"a": 0.25}]}
    files = {"search.json": report, "conf.json": conf, "grid.json": conf | {"configs": [{"a": 0.5, "a.o": 0.5}] * 10}}
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
    summary = search_report.summarize(search_folder)
    assert [row["gap_closed"] for row in summary["budgets"]] == [0.75, 0.25]
    assert summary["rank_correlation"] == pytest.approx(0.8) and summary["library_seconds"] == 7.0
    lines = search_report.as_text(summary).splitlines()
    text = " ".join(lines)
    assert "the original: loss 1.0000, bleu 40.0" in text and max(map(len, lines)) <= 100
    head = next(n for n, line in enumerate(lines) if line.startswith("kept "))
    assert lines[head + 1].split() == [
        "0.500",
        "3.0000",
        "1.5000",
        "75%",
        "10.0",
        "20.0",
        "15.0",
        "25.0",
        "1.2500",
        "1.3500",
    ]
    assert lines[head + 2].split()[3:5] == ["25%", "11.0"]
    assert "library 4, scores 4, search 2" in text and "(2.0 s each)" in text and "over the 4 models" in text
    page = page_of(search_folder)
    assert {"original", "uniform-9", "uniform-4", "searched-0", "searched-1"} <= page.rows.keys()
    assert "close 25% to 75% of the loss" in page.text and "and 2 of 2 are at least as good by BLEU" in page.text
    assert "report-searched-1.json: sizes and times of searched-1 are not known" in page.text


# --- the smallest of many --------------------------------------------------------------------------------------


def test_the_page_of_the_smallest_shows_what_was_looked_at(tmp_path):
    """Made up: of four configurations, 2 and 0 were measured, 3 had no lower a loss, and 1 was not looked at."""
    rows = [(2, 0.3, 2.0, 30.0), (3, 0.4, 2.1, None), (0, 0.5, 1.5, 39.5), (1, 0.6, None, None)]
    rows = [dict(zip(("configuration", "kept", "loss", "quality"), row)) for row in rows]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    found = {"wanted": 39.0, "drop": 1.0, "good_enough": True, "configuration": 0, "kept": 0.5, "looked_at": 3}
    found |= {"measured": 2, "seconds": {"losses": 1.0, "qualities": 2.0}}
    explored = {"metric": "bleu", "measure": "parameters", "examples": {"loss": 8, "quality": 16}}
    scores = {"t5": (40.0, 41.0), "smallest": (39.5, 38.0)}
    conf = {"model": {"name": "t5", "type": "t5"}, "modules": {"a": {"kind": "attention"}, "b": {"kind": "attention"}}}
    files = {
        "explored.json": explored | {"found": [found], "configurations": rows},
        "conf.json": conf | {"configs": [{"a": 0.5}] * 4},
        "report-smallest.json": {
            "original": "/somewhere/t5",
            "evaluation": {"bleu": 38.0, "split": "test"},
            "figures": {"parameters": {"model": 5, "original": 10, "ratio": 0.5}},
        },
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    splits = ("validation", "test")
    models = [
        {"model": name, "split": split, "bleu": bleu}
        for name, both in scores.items()
        for split, bleu in zip(splits, both)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(model) + "\n" for model in models))
    (tmp_path / "library.csv").write_text(f"{HEADER}0,,3.0,0.0,1.0,r\n1,,2.0,4.0,2.0,r\n")
    page = page_of(tmp_path)
    values = {name: [float(value) for _, value in cells if value] for name, cells in page.rows.items()}
    assert values == {
        "original": [1.0, 40.0, 41.0, 10.0],
        "other-2": [0.3, 30.0, 2.0],
        "other-3": [0.4, 2.1],
        "smallest-0": [0.5, 39.5, 38.0, 1.5, 5.0],
    }
    assert "Configuration 0 keeps 50.0% of the blocks' parameters and has BLEU 39.50" in page.text
    assert "Not looked at, as a smaller one was good enough: 1 larger" in page.text and "wanted: 39.00" in page.text
