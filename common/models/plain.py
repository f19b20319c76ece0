"""Which pruned models an ordinary config of transformers can say: they are of an ordinary class, and need no code.

A config has one number for all layers of a stack, or for all of a model. So its heads and neurons must be equally
many wherever it counts them together; where a stack shares one position bias, as T5's does, its heads must be the
same ones. Layers may go from anywhere where one without blocks is an identity; those that stay are numbered anew.
"""

import torch

from common.blocks.families import COMPACT, family_of
from common.blocks.find import find_blocks
from common.models.checks import class_named, skeleton_of

BIAS = "relative_attention_bias"  # of T5's kin: (buckets, heads), in a stack's first layer or in all of them
OUR_SETTINGS = ("model_type", "architectures", "auto_map", "transformers_version", "layouts")
PARTS = ("kept_heads", "kept_neurons")


class NotPlain(Exception):
    """No ordinary config can say what is left of a model; the message says why in a few words."""


def ordinary_class(model) -> type:
    """The class of transformers that a model, compact or not, is of or was made of."""
    return class_named(type(model).__name__.removeprefix("Compact"))


def ordinary_settings(config) -> dict:
    """A config's settings, without its type and what is left of the model: those of the original."""
    return {name: value for name, value in config.to_dict().items() if name not in (*OUR_SETTINGS, *PARTS)}


def form_of(model) -> dict:
    """What a stage says of a model's form: {"plain": whether its class is an ordinary one, perhaps "why_not_plain"}."""
    if not model.config.model_type.startswith(COMPACT):
        return {"plain": True}
    try:
        Plain(model, model.config.kept_heads or {}, model.config.kept_neurons or {})
    except NotPlain as reason:
        return {"plain": False, "why_not_plain": str(reason)}
    return {"plain": False, "why_not_plain": "--compact would make it so"}


class Whole:
    """The blocks of a model, compact or not, as they are in the original.

    `biases`: {root of a self-attention that has a table of position biases: the roots of those that go by it}.
    """

    def __init__(self, model):
        of_class = ordinary_class(model)
        skeleton = skeleton_of(of_class, of_class.config_class(**ordinary_settings(model.config)))
        self.blocks = list(find_blocks(skeleton).values())
        roots = [block.root for block in self.blocks if block.heads]
        owners = [root for root in roots if hasattr(skeleton.get_submodule(root), BIAS)]
        places = {split(root)[0::2]: root for root in reversed(owners)}  # the first layer's, for those without one
        self.biases = {root: [] for root in owners}
        for root in roots:
            if owner := root if root in owners else places.get(split(root)[0::2]):
                self.biases[owner].append(root)

    def kept(self, kept_heads: dict[str, list[int]], kept_neurons: dict[str, int]) -> dict:
        """{root: the numbers of its heads, or the places of its neurons}; see `Plain`."""
        return {
            block.root: kept_heads.get(block.root, range(block.heads))
            if block.heads
            else range(kept_neurons.get(block.root, block.neurons))
            for block in self.blocks
        }


class Plain:
    """An ordinary form of what is left of a model.

    Args:
        kept: {root module of an attention block: the numbers of its heads, of a feed-forward block: of neurons}, those
            of a compact config; a block that is not named is whole.
    Raises:
        NotPlain: there is none.
    """

    def __init__(self, model, kept_heads: dict[str, list[int]], kept_neurons: dict[str, int]):
        self.family, self.settings = family_of(model.config), ordinary_settings(model.config)
        whole = Whole(model)
        self.kept, self.layers = whole.kept(kept_heads, kept_neurons), {}  # {(stack, number): its blocks}
        for block in whole.blocks:
            stack, number, _ = split(block.root)
            self.layers.setdefault((stack, number), []).append(block)
        self.numbers = self._numbered()
        self._count()
        self._biases(whole)

    def _numbered(self):
        """{(stack, number of a layer that stays): its number among those}."""
        numbers, left = {}, {}
        for (stack, number), blocks in self.layers.items():
            name = self.family.layers.get(blocks[0].side)
            if not name or any(len(self.kept[block.root]) for block in blocks):
                numbers[stack, number] = left.get(name, 0) if name else number
                left[name] = numbers[stack, number] + 1
        for name in self.family.layers.values():
            if name not in left:
                raise NotPlain("a stack has no layer left")
            self.settings[name] = left[name]
        encoder, decoder = (left.get(self.family.layers.get(side), 0) for side in ("encoder", "decoder"))
        if self.family.layers and decoder > encoder:
            raise NotPlain("the decoder has more layers left than the encoder, where transformers cannot generate")
        return numbers

    def _count(self):
        """Let the settings count the heads and neurons that are left."""
        first = {}  # {setting: the first block that it counts}
        for block in (block for layer in self.numbers for block in self.layers[layer]):
            left, whole = len(self.kept[block.root]), block.heads or block.neurons
            parts = "heads" if block.heads else "neurons"
            setting = self.family.heads if block.heads else self.family.neurons.get(block.side)
            if not left:
                raise NotPlain(f"{block.name} is left out")
            if setting is None and left < whole:
                raise NotPlain(f"{block.name} has {left} of {whole} {parts}, which no ordinary config can say")
            if setting is not None:
                other = first.setdefault(setting, block)
                if left != len(self.kept[other.root]):
                    raise NotPlain(f"{block.name} has {left} {parts}, {other.name} {len(self.kept[other.root])}")
                self.settings[setting] = left

    def _biases(self, whole):
        """Find the heads that each table of position biases is left with: {its name: their numbers}."""
        self.biases = {}
        roots = [block.root for layer in self.numbers for block in self.layers[layer]]
        for root, readers in whole.biases.items():
            readers = [reader for reader in readers if reader in roots]
            for reader in readers:
                if list(self.kept[reader]) != list(self.kept[readers[0]]):
                    stack = split(root)[0]
                    raise NotPlain(f"the self-attentions of {stack} share a position bias, and have other heads")
                self.biases[f"{root}.{BIAS}.weight"] = self.kept[reader]

    def renamed(self, name: str) -> str | None:
        """A parameter's name in the ordinary model; None if its layer is gone."""
        stack, number, tail = split(name)
        if (stack, number) in self.numbers:
            return f"{stack}.{self.numbers[stack, number]}.{tail}"
        # A gone layer's position bias is the stack's: the first layer that stays takes it over.
        return None if (stack, number) in self.layers and name not in self.biases else name

    def state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of a compact model, or masks, as the ordinary one has them."""
        plain = {}
        for name, tensor in state.items():
            if name in self.biases:
                tensor = tensor[:, list(self.biases[name])]
            if self.renamed(name):
                plain[self.renamed(name)] = tensor
        return plain


def split(path: str) -> tuple[str, int | None, str]:
    """A path as (stack, number of the layer, what follows): ("encoder.block", 3, "layer.0.SelfAttention")."""
    parts = path.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        return path, None, ""
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])
