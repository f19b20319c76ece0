"""Which examples go together in a batch: those of like length, to save padding."""

import random

SORTED_BATCHES = 50  # shuffled examples are sorted by length in pools of so many batches


def training_batches(examples, batch_size: int, seed: int, epoch: int, size: int | None = None) -> list[list[int]]:
    """Positions of one epoch's batches: shuffled, but examples of like length together.

    The order depends on (seed, epoch) alone, so that resuming is exact.

    Args:
        epoch: counted from 1.
        size: examples an epoch; None for all. Shorter epochs go on where the one before ended, so that each example
            is seen once before any is seen again.
    """
    total = len(examples)
    size = min(size or total, total)
    first, offset = divmod((epoch - 1) * size, total)  # which pass over all examples, and where in it
    order = [position for number in (first, first + 1) for position in _shuffled(total, f"{seed}/pass {number}")]
    order, pool = order[offset : offset + size], SORTED_BATCHES * batch_size
    order = [i for start in range(0, size, pool) for i in _by_length(examples, order[start : start + pool])]
    batches = in_batches(order, batch_size)
    random.Random(f"{seed}/epoch {epoch}").shuffle(batches)
    return batches


def evaluation_batches(examples, batch_size: int) -> list[list[int]]:
    """Positions of batches over all examples, longest first, so that memory runs out at once or never."""
    return in_batches(_by_length(examples, range(len(examples)))[::-1], batch_size)


def in_batches(order: list[int], batch_size: int) -> list[list[int]]:
    """Positions in batches, in their order."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _shuffled(count, seed):
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _by_length(examples, positions):
    return sorted(positions, key=lambda i: len(examples.inputs[i]))
