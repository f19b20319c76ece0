"""What both methods of block-level fine-tuning work on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.blocks.find import Block
from common.blocks.tensors import Variant
from common.composing.library import Library
from common.composing.scheme import Pair
from common.data.examples import Examples
from common.pruning import closed_form
from common.runtime.devices import Runtime
from common.runtime.settings import TrainingSettings
from common.training.checkpoints import Checkpoint
from common.training.stats import BLOCK_COLUMNS, COMPOSITION_COLUMNS, check_stats, seconds_of
from common.training.tracking import Tracking


@dataclass(frozen=True)
class BlockStage:
    """Opened objects, and the settings that both methods share.

    `method`: "joint"; "reconstruct" takes the closed form's solutions, "train" goes down the gradient, "both" does so
    from the solutions. `library`: the one to write to. `open_tracking`: given digits of the run's key.
    """

    method: str
    original: torch.nn.Module
    blocks: dict[str, Block]  # all of the original's
    pruned: Library
    library: Library
    train: Examples
    calibration: Examples
    held_out: Examples
    ridges: Sequence[float]
    rounds: int
    recipe: TrainingSettings
    runtime: Runtime
    overwrite: bool
    stats_file: str
    open_tracking: Callable[[str], Tracking]

    def made_from(self, **settings) -> dict[Pair, dict]:
        """What determines the tensors of each variant; `settings`: the method's own."""
        settings = self.settings() | settings
        return {pair: {"pruned": self.pruned.entry(pair)["key"], **settings} for pair in self.pruned.variants()}

    def settings(self) -> dict:
        """What determines a variant's tensors, beside its pruned weights and the method's own settings."""
        settings = {"method": self.method, "held_out_examples": self.held_out.fingerprint()}
        if self.method != "train":
            ridge = self.ridges if len(self.ridges) > 1 else self.ridges[0]  # the key of one is that of a number
            settings |= {"calibration_examples": self.calibration.fingerprint(), "ridge": ridge}
            settings["closed_form_version"] = closed_form.VERSION
        if self.method == "reconstruct":
            settings["rounds"] = self.rounds
        if self.method != "reconstruct":
            settings |= {"training_examples": self.train.fingerprint(), **self.recipe.to_json()}
        return settings

    def variants(self, library: Library, pairs: Iterable[Pair]) -> dict[Pair, Variant]:
        return {pair: library.read(self.blocks[pair.block], pair.variant) for pair in pairs}

    def pruned_on_device(self, pairs: Iterable[Pair]) -> dict[Pair, Variant]:
        """The pruned variants, on the device."""
        return {pair: variant.to(self.runtime.device) for pair, variant in self.variants(self.pruned, pairs).items()}

    def open_checkpoint(self, keys: dict) -> Checkpoint:
        return Checkpoint(self.library.folder / "training", keys, self.runtime.talk, self.runtime.processes)

    def nothing_to_do(self, skipped: int, runs: set[str]) -> dict:
        """The result where all variants are there; `runs`: those that made them, as the stats know them."""
        self.open_checkpoint({}).remove()
        return {"fine_tuned": 0, "skipped": skipped, "seconds": seconds_of(self.stats_file, runs)}


def beside(stats: str | Path, what: str) -> Path:
    """stats.csv -> stats-WHAT.csv"""
    path = Path(stats)
    return path.with_name(f"{path.stem}-{what}{path.suffix}")


def check_stats_files(stats: str | Path) -> None:
    """Make sure, before any long work, that the stats CSVs can be written; see `stats.check_stats`."""
    check_stats(stats)
    check_stats(beside(stats, "blocks"), BLOCK_COLUMNS)
    check_stats(beside(stats, "compositions"), COMPOSITION_COLUMNS)
