"""Composing: the model of one configuration, out of the original and a library of block variants."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from common.blocks.find import Block, find_blocks, prunable_modules
from common.blocks.tensors import parameter_masks, set_block, set_shared
from common.composing.configurations import nth_configuration, read_configurations
from common.composing.library import SHARED, Library
from common.composing.scheme import DENSE, Pair, Scheme, make_scheme
from common.models.load import moved, reference
from common.models.publishing import license_of
from common.runtime.errors import UserError
from common.runtime.records import make_record

INHERITED = ("original", "configuration", "variants", "removed", "library_stage", "made_with", "vocabulary", "license")
UNFIT = "does not fit the model; its 'modules' were changed: make conf.json again with config_generator.py"


def check_model(made_for, loaded, path):
    """Raise a UserError if configurations or a scheme, made for the model {name, type, fingerprint}, are another's."""
    if made_for["fingerprint"] != loaded.identity["fingerprint"]:
        raise UserError(
            f"{path}: was made for another model ({made_for['name']}, {made_for['type']}) than "
            f"{loaded.path}; make it again for this one, or give the model it was made for"
        )


def check_counts(scheme: Scheme, blocks: dict[str, Block], path):
    """Raise a UserError if what a scheme removes is not in the model: someone changed its conf.json."""
    for config in scheme.configs:
        for name, variant in config.items():
            removed = {"heads": 0, "weights": {}} if variant == DENSE else scheme.blocks[name][variant]
            block, counts = blocks.get(name), removed["weights"]
            sizes = {tensor.removesuffix(".weight"): prod(shape) for tensor, shape in block.shapes} if block else {}
            if (
                block is None
                or removed["heads"] > block.heads
                or removed.get("neurons", 0) > block.neurons
                or any(count > sizes.get(linear, -1) for linear, count in counts.items())
            ):
                raise UserError(f"{path}: {name}: {UNFIT}")


def warn_of_missing(library: Library, loaded, path: str | Path, talk) -> None:
    """Say so if a library lacks variants of the model's configurations at `path`, which may be newer than it is."""
    if not Path(path).is_file():
        return
    configurations = read_configurations(path)
    missing = [pair for pair in make_scheme(configurations).variants() if pair not in library]
    if configurations.model == loaded.identity and missing:
        talk.say(
            f"{path}: {len(missing)} of its variants are not in {library.folder}; if the library is "
            "made for it, run prune_scheme_generator.py and prune.py again"
        )


@dataclass(frozen=True)
class Choice:
    """A configuration's variants, {block's name: variant's name}, and the library that they are in."""

    nth: int
    variants: dict[str, str]
    library: Library
    rates: dict[str, float]  # the mean rate that was asked for, by kind of module

    def keys(self) -> dict[str, str]:
        """What each variant and the shared parameters were made from, as digests by block: part of a model's key."""
        keys = {block: self.library.entry(Pair(block, variant))["key"] for block, variant in self.variants.items()}
        shared = self.library.shared_key()
        return keys | ({SHARED: shared} if shared else {})

    def made_with(self) -> dict[str, object]:
        """Of the settings that the variants were made with those that all of them share."""
        first, *others = [self.library.entry(Pair(*item))["made_from"] for item in self.variants.items()] or [{}]
        return {name: value for name, value in first.items() if all(entry.get(name) == value for entry in others)}


def choose(loaded, library_path: str | Path, configurations_path: str | Path, numbers: list[int]) -> list[Choice]:
    """What some configurations of a `conf.json` put into a model, one `Choice` for each of their numbers.

    Raises:
        UserError: no such configuration, or it is not this model's, or the library lacks a variant of it.
    """
    configurations = read_configurations(configurations_path)
    scheme = make_scheme(configurations)
    chosen = [nth_configuration(scheme.configs, nth, configurations_path) for nth in numbers]
    check_model(configurations.model, loaded, configurations_path)
    modules = prunable_modules(loaded.model, neurons=True)
    for name, module in configurations.modules.items():
        if modules.get(name) != module:
            raise UserError(f"{configurations_path}: 'modules': {name}: {UNFIT}")
    library = Library.open(library_path, loaded.identity["fingerprint"])
    choices = []
    for nth, config in zip(numbers, chosen):
        variants = {block: variant for block, variant in config.items() if variant != DENSE}
        choices.append(Choice(nth, variants, library, scheme.requested[nth]))
        choices[-1].keys()  # before any work: all variants are there
    return choices


def compose(model, choice: Choice) -> dict:
    """Replace blocks of `model`, in place, by the variants of a choice, and shared parameters by the library's.

    Returns:
        {parameter name: bool mask} of the composed model, for `masks.HeldMasks`.
    Raises:
        UserError: a variant's file is damaged; the model may then be partly replaced.
    """
    blocks, masks = find_blocks(model), {}
    for name, variant_name in choice.variants.items():
        block, tensors, keeps = choice.library.read(blocks[name], variant_name)
        set_block(model, block, tensors)
        masks |= {f"{block.root}.{parameter}": mask for parameter, mask in parameter_masks(block, keeps).items()}
    set_shared(model, choice.library.read_shared() or {})
    return masks


@torch.no_grad()
def removed_parts(model, masks: dict[str, torch.Tensor]) -> dict[str, dict[str, list[int]]]:
    """What masks of `compose` remove from a model, not yet compact: {kind of block: {"heads", "neurons", "weights":
    [removed, all]}}."""
    removed = {}
    for block in find_blocks(model).values():
        names = {linear: f"{block.root}.{linear}.weight" for linear in block.linears}
        keeps = {
            linear: masks.get(name, torch.ones_like(model.get_parameter(name), dtype=torch.bool))
            for linear, name in names.items()
        }
        # A part is gone if all its weights are.
        used = torch.stack([keeps[block.output].any(dim=0), *(keep.any(dim=1) for keep in block.by_role(keeps))])
        used = used.any(dim=0)  # (width,)
        parts = "heads" if block.kind == "attention" else "neurons"
        if block.heads:
            used = used.view(block.heads, -1).any(dim=1)
        for name, keep in {parts: used, "weights": torch.cat([keep.flatten() for keep in keeps.values()])}.items():
            removed_and_all = removed.setdefault(block.kind, {}).setdefault(name, [0, 0])
            removed_and_all[0] += int((~keep).sum())
            removed_and_all[1] += keep.numel()
    return removed


def composed_record(
    script: str, made_from: dict, choice: Choice | None, loaded, output: str, tokenizer, source, removed, **content
):
    """The record of a model that was composed out of `loaded`, the original: see `records.make_record`.

    Without a choice, of `loaded` in another form: of what and how it was composed, its own record says.

    `source`: where the data are, or None; `removed`: see `removed_parts`.
    """
    made = {
        "task": loaded.task.name,
        "original": loaded.identity | {"model": reference(loaded.path, output)},
        "base_model": loaded.record.get("base_model") or loaded.identity["name"],
    }
    if choice:
        made |= {
            "configuration": {"number": choice.nth, "rates": choice.rates},
            "variants": choice.variants,
            "removed": removed,
            "library_stage": choice.library.record["stage"],
            "made_with": choice.made_with(),
        }
    else:
        made |= {name: loaded.record[name] for name in INHERITED if name in loaded.record}
        if original := loaded.record.get("original"):
            made["original"] = original | {"model": moved(original.get("model"), loaded.path, output)}
    made |= license_of(loaded.path) | {"data": source and source.to_json(output)}
    return make_record(script, made_from, **made | {"tokenizer": reference(tokenizer.name_or_path, output)} | content)
