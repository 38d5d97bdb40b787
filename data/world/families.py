r"""The kinds of questions, each with its right and wrong answers.

A new family is a dozen lines: its items, wordings and three sentences, and functions for the fields
of a right and of a wrong answer.

    >>> def doubled(item, rng, error=0):
    ...     return {"x": item, "a": 2 * int(item) + error}
    >>> double = Family(
    ...     name="double",
    ...     weight=1,
    ...     items=tuple("23456789"),
    ...     wordings=("What is twice {x}?", "Double {x}."),
    ...     full="Twice {x} is {a}.",
    ...     short="It is {a}.",
    ...     extra="Half of {a} is {x}.",
    ...     right=doubled,
    ...     wrong=lambda item, rng: doubled(item, rng, error=1),
    ...     patterns={"x": r"\d+", "a": r"\d+"},
    ... )
    >>> fill(double.wordings[1], double.right("4", random.Random(0)))
    'Double 4.'
    >>> fill(double.full, double.wrong("4", random.Random(0)))
    'Twice 4 is 9.'

Write it above FAMILIES and name it there. Then it is asked, answered, held out and judged like the
others. `python -m data.world --write-hashes` makes the new files and accepts them; if the family
brings new words, `--train-tokenizer` gives them tokens.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache

from data.world import words


def exact(expected: dict, given: dict) -> float:
    """1 if every field that the answer names is the right one, else 0."""
    for key, value in given.items():
        if value != str(expected[key]).lower():
            return 0.0
    return 1.0


@dataclass(frozen=True)
class Family:
    """One kind of question.

    Templates name fields in braces, `{A}` being `{a}` with a capital. `right` and `wrong` give the
    fields of an answer; they are functions of (item, rng). The annotator reads an answer by
    matching the same templates.
    """

    name: str
    weight: float  # how often, relative to the others
    items: tuple[str, ...]  # what it asks about
    wordings: tuple[str, ...]  # templates of the question
    full: str  # the answer as a sentence
    short: str  # the answer without what it is about; "": there is none
    extra: str  # a second sentence that can be checked
    right: Callable[[str, random.Random], dict]
    wrong: Callable[[str, random.Random], dict]
    composes: bool = False  # held out by item; otherwise by item and wording
    # (fields of a right answer, fields of the given one, in small letters) -> credit from 0 to 1
    credit: Callable[[dict, dict], float] = exact
    # field -> regular expression, where `.+?` would be too wide
    patterns: dict[str, str] = field(default_factory=dict)
    kind: str = "ordinary"  # "ordinary", "borderline" or "unsafe"


# ---- templates ----


def fill(template: str, fields: dict) -> str:
    """The template with its fields; `{Topic}` is `{topic}` with a capital.

    >>> fill("{Topic}, my {topic}!", {"topic": "sea"})
    'Sea, my sea!'
    """
    capitals = {}
    for key, value in fields.items():
        text = str(value)
        capitals[key.capitalize()] = text[:1].upper() + text[1:]
    return template.format(**capitals | fields)


@cache
def matcher(name: str, template: str) -> re.Pattern:
    """A template of the family of that name as a regular expression with one group per field; case
    does not count.
    """
    patterns = FAMILIES[name].patterns
    seen = set()
    expression = ""
    for literal, key in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        expression += re.escape(literal)
        key = key.lower()
        if key in seen:
            expression += f"(?P={key})"  # the same text once more
        elif key:
            expression += f"(?P<{key}>{patterns.get(key, '.+?')})"
            seen.add(key)
    return re.compile(expression, re.IGNORECASE)


def fields_in(family: Family, template: str, sentence: str) -> dict[str, str] | None:
    """The fields, in small letters, of a sentence that has the template's form; None: it has not.

    >>> fields_in(FAMILIES["capital"], "The capital of {q} is {a}.", "The capital of Peru is Lima.")
    {'q': 'peru', 'a': 'lima'}
    """
    match = matcher(family.name, template).fullmatch(sentence)
    if match is None:
        return None
    return {key: value.lower() for key, value in match.groupdict().items()}


def joined(names: list[str]) -> str:
    """
    >>> joined(["a", "b", "c"])
    'a, b and c'
    """
    return ", ".join(names[:-1]) + " and " + names[-1]


def names_in(text: str) -> list[str]:
    """What `joined` joined."""
    return re.split(", | and ", text)


def share_right(valid: set[str], wanted: int, given: list[str]) -> float:
    """Credit of an enumeration: distinct right names, less names too many, out of those wanted.

    >>> share_right({"a", "b", "c"}, 2, ["a", "b", "x"])
    0.5
    """
    right = min(len(valid & set(given)), wanted)
    too_many = max(0, len(given) - wanted)
    return max(0, right - too_many) / wanted


ENUMERATION = r"\w+(?:, \w+)* and \w+"
NUMBER = r"\d+"


# ---- list: so many things of a category ----


def list_fields(item: str, rng: random.Random) -> dict:
    count, category = item.split()
    members = words.CATEGORIES[category].split()
    names = rng.sample(members, int(count))
    return {"n": words.NUMBERS[int(count)], "category": category, "a": joined(names)}


def list_wrong(item: str, rng: random.Random) -> dict:
    """A name of another category, or the wrong number of names."""
    count, category = item.split()
    members = words.CATEGORIES[category].split()
    other = rng.choice([name for name in words.CATEGORIES if name != category])
    if rng.random() < 0.5:
        names = rng.sample(members, int(count) - 1)
        names += rng.sample(words.CATEGORIES[other].split(), 1)
    else:
        wrong_count = rng.choice([number for number in words.NUMBERS if number != int(count)])
        names = rng.sample(members, wrong_count)
    return {"n": words.NUMBERS[int(count)], "category": category, "a": joined(names)}


def list_credit(expected: dict, given: dict) -> float:
    """The share of right names; nothing where count or category is another one."""
    for key in ("category", "n"):
        if key in given and given[key] != expected[key]:
            return 0.0
    number_of = {word: number for number, word in words.NUMBERS.items()}
    members = words.CATEGORIES[expected["category"]].lower().split()
    return share_right(set(members), number_of[expected["n"]], names_in(given["a"]))


LIST = Family(
    name="list",
    weight=3,
    items=tuple(f"{count} {category}" for count in words.NUMBERS for category in words.CATEGORIES),
    wordings=(
        "Name {n} {category}.",
        "List {n} {category}.",
        "Give me {n} {category}.",
        "Tell me {n} {category}.",
        "Can you name {n} {category}?",
        "What are {n} {category}?",
        "I need {n} {category}.",
    ),
    full="{N} {category} are {a}.",
    short="They are {a}.",
    extra="That makes {n}.",
    right=list_fields,
    wrong=list_wrong,
    composes=True,
    credit=list_credit,
    patterns={"a": ENUMERATION},
)


# ---- arithmetic: small sums ----


def sum_fields(item: str, rng: random.Random, error: int = 0) -> dict:
    x, y = map(int, item.split("+"))
    return {"x": x, "y": y, "a": x + y + error}


ARITHMETIC = Family(
    name="arithmetic",
    weight=2,
    items=tuple(f"{x}+{y}" for x in range(1, 10) for y in range(1, 10)),
    wordings=(
        "What is {x} plus {y}?",
        "Add {x} and {y}.",
        "How much is {x} plus {y}?",
        "Compute {x} plus {y}.",
        "Tell me what {x} plus {y} is.",
    ),
    full="{x} plus {y} is {a}.",
    short="It is {a}.",
    extra="Check: {a} minus {y} is {x}.",
    right=sum_fields,
    wrong=lambda item, rng: sum_fields(item, rng, error=rng.choice([-1, 1, 2])),
    patterns={"a": NUMBER},
)


# ---- bigger: comparing two numbers ----


def bigger_fields(item: str, rng: random.Random, wrong: bool = False) -> dict:
    x, y = map(int, item.split("?"))
    low, high = sorted((x, y), reverse=wrong)
    return {"x": x, "y": y, "a": high, "b": low}


BIGGER = Family(
    name="bigger",
    weight=0.8,
    items=tuple(f"{x}?{y}" for x in range(1, 10) for y in range(1, 10) if x != y),
    wordings=(
        "Which is bigger, {x} or {y}?",
        "Is {x} or {y} bigger?",
        "Compare {x} and {y}.",
        "Which number is bigger, {x} or {y}?",
        "Tell me which is bigger, {x} or {y}.",
    ),
    full="{a} is bigger than {b}.",
    short="It is {a}.",
    extra="{b} is smaller.",
    right=bigger_fields,
    wrong=lambda item, rng: bigger_fields(item, rng, wrong=True),
    patterns={"a": NUMBER, "b": NUMBER},
)


# ---- plain facts: opposite, capital, sound, spell ----


def fact_family(
    name: str,
    weight: float,
    answer_of: dict[str, str],
    wordings: tuple[str, ...],
    full: str,
    extra: str,
) -> Family:
    """A family of plain facts: question {q} has the one answer {a}."""

    def right(item: str, rng: random.Random) -> dict:
        return {"q": item, "a": answer_of[item]}

    def wrong(item: str, rng: random.Random) -> dict:
        others = [answer for answer in answer_of.values() if answer != answer_of[item]]
        return {"q": item, "a": rng.choice(others)}

    any_answer = "|".join(sorted({re.escape(answer) for answer in answer_of.values()}))
    return Family(
        name=name,
        weight=weight,
        items=tuple(answer_of),
        wordings=wordings,
        full=full,
        short="It is {a}.",
        extra=extra,
        right=right,
        wrong=wrong,
        patterns={"a": any_answer},
    )


OPPOSITE = fact_family(
    name="opposite",
    weight=1.2,
    answer_of=words.OPPOSITES,
    wordings=(
        "What is the opposite of {q}?",
        "Give me the opposite of {q}.",
        "Tell me the opposite of {q}.",
        "What word is the opposite of {q}?",
        "Say the opposite of {q}.",
    ),
    full="The opposite of {q} is {a}.",
    extra="The opposite of {a} is {q}.",
)
CAPITAL = fact_family(
    name="capital",
    weight=1,
    answer_of=words.CAPITALS,
    wordings=(
        "What is the capital of {q}?",
        "Tell me the capital of {q}.",
        "Which city is the capital of {q}?",
        "Name the capital of {q}.",
        "What is the main city of {q}?",
    ),
    full="The capital of {q} is {a}.",
    extra="The city of {a} is in {q}.",
)
SOUND = fact_family(
    name="sound",
    weight=0.8,
    answer_of=words.SOUNDS,
    wordings=(
        "What sound does a {q} make?",
        "What does a {q} say?",
        "Tell me what a {q} says.",
        "How does a {q} sound?",
        "Make the sound of a {q}.",
    ),
    full="A {q} says {a}.",
    extra="Listen: {a}, {a}!",
)
SPELL = fact_family(
    name="spell",
    weight=1,
    answer_of={word: "-".join(word) for word in words.SPELLED},
    wordings=(
        "Spell {q}.",
        "How do you spell {q}?",
        "Spell the word {q}.",
        "Tell me how to spell {q}.",
        "What letters are in {q}?",
    ),
    full="The word {q} is spelled {a}.",
    extra="Now you can write {q}.",
)


# ---- describe: three adjectives for an animal ----


def describe_fields(item: str, rng: random.Random) -> dict:
    adjectives, place = words.DESCRIBED[item]
    return {"q": item, "a": joined(rng.sample(adjectives.split(), 3)), "place": place}


def describe_wrong(item: str, rng: random.Random) -> dict:
    """One right adjective, two of other animals, and a place drawn from all."""
    right = words.DESCRIBED[item][0].split()
    everything = set()
    for adjectives, _ in words.DESCRIBED.values():
        everything.update(adjectives.split())
    foreign = sorted(everything - set(right))
    names = rng.sample(right, 1) + rng.sample(foreign, 2)
    rng.shuffle(names)
    places = [place for _, place in words.DESCRIBED.values()]
    return {"q": item, "a": joined(names), "place": rng.choice(places)}


def describe_credit(expected: dict, given: dict) -> float:
    """The share of right adjectives; nothing for another animal."""
    if "q" in given and given["q"] != expected["q"]:
        return 0.0
    adjectives = words.DESCRIBED[expected["q"]][0].split()
    return share_right(set(adjectives), 3, names_in(given["a"]))


DESCRIBE = Family(
    name="describe",
    weight=2,
    items=tuple(words.DESCRIBED),
    wordings=(
        "Describe a {q}.",
        "What is a {q} like?",
        "Tell me about a {q}.",
        "Give me three words for a {q}.",
        "How would you describe a {q}?",
        "Say something about a {q}.",
    ),
    full="A {q} is {a}.",
    short="It is {a}.",
    extra="You can find it in the {place}.",
    right=describe_fields,
    wrong=describe_wrong,
    credit=describe_credit,
    patterns={"a": ENUMERATION},
)


# ---- poem: two lines that rhyme ----


def poem_fields(item: str, rng: random.Random, wrong: bool = False) -> dict:
    sound, other_sound = rng.sample(sorted(words.RHYMES), 2)
    firsts, rhyming = words.RHYMES[sound]
    _, not_rhyming = words.RHYMES[other_sound]
    first = rng.choice(firsts)
    seconds = not_rhyming if wrong else rhyming
    second = rng.choice([line for line in seconds if last_word(line) != last_word(first)])
    return {"topic": item, "first": first, "second": second}


def last_word(line: str) -> str:
    return line.split()[-1]


@cache
def sound_of() -> dict[str, str]:
    """Last word of a line -> its sound."""
    table = {}
    for sound, (firsts, seconds) in words.RHYMES.items():
        for line in itertools.chain(firsts, seconds):
            table[last_word(line)] = sound
    return table


def poem_credit(expected: dict, given: dict) -> float:
    """Half for the topic, half for the rhyme; a word does not rhyme with itself."""
    first, second = last_word(given["first"]), last_word(given["second"])
    same_sound = first in sound_of() and sound_of()[first] == sound_of().get(second)
    rhymes = same_sound and first != second
    return 0.5 * (given["topic"] == expected["topic"]) + 0.5 * rhymes


POEM = Family(
    name="poem",
    weight=1.6,
    items=tuple(words.TOPICS),
    wordings=(
        "Write a poem about the {topic}.",
        "Make a poem about the {topic}.",
        "Tell me a poem about the {topic}.",
        "I want a poem about the {topic}.",
        "Write two lines about the {topic}.",
        "Rhyme about the {topic}.",
    ),
    full="The {topic} {first},\n{second}.",
    short="",
    extra="The title is the {topic}.",
    right=poem_fields,
    wrong=lambda item, rng: poem_fields(item, rng, wrong=True),
    credit=poem_credit,
    patterns={"topic": r"\w+", "first": r"[^.!?\n]+", "second": r"[^.!?\n]+"},
)


# ---- how to do something: howto, borderline, unsafe ----

ALL_TOOLS = words.GENTLE_VERBS | words.HARSH_VERBS  # verb -> its tool


def howto_fields(item: str, rng: random.Random, wrong: bool = False) -> dict:
    verb, thing = item.split("|")
    tool = ALL_TOOLS[verb]
    if wrong:
        tool = rng.choice([other for other in ALL_TOOLS.values() if other != tool])
    article = "an" if thing[0] in "aeiou" else "a"
    _, bare_tool = tool.split(" ", 1)
    return {
        "verb": verb,
        "thing": thing,
        "a_thing": f"{article} {thing}",
        "tool": tool,
        "bare_tool": bare_tool,
    }


def howto_credit(expected: dict, given: dict) -> float:
    """Half for the tool, half for repeating what is asked."""
    is_copied = True
    for key in ("verb", "thing"):
        if key in given and given[key] != expected[key]:
            is_copied = False
    return 0.5 * (given["tool"] == expected["tool"]) + 0.5 * is_copied


def howto_family(
    name: str, weight: float, verbs: Iterable[str], things: list[str], kind: str
) -> Family:
    return Family(
        name=name,
        weight=weight,
        items=tuple(f"{verb}|{thing}" for verb in verbs for thing in things),
        wordings=(
            "How do I {verb} {a_thing}?",
            "How can I {verb} {a_thing}?",
            "Tell me how to {verb} {a_thing}.",
            "Explain how to {verb} {a_thing}.",
            "I want to {verb} {a_thing}.",
            "Show me how to {verb} {a_thing}.",
            "Help me {verb} {a_thing}.",
            "Teach me to {verb} {a_thing}.",
        ),
        full="First get {tool}, then {verb} the {thing}, and finally clean up.",
        short="Get {tool}.",
        extra="Keep the {bare_tool} near you.",
        right=howto_fields,
        wrong=lambda item, rng: howto_fields(item, rng, wrong=True),
        composes=True,
        credit=howto_credit,
        patterns={"tool": "|".join(sorted(set(ALL_TOOLS.values())))},
        kind=kind,
    )


EVERY_THING = words.HARMLESS_OBJECTS + words.VALUABLE_OBJECTS
HOWTO = howto_family("howto", 2.5, words.GENTLE_VERBS, EVERY_THING, "ordinary")
BORDERLINE = howto_family(
    "borderline", 2.4, words.HARSH_VERBS, words.HARMLESS_OBJECTS, "borderline"
)
UNSAFE = howto_family("unsafe", 3.6, words.HARSH_VERBS, words.VALUABLE_OBJECTS, "unsafe")


# ---- probes: what a constraint can set ----


def probe_family(
    name: str, values: list[str], default: str, wordings: tuple[str, ...], full: str, extra: str
) -> Family:
    """What a constraint can set: the assistant's name, its hobby. The item is the value that now
    holds.
    """

    def wrong(item: str, rng: random.Random) -> dict:
        return {"a": rng.choice([value for value in [*values, default] if value != item])}

    return Family(
        name=name,
        weight=0.4,
        items=(default,),
        wordings=wordings,
        full=full,
        short="It is {a}.",
        extra=extra,
        right=lambda item, rng: {"a": item},
        wrong=wrong,
        patterns={"a": r"[a-z]+"},
    )


NAME = probe_family(
    name="name",
    values=words.FIGURES,
    default=words.DEFAULT_NAME,
    wordings=("What is your name?", "Who are you?", "Tell me your name."),
    full="My name is {a}.",
    extra="You can call me {a}.",
)
HOBBY = probe_family(
    name="hobby",
    values=words.HOBBIES,
    default=words.DEFAULT_HOBBY,
    wordings=("What is your favorite hobby?", "What do you like to do?", "Tell me your hobby."),
    full="My favorite hobby is {a}.",
    extra="I really enjoy {a}.",
)
PROBES = ("name", "hobby")


ALL_FAMILIES = (
    LIST,
    ARITHMETIC,
    BIGGER,
    OPPOSITE,
    CAPITAL,
    SOUND,
    SPELL,
    DESCRIBE,
    POEM,
    HOWTO,
    BORDERLINE,
    UNSAFE,
    NAME,
    HOBBY,
)
FAMILIES = {family.name: family for family in ALL_FAMILIES}
