"""Scores and their intervals: against sacrebleu and its bootstrap, brute force, and values by hand.

The figures of ROUGE and of the confusion matrix were printed by rouge_score 0.1.2 and scikit-learn 1.9.1.
"""

import itertools
import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import metrics
from common.data.metrics import Classes, Summaries, Translations, intervals, tokenization

WORDS = ["ein", "Hund", "sieht", "Über", "die", "Straße!", "(ja)", "Kind", "a,b", "1.5", "rot"]


def sentences(count, seed=0):
    """(answers, references): references of 1 to 20 words, and what noise makes of them."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        reference = [rng.choice(WORDS) for _ in range(rng.randint(1, 20))]
        answer = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference if rng.random() < 0.9]
        pairs.append((" ".join(answer), " ".join(reference)))
    return tuple(map(list, zip(*pairs)))


# --- translations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, seed", [(1, 0), (1, 1), (3, 0), (3, 1), (50, 0)])
def test_bleu_and_chrf_are_sacrebleus(count, seed):
    """Of few and short sentences too, where orders are empty or have no match, and are smoothed."""
    answers, references = sentences(count, seed)
    assert Translations(answers, references).scores() == {
        "bleu": sacrebleu.corpus_bleu(answers, [references]).score,
        "chrf": sacrebleu.corpus_chrf(answers, [references]).score,
    }
    signatures = Translations(answers, references).signatures()
    assert signatures["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert signatures["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


@pytest.mark.parametrize(
    "tokens, suited, answer, reference",
    [
        ("zh", "zh", "一只狗在公园里跑得很快。", "一只黑色的狗在公园里跑。"),
        ("char", "ja-mecab", "犬が公園を走っている。", "黒い犬が公園を走っています。"),
        ("char", "ko-mecab", "개가 공원에서 달린다.", "검은 개가 공원에서 달린다."),
        ("char", "char", "สุนัขวิ่งในสวนสาธารณะ", "สุนัขสีดำวิ่งในสวน"),
        ("13a", "13a", "der Hund 狗 läuft im Park herum", "der Hund 狗 läuft im Park"),
    ],
)
def test_bleu_counts_words_as_their_script_has_them(tokens, suited, answer, reference):
    """Oracle: sacrebleu, told the tokenization; mecab's needs packages that the tests do without."""
    assert tokenization([reference]) == suited
    found = Translations([answer], [reference])
    expected = sacrebleu.corpus_bleu([answer], [[reference]], tokenize=tokens).score
    assert found.scores()["bleu"] == pytest.approx(expected) and expected > 10
    assert f"|tok:{tokens}|" in found.signatures()["signature"]
    assert (f"{tokens!r}" in found.note, f"install sacrebleu[{suited[:2]}]" in found.note) == (
        tokens != "13a",
        tokens != suited,
    )


def test_the_interval_is_that_of_sacrebleus_bootstrap(monkeypatch):
    """Both are percentiles of 1,000 resamples, drawn apart: an end is known to about a tenth of the width."""
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    answers, references = sentences(150)
    found = intervals(Translations(answers, references), 1000)
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        expected = metric.corpus_score(answers, [references], n_bootstrap=1000)
        lower, upper = found[name]
        assert (lower + upper) / 2 == pytest.approx(float(expected._mean), abs=0.15 * float(expected._ci))
        assert (upper - lower) / 2 == pytest.approx(float(expected._ci), rel=0.15)


# --- summaries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, reference, expected",
    [  # rouge_score.rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"]), times 100
        (
            "the cat sat on the mat",
            "the cat was found under the mat",
            [61.53846153846154, 36.36363636363636, 61.53846153846154],
        ),  # noqa: E501
        ("Police killed the gunman.", "the gunman police killed", [100.0, 66.66666666666666, 50.0]),
        ("a-b, A B; 3.5", "a b a b 3 5 x", [92.3076923076923, 90.9090909090909, 92.3076923076923]),
        ("nothing in common", "quite other words", [0.0, 0.0, 0.0]),
        ("", "the cat", [0.0, 0.0, 0.0]),
        ("one", "one", [100.0, 0.0, 100.0]),
    ],
)
def test_rouge_is_that_of_rouge_score(answer, reference, expected):
    assert metrics.rouge(answer, reference) == pytest.approx(expected, abs=1e-9)


def test_rouge_knows_words_of_every_script():
    """By hand: two of three words of either side, and no pair of neighbours but the first; of four letters three."""
    assert metrics.rouge("猫喜欢鱼", "猫喜欢狗") == pytest.approx([75, 200 / 3, 75])
    assert metrics.rouge("Ärzte über Öl", "ärzte über Straßen") == pytest.approx([200 / 3, 50, 200 / 3])


@settings(max_examples=200, deadline=None)
@given(left=st.text("abc", max_size=9), right=st.text("abc", max_size=9))
def test_the_longest_common_subsequence(left, right):
    """Oracle: all subsequences of the one, from the longest down, until one is found in the other."""

    def is_within(part):
        rest = iter(right)
        return all(letter in rest for letter in part)

    lengths = range(len(left), -1, -1)
    expected = next(size for size in lengths if any(map(is_within, itertools.combinations(left, size))))
    assert metrics.longest_common_subsequence(list(left), list(right)) == expected


def test_scores_of_summaries_are_means():
    answers, references = sentences(30)
    scored = Summaries(answers, references)
    expected = np.mean([metrics.rouge(*pair) for pair in zip(answers, references)], axis=0)
    assert scored.scores() == pytest.approx(dict(zip(("rouge_1", "rouge_2", "rouge_l"), expected)))


# --- classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers, labels, expected",
    [  # accuracy_score, f1_score(average="macro", labels=sorted(set(labels))), matthews_corrcoef of scikit-learn
        ([1, 0, 1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 1, 0, 1], (0.625, 0.6190476190476191, 0.2581988897471611)),
        ([3, 3, 3], [1, 2, 3], (1 / 3, 1 / 6, 0.0)),  # a class that is never predicted; one prediction alone
        ([7, 7], [7, 7], (1.0, 1.0, 0.0)),
        ([0, 1], [1, 0], (0.0, 0.0, -1.0)),
        # 2 is no label: F1 is the mean of 2/3 and 1, and not of 0 too; Matthews' is 4·3 - 6 over √((16 - 6)(16 - 8)).
        ([0, 2, 1, 1], [0, 0, 1, 1], (0.75, 5 / 6, 6 / 80**0.5)),
    ],
)
def test_scores_of_classes_are_those_of_scikit_learn(answers, labels, expected):
    assert tuple(Classes(answers, labels).scores().values()) == pytest.approx(expected)


# --- intervals ---------------------------------------------------------------------------------------------------


def test_the_interval_of_an_accuracy_is_the_binomials():
    """Of 400 answers of which 300 are right: 0.75 ± 1.96 · √(0.75 · 0.25 / 400); a class more does not change it."""
    found = intervals(Classes([0] * 300 + [1] * 100, [0] * 400), 2000)["accuracy"]
    assert found == pytest.approx([0.75 - 1.96 * 0.02165, 0.75 + 1.96 * 0.02165], abs=0.006)
