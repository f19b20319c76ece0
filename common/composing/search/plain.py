"""Searching among plain models alone: which choices an ordinary config can say, as conditions of the knapsack."""

import math

from common.blocks.find import Block
from common.composing.scheme import DENSE
from common.composing.search.costs import working_parts
from common.composing.search.knapsack import Row
from common.models.load import LoadedModel
from common.models.plain import NotPlain, Plain, Whole, form_of, split
from common.runtime.errors import UserError


class PlainChoices:
    """The choices whose compact model is plain, see `models.plain`.

    `rows`: the conditions that just these meet, for `knapsack.choose`. Names that its rows share are a setting's or a
    position bias's value, 1 if it is that, and a layer, 1 if it is gone.
    """

    def __init__(self, loaded: LoadedModel, blocks: dict[str, Block], masks: dict, library: str):
        """
        Args:
            masks: {block: {variant: {Linear: bool mask}}} of the variants.
            library: where these are, for messages.
        Raises:
            UserError: the model itself is not plain, or variants of a stack never lose the same heads.
        """
        if not form_of(loaded.model)["plain"]:
            raise UserError(f"--plain: {loaded.path} is a compact model that has code; search from its original")
        self.model, self.blocks, self.rows = loaded.model, blocks, []
        self.left = {  # {block: {variant: the numbers of its heads or neurons}}
            name: {DENSE: tuple(range(block.heads or block.neurons))}
            | {
                variant: tuple(working_parts(block, keeps).nonzero().flatten().tolist())
                for variant, keeps in masks.get(name, {}).items()
            }
            for name, block in blocks.items()
        }
        self._let_layers_go(loaded.family)
        self._count(loaded.family)
        self._share_biases(library)

    def __contains__(self, choice: dict[str, str]) -> bool:
        left = {self.blocks[name].root: list(self.left[name][variant]) for name, variant in choice.items()}
        try:
            Plain(self.model, left, {root: len(parts) for root, parts in left.items()})
        except NotPlain:
            return False
        return True

    def _let_layers_go(self, family):
        """A block is left out with all others of its layer, or not at all."""
        stacks = {}  # {setting that counts the layers: those}
        for name, block in self.blocks.items():
            gone = {(name, variant): 1 for variant, parts in self.left[name].items() if not parts}
            if setting := family.layers.get(block.side):
                layer = split(block.root)[:2]
                stacks.setdefault(setting, {})[layer], gone[layer] = 1, -1
            self.rows.append(Row(gone, 0, 0))
        for layers in stacks.values():
            self.rows.append(Row(layers, 0, len(layers) - 1))
        if stacks:  # the decoder has no more layers left than the encoder
            encoder, decoder = (stacks[family.layers[side]] for side in ("encoder", "decoder"))
            self.rows.append(Row(decoder | dict.fromkeys(encoder, -1), len(decoder) - len(encoder), math.inf))

    def _count(self, family):
        """What a setting counts is equally many, and what none counts is whole."""
        of_setting = {}
        for name, block in self.blocks.items():
            setting = family.heads if block.heads else family.neurons.get(block.side)
            counts = {variant: len(parts) for variant, parts in self.left[name].items()}
            if setting is None:
                some = {(name, variant): 1 for variant, count in counts.items() if count < counts[DENSE]}
                self.rows.append(Row(some, 0, 0))
            else:
                of_setting.setdefault(setting, {})[name] = counts
        for setting, counts in of_setting.items():
            self._agree(setting, counts)

    def _share_biases(self, library):
        """Self-attentions that share a position bias have the same heads."""
        names = {block.root: name for name, block in self.blocks.items()}
        for root, readers in Whole(self.model).biases.items():
            heads = {names[reader]: set(self.left[names[reader]].values()) - {()} for reader in readers}
            self._agree(root, {name: self.left[name] for name in heads})
            for count in set.intersection(*({len(kept) for kept in each} for each in heads.values())):
                if not set.intersection(*({kept for kept in each if len(kept) == count} for each in heads.values())):
                    raise UserError(
                        f"{library}: --plain: no {count} heads are left in all self-attentions of {split(root)[0]}, "
                        "which share a position bias; make the library of what prune.py --plain-heads prunes"
                    )

    def _agree(self, name, values):
        """Rows by which all blocks that are there have one value, of {block: {variant: value}}; gone ones have any."""
        every = {value for each in values.values() for value in each.values() if value}
        self.rows.append(Row({(name, value): 1 for value in every}, 0, 1))
        for block, of_block in values.items():
            for value in set(of_block.values()) & every:
                terms = {(block, variant): 1 for variant, its in of_block.items() if its == value}
                self.rows.append(Row(terms | {(name, value): -1}, -math.inf, 0))
