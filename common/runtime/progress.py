"""The conversation on stderr: log lines, and how far the work is."""

import contextlib
import sys
import threading
import time
from types import SimpleNamespace

from common.runtime import plan, signals

INTERVAL_SECONDS = 30.0  # between two lines on how far the work is
WAIT_SECONDS = 1.0  # a wait that is longer than this is told of
BAR_INTERVAL_SECONDS = 2.0  # between two readings of what a bar says of the work: a loss waits for the device


def duration(seconds):
    """Seconds in words, to two units: "8 s", "3 min 20 s", "2 h 5 min", "4 d 7 h"."""
    seconds = round(seconds)
    for large, small, size, of_small in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            rest = seconds % size // of_small
            return f"{seconds // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{seconds} s"


def _how_far(level, now):
    """A level of `Talk.progress` in words: "pruning: 3/36, 4 min left"."""
    left = (now - level.started) / level.done * (level.total - level.done) if level.done else None
    words = [f"{level.done}/{level.total}", level.status() if level.status else ""]
    return f"{level.label}: {', '.join(filter(None, [*words, '' if left is None else f'{duration(left)} left']))}"


class Talk:
    """The conversation on stderr: log lines and progress. `quiet` switches all of it off."""

    def __init__(self, quiet=False, stream=None):
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.levels = []  # what `progress` is at, from the outermost on
        self.spoken = time.monotonic()  # when the last line was

    def say(self, text):
        """One log line, with escapes for what is not printable, which a terminal may obey.

        Where nobody reads it any more, there is nothing more to say.
        """
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        if not self.quiet:
            self.spoken = time.monotonic()
            try:
                print(text, file=self.stream, flush=True)
            except (OSError, ValueError):  # a pipe whose reader is gone, a full disk, a closed stream
                self.quiet = True

    def remark(self, text):
        """One line on what has been done of the work, unless another one was said a moment ago."""
        if time.monotonic() - self.spoken > INTERVAL_SECONDS:
            self.say(text)

    @contextlib.contextmanager
    def waiting(self, text):
        """Say what is waited for, unless that is there at once."""
        timer = threading.Timer(WAIT_SECONDS, self.say, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def progress(self, items, label, status=None, size=None):
        """Yield `items`, showing how far we are: a bar on a terminal, else a plain line per interval.

        One may run within another: a line then tells of both. An interval goes on from one to the next, so that many
        short ones are told of too. `status` gives what else is to be said, such as a loss; asked once per interval.
        `size` gives what the work on an item grows with, if a plan may do with a few of them, see `plan.Plan.few`.
        """
        planned = plan.current()
        for item in planned.few(items, label, size) if planned else self._shown(items, label, status):
            signals.stop_if_asked()
            yield item

    def _shown(self, items, label, status):
        if self.quiet:
            yield from items
        elif self.stream.isatty():
            yield from self._bar(items, label, status)
        else:
            level = SimpleNamespace(label=label, status=status, total=len(items), done=0, started=time.monotonic())
            self.levels.append(level)
            try:
                for level.done, item in enumerate(items):
                    now = time.monotonic()
                    if now - self.spoken > INTERVAL_SECONDS:
                        shown = [each for each in self.levels if each.total > 1 or each is level]
                        self.say("; ".join(_how_far(each, now) for each in shown))
                    yield item
            finally:
                self.levels.remove(level)

    def _bar(self, items, label, status):
        from tqdm import tqdm

        read = time.monotonic()
        with tqdm(total=len(items), desc=label, file=self.stream, leave=False, dynamic_ncols=True) as bar:
            for item in items:
                now = time.monotonic()
                if status and now - read > BAR_INTERVAL_SECONDS:
                    read = now
                    bar.set_postfix_str(status())
                yield item
                bar.update()
