"""Configurations: what the user wants, a pruning rate for every module of a model, in `conf.json`.

A block is one attention or feed-forward sublayer; a module of these kinds has its block's name.
"""

import math
import random
from dataclasses import dataclass

from common.runtime.errors import UserError
from common.runtime.records import FORMAT_VERSION, digest, read_json
from common.runtime.schema import check, shown

# Kinds of modules, and what a rate takes a fraction of. A feed-forward module is listed only where neurons are to go.
SIZES = {"attention": "heads", "linear": "weights", "feed_forward": "neurons"}
MODEL = {"name": str, "type": str, "fingerprint": str}  # which model a file was made for
SIZE = range(1, 2**40)
MODULES = {
    "attention": {"kind": str, "heads": SIZE},
    "linear": {"kind": str, "weights": SIZE, "block": str, "linear": str},
    "feed_forward": {"kind": str, "neurons": SIZE},
}
CONFIGURATIONS = {
    "version": object,
    "model": MODEL,
    "modules": {str: {"kind": set(SIZES), str: object}},
    "configs": [{str: object}],  # the rates depend on the modules
}
CONFIGURATIONS_BY = "config_generator.py"


@dataclass(frozen=True)
class Configurations:
    """`conf.json`: the model {name, type, fingerprint}, its modules, and one {module: rate} a configuration."""

    model: dict[str, str]
    modules: dict[str, dict]
    configs: list[dict[str, float]]

    def to_json(self) -> dict:
        return {"version": FORMAT_VERSION, "model": self.model, "modules": self.modules, "configs": self.configs}

    def digest(self) -> str:
        return digest(self.to_json())


def uniform_configurations(model, modules, rates):
    """One configuration for each of some {kind of module: rate}; a UserError if a rate is not usable for a module."""
    configs = [{name: of_kind[module["kind"]] for name, module in modules.items()} for of_kind in rates]
    for i, config in enumerate(configs):
        for name, rate in config.items():
            _check_rate(rate, modules[name], f"configuration {i}: {name}")
    return Configurations(model, modules, configs)


def grid_rates(attention, linear, feed_forward=None):
    """As few {kind of module: rate} as bring every attention rate, and every feed-forward rate, together with every
    linear rate. A block has rates of one of the two kinds, and linear ones, so it then has every combination."""
    rates = []
    for linear_rate in linear:
        for n in range(max(len(attention), len(feed_forward or ()))):
            rates.append({"attention": attention[n % len(attention)], "linear": linear_rate})
            if feed_forward:
                rates[-1]["feed_forward"] = feed_forward[n % len(feed_forward)]
    return rates


def random_configurations(model, modules, rates, count, seed):
    """`count` configurations, all different, the n-th the same for any count: each block's rates are drawn, one of each
    kind, its Linears having one, from {kind of module: rates}.

    Raises:
        UserError: a rate is not usable for a module, or there are fewer configurations than that.
    """
    for name, module in modules.items():
        for rate in rates[module["kind"]]:
            _check_rate(rate, module, name)
    places = list(dict.fromkeys((block_of(name, module), module["kind"]) for name, module in modules.items()))
    rates = {kind: list(dict.fromkeys(of_kind)) for kind, of_kind in rates.items()}
    possible = math.prod(len(rates[kind]) for _, kind in places)
    if count > possible:
        raise UserError(f"these rates make {possible} different configurations, not {count}")
    rng, drawn = random.Random(seed), {}  # a dict keeps the order
    while len(drawn) < count:
        drawn[tuple(rng.choice(rates[kind]) for _, kind in places)] = None
    configs = []
    for choice in drawn:
        of_place = dict(zip(places, choice))
        configs.append({name: of_place[block_of(name, module), module["kind"]] for name, module in modules.items()})
    return Configurations(model, modules, configs)


def read_configurations(path) -> Configurations:
    """Read and check a `conf.json`; a UserError names the file, the configuration, the module and the remedy."""
    value = read_json(path, CONFIGURATIONS_BY)
    if "blocks" in value:
        raise UserError(
            f"{path}: is a scheme (prune_scheme_generator.py's output); give the conf.json it was made from"
        )
    check_version(path, value, CONFIGURATIONS_BY)
    remedy = f"{CONFIGURATIONS_BY} writes such a file"
    check(path, value, CONFIGURATIONS, remedy)
    for name, module in value["modules"].items():
        check(f"{path}: 'modules': {name!r}", module, MODULES[module["kind"]], remedy)
    if not (value["modules"] and value["configs"]):
        raise UserError(f"{path}: has no modules or no configurations; {remedy}")
    modules, configs = value["modules"], value["configs"]
    for i, config in enumerate(configs):
        where = f"{path}: configuration {i}"
        for name, rate in config.items():
            if name not in modules:
                raise UserError(f"{where}: unknown module {name!r}; the model's modules are listed under 'modules'")
            _check_rate(rate, modules[name], f"{where}: {name}")
    return Configurations(value["model"], modules, configs)


def nth_configuration(configs: list[dict], nth: int, path) -> dict:
    """The n-th of the configurations that are read from `path`, or of what is made of them; a UserError if none is."""
    if not 0 <= nth < len(configs):
        raise UserError(f"{path}: has no configuration {nth}; its {len(configs)} are numbered 0 to {len(configs) - 1}")
    return configs[nth]


def check_version(path, value, made_by):
    if value.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {shown(value.get('version'))} where {FORMAT_VERSION} belongs; "
            f"make it again with {made_by}"
        )


def _check_rate(rate, module, where):
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise UserError(f"{where}: the rate must be a number such as 0.3, not {shown(rate)}")
    parts = SIZES[module["kind"]]
    size = module[parts]
    if parts != "weights" and rate == 1:
        return  # the block is left out
    if not 0 <= rate < 1:  # NaN is outside too
        allowed = "[0, 1)" if parts == "weights" else "[0, 1]"
        raise UserError(f"{where}: rate {shown(rate)} is outside {allowed}: it is the fraction that is removed")
    if parts != "weights" and removed_count(rate, size) == size:
        raise UserError(
            f"{where}: rate {rate} removes all {size} {parts}; the largest usable rate is {(size - 1) / size:g} "
            f"({size - 1} of {size} {parts}), or 1, which leaves the block out"
        )


def removed_count(rate: float, size: int) -> int:
    """How many of `size` a pruning rate removes, rounded as `torch.nn.utils.prune` rounds (halves to even)."""
    return round(rate * size)


def block_of(name, module):
    """The name of the block that a module of `conf.json` lies in."""
    return module["block"] if module["kind"] == "linear" else name


def looks_like_configurations(value: object) -> bool:
    """Whether a JSON value is meant as a `conf.json`, perhaps edited by hand."""
    return isinstance(value, dict) and {"version", "model", "modules", "configs"} <= value.keys()
