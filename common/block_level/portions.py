"""Libraries that are larger than the memory: their variants are tuned in portions, one after another.

Variants that are tuned apart know nothing of each other, so that the portions change nothing but what is held at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

from common.blocks import Block
from common.checkpoints import text_of
from common.records import digest
from common.scheme import Pair, by_block
from common.training import Epoch, EpochSeconds, Progress

PORTION_BYTES = 2**30  # of the variants of a portion, in float32


class Portion(NamedTuple):
    """Variants that are tuned at once. `number`: from 1, of all portions; `is_last`: whether none follows it."""

    number: int
    todo: list[Pair]
    is_last: bool


def portions_of(pairs: Sequence[Pair], blocks: dict[str, Block]) -> list[list[Pair]]:
    """Variants in portions, each within PORTION_BYTES or of one variant.

    A block's variants are together, for they share its statistics, unless they need several portions by themselves.
    """
    portions, room = [], 0
    for name, own in by_block(pairs).items():
        needed = 4 * sum(prod(shape) for _, shape in blocks[name].shapes)  # of each
        if needed * len(own) > room:
            portions.append([])
            room = PORTION_BYTES
        for pair in own:
            if portions[-1] and needed > room:
                portions.append([])
                room = PORTION_BYTES
            portions[-1].append(pair)
            room -= needed
    return portions if len(portions) > 1 else [list(pairs)]


class Course:
    """A run through its portions, which may be interrupted in any of them.

    What the portions before the present one left is in the checkpoint: the losses of their variants are its `past`, and
    their seconds are a note. Another note says which portion its state is of. A run in one portion needs neither.
    """

    def __init__(self, pairs: Iterable[Pair], portions: Sequence[Sequence[Pair]], todo: Iterable[Pair], checkpoint):
        """
        Args:
            pairs: all variants, in the order of their losses; there already or not.
            portions: the same in portions, which are then the same when the run goes on.
            todo: those that are to be tuned; one at least.
            checkpoint: of these, a `Checkpoint`.
        """
        todo = set(todo)
        self.pairs, self.checkpoint = list(pairs), checkpoint
        self.todo = [[pair for pair in portion if pair in todo] for portion in portions]
        self.keys = [digest([str(pair) for pair in portion]) for portion in portions]
        if len(portions) == 1:
            self.keys = [None]

    def __len__(self):
        return len(self.todo)

    def __iter__(self) -> Iterator[Portion]:
        """The portions in which there is something to do, the one that the checkpoint is of even if all is written."""
        checkpoint = self.checkpoint
        checkpoint.read()
        numbers = [number for number, todo in enumerate(self.todo) if todo]
        started = self._number_of_state()
        if started is not None and started < numbers[0] and _is_over(checkpoint):
            numbers.insert(0, started)  # it was interrupted before the checkpoint knew
        for number in numbers:
            if self.keys[number] != checkpoint.notes.get("portion"):
                checkpoint.forget()
                checkpoint.notes["portion"] = self.keys[number]
            yield Portion(number + 1, self.todo[number], number == numbers[-1])

    def _number_of_state(self):
        """Which portion the checkpoint's state is of; None if it is of none."""
        key = self.checkpoint.notes.get("portion")
        return self.keys.index(key) if key in self.keys else None

    def finish(self, portion: Portion, histories: dict[Pair, list[Epoch]], progress: Progress) -> None:
        """Note that a portion is done.

        Args:
            histories, progress: its own.
        """
        if len(self) > 1:
            self.checkpoint.notes |= {"rows": [tuple(row) for row in self.progress(progress).rows], "portion": ""}
        if portion.is_last:
            self.checkpoint.past |= {text_of(pair): rows for pair, rows in histories.items()}
        else:
            self.checkpoint.save_past(histories)

    def histories(self, own: dict[Pair, list[Epoch]]) -> dict[Pair, list[Epoch]]:
        """The losses of all variants that have some, in order; `own`: those of the present portion."""
        past = self.checkpoint.past
        found = {pair: own.get(pair) or [Epoch(*row) for row in past.get(text_of(pair), ())] for pair in self.pairs}
        return {pair: history for pair, history in found.items() if history}

    def progress(self, own: Progress) -> Progress:
        """The seconds of each epoch in all portions so far; `own`: those of the present one."""
        found = {}
        for row in [*(EpochSeconds(*row) for row in self.checkpoint.notes.get("rows", ())), *own.rows]:
            before = found.get(row.epoch, EpochSeconds(row.epoch, 0.0, 0.0))
            found[row.epoch] = EpochSeconds(row.epoch, before.train + row.train, before.validation + row.validation)
        return Progress([found[epoch] for epoch in sorted(found)])


def _is_over(checkpoint):
    """Whether a state is that of variants that were all solved or trained."""
    return checkpoint.holds_training() or bool((checkpoint.solutions() or {}).get("all"))
