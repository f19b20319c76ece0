"""Block-level fine-tuning: all variants jointly, within composed models, or each apart, against the original's block.

The ways in are `tune_jointly` and `tune_apart`, which work on a `BlockStage`.
"""

from common.training.block_level.apart import tune_apart
from common.training.block_level.jointly import read_configurations_of, tune_jointly
from common.training.block_level.stage import BlockStage, check_stats_files
from common.training.block_level.supernet import Draws, JointObjective, Supernet, sample_compositions

__all__ = [
    "BlockStage",
    "Draws",
    "JointObjective",
    "Supernet",
    "check_stats_files",
    "read_configurations_of",
    "sample_compositions",
    "tune_apart",
    "tune_jointly",
]
