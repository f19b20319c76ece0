"""Jobs of their own for shares of the blocks, on one shared folder."""

import pytest
from helpers import outcome, read_json


def flags(workshop, chain, output, *more):
    model = ("-m", workshop / "model" / "t5", "-p", chain / "pruned", "-o", output, "--batch-size", 8)
    return ("block-level_finetuning.py", *model, "--method", "train", "--epochs", 2, *more)


def test_shards_make_the_library_that_one_job_makes(succeeds, workshop, chain, tmp_path):
    """Oracle: the chain's own run. A shard that runs again finds its variants there."""
    library = tmp_path / "tuned"
    done = [succeeds(*flags(workshop, chain, library, "--shard", f"{number}/3")) for number in (2, 0, 1)]
    assert [each["fine_tuned"] for each in done] == [len_of_share(chain, number) for number in (2, 0, 1)]
    assert sum(each["fine_tuned"] for each in done) == 26
    assert {path.name: path.read_bytes() for path in library.glob("*.npy")} == {
        path.name: path.read_bytes() for path in (chain / "tuned").glob("*.npy")
    }
    names = [set(read_json(each / "record.json")["variants"]) for each in (library, chain / "tuned")]
    assert names[0] == names[1]
    assert (tmp_path / "tuned-shard-1-of-3.csv").exists() and not list(tmp_path.rglob("*.checkpoint"))
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    assert succeeds(*flags(workshop, chain, library, "--shard", "0/3"))["fine_tuned"] == 0
    assert succeeds(*flags(workshop, chain, library))["skipped"] == 26  # nothing is left for the whole
    assert {path.name: path.read_bytes() for path in library.iterdir()} == before


def len_of_share(chain, number):
    entries = read_json(chain / "pruned" / "record.json")["variants"].values()
    blocks = list(dict.fromkeys(entry["block"] for entry in entries))
    return sum(blocks.index(entry["block"]) % 3 == number for entry in entries)


def test_a_search_finds_what_shards_have_scored(succeeds, workshop, chain, tmp_path):
    """Oracle: the search that scores all by itself."""
    model = ("-m", workshop / "model" / "t5", "-c", chain / "conf.json", "--batch-size", 8)
    for name, shards in (("alone", 0), ("shared", 2)):
        succeeds(*flags(workshop, chain, tmp_path / name))
        search = ("config_generator.py", *model, "--search", tmp_path / name)
        scored = [succeeds(*search, "--shard", f"{number}/{shards}")["scored"] for number in range(shards)]
        result = succeeds(*search, "--budget", 0.7, "-o", tmp_path / f"{name}.json")
        assert result["scored"] + sum(scored) == 26 and (result["scored"] == 0) == bool(shards)
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()


@pytest.mark.parametrize("given", ["1", "4/4", "-1/4", "1/x", "1/0", ""])
def test_what_is_no_share(given):
    code, result, err = outcome(f"block-level_finetuning.py --shard={given}")
    assert (code, result) == (2, None) and "is no share such as 0/4" in err


@pytest.mark.parametrize(
    "script, more, words",
    [
        ("block-level_finetuning.py", ("--method", "joint"), "the variants of --method joint are tuned together"),
        ("config_generator.py", ("--attention", 0.5, "--linear", 0.5, "-n", 1), "--shard: goes with --search"),
        ("config_generator.py", ("--search", "x", "--budget", 0.5), "--budget: goes with the search that follows"),
    ],
)
def test_shares_of_what_has_none(call, workshop, chain, monkeypatch, script, more, words):
    monkeypatch.chdir(chain)
    code, result, err = call(script, "-m", workshop / "model" / "t5", "--shard", "0/2", *more)
    assert (code, result) == (2, None) and words in err
