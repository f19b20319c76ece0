"""Signals and kills: an interrupted run says how to go on, and ends with the files of a run that nobody disturbed."""

import contextlib
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load_script, outcome, read_json
from tiny import build_model

from common.composing.library import Library
from common.evaluation.curves import read_stats
from common.runtime.files import atomic_file, atomic_folder
from common.runtime.signals import Interrupted, came, deferred, heeded
from common.training.stats import read_seconds

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


# --- the mechanism -------------------------------------------------------------------------------------------------


@pytest.fixture
def not_ignored():
    """SIGHUP as it is where nobody ignores it, as nohup does for the tests too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name, code", SIGNALS.items())
def test_a_signal_interrupts_what_runs_and_waits_for_what_must_not_be_torn_apart(name, code, not_ignored):
    number, done = getattr(signal, name), []
    with pytest.raises(Interrupted) as found, heeded():
        with deferred():
            with deferred():
                os.kill(os.getpid(), number)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"] and 128 + found.value.number == code and not came()
    with pytest.raises(Interrupted), heeded():
        os.kill(os.getpid(), number)
        done.append("never")
    assert "never" not in done


def test_what_was_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not():
    """The process ignores the first by deferring for ever. Oracle: its exit code, that of the signal itself."""
    program = (
        "import os, signal, time\n"
        "from common.runtime import signals\n"
        "with signals.heeded(), signals.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('still there', flush=True)\n"
        "    signals.ONE_SIGNAL_SECONDS = 0\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "still there\n")


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_an_output_that_is_being_written_is_finished_first(tmp_path, write):
    with pytest.raises(Interrupted), heeded(), write(tmp_path / "out") as place:
        os.kill(os.getpid(), signal.SIGTERM)
        if write is atomic_file:
            place.write(b"all of it")
        else:
            (place / "file").write_bytes(b"all of it")
    ((path, content),) = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items()
    assert content == b"all of it" and "out" in path.relative_to(tmp_path).parts


# --- in the middle of an epoch, in this process --------------------------------------------------------------------


@pytest.fixture
def tuned(workshop, chain, tmp_path):
    """tuned(method, name, *more): what a fine-tuning leaves, in a folder of that name: (code, result, stderr)."""

    def run(method, name, *more):
        folder = tmp_path / name
        model, common = (
            workshop / "model" / "t5",
            ["--epochs", 2, "--batch-size", 8, "--stats", folder / "s.csv", *more],
        )
        if method == "model":
            flags = ["-p", chain / "tuned", "-c", chain / "conf.json", "-n", 0, "-o", folder / "m.pth"]
            return outcome(f"model-level_finetuning.py -m {model}", *flags, *common)
        flags = ["-p", chain / "pruned", "-o", folder / "library", "--method", method]
        return outcome(f"block-level_finetuning.py -m {model}", *flags, *common)

    return run


def files_of(folder):
    """{name: content} of all but stats, whose seconds differ."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".csv")
    return {path.relative_to(folder): path.read_bytes() for path in files if path.name != ".lock"}


def losses_of(folder):
    """{name: rows without seconds} of the stats."""
    found = {}
    for path in folder.glob("*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        kept = [place for place, name in enumerate(rows[0]) if "seconds" not in name]
        found[path.name] = [[row[place] for place in kept] for row in rows]
    return found


@pytest.mark.parametrize("method, per_batch", [("model", 1), ("joint", 1), ("train", 26)])
def test_training_goes_on_within_an_epoch_bit_for_bit(tuned, tmp_path, monkeypatch, method, per_batch):
    """A signal in the second, the sixth and the eighth batch that each process sees. Oracle: the undisturbed run.

    Model level trains with dropout. An epoch has 6 batches; each variant takes a step of its own in them.
    """
    from common.training.learner import Learner

    assert tuned(method, "whole")[0] == 0
    original, told = Learner.step, []
    for batches in (2, 6, 8):
        steps = []

        def step(self, *loss, steps=steps, last=batches * per_batch):
            original(self, *loss)
            steps.append(1)
            if len(steps) == last:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patched:
            patched.setattr(Learner, "step", step)
            torch.manual_seed(len(told))  # another process would have another state
            code, result, err = tuned(method, "parts")
        told.append(err)
        if code == 0:
            break
        assert (code, result) == (143, None) and "interrupted by SIGTERM; to go on:" in err.splitlines()[-1]
        assert len(list((tmp_path / "parts").rglob("*.checkpoint"))) == 1
    assert "and 2 batches from" in told[1]
    if code:
        code, result, err = tuned(method, "parts")
    assert code == 0, err
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def kill_at(monkeypatch, target, name, when):
    """Stop a run right after the `when`-th call, without any saving, as a SIGKILL would."""
    original, calls = getattr(target, name), []

    @functools.wraps(original)
    def stop(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(target, name, stop)


@pytest.fixture
def solved(monkeypatch):
    """What the closed form solves is counted here, once for each variant of an attention block and ridge."""
    from common.pruning.closed_form import solve

    calls, original = [], solve.solve_attention

    def solve_attention(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(solve, "solve_attention", solve_attention)
    monkeypatch.setattr(solve, "STATISTICS_BYTES", 200_000)  # so that there are several passes
    return calls


@pytest.mark.parametrize("rounds", [0, 2])
def test_blocks_that_are_solved_are_not_solved_again(tuned, tmp_path, monkeypatch, solved, rounds):
    """Oracle: the undisturbed run in one pass."""
    from common.pruning.closed_form import solve

    more = ("--ridge", 1e-3, 1e-2, "--rounds", rounds)
    with monkeypatch.context() as patched:
        patched.setattr(solve, "STATISTICS_BYTES", 2**30)
        assert " of 8: " not in tuned("reconstruct", "whole", *more)[2]
    expected = len(solved)
    with monkeypatch.context() as patched:
        kill_at(patched, Library, "write", 2)
        assert tuned("reconstruct", "parts", *more)[0] == 130
    before = len(solved)
    code, result, err = tuned("reconstruct", "parts", *more)
    assert code == 0 and " of " in err and 0 < len(solved) - before < expected
    assert result["skipped"] > 0
    kept = {path: content for path, content in files_of(tmp_path / "parts").items() if path.suffix == ".npy"}
    assert kept and kept.items() <= files_of(tmp_path / "whole").items()
    entries = [read_json(tmp_path / run / "library" / "record.json")["variants"] for run in ("parts", "whole")]
    assert entries[0] == entries[1]
    losses = losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "parts") == losses and [row[0] for row in losses["s.csv"]] == ["epoch", "0", "1"]
    assert read_seconds(tmp_path / "parts" / "s.csv")["closed form"] > 0


@pytest.mark.parametrize("method, written", [("both", 3)])
def test_stats_and_means_of_a_resumed_run_are_those_of_all_its_variants(tuned, tmp_path, monkeypatch, method, written):
    """Stopped while finished variants are written. Oracle: the undisturbed run."""
    whole = tuned(method, "whole")[1]
    with monkeypatch.context() as patched:
        kill_at(patched, Library, "write", written)
        assert tuned(method, "parts")[0] == 130
    code, result, err = tuned(method, "parts")
    assert code == 0, err
    assert (result["fine_tuned"], result["skipped"]) == (26 - written, written)
    for name in ("nmse_before", "nmse_after"):
        assert result[name] == whole[name]
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    seconds = sum(read_seconds(tmp_path / "parts" / "s.csv").values())
    assert result["seconds"] == pytest.approx(seconds) and result["seconds"] > 0
    again = tuned(method, "parts")[1]
    assert (again["fine_tuned"], again["seconds"]) == (0, result["seconds"])


# --- who owns a stats file -----------------------------------------------------------------------------------------


def test_stats_of_another_run_are_kept_and_the_last_run_is_drawn(tuned, tmp_path):
    """One file for two runs. Oracle: each run's own file."""
    assert tuned("model", "one")[0] == 0 and tuned("model", "two", "--lr", 3e-3)[0] == 0
    shared = tmp_path / "both" / "s.csv"
    assert tuned("model", "both")[0] == 0
    assert tuned("model", "both", "--lr", 3e-3, "--overwrite")[0] == 0
    one, two = (losses_of(tmp_path / name)["s.csv"] for name in ("one", "two"))
    assert losses_of(tmp_path / "both")["s.csv"] == one + two[1:] and one[1][-1] != two[1][-1]
    drawn = read_stats(shared)
    assert drawn.val.tolist() == [float(row[2]) for row in two[1:]]
    assert tuned("model", "both", "--lr", 3e-3)[1]["seconds"] == pytest.approx(
        sum(read_seconds(shared, {two[1][-1]}).values())
    )


# --- numbers that are none -----------------------------------------------------------------------------------------


def test_weights_that_become_nan_end_the_training_and_the_best_epoch_is_kept(tuned, tmp_path, monkeypatch):
    from common.training.learner import Learner

    original = Learner.step

    def step(self, *loss):
        original(self, *loss)
        if self.steps > 6:
            with torch.no_grad():
                next(iter(self.parameters.values())).fill_(float("nan"))

    monkeypatch.setattr(Learner, "step", step)
    code, result, err = tuned("model", "out", "--epochs", 5)
    assert code == 0 and "epoch 2: the weights are no longer finite numbers; those of epoch 1 are kept" in err
    assert (result["best_epoch"], result["epochs"]) == (1, 2)
    content = torch.load(tmp_path / "out" / "m.pth", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in content["state_dict"].values())


def test_what_is_not_finite_is_never_written(chain, tmp_path):
    """Neither into a library nor as a model: refused, and what was there before stays."""
    from common.blocks.find import find_blocks
    from common.composing.library import Library
    from common.models.saving import save_model
    from common.runtime.errors import UserError

    model = build_model("t5")
    shutil.copytree(chain / "pruned", tmp_path / "library")
    before = files_of(tmp_path)
    fingerprint = read_json(tmp_path / "library" / "record.json")["model"]["fingerprint"]
    library = Library.open(tmp_path / "library", fingerprint)
    pair = library.variants()[0]
    variant = library.read(find_blocks(model)[pair.block], pair.variant)
    next(iter(variant.tensors.values()))[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        library.write({pair: variant}, {pair: {"made": "from"}})
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    for name in ("m", "m.pth"):
        with pytest.raises(UserError, match="not finite"):
            save_model(tmp_path / name, model, {})
    assert files_of(tmp_path) == before


# --- real signals to real processes --------------------------------------------------------------------------------


def start(script, *arguments, cwd, **options):
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        **options,
    )


def wait_for(condition, seconds=90):
    """Whether a condition comes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def has_epoch(stats, epoch):
    """Whether a stats CSV has got that far."""
    return stats.is_file() and f"\n{epoch}," in stats.read_text()


def test_a_signal_saves_and_says_how_to_go_on(workshop, chain, tmp_path):
    """The command that is given is run as it is. Oracle: the run that nobody disturbed."""
    script = "block-level_finetuning.py"
    flags = ["-m", workshop / "model" / "t5", "-p", chain / "pruned", "-o", "li brary", "--stats", "s.csv"]
    flags += ["--method", "joint", "--epochs", 8, "--batch-size", 2, "--early-stop", 0]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    process = start(script, *flags, cwd=parts)
    assert wait_for(lambda: has_epoch(parts / "s.csv", 2))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    last = err.splitlines()[-1]
    assert (process.returncode, out) == (143, ""), err
    assert last.startswith(f"{script}: interrupted by SIGTERM; to go on: ") and "Traceback" not in err
    command = shlex.split(last.partition("to go on: ")[2])
    assert command[1:] == [str(ROOT / script), *map(str, flags)]
    done = subprocess.run(command, cwd=parts, text=True, capture_output=True, env=ENVIRONMENT, timeout=90)
    assert done.returncode == 0 and "resuming after epoch" in done.stderr, done.stderr
    with contextlib.chdir(whole):
        assert load_script(script).main([*map(str, flags)]) == 0
    assert files_of(parts) == files_of(whole) and losses_of(parts) == losses_of(whole)


def alive(folder):
    """The processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")) == folder and (process / "cmdline").read_bytes().count(b"\0") > 1:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_an_experiment_that_is_ended_ends_its_stage(workshop, tmp_path):
    """Ended during the block level. Oracle: /proc."""
    out = tmp_path / "two words"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "experiments" / "composability.sh", "t5", "-m", workshop / "model" / "t5", "-o", out]
    command += ["--attention", "0.25", "--linear", "0.3", "--data-args", "--batch-size 2"]
    command += ["--block-args", "--epochs 10", "--model-args", "--epochs 1"]
    options = {"cwd": "/", "text": True, "env": ENVIRONMENT | {"PATH": path}, "start_new_session": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    assert wait_for(lambda: has_epoch(out / "library-reconstruction.csv", 3))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 143 and "Traceback" not in err
    assert wait_for(lambda: not alive(out), 30) and "block-level_finetuning.py: interrupted by SIGTERM" in err
    last = err.splitlines()[-1]
    assert last.startswith("composability.sh: interrupted by SIGTERM; to go on: bash ")
    assert shlex.split(last.partition("to go on: ")[2]) == [str(word) for word in command]


# --- closed streams ------------------------------------------------------------------------------------------------


def test_a_closed_stream_is_no_reason_to_fail(workshop, tmp_path):
    """The file that is written has what it should have, and nothing of the conversation; nor has stdout."""
    script, conf = ROOT / "config_generator.py", tmp_path / "conf.json"
    flags = ["-m", workshop / "model" / "t5", "-o", conf, "--attention", "0.5", "--linear", "0.5", "-n", "1"]
    line = shlex.join(map(str, [sys.executable, script, *flags]))
    done = subprocess.run(["bash", "-c", f"{line} >&- 2>&-"], text=True, capture_output=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(read_json(conf)["configs"]) == 1
