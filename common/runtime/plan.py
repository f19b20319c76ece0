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
MOST, LEAST = 16, 4  # items that are timed: at most, and however long they take
ENOUGH_SECONDS = 2.0  # for more than the least
THERE, MISSING = "there", "missing"  # states of outputs
_state = SimpleNamespace(plan=None)


class Plan:
    """What is known so far of the work that is planned.

    `outputs`: {state: [names]}; `parts`: {label: [items, seconds]} of the loops; `skipped`: seconds that the clock was
    put forward by; `examples`: {split: number}; `disk`: bytes of the outputs, and of an unfinished run's state.
    """

    def __init__(self):
        self.outputs, self.parts, self.examples, self.unfinished = {}, {}, {}, []
        self.disk, self.disk_while_running, self.steps = 0, 0, 0
        self.skipped, self.is_within = 0.0, False

    def now(self) -> float:
        """Seconds of the clock that was put forward, once a GPU has done what it was given."""
        if torch := _cuda():
            torch.cuda.synchronize()
        return time.perf_counter() + self.skipped

    def put_forward(self, label: str, items: int, seconds: float) -> None:
        """Count items that are not run, and what they would take."""
        self.skipped += seconds
        self._count(label, items, seconds)

    def _count(self, label, items, seconds):
        part = self.parts.setdefault(label, [0, 0.0])
        part[:] = part[0] + items, part[1] + seconds

    def few(self, items: Sequence, label: str, size: Callable[[object], float] | None) -> Iterator:
        """Yield a few items in the place of all: the largest, which warms up, and others of all sizes.

        An item that is not run takes what that of the nearest size took. `size` is None where all are needed.
        """
        if size is None or self.is_within:
            yield from self._some(items, size)
            return
        started, self.is_within = self.now(), True
        try:
            yield from self._some(items, size)
        finally:
            self.is_within = False
        self._count(label, len(items), self.now() - started)

    def _some(self, items, size):
        if size is None or len(items) <= WHOLE:
            yield from items
            return
        started, sizes, seconds = self.now(), list(map(size, items)), {}
        order = sorted(range(len(items)), key=sizes.__getitem__, reverse=True)
        for rank in dict.fromkeys([0, *(len(items) * share // 32 for share in _SPREAD)]):
            before = self.now()
            if len(seconds) > LEAST and before - started > ENOUGH_SECONDS:
                break
            yield items[order[rank]]
            seconds[rank] = self.now() - before
        spent = sum(seconds.values())
        del seconds[0]  # it warmed up
        total = 0.0
        for rank, position in enumerate(order):
            nearest = min(seconds, key=lambda other: (abs(sizes[order[other]] - sizes[position]), abs(other - rank)))
            total += seconds[nearest]
        self.skipped += total - spent

    def to_json(self, took: dict) -> dict:
        """The plan as a result; `took`: see `Took`."""
        content = {
            "outputs": self.outputs,
            "unfinished": self.unfinished,
            "examples": self.examples,
            "steps": self.steps,
            "parts": [
                {"part": label, "items": items, "seconds": round(seconds, 3)}
                for label, (items, seconds) in self.parts.items()
            ],
            **took,
            "disk": self.disk,
            "disk_while_running": self.disk_while_running,
        }
        return {"plan": content}


_SPREAD = [int(f"{number:05b}"[::-1], 2) for number in range(1, MOST + 1)]  # of 32: 16, 8, 24, 4, …, half first


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


def filled(found: dict[Hashable, object], keys: Iterable) -> dict:
    """What a loop found for each of some numbers; in a plan, that of the nearest stands for what is missing."""
    if not _state.plan:
        return found
    return {key: found[key if key in found else min(found, key=lambda other: abs(other - key))] for key in keys}


class Took:
    """Seconds and memory from here on."""

    def __init__(self):
        self.started = time.perf_counter()
        with contextlib.suppress(OSError):  # the peak of the stages that this process ran before
            Path("/proc/self/clear_refs").write_text("5")
        if torch := _cuda():
            torch.cuda.reset_peak_memory_stats()

    def to_json(self) -> dict:
        """{"seconds", "peak_memory": bytes, of the GPU if one is used, else of the process}."""
        if torch := _cuda():
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"seconds": round(time.perf_counter() - self.started + skipped(), 3), "peak_memory": memory}


def _cuda():
    """torch, if it is imported and uses a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None
