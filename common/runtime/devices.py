"""Where to compute, and what every pass over data needs to know."""

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.runtime import plan
from common.runtime.errors import UserError
from common.runtime.processes import ALONE, Processes
from common.runtime.progress import Talk


@dataclass(frozen=True)
class Runtime:
    """How data go through a model. `pieces`: the parts that each process takes a whole model's training batch in."""

    device: torch.device
    batch_size: int
    talk: Talk
    processes: Processes = ALONE
    pieces: int = 1
    precision: str = "fp32"  # see `computing`

    def now(self) -> float:
        """Seconds of a monotonic clock, once the device has done what it was given."""
        return now(self.device)


def resolve_device(name: str) -> torch.device:
    """The torch device of a `--device` flag; of several processes on a machine each has a GPU of its own."""
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    if name == "auto":
        return torch.device(gpu if torch.cuda.is_available() else "cpu")
    name = gpu if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except Exception as error:  # of torch and of the device's driver: many classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--device {name}: cannot be used here ({reason})") from None
    return device


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, once the device has done what it was given; put forward in a plan."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() + plan.skipped()


def give_back_memory() -> None:
    """Give the system what was freed, where the C library keeps it for later (glibc does, up to 32 MiB at a time)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


@contextlib.contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """How a model's forward pass computes: "fp32"; "tf32", products of factors rounded to 10 bits, on GPUs that can; or
    "bf16", under autocast. Parameters stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_full_precision(function):
    """Run a function without gradients, in float32 whatever surrounds it.

    In an autocast region products of float32 matrices silently run in bfloat16, and a Gram matrix made so ruins the
    solution.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.no_grad(), computing(torch.device("cpu"), "fp32"), computing(torch.device("cuda"), "fp32"):
            return function(*args, **kwargs)

    return run
