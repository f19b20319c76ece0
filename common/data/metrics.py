"""Scores of answers: BLEU and chrF, ROUGE, accuracy, macro F1 and Matthews' correlation, and how sure they are.

Every score here is a function of sums over the examples. So the bootstrap need not score anything again: it adds up
what each resample has drawn, and computes all resamples' scores at once.
"""

import re
from collections import Counter

import numpy as np

VERSION = 1  # of the scores, part of the key of what was measured by them; raise it when a score changes
RESAMPLES = 1000  # by default
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 2024  # whatever the scripts' --seed: intervals of one model's answers are always the same
BLEU_ORDER, CHARACTER_ORDER, BETA = 4, 6, 2  # of sacrebleu's defaults
WORD = re.compile(r"[^\W_]+")  # for ROUGE: letters and digits, of any script


class Translations:
    """Translations beside their references: BLEU (0-100) and chrF (0-100), both by sacrebleu on detokenized text."""

    metrics = ("bleu", "chrf")

    def __init__(self, answers: list[str], references: list[str]):
        """
        Raises:
            ValueError: the lengths differ or are zero, which sacrebleu would score silently or trip over.
        """
        check_lengths(answers, references)
        self.answers, self.references = answers, references

    def __len__(self):
        return len(self.answers)

    def scores(self) -> dict[str, float]:
        from sacrebleu.metrics import BLEU, CHRF

        return {
            name: metric.corpus_score(self.answers, [self.references]).score
            for name, metric in (("bleu", BLEU()), ("chrf", CHRF()))
        }

    def signatures(self) -> dict[str, str]:
        """sacrebleu's, which say how it counted."""
        from sacrebleu.metrics import BLEU, CHRF

        signatures = {}
        for name, metric in (("signature", BLEU()), ("chrf_signature", CHRF())):
            metric.corpus_score(self.answers[:1], [self.references[:1]])  # it has none before
            signatures[name] = str(metric.get_signature())
        return signatures

    def statistics(self) -> np.ndarray:
        """(examples, 28): of BLEU lengths, matches and totals by order; of chrF what it counts of each order."""
        from sacrebleu.metrics import BLEU

        metric = BLEU(effective_order=True)  # which changes no count, and is what it wants for single sentences
        rows = []
        for answer, reference in zip(self.answers, self.references):
            found = metric.sentence_score(answer, [reference])
            counts = [found.sys_len, found.ref_len, *found.counts, *found.totals]
            for order in range(1, CHARACTER_ORDER + 1):
                counts += matches(characters(answer, order), characters(reference, order))
            rows.append(counts)
        return np.array(rows, dtype=np.float64)

    @staticmethod
    def of_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: (resamples,)} of sums (resamples, 28)."""
        of_bleu = 2 + 2 * BLEU_ORDER
        return {"bleu": bleu_of(sums[:, :of_bleu]), "chrf": chrf_of(sums[:, of_bleu:])}


def bleu_of(sums):
    """BLEU as sacrebleu has it by default, with its exponential smoothing: (resamples,) of sums (resamples, 10)."""
    length, wanted = sums[:, 0], sums[:, 1]
    counts, totals = sums[:, 2 : 2 + BLEU_ORDER], sums[:, 2 + BLEU_ORDER :]
    none = counts == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        smoothed = np.where(none, 1 / 2.0 ** np.cumsum(none, axis=1), counts)  # the first 0 is 1/2, the next 1/4 …
        logarithms = np.log(smoothed / totals)
        penalty = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
        scores = 100 * penalty * np.exp(logarithms.mean(axis=1))
    return np.where((counts == 0).all(axis=1) | (totals == 0).any(axis=1), 0.0, scores)


def chrf_of(sums):
    """chrF as sacrebleu has it by default: (resamples,) of sums (resamples, 18)."""
    found, wanted, common = (sums[:, part::3] for part in range(3))  # (resamples, orders) each
    counts = (found > 0) & (wanted > 0)  # orders that neither side is too short for
    orders = np.maximum(counts.sum(axis=1), 1)
    precision = np.divide(common, found, out=np.zeros_like(common), where=counts).sum(axis=1) / orders
    recall = np.divide(common, wanted, out=np.zeros_like(common), where=counts).sum(axis=1) / orders
    below = BETA**2 * precision + recall
    return np.divide(100 * (1 + BETA**2) * precision * recall, below, out=np.zeros_like(below), where=below > 0)


def characters(text, order):
    """How often each run of `order` characters stands in a text, white space left out: a Counter."""
    text = "".join(text.split())
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def matches(found, wanted):
    """[parts found, parts wanted, parts that both have]; nothing counts as found where nothing is wanted."""
    return [found.total() if wanted else 0, wanted.total(), (found & wanted).total()]


class Summaries:
    """Summaries beside their references: means of ROUGE-1, ROUGE-2 and ROUGE-L, as F-measures (0-100).

    Words are runs of letters and digits in lower case, not stemmed, and a summary is one sequence of them (Lin, 2004).
    """

    metrics = ("rouge_1", "rouge_2", "rouge_l")

    def __init__(self, answers: list[str], references: list[str]):
        """
        Raises:
            ValueError: the lengths differ or are zero.
        """
        check_lengths(answers, references)
        self.rows = np.array([rouge(*pair) for pair in zip(answers, references)])

    def __len__(self):
        return len(self.rows)

    def scores(self) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.metrics, self.rows.mean(axis=0))}

    def signatures(self) -> dict[str, str]:
        return {}

    def statistics(self) -> np.ndarray:
        """(examples, 3): the scores of each, whose mean is the score of all."""
        return self.rows

    def of_sums(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: (resamples,)} of sums (resamples, 3)."""
        return dict(zip(self.metrics, sums.T / len(self)))


def rouge(answer: str, reference: str) -> list[float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one summary, as F-measures (0-100)."""
    words, wanted = (WORD.findall(text.lower()) for text in (answer, reference))
    shared = []
    for order in (1, 2):
        grams = [Counter(zip(*(text[start:] for start in range(order)))) for text in (words, wanted)]
        shared.append(((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()))
    shared.append((longest_common_subsequence(words, wanted), len(words), len(wanted)))
    return [200 * both / max(found + wanted, 1) for both, found, wanted in shared]  # 2PR / (P + R)


def longest_common_subsequence(left: list[str], right: list[str]) -> int:
    """How many words the longest sequence has that both hold in this order.

    The whole row of the usual table is one integer, a bit a word of `left` (Hyyrö, "Bit-parallel LCS-length
    computation revisited", 2004).
    """
    places = {}
    for place, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << place
    everything = (1 << len(left)) - 1
    row = everything
    for word in right:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & everything
    return len(left) - row.bit_count()


class Classes:
    """Predicted classes beside the labels: accuracy (0-1), macro F1 (0-1) and Matthews' correlation (-1 to 1)."""

    metrics = ("accuracy", "f1", "matthews")

    def __init__(self, answers: list[int], references: list[int]):
        """
        Raises:
            ValueError: the lengths differ or are zero.
        """
        check_lengths(answers, references)
        self.classes, numbers = np.unique([answers, references], return_inverse=True)
        self.answers, self.references = numbers.reshape(2, -1)

    def __len__(self):
        return len(self.answers)

    def scores(self) -> dict[str, float]:
        return {name: float(values[0]) for name, values in self.of_sums(self.statistics().sum(axis=0)[None]).items()}

    def signatures(self) -> dict[str, str]:
        return {}

    def statistics(self) -> np.ndarray:
        """(examples, 3 * classes): whether an example is a hit of the class, is predicted as it, is labelled as it."""
        one_hot = np.eye(len(self.classes))
        answers, references = one_hot[self.answers], one_hot[self.references]
        return np.concatenate([answers * references, answers, references], axis=1)

    @staticmethod
    def of_sums(sums: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: (resamples,)} of sums (resamples, 3 * classes)."""
        hits, predicted, labelled = np.split(sums, 3, axis=1)  # (resamples, classes) each
        total, hit = labelled.sum(axis=1), hits.sum(axis=1)
        there = predicted + labelled > 0  # a class that neither side has counts for nothing
        f1 = np.divide(2 * hits, predicted + labelled, out=np.zeros_like(hits), where=there)
        # Of several classes: Gorodkin, "Comparing two K-category assignments by a K-category correlation", 2004.
        variances = [total**2 - (each**2).sum(axis=1) for each in (predicted, labelled)]
        below = np.sqrt(variances[0] * variances[1])
        correlation = total * hit - (predicted * labelled).sum(axis=1)
        return {
            "accuracy": hit / total,
            "f1": f1.sum(axis=1) / there.sum(axis=1),
            "matthews": np.divide(correlation, below, out=np.zeros_like(below), where=below > 0),
        }


Scored = Translations | Summaries | Classes


def intervals(scored: Scored, resamples: int) -> dict[str, list[float]]:
    """The percentile bootstrap's confidence interval of each metric (Efron, 1979), {metric: [lower, upper]}.

    Args:
        resamples: how often as many examples as there are, are drawn with replacement.
    """
    rows, draw = scored.statistics(), np.random.default_rng(BOOTSTRAP_SEED)
    count = len(rows)
    sums = np.empty((resamples, rows.shape[1]))
    for each in sums:
        each[:] = np.bincount(draw.integers(count, size=count), minlength=count) @ rows
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)  # in percent
    return {metric: np.percentile(values, ends).tolist() for metric, values in scored.of_sums(sums).items()}


def check_lengths(answers: list, references: list) -> None:
    """Make sure that there is an answer to each, and one at all.

    Raises:
        ValueError: there is not.
    """
    if len(answers) != len(references) or not references:
        raise ValueError(f"{len(answers)} answers for {len(references)} references")
