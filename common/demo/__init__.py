"""The embedded studies: data generated from a seed, and a small model trained on them. The way in is `build`."""

from common.demo.build import VERSION, build

__all__ = ["VERSION", "build"]
