"""Signals that end a stage: SIGINT (Ctrl-C), SIGTERM and SIGHUP.

Work is interrupted by an exception, but for what must not be torn apart (`deferred`): there a signal is only noted, and
the exception follows at the end. Training is deferred too: it looks after every step whether a signal came, and saves
where it is. A second signal ends the process at once.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
ONE_SIGNAL_SECONDS = 1.0  # a terminal that closes, and the script that was run in it, may both send one


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. No `Exception`, so that nothing that catches those takes it for a fault of its own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


_state = SimpleNamespace(came=None, depth=0)  # (signal, time) of the first one; depth of `deferred`


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """Let signals interrupt the work, as long as the context lasts. What was ignored before, as by nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle them
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _state.came, _state.depth = None, 0
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _state.came = None


def _note(number, frame):
    now = time.monotonic()
    if _state.came is None:
        _state.came = number, now
        stop_if_asked()
    elif now - _state.came[1] > ONE_SIGNAL_SECONDS:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def came() -> bool:
    """Whether a signal came, and the work is to end as soon as it can."""
    return _state.came is not None


def stop() -> None:
    """End the work for the signal that came, or for SIGINT if none did."""
    raise Interrupted(_state.came[0] if _state.came else signal.SIGINT)


def stop_if_asked() -> None:
    """End the work if a signal came, unless it is deferred."""
    if came() and not _state.depth:
        stop()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Do what must not be torn apart: a signal ends the work where the context ends. Also a decorator."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
    stop_if_asked()
