"""The embedded studies: data generated from a seed, and a small model trained on them. The way in is `build`,
or `write_captions` for data alone."""

from common.demo.build import VERSION, build, write_captions

__all__ = ["VERSION", "build", "write_captions"]
