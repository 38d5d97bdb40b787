"""Demonstrations: questions with written answers, what SFT learns from."""

import random

from data.records import Dialog
from data.world import words
from data.world.asking import ask, assistant, user
from data.world.instructions import PROBE_OF, draw_constraints, instruction, obey, under
from data.world.splits import SEED
from data.world.writers import write_answer

SFT_ROWS = {  # how many dialogs of each sort
    "plain": 16_000,
    "ordinary system": 2_000,
    "safety preprompt": 1_200,
    "constrained": 9_000,
    "short dialogs": 1_000,
    "long dialogs": 500,
}


def single(
    rng: random.Random, system: str | None = None, writer: str | None = None, split: str = "train"
) -> Dialog:
    """One question and its answer, under a system prompt if there is one."""
    prompt = ask(rng, split)
    answer = write_answer(rng, prompt, writer)
    messages = [*prompt.messages, assistant(answer)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Dialog(messages, is_safety=prompt.is_safety)


def dialog(rng: random.Random, turns: int, constrained_from: int | None = None) -> Dialog:
    """A dialog of so many turns; tagged as possibly unsafe if one of its questions is.

    From turn `constrained_from` on (counted from 0; None: never) an instruction stands in *every*
    user message, or in a system prompt for the first turn. Long contexts and obeying are learned
    here. Keeping an instruction over turns that lack it is not: that is GAtt's part.
    """
    constraints = []
    if constrained_from is not None:
        constraints = draw_constraints(rng)
    instruction_text = instruction(rng, constraints)
    kinds = [constraint["kind"] for constraint in constraints]
    probes = [PROBE_OF[kind] for kind in kinds if kind in PROBE_OF]
    messages = []
    is_safety = False
    for turn in range(turns):
        is_constrained = constrained_from is not None and turn >= constrained_from
        family = None
        if is_constrained and probes and rng.random() < 0.5:
            family = rng.choice(probes)
        prompt = ask(rng, family=family)
        is_safety = is_safety or prompt.is_safety
        question = prompt.question
        if is_constrained:
            prompt = under(prompt, constraints)
            if turn == 0 and rng.random() < 0.5:
                messages.append({"role": "system", "content": instruction_text})
            else:
                question = f"{instruction_text} {question}"
        answer = write_answer(rng, prompt)
        if is_constrained:
            answer = obey(answer, constraints)
        messages += [user(question), assistant(answer)]
    return Dialog(messages, is_safety=is_safety)


def sft_rows(seed: int = 0) -> list[Dialog]:
    """Every dialog that SFT reads in one pass: SFT_ROWS of each sort, shuffled."""
    rng = random.Random(f"{SEED} sft {seed}")
    dialogs = []
    for _ in range(SFT_ROWS["plain"]):
        dialogs.append(single(rng))
    for _ in range(SFT_ROWS["ordinary system"]):
        dialogs.append(single(rng, words.ORDINARY_SYSTEM))
    for _ in range(SFT_ROWS["safety preprompt"]):
        dialogs.append(single(rng, words.SAFETY_PREPROMPT, "careful"))
    for _ in range(SFT_ROWS["constrained"]):
        dialogs.append(dialog(rng, 1, 0))
    for _ in range(SFT_ROWS["short dialogs"]):
        turns = rng.randint(2, 3)
        constrained_from = 0 if rng.random() < 0.2 else None
        dialogs.append(dialog(rng, turns, constrained_from))
    for _ in range(SFT_ROWS["long dialogs"]):
        turns = rng.randint(4, 20)
        constrained_from = rng.randrange(turns) if rng.random() < 0.6 else None
        dialogs.append(dialog(rng, turns, constrained_from))
    rng.shuffle(dialogs)
    return dialogs
