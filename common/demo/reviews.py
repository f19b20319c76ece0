"""Made-up English film reviews with labels, for demos and tests that have no network.

A small grammar writes them from a seed. Every *claim* says something good (+) or bad (-) about the film,
with strength 2 (a strong word: "superb", "hated") or 1 (everything else). The label follows by these rules:

1. Negation turns a claim around and leaves it mild: "hardly dull" is +1, "far from superb" is -1;
   "nothing short of superb" is no negation.
2. In a contrast only the clause with the weight counts: the one after "but", "yet" or "even so", and the
   main clause beside "although", "while", "even if", "despite", "for all its" or "it hardly matters that".
3. Other people's opinions count, with strength 1, as the writer's answer has it: "My sister says that the
   plot is weak, but I disagree" is +1. Opinions about another film don't count: "It is better than the
   sequel, which was awful" is +1 because of "better".
4. A verdict ("All in all, ...") decides alone, wherever it stands.
5. Without a verdict the sign of the sum of the claims decides. A sum of zero is never written.

So the same words occur under both labels, and counting words is not enough.
"""

import random
from collections.abc import Callable, Iterator

# What a claim is about: the noun, and whether it is plural.
TOPICS = [
    ("acting", False),
    ("plot", False),
    ("script", False),
    ("dialogue", False),
    ("music", False),
    ("ending", False),
    ("camera work", False),
    ("editing", False),
    ("villain", False),
    ("first half", False),
    ("lighting", False),
    ("romance", False),
    ("humour", False),
    ("opening scene", False),
    ("love story", False),
    ("songs", True),
    ("jokes", True),
    ("costumes", True),
    ("effects", True),
    ("characters", True),
    ("fight scenes", True),
    ("supporting cast", False),
    ("car chases", True),
    ("main actors", True),
]
KINDS = ["film", "comedy", "thriller", "drama", "western", "musical", "adventure"]

# Words by what they say, sign first, then strength.
ADJECTIVES = {
    (+1, 1): ["good", "decent", "pleasant", "solid", "clever", "fresh", "charming", "lively", "likeable"],
    (+1, 2): ["superb", "brilliant", "wonderful", "magnificent", "splendid", "dazzling", "unforgettable"],
    (-1, 1): ["weak", "dull", "flat", "clumsy", "tired", "bland", "stale", "lazy", "tedious"],
    (-1, 2): ["awful", "dreadful", "terrible", "hopeless", "ghastly", "atrocious", "unbearable"],
}
DEGREES = {1: ["", "", "quite ", "rather ", "fairly "], 2: ["", "", "simply ", "truly ", "nothing short of "]}
NEGATIONS = ["not ", "not exactly ", "hardly ", "never ", "far from ", "by no means ", "anything but "]
ACTIONS = {  # verb and object; strength 1
    +1: [
        ("lift", "every scene"),
        ("hold", "my attention"),
        ("warm", "the heart"),
        ("reward", "a second look"),
        ("keep", "the story moving"),
        ("add", "real depth"),
        ("deserve", "applause"),
    ],
    -1: [
        ("ruin", "every scene"),
        ("test", "my patience"),
        ("spoil", "the mood"),
        ("waste", "our time"),
        ("slow", "the story down"),
        ("insult", "the viewer"),
        ("get", "on my nerves"),
    ],
}
FEELINGS = {  # present and past of what somebody feels, by sign and strength
    (+1, 1): [("like", "liked"), ("enjoy", "enjoyed"), ("admire", "admired")],
    (+1, 2): [("love", "loved"), ("adore", "adored")],
    (-1, 1): [("dislike", "disliked"), ("resent", "resented"), ("regret", "regretted")],
    (-1, 2): [("hate", "hated"), ("detest", "detested")],
}

OTHERS = [  # other people, and whether they are plural
    ("my brother", False),
    ("my sister", False),
    ("my neighbour", False),
    ("a friend of mine", False),
    ("the critics", True),
    ("my parents", True),
    ("some people", True),
    ("the newspapers", True),
]
RIVALS = ["the sequel", "the book", "the original", "the stage play", "the remake", "the director's last film"]

# {light} is the clause that does not count, {main} the one that does.
CONTRASTS = [
    "{light}, but {main}",
    "{light}, yet {main}",
    "{light}; even so, {main}",
    "although {light}, {main}",
    "while {light}, {main}",
    "{main}, although {light}",
    "{main}, even if {light}",
    "it hardly matters that {light}, because {main}",
]
REPLIES = {  # the writer's answer to somebody else's opinion: shared or not
    True: [", and I agree", ", and rightly so", ", which is quite true", ", and I could not agree more"],
    False: [", but I disagree", ", which is nonsense", ", and I could not agree less", ", which is not true"],
}
VERDICTS = {
    +1: [
        "I enjoyed every minute",
        "I would gladly see it again",
        "it is worth the ticket",
        "I recommend it",
        "I left with a smile",
        "I do not regret a minute",
        "you should not miss it",
        "I was never bored",
        "nobody will want their money back",
    ],
    -1: [
        "I regret every minute",
        "I would not see it again",
        "it is not worth the ticket",
        "I was bored",
        "I left without a smile",
        "I did not enjoy a minute",
        "you should miss it",
        "I cannot recommend it",
        "I want my money back",
    ],
}
VERDICT_OPENERS = ["all in all, ", "on balance, ", "in the end, ", "overall, ", "my verdict: ", "in short, "]
ASIDES = [  # say nothing about quality
    "we saw it on a rainy Sunday",
    "it runs for two hours",
    "I went with my whole family",
    "the story begins in a small town",
    "it was shot in the north of Spain",
    "the cinema was half empty",
    "I knew nothing about it before",
    "it came out last winter",
    "two brothers inherit an old hotel",
    "a young doctor moves to an island",
    "a retired detective takes one more case",
]

NEGATED = 0.18  # share of the claims that are negated
MIXED = 0.1  # chance that a sentence goes against the review's leaning
VERDICT = 0.25  # share of the reviews with a verdict


class _Writer:
    """Writes the clauses of one review; every topic is used at most once."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.topics: Iterator[tuple[str, bool]] = iter(rng.sample(TOPICS, len(TOPICS)))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def adjective(self, sign: int) -> tuple[str, int]:
        """An adjective and its strength."""
        strength = self.rng.choice((1, 2))
        return self.rng.choice(ADJECTIVES[sign, strength]), strength

    # Claims: a clause of the wanted sign, and its strength.

    def quality(self, sign: int, subject: tuple[str, bool] | None = None) -> tuple[str, int]:
        noun, plural = subject or next(self.topics)
        be = "are" if plural else "is"
        if self.chance(NEGATED):
            adjective, _ = self.adjective(-sign)
            if self.chance(0.2):
                return f"there is nothing {adjective} about the {noun}", 1
            return f"the {noun} {be} {self.rng.choice(NEGATIONS)}{adjective}", 1
        adjective, strength = self.adjective(sign)
        if self.chance(0.15):
            return f"there is something {adjective} about the {noun}", strength
        return f"the {noun} {be} {self.rng.choice(DEGREES[strength])}{adjective}", strength

    def action(self, sign: int) -> tuple[str, int]:
        noun, plural = next(self.topics)
        if self.chance(NEGATED):
            verb, thing = self.rng.choice(ACTIONS[-sign])
            negation = self.rng.choice(("do not" if plural else "does not", "never", "hardly ever"))
            verb += "" if plural or negation == "does not" else "s"
            return f"the {noun} {negation} {verb} {thing}", 1
        verb, thing = self.rng.choice(ACTIONS[sign])
        return f"the {noun} {verb}{'' if plural else 's'} {thing}", 1

    def feeling(self, sign: int) -> tuple[str, int]:
        noun, _ = next(self.topics)
        if self.chance(NEGATED):
            present, past = self.rng.choice(FEELINGS[-sign, self.rng.choice((1, 2))])
            return self.rng.choice(
                (
                    f"I did not {present} the {noun}",
                    f"I never {past} the {noun}",
                    f"I cannot say that I {past} the {noun}",
                )
            ), 1
        strength = self.rng.choice((1, 2))
        return f"I {self.rng.choice(FEELINGS[sign, strength])[1]} the {noun}", strength

    def claim(self, sign: int) -> tuple[str, int]:
        kinds: list[Callable[[int], tuple[str, int]]] = [self.quality, self.action, self.feeling]
        return self.rng.choices(kinds, weights=(5, 2, 2))[0](sign)

    # Sentences, without capital and full stop: the same contract.

    def pair(self, sign: int) -> tuple[str, int]:
        (first, a), (second, b) = self.claim(sign), self.claim(sign)
        return f"{first}, and {second}", a + b

    def contrast(self, sign: int) -> tuple[str, int]:
        (light, _), (main, strength) = self.claim(-sign), self.claim(sign)
        if self.chance(0.25):
            noun, _ = next(self.topics)
            opener = self.rng.choice(("despite the", "for all its"))
            return f"{opener} {self.adjective(-sign)[0]} {noun}, {main}", strength
        return self.rng.choice(CONTRASTS).format(light=light, main=main), strength

    def report(self, sign: int) -> tuple[str, int]:
        who, plural = self.rng.choice(OTHERS)
        shared = self.chance(0.5)
        said = sign if shared else -sign
        if self.chance(0.4):
            past = self.rng.choice(FEELINGS[said, self.rng.choice((1, 2))])[1]
            reply = self.rng.choice(
                (", and so did I", ", and I felt the same") if shared else ("; I did not", ", but I felt the opposite")
            )
            return f"{who} {past} it{reply}", 1
        clause, _ = self.quality(said)  # the other claims speak of "I" and "my"
        return f"{who} say{'' if plural else 's'} that {clause}{self.rng.choice(REPLIES[shared])}", 1

    def comparison(self, sign: int) -> tuple[str, int]:
        rival, better = self.rng.choice(RIVALS), "better" if sign > 0 else "worse"
        form = self.rng.randrange(4)
        if form == 0:
            return f"it is {better} than {rival}, which was {self.adjective(self.rng.choice((1, -1)))[0]}", 1
        if form == 1:
            opposite = "worse" if sign > 0 else "better"
            return f"it is no {opposite} than {rival}, which was {self.adjective(sign)[0]}", 1
        if form == 2:
            return f"it is nowhere near as {self.adjective(-sign)[0]} as {rival}", 1
        return f"it is every bit as {self.adjective(sign)[0]} as {rival}", 1

    def verdict(self, sign: int) -> str:
        opener = self.rng.choice(VERDICT_OPENERS)
        if self.chance(0.5):
            return opener + self.rng.choice(VERDICTS[sign])
        return opener + self.quality(sign, subject=(self.rng.choice(KINDS), False))[0]

    def sentence(self, sign: int) -> tuple[str, int]:
        kinds = [self.claim, self.pair, self.contrast, self.report, self.comparison]
        return self.rng.choices(kinds, weights=(6, 3, 3, 2, 2))[0](sign)


def _review(rng: random.Random) -> tuple[str, int]:
    """One review of one to four sentences and its score; the score's sign is the label, 0 is undecided."""
    writer = _Writer(rng)
    leaning, sentences, score = rng.choice((1, -1)), [], 0
    for _ in range(rng.choice((1, 1, 1, 2, 2))):
        sign = -leaning if writer.chance(MIXED) else leaning
        sentence, strength = writer.sentence(sign)
        sentences.append(sentence)
        score += sign * strength
    if len(sentences) < 3 and writer.chance(0.25):
        sentences.insert(0, rng.choice(ASIDES))
    if writer.chance(VERDICT):
        score = rng.choice((1, -1))  # the verdict's own, whatever was said before
        sentences.insert(0 if writer.chance(0.25) else len(sentences), writer.verdict(score))
    return " ".join(s[0].upper() + s[1:] + "." for s in sentences), score


def splits(
    seed: int, *, train: int = 8000, validation: int = 500, test: int = 1000
) -> dict[str, list[tuple[str, int]]]:
    """Reviews as (text, label) with label 1 = positive, 0 = negative, in the splits "train", "validation", "test".

    The sizes are numbers of reviews; each split is half positive (one more negative if its size is odd). No
    text occurs twice, within a split or across splits. The same seed and sizes give the same reviews in
    every process, and "test" and "validation" do not change with the size of "train".
    Raises ValueError for a negative size.
    """
    if min(train, validation, test) < 0:
        raise ValueError(f"sizes must not be negative, got train={train}, validation={validation}, test={test}")
    rng = random.Random(seed)
    seen: set[str] = set()
    result = {}
    for name, size in (("test", test), ("validation", validation), ("train", train)):
        missing = [size - size // 2, size // 2]  # by label
        reviews = []
        while any(missing):
            text, score = _review(rng)
            label = int(score > 0)
            if score and missing[label] and text not in seen and 8 <= len(text.split()) <= 32:
                seen.add(text)
                missing[label] -= 1
                reviews.append((text, label))
        result[name] = reviews
    return {name: result[name] for name in ("train", "validation", "test")}
