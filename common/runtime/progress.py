"""The conversation on stderr: log lines, and how far the work is."""

import contextlib
import sys
import threading
import time

from common.runtime import signals

PLAIN_INTERVAL_SECONDS = 15.0  # between two progress lines when stderr is no terminal
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


class Talk:
    """The conversation on stderr: log lines and progress. `quiet` switches all of it off."""

    def __init__(self, quiet=False, stream=None):
        self.quiet = quiet
        self.stream = stream or sys.stderr

    def say(self, text):
        """One log line. Where nobody reads it any more, there is nothing more to say."""
        if not self.quiet:
            try:
                print(text, file=self.stream, flush=True)
            except (OSError, ValueError):  # a pipe whose reader is gone, a full disk, a closed stream
                self.quiet = True

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

    def progress(self, items, label, status=None):
        """Yield `items`, showing how far we are: a bar on a terminal, else a plain line per interval.

        `status` gives what else is to be said, such as a loss; it is asked once per interval.
        """
        for item in self._shown(items, label, status):
            signals.stop_if_asked()
            yield item

    def _shown(self, items, label, status):
        if self.quiet:
            yield from items
        elif self.stream.isatty():
            yield from self._bar(items, label, status)
        else:
            started = spoken = time.monotonic()
            for index, item in enumerate(items):
                now = time.monotonic()
                if now - spoken > PLAIN_INTERVAL_SECONDS:
                    spoken = now
                    left = f"{duration((now - started) / index * (len(items) - index))} left" if index else ""
                    more = [f"{index}/{len(items)}", status() if status else "", left]
                    self.say(f"{label}: {', '.join(filter(None, more))}")
                yield item

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
