"""Which examples go together in a batch: those of like length, to save padding.

A batch's size is a number of examples or, as `Tokens`, what they may come to with their padding.
"""

import itertools
import random

SORTED_BATCHES = 50  # shuffled examples are sorted by length in pools of so many batches


class Tokens(int):
    """The size of a batch in tokens, those of padding included: of its inputs and, in translation, of its targets.

    Batches of short examples then have more of them, and each takes about the same memory. An example that is longer
    makes a batch by itself.
    """

    def __mul__(self, times):
        return Tokens(int(self) * times)

    def to_json(self) -> str:
        """How keys of runs hold it."""
        return f"{int(self)} tokens"


def training_batches(
    examples, batch_size: int | Tokens, seed: int, epoch: int, size: int | None = None
) -> list[list[int]]:
    """Positions of one epoch's batches: shuffled, but examples of like length together.

    The order depends on (seed, epoch) alone, so that a resumed run sees what the interrupted one would have seen.

    Args:
        examples: a `data.Examples`.
        epoch: counted from 1.
        size: examples an epoch; None for all. Shorter epochs go on where the one before ended, so that each example
            is seen once before any is seen again.
    """
    total = len(examples)
    size = min(size or total, total)
    first, offset = divmod((epoch - 1) * size, total)  # which pass over all examples, and where in it
    order = [position for number in (first, first + 1) for position in _shuffled(total, f"{seed}/pass {number}")]
    order, pool = order[offset : offset + size], SORTED_BATCHES * _examples_of(examples, batch_size)
    order = [i for start in range(0, size, pool) for i in _by_length(examples, order[start : start + pool])]
    batches = in_batches(examples, order, batch_size)
    random.Random(f"{seed}/epoch {epoch}").shuffle(batches)
    return batches


def epoch_ends(examples, batch_size: int | Tokens, seed: int, epochs: int, size: int | None = None) -> list[int]:
    """How many batches training has had by the end of each epoch; see `training_batches`."""
    if isinstance(batch_size, Tokens):  # the epochs differ
        counts = [len(training_batches(examples, batch_size, seed, epoch, size)) for epoch in range(1, epochs + 1)]
        return list(itertools.accumulate(counts))
    of_an_epoch = -(-min(size or len(examples), len(examples)) // batch_size)
    return [epoch * of_an_epoch for epoch in range(1, epochs + 1)]


def _shuffled(count, seed):
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def evaluation_batches(examples, batch_size: int | Tokens) -> list[list[int]]:
    """Positions of batches over all examples, longest first, so that memory runs out at once or never."""
    return in_batches(examples, _by_length(examples, range(len(examples)))[::-1], batch_size)


def _by_length(examples, positions):
    return sorted(positions, key=lambda i: len(examples.inputs[i]))


def _examples_of(examples, batch_size):
    """About how many examples a batch has."""
    return examples.count_of(batch_size) if isinstance(batch_size, Tokens) else batch_size


def in_batches(examples, order: list[int], batch_size: int | Tokens) -> list[list[int]]:
    """Positions in batches, in their order."""
    if not isinstance(batch_size, Tokens):
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches, longest = [], (0, 0)
    for position in order:
        target = examples.targets[position]
        lengths = len(examples.inputs[position]), len(target) if isinstance(target, list) else 0
        widest = tuple(map(max, longest, lengths))
        if batches and (len(batches[-1]) + 1) * sum(widest) <= batch_size:
            batches[-1].append(position)
            longest = widest
        else:
            batches.append([position])
            longest = lengths
    return batches
