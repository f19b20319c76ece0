"""Counts against torch.nn.utils.prune, deduplication and reuse by hand, and what the error messages name."""

import itertools
import json

import pytest
from helpers import fails, outcome, read_json, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.prune import _compute_nparams_toprune

from common.composing.configurations import (
    Configurations,
    nth_configuration,
    random_configurations,
    read_configurations,
    removed_count,
    uniform_configurations,
)
from common.composing.scheme import DENSE, Scheme, make_scheme, read_scheme
from common.runtime.errors import UserError
from common.runtime.records import sealed

MODEL = {"name": "tiny", "type": "t5", "fingerprint": "f00d"}
# Two layers, each with an attention module of 8 heads and its out-projection, and a feed-forward block.
MODULES = {
    "0.attn": {"kind": "attention", "heads": 8},
    "0.attn.o": {"kind": "linear", "weights": 1000, "block": "0.attn", "linear": "o"},
    "0.ff.wi": {"kind": "linear", "weights": 2000, "block": "0.ff", "linear": "wi"},
    "0.ff.wo": {"kind": "linear", "weights": 2000, "block": "0.ff", "linear": "wo"},
    "1.attn": {"kind": "attention", "heads": 8},
    "1.attn.o": {"kind": "linear", "weights": 1000, "block": "1.attn", "linear": "o"},
    "1.ff.wi": {"kind": "linear", "weights": 2000, "block": "1.ff", "linear": "wi"},
    "1.ff.wo": {"kind": "linear", "weights": 2000, "block": "1.ff", "linear": "wo"},
}


def scheme_of(*configs, modules=MODULES):
    return make_scheme(Configurations(MODEL, modules, list(configs)))


def issue_configurations():
    return uniform_configurations(
        MODEL,
        MODULES,
        [{"attention": 0.25, "linear": 0.3}, {"attention": 0.5, "linear": 0.3}, {"attention": 0.25, "linear": 0.5}],
    )


# --- counts --------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0, 1), size=st.integers(1, 10**7))
def test_removed_count_is_torchs(rate, size):
    assert removed_count(rate, size) == _compute_nparams_toprune(rate, size)


# --- variants and reuse --------------------------------------------------------------------------------------------


def test_rates_that_remove_the_same_heads_are_one_variant():
    """0.25 and 0.3 of 8 heads are 2 heads, 0.4 are 3."""
    scheme = scheme_of({"0.attn": 0.25}, {"0.attn": 0.3}, {"0.attn": 0.4})
    assert scheme.blocks == {
        "0.attn": {"heads-2": {"heads": 2, "weights": {"o": 0}}, "heads-3": {"heads": 3, "weights": {"o": 0}}}
    }
    assert [config["0.attn"] for config in scheme.configs] == ["heads-2", "heads-2", "heads-3"]


def test_the_issues_three_configurations_by_hand():
    """An attention block differs in all three (2 heads + 300, 4 + 300, 2 + 500); a feed-forward block in two.

    Two layers: 2 * (3 + 2) = 10 variants with reuse, 3 * 4 blocks = 12 without.
    """
    scheme = make_scheme(issue_configurations())
    attention = {
        "heads-2_o-300": {"heads": 2, "weights": {"o": 300}},
        "heads-4_o-300": {"heads": 4, "weights": {"o": 300}},
        "heads-2_o-500": {"heads": 2, "weights": {"o": 500}},
    }
    forward = {
        "wi-600_wo-600": {"heads": 0, "weights": {"wi": 600, "wo": 600}},
        "wi-1000_wo-1000": {"heads": 0, "weights": {"wi": 1000, "wo": 1000}},
    }
    assert scheme.blocks == {"0.attn": attention, "0.ff": forward, "1.attn": attention, "1.ff": forward}
    assert len(scheme.variants()) == 10 and scheme.count_without_reuse() == 12
    assert scheme.configs[1] == {
        "0.attn": "heads-4_o-300",
        "0.ff": "wi-600_wo-600",
        "1.attn": "heads-4_o-300",
        "1.ff": "wi-600_wo-600",
    }
    assert [block for block, _ in scheme.variants()] == ["0.attn"] * 3 + ["0.ff"] * 2 + ["1.attn"] * 3 + ["1.ff"] * 2


def test_a_block_with_nothing_removed_is_dense_and_counts_nowhere():
    """One block pruned in one of two configurations; 0.02 of 8 heads rounds to none."""
    scheme = scheme_of({"0.ff.wi": 0.5}, {"0.attn": 0.02})
    assert scheme.blocks == {"0.ff": {"wi-1000": {"heads": 0, "weights": {"wi": 1000, "wo": 0}}}}
    assert scheme.configs[0] == {"0.attn": DENSE, "0.ff": "wi-1000", "1.attn": DENSE, "1.ff": DENSE}
    assert set(scheme.configs[1].values()) == {DENSE}
    assert scheme.count_without_reuse() == 1


def test_requested_means_weigh_every_module_by_its_size():
    """By hand: heads (0.5 * 8 + 0 * 8) / 16; weights (0.4 * 1000 + 0.1 * 2000) / 10000."""
    scheme = scheme_of({"0.attn": 0.5, "0.attn.o": 0.4, "1.ff.wo": 0.1})
    assert scheme.requested == [{"attention": 0.25, "linear": 0.06}]


def test_a_configuration_that_is_not_there_is_named_with_the_range():
    with pytest.raises(UserError, match=r"c\.json: has no configuration 3; its 3 are numbered 0 to 2"):
        nth_configuration(issue_configurations().configs, 3, "c.json")


RANDOM = {"attention": [0.25, 0.5], "linear": [0.3, 0.5, 0.7]}


def test_random_rates_are_the_blocks_own_and_its_linears_share_one():
    """Oracle: the rates of each block, gathered from the configurations."""
    drawn = random_configurations(MODEL, MODULES, RANDOM, 60, seed=1)
    assert (drawn.model, drawn.modules, len(drawn.configs)) == (MODEL, MODULES, 60)
    seen = {}
    for config in drawn.configs:
        assert list(config) == list(MODULES)
        for name, rate in config.items():
            block = MODULES[name].get("block", name)
            seen.setdefault((block, MODULES[name]["kind"]), []).append(rate)
        assert config["0.ff.wi"] == config["0.ff.wo"] and config["1.ff.wi"] == config["1.ff.wo"]
    assert len(seen) == 6 and all(set(rates) == set(RANDOM[kind]) for (_, kind), rates in seen.items())
    assert len({tuple(rates) for rates in seen.values()}) >= 4  # blocks are drawn apart


def test_random_configurations_depend_on_the_seed_and_more_only_come_behind():
    configs = random_configurations(MODEL, MODULES, RANDOM, 20, seed=3).configs
    assert random_configurations(MODEL, MODULES, RANDOM, 7, seed=3).configs == configs[:7]
    assert random_configurations(MODEL, MODULES, RANDOM, 20, seed=4).configs != configs


def test_random_configurations_differ_until_there_are_no_more():
    """Oracle: the product of the choices, for each of four blocks, two of which have heads: 2^2 · 2^4."""
    rates = {"attention": [0.25, 0.5, 0.25], "linear": [0.3, 0.5]}
    places = [("0.attn",), ("0.attn.o",), ("0.ff.wi", "0.ff.wo"), ("1.attn",), ("1.attn.o",), ("1.ff.wi", "1.ff.wo")]
    every = [
        {name: rate for names, rate in zip(places, combination) for name in names}
        for combination in itertools.product(*(set(rates[MODULES[names[0]]["kind"]]) for names in places))
    ]
    configs = random_configurations(MODEL, MODULES, rates, 64, seed=0).configs
    assert len(every) == 64 and all(config in configs for config in every)
    with pytest.raises(UserError, match="64 different configurations, not 65"):
        random_configurations(MODEL, MODULES, rates, 65, seed=0)


# --- files ---------------------------------------------------------------------------------------------------------


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_scheme_survives_the_file(tmp_path):
    scheme = make_scheme(issue_configurations(), {"path": "conf.json", "digest": "f00d"})
    read = read_scheme(write(tmp_path / "conf_prune.json", scheme.to_json()))
    assert read == scheme and isinstance(read, Scheme)
    assert read.variants() == scheme.variants()  # and the order of the blocks


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scheme: scheme["blocks"]["0.attn"]["heads-2_o-300"].update(heads=3),
        lambda scheme: scheme["configs"][0].update({"0.ff": DENSE}),
        lambda scheme: scheme["model"].update(fingerprint="beef"),
        lambda scheme: scheme.pop("digest"),
        lambda scheme: scheme.update(sealed(scheme | {"blocks": {"0.attn": {"heads-2": 2}}})),
    ],
    ids=["count", "choice", "model", "no digest", "sealed again"],
)
def test_a_scheme_that_was_edited_is_refused_with_the_remedy(tmp_path, spoil):
    content = json.loads(json.dumps(make_scheme(issue_configurations()).to_json()))
    spoil(content)
    path = write(tmp_path / "conf_prune.json", content)
    with pytest.raises(UserError, match=r"conf_prune\.json: .*regenerate it from conf\.json"):
        read_scheme(path)


def test_each_file_in_the_others_place_is_called_by_its_name(tmp_path):
    configurations = issue_configurations()
    conf = write(tmp_path / "conf.json", configurations.to_json())
    scheme = write(tmp_path / "conf_prune.json", make_scheme(configurations).to_json())
    with pytest.raises(UserError, match=r"conf_prune\.json: is a scheme"):
        read_configurations(scheme)
    with pytest.raises(UserError, match=r"conf\.json: is a conf\.json; prune_scheme_generator\.py"):
        read_scheme(conf)


def with_config(config):
    return {"version": 1, "model": MODEL, "modules": MODULES, "configs": [{}, config]}


@pytest.mark.parametrize(
    "rate, words",
    [
        ("0.3", "must be a number such as 0.3, not '0.3'"),
        (True, "must be a number"),
        (1.01, "outside [0, 1]"),
        (-0.1, "outside [0, 1]"),
        (10**400, "outside [0, 1]"),
        (
            0.95,
            "removes all 8 heads; the largest usable rate is 0.875 (7 of 8 heads), or 1, which leaves the block out",
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_bad_rate_is_named_with_file_configuration_and_module(tmp_path, rate, words):
    path = write(tmp_path / "c.json", with_config({"0.attn": rate}))
    with pytest.raises(UserError) as error:
        read_configurations(path)
    message = str(error.value)
    assert f"{path}: configuration 1: 0.attn: " in message and words in message and "\n" not in message


@pytest.mark.parametrize(
    "content, words",
    [
        (with_config({"2.attn": 0.5}), "configuration 1: unknown module '2.attn'"),
        (with_config([0.5]), "'configs': item 1: a list of 1 where an object belongs"),
        (with_config({}) | {"modules": {"a": {"kind": "conv"}}}, "'kind': 'conv' where one of attention,"),
        (
            with_config({}) | {"modules": {"a": {"kind": "attention", "heads": "8"}}},
            "'heads': '8' where a whole number",
        ),
        (with_config({}) | {"modules": {"a": {"kind": "linear", "weights": 9}}}, "'block' is missing"),
        (with_config({}) | {"version": 2}, "format version 2 where 1 belongs; make it again with config_generator.py"),
        (with_config({}) | {"model": {"name": "x"}}, "'model': 'type' is missing"),
    ],
)
def test_a_malformed_conf_json_is_refused_by_name(tmp_path, content, words):
    path = write(tmp_path / "c.json", content)
    with pytest.raises(UserError) as error:
        read_configurations(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


@pytest.mark.parametrize("rate", [1, 1.0])
def test_not_all_weights_of_a_linear_can_go(tmp_path, rate):
    path = write(tmp_path / "c.json", with_config({"0.attn": 1, "0.attn.o": rate}))
    with pytest.raises(UserError) as error:
        read_configurations(path)
    assert f"{path}: configuration 1: 0.attn.o: rate {rate} is outside [0, 1): " in str(error.value)


@pytest.mark.parametrize("kind, parts", [("attention", "heads"), ("feed_forward", "neurons")])
def test_rate_1_leaves_a_block_out(kind, parts):
    """Of 8 parts all 8 go; integer or not, it is one variant."""
    modules = {"0.part": {"kind": kind, parts: 8}}
    configurations = uniform_configurations(MODEL, modules, [{kind: 1}, {kind: 1.0}, {kind: 0.875}])
    scheme = make_scheme(configurations)
    assert [config["0.part"] for config in scheme.configs] == [f"{parts}-8", f"{parts}-8", f"{parts}-7"]
    assert scheme.blocks["0.part"][f"{parts}-8"] == {"heads": 0, "weights": {}} | {parts: 8}
    assert [each[kind] for each in scheme.requested] == [1, 1, 0.875]


# --- files that no longer belong together ------------------------------------------------------------------------


def test_a_scheme_that_is_older_than_its_conf_json_is_not_pruned_by(workshop, chain, here):
    """Two configurations are made; then one rate is edited, in another layout of the file first."""
    (here / "conf.json").write_text(json.dumps(read_json(chain / "conf.json")))
    run("prune_scheme_generator.py")
    run(f"prune.py -m {workshop}/model/t5 -o pruned")
    conf = read_json(here / "conf.json")
    conf["configs"][0]["encoder.block.0.layer.0.SelfAttention"] = 0.75
    write(here / "conf.json", conf)
    err = fails(f"prune.py -m {workshop}/model/t5 -o pruned")
    assert "conf.json: is not what conf_prune.json was made from" in err and "prune_scheme_generator.py" in err
    _, _, err = outcome(f"block-level_finetuning.py -m {workshop}/model/t5 -p pruned --method reconstruct --limit 8")
    assert "conf.json: 1 of its variants are not in pruned" in err
    run("prune_scheme_generator.py")
    assert run(f"prune.py -m {workshop}/model/t5 -o pruned")["pruned"] == 1
