"""The state of an unfinished run on disk, so that an interrupted run goes on where it was."""

import time
from collections.abc import Hashable, Iterable
from pathlib import Path

import torch

from common.runtime import plan
from common.runtime.files import atomic_file
from common.runtime.processes import ALONE, Processes
from common.runtime.progress import Talk
from common.runtime.records import content_digest
from common.training.learner import Learner, text_of
from common.training.stats import EpochSeconds

SAVE_SECONDS = 300.0  # between two savings within an epoch


class Checkpoint:
    """The state of an unfinished run, in one file beside the output.

    `content`: what the run goes on from; None without a file for these learners, and once it does. `notes`: plain
    values that are saved with every state.
    """

    def __init__(self, prefix: str | Path, keys: dict[Hashable, str], talk: Talk, processes: Processes = ALONE):
        """
        Args:
            prefix: what the file's path begins with: the output's.
            keys: {learner: digest of everything that determines it}; a file with other keys is not used.
        """
        self.path = Path(f"{prefix}.unfinished.checkpoint")
        self.keys = {text_of(name): key for name, key in keys.items()}
        self.talk, self.is_first = talk, processes.is_first
        self.content = self._read() if self.path.is_file() else None
        self.notes = self.content["notes"] if self.content else {}
        self.saved_at = time.monotonic()

    def _read(self):
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            if content.pop("digest") != content_digest(content):
                raise ValueError("not what was written")
        except Exception:  # a damaged zip, or no checkpoint at all: many classes
            self.talk.say(f"{self.path}: is damaged and not used; starting over")
            return None
        if all(content["keys"].get(name) == key for name, key in self.keys.items()):
            return content
        self.talk.say(f"{self.path}: is of other settings or inputs, and not used; starting over")
        return None

    def resume(self, learners: dict[Hashable, Learner]) -> tuple[list[EpochSeconds], dict | None]:
        """Load the learners' states, if there are any.

        Returns (rows of the finished epochs, state of the epoch that it was in): ([], None) if there is no such file.
        """
        if self.content is None:
            return [], None
        content, self.content = self.content, None
        for name, learner in learners.items():
            learner.load_state(content["learners"][text_of(name)])
        rows, partial = [EpochSeconds(*row) for row in content["rows"]], content["partial"]
        within = f" and {partial['done']} batches" if partial else ""
        epochs = max((learner.trained(rows[-1].epoch) for learner in learners.values()), default=0)
        self.talk.say(f"resuming after epoch {epochs}{within} from {self.path}")
        plan.note(self.path, f"unfinished, after epoch {epochs}{within}")
        return rows, partial

    def save(
        self, learners: dict[Hashable, Learner], rows: Iterable[EpochSeconds], partial: dict | None = None
    ) -> None:
        """Save the state after the epochs of `rows`; `partial`: plain values of where in the next epoch the run is."""
        if self.is_first or plan.current():
            content = {
                "keys": self.keys,
                "notes": self.notes,
                "learners": {text_of(name): learner.state() for name, learner in learners.items()},
                "rows": [tuple(row) for row in rows],
                "partial": partial,
            }
            with atomic_file(self.path) as handle:
                torch.save({**content, "digest": content_digest(content)}, handle)
        self.saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to save within an epoch."""
        return time.monotonic() - self.saved_at >= SAVE_SECONDS

    def remove(self) -> None:
        """Remove the file, once the output is there."""
        if self.is_first:
            self.path.unlink(missing_ok=True)
