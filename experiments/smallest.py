"""The smallest of some configurations whose composed model is good enough.

A model's quality is its task's metric on all validation examples, which takes seconds to measure. Its loss on a sample
of them takes a tenth of that, and says which models are worth it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from common.composing.scheme import DENSE, Pair
from common.composing.search import Candidates
from common.evaluation import scoring
from common.evaluation.scoring import score_block
from common.runtime.progress import Talk
from common.runtime.records import digest

MEASURED = ("loss", "loss_seconds", "quality", "quality_seconds")


class Search(NamedTuple):
    """What a search for the smallest configuration came to; configurations by their numbers."""

    found: int | None  # None: none is good enough
    looked_at: list[int]  # those whose loss was measured, from the smallest up
    measured: list[int]  # those of them whose quality was


def find_smallest(
    order: Iterable[int], loss: Callable[[int], float], quality: Callable[[int], float], wanted: float
) -> Search:
    """Go through configurations from the smallest up, until one is good enough.

    One whose loss is no lower than that of a smaller one, which was not good enough, is passed over without measuring
    its quality: it is larger and no better.

    Args:
        order: the configurations' numbers, from the smallest up.
        loss, quality: functions of such a number.
        wanted: the lowest quality that is good enough.
    """
    lowest, looked_at, measured = float("inf"), [], []
    for n in order:
        looked_at.append(n)
        if measured and loss(n) >= lowest:
            continue
        measured.append(n)
        if quality(n) >= wanted:
            return Search(n, looked_at, measured)
        lowest = loss(n)
    return Search(None, looked_at, measured)


class Compositions:
    """The models of some configurations, composed: loss and quality of each, measured once, and the seconds it took."""

    def __init__(
        self,
        candidates: Candidates,
        kept: list[float],
        score: Callable[[torch.nn.Module], float],
        scored_on: list,
        known: Iterable[dict],
    ):
        """
        Args:
            candidates: their configurations are composed, and losses are measured on their scoring examples.
            kept: the configurations' sizes.
            score: the quality of a model.
            scored_on: what tells one `score` from another, as JSON values.
            known: `rows` of earlier searches; what they hold of the same models is not measured again.
        """
        self.candidates, self.kept, self.score = candidates, kept, score
        self.quiet = dataclasses.replace(candidates.runtime, talk=Talk(quiet=True))
        self.choices = candidates.configurations()
        self.order = sorted(range(len(kept)), key=kept.__getitem__)  # of equal ones the first comes first
        on = [
            candidates.loaded.identity["fingerprint"],
            candidates.library.shared_key(),
            candidates.examples.fingerprint(),
            scoring.VERSION,
        ]
        earlier = {row["key"]: row for row in known}
        self.measured = []  # of each configuration, parts of {"loss", "loss_seconds", "quality", "quality_seconds"}
        self.keys = []
        for choice in self.choices:
            made_from = sorted((name, self._made_from(Pair(name, variant))) for name, variant in choice.items())
            self.keys.append(digest([made_from, on, scored_on]))
            row = earlier.get(self.keys[-1], {})
            self.measured.append({name: row[name] for name in MEASURED if name in row})

    def _made_from(self, pair):
        return DENSE if pair.variant == DENSE else self.candidates.library.entry(pair)["key"]

    def loss(self, n: int) -> float:
        """The n-th model's loss on the scoring examples."""
        examples, blocks = self.candidates.examples, self.candidates.blocks

        def score(model):  # its own teacher: no second pass
            return score_block(model, model, blocks, None, {}, examples, self.quiet)[None]["loss"]

        return self._measure(n, "loss", score)

    def quality(self, n: int) -> float:
        """The n-th model's score."""
        return self._measure(n, "quality", self.score)

    def _measure(self, n, what, measure):
        measured, now = self.measured[n], self.candidates.runtime.now
        if what not in measured:
            started = now()
            value = measure(self.candidates.model_of(self.choices[n]))
            measured |= {what: value, f"{what}_seconds": round(now() - started, 4)}
        return measured[what]

    def find(self, wanted: float, on_quality: Callable[[int], None]) -> dict:
        """The smallest that has the wanted quality, or else the best of those measured, and what finding it takes.

        Args:
            on_quality: called with a configuration's number after its quality has been asked for.
        Returns:
            JSON values. The seconds are those of a search that knows nothing before.
        """

        def quality(n):
            value = self.quality(n)
            on_quality(n)
            return value

        order = self.candidates.runtime.talk.progress(self.order, "configurations")
        search = find_smallest(order, self.loss, quality, wanted)
        n = search.found
        if n is None:
            n = max(search.measured, key=self.quality)
        return {
            "wanted": wanted,
            "good_enough": search.found is not None,
            "configuration": n,
            "kept": self.kept[n],
            "loss": self.loss(n),
            "quality": self.quality(n),
            "looked_at": len(search.looked_at),
            "measured": len(search.measured),
            "seconds": {
                "losses": self._seconds("loss", search.looked_at),
                "qualities": self._seconds("quality", search.measured),
            },
        }

    def _seconds(self, what, numbers):
        return round(sum(self.measured[n][f"{what}_seconds"] for n in numbers), 3)

    def rows(self) -> list[dict]:
        """All that is known, as JSON values: one a configuration, from the smallest up."""
        return [{"configuration": n, "kept": self.kept[n], **self.measured[n], "key": self.keys[n]} for n in self.order]
