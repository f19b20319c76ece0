"""Jobs of their own for shares of the blocks, on one shared folder."""

import shutil

import pytest
from helpers import fails, read_json, run


def tuning(t5, chain, output, more=""):
    files = f"-m {t5} -p {chain}/pruned -o {output}"
    return run(f"block-level_finetuning.py {files} --batch-size 8 --method train --epochs 2 {more}")


def test_shards_make_the_library_that_one_job_makes(t5, chain, here):
    """Oracle: the chain's own run. A shard that runs again finds its variants there."""
    done = [tuning(t5, chain, "tuned", f"--shard {number}/3")["fine_tuned"] for number in (2, 0, 1)]
    assert done == [len_of_share(chain, number) for number in (2, 0, 1)] and sum(done) == 26
    library = here / "tuned"
    assert {path.name: path.read_bytes() for path in library.glob("*.npy")} == {
        path.name: path.read_bytes() for path in (chain / "tuned").glob("*.npy")
    }
    names = [set(read_json(folder / "record.json")["variants"]) for folder in (library, chain / "tuned")]
    assert names[0] == names[1]
    assert (here / "tuned-shard-1-of-3.csv").exists() and not list(here.rglob("*.checkpoint"))
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    assert tuning(t5, chain, "tuned")["skipped"] == 26  # nothing is left for the whole
    assert {path.name: path.read_bytes() for path in library.iterdir()} == before


def len_of_share(chain, number):
    entries = read_json(chain / "pruned" / "record.json")["variants"].values()
    blocks = list(dict.fromkeys(entry["block"] for entry in entries))
    return sum(blocks.index(entry["block"]) % 3 == number for entry in entries)


def test_a_search_finds_what_shards_have_scored(t5, chain, here):
    """Oracle: the search that scores all by itself."""
    search = f"config_generator.py -m {t5} -c {chain}/conf.json --batch-size 8 --score-examples 8"
    for name, shards in (("alone", 0), ("shared", 2)):
        shutil.copytree(chain / "tuned", name)
        scored = [run(f"{search} --search {name} --shard {number}/{shards}")["scored"] for number in range(shards)]
        result = run(f"{search} --search {name} --budget 0.7 --rounds 0 -o {name}.json")
        assert result["scored"] + sum(scored) == 26 and (result["scored"] == 0) == bool(shards)
    assert (here / "shared.json").read_bytes() == (here / "alone.json").read_bytes()


@pytest.mark.parametrize("given", ["1", "4/4", "1/x"])
def test_what_is_no_share(given):
    assert "is no share such as 0/4" in fails(f"block-level_finetuning.py --shard={given}")


@pytest.mark.parametrize(
    "command, words",
    [
        ("block-level_finetuning.py --method joint", "the variants of --method joint are tuned together"),
        ("config_generator.py --attention 0.5 --linear 0.5 -n 1", "--shard: goes with --search"),
        ("config_generator.py --search x --budget 0.5", "--budget: goes with the search that follows"),
    ],
)
def test_shares_of_what_has_none(t5, chain, monkeypatch, command, words):
    monkeypatch.chdir(chain)
    assert words in fails(f"{command} -m {t5} --shard 0/2")
