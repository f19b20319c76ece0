"""Block-level fine-tuning beyond the gradients of single blocks.

The ways in are `solve` and `solve_in_sequence`, the closed form with its solutions checked on held-out data, and for
joint fine-tuning `Supernet` and `JointObjective`, with what these are made from.
"""

from common.block_level.joint import Draws, JointObjective, Supernet, sample_compositions
from common.block_level.solutions import solve, solve_in_sequence

__all__ = ["Draws", "JointObjective", "Supernet", "sample_compositions", "solve", "solve_in_sequence"]
