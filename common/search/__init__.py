"""Searching configurations: scores and costs of libraries' variants, and the best choice for each budget."""

from common.search.budgets import check_feasible, find, limits, rates_of, report
from common.search.candidates import Candidates
from common.search.costs import count
from common.search.scoring import score_block, score_composed

__all__ = [
    "Candidates",
    "check_feasible",
    "count",
    "find",
    "limits",
    "rates_of",
    "report",
    "score_block",
    "score_composed",
]
