"""The state of an unfinished run on disk, so that a killed run goes on where it was."""

from pathlib import Path

import torch

from common.files import atomic_file


class Checkpoint:
    """The state of an unfinished run, in one file that is replaced after every epoch and removed at the end."""

    def __init__(self, path, keys):
        """`keys`: {learner name: digest of everything that determines it}; a file with other keys is not used."""
        self.path = Path(path)
        self.keys = {_text(name): key for name, key in keys.items()}

    def read(self):
        """The file's content, or None: it is not there, is damaged, or is about other learners."""
        if not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            fits = all(content["keys"].get(name) == key for name, key in self.keys.items())
        except Exception:  # damaged, or not ours: start again, nothing of the user's is in it
            return None
        return content if fits else None

    def resume(self, learners, talk):
        """Load the learners' states, if the file is there and is about them; returns the rows so far."""
        content = self.read()
        if content is None:
            return []
        for name, learner in learners.items():
            learner.load_state(content["learners"][_text(name)])
        talk.say(f"resuming after epoch {content['rows'][-1][0]} from {self.path}")
        return content["rows"]

    def save(self, learners, rows):
        with atomic_file(self.path) as handle:
            torch.save(
                {
                    "keys": self.keys,
                    "rows": [tuple(row) for row in rows],
                    "learners": {_text(name): learner.state() for name, learner in learners.items()},
                },
                handle,
            )

    def remove(self):
        self.path.unlink(missing_ok=True)


def _text(name):
    return name if isinstance(name, str) else " ".join(name)
