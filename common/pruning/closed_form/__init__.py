"""What a block's output says: closed-form fine-tuning. The ways in are `reconstruct` and `statistics`."""

from common.pruning.closed_form.context import Context
from common.pruning.closed_form.solve import VERSION, Sums, blocks_by_pass, reconstruct, statistics, too_few

__all__ = ["VERSION", "Context", "Sums", "blocks_by_pass", "reconstruct", "statistics", "too_few"]
