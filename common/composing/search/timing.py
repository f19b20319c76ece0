"""What blocks cost in time on this device, by their sizes: the table of ZipLM (arXiv 2302.04089), from whole models.

The seconds are those of the evaluation's report, of a generated token or of a batch. So a decoder's block counts once a
token, and an encoder's once a text, spread over the tokens of the answer. One block is little beside what is fixed: all
that are alike are made smaller at once, and what that saves is divided among them.
"""

import platform
import statistics
from dataclasses import replace
from typing import NamedTuple

import torch

from common.blocks.find import find_blocks
from common.blocks.tensors import aliasing_copy
from common.composing.library import Library
from common.composing.scheme import DENSE
from common.composing.search.costs import Costs, working_parts
from common.evaluation.cost import ROUNDS, WARM_UP, stated_input, ways_to_run
from common.models.compact import layouts_of
from common.models.load import LoadedModel
from common.models.modeling_compact import keep_parts
from common.models.plain import split
from common.runtime.devices import Runtime

NOTE = "latency"  # in a library's record


class Alike(NamedTuple):
    """Blocks in the same place of a stack's layers that have equally many heads or neurons."""

    stack: str
    layers: int
    roots: list[str]
    sizes: list[int]  # how many heads or neurons may be left, ascending: from 0 to all


def latency(loaded: LoadedModel, keeps: dict, library: Library, runtime: Runtime, *, plain: bool) -> Costs:
    """The seconds of all variants, {block: {variant: {Linear: bool mask}}}; the library's record keeps them.

    `plain`: a layer goes as a whole; what it does beside its blocks then counts as one of these's.
    """
    groups, group_of, sizes = {}, {}, {}
    for name, block in find_blocks(loaded.model).items():
        parts = {variant: int(working_parts(block, masks).sum()) for variant, masks in keeps.get(name, {}).items()}
        sizes[name] = {DENSE: block.heads or block.neurons, **parts}
        stack, _, place = split(block.root)
        group_of[name] = f"{stack}.{place} of {sizes[name][DENSE]}"
        layers = len(loaded.model.get_submodule(stack)) if plain and block.side in loaded.family.layers else 0
        group = groups.setdefault(group_of[name], Alike(stack, layers, [], [0]))
        group.roots.append(block.root)
        group.sizes[:] = sorted({*group.sizes, *sizes[name].values()})
    is_gpu = runtime.device.type == "cuda"
    made_from = {
        "device": torch.cuda.get_device_name(runtime.device) if is_gpu else f"{runtime.device} of {platform.node()}",
        "threads": torch.get_num_threads(),
        "input": stated_input(loaded),
        "blocks": {name: group._asdict() for name, group in groups.items()},
    }
    table = library.record.get(NOTE, {})
    if table.get("made_from") != made_from:
        model, blocks = time_blocks(loaded, groups, runtime)
        table = {"made_from": made_from, "model": model, "blocks": blocks}
        if runtime.processes.is_first:
            library.note(NOTE, table)
    costs = {
        name: {variant: table["blocks"][group_of[name]][str(size)] for variant, size in of_block.items()}
        for name, of_block in sizes.items()
    }
    return Costs("latency", costs, table["model"] - sum(of_block[DENSE] for of_block in costs.values()))


def time_blocks(
    loaded: LoadedModel, groups: dict[str, Alike], runtime: Runtime
) -> tuple[float, dict[str, dict[str, float]]]:
    """(seconds of the model, {group: {size: seconds of a block}}). A block takes no less than a smaller one: what noise
    turned round is averaged."""
    from scipy.optimize import isotonic_regression

    layouts, smaller = layouts_of(loaded.model.config), {}
    for name, group in groups.items():
        for size in group.sizes[:-1]:
            smaller[name, size] = aliasing_copy(loaded.model)
            for root in group.roots:
                keep_parts(smaller[name, size].get_submodule(root), range(size), layouts)
        if group.layers > 1:
            smaller[group.stack] = aliasing_copy(loaded.model)
            del smaller[group.stack].get_submodule(group.stack)[1:]
    model, saved = compare(loaded, smaller, runtime)
    table = {}
    for name, (_, _, roots, sizes) in groups.items():
        saves = [*(saved[name, size] / len(roots) for size in sizes[:-1]), 0.0]  # beside the whole block
        saves = isotonic_regression(saves, increasing=False).x.tolist()
        table[name] = {str(size): saves[0] - seconds for size, seconds in zip(sizes, saves)}
    for stack, layers in {group.stack: group.layers for group in groups.values() if group.layers > 1}.items():
        first, *others = (name for name, group in groups.items() if group.stack == stack)
        beside = saved[stack] / (layers - 1) - sum(max(table[name].values()) for name in (first, *others))
        table[first] = {size: seconds + max(beside, 0) * (size != "0") for size, seconds in table[first].items()}
    return model, table


def compare(loaded: LoadedModel, others: dict, runtime: Runtime) -> tuple[float, dict]:
    """(Median seconds of a model, {name: how many fewer the median of each other one is}), in turn after a warm-up.

    Each is seen beside the model in the same round, as a machine that is slower for a while is so for all of them.
    """
    rounds = {name: [] for name in (None, *others)}
    for _ in runtime.talk.progress(range(WARM_UP + ROUNDS), "timing"):
        for name, seconds in rounds.items():
            ways = ways_to_run(replace(loaded, model=others.get(name, loaded.model)))
            run, parts = ways.get("seconds_per_generated_token") or ways["seconds_per_batch"]
            started = runtime.now()
            run()
            seconds.append((runtime.now() - started) / parts)
    beside, *_ = (seconds[WARM_UP:] for seconds in rounds.values())
    model = statistics.median(beside)
    return model, {
        name: model * (1 - statistics.median(one / other for one, other in zip(rounds[name][WARM_UP:], beside)))
        for name in others
    }
