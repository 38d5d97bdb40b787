"""Annotators: who prefers which of two answers. One interface for the toy world's rules and for a person.

An annotator is a function `annotate(comparisons, axis, seed) -> list[dict]`. A comparison is {"prompt": messages, ...,
"answers": (a, b)}; an annotation is {"chosen": 0 or 1, "rating": one of RATINGS, "safe": (bool, bool) or None}.
The axis is "helpfulness" or "safety" (paper §3.2.1: separate collections with their own guidelines).
"""

import random

from data import toy
from data.errors import InputError
from data.jsonl import RATINGS


def annotate_toy(comparisons: list[dict], axis: str, seed: int) -> list[dict]:
    """The toy world's annotator: `python -m data.toy --rules`. Deterministic in (seed, axis, position)."""
    check_annotator("toy", comparisons)
    rule, found = {"helpfulness": toy.helpfulness, "safety": toy.safety}[axis], []
    for i, comparison in enumerate(comparisons):
        a, b = (rule(comparison, answer) for answer in comparison["answers"])
        first, rating = toy.compare(random.Random(f"{seed} {axis} {i}"), a, b)
        found.append({"chosen": 0 if first else 1, "rating": rating,
                      "safe": tuple(toy.is_safe(comparison, answer) for answer in comparison["answers"])})
    return found


def annotate_human(comparisons: list[dict], axis: str, seed: int) -> list[dict]:
    """Ask in the terminal, the two answers in random order, with the paper's four grades."""
    found = []
    for i, comparison in enumerate(comparisons):
        swap = random.Random(f"{seed} {axis} {i}").random() < 0.5
        print(f"\n[{i + 1}/{len(comparisons)}] Which answer is better in {axis}?")
        for message in comparison["prompt"]:
            print(f"  {message['role']}: {message['content']}")
        for letter, answer in zip("AB", comparison["answers"][:: -1 if swap else 1], strict=True):
            print(f"  {letter}: {answer}")
        better = choice("better (a/b)", "ab") == "a"
        rating = RATINGS[int(choice("significantly 1, better 2, slightly 3, negligibly or unsure 4", "1234")) - 1]
        safe = [choice(f"is {letter} safe (y/n)", "yn") == "y" for letter in "AB"] if axis == "safety" else None
        found.append({"chosen": int(better == swap), "rating": rating,
                      "safe": tuple(safe[:: -1 if swap else 1]) if safe else None})
    return found


def choice(question: str, letters: str) -> str:
    """Ask until the answer is one of the letters."""
    while (reply := input(f"  {question}? ").strip().lower()) not in tuple(letters):
        print(f"  one of {', '.join(letters)}, please")
    return reply


def check_annotator(name: str, prompts: list[dict]) -> None:
    """InputError, before anything is sampled, if the toy annotator is asked about prompts that are not of its world."""
    if name == "toy" and any(prompt.get("family") not in toy.FAMILIES for prompt in prompts):
        raise InputError("the toy annotator knows the toy world's prompts only; use --annotator human")


ANNOTATORS = {"toy": annotate_toy, "human": annotate_human}
