"""What a block's output says: closed-form fine-tuning, and selection of what goes by what the closed form leaves.

The ways in are `reconstruct` and `reconstruct_with_each`, and `statistics` with `Reconstruction`.
"""

from common.closed_form.reconstruction import (
    OVERSAMPLING,
    VERSION,
    blocks_by_pass,
    reconstruct,
    reconstruct_with_each,
    statistics,
    too_few,
)
from common.closed_form.selection import Reconstruction

__all__ = [
    "OVERSAMPLING",
    "VERSION",
    "Reconstruction",
    "blocks_by_pass",
    "reconstruct",
    "reconstruct_with_each",
    "statistics",
    "too_few",
]
