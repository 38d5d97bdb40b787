"""One dialog going through Ghost Attention's four steps (§3.3).

python -m play ghost                       the toy world's, answered by OUT/rlhf-v3
python -m play ghost --init MODEL --data DIALOGS.jsonl --constraints CONSTRAINTS.jsonl
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gatt
from data import Tokenizer, encode_dialog, printable, world
from model import Transformer
from play.shared import find_model
from runtime import (
    check_between,
    choose_device,
    load_model,
    parse_settings,
    require,
    sample_answers,
    set_threads,
)


@dataclass
class Settings:
    out: Path = Path("out")  # reads OUT/rlhf-v3
    # the model that answers: a name in OUT, or the path of a folder; empty: rlhf-v3
    init: str = ""
    data: str = "toy"  # JSONL of dialogs {"messages"}, or toy
    constraints: str = "toy"  # JSONL of {"kind", "value", "long", "short"}, or toy
    context: Literal["question", "dialog"] = "question"  # what a last answer is sampled from
    seed: int = 0  # another seed, another dialog
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides

    def __post_init__(self) -> None:
        check_between(self, 0, 2**32 - 1, "seed")


def show_steps(
    model: Transformer,
    tokenizer: Tokenizer,
    dialogs: list[gatt.GhostDialog],
    settings: gatt.Settings,
) -> None:
    """Print one dialog going through the four steps; what is trained on is marked."""
    of_some_turns = [dialog for dialog in dialogs if 3 <= len(dialog.messages) <= 7]
    dialog = of_some_turns[0] if of_some_turns else dialogs[0]
    title = f"1. a dialog, and an instruction that must hold throughout: {dialog.instruction!r}"
    _print_dialog(title, dialog.messages)

    [answer] = sample_answers(
        model,
        tokenizer,
        [gatt.sampling_prompt(dialog, settings.context)],
        key=(0, "gatt", "show"),
        temperature=0.0,
        max_new_tokens=settings.max_new_tokens,
    )
    instructed = gatt.instruct(dialog.messages, gatt.in_full(dialog))
    instructed.append({"role": "assistant", "content": answer.text})
    title = "2. the instruction in every user message; the newest model answers the last one"
    if settings.context == "question":
        title += ", seeing no other"
    _print_dialog(title, instructed)

    answer = replace(answer, tokenizer=tokenizer.fingerprint)
    [ghost] = gatt.ghost_dialogs([dialog], {0: answer})
    title = "3. for training the instruction stays in the first message only"
    _print_dialog(title, ghost.messages)

    encoded = encode_dialog(tokenizer, ghost.messages, "all", ghost.answer_ids)
    ghost_mask = gatt.ghost_loss_mask(encoded.turns, encoded.loss_mask)
    print(f"\n4. the loss mask: {_marked('trained on', True)}, {_marked('not trained on', False)}")
    _print_mask(tokenizer, encoded.ids, ghost_mask)


def _print_dialog(title: str, messages: list[dict]) -> None:
    print(f"\n{title}")
    for message in messages:
        print(printable(f"  {message['role']:>9}: {message['content']}"))


def _print_mask(tokenizer: Tokenizer, ids: list[int], loss_mask: list[bool]) -> None:
    """The tokens; runs of equal mask are marked as one."""
    control = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    run = ""
    is_trained_on = loss_mask[0]
    for token, trained in zip(ids, loss_mask, strict=True):
        if trained != is_trained_on:
            print(_marked(run, is_trained_on), end="")
            run, is_trained_on = "", trained
        run += control.get(token) or printable(tokenizer.decode([token]))
    print(_marked(run, is_trained_on))


def _marked(text: str, is_trained_on: bool) -> str:
    """Green is trained on, grey is not. In a pipe what is trained on stands in double brackets."""
    if sys.stdout.isatty():
        colour = 32 if is_trained_on else 90
        return f"\033[{colour}m{text}\033[0m"
    return f"[[{text}]]" if is_trained_on else text


def main(argv: list[str] | None = None) -> None:
    s = parse_settings(Settings, __doc__, argv=argv)
    set_threads(s.threads)
    device = choose_device(s.device)
    settings = gatt.Settings(
        out=s.out,
        data=s.data,
        constraints=s.constraints,
        context=s.context,
        seed=s.seed,
        check="toy" if s.data == "toy" else "none",
    )
    if s.init:
        folder = find_model(s.out, s.init)
    else:
        folder = require(s.out / "rlhf-v3", "python rejection_sampling.py --rounds 1-3")
    world.ensure()
    model, tokenizer = load_model(folder, device)
    if s.data == "toy":
        prompts = [world.ask(random.Random(i)) for i in range(40)]
        ordinary = gatt.sample_ordinary(model, tokenizer, prompts, settings)
        dialogs = gatt.toy_dialogs(settings, ordinary)
    else:
        dialogs = gatt.read_dialogs(settings)
    dialogs = gatt.leave_out_long(tokenizer, dialogs, settings, model.args.max_seq_len)
    show_steps(model, tokenizer, dialogs, settings)
