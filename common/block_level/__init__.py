"""Block-level fine-tuning beyond the gradients of single blocks.

The ways in are `Apart` with the `Course` through its portions; `solve`, the closed form with its solutions checked on
held-out data; and for joint fine-tuning `Supernet` and `JointObjective`, with what these are made from.
"""

from common.block_level.apart import Apart
from common.block_level.joint import Draws, JointObjective, Supernet, sample_compositions
from common.block_level.portions import Course, portions_of
from common.block_level.solutions import solve

__all__ = ["Apart", "Course", "Draws", "JointObjective", "Supernet", "portions_of", "sample_compositions", "solve"]
