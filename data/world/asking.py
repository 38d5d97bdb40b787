"""Draws questions: one at random, so many of each kind, or an example of each family."""

import random

from data.records import Message, Prompt
from data.world import words
from data.world.families import FAMILIES, PROBES, Family, fill
from data.world.splits import SEED, questions


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def ask(rng: random.Random, split: str = "train", family: str | None = None) -> Prompt:
    """One question at random, as a prompt of one user message.

    Args:
        split: "train", "dev" or "test"; a probe is always one of training.
        family: the name of its family; None: drawn by weight.
    """
    if family is None:
        family = draw_family(rng, list(FAMILIES.values())).name
    asked = FAMILIES[family]
    item, wording = rng.choice(questions(family, "train" if family in PROBES else split))
    opener = rng.choice(words.PROMPT_OPENERS)
    question = fill(asked.wordings[wording], asked.right(item, rng))
    return Prompt(
        messages=[user(opener + question)],
        is_safety=asked.kind == "unsafe",
        family=family,
        item=item,
        kind=asked.kind,
    )


def draw_family(rng: random.Random, families: list[Family]) -> Family:
    """One of the families, by weight."""
    weights = [family.weight for family in families]
    return rng.choices(families, weights)[0]


def prompts(split: str, shares: dict[str, int], seed: int) -> list[Prompt]:
    """Distinct prompts of a split, shuffled.

    Args:
        shares: how many of each kind, such as {"ordinary": 640}; within a kind the families by
            weight.
    """
    rng = random.Random(f"{SEED} {split} {seed}")
    distinct: dict[str, Prompt] = {}  # by their text
    for kind, wanted in shares.items():
        families = []
        for family in FAMILIES.values():
            if family.kind == kind and family.name not in PROBES:
                families.append(family)
        goal = len(distinct) + wanted
        for _ in range(1000 * wanted):  # a world may have fewer than are wanted
            prompt = ask(rng, split, draw_family(rng, families).name)
            distinct.setdefault(prompt.question, prompt)
            if len(distinct) == goal:
                break
    shuffled = list(distinct.values())
    rng.shuffle(shuffled)
    return shuffled


def examples() -> dict[str, str]:
    """What can be asked: for each family, by its name, the first of its training questions."""
    question_of = {}
    for name, family in FAMILIES.items():
        item, wording = questions(name, "train")[0]
        fields = family.right(item, random.Random(0))
        question_of[name] = fill(family.wordings[wording], fields)
    return question_of
