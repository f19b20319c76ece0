"""Several libraries read as one, through the scripts: which one a variant is taken from, and what is refused.

The winner of each block is told by the two records, read by hand.
"""

import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from helpers import T5_BLOCKS, edited_json, files_in, is_one_line, load_script, loss_per_token, pairs_of, read_json

from common import schemes


@pytest.fixture(scope="module")
def two(workshop, chain, tmp_path_factory):
    """A copy of the chain's folder with a second fine-tuned library, "solved", whose variants are better or worse."""
    folder = shutil.copytree(chain, tmp_path_factory.mktemp("two") / "chain")
    arguments = ("-m", workshop / "model" / "t5", "-p", folder / "pruned", "-o", folder / "solved", "--quiet")
    settings = ("--method", "reconstruct", "--calibration", 4, "--ridge", 3, "--batch-size", 8)
    assert load_script("block-level_finetuning.py").main([*map(str, (*arguments, *settings))]) == 0
    return folder


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / "two")


@pytest.fixture
def flags(workshop, folder):
    """flags(*libraries): what composing out of some of the folder's libraries takes."""

    def of(*libraries):
        model = workshop / "model" / "t5"
        return ("-m", model, "-c", folder / "conf.json", "-p", *(folder / library for library in libraries))

    return of


def entries(folder, library):
    return read_json(folder / library / "record.json")["variants"]


def winners(folder):
    """{variant of a block: the name of the library whose held-out error is smaller}."""
    tuned, solved = (entries(folder, library) for library in ("tuned", "solved"))
    assert tuned.keys() == solved.keys()
    found = {name: "solved" if solved[name]["nmse_after"] < tuned[name]["nmse_after"] else "tuned" for name in tuned}
    assert set(found.values()) == {"tuned", "solved"}
    return found


def variants_of(folder, configurations, n):
    """{block: variant} of a configuration."""
    return schemes.make_scheme(schemes.read_configurations(folder / configurations)).configs[n]


def check_composed(model, folder, chosen):
    """The weights of a model's folder are those of the winners' files, bit for bit; the record says whose they are."""
    won, tensors = winners(folder), safetensors.torch.load_file(model / "model.safetensors")
    gave = {"tuned": [], "solved": []}
    for block, variant in chosen.items():
        library = won[f"{block}.{variant}"]
        arrays = np.load(folder / library / f"{block}.{variant}.npy", allow_pickle=False)
        for field in arrays.dtype.names:
            if not field.endswith(".keep"):
                assert np.array_equal(tensors[f"{block}.{field}"].numpy(), arrays[field])
        gave[library].append(block)
    assert all(gave.values())
    record = read_json(model / "record.json")
    assert record["variants"] == chosen and "library_stage" not in record
    assert record["libraries"] == [
        {"folder": library, "stage": "fine-tuned", "blocks": gave[library]} for library in gave
    ]
    assert record["made_from"]["variants"] == {
        block: entries(folder, won[f"{block}.{variant}"])[f"{block}.{variant}"]["key"]
        for block, variant in chosen.items()
    }


def test_a_model_is_composed_of_the_better_variants(call, succeeds, folder, flags):
    """Oracles: the records and the files, by numpy. With the libraries in the other order it is the same model."""
    succeeds("compose_model.py", *flags("tuned", "solved"), "-n", 0, 1, 2, "-o", folder / "best-{n}")
    for n in range(3):
        check_composed(folder / f"best-{n}", folder, variants_of(folder, "conf.json", n))
    before = files_in(folder)
    code, _, err = call("compose_model.py", *flags("solved", "tuned"), "-n", 0, 1, 2, "-o", folder / "best-{n}")
    assert code == 0 and f"out of {folder / 'solved'}, {folder / 'tuned'}" in err
    assert files_in(folder) == before


def test_one_library_gives_the_record_it_always_gave(succeeds, folder, flags):
    """By hand: the record's keys, and what its key is made from."""
    succeeds("compose_model.py", *flags("solved"), "-n", 0, "-o", folder / "one")
    record, there, chosen = (
        read_json(folder / "one" / "record.json"),
        entries(folder, "solved"),
        variants_of(folder, "conf.json", 0),
    )
    assert set(record) == {
        *("version", "script", "key", "made_from", "task", "original", "variants"),
        *("library_stage", "data", "tokenizer", "versions", "files", "digest"),
        *("base_model", "configuration", "removed", "made_with"),  # for the model's card
    }
    assert record["library_stage"] == "fine-tuned"
    assert record["made_from"] == {
        "model": read_json(folder / "conf.json")["model"]["fingerprint"],
        "variants": {block: there[f"{block}.{variant}"]["key"] for block, variant in chosen.items()},
        "compact": False,
    }


@pytest.mark.parametrize("script", ["compose_model.py", "model-level_finetuning.py"])
def test_the_default_is_the_one_fine_tuned_library(script):
    parser = load_script(script).build_parser()
    assert parser.parse_args(["-n", "0"]).library == ["modules-finetuned"]
    assert "variant (default: modules-finetuned)" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("libraries", [("pruned", "tuned"), ("tuned", "pruned")])
def test_beside_a_library_without_errors_the_first_one_counts(succeeds, folder, flags, libraries):
    """A pruned library has no held-out errors. Oracle: the model composed out of the first library alone."""
    succeeds("compose_model.py", *flags(*libraries), "-n", 0, "-o", folder / "both")
    succeeds("compose_model.py", *flags(libraries[0]), "-n", 0, "-o", folder / "first")
    both, first = (safetensors.torch.load_file(folder / name / "model.safetensors") for name in ("both", "first"))
    assert both.keys() == first.keys() and all(torch.equal(both[name], first[name]) for name in both)
    stages = {"pruned": "pruned", "tuned": "fine-tuned"}
    assert read_json(folder / "both" / "record.json")["libraries"] == [
        {"folder": libraries[0], "stage": stages[libraries[0]], "blocks": T5_BLOCKS},
        {"folder": libraries[1], "stage": stages[libraries[1]], "blocks": []},
    ]


def test_fine_tuning_starts_from_the_better_variants(succeeds, folder, flags, workshop):
    """Oracle: the loss of the model that compose_model.py makes of them, one pair at a time."""
    succeeds("compose_model.py", *flags("tuned", "solved"), "-n", 1, "-o", folder / "best")
    more = ("-n", 1, "--epochs", 1, "--batch-size", 8, "-o", folder / "finished")
    result = succeeds("model-level_finetuning.py", *flags("tuned", "solved"), *more)
    tokenizer = transformers.AutoTokenizer.from_pretrained(workshop / "tokenizer" / "t5")
    composed = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "best").eval()
    expected = loss_per_token(composed, tokenizer, pairs_of(workshop, "val"))
    assert result["val_loss_before"] == pytest.approx(expected, abs=1e-5)
    records = [read_json(folder / name / "record.json") for name in ("best", "finished")]
    assert records[0]["libraries"] == records[1]["libraries"]


def test_a_search_takes_the_better_variants(succeeds, folder, workshop):
    """Oracles: the records, the files, and the loss of the composed model, one pair at a time."""
    model, libraries = workshop / "model" / "t5", (folder / "tuned", folder / "solved")
    searching = ("-m", model, "-c", folder / "conf.json", "--search", *libraries, "--objective", "loss")
    more = ("--budget", 0.8, 0.65, "--report", folder / "report.json", "-o", folder / "found.json", "--batch-size", 8)
    result = succeeds("config_generator.py", *searching, *more)
    won = winners(folder)
    assert result["scored"] == len(won)
    for each in read_json(folder / "report.json")["variants"]:
        name = f"{each['block']}.{each['variant']}"
        assert each["library"] == str(folder / won[name])
        assert each["nmse"] == entries(folder, won[name])[name]["nmse_after"]
    for library in ("tuned", "solved"):  # a score is noted where its variant is
        noted = {name for name, entry in entries(folder, library).items() if "score" in entry}
        assert noted == {name for name, winner in won.items() if winner == library}
    again = succeeds("config_generator.py", *searching, *more)
    assert again["scored"] == 0 and again["found"] == result["found"]

    composing = ("-m", model, "-c", folder / "found.json", "-p", *libraries, "-n", 0, 1)
    succeeds("compose_model.py", *composing, "-o", folder / "best-{n}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(workshop / "tokenizer" / "t5")
    for n, figures in enumerate(result["found"]):
        chosen = variants_of(folder, "found.json", n)
        changed = {block: variant for block, variant in chosen.items() if variant != "dense"}
        check_composed(folder / f"best-{n}", folder, changed)
        composed = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / f"best-{n}").eval()
        expected = loss_per_token(composed, tokenizer, pairs_of(workshop, "val"))
        assert figures["loss"] == pytest.approx(expected, abs=1e-5) and figures["fraction"] <= (0.8, 0.65)[n]


def test_libraries_complete_each_other(succeeds, folder, flags):
    """Each of two lacks what the other has. Oracle: both whole, of which the better one of each variant was kept."""
    succeeds("compose_model.py", *flags("tuned", "solved"), "-n", 2, "-o", folder / "whole")
    for name, winner in winners(folder).items():
        loser = folder / {"tuned": "solved", "solved": "tuned"}[winner]
        edited_json(
            loser / "record.json", loser / "record.json", lambda record, lost=name: record["variants"].pop(lost)
        )
    before = files_in(folder)
    succeeds("compose_model.py", *flags("tuned", "solved"), "-n", 2, "-o", folder / "whole")
    assert files_in(folder) == before


# --- what is refused -------------------------------------------------------------------------------------------

WAYS = ("compose_model.py", "model-level_finetuning.py", "config_generator.py")


@pytest.fixture
def refuses(call, folder):
    """refuses(script, model, *libraries): the one line on stderr, once it is sure that no file was touched or made."""

    def run(script, model, *libraries):
        before = files_in(folder)
        flag, more = ("--search", ("--budget", 0.8)) if script == "config_generator.py" else ("-p", ("-n", 2))
        arguments = ("-m", model, "-c", folder / "conf.json", flag, *libraries, *more, "-o", folder / "none")
        code, result, err = call(script, *arguments)
        assert (code, result) == (2, None) and is_one_line(err) and ": error: " in err, err
        assert files_in(folder) == before
        return err

    return run


@pytest.mark.parametrize("script", WAYS)
def test_the_same_library_twice_is_refused(refuses, workshop, folder, script):
    twice = (folder / "tuned", folder / "solved", folder / "solved" / ".." / "tuned")
    assert f"is the same library as {folder / 'tuned'}" in refuses(script, workshop / "model" / "t5", *twice)


@pytest.mark.parametrize("script", WAYS)
def test_a_library_of_another_model_among_others_is_refused(refuses, workshop, folder, script):
    def edit(record):
        record["model"] = {"name": "elsewhere", "type": "t5", "fingerprint": "beef"}

    edited_json(folder / "solved" / "record.json", folder / "solved" / "record.json", edit)
    err = refuses(script, workshop / "model" / "t5", folder / "tuned", folder / "solved")
    assert f"{folder / 'solved'}: was made for another model (elsewhere)" in err


@pytest.mark.parametrize("script", WAYS)
def test_a_variant_that_no_library_has_is_refused(refuses, workshop, folder, script):
    """The message names all libraries that were looked into."""
    name = f"{T5_BLOCKS[0]}.{variants_of(folder, 'conf.json', 2)[T5_BLOCKS[0]]}"
    for library in ("tuned", "solved"):
        path = folder / library / "record.json"
        edited_json(path, path, lambda record: record["variants"].pop(name))
    err = refuses(script, workshop / "model" / "t5", folder / "tuned", folder / "solved")
    assert f"{folder / 'tuned'}, {folder / 'solved'}: has no variant " in err and "prune.py" in err


@pytest.mark.parametrize("error", ["0.1", None, [0.1]])
def test_an_error_that_is_no_number_is_refused(refuses, workshop, folder, error):
    path = folder / "solved" / "record.json"
    edited_json(path, path, lambda record: next(iter(record["variants"].values())).update(nmse_after=error))
    err = refuses("compose_model.py", workshop / "model" / "t5", folder / "tuned", folder / "solved")
    assert f"{path}: 'variants': " in err and "'nmse_after': " in err and "where a number from 0 up belongs" in err
