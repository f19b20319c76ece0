"""Searching configurations: scores and costs of a library's variants, and the best choice for each budget.

And the other way round: of some configurations, the smallest that is good enough.
"""

from common.search.budgets import check_feasible, find, limits, rates_of, report
from common.search.candidates import Candidates
from common.search.costs import count
from common.search.scoring import score_block, score_composed
from common.search.smallest import Compositions, find_smallest, sizes

__all__ = [
    "Candidates",
    "Compositions",
    "check_feasible",
    "count",
    "find",
    "find_smallest",
    "limits",
    "rates_of",
    "report",
    "score_block",
    "score_composed",
    "sizes",
]
