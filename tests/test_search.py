"""The choice within a budget against brute force; exchanges and whole searches against made-up losses."""

import contextlib
import itertools
import random
import signal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny import RUNTIME

from common.composing.search import budgets
from common.composing.search import knapsack as search
from common.composing.search.candidates import HELD_BACK, SCORED_ON
from common.composing.search.costs import Costs
from common.runtime.errors import UserError

NO_SHRINKING = [Phase.reuse, Phase.generate]  # each example takes the solver milliseconds


# --- the best choice -------------------------------------------------------------------------------------------


def spent(costs, choice):
    return sum(costs[block][choice[block]] for block in costs)


def combinations(costs):
    return [dict(zip(costs, each)) for each in itertools.product(*costs.values())]


def brute_force(scores, costs, budget, current=None, changes=0):
    """The smallest sum of scores of all combinations within the budget; None if there are none."""
    sums = [
        spent(scores, choice)
        for choice in combinations(costs)
        if spent(costs, choice) <= budget
        and (current is None or sum(current[block] != choice[block] for block in costs) <= changes)
    ]
    return min(sums, default=None)


@contextlib.contextmanager
def seconds_at_most(limit):
    """A time limit, so that a search without an end fails instead of hanging."""

    def stop(*_):
        raise TimeoutError(f"not done within {limit} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_choice(scores, costs, budget, **limited):
    """The choice is complete, within the budget to the last bit, and as good as any."""
    best = brute_force(scores, costs, budget, **limited)
    assert best is not None
    with seconds_at_most(3):
        choice = search.choose(scores, costs, budget, **limited)
    assert choice.keys() == costs.keys() and all(choice[block] in costs[block] for block in costs)
    assert spent(costs, choice) <= budget
    assert spent(scores, choice) == pytest.approx(best, rel=1e-9, abs=1e-12)
    return choice


SCORES = st.integers(-100, 100)  # of which each test takes what fraction it likes
COSTS = {
    "whole": st.integers(0, 20),
    "seconds": st.floats(1e-5, 1e-2, allow_subnormal=False),
    "tenths": st.integers(1, 9).map(lambda n: n * 0.1),  # sums that depend on their order
    "large": st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: pair[0] * 10**7 + pair[1]),
    "alike": st.integers(10**7, 10**7 + 3),
}


@st.composite
def instances(draw, costs, scale=0.01):
    """(scores, costs, budget) of one to five blocks; some combination costs just the budget, or what is below it."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    scores, prices = (
        {f"block {i}": {f"variant {n}": draw(number) for n in range(size)} for i, size in enumerate(sizes)}
        for number in (SCORES.map(lambda n: n * scale), costs)
    )
    exact = spent(prices, draw(st.sampled_from(combinations(prices))))
    return scores, prices, exact * draw(st.sampled_from([1, 1, 1.0625]))


@pytest.mark.parametrize("kind", COSTS)
@settings(max_examples=30, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_the_choice_is_the_best_within_the_budget(kind, data):
    """Oracle: all combinations, one after the other."""
    check_choice(*data.draw(instances(COSTS[kind])))


@settings(max_examples=30, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_no_more_blocks_than_allowed_are_changed(data):
    """Oracle: all combinations that differ from the current one in so many blocks."""
    scores, costs, budget = data.draw(instances(COSTS["whole"]))
    current = data.draw(st.sampled_from(combinations(costs)))
    changes = data.draw(st.integers(0, len(costs)))
    if brute_force(scores, costs, budget, current, changes) is None:
        with pytest.raises(UserError, match="budget"):
            search.choose(scores, costs, budget, current=current, changes=changes)
    else:
        choice = check_choice(scores, costs, budget, current=current, changes=changes)
        assert sum(choice[block] != current[block] for block in costs) <= changes


@pytest.mark.parametrize(
    "costs, budget, expected",
    [
        ({"a": {"whole": 57, "less": 10}}, 0.57 * 100, {"a": "less"}),  # 56.99999999999999
        (
            {"a": {"whole": 0.1, "less": 0.05}, "b": {"whole": 0.2, "less": 0.1}},
            0.3,  # 0.30000000000000004 is spent
            {"a": "less", "b": "whole"},
        ),
    ],
)
def test_a_sum_one_bit_over_the_budget_is_not_taken_and_the_search_ends(costs, budget, expected):
    """By hand: to take less of a raises the score by 1, of b by 2; all whole would be just over the budget."""
    scores = {block: {"whole": 0.0, "less": loss} for block, loss in zip(costs, (1.0, 2.0))}
    assert (
        sum(each["whole"] for each in costs.values()) > budget > 0.9999 * sum(each["whole"] for each in costs.values())
    )
    with seconds_at_most(3):
        assert search.choose(scores, costs, budget) == expected


def test_the_solver_says_nothing_on_stdout(capfd):
    """stdout is the script's result alone. Oracle: what the process wrote there, other languages' code included."""
    draw = random.Random(1)
    scores, costs = {}, {}
    for block in "abc":
        scores[block] = {variant: draw.randint(-9, 9) / 10 for variant in range(3)}
        costs[block] = {variant: 10**9 * draw.randint(1, 4) + draw.randint(0, 3) for variant in range(3)}
    budget = sum(draw.choice(list(costs[block].values())) for block in costs)
    with contextlib.suppress(UserError, TimeoutError), seconds_at_most(6):  # these are other tests' concern
        search.choose(scores, costs, budget)
    assert capfd.readouterr().out == ""


def test_a_budget_below_the_least_that_the_variants_cost_is_refused():
    """By hand: 1 + 4 = 5."""
    scores = {"a": {"x": 0.0, "y": -1.0}, "b": {"x": 0.0, "y": 2.0}}
    costs = {"a": {"x": 3, "y": 1}, "b": {"x": 9, "y": 4}}
    for budget in (4.99, 0, -3):
        with pytest.raises(UserError, match=f"a budget of {budget:g} cannot be met"):
            search.choose(scores, costs, budget)
    assert search.choose(scores, costs, 5) == {"a": "y", "b": "y"}
    assert search.choose(scores, costs, 12) == {"a": "y", "b": "x"}


# --- exchanges -------------------------------------------------------------------------------------------------


def within(loss):
    """The `conditional` of a loss: that of the choice with one block replaced."""

    def conditional(choice, costs):
        return {block: {variant: loss({**choice, block: variant}) for variant in each} for block, each in costs.items()}

    return conditional


def improved(start, costs, budget, loss, rounds, held_back=None, conditional=None):
    """(the last choice, the loss of each) of the exchanges; held-back examples agree with the others unless given."""
    conditional = conditional or (lambda choice: within(loss)(choice, costs))
    path = search.improve(start, costs, budget, loss, held_back or loss, conditional, rounds=rounds)
    return path[-1], [loss(choice) for choice in path]


@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_exchanges_only_ever_lower_the_loss(data):
    """A loss of whole numbers in which each pair of variants has a part of its own. Oracle: the loss itself.

    Where it ends before its rounds do, no exchange of a single block within the budget is better.
    """
    scores, costs, budget = data.draw(instances(COSTS["whole"]))
    parts = random.Random(data.draw(st.integers(0, 99)))
    pairs = {
        pair: parts.randint(-20, 20)
        for pair in itertools.combinations([(block, variant) for block, each in costs.items() for variant in each], 2)
    }

    def loss(choice):
        return sum(pairs[pair] for pair in itertools.combinations(choice.items(), 2))

    start = search.choose(scores, costs, budget)
    rounds = data.draw(st.integers(0, 4))
    choice, history = improved(start, costs, budget, loss, rounds)
    assert spent(costs, choice) <= budget
    assert (history[0], history[-1]) == (loss(start), loss(choice)) and len(history) <= rounds + 1
    assert all(after < before for before, after in itertools.pairwise(history))
    if len(history) <= rounds:
        singles = [
            loss(other)
            for other in combinations(costs)
            if spent(costs, other) <= budget and sum(other[block] != choice[block] for block in costs) <= 1
        ]
        assert min(singles) == history[-1]


HALVED = {"a": {"dense": 2, "half": 1}, "b": {"dense": 2, "half": 1}, "c": {"dense": 2, "half": 1}}


def test_an_exchange_of_two_blocks_is_found():
    """By hand: to halve a, b and c costs 1, 2 and 3, and a with b 7 more; two of them must be halved.

    The scores' sum takes a and b, a loss of 10. Within that model: a dense 2, b dense 1, c half 13, and 10 as it is. Of
    the choices within the budget {a, c} then has the smallest sum (10 + 1 + 13), and a loss of 4.
    """
    alone = {"a": 1, "b": 2, "c": 3}

    def loss(choice):
        halved = [block for block, variant in choice.items() if variant == "half"]
        return sum(alone[block] for block in halved) + 7 * ({"a", "b"} <= set(halved))

    scores = {block: {"dense": 0, "half": score} for block, score in alone.items()}
    start = search.choose(scores, HALVED, 4)
    assert start == {"a": "half", "b": "half", "c": "dense"}
    for rounds in (1, 5):
        found = improved(start, HALVED, 4, loss, rounds)
        assert found == ({"a": "half", "b": "dense", "c": "half"}, [10, 4])
    assert start == {"a": "half", "b": "half", "c": "dense"}  # left alone


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_efficient_variants_are_those_that_none_beats(data):
    """Oracle: every variant against every other one. Of equal ones, one is left; the best choice needs no other."""
    scores, costs, _ = data.draw(instances(COSTS["whole"]))
    found = search.efficient(scores, costs)
    for block, variants in found.items():
        pairs = {variant: (costs[block][variant], scores[block][variant]) for variant in scores[block]}
        unbeaten = {
            pair
            for pair in pairs.values()
            if not any(cost <= pair[0] and score <= pair[1] and (cost, score) != pair for cost, score in pairs.values())
        }
        assert len(variants) == len(unbeaten) and {pairs[variant] for variant in variants} == unbeaten


LETTERS = {block: {"x": 1, "y": 1} for block in "ab"}  # all four choices cost the same


@pytest.mark.parametrize(
    "held_back, expected, asked",
    [
        ({"xx": 9, "yx": 8, "yy": 7}, ["xx", "yx", "yy"], ["xx", "yx", "yy"]),  # the third finds nothing better
        ({"xx": 9, "yx": 8, "yy": 8}, ["xx", "yx"], ["xx", "yx"]),  # the second round is no better
        ({"xx": 9, "yx": 9.1, "yy": 0}, ["xx"], ["xx"]),  # the first is worse; what might come after is not seen
    ],
    ids=["agree", "no better", "worse"],
)
def test_rounds_go_on_as_long_as_held_back_examples_agree(held_back, expected, asked):
    """By hand: on the deciding examples the losses are 5, 4 and 3 after no, one and two rounds.

    Within xx the scores know of no good in b as y, so the first round ends at yx.
    """
    losses, conditionals = {"xx": 5, "xy": 6, "yx": 4, "yy": 3}, []

    def word(choice):
        return "".join(choice.values())

    def conditional(choice):
        conditionals.append(word(choice))
        return within(lambda each: losses[word(each)])(choice, LETTERS)

    path = search.improve(
        {"a": "x", "b": "x"},
        LETTERS,
        2,
        lambda choice: losses[word(choice)],
        lambda choice: held_back[word(choice)],
        conditional,
        rounds=5,
    )
    assert ([word(choice) for choice in path], conditionals) == (expected, asked)


# --- beside the uniform ones -----------------------------------------------------------------------------------


class Table:
    """What `budgets.find` asks of `Candidates`, out of made-up losses of whole choices."""

    objective, runtime = "kl", RUNTIME

    def __init__(self, costs, configurations, scoring, held_back):
        """`scoring`, `held_back`: {the variants of a choice, as a tuple: loss}."""
        self.costs, self.uniform, self.scoring, self.unseen = costs, configurations, scoring, held_back
        self.seconds = {"search": 0.0}

    def configurations(self):
        return self.uniform

    def measured(self, choice, sample=SCORED_ON):
        losses = self.scoring if sample == SCORED_ON else self.unseen
        return {"loss": float(sample == HELD_BACK), "kl": losses[tuple(choice[block] for block in self.costs)]}

    def predicted(self, choice, scores):
        return spent(scores, choice)

    def conditional(self, choice, variants):
        return within(lambda each: self.measured(each)["kl"])(choice, variants)


@settings(max_examples=40, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_no_choice_is_worse_than_the_uniform_ones_on_held_back_examples_nor_over_its_budget(data):
    """Losses on scoring and on held-back examples that know nothing of each other. Oracle: the losses themselves."""
    scores, costs, budget = data.draw(instances(COSTS["tenths"]))
    for each in (scores, costs):  # the first variant is the block as it is
        for variants in each.values():
            variants["dense"] = variants.pop("variant 0")
    draw = random.Random(data.draw(st.integers(0, 99)))
    every = combinations(costs)
    scoring, unseen = ({tuple(choice.values()): draw.randint(0, 50) for choice in every} for _ in range(2))
    uniform = draw.choices(every, k=draw.randint(0, 6))
    limits = [budget, *(spent(costs, choice) for choice in uniform)]
    table, rounds = Table(costs, uniform, scoring, unseen), data.draw(st.integers(0, 3))
    found = budgets.find(table, Costs("parameters", costs, 1), limits, scores, rounds=rounds)
    for limit, (choice, figures) in zip(limits, found, strict=True):
        assert spent(costs, choice) <= limit and figures["cost"] == spent(costs, choice) + 1
        measured = unseen[tuple(choice[block] for block in costs)]
        fitting = [each for each in uniform if spent(costs, each) <= limit]
        just = [each for each in fitting if spent(costs, each) == limit]
        others = sorted((each for each in fitting if each not in just), key=lambda each: spent(scores, each))
        promised = just + (others if len(fitting) <= 3 else others[:1] if not just else [])
        assert all(measured <= unseen[tuple(each.values())] for each in promised)
        on_held_back = figures["held_back"]
        options = {"searched": on_held_back["searched"]["kl"]}
        if on_held_back["uniform"]:
            options[f"uniform {on_held_back['uniform']['configuration']}"] = on_held_back["uniform"]["kl"]
        assert measured == min(options.values()) == options[figures["returned"]]
        if figures["returned"] != "searched":
            assert choice == uniform[int(figures["returned"].removeprefix("uniform "))]
        for history in (figures["history"], on_held_back["history"]):
            assert all(after < before for before, after in itertools.pairwise(history))
        assert on_held_back["history"][-1] == on_held_back["searched"]["kl"]
