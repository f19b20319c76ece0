"""The composable pruning suite."""

__version__ = "0.2.0"  # in records, and what --version says
