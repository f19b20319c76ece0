"""What a block's output says: closed-form fine-tuning.

The ways in are `reconstruct` and `reconstruct_with_each`, and `statistics`.
"""

from common.pruning.closed_form.solve import (
    OVERSAMPLING,
    VERSION,
    blocks_by_pass,
    reconstruct,
    reconstruct_with_each,
    statistics,
    too_few,
)

__all__ = ["OVERSAMPLING", "VERSION", "blocks_by_pass", "reconstruct", "reconstruct_with_each", "statistics", "too_few"]
