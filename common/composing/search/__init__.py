"""Searching configurations: scores and costs of a library's variants, and the best choice for each budget."""

from common.composing.search.budgets import rates_of, report, search_budgets
from common.composing.search.candidates import Candidates, sizes

__all__ = ["Candidates", "rates_of", "report", "search_budgets", "sizes"]
