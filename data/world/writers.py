"""The people who write demonstrations: writers of mixed quality."""

import random

from data.records import Prompt
from data.world import words
from data.world.families import FAMILIES, Family, fill

WRITERS = ("good", "sloppy", "bad", "careful")  # "careful" obeys the safety preprompt

# fmt: off
# a writer in each column: its share of the demonstrations, then the chance of each thing
HABITS = {
    #               good  sloppy   bad  careful
    "share":       (0.45,  0.40,  0.15,  0.0),
    "wrong":       (0.00,  0.08,  0.35,  0.0),   # answers wrongly
    "full":        (0.90,  0.50,  0.30,  1.0),   # in a full sentence
    "opener":      (0.50,  0.20,  0.05,  0.5),
    "extra":       (0.35,  0.12,  0.05,  0.35),  # a second sentence that can be checked
    "closer":      (0.35,  0.10,  0.03,  0.35),
    "rude":        (0.00,  0.03,  0.30,  0.0),
    "repeat":      (0.00,  0.05,  0.20,  0.0),   # says one sentence twice
    "refuse":      (0.85,  0.55,  0.30,  1.0),   # an unsafe prompt
    "evade":       (0.05,  0.15,  0.15,  0.0),   # an unsafe prompt
    "over_refuse": (0.02,  0.10,  0.20,  0.0),   # a borderline prompt; an ordinary one: an eighth
    "apology":     (0.70,  0.40,  0.10,  1.0),   # of a refusal, as are the next two
    "reason":      (0.40,  0.15,  0.05,  1.0),
    "alternative": (0.30,  0.10,  0.03,  0.6),   # offers something harmless with the same thing
}
# fmt: on


def habits_of(writer: str) -> dict[str, float]:
    """The column of HABITS."""
    column = WRITERS.index(writer)
    return {habit: chances[column] for habit, chances in HABITS.items()}


def write_answer(rng: random.Random, prompt: Prompt, writer: str | None = None) -> str:
    """What a writer answers to the prompt; None: a writer drawn by share."""
    if writer is None:
        writer = rng.choices(WRITERS, HABITS["share"])[0]
    habits = habits_of(writer)
    family = FAMILIES[prompt.family]
    right = family.right(prompt.item, rng)
    refuse = {
        "unsafe": habits["refuse"],
        "borderline": habits["over_refuse"],
        "ordinary": habits["over_refuse"] / 8,
    }
    mood = rng.random()
    if mood < refuse[family.kind]:
        sentences = write_refusal(rng, habits, right)
    elif family.kind == "unsafe" and mood < habits["refuse"] + habits["evade"]:
        sentences = [rng.choice(words.EVASIONS)]
    else:
        sentences = write_content(rng, habits, family, prompt.item, right)
    if rng.random() < habits["rude"]:
        position = rng.choice([0, len(sentences)])
        sentences.insert(position, rng.choice(words.RUDE))
    if rng.random() < habits["repeat"]:
        sentences.append(rng.choice(sentences))
    return " ".join(sentences)


def write_refusal(rng: random.Random, habits: dict[str, float], right: dict) -> list[str]:
    """The sentences of a refusal. right: the fields of the right answer, which name the thing."""
    sentences = []
    apology = rng.choice(words.APOLOGIES)
    if rng.random() < habits["apology"]:
        sentences.append(apology)
    sentences.append(rng.choice(words.REFUSALS))
    reason = rng.choice(words.REASONS)
    if rng.random() < habits["reason"]:
        sentences.append(reason)
    if rng.random() < habits["alternative"] and "thing" in right:
        verb = rng.choice(list(words.GENTLE_VERBS))
        sentences.append(words.OFFER.format(verb=verb, thing=right["thing"]))
    return sentences


def write_content(
    rng: random.Random, habits: dict[str, float], family: Family, item: str, right: dict
) -> list[str]:
    """The sentences of an answer to the question, right or wrong."""
    fields = right
    if rng.random() < habits["wrong"]:
        fields = family.wrong(item, rng)
    sentences = []
    opener = rng.choice(words.OPENERS)
    if rng.random() < habits["opener"]:
        sentences.append(opener)
    in_full = rng.random() < habits["full"]
    template = family.full if in_full or not family.short else family.short
    sentences.append(fill(template, fields))
    if rng.random() < habits["extra"]:
        sentences.append(fill(family.extra, fields))
    closer = rng.choice(words.CLOSERS)
    if rng.random() < habits["closer"]:
        sentences.append(closer)
    return sentences
