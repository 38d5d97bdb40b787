"""Data files: dialogs, prompts, preferences, answers, annotations and constraints, read and made
into ids as the stages do.
"""

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import gatt
import reward
import sft
from data import (
    Dialog,
    InputError,
    Pair,
    Prompt,
    Tokenizer,
    annotators,
    encode_dialog,
    preferences,
    read_preferences,
    read_prompts,
    read_sft,
    world,
    write_jsonl,
    write_records,
)
from data.annotators import Comparison
from data.chat import encode_turn
from runtime import encode_prompts, run
from tests.fuzz.judge import Case, Wrong
from tests.fuzz.mutations import mutate_bytes, mutate_jsonl
from tests.helpers import assistant, system, user

TOKENIZER = Tokenizer(world.TOKENIZER)
CONTEXT = 2048
GREETING = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: And a bird?\n\nAssistant:"
ENDLESS = gzip.compress(bytes(2**26), 1) * 64  # 4 GB without a line's end, in 4 MB


# ---- valid files ----


def ids_of(question: str, answer: str) -> list[int]:
    return encode_turn(TOKENIZER, question, answer)[1]


def dialog_rows() -> list[Dialog]:
    dialogs = [world.single(Random(i)) for i in range(3)]
    several = [user("Hi"), assistant("Hello!"), user("A bird?"), assistant("A robin.")]
    dialogs.append(Dialog([system("Be brief."), *several], "last", True))
    sampled = {"answer_ids": ids_of("Hi", "Hello!"), "tokenizer": TOKENIZER.fingerprint}
    dialogs.append(Dialog(several[:2], "last", about={"version": "sft", "reward": 0.5}, **sampled))
    return dialogs


def prompt_rows() -> list[Prompt]:
    prompts = world.prompts("train", {"ordinary": 2, "borderline": 1, "unsafe": 1}, 0)
    constrained = replace(prompts[0], constraints=gatt.toy_constraints()[:2])
    return [*prompts, constrained, Prompt([user("Hi"), assistant("Hello!"), user("And?")], True)]


def pair_rows() -> list[Pair]:
    first, second, third = prompt_rows()[:3]
    labels = {"chosen_is_safe": True, "rejected_is_safe": False, "axis": "safety"}
    sampled = {
        "chosen_ids": ids_of(third.question, "Hello!"),
        "rejected_ids": ids_of(third.question, "What?"),
        "tokenizer": TOKENIZER.fingerprint,
        "temperatures": (0.8, 1.1),
        "version": "sft",
        "right": "Hello!",
    }
    return [
        Pair(first, "Hello!", "What?"),
        Pair(second, "Hello!", "What?", "better", extra=True, **labels),
        Pair(third, "Hello!", "What?", "negligibly_better", **sampled),
    ]


def hh_rows() -> list[dict]:
    answers = [" A robin.", " A wren.", " I do not know."]
    return [{"chosen": GREETING + answer, "rejected": GREETING + " No."} for answer in answers]


def answer_rows() -> list[dict]:
    prompt = [user("Hi")]
    return [
        {"messages": [*prompt, assistant("Hello!")]},
        {"prompt": prompt, "answer": "Hello!", "is_safety": True},
        {"prompt": prompt, "chosen": "Hello!", "rejected": "What?"},
    ]


def constraint_rows() -> list[dict]:
    rows = []
    for kind in ("language", "style", "persona"):
        rows.append({"kind": kind, "value": "x", "long": f"Always {kind} x.", "short": kind})
    return rows


def comparisons() -> list[Comparison]:
    return [Comparison(prompt, ("Hello!", "What?")) for prompt in prompt_rows()]


def annotation_rows() -> list[dict]:
    filled = {"better": "a", "rating": "better", "a_is_safe": True, "b_is_safe": False}
    return [line | filled for line in annotators.blank_lines(comparisons(), "safety", 0)]


# ---- reading ----


def read_dialogs(path: Path) -> None:
    dialogs = read_sft(path)
    encoded = sft.encode_dialogs(TOKENIZER, dialogs, CONTEXT)
    for dialog, one in zip(dialogs, encoded, strict=True):
        check_control_tokens(one.ids, dialog.messages)
    keep(path, dialogs)


def read_and_encode_prompts(path: Path) -> None:
    prompts = read_prompts(path)
    encode_prompts(TOKENIZER, prompts, CONTEXT)
    for axis in ("helpfulness", "safety"):
        asked = [Comparison(prompt, ("Hello!", "What?")) for prompt in prompts if prompt.family]
        annotators.annotate_toy(asked, axis, 0)
    keep(path, prompts)


def encode_pairs(path: Path, pairs: list[Pair]) -> None:
    encoded = reward.encode_pairs(TOKENIZER, pairs, CONTEXT)
    for pair, both in zip(pairs, encoded, strict=True):
        for ids in both:
            check_control_tokens(ids, pair.prompt.messages)
    preferences.hold_out_by_prompt(pairs, 0)
    keep(path, pairs)


def read_own_pairs(path: Path) -> None:
    encode_pairs(path, read_preferences(path))


def read_pairs_of_any_kind(path: Path) -> None:
    preferences.has_safety_labels(str(path))
    for axis in ("helpfulness", "safety"):
        encode_pairs(path, preferences.read_pairs(str(path), axis, TOKENIZER, 256))


def read_answers(path: Path) -> None:
    for answer in preferences.read_answers(str(path)):
        messages = [*answer.prompt.messages, assistant(answer.text)]
        try:
            encode_dialog(TOKENIZER, messages)
        except InputError as error:  # as the command that scores them tells it
            raise InputError(f"{path}: {error}") from None


def read_constraints(path: Path) -> None:
    _read_ghosts(path.with_name("dialogs.jsonl"), path)


def read_ghosts(path: Path) -> None:
    _read_ghosts(path, path.with_name("c.jsonl"))


def _read_ghosts(dialogs: Path, constraints: Path) -> None:
    files = {"data": str(dialogs), "constraints": str(constraints)}
    settings = gatt.Settings(**files, check="none")
    gatt.leave_out_long(TOKENIZER, gatt.read_dialogs(settings), settings, CONTEXT)


def read_annotated(path: Path) -> None:
    annotators.annotate_file(comparisons(), "safety", 0, path.parent)


def go_on_asking(path: Path) -> None:
    annotators.annotate_human(comparisons(), "safety", 0, path.parent)


def check_control_tokens(ids: list[int], messages: list[dict]) -> None:
    """One BOS a turn, no EOS but behind an answer, whatever the file says."""
    turns = sum(message["role"] == "user" for message in messages)
    if ids.count(TOKENIZER.bos_id) != turns or ids.count(TOKENIZER.eos_id) > turns:
        raise Wrong("control tokens inside of what is trained on")


def keep(path: Path, records: list) -> None:
    """As stages write into their folder what they read."""
    write_records(path.parent.parent / "kept.jsonl", records)


READERS = [  # (file, what is in it, how it is read)
    ("sft.jsonl", dialog_rows, read_dialogs),
    ("prompts.jsonl", prompt_rows, read_and_encode_prompts),
    ("pairs.jsonl", pair_rows, read_own_pairs),
    ("pairs.jsonl", pair_rows, read_pairs_of_any_kind),
    ("hh.jsonl", hh_rows, read_pairs_of_any_kind),
    ("hh.jsonl.gz", hh_rows, read_pairs_of_any_kind),
    ("answers.jsonl", answer_rows, read_answers),
    ("constraints.jsonl", constraint_rows, read_constraints),
    ("sft.jsonl", dialog_rows, read_ghosts),
    ("annotated-safety.jsonl", annotation_rows, read_annotated),
    ("to_annotate-safety.jsonl", annotation_rows, read_annotated),
    ("annotated-safety.jsonl", annotation_rows, go_on_asking),
]


def prepare(folder: Path) -> dict[str, bytes]:
    """The valid files, by name."""
    valid = {}
    for name, rows, _ in READERS:
        path = folder / name.removesuffix(".gz")
        write_jsonl(path, [row if isinstance(row, dict) else row.to_json() for row in rows()])
        valid[name] = path.read_bytes()
    valid["dialogs.jsonl"] = valid["sft.jsonl"]
    valid["c.jsonl"] = valid["constraints.jsonl"]
    return valid


def put(valid: dict[str, bytes], folder: Path, name: str, content: bytes) -> Path:
    """The file, beside others that its reader may want."""
    for beside in ("dialogs.jsonl", "c.jsonl", "to_annotate-safety.jsonl"):
        (folder / beside).write_bytes(valid[beside])
    (folder / name).write_bytes(content)
    return folder / name


def make(valid: dict[str, bytes], rng: Random, folder: Path) -> Case:
    name, _, read = rng.choice(READERS)
    about, content = mutate_jsonl(rng, valid[name])
    if name.endswith(".gz"):
        content = gzip.compress(content, 1)
        if rng.random() < 0.5:
            about, content = mutate_bytes(rng, content)
        elif rng.random() < 0.05:
            about, content = "endless", ENDLESS
    path = put(valid, folder, name, content)
    return Case(f"{read.__name__} {name}: {about}", partial(run, partial(read, path)), folder, name)
