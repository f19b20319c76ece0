"""The state of an unfinished run on disk, so that an interrupted run goes on where it was."""

import os
import re
import time
from pathlib import Path

import torch

from common.runtime.files import atomic_file, hold, remove_abandoned
from common.runtime.processes import ALONE
from common.runtime.records import content_digest, digest

FORMAT = "composable-pruning checkpoint 1"  # what a checkpoint says first
RUN_DIGITS = 12  # of a run's key, in the names of its checkpoint and in the rows of its stats
SAVE_SECONDS = 300.0  # between two savings within an epoch


class Checkpoint:
    """The state of an unfinished run, in one file that is replaced as the run goes on, and removed at the end.

    Its name has digits of the run's key in it, so that runs with other settings have other files.
    """

    def __init__(self, prefix, run, keys, talk=None, processes=ALONE):
        """
        Args:
            prefix: what the file's path begins with: the output's.
            run: digest of everything that determines the run.
            keys: {learner name: digest of everything that determines it}; a file with other keys is not used.
            talk: is told of a file that is damaged.
            processes: those that share the run; all read the file, and the first writes it.
        """
        self.prefix, self.run = Path(prefix), run
        self.path = self.prefix.with_name(f"{self.prefix.name}.{run[:RUN_DIGITS]}.checkpoint")
        self.keys = {text_of(name): key for name, key in keys.items()}
        self.talk, self.is_written_here = talk, processes.is_first
        self.notes = {}  # what else of the run must not be lost: plain values, saved with every state
        self.past = {}  # {name's text: history}, of learners that were done before the interruption
        self._saved_at, self._held, self._content = time.monotonic(), None, None
        self._is_of_no_use = False  # what lies there now: damaged, about other learners, or written by this run

    def read(self):
        """The file's content as the run found it, or None: it is not there, is damaged, or is about other learners."""
        if self._content is None and not self._is_of_no_use and self.path.is_file():
            try:
                content = torch.load(self.path, map_location="cpu", weights_only=True)
                if content["digest"] != content_digest(_without_digest(content)):
                    raise ValueError("not what was written")
            except Exception:  # a damaged zip, or no checkpoint at all: many classes
                if self.talk:
                    self.talk.say(f"{self.path}: is damaged and not used; starting over")
                self._is_of_no_use = True
                return None
            if all(content["keys"].get(name) == key for name, key in self.keys.items()):
                self._content = content
                self.notes = {**content["notes"], **self.notes}
                self.past = {**content["past"], **self.past}
        return self._content

    def holds_training(self):
        """Whether the file has the state of a training, and not only what was solved and written."""
        content = self.read()
        return content is not None and content["learners"] is not None

    def resume(self, learners, talk):
        """Load the learners' states, if the file is there and has them.

        Returns:
            (rows of the finished epochs, state of the epoch that it was in): ([], None) if there is no such file.
        """
        if not self.holds_training():
            return [], None
        content, self._content = self._content, None
        for name, learner in learners.items():
            learner.load_state(content["learners"][text_of(name)])
        own = set(map(text_of, learners))
        others = {name: state["history"] for name, state in content["learners"].items() if name not in own}
        self.past = {**content["past"], **others}
        rows, partial = content["rows"], content["partial"]
        within = f" and {partial['done']} batches" if partial else ""
        talk.say(f"resuming after epoch {rows[-1][0]}{within} from {self.path}")
        return rows, partial

    def save(self, learners, rows, partial=None):
        """Save the state of training.

        Args:
            rows: seconds of the epochs that are finished.
            partial: plain values that tell where in the next epoch the run is; None at its beginning.
        """
        states = {text_of(name): learner.state() for name, learner in learners.items()}
        self._write({"learners": states, "rows": [tuple(row) for row in rows], "partial": partial})

    def save_past(self, histories):
        """Save that learners are done, {name: history}."""
        self.past |= {text_of(name): [tuple(row) for row in history] for name, history in histories.items()}
        self._write({})

    def share(self, number, count, names):
        """The checkpoint of one of `count` processes, which has some of the learners, and keeps a state of its own."""
        keys = {text_of(name): self.keys[text_of(name)] for name in names}
        return Checkpoint(self.prefix, digest([self.run, number, count]), keys, self.talk)

    def is_due(self):
        """Whether it is time to save."""
        return time.monotonic() - self._saved_at >= SAVE_SECONDS

    def _write(self, state):
        self._content, self._is_of_no_use = None, True
        if not self.is_written_here:
            return
        content = {
            "format": FORMAT,
            "keys": self.keys,
            "notes": self.notes,
            "past": self.past,
            **{"learners": None, "rows": [], "partial": None},
            **state,
        }
        with atomic_file(self.path) as handle:
            torch.save({**content, "digest": content_digest(content)}, handle)
            held = hold(handle)
        self._let_go()
        self._held = held
        self._saved_at = time.monotonic()

    def _let_go(self):
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def remove_alone(self):
        """Remove the file, if this process wrote it."""
        if self._held is not None:
            self._let_go()
            self.path.unlink(missing_ok=True)

    def remove(self):
        """Remove the file, once the output is there, and those that runs with other settings left for this output."""
        self.remove_alone()
        if self.is_written_here:
            remove_checkpoints(self.prefix)

    def __del__(self):
        self._let_go()


def remove_checkpoints(prefix):
    """Remove all checkpoints of an output that no process works with. A file that only has such a name stays."""
    prefix = Path(prefix)
    pattern = re.compile(rf"{re.escape(prefix.name)}\.[0-9a-f]{{{RUN_DIGITS}}}\.checkpoint")
    for path in prefix.parent.iterdir() if prefix.parent.is_dir() else ():
        if pattern.fullmatch(path.name) and path.is_file() and _begins_like_ours(path):
            remove_abandoned(path)


def _begins_like_ours(path):
    """Whether a file, even a damaged one, begins as checkpoints do: a zip, and the format first."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(4096)
    except OSError:  # another process has just removed it, or it is not for us to read
        return False
    return start.startswith(b"PK") and FORMAT.encode() in start


def _without_digest(content):
    return {name: value for name, value in content.items() if name != "digest"}


def text_of(name):
    """A learner's name as a string."""
    return name if isinstance(name, str) else " ".join(name)
