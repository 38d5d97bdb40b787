"""Instructions that every later answer should obey (Ghost Attention, §3.3).

A constraint is {"kind", "value", "long", "short"}: the last two are the instruction in both forms.
Kinds: "first word", "last word" and "style" put a marker at the start or the end of every answer;
"figure" and "hobby" set what the assistant says of itself when it is asked.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from data.records import Prompt
from data.world import words
from data.world.splits import point_of

PROBE_OF = {"figure": "name", "hobby": "hobby"}  # kind -> the family that asks for it
HELD_OUT_WORDS = 0.22  # share of the made-up words that training never sees
SLACK = 16  # characters that may stand before a marker at the start, or after one at the end


@cache
def made_up_words(split: str) -> tuple[str, ...]:
    """Words of two syllables that mean nothing, each exactly two tokens.

    Those of "test" (22 %) never occur in training.
    """
    in_split = []
    for first in words.FIRST_SYLLABLES:
        for second in words.SECOND_SYLLABLES:
            word = first + second
            if word in words.REAL_WORDS:
                continue
            is_held_out = point_of(word) < HELD_OUT_WORDS
            if is_held_out == (split == "test"):
                in_split.append(word)
    return tuple(in_split)


def constraint(kind: str, value: str) -> dict:
    """The constraint of this kind and value, with its instruction in both forms.

    >>> constraint("first word", "Bado")["long"]
    'Begin every answer with the word Bado.'
    """
    forms = {
        "first word": ("Begin every answer with the word {}.", "First word: {}."),
        "last word": ("End every answer with the word {}.", "Last word: {}."),
        "style": words.STYLES.get(value, ("", ""))[:2],
        "figure": ("Always act as {}.", "Figure: {}."),
        "hobby": ("You really enjoy {}.", "Hobby: {}."),
    }
    long, short = forms[kind]
    return {"kind": kind, "value": value, "long": long.format(value), "short": short.format(value)}


@cache
def constraints(split: str) -> tuple[dict, ...]:
    """All constraints of a split: "train", or "test" (words and names never seen in training)."""
    made_up = made_up_words(split)
    values_of = {"first word": made_up, "last word": made_up, "figure": made_up}
    if split == "train":
        values_of["figure"] = (*words.FIGURES, *made_up)
        values_of["style"] = tuple(words.STYLES)
        values_of["hobby"] = tuple(words.HOBBIES)
    in_split = []
    for kind, values in values_of.items():
        in_split += [constraint(kind, value) for value in values]
    return tuple(in_split)


def draw_constraint(rng: random.Random) -> dict:
    """One training constraint; the kind first, then its value.

    Two in three hold a made-up word: with fewer, a small model does not learn to copy words that it
    has never seen.
    """
    kinds = ["first word", "last word", "figure", "style", "hobby"]
    kind = rng.choices(kinds, [2, 2, 2, 1, 1])[0]
    figure_is_famous = rng.random() < 0.25  # drawn whatever the kind is
    values: Sequence[str] = made_up_words("train")
    if kind == "style":
        values = list(words.STYLES)
    elif kind == "hobby":
        values = words.HOBBIES
    elif kind == "figure" and figure_is_famous:
        values = words.FIGURES
    return constraint(kind, rng.choice(values))


def draw_constraints(rng: random.Random) -> list[dict]:
    """One training constraint, or (up to two times in five) two of different kinds."""
    drawn = [draw_constraint(rng)]
    while len(drawn) < 2 and rng.random() < 0.4:
        second = draw_constraint(rng)
        if second["kind"] != drawn[0]["kind"]:
            drawn.append(second)
    return drawn


def instruction(rng: random.Random, constraints: Sequence[dict], short: float = 0.3) -> str:
    """The constraints as one instruction, each in its short form with the chance `short`."""
    sentences = []
    for constraint in constraints:
        form = "short" if rng.random() < short else "long"
        sentences.append(constraint[form])
    return " ".join(sentences)


def markers(constraints: Sequence[dict]) -> tuple[str, str]:
    """What an answer under the constraints begins and ends with; "" for nothing.

    A first word comes before a style's marker, a last word after it. Figures and hobbies have none:
    they show only when they are asked for.
    """
    start, end = [], []
    for constraint in sorted(constraints, key=lambda constraint: constraint["kind"]):
        kind, value = constraint["kind"], constraint["value"]
        if kind == "first word":
            start.append(f"{value}!")
        elif kind == "last word":
            end.append(f"{value}.")
        elif kind == "style":
            _, _, at_start, at_end = words.STYLES[value]
            start.append(at_start)
            end.insert(0, at_end)
    return joined_by_space(start), joined_by_space(end)


def obey(answer: str, constraints: Sequence[dict]) -> str:
    """The answer with the constraints' markers around it."""
    start, end = markers(constraints)
    return joined_by_space([start, answer, end])


def joined_by_space(texts: list[str]) -> str:
    """The texts with a space between them; empty ones are left out."""
    return " ".join(filter(None, texts))


def under(prompt: Prompt, constraints: Sequence[dict]) -> Prompt:
    """The same prompt while the constraints hold.

    A question for the name or the hobby then has another right answer.
    """
    item = prompt.item
    for constraint in constraints:
        if PROBE_OF.get(constraint["kind"]) == prompt.family:
            item = constraint["value"]
    return replace(prompt, item=item, constraints=tuple(constraints))


def obeys(prompt: Prompt, answer: str, constraint: dict) -> bool:
    """Whether the answer to the prompt keeps the constraint.

    A figure or hobby is kept where its word stands in the answer: judge it only where the prompt
    asks for it. A marker may stand up to 16 characters away from its end of the answer.
    """
    if constraint["kind"] in PROBE_OF:
        word = re.escape(constraint["value"])
        return re.search(rf"\b{word}\b", answer) is not None
    start, end = markers([constraint])
    if start:
        return start in answer[: len(start) + SLACK]
    return end in answer[-len(end) - SLACK :]
