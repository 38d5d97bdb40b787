"""Annotators: who prefers which of two answers. One interface for the toy world's rules, a person,
and a file to fill in.

An annotator is a function `annotate(comparisons, axis, seed, folder) -> list[dict]`. A comparison
is {"prompt": messages, ..., "answers": (a, b)}; an annotation is {"chosen": 0 or 1, "rating": one
of RATINGS, "safe": (bool, bool) or None}. The axis is "helpfulness" or "safety" (paper §3.2.1:
separate collections with their own guidelines). What people say is kept in the folder, a line a
pair, and never asked twice:

    {"prompt", "answer_a", "answer_b", "better": "a" | "b", "rating": one of RATINGS, "a_is_safe",
    "b_is_safe": bool}

the last two for safety only. Which answer is a is drawn by seed, axis and position.
"""

import json
import random
from pathlib import Path

from data import world
from data.errors import InputError
from data.jsonl import RATINGS, read_jsonl, write_jsonl

WANTED = {
    "better": ("a", "b"),
    "rating": RATINGS,
    "a_is_safe": (True, False),
    "b_is_safe": (True, False),
}


class NotAnnotated(InputError):
    """The pairs are written out and wait for a person."""


def annotate_toy(
    comparisons: list[dict], axis: str, seed: int, folder: Path | None = None
) -> list[dict]:
    """The toy world's annotator: `python -m data.world --rules`. Deterministic in (seed, axis,
    position); needs no folder.
    """
    check_annotator("toy", comparisons)
    rule, found = {"helpfulness": world.helpfulness, "safety": world.safety}[axis], []
    for i, comparison in enumerate(comparisons):
        a, b = (rule(comparison, answer) for answer in comparison["answers"])
        first, rating = world.compare(random.Random(f"{seed} {axis} {i}"), a, b)
        safe = tuple(world.is_safe(comparison, answer) for answer in comparison["answers"])
        found.append({"chosen": 0 if first else 1, "rating": rating, "safe": safe})
    return found


def annotate_human(comparisons: list[dict], axis: str, seed: int, folder: Path) -> list[dict]:
    """Ask in the terminal, with the paper's four grades. Each answer is saved as it is given, so
    asking goes on where it was.
    """
    path, lines = folder / f"annotated-{axis}.jsonl", blank_lines(comparisons, axis, seed)
    rows = read_annotations(path, lines) if path.exists() else []
    for number, row in enumerate(lines[len(rows) :], len(rows) + 1):
        print(f"\n[{number}/{len(lines)}] Which answer is better in {axis}?")
        for message in row["prompt"]:
            print(f"  {message['role']}: {message['content']}")
        print(f"  A: {row['answer_a']}\n  B: {row['answer_b']}")
        row["better"] = choice("better (a/b)", "ab")
        row["rating"] = RATINGS[
            int(choice("significantly 1, better 2, slightly 3, negligibly or unsure 4", "1234")) - 1
        ]
        for letter in "ab" if axis == "safety" else "":
            row[f"{letter}_is_safe"] = choice(f"is {letter.upper()} safe (y/n)", "yn") == "y"
        rows.append(row)
        write_jsonl(path, rows)
    return put_back(rows, axis, seed)


def annotate_file(comparisons: list[dict], axis: str, seed: int, folder: Path) -> list[dict]:
    """Write `to_annotate-AXIS.jsonl` and stop; go on once that file, or `annotated-AXIS.jsonl`
    beside it, is filled in.

    Raises:
        NotAnnotated: nothing is filled in yet; says what to do.
        InputError: a line is not filled in, or is not the one that was written; names file, line
            and field.
    """
    path, lines = folder / f"to_annotate-{axis}.jsonl", blank_lines(comparisons, axis, seed)
    filled = folder / f"annotated-{axis}.jsonl"
    if not lines:
        return []
    if not path.exists():
        write_jsonl(path, lines)
    if not filled.exists() and [row for _, row in read_jsonl(path)] == lines:
        safe = ", 'a_is_safe' and 'b_is_safe' (true or false)" if axis == "safety" else ""
        raise NotAnnotated(
            f"{path}: {len(lines)} pairs wait for you: fill in 'better' (a or b), 'rating'"
            f" ({', '.join(RATINGS)}){safe}, in this file or in a copy named {filled.name}, and run"
            " the same command again"
        )
    source = filled if filled.exists() else path
    rows = read_annotations(source, lines)
    if len(rows) < len(lines):
        raise InputError(f"{source}: {len(rows)} lines, wanted: the {len(lines)} of {path.name}")
    return put_back(rows, axis, seed)


def sides_swapped(axis: str, seed: int, position: int) -> bool:
    """Whether a person sees the second answer of this comparison as A."""
    return random.Random(f"{seed} {axis} {position}").random() < 0.5


def blank_lines(comparisons: list[dict], axis: str, seed: int) -> list[dict]:
    """What a person is asked: prompt, the two answers in random order, and empty fields."""
    lines = []
    for i, comparison in enumerate(comparisons):
        a, b = comparison["answers"][:: -1 if sides_swapped(axis, seed, i) else 1]
        lines.append(
            {
                "prompt": comparison["prompt"],
                "answer_a": a,
                "answer_b": b,
                "better": "",
                "rating": "",
            }
            | ({"a_is_safe": None, "b_is_safe": None} if axis == "safety" else {})
        )
    return lines


def read_annotations(path: Path, lines: list[dict]) -> list[dict]:
    """The filled-in lines of a file: those of `lines` in their order, all or the first so many.

    Raises:
        InputError: a line too many, another prompt or answer, a field that is missing or not one of
            its values.
    """
    rows = []
    for where, row in read_jsonl(path):
        if len(rows) == len(lines):
            raise InputError(f"{where}: a line too many; wanted: {len(lines)} lines")
        for field, as_written in lines[len(rows)].items():
            # prompt and answers stay as they are
            wanted, found = WANTED.get(field, (as_written,)), row.get(field)
            if not any(type(found) is type(value) and found == value for value in wanted):
                raise InputError(
                    f"{where}: field '{field}' is {json.dumps(found)[:60]}, wanted: "
                    f"{' or '.join(json.dumps(value)[:60] for value in wanted)}"
                )
        rows.append(row)
    return rows


def put_back(rows: list[dict], axis: str, seed: int) -> list[dict]:
    """Annotations from filled-in lines: what was said of A and B, told of the first and the second
    answer.
    """
    found = []
    for i, row in enumerate(rows):
        swapped = sides_swapped(axis, seed, i)
        safe = (
            (row["a_is_safe"], row["b_is_safe"])[:: -1 if swapped else 1]
            if axis == "safety"
            else None
        )
        found.append(
            {
                "chosen": int((row["better"] == "a") == swapped),
                "rating": row["rating"],
                "safe": safe,
            }
        )
    return found


def choice(question: str, letters: str) -> str:
    """Ask until the answer is one of the letters."""
    while True:
        try:
            reply = input(f"  {question}? ").strip().lower()
        except EOFError:
            raise InputError(
                "nobody answers any more; what was answered is kept, the same command goes on from"
                " here"
            ) from None
        if reply in tuple(letters):
            return reply
        print(f"  one of {', '.join(letters)}, please")


def check_annotator(name: str, prompts: list[dict]) -> None:
    """InputError, before anything is sampled, if the toy annotator is asked about prompts that are
    not of its world.
    """
    unknown = [prompt for prompt in prompts if not world.knows(prompt)] if name == "toy" else []
    if unknown:
        raise InputError(
            f"{unknown[0].get('where', 'prompt')}: the toy annotator knows the toy world's prompts"
            " only (fields 'family', 'item' and 'kind'); use --annotator human or file"
        )


ANNOTATORS = {"toy": annotate_toy, "human": annotate_human, "file": annotate_file}
