"""Schemes: the distinct variants of every block over all configurations, in `conf_prune.json`.

A variant is named by what is really removed: rates that remove the same heads and weights are one, made once.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from common.composing.configurations import (
    MODEL,
    SIZES,
    Configurations,
    block_of,
    check_version,
    read_configurations,
    removed_count,
)
from common.runtime.errors import UserError
from common.runtime.records import FORMAT_VERSION, read_json, sealed
from common.runtime.schema import check

DENSE = "dense"  # the variant of a block that nothing is removed from: the original's own block, in no library
SCHEME_BY = "prune_scheme_generator.py"
COUNT = range(2**40)
SCHEME = {
    "version": object,
    "model": MODEL,
    "blocks": {str: {str: {"heads": COUNT, "neurons?": COUNT, "weights": {str: COUNT}}}},
    "configs": [{str: str}],
    "requested": [{str: float}],
    "made_from": {"path": str, "digest": str},
    "digest": str,
}


class Pair(NamedTuple):
    """A block and one of its variants, by their names: what is pruned, fine-tuned, stored and reused as one."""

    block: str
    variant: str

    def __str__(self):
        return f"{self.block}.{self.variant}"


def by_block(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """{block's name: [pair]}, in the order of the pairs."""
    pairs_of = {}
    for pair in pairs:
        pairs_of.setdefault(pair.block, []).append(pair)
    return pairs_of


@dataclass(frozen=True)
class Scheme:
    """`conf_prune.json`.

    `blocks`: {block: {variant: {"heads": heads removed, "weights": {Linear: weights removed}, perhaps "neurons"}}}.
    `configs`: one {block: variant or "dense"} a configuration, over all blocks.
    `requested`: one {kind: mean rate} a configuration, as asked for, each module weighted by its size.
    `made_from`: {"path", "digest"} of the configurations' file, see `source_of`; empty where there is none.
    """

    model: dict[str, str]
    blocks: dict[str, dict[str, dict]]
    configs: list[dict[str, str]]
    requested: list[dict[str, float]]
    made_from: dict[str, str]

    def to_json(self) -> dict:
        return sealed({"version": FORMAT_VERSION, **asdict(self)})

    def variants(self) -> list[Pair]:
        """All pairs, in the model's order."""
        return [Pair(block, variant) for block, variants in self.blocks.items() for variant in variants]

    def count_without_reuse(self) -> int:
        """How many blocks would be fine-tuned if every configuration had its own."""
        return sum(variant != DENSE for config in self.configs for variant in config.values())


def make_scheme(configurations: Configurations, made_from: dict[str, str] | None = None) -> Scheme:
    """The distinct variants of every block over all configurations."""
    modules_of = {}  # {block: the modules that lie in it}, in the model's order
    for name, module in configurations.modules.items():
        modules_of.setdefault(block_of(name, module), {})[name] = module
    blocks, configs = {block: {} for block in modules_of}, []
    for config in configurations.configs:
        choice = {}
        for block, modules in modules_of.items():
            removed = {"heads": 0, "weights": {}}
            for name, module in modules.items():
                parts = SIZES[module["kind"]]
                count = removed_count(config.get(name, 0), module[parts])
                if parts == "weights":
                    removed["weights"][module["linear"]] = count
                elif count:
                    removed[parts] = count
            choice[block] = variant = _variant_name(removed)
            if variant != DENSE:
                blocks[block][variant] = removed
        configs.append(choice)
    requested = [_mean_rates(configurations.modules, config) for config in configurations.configs]
    return Scheme(configurations.model, {b: v for b, v in blocks.items() if v}, configs, requested, made_from or {})


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


def looks_like_scheme(value: object) -> bool:
    """Whether a JSON value is meant as a `conf_prune.json`."""
    return isinstance(value, dict) and {"version", "model", "blocks", "configs"} <= value.keys()


def read_scheme(path) -> Scheme:
    """Read a `conf_prune.json`; a UserError if it is absent, malformed, or edited by hand (by its digest)."""
    value = read_json(path, SCHEME_BY)
    if "configs" in value and "modules" in value:
        raise UserError(f"{path}: is a conf.json; {SCHEME_BY} makes the scheme out of it")
    check_version(path, value, SCHEME_BY)
    if sealed(value) != value:
        raise UserError(f"{path}: was changed after it was made; regenerate it from conf.json with {SCHEME_BY}")
    check(path, value, SCHEME, f"regenerate it from conf.json with {SCHEME_BY}")
    for config in value["configs"]:
        for block, variant in config.items():
            if variant != DENSE and variant not in value["blocks"].get(block, {}):
                raise UserError(f"{path}: {block}: {variant} is none of its variants; regenerate it with {SCHEME_BY}")
    return Scheme(value["model"], value["blocks"], value["configs"], value["requested"], value["made_from"])


def source_of(configurations: Configurations, path: str | Path, scheme_path: str | Path) -> dict[str, str]:
    """A scheme's `made_from`, of configurations at `path`."""
    relative = os.path.relpath(path, Path(scheme_path).parent)
    return {"path": relative, "digest": configurations.digest()}


def check_current(scheme: Scheme, path: str | Path) -> None:
    """Raise a UserError if the configurations that a scheme at `path` was made from are there, and differ now."""
    source = Path(path).parent / scheme.made_from["path"]
    if source.is_file() and read_configurations(source).digest() != scheme.made_from["digest"]:
        raise UserError(f"{source}: is not what {path} was made from; run {SCHEME_BY} again")
