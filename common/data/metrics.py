"""Scores of answers: BLEU and chrF, ROUGE, accuracy, macro F1 and Matthews' correlation, and how sure they are."""

import re
from collections import Counter

import numpy as np

VERSION = 3  # of the scores, part of the key of what was measured by them; raise it when a score changes
CONFIDENCE = 0.95
BOOTSTRAP_SEED = 2024  # whatever the scripts' --seed: intervals of one model's answers are always the same
ALL = slice(None)  # positions of all examples
SCRIPTS = {  # how sacrebleu splits texts of these letters; those of Thai, Lao, Tibetan, Burmese and Khmer singly
    "zh": "\u3400-\u9fff",
    "ja-mecab": "\u3041-\u30ff",
    "ko-mecab": "\uac00-\ud7a3",
    "char": "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff",
}
UNSPACED = SCRIPTS["zh"] + SCRIPTS["ja-mecab"] + SCRIPTS["char"]  # written without spaces between words
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")  # for ROUGE: letters and digits, of any script


class Scored:
    """Answers beside their references. A subclass names its `metrics` and has `scores`."""

    def __init__(self, answers: list, references: list):
        """
        Raises:
            ValueError: the lengths differ or are zero, which sacrebleu would score silently or trip over.
        """
        if len(answers) != len(references) or not references:
            raise ValueError(f"{len(answers)} answers for {len(references)} references")
        self.count = len(references)

    note = ""  # a sentence for the conversation, on how they were counted

    def signatures(self) -> dict[str, str]:
        """What says how the scores were counted."""
        return {}


class Translations(Scored):
    """Translations beside their references: BLEU (0-100) and chrF (0-100), both by sacrebleu on detokenized text."""

    metrics = ("bleu", "chrf")

    def __init__(self, answers: list[str], references: list[str]):
        from sacrebleu.metrics import BLEU, CHRF

        super().__init__(answers, references)
        suited = tokens = tokenization(references)
        try:
            bleu = BLEU(tokenize=tokens)
        except RuntimeError:  # it needs a package that is not there
            tokens = "char"
            bleu = BLEU(tokenize=tokens)
        if tokens != "13a":
            self.note = f"BLEU counts tokens of {tokens!r}, as the references are written"
        if suited != tokens:
            self.note += f" (for {suited!r}, install sacrebleu[{suited[:2]}])"
        self.scorers = {"bleu": bleu, "chrf": CHRF()}
        self.counts = {  # (examples, n-gram counts), which are summed up to a score
            name: np.array(scorer._extract_corpus_statistics(answers, [references]))
            for name, scorer in self.scorers.items()
        }

    def scores(self, positions=ALL) -> dict[str, float]:
        """{metric: score} of the examples at `positions`."""
        return {
            name: scorer._compute_score_from_stats(self.counts[name][positions].sum(axis=0)).score
            for name, scorer in self.scorers.items()
        }

    def signatures(self) -> dict[str, str]:
        """sacrebleu's, which say how it counted."""
        bleu, chrf = (str(scorer.get_signature()) for scorer in self.scorers.values())
        return {"signature": bleu, "chrf_signature": chrf}


def tokenization(references: list[str]) -> str:
    """The name of sacrebleu's tokenization for the script that most letters of the references belong to."""
    text = " ".join(references)
    counts = {name: len(re.findall(f"[{letters}]", text)) for name, letters in SCRIPTS.items()}
    if 2 * sum(counts.values()) < len(re.findall(r"[^\W\d_]", text)) or not any(counts.values()):
        return "13a"
    if counts["ja-mecab"] > 0.1 * counts["zh"]:  # Japanese is written in Chinese letters too
        counts["ja-mecab"] += counts["zh"]
    return max(counts, key=counts.get)


class Summaries(Scored):
    """Summaries beside their references: means of ROUGE-1, ROUGE-2 and ROUGE-L, as F-measures (0-100).

    Words are runs of letters and digits in lower case, not stemmed, or single letters of a script without spaces, and a
    summary is one sequence of them (Lin, 2004).
    """

    metrics = ("rouge_1", "rouge_2", "rouge_l")

    def __init__(self, answers: list[str], references: list[str]):
        super().__init__(answers, references)
        self.rows = np.array([rouge(*pair) for pair in zip(answers, references)])  # (examples, 3)

    def scores(self, positions=ALL) -> dict[str, float]:
        """{metric: score} of the examples at `positions`."""
        return dict(zip(self.metrics, self.rows[positions].mean(axis=0).tolist()))


def rouge(answer: str, reference: str) -> list[float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of one summary, as F-measures (0-100)."""
    words, wanted = (WORD.findall(text.lower()) for text in (answer, reference))
    shared = []
    for order in (1, 2):
        grams = [Counter(zip(*(text[start:] for start in range(order)))) for text in (words, wanted)]
        shared.append(((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total()))
    shared.append((longest_common_subsequence(words, wanted), len(words), len(wanted)))
    return [200 * both / max(of_answer + of_reference, 1) for both, of_answer, of_reference in shared]  # 2PR / (P + R)


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


class Classes(Scored):
    """Predicted classes beside the labels: accuracy (0-1), macro F1 (0-1) and Matthews' correlation (-1 to 1).

    F1 is the mean over the classes that the labels have, so that it is over the same ones whatever was predicted.
    """

    metrics = ("accuracy", "f1", "matthews")

    def __init__(self, answers: list[int], references: list[int]):
        super().__init__(answers, references)
        self.classes, numbers = np.unique([answers, references], return_inverse=True)
        self.answers, self.references = numbers.reshape(2, -1)

    def scores(self, positions=ALL) -> dict[str, float]:
        """{metric: score} of the examples at `positions`."""
        classes, answers, references = len(self.classes), self.answers[positions], self.references[positions]
        confusion = np.bincount(references * classes + answers, minlength=classes**2).reshape(classes, classes)
        hits, predicted, labelled = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
        total = len(answers)
        counted = labelled > 0
        f1 = 2 * hits[counted] / (predicted + labelled)[counted]
        # Of several classes: Gorodkin, "Comparing two K-category assignments by a K-category correlation", 2004.
        covariance = total * hits.sum() - (predicted * labelled).sum()
        deviations = np.sqrt(float((total**2 - (predicted**2).sum()) * (total**2 - (labelled**2).sum())))
        return {
            "accuracy": float(hits.sum() / total),
            "f1": float(f1.mean()),
            "matthews": float(covariance / deviations) if deviations else 0.0,
        }


def intervals(scored: Scored, resamples: int) -> dict[str, list[float]]:
    """The percentile bootstrap's confidence interval of each metric (Efron, 1979), {metric: [lower, upper]}."""
    draw, count = np.random.default_rng(BOOTSTRAP_SEED), scored.count
    scores = [scored.scores(draw.integers(count, size=count)) for _ in range(resamples)]
    ends = 50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)  # in percent
    return {metric: np.percentile([row[metric] for row in scores], ends).tolist() for metric in scored.metrics}
