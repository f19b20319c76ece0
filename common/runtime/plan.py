"""What a stage takes, and before that its plan: the same, found by running few of its steps and writing nothing.

In a plan, the loops that tell their progress and the sizes of their items run a few of these. What the others would
take is estimated, and the clock put forward by it, so that all seconds that a stage counts are those of the whole work.
A plan is made in one process, which does not count as the first, and so writes nothing.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

WHOLE = 6  # a loop of no more items is run as it is
LEAST, ENOUGH_SECONDS = 4, 2.0  # items that are timed however long they take, and seconds for more
SPREAD = [int(f"{number:05b}"[::-1], 2) / 32 for number in range(1, 17)]  # 1/2, 1/4, 3/4, …: where in a loop they are
THERE, MISSING, DAMAGED = "there", "missing", "damaged"  # states of outputs, others tell what differs
_state = SimpleNamespace(plan=None)


class Plan:
    """What is known so far of the work that is planned.

    `outputs`: {state: [names]}; `examples`: {split: number}; `steps`: of training; `parts`: of the loops, {label:
    [items, seconds]}; `disk`: {file or folder: bytes}; `skipped`: the seconds that the clock was put forward by.
    """

    def __init__(self):
        self.outputs, self.examples, self.parts, self.disk = {}, {}, {}, {}
        self.steps, self.skipped = 0, 0.0

    def now(self) -> float:
        """Seconds of the clock, once a GPU has done what it was given."""
        if torch := _cuda():
            torch.cuda.synchronize()
        return time.perf_counter() + self.skipped

    def count(self, label: str, items: int, seconds: float) -> None:
        """Count items of a part of the work, and what they take."""
        part = self.parts.setdefault(label, [0, 0.0])
        part[:] = part[0] + items, part[1] + seconds

    def few(self, items: Sequence, label: str, size: Callable[[object], float] | None) -> Iterator:
        """Yield a few items in the place of all: the largest, which warms up, and others of all sizes.

        An item that is not run takes what that of the nearest size took, in proportion. `size` is None where all are
        needed.
        """
        if size is None:
            yield from items
            return
        started, sizes, seconds = self.now(), list(map(size, items)), {}
        order = sorted(range(len(items)), key=sizes.__getitem__, reverse=True)
        ranks = [0, *(int(len(items) * share) for share in SPREAD)] if len(items) > WHOLE else range(len(items))
        for rank in dict.fromkeys(ranks):
            before = self.now()
            if len(items) > WHOLE and len(seconds) > LEAST and before - started > ENOUGH_SECONDS:
                break
            yield items[order[rank]]
            seconds[rank] = self.now() - before
        if len(items) > WHOLE:
            spent, _ = sum(seconds.values()), seconds.pop(0)
            sizes.sort(reverse=True)
            for rank, own in enumerate(sizes):
                near = min(seconds, key=lambda tried: (abs(sizes[tried] - own), abs(tried - rank)))
                self.skipped += seconds[near] * own / sizes[near]
            self.skipped -= spent
        self.count(label, len(items), self.now() - started)

    def to_json(self) -> dict:
        parts = [
            {"part": name, "items": items, "seconds": round(spent, 3)} for name, (items, spent) in self.parts.items()
        ]
        known = {name: getattr(self, name) for name in ("outputs", "examples", "steps")}
        return known | {"parts": parts, "disk": sum(self.disk.values())}


def current() -> Plan | None:
    """The plan that is being made, if one is."""
    return _state.plan


@contextlib.contextmanager
def opened(is_wanted: bool) -> Iterator[Plan | None]:
    """Plan, if that is wanted, as long as the context lasts."""
    _state.plan = Plan() if is_wanted else None
    try:
        yield _state.plan
    finally:
        _state.plan = None


def skipped() -> float:
    """The seconds that a plan has put the clock forward by."""
    return _state.plan.skipped if _state.plan else 0.0


def note(output: object, state: str) -> None:
    """Tell the plan, if there is one, what is there of an output."""
    if _state.plan:
        _state.plan.outputs.setdefault(state, []).append(str(output))


def filled(found: dict[Hashable, object], numbers: Iterable[int]) -> dict:
    """What a loop found for each of some numbers; in a plan, the nearest stands for those that were not run."""
    if not _state.plan:
        return found
    return {number: found[min(found, key=lambda other: abs(other - number))] for number in numbers}


class Took:
    """Seconds and memory from here on."""

    def __init__(self):
        self.started = time.perf_counter()
        with contextlib.suppress(OSError):  # forget the peak of stages that this process ran before
            Path("/proc/self/clear_refs").write_text("5")
        if torch := _cuda():
            torch.cuda.reset_peak_memory_stats()

    def to_json(self) -> dict:
        """{"seconds", "peak_memory": bytes, of the GPU if one is used, else of the process}."""
        torch, unit = _cuda(), 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch:
            memory = torch.cuda.max_memory_allocated()
        return {"seconds": round(time.perf_counter() - self.started + skipped(), 3), "peak_memory": memory}


def _cuda():
    """torch, if it is imported and uses a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None
