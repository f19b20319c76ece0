"""Searching configurations: scores and costs of a library's variants, and the best choice for each budget.

And the other way round: of some configurations, the smallest that is good enough.
"""

from common.composing.search.budgets import rates_of, report, search_budgets
from common.composing.search.candidates import Candidates
from common.composing.search.smallest import Compositions, find_smallest, sizes

__all__ = ["Candidates", "Compositions", "find_smallest", "rates_of", "report", "search_budgets", "sizes"]
