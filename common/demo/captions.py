"""A small English-German corpus that needs no network: picture captions drawn from a grammar.

`splits(seed)` gives train, val and test2016 pairs in the manner of Multi30K, such as "In the park, two boys are playing
with a red ball." / "Im Park spielen zwei Jungen mit einem roten Ball." The English settles the German word for word, so
BLEU 100 is possible, but only for a model that has learnt gender, case, weak, mixed and strong adjective endings,
separable verbs, verb-second and verb-final clauses, and that definite objects stand before the place, others after it.

Every sentence is made here; none comes from a data set. First the tables, then nouns, phrases, clauses, captions.
"""

import functools
import random
from typing import NamedTuple

# "english[/plural] = der|die|das singular/plural". `der*` is a weak noun: outside the nominative its singular is its
# plural form (der Junge, den Jungen). An English plural that isn't given takes -s. Mass nouns have no plural.
NOUNS = {
    "adult": "man/men = der Mann/Männer, woman/women = die Frau/Frauen, farmer = der* Bauer/Bauern, "
    "teacher = der Lehrer/Lehrer, student = der* Student/Studenten, cook = der Koch/Köche, "
    "policeman/policemen = der* Polizist/Polizisten, tourist = der* Tourist/Touristen, "
    "musician = der Musiker/Musiker, waiter = der Kellner/Kellner, "
    "waitress/waitresses = die Kellnerin/Kellnerinnen, nurse = die Krankenschwester/Krankenschwestern, "
    "grandmother = die Großmutter/Großmütter, grandfather = der Großvater/Großväter, "
    "lady/ladies = die Dame/Damen, clown = der Clown/Clowns, worker = der Arbeiter/Arbeiter, "
    "neighbour = der* Nachbar/Nachbarn, bride = die Braut/Bräute",
    "child": "boy = der* Junge/Jungen, girl = das Mädchen/Mädchen, child/children = das Kind/Kinder",
    "animal": "dog = der Hund/Hunde, cat = die Katze/Katzen, horse = das Pferd/Pferde, cow = die Kuh/Kühe, "
    "goat = die Ziege/Ziegen, bird = der Vogel/Vögel, monkey = der* Affe/Affen, bear = der* Bär/Bären, "
    "rabbit = das Kaninchen/Kaninchen, pig = das Schwein/Schweine, duck = die Ente/Enten",
    "mount": "horse = das Pferd/Pferde, donkey = der Esel/Esel, camel = das Kamel/Kamele, "
    "elephant = der* Elefant/Elefanten",
    "garment": "jacket = die Jacke/Jacken, coat = der Mantel/Mäntel, shirt = das Hemd/Hemden, "
    "jumper = der Pullover/Pullover, apron = die Schürze/Schürzen, costume = das Kostüm/Kostüme, "
    "suit = der Anzug/Anzüge",
    "headgear": "hat = der Hut/Hüte, cap = die Mütze/Mützen, helmet = der Helm/Helme, crown = die Krone/Kronen",
    "thing": "umbrella = der Regenschirm/Regenschirme, bag = die Tasche/Taschen, box/boxes = die Kiste/Kisten, "
    "basket = der Korb/Körbe, flower = die Blume/Blumen, flag = die Fahne/Fahnen, "
    "bottle = die Flasche/Flaschen, cup = die Tasse/Tassen, plate = der Teller/Teller, "
    "bucket = der Eimer/Eimer, book = das Buch/Bücher, picture = das Bild/Bilder, "
    "sign = das Schild/Schilder, suitcase = der Koffer/Koffer",
    "toy": "ball = der Ball/Bälle, balloon = der Luftballon/Luftballons, doll = die Puppe/Puppen, "
    "rope = das Seil/Seile, stick = der Stock/Stöcke",
    "text": "book = das Buch/Bücher, newspaper = die Zeitung/Zeitungen, letter = der Brief/Briefe, "
    "map = die Karte/Karten",
    "food": "apple = der Apfel/Äpfel, pear = die Birne/Birnen, egg = das Ei/Eier, cake = der Kuchen/Kuchen, "
    "carrot = die Karotte/Karotten, tomato/tomatoes = die Tomate/Tomaten, roll = das Brötchen/Brötchen",
    "meal": "bread = das Brot, cheese = der Käse, soup = die Suppe, rice = der Reis, meat = das Fleisch",
    "drink": "water = das Wasser, milk = die Milch, coffee = der Kaffee, tea = der Tee, juice = der Saft",
    "vehicle": "car = das Auto/Autos, bicycle = das Fahrrad/Fahrräder, bus/buses = der Bus/Busse, "
    "lorry/lorries = der Lastwagen/Lastwagen, boat = das Boot/Boote, train = der Zug/Züge",
    "load": "cart = der Karren/Karren, sledge = der Schlitten/Schlitten, boat = das Boot/Boote, "
    "suitcase = der Koffer/Koffer",
    "instrument": "guitar = die Gitarre/Gitarren, piano = das Klavier/Klaviere, violin = die Geige/Geigen, "
    "drum = die Trommel/Trommeln, flute = die Flöte/Flöten",
    "seat": "chair = der Stuhl/Stühle, bench/benches = die Bank/Bänke, sofa = das Sofa/Sofas, "
    "wall = die Mauer/Mauern, carpet = der Teppich/Teppiche, bed = das Bett/Betten",
    "room": "kitchen = die Küche, school = die Schule, museum = das Museum, shop = der Laden, "
    "restaurant = das Restaurant, church = die Kirche",
    "ground": "park = der Park, garden = der Garten, forest = der Wald, village = das Dorf, city = die Stadt, "
    "zoo = der Zoo",
    "open": "meadow = die Wiese, field = das Feld, square = der Platz",
    "top": "bridge = die Brücke, street = die Straße, roof = das Dach, hill = der Hügel",
    "water": "lake = der See, river = der Fluss, sea = das Meer, pond = der Teich",
    "shore": "beach = der Strand, coast = die Küste, harbour = der Hafen",
    "landmark": "tree = der Baum/Bäume, house = das Haus/Häuser, fence = der Zaun/Zäune, "
    "fountain = der Brunnen/Brunnen, tent = das Zelt/Zelte, statue = die Statue/Statuen, "
    "tower = der Turm/Türme, hut = die Hütte/Hütten, gate = das Tor/Tore, hedge = die Hecke/Hecken",
}
# Adjective stems; a stem in -a (rosa, lila) takes no ending.
ADJECTIVES = {
    "adult": "old = alt, young = jung, tall = groß, happy = glücklich, tired = müd, friendly = freundlich, "
    "strong = stark",
    "child": "small = klein, happy = glücklich, sad = traurig, tired = müd, curious = neugierig, blond = blond",
    "animal": "small = klein, big = groß, wild = wild, hungry = hungrig, brown = braun, black = schwarz, white = weiß",
    "food": "fresh = frisch, warm = warm, cold = kalt, delicious = lecker",
    "place": "small = klein, big = groß, old = alt, beautiful = schön",
    "goods": "small = klein, big = groß, old = alt, new = neu, beautiful = schön, heavy = schwer, expensive = teur",
    "colour": "red = rot, blue = blau, green = grün, yellow = gelb, black = schwarz, white = weiß, brown = braun, "
    "grey = grau, pink = rosa, purple = lila, dark = dunkl, colourful = bunt",
}
KIND = {
    "adult": "adult",
    "child": "child",
    "animal": "animal",
    "mount": "animal",  # groups not named are goods
    **dict.fromkeys(("food", "meal", "drink"), "food"),
    **dict.fromkeys(("room", "ground", "open", "top", "water", "shore", "landmark"), "place"),
}
COLOURED = ("garment", "headgear", "thing", "toy", "vehicle")  # may take a colour after another adjective
MASS = ("meal", "drink")
OWN = ("garment", "headgear", "mount", "instrument", "seat", "text")  # one each: their number is the subject's
RELATIVE = {"adult": "who", "child": "who", "animal": "that"}  # may be the subject of a relative clause

# "who | english | third person singular, plural[, separable prefix] | [complement[, complement]]", where a complement
# is "[english preposition] [german preposition+]case:groups"; the first one's English preposition is with the verb.
VERBS = """
people | sleeping       | schläft, schlafen           |
people | laughing       | lacht, lachen               |
people | singing        | singt, singen               |
people | working        | arbeitet, arbeiten          |
people | waiting for    | wartet, warten              | auf+acc:vehicle/adult/child
people | talking to     | spricht, sprechen           | mit+dat:adult/child
people | playing with   | spielt, spielen             | mit+dat:toy/animal
people | playing        | spielt, spielen             | auf+dat:instrument
people | riding         | reitet, reiten              | auf+dat:mount
people | sitting on     | sitzt, sitzen               | auf+dat:seat
people | climbing onto  | klettert, klettern          | auf+acc:seat
people | pointing at    | zeigt, zeigen               | auf+acc:animal/landmark/vehicle
people | reading        | liest, lesen                | acc:text
people | eating         | isst, essen                 | acc:food/meal
people | drinking       | trinkt, trinken             | acc:drink
people | buying         | kauft, kaufen               | acc:food/meal/thing/vehicle
people | holding        | hält, halten                | acc:thing/toy
people | carrying       | trägt, tragen               | acc:thing/instrument
people | wearing        | trägt, tragen               | acc:garment/headgear
people | feeding        | füttert, füttern            | acc:animal
people | repairing      | repariert, reparieren       | acc:vehicle/instrument
people | photographing  | fotografiert, fotografieren | acc:animal/landmark
people | looking for    | sucht, suchen               | acc:thing/toy/animal
people | hugging        | umarmt, umarmen             | acc:child/adult
people | helping        | hilft, helfen               | dat:adult/child
people | thanking       | dankt, danken               | dat:adult
people | watching       | sieht, sehen, zu            | dat:animal/child
people | listening to   | hört, hören, zu             | dat:adult
people | putting on     | zieht, ziehen, an           | acc:garment
people | putting on     | setzt, setzen, auf          | acc:headgear
people | taking off     | zieht, ziehen, aus          | acc:garment
people | taking off     | setzt, setzen, ab           | acc:headgear
people | picking up     | hebt, heben, auf            | acc:thing/toy
people | looking at     | sieht, sehen, an            | acc:animal/text/vehicle
people | inviting       | lädt, laden, ein            | acc:adult
people | giving         | gibt, geben                 | dat:child/animal, acc:food/toy
people | showing        | zeigt, zeigen               | dat:adult/child, acc:text/animal
people | bringing       | bringt, bringen             | dat:adult, acc:thing/meal/drink
people | throwing       | wirft, werfen               | acc:toy, into in+acc:water
people | pulling        | zieht, ziehen               | acc:load, out of aus+dat:ground
animal | sleeping       | schläft, schlafen           |
animal | waiting for    | wartet, warten              | auf+acc:adult/child
animal | eating         | frisst, fressen             | acc:food
animal | chasing        | jagt, jagen                 | acc:animal
animal | following      | folgt, folgen               | dat:adult/child/animal
animal | playing with   | spielt, spielen             | mit+dat:toy/child
animal | looking at     | sieht, sehen, an            | acc:adult/vehicle
"""
MOTIONS = (
    "running = läuft/laufen, jumping = springt/springen, hopping = hüpft/hüpfen, walking = geht/gehen, "
    "hiking = wandert/wandern, sneaking = schleicht/schleichen, dancing = tanzt/tanzen, rushing = eilt/eilen"
)
# "english | [german preposition+]case:groups[, particle]"; the particle behaves like a separable prefix.
PATHS = """
into        | in+acc:room/ground
onto        | auf+acc:top
to          | zu+dat:room/water/shore
through     | durch+acc:ground
across      | über+acc:open/top
along       | acc:water, entlang
past        | an+dat:landmark/room, vorbei
towards     | auf+acc:landmark, zu
around      | um+acc:landmark/ground
out of      | aus+dat:room/ground
"""
PLACES = """
in          | in+dat:room/ground
in          | auf+dat:open
on          | auf+dat:top
at          | an+dat:water/shore
next to     | neben+dat:landmark/vehicle
behind      | hinter+dat:landmark/vehicle
in front of | vor+dat:landmark/room
"""
TIMES = (
    "in the morning = am Morgen, in the evening = am Abend, at night = in der Nacht, in winter = im Winter, "
    "in summer = im Sommer, on a sunny day = an einem sonnigen Tag, after the rain = nach dem Regen"
)
MOODS = "happily = fröhlich, calmly = ruhig, patiently = geduldig"
PACES = "slowly = langsam, quickly = schnell, quietly = leise"
LOOKS = "long hair = langen Haaren, short hair = kurzen Haaren, dark hair = dunklen Haaren, glasses = Brille"
COUNTS = "two = zwei, three = drei, four = vier, five = fünf, several = mehrere, many = viele, some = einige"

# German endings in the order m, f, n, plural (in which gender makes no difference).
DER = {"nom": ("der", "die", "das", "die"), "acc": ("den", "die", "das", "die"), "dat": ("dem", "der", "dem", "den")}
EIN = {"nom": ("", "e", "", "e"), "acc": ("en", "e", "", "e"), "dat": ("em", "er", "em", "en")}  # ein-, sein-, ihr-
WEAK = {"nom": ("e", "e", "e", "en"), "acc": ("en", "e", "e", "en"), "dat": ("en", "en", "en", "en")}  # after der
MIXED = {"nom": ("er", "e", "es", "en"), "acc": ("en", "e", "es", "en"), "dat": ("en", "en", "en", "en")}  # after ein
STRONG = {"nom": ("er", "e", "es", "e"), "acc": ("en", "e", "es", "e"), "dat": ("em", "er", "em", "en")}  # after none
CONTRACTED = {"in dem": "im", "in das": "ins", "an dem": "am", "zu dem": "zum", "zu der": "zur"}

Pair = tuple[str, str]  # English, German
ABSENT = ("", "")


class Noun(NamedTuple):
    en: str
    en_plural: str
    gender: int  # 0, 1, 2: m, f, n
    de: str
    de_plural: str
    weak: bool


class Phrase(NamedTuple):
    """A noun phrase: English, German by case, and what agreement and word order ask about it."""

    en: str
    de: dict[str, str]
    gender: int  # 0, 1, 2, 3: m, f, n, plural
    definite: bool
    relative: str  # who, that, or "" where no clause may follow
    possessive: str  # his, her, their, or "" where German would waver


class Clause(NamedTuple):
    """A subject and what it does."""

    subject: Phrase
    modifier: Pair
    verb: Pair
    prefix: str  # German only
    adverb: Pair
    objects: list[tuple[Phrase, str, str, bool]]  # phrase, English, German, before the place?
    place: Pair


@functools.cache
def pairs(table: str) -> list[Pair]:
    """The entries of a table "english = german, …"."""
    return [tuple(entry.strip().split(" = ")) for entry in table.split(",")]


@functools.cache
def rows(table: str) -> list[list[str]]:
    """The lines of a table "a | b | …"."""
    return [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]


@functools.cache
def nouns(group: str) -> list[Noun]:
    found = []
    for english, german in pairs(NOUNS[group]):
        article, forms = german.split(" ")
        en, _, en_plural = english.partition("/")
        de, _, de_plural = forms.partition("/")
        gender = ("der", "die", "das").index(article.rstrip("*"))
        found.append(Noun(en, en_plural or en + "s", gender, de, de_plural, article.endswith("*")))
    return found


def join(*words: str) -> str:
    return " ".join(word for word in words if word)


def inflect(noun: Noun, case: str, plural: bool) -> str:
    if not plural:
        return noun.de_plural if noun.weak and case != "nom" else noun.de
    return noun.de_plural + ("n" if case == "dat" and noun.de_plural[-1] not in "ns" else "")


def noun_phrase(
    rng: random.Random, group: str, *, plural: bool | None = None, determiners: tuple[str, ...] = (), owner: str = ""
) -> Phrase:
    """A phrase about a noun of `group`. Number and determiner are free unless given; `owner` may serve as one."""
    noun, mass, kind = rng.choice(nouns(group)), group in MASS, KIND.get(group, "goods")
    if plural is None:
        plural = not mass and rng.random() < 0.35
    if mass:
        determiners = ("the", "bare", "bare")
    elif not determiners:
        determiners = ("the", "bare", "count", "count") if plural else ("the", "a", "a")
    determiner = rng.choice(determiners + ((owner,) if owner and kind == "goods" else ()))
    count = rng.choice(pairs(COUNTS)) if determiner == "count" else ABSENT
    adjectives = [rng.choice(pairs(ADJECTIVES[kind]))] if rng.random() < 0.5 else []
    if group in COLOURED and rng.random() < 0.5:
        adjectives.append(rng.choice(pairs(ADJECTIVES["colour"])))

    words = join(*(english for english, _ in adjectives), noun.en_plural if plural else noun.en)
    article_en = {"a": "an" if words[0] in "aeiou" else "a", "bare": "", "count": count[0]}.get(determiner, determiner)
    gender, de = 3 if plural else noun.gender, {}
    for case in DER:
        if determiner == "the":
            article, endings = DER[case][gender], WEAK
        elif determiner in ("bare", "count"):  # viele takes -n in the dative, zwei nothing
            article, endings = count[1] + ("n" if case == "dat" and len(count[1]) > 4 else ""), STRONG
        else:
            article, endings = {"a": "ein", "his": "sein"}.get(determiner, "ihr") + EIN[case][gender], MIXED
        stems = [stem if stem.endswith("a") else stem + endings[case][gender] for _, stem in adjectives]
        de[case] = join(article, *stems, inflect(noun, case, plural))
    return Phrase(
        join(article_en, words),
        de,
        gender,
        determiner in ("the", "his", "her", "their"),
        RELATIVE.get(group, ""),
        ("his", "her", "", "their")[gender],
    )


def governed(rng: random.Random, rule: str, *, number: bool | None = None, **options) -> tuple[Phrase, str]:
    """A phrase under "[preposition+]case:groups" and its German, contracted. `number` (plural?) binds OWN groups."""
    government, groups = rule.split(":")
    preposition, _, case = government.rpartition("+")
    group = rng.choice(groups.split("/"))
    if group in OWN and number is not None:
        options |= {"plural": number, "determiners": ("the", "bare", "bare") if number else ("the", "a", "a")}
    phrase = noun_phrase(rng, group, **options)
    german = join(preposition, phrase.de[case])
    for long, short in CONTRACTED.items():
        if german.startswith(long + " "):
            german = short + german.removeprefix(long)
    return phrase, german


def located(rng: random.Random, table: str) -> tuple[str, str, str]:
    """A phrase from PLACES or PATHS: English, German, particle."""
    preposition, cell = rng.choice(rows(table))
    rule, _, particle = cell.partition(", ")
    phrase, german = governed(rng, rule, plural=False, determiners=("the", "the", "a"))
    return join(preposition, phrase.en), german, particle


def act(rng: random.Random, subject: Phrase, modifier: Pair = ABSENT, *, short: bool = False) -> Clause:
    """Let the subject do something; `short` does it without adverb, place or path."""
    plural, people = subject.gender == 3, subject.relative == "who"
    mood, pace = (rng.choice(pairs(table)) if not short and rng.random() < 0.15 else ABSENT for table in (MOODS, PACES))
    if not short and rng.random() < 0.2:
        english, forms = rng.choice(pairs(MOTIONS)[: None if people else 4])
        *path, particle = located(rng, PATHS)
        return Clause(subject, modifier, (english, forms.split("/")[plural]), particle, pace, [], tuple(path))

    _, english, forms, frame = rng.choice([row for row in rows(VERBS) if (row[0] == "people") == people])
    singular, several, *prefix = forms.split(", ")
    objects = []
    for rule in frame.split(", ") if frame else []:
        preposition, _, rule = rule.rpartition(" ")
        if objects:  # one apple for the boys; into one lake
            options = {"plural": False, "determiners": ("the", "a") if preposition else ("a",)}
        else:
            options = {"number": plural, "owner": subject.possessive if people else ""}
        phrase, german = governed(rng, rule, **options)
        objects.append((phrase, join(preposition, phrase.en), german, phrase.definite and "+" not in rule))
    place = located(rng, PLACES)[:2] if not short and len(objects) < 2 and rng.random() < 0.6 else ABSENT
    return Clause(subject, modifier, (english, several if plural else singular), "".join(prefix), mood, objects, place)


def in_english(clause: Clause, *, place: bool = True) -> str:
    be = "are" if clause.subject.gender == 3 else "is"
    return join(
        clause.subject.en,
        clause.modifier[0],
        be,
        clause.adverb[0],
        clause.verb[0],
        *(english for _, english, _, _ in clause.objects),
        clause.place[0] if place else "",
    )


def in_german(clause: Clause, order: str, *, subject: str = "", place: bool = True) -> str:
    """`order` is "second" (the subject stands first), "fronted" (something else does) or "final" (subordinate)."""
    subject = subject or join(clause.subject.de["nom"], clause.modifier[1])
    early, late = ([german for _, _, german, first in clause.objects if first == when] for when in (True, False))
    middle = join(*early, clause.adverb[1], clause.place[1] if place else "", *late)
    if order == "final":
        return join(subject, middle, clause.prefix + clause.verb[1])
    return join(*((subject, clause.verb[1]) if order == "second" else (clause.verb[1], subject)), middle, clause.prefix)


def relative_clause(rng: random.Random, phrase: Phrase) -> Pair:
    """ "who is wearing a hat" and ", der einen Hut trägt,"."""
    clause = act(rng, phrase._replace(en=phrase.relative), short=True)
    return in_english(clause), f", {in_german(clause, 'final', subject=DER['nom'][phrase.gender])},"


def someone(rng: random.Random) -> tuple[Phrase, Pair]:
    """A subject and what describes it: clothes, looks, a relative clause, or nothing."""
    group = rng.choice(("adult", "adult", "child", "animal"))
    phrase, what = noun_phrase(rng, group), rng.random()
    if what < 0.2:
        return phrase, relative_clause(rng, phrase)
    if what < 0.4 and group != "animal":
        plural, rule = phrase.gender == 3, rng.choice(("in+dat:garment", "mit+dat:headgear"))
        clothes, german = governed(rng, rule, plural=plural, determiners=("bare",) if plural else ("a",))
        return phrase, (f"in {clothes.en}", german)
    if what < 0.5 and group != "animal":
        looks = rng.choice(pairs(LOOKS))
        return phrase, (f"with {looks[0]}", f"mit {looks[1]}")
    return phrase, ABSENT


def caption(rng: random.Random) -> Pair:
    """One English sentence and its German."""
    kind = rng.random()
    if kind < 0.2:  # two clauses, their subjects bare
        main, other = (act(rng, someone(rng)[0]) for _ in range(2))
        english, german = f"while {in_english(other)}", f"während {in_german(other, 'final')}"
        if kind < 0.12:
            texts = f"{in_english(main)} {english}", f"{in_german(main, 'second')}, {german}"
        else:
            texts = f"{english}, {in_english(main)}", f"{german}, {in_german(main, 'fronted')}"
        return tuple(finish(text) for text in texts)

    main = act(rng, *someone(rng))
    last = main.objects[-1][0] if main.objects else None
    if kind < 0.3:
        time = rng.choice(pairs(TIMES))
        texts = f"{time[0]}, {in_english(main)}", f"{time[1]} {in_german(main, 'fronted')}"
    elif kind < 0.6 and last and main.place != ABSENT:
        texts = (
            f"{main.place[0]}, {in_english(main, place=False)}",
            f"{main.place[1]} {in_german(main, 'fronted', place=False)}",
        )
    elif last and main.place == ABSENT and last.relative and not last.definite:
        clause = relative_clause(rng, last)
        texts = f"{in_english(main)} {clause[0]}", in_german(main, "second") + clause[1]
    else:
        texts = in_english(main), in_german(main, "second")
    return tuple(finish(text) for text in texts)


def finish(text: str) -> str:
    """Close the sentence. A relative clause's second comma gives way to another comma and to the full stop."""
    text = f"{text}.".replace(" ,", ",").replace(",,", ",").replace(",.", ".")
    return text[0].upper() + text[1:]


def splits(seed: int, *, train: int = 8000, val: int = 400, test: int = 400) -> dict[str, list[Pair]]:
    """(English, German) pairs under Multi30K's file stems: "train", "val" and "test2016".

    `train`, `val` and `test` count sentence pairs. The same seed and counts always give the same pairs, and no English
    sentence occurs twice, be it in one split or in two. Raises ValueError for a negative count.
    """
    sizes = {"train": train, "val": val, "test2016": test}
    for stem, size in sizes.items():
        if size < 0:
            raise ValueError(f"{stem}: got {size} sentence pairs, expected 0 or more")
    rng, found = random.Random(seed), {}
    while len(found) < sum(sizes.values()):
        found.setdefault(*caption(rng))
    pool = iter(found.items())
    return {stem: [next(pool) for _ in range(size)] for stem, size in sizes.items()}
