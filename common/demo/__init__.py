"""The embedded studies: made-up data, and a small model trained on them. The way in is `build`, or `write_data` for
data alone."""

from common.demo.build import VERSION, build, write_data

__all__ = ["VERSION", "build", "write_data"]
