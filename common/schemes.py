"""Configurations (what the user wants) and schemes (the distinct blocks that takes).

A configuration gives every module a pruning rate. A scheme turns the rates into counts, names every distinct
variant of every block by what is really removed, and says which variant each configuration uses where. Rates that
remove the same heads and weights are therefore one variant, made once.

A block is one attention or feed-forward sublayer. `conf.json` says of each Linear which block it lies in, and under
which name there; an attention or feed-forward module has its block's name.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import UserError
from common.records import FORMAT_VERSION, digest, read_json
from common.schema import HEX, Anything, Either, Fault, ListOf, MapOf, Number, Object, Text, Where, check, shown

DENSE = "dense"  # the variant of a block that nothing is removed from: the original's own block, in no library
# Kinds of modules, and what a rate takes a fraction of. A feed-forward module is listed only where neurons are to go.
SIZES = {"attention": "heads", "linear": "weights", "feed_forward": "neurons"}
MODEL = Object({"name": Text(), "type": Text(), "fingerprint": HEX})  # which model a file was made for
COUNT = Number(0, 2**40, whole=True)
SIZE = Number(1, 2**40, whole=True)
NAME = Text(pattern=r"[^/\\\x00-\x1f]{1,200}", expected="a name without slashes")
MODULE = Either(
    "kind",
    {
        "attention": Object({"kind": Text(), "heads": SIZE}),
        "linear": Object({"kind": Text(), "weights": SIZE, "block": NAME, "linear": NAME}),
        "feed_forward": Object({"kind": Text(), "neurons": SIZE}),
    },
)
CONFIGURATIONS = Object(
    {
        "version": COUNT,
        "model": MODEL,
        "modules": MapOf(MODULE, NAME, smallest=1),
        "configs": ListOf(MapOf(Anything()), "configuration", shortest=1),  # the rates depend on the modules
    }
)
REMOVED = Object({"heads": COUNT, "weights": MapOf(COUNT)}, {"neurons": COUNT})


def _variants_fault(scheme):
    """Whether the parts of a scheme know the same blocks and variants."""
    blocks, configs = scheme["blocks"], scheme["configs"]
    for block, variants in blocks.items():
        for variant, removed in variants.items():
            if variant != _variant_name(removed):
                return Fault(("'blocks'", repr(block)), repr(variant), repr(_variant_name(removed)))
    for i, config in enumerate(configs):
        if config.keys() != configs[0].keys() or not blocks.keys() <= config.keys():
            return Fault(("'configs'", f"configuration {i}"), shown(config), "one with all blocks")
        for block, variant in config.items():
            if variant != DENSE and variant not in blocks.get(block, {}):
                return Fault(("'configs'", f"configuration {i}", repr(block)), repr(variant), "one of its variants")
    if len(scheme["requested"]) != len(configs):
        return Fault(("'requested'",), shown(scheme["requested"]), f"one of {len(configs)}")
    return None


SCHEME = Where(
    Object(
        {
            "version": COUNT,
            "model": MODEL,
            "blocks": MapOf(MapOf(REMOVED, NAME, smallest=1), NAME),
            "configs": ListOf(MapOf(Text(), NAME, smallest=1), "configuration", shortest=1),
            "requested": ListOf(MapOf(Number(0, 1), Text(tuple(SIZES)))),
            "digest": Text(),
        }
    ),
    _variants_fault,
)
CONFIGURATIONS_BY = "config_generator.py"
SCHEME_BY = "prune_scheme_generator.py"


class Pair(NamedTuple):
    """A block and one of its variants, by their names: what is pruned, fine-tuned, stored and reused as one."""

    block: str
    variant: str

    def __str__(self):
        return f"{self.block}.{self.variant}"


def by_block(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each block, {block's name: [pair]}, in the order of the pairs."""
    found = {}
    for pair in pairs:
        found.setdefault(pair.block, []).append(pair)
    return found


@dataclass(frozen=True)
class Configurations:
    """`conf.json`: the model {name, type, fingerprint}, its modules, and one {module: rate} a configuration."""

    model: dict[str, str]
    modules: dict[str, dict]
    configs: list[dict[str, float]]

    def to_json(self) -> dict:
        return {"version": FORMAT_VERSION, "model": self.model, "modules": self.modules, "configs": self.configs}


@dataclass(frozen=True)
class Scheme:
    """`conf_prune.json`.

    `blocks`: {block: {variant: {"heads": heads removed, "weights": {Linear: weights removed}}}};
    where neurons are removed, their number is there as "neurons".
    `configs`: one {block: variant or "dense"} a configuration, over all blocks.
    `requested`: one {kind: mean rate} a configuration, as asked for, each module weighted by its size.
    """

    model: dict[str, str]
    blocks: dict[str, dict[str, dict]]
    configs: list[dict[str, str]]
    requested: list[dict[str, float]]

    def to_json(self) -> dict:
        content = {
            "version": FORMAT_VERSION,
            "model": self.model,
            "blocks": self.blocks,
            "configs": self.configs,
            "requested": self.requested,
        }
        return {**content, "digest": digest(content)}

    def variants(self) -> list[Pair]:
        """All pairs, in the model's order."""
        return [Pair(block, variant) for block, variants in self.blocks.items() for variant in variants]

    def count_without_reuse(self) -> int:
        """How many blocks would be fine-tuned if every configuration had its own."""
        return sum(variant != DENSE for config in self.configs for variant in config.values())


def uniform_configurations(model, modules, rates):
    """The i-th configuration: every module at the i-th rate of its kind.

    Args:
        rates: one {kind of module: rate} a configuration.
    Raises:
        UserError: a rate is not usable for a module.
    """
    configs = [{name: each[module["kind"]] for name, module in modules.items()} for each in rates]
    for i, config in enumerate(configs):
        for name, rate in config.items():
            _check_rate(rate, modules[name], f"configuration {i}: {name}")
    return Configurations(model, modules, configs)


def grid_rates(attention, linear, feed_forward=None):
    """As few {kind of module: rate} as bring every attention rate, and every feed-forward rate, together with every
    linear rate. A block has rates of one of the two kinds, and linear ones, so it then has every combination."""
    rates = []
    for each in linear:
        for n in range(max(len(attention), len(feed_forward or ()))):
            rates.append({"attention": attention[n % len(attention)], "linear": each})
            if feed_forward:
                rates[-1]["feed_forward"] = feed_forward[n % len(feed_forward)]
    return rates


def random_configurations(model, modules, rates, count, seed):
    """`count` configurations, all different: each block's rates are drawn, one of each kind, its Linears having one.

    The n-th is the same for any count.

    Args:
        rates: {kind of module: the rates to draw from}.
    Raises:
        UserError: a rate is not usable for a module, or there are fewer configurations than that.
    """
    for name, module in modules.items():
        for rate in rates[module["kind"]]:
            _check_rate(rate, module, name)
    places = list(dict.fromkeys((block_of(name, module), module["kind"]) for name, module in modules.items()))
    rates = {kind: list(dict.fromkeys(each)) for kind, each in rates.items()}
    possible = math.prod(len(rates[kind]) for _, kind in places)
    if count > possible:
        raise UserError(f"these rates make {possible} different configurations, not {count}")
    rng, drawn = random.Random(seed), {}  # a dict keeps the order
    while len(drawn) < count:
        drawn[tuple(rng.choice(rates[kind]) for _, kind in places)] = None
    configs = []
    for each in drawn:
        of_place = dict(zip(places, each))
        configs.append({name: of_place[block_of(name, module), module["kind"]] for name, module in modules.items()})
    return Configurations(model, modules, configs)


def read_configurations(path) -> Configurations:
    """Read and check a `conf.json`.

    Raises:
        UserError: naming the file, the configuration, the module and the remedy.
    """
    value = read_json(path, CONFIGURATIONS_BY)
    if "blocks" in value:
        raise UserError(f"{path}: is a scheme ({SCHEME_BY}'s output); give the conf.json it was made from")
    _check_version(path, value, CONFIGURATIONS_BY)
    check(path, value, CONFIGURATIONS, f"{CONFIGURATIONS_BY} writes such a file")
    modules, configs = value["modules"], value["configs"]
    for i, config in enumerate(configs):
        where = f"{path}: configuration {i}"
        for name, rate in config.items():
            if name not in modules:
                raise UserError(f"{where}: unknown module {name!r}; the model's modules are listed under 'modules'")
            _check_rate(rate, modules[name], f"{where}: {name}")
    return Configurations(value["model"], modules, configs)


def _check_version(path, value, made_by):
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


def nth_choice(scheme, nth, path):
    """The n-th configuration's {block: variant}, "dense" among them.

    Raises:
        UserError: there is no n-th configuration.
    """
    count = len(scheme.configs)
    if not 0 <= nth < count:
        raise UserError(f"{path}: has no configuration {nth}; its {count} are numbered 0 to {count - 1}")
    return scheme.configs[nth]


def select(scheme: Scheme, nth: int, path) -> tuple[dict[str, str], dict[str, dict]]:
    """The {block: variant} of the n-th configuration, and the variants' counts.

    Args:
        path: of the configurations, for the message.
    Returns:
        ({block: variant}, {block: {"heads", "weights"}}), without the blocks that are left alone.
    Raises:
        UserError: there is no n-th configuration.
    """
    chosen = {block: variant for block, variant in nth_choice(scheme, nth, path).items() if variant != DENSE}
    return chosen, {block: scheme.blocks[block][variant] for block, variant in chosen.items()}


def block_of(name, module):
    """The name of the block that a module of `conf.json` lies in."""
    return module["block"] if module["kind"] == "linear" else name


def make_scheme(configurations: Configurations) -> Scheme:
    """The distinct variants of every block over all configurations."""
    block_modules = {}  # block: the modules that lie in it, in the model's order
    for name, module in configurations.modules.items():
        block = block_of(name, module)
        block_modules.setdefault(block, []).append(name)
    blocks = {block: {} for block in block_modules}
    configs = []
    for config in configurations.configs:
        chosen = {}
        for block, names in block_modules.items():
            removed = {"heads": 0, "weights": {}}
            for name in names:
                module = configurations.modules[name]
                parts = SIZES[module["kind"]]
                count = removed_count(config.get(name, 0), module[parts])
                if parts == "weights":
                    removed["weights"][module["linear"]] = count
                elif count:
                    removed[parts] = count
            variant = _variant_name(removed)
            chosen[block] = variant
            if variant != DENSE:
                blocks[block][variant] = removed
        configs.append(chosen)
    requested = [_mean_rates(configurations.modules, config) for config in configurations.configs]
    return Scheme(configurations.model, {b: v for b, v in blocks.items() if v}, configs, requested)


def _mean_rates(modules, config):
    means = {}
    for kind, size in SIZES.items():
        sizes = {name: module[size] for name, module in modules.items() if module["kind"] == kind}
        if sizes:
            means[kind] = sum(config.get(name, 0) * n for name, n in sizes.items())
            means[kind] = round(means[kind] / sum(sizes.values()), 6)
    return means


def _variant_name(removed):
    counts = {"heads": removed["heads"], "neurons": removed.get("neurons", 0), **removed["weights"]}
    return "_".join(f"{name}-{count}" for name, count in counts.items() if count) or DENSE


def looks_like_configurations(value: object) -> bool:
    """Whether a JSON value is meant as a `conf.json`, perhaps edited by hand."""
    return isinstance(value, dict) and {"version", "model", "modules", "configs"} <= value.keys()


def looks_like_scheme(value: object) -> bool:
    """Whether a JSON value is meant as a `conf_prune.json`."""
    return isinstance(value, dict) and {"version", "model", "blocks", "configs"} <= value.keys()


def is_scheme(value):
    """Whether a JSON value is a scheme as this suite writes it, not changed since."""
    if not isinstance(value, dict):
        return False
    content = {key: item for key, item in value.items() if key != "digest"}
    return value.get("digest") == digest(content) and "blocks" in content


def read_scheme(path) -> Scheme:
    """Read a `conf_prune.json`.

    Raises:
        UserError: absent, malformed, or edited by hand (its digest does not match its content).
    """
    value = read_json(path, SCHEME_BY)
    if "configs" in value and "modules" in value:
        raise UserError(f"{path}: is a conf.json; {SCHEME_BY} makes the scheme out of it")
    if not is_scheme(value):
        raise UserError(
            f"{path}: was changed after it was made, or is no scheme; regenerate it from conf.json with {SCHEME_BY}"
        )
    _check_version(path, value, SCHEME_BY)
    check(path, value, SCHEME, f"make it again from conf.json with {SCHEME_BY}")
    return Scheme(value["model"], value["blocks"], value["configs"], value["requested"])
