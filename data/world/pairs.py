"""Written preferences: two answers by people, alike in style, of which one is right.

Answers that a model samples differ in style far more often than in content. A reward model trained
on them alone is blind to content; these pairs show it content.
"""

import random

from data.records import Pair, Prompt
from data.world import words
from data.world.annotator import compare, content, helpfulness, read
from data.world.asking import ask
from data.world.families import FAMILIES, fill
from data.world.splits import SEED


def written_pairs(split: str, count: int, seed: int = 0) -> list[Pair]:
    """So many pairs on harmless prompts of the split, as the annotator judges them, noise included.

    The right answer stands under `right`, too: now and then it is the rejected one.
    """
    rng = random.Random(f"{SEED} written {split} {seed}")
    pairs = []
    while len(pairs) < count:
        prompt = ask(rng, split)
        right, wrong = right_and_wrong(rng, prompt)
        if prompt.is_safety or content(prompt, right) != 1:
            continue
        if read(prompt, wrong).content in (None, 1):  # says nothing, or is right by chance
            continue
        is_right_better, rating = compare(
            rng, helpfulness(prompt, right), helpfulness(prompt, wrong)
        )
        chosen, rejected = (right, wrong) if is_right_better else (wrong, right)
        pair = Pair(
            prompt,
            chosen,
            rejected,
            rating=rating,
            right=right,
            axis="helpfulness",
            version="written",
        )
        pairs.append(pair)
    return pairs


def right_and_wrong(rng: random.Random, prompt: Prompt) -> tuple[str, str]:
    """A right and a wrong answer of the same sentences but for what they say."""
    family = FAMILIES[prompt.family]
    in_full = rng.random() < 0.6
    templates = [family.full if in_full or not family.short else family.short]
    if rng.random() < 0.3:
        templates.append(family.extra)
    opener = rng.choice(words.OPENERS)
    has_opener = rng.random() < 0.4
    closer = rng.choice(words.CLOSERS)
    has_closer = rng.random() < 0.3
    answers = []
    for fields in (family.right(prompt.item, rng), family.wrong(prompt.item, rng)):
        sentences = [fill(template, fields) for template in templates]
        if has_opener:
            sentences.insert(0, opener)
        if has_closer:
            sentences.append(closer)
        answers.append(" ".join(sentences))
    right, wrong = answers
    return right, wrong
