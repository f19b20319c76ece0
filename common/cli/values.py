"""Argparse types: what the text of a flag must be."""

import argparse
import math
from collections.abc import Callable

from common.runtime.schema import shown

LARGEST = 2**53  # nothing here is counted so far, and nothing overflows before it


def number(
    kind: type,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    called: str = "",
) -> Callable[[str], float]:
    """An argparse type: a finite number within bounds.

    Args:
        kind: int or float.
        least, most: bounds, themselves included; above, below: bounds that are not.
        called: what such a number is, for the message; without it its bounds say so.
    """
    ends = {"from": least, "above": above, "to": most, "below": below}
    bounds = " ".join(f"{word} {end:,}" for word, end in ends.items() if end is not None)
    wanted = called or f"a {'whole ' if kind is int else ''}number {bounds}{'' if most else ' up'}"

    def fits(value):
        return (
            math.isfinite(value)
            and abs(value) <= LARGEST
            and (least is None or value >= least)
            and (most is None or value <= most)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    def convert(text):
        try:
            value = kind(text)
            if fits(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {wanted}")

    return convert


def int_between(least: int, most: int | None = None) -> Callable[[str], float]:
    """An argparse type: a whole number."""
    return number(int, least=least, most=most)


rate = number(float, least=0, most=1, called="a pruning rate: the fraction removed, from 0 to 1")
rate_below_1 = number(
    float, least=0, below=1, called="a pruning rate of weights: the fraction removed, from 0 to below 1"
)


def vocabulary(text: str) -> int | str:
    """An argparse type: "data", or a number of tokens."""
    return text if text == "data" else number(int, least=1, called="a number of tokens, or data")(text)
