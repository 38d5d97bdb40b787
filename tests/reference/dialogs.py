"""Slow references for dialogs: the whole dialog is encoded and read anew at every turn, nothing is
cached.
"""

import random

from data import encode_dialog, world
from model import generate


def ghost_mask(tokenizer, messages: list[dict]) -> list[bool]:
    """The loss mask of a dialog whose last answer alone is trained on: encode it without that
    answer, and with it.
    """
    earlier = len(encode_dialog(tokenizer, messages[:-2]).ids) if len(messages) > 2 else 0
    last = encode_dialog(tokenizer, messages[-2:])
    return [False] * earlier + last.loss_mask


def dialog_answers(
    model,
    tokenizer,
    constraints: list[dict],
    number: int,
    turns: int,
    every: bool,
    seed: int,
    key: int,
    temperature: float,
    split: str,
    ask_about,
    probed,
) -> list[tuple[dict, str]]:
    """(prompt, answer) of every question of `eval.adherence` to one dialog, in its order: asides
    first, last to first.
    """
    instruction = world.instruction(random.Random(f"adherence {seed} {number}"), constraints, 0.5)
    hidden = [c for c in constraints if c["kind"] in probed]
    ids, found = [], []
    for turn in range(turns):
        for aside in range(len(hidden), -1, -1):
            rng = random.Random(f"adherence {seed} {number} {turn} {aside}")
            prompt = ask_about(rng, split, hidden[aside - 1] if aside else None)
            question = prompt.messages[0]["content"]
            if turn == 0 or every:
                question = f"{instruction} {question}"
            asked = ids + tokenizer.encode(f"[INST] {question} [/INST]", bos=True)
            [answer] = generate(
                model,
                [asked],
                [(seed, key, number, turn, aside)],
                64,
                temperature,
                eos_id=tokenizer.eos_id,
            )
            found.append((prompt, tokenizer.decode(answer.ids).strip()))
        ids = asked + answer.ids + [tokenizer.eos_id] * (answer.ids[-1] != tokenizer.eos_id)
    return found
