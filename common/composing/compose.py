"""Composing: the model of one configuration, out of the original and a library of block variants."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.blocks.find import find_blocks, prunable_modules
from common.blocks.tensors import block_tensors, parameter_masks, set_block, set_shared
from common.composing.configurations import read_configurations
from common.composing.library import SHARED, Library
from common.composing.scheme import Pair, make_scheme, select
from common.models.load import reference
from common.runtime.errors import UserError
from common.runtime.records import make_record


def check_model(made_for, loaded, path):
    """Make sure that configurations or a scheme were made for this model.

    Args:
        made_for: the {name, type, fingerprint} in the file.
        loaded: a `models.LoadedModel`.
    Returns:
        the model's own {name, type, fingerprint}.
    Raises:
        UserError: they are another model's.
    """
    identity = loaded.identity
    if made_for["fingerprint"] != identity["fingerprint"]:
        raise UserError(
            f"{path}: was made for another model ({made_for['name']}, {made_for['type']}) than "
            f"{loaded.path}; make it again for this one, or give the model it was made for"
        )
    return identity


def check_modules(configurations, model, path):
    """Make sure that the modules that a `conf.json` lists are the model's, all that is said of them.

    Raises:
        UserError: naming the first that is not.
    """
    own = prunable_modules(model, neurons=True)
    for name, module in configurations.modules.items():
        if own.get(name) != module:
            raise UserError(
                f"{path}: 'modules': {name}: does not fit the model; make conf.json again with config_generator.py"
            )


def check_variant(where, block, tensors, removed):
    """Make sure that a variant's counts fit a block of the model.

    Args:
        block: a `blocks.Block`, or None if the model has none of that name.
        tensors: the block's own.
        removed: {"heads", "weights"} and perhaps "neurons", see `scheme.Scheme`.
    Raises:
        UserError: the counts are of no such block; someone changed conf.json's "modules".
    """
    sizes = {name.removesuffix(".weight"): tensor.numel() for name, tensor in tensors.items()} if block else {}
    fits = (
        block is not None
        and removed["heads"] <= block.heads
        and removed.get("neurons", 0) <= block.neurons
        and all(count <= sizes.get(name, -1) for name, count in removed["weights"].items())
    )
    if not fits:
        raise UserError(
            f"{where}: does not fit the model; its 'modules' were changed: "
            "make conf.json again with config_generator.py"
        )


def warn_of_missing(library: Library, loaded, path: str | Path, talk) -> None:
    """Say so if a library lacks variants of the model's configurations at `path`, which may be newer than it is.

    Raises:
        UserError: the file is there, and malformed.
    """
    if not Path(path).is_file():
        return
    configurations = read_configurations(path)
    missing = [pair for pair in make_scheme(configurations).variants() if pair not in library]
    if configurations.model == loaded.identity and missing:
        talk.say(
            f"{path}: {len(missing)} of its variants are not in {library.folder}; if it was changed, run "
            "prune_scheme_generator.py and prune.py again"
        )


@dataclass(frozen=True)
class Choice:
    """A configuration's variants, {block's name: variant's name}, and the library that they are in."""

    nth: int
    variants: dict[str, str]
    library: Library
    rates: dict[str, float]  # the mean rate that was asked for, by kind of module

    def keys(self) -> dict[str, str]:
        """What each variant and the shared parameters were made from, as digests by block: part of a model's key.

        Raises:
            UserError: the library lacks one of the variants.
        """
        keys = {block: self.library.entry(Pair(block, variant))["key"] for block, variant in self.variants.items()}
        shared = self.library.shared_key()
        return keys | ({SHARED: shared} if shared else {})

    def made_with(self) -> dict[str, object]:
        """How the variants were made: of the settings in their entries those that all of them share."""
        entries = [self.library.entry(Pair(*item))["made_from"] for item in self.variants.items()]
        first = entries[0] if entries else {}
        return {name: value for name, value in first.items() if all(each.get(name) == value for each in entries)}


def choose(loaded, library_path: str | Path, configurations_path: str | Path, numbers: list[int]) -> list[Choice]:
    """What some configurations of a `conf.json` put into a model, one `Choice` for each of their numbers.

    Args:
        loaded: the original, a `models.LoadedModel`.
    Raises:
        UserError: no such configuration, or it is not this model's, or the library lacks a variant of it.
    """
    configurations = read_configurations(configurations_path)
    scheme = make_scheme(configurations)
    selected = [select(scheme, nth, configurations_path) for nth in numbers]
    check_model(configurations.model, loaded, configurations_path)
    check_modules(configurations, loaded.model, configurations_path)
    blocks = find_blocks(loaded.model)
    for _, removed in selected:
        for name in removed:
            own = block_tensors(loaded.model, blocks[name]) if name in blocks else {}
            check_variant(f"{configurations_path}: {name}", blocks.get(name), own, removed[name])
    library = Library.open(library_path, loaded.identity["fingerprint"])
    choices = [Choice(nth, variants, library, scheme.requested[nth]) for nth, (variants, _) in zip(numbers, selected)]
    for choice in choices:
        choice.keys()  # before any work: all variants are there
    return choices


def compose(model, choice: Choice) -> dict:
    """Replace blocks of `model`, in place, by the variants of a choice; other blocks stay the original's.

    The shared parameters become the library's, if it has one.

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
    """What masks remove from a model's blocks: {kind of block: {"heads", "neurons", "weights": [removed, all]}}.

    Args:
        masks: as `compose` gives them, of the model before it is made compact.
    """
    found = {}
    for block in find_blocks(model).values():
        inner, out = [f"{block.root}.{name}.weight" for name in block.inner], f"{block.root}.{block.output}.weight"
        whole = {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in (*inner, out)}
        keeps = {name: masks.get(name, keep) for name, keep in whole.items()}
        # A part is gone if all its weights are.
        used = torch.stack([keeps[out].any(dim=0), *(keeps[name].any(dim=1) for name in inner)]).any(dim=0)  # (width,)
        parts = "heads" if block.kind == "attention" else "neurons"
        if block.heads:
            used = used.view(block.heads, -1).any(dim=1)
        counts = {parts: used, "weights": torch.cat([keep.flatten() for keep in keeps.values()])}
        for name, kept in counts.items():
            gone_and_all = found.setdefault(block.kind, {}).setdefault(name, [0, 0])
            gone_and_all[0] += int((~kept).sum())
            gone_and_all[1] += kept.numel()
    return found


def composed_record(
    script: str, made_from: dict, choice: Choice, loaded, output: str, tokenizer, source, removed: dict, **content
):
    """The record of a model that was composed out of `loaded`, the original: see `records.make_record`.

    Args:
        source: where the data are; None if that is not known.
        removed: see `removed_parts`.
    """
    return make_record(
        script,
        made_from,
        task=loaded.task.name,
        original=loaded.identity | {"model": reference(loaded.path, output)},
        base_model=loaded.record.get("base_model") or loaded.identity["name"],
        **loaded.license,
        configuration={"number": choice.nth, "rates": choice.rates},
        variants=choice.variants,
        removed=removed,
        library_stage=choice.library.record["stage"],
        made_with=choice.made_with(),
        data=source and source.to_json(output),
        tokenizer=reference(tokenizer.name_or_path, output),
        **content,
    )
