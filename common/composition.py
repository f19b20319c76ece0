"""Composing: the model of one configuration, out of the original and a library of block variants."""

from common.architectures import block_tensors, find_blocks, set_block
from common.errors import UserError
from common.masking import parameter_masks
from common.schemes import read_configurations, select


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
            f"{loaded.path}; make it anew for this one, or give the model it was made for"
        )
    return identity


def check_variant(where, block, tensors, removed):
    """Make sure that a variant's counts fit a block of the model.

    Args:
        block: an `architectures.Block`, or None if the model has none of that name.
        tensors: the block's own.
        removed: {"heads", "weights"} and perhaps "neurons", see `schemes.Scheme`.
    Raises:
        UserError: the counts are of no such block; someone changed conf.json's "modules".
    """
    sizes = {name.removesuffix(".weight"): tensor.numel() for name, tensor in tensors.items()} if block else {}
    fits = (
        block is not None
        and removed["heads"] < max(block.heads, 1)
        and removed.get("neurons", 0) < max(block.neurons, 1)
        and all(count <= sizes.get(name, -1) for name, count in removed["weights"].items())
    )
    if not fits:
        raise UserError(
            f"{where}: does not fit the model; its 'modules' were changed: make conf.json anew with config_generator.py"
        )


def select_variants(loaded, configurations_path, nth):
    """The variants that the n-th configuration of a `conf.json` puts into a model: {block name: variant}.

    Raises:
        UserError: no such configuration, or not this model's.
    """
    configurations = read_configurations(configurations_path)
    chosen, removed = select(configurations, nth, configurations_path)
    check_model(configurations.model, loaded, configurations_path)
    blocks = find_blocks(loaded.model)
    for name in chosen:
        own = block_tensors(loaded.model, blocks[name]) if name in blocks else {}
        check_variant(f"{configurations_path}: {name}", blocks.get(name), own, removed[name])
    return chosen


def compose(model, chosen, library):
    """Replace blocks of `model`, in place, by variants from a library.

    Args:
        chosen: {block name: variant}; a block that is not named stays the original's.
        library: an open `Library` of the same model.
    Returns:
        {parameter name: bool mask} of the composed model, for `masking.HeldMasks`.
    Raises:
        UserError: a variant is missing from the library or damaged; the model may then be partly replaced.
    """
    blocks = find_blocks(model)
    masks = {}
    for name, variant in chosen.items():
        tensors, keeps = library.read(blocks[name], variant)
        set_block(model, blocks[name], tensors)
        masks |= {f"{name}.{parameter}": mask for parameter, mask in parameter_masks(blocks[name], keeps).items()}
    return masks


def variant_keys(library, chosen):
    """What the chosen variants were made from, {block: key}: part of the key of what is made out of them.

    Raises:
        UserError: a variant is missing from the library.
    """
    return {block: library.entry(block, variant)["key"] for block, variant in chosen.items()}
