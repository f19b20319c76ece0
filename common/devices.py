"""Where to compute, and what every pass over data needs to know."""

import functools
import time
from dataclasses import dataclass

import torch

from common.cli import Talk
from common.errors import UserError


@dataclass(frozen=True)
class Runtime:
    """How data go through a model: on which device, how many examples at once, and who tells of the progress."""

    device: torch.device
    batch_size: int
    talk: Talk

    def now(self) -> float:
        """Seconds of a monotonic clock, once the device has done what it was given."""
        return now(self.device)


def resolve_device(name: str) -> torch.device:
    """The torch device of a `--device` flag.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, ImportError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: cannot be used here ({reason})") from None
    return device


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def in_full_precision(function):
    """Run a function without gradients and outside any autocast region.

    Inside one, products of float32 matrices silently run in bfloat16, and a Gram matrix made so ruins the solution.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run
