"""Block level of a library in portions. Oracle throughout: the same run with the whole library in one portion."""

import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from helpers import build_model, files_in, read_json

from common.block_level import portions, portions_of
from common.blocks import find_blocks
from common.checkpoints import Checkpoint
from common.library import Library
from common.scheme import Pair
from common.tracking import Tracking
from common.training import Learner

METHODS = {
    "reconstruct": ("--method", "reconstruct", "--ridge", 1e-3, 1e-1),
    "train": ("--method", "train", "--early-stop", 1, "--lr", 0.05),  # so high that some stop early
    "both": ("--method", "both"),
}
SMALL = 130_000  # bytes; the library of the tiny T5 has 26 variants of 12,288
PORTIONS = 3


@pytest.fixture(scope="module")
def tuned(workshop, chain, tmp_path_factory):
    """tuned(call, name, *flags): what a run leaves in a folder of that name: (code, result, stderr), the folder."""
    top = tmp_path_factory.mktemp("portions")

    def run(call, name, *flags):
        folder = top / name
        files = ("-m", workshop / "model" / "t5", "-p", chain / "pruned", "-o", folder / "library")
        more = () if "reconstruct" in flags or "--in-sequence" in flags else ("--epochs", 3)
        more = (*more, "--stats", folder / "s.csv", "--batch-size", 8)
        return call("block-level_finetuning.py", *files, *more, *flags), folder

    return run


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.fixture
def in_one(tuned, call, made):
    """in_one(method): the result and the folder of a run in one portion, made once."""

    def of(method):
        if method not in made:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(portions, "PORTION_BYTES", 2**30)
                (code, result, err), folder = tuned(call, method, *METHODS[method])
            assert code == 0 and "\nportion " not in err, err
            made[method] = result, folder
        return made[method]

    return of


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(portions, "PORTION_BYTES", SMALL)


def stats_of(folder):
    """{file: {rows without seconds}}: the order of the variants aside, all of it."""
    found = {}
    for path in folder.glob("s*.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        kept = [place for place, name in enumerate(rows[0]) if "seconds" not in name]
        found[path.name] = [tuple(row[place] for place in kept) for row in rows]
    return found


def assert_same(folder, result, expected, whole, fine_tuned=26):
    """The same module files, entries, losses and figures; nothing else is left."""
    files = {path.name: digest for path, digest in files_in(folder / "library").items()}
    wanted = {path.name: digest for path, digest in files_in(whole / "library").items()}
    del files["record.json"], wanted["record.json"]  # the order of its entries is that of the writing
    assert files == wanted
    records = [read_json(each / "library" / "record.json")["variants"] for each in (folder, whole)]
    assert records[0] == records[1]
    assert stats_of(folder) == stats_of(whole) and set(stats_of(whole)) == {"s.csv", "s-blocks.csv"}
    for name in ("nmse_before", "nmse_after", "most_pruned"):
        assert result.get(name) == expected.get(name), name
    assert (result["fine_tuned"], result["skipped"]) == (fine_tuned, 26 - fine_tuned)
    rows = [line.split(",") for line in (folder / "s.csv").read_text().splitlines()[1:]]
    assert result["seconds"] == pytest.approx(sum(float(row[3]) + float(row[4]) for row in rows), abs=0.01)


# --- what is in a portion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "room, sizes",
    [
        (10**6, [5]),
        (61_440, [5]),  # all of it, to the byte
        (61_439, [3, 2]),  # the second block is whole
        (36_864, [3, 2]),
        (36_863, [2, 1, 2]),
        (24_576, [2, 1, 2]),
        (1, [1, 1, 1, 1, 1]),
    ],
)
def test_portions_by_hand(monkeypatch, room, sizes):
    """Three variants of an attention block, of 12,288 bytes, then two of another one."""
    monkeypatch.setattr(portions, "PORTION_BYTES", room)
    blocks = find_blocks(build_model("t5"))
    first, second = [name for name, block in blocks.items() if block.heads][:2]
    pairs = [Pair(first, "a"), Pair(first, "b"), Pair(first, "c"), Pair(second, "a"), Pair(second, "b")]
    found = portions_of(pairs, blocks)
    assert [len(portion) for portion in found] == sizes
    assert [pair for portion in found for pair in portion] == pairs


# --- undisturbed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_portions_come_to_what_the_whole_comes_to(tuned, call, in_one, small, method):
    expected, whole = in_one(method)
    (code, result, err), folder = tuned(call, f"{method}-portions", *METHODS[method])
    assert code == 0, err
    told = [line for line in err.splitlines() if line.startswith("portion ")]
    assert len(told) == PORTIONS and told[1].startswith(f"portion 2 of {PORTIONS}: ")
    assert sum(int(line.split()[-2]) for line in told) == 26
    assert_same(folder, result, expected, whole)
    (code, result, err), _ = tuned(call, f"{method}-portions", *METHODS[method])
    assert (code, result["fine_tuned"], result["skipped"]) == (0, 0, 26) and "\nportion " not in err


def test_a_block_in_several_portions(tuned, call, in_one, monkeypatch):
    """Two variants of an attention block in one, the third in the next, whatever of the block is most pruned."""
    monkeypatch.setattr(portions, "PORTION_BYTES", 25_000)
    expected, whole = in_one("reconstruct")
    (code, result, err), folder = tuned(call, "split", *METHODS["reconstruct"])
    assert code == 0 and "portion 16 of 16" in err
    assert_same(folder, result, expected, whole)


def test_what_is_there_already_is_left_out(tuned, call, in_one, small):
    """Two of the files are gone, in two portions."""
    expected, whole = in_one("train")
    (_, result, _), folder = tuned(call, "gaps", *METHODS["train"])
    gone = sorted((folder / "library").glob("*.npy"))[::13]
    for path in gone:
        path.unlink()
    (code, result, err), _ = tuned(call, "gaps", *METHODS["train"])
    assert (code, result["fine_tuned"], result["skipped"]) == (0, 2, 24) and err.count("\nportion ") == 2
    assert (
        read_json(folder / "library" / "record.json")["variants"]
        == read_json(whole / "library" / "record.json")["variants"]
    )


def test_shards_take_portions_of_their_own(tuned, call, in_one, small):
    _, whole = in_one("reconstruct")
    for number in range(2):
        (code, _, err), folder = tuned(call, "shards", *METHODS["reconstruct"], "--shard", f"{number}/2")
        assert code == 0 and "portion 2 of 2" in err, err
    assert files_of(folder) == files_of(whole)


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "library").glob("*.npy")}


def test_what_is_solved_in_sequence_is_one_portion(tuned, call, chain, monkeypatch):
    """Each block is solved on what those before it produce."""
    found = []
    for name, room in (("sequence", 2**30), ("small-sequence", 1)):
        monkeypatch.setattr(portions, "PORTION_BYTES", room)
        (code, result, err), folder = tuned(call, name, "--in-sequence", chain / "conf.json", 1)
        assert code == 0 and "\nportion " not in err, err
        found.append((files_of(folder), result["kl"], result["nmse_after"]))
    assert found[0] == found[1]


def test_trackers_are_told_of_epochs_that_are_final(tuned, call, small, monkeypatch):
    """Of several portions at the end. Oracle: the stats that the run leaves."""
    seen = []

    def tell(self):
        seen.append(Path(self.stats_file).read_text())

    monkeypatch.setattr(Tracking, "tell", tell)
    (code, _, err), folder = tuned(call, "tracked", *METHODS["train"])
    assert code == 0, err
    assert seen == [(folder / "s.csv").read_text()]


def test_one_portion_is_held_at_once(tuned, call, monkeypatch):
    """The bytes of all pruned tensors that were read and are still there, whoever holds them; counted at each read."""
    peaks = {}
    for name, room in (("held", SMALL), ("all-held", 2**30)):
        monkeypatch.setattr(portions, "PORTION_BYTES", room)
        live, original = [0, 0], Library.read

        def read(self, *args, live=live, original=original):
            variant = original(self, *args)
            for tensor in variant.tensors.values():
                live[0] += tensor.nbytes
                weakref.finalize(tensor, release, live, tensor.nbytes)
            live[1] = max(live)
            return variant

        with monkeypatch.context() as patched:
            patched.setattr(Library, "read", read)
            (code, _, err), _ = tuned(call, name, *METHODS["both"])
        assert code == 0, err
        peaks[name] = live[1]
    assert peaks["all-held"] == 26 * 12_288
    assert peaks["held"] <= SMALL


def release(live, size):
    live[0] -= size


# --- interrupted ---------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, target, name, when, sends=None):
    """Stop a run right after the `when`-th call: as a SIGKILL would, or by a signal."""
    original, calls = getattr(target, name), []

    def stop(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == when:
            if sends is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), sends)
        return result

    monkeypatch.setattr(target, name, stop)


# Portion 1 has 10 variants and an epoch 6 batches: portion 2 begins after 10 · 3 · 6 steps, or less if some stop early.
STOPS = {
    "within an epoch": (Learner, "step", 10 * 18 + 30, signal.SIGTERM),
    "while portion 2 is written": (Library, "write", 13, None),
    "before the checkpoint knows that portion 1 is written": (Library, "write", 10, None),
    "between portions": (Checkpoint, "save_past", 1, None),
    "while portion 2 is solved": (Checkpoint, "save_solutions", 7, None),
    "once portion 2 is solved": (Checkpoint, "save_solutions", 10, None),
    "in the last portion": (Library, "write", 25, None),
}
CASES = [
    *(("reconstruct", stop) for stop in STOPS if stop not in ("within an epoch", "once portion 2 is solved")),
    *(("train", stop) for stop in ("within an epoch", "between portions")),
    *(("both", stop) for stop in ("within an epoch", "once portion 2 is solved", "in the last portion")),
    ("both", "before the checkpoint knows that portion 1 is written"),
]


@pytest.mark.parametrize("method, stop", CASES)
def test_an_interrupted_run_goes_on_in_its_portion(tuned, call, in_one, small, monkeypatch, method, stop):
    target, name, when, sends = STOPS[stop]
    expected, whole = in_one(method)
    folder, often = f"{method} {stop}", ("--save-every", 1e-6) if name == "save_solutions" else ()
    with monkeypatch.context() as patched:
        stop_at(patched, target, name, when, sends)
        (code, _, err), _ = tuned(call, folder, *METHODS[method], *often)
    assert code == (128 + sends if sends else 130)
    solved = {"while portion 2 is solved": 1, "once portion 2 is solved": 2}
    assert err.count("closed form: ") == solved.get(stop, err.count("closed form: "))
    torch.manual_seed(1)
    (code, result, err), folder = tuned(call, folder, *METHODS[method])
    assert code == 0, err
    assert "portion 1 of" not in err and (name != "step" or "resuming after epoch" in err)
    assert_same(folder, result, expected, whole, fine_tuned=result["fine_tuned"])
    assert 0 < result["fine_tuned"] <= 18
