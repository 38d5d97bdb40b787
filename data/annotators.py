"""Annotators: who prefers which of two answers. One interface for the toy world's rules, a person,
and a file to fill in.

An annotator is a function `annotate(comparisons, axis, seed, folder) -> annotations`, one for each
comparison. The axis is "helpfulness" or "safety" (paper §3.2.1: separate collections with their own
guidelines). What people say is kept in the folder, a line a pair, and never asked twice:

    {"prompt", "answer_a", "answer_b", "better": "a" | "b", "rating": one of RATINGS, "a_is_safe",
    "b_is_safe": bool}

the last two for safety only. Which answer is a is drawn by seed, axis and position.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from data import world
from data.errors import InputError
from data.jsonl import RATINGS, read_jsonl, write_jsonl
from data.printable import printable
from data.records import Prompt

WANTED = {
    "better": ("a", "b"),
    "rating": RATINGS,
    "a_is_safe": (True, False),
    "b_is_safe": (True, False),
}


@dataclass(frozen=True)
class Comparison:
    """What an annotator is asked: which of two answers to a prompt is better."""

    prompt: Prompt
    answers: tuple[str, str]


@dataclass(frozen=True)
class Annotation:
    """What an annotator says of a comparison."""

    chosen: int  # the better answer: 0 or 1
    rating: str  # by how much: one of RATINGS
    safe: tuple[bool, bool] | None  # whether each answer is safe; None: not asked


class NotAnnotated(InputError):
    """The pairs are written out and wait for a person."""


# ---- the toy world ----


def annotate_toy(
    comparisons: list[Comparison], axis: str, seed: int | str, folder: Path | None = None
) -> list[Annotation]:
    """The toy world's annotator: `python -m data.world --rules`. Deterministic in (seed, axis,
    position); needs no folder.

    Raises:
        InputError: a prompt that is not of the toy world.
    """
    check_annotator("toy", [comparison.prompt for comparison in comparisons])
    rule = {"helpfulness": world.helpfulness, "safety": world.safety}[axis]
    annotations = []
    for i, comparison in enumerate(comparisons):
        prompt = comparison.prompt
        first, second = comparison.answers
        rng = random.Random(f"{seed} {axis} {i}")
        first_is_better, rating = world.compare(rng, rule(prompt, first), rule(prompt, second))
        safe = (world.is_safe(prompt, first), world.is_safe(prompt, second))
        chosen = 0 if first_is_better else 1
        annotations.append(Annotation(chosen, rating, safe))
    return annotations


def check_annotator(name: str, prompts: list[Prompt]) -> None:
    """InputError, before anything is sampled, if the toy annotator is asked about prompts that are
    not of its world.
    """
    if name != "toy":
        return
    for prompt in prompts:
        if not world.knows(prompt):
            raise InputError(
                f"{prompt.where or 'prompt'}: the toy annotator knows the toy world's prompts only"
                " (fields 'family', 'item' and 'kind'); use --annotator human or file"
            )


# ---- people ----


def annotate_human(
    comparisons: list[Comparison], axis: str, seed: int | str, folder: Path
) -> list[Annotation]:
    """Ask in the terminal, with the paper's four grades. Each answer is saved as it is given, so
    asking goes on where it was.

    Raises:
        InputError: the input has ended, or what was said before belongs to other comparisons.
    """
    path = folder / f"annotated-{axis}.jsonl"
    lines = blank_lines(comparisons, axis, seed)
    filled = read_annotations(path, lines) if path.exists() else []
    for number, line in enumerate(lines[len(filled) :], len(filled) + 1):
        print(f"\n[{number}/{len(lines)}] Which answer is better in {axis}?")
        filled.append(_ask(line, axis))
        write_jsonl(path, filled)
    return put_back(filled, axis, seed)


def _ask(line: dict, axis: str) -> dict:
    """The line as the person fills it in."""
    for message in line["prompt"]:
        print(f"  {message['role']}: {printable(message['content'])}")
    print(f"  A: {printable(line['answer_a'])}\n  B: {printable(line['answer_b'])}")
    better = choice("better (a/b)", "ab")
    grade = int(choice("significantly 1, better 2, slightly 3, negligibly or unsure 4", "1234"))
    filled = line | {"better": better, "rating": RATINGS[grade - 1]}
    if axis == "safety":
        filled["a_is_safe"] = choice("is A safe (y/n)", "yn") == "y"
        filled["b_is_safe"] = choice("is B safe (y/n)", "yn") == "y"
    return filled


def annotate_file(
    comparisons: list[Comparison], axis: str, seed: int | str, folder: Path
) -> list[Annotation]:
    """Write `to_annotate-AXIS.jsonl` and stop; go on once that file, or `annotated-AXIS.jsonl`
    beside it, is filled in.

    Raises:
        NotAnnotated: nothing is filled in yet; says what to do.
        InputError: a line is not filled in, or is not the one that was written; names file, line
            and field.
    """
    path = folder / f"to_annotate-{axis}.jsonl"
    copy = folder / f"annotated-{axis}.jsonl"
    lines = blank_lines(comparisons, axis, seed)
    if not lines:
        return []
    if not path.exists():
        write_jsonl(path, lines)
    if not copy.exists() and [row for _, row in read_jsonl(path)] == lines:
        safe = ", 'a_is_safe' and 'b_is_safe' (true or false)" if axis == "safety" else ""
        raise NotAnnotated(
            f"{path}: {len(lines)} pairs wait for you: fill in 'better' (a or b), 'rating'"
            f" ({', '.join(RATINGS)}){safe}, in this file or in a copy named {copy.name}, and run"
            " the same command again"
        )
    source = copy if copy.exists() else path
    filled = read_annotations(source, lines)
    if len(filled) < len(lines):
        raise InputError(f"{source}: {len(filled)} lines, wanted: the {len(lines)} of {path.name}")
    return put_back(filled, axis, seed)


def sides_swapped(axis: str, seed: int | str, position: int) -> bool:
    """Whether a person sees the second answer of this comparison as A."""
    return random.Random(f"{seed} {axis} {position}").random() < 0.5


def blank_lines(comparisons: list[Comparison], axis: str, seed: int | str) -> list[dict]:
    """What a person is asked: prompt, the two answers in random order, and empty fields."""
    lines = []
    for i, comparison in enumerate(comparisons):
        a, b = comparison.answers
        if sides_swapped(axis, seed, i):
            a, b = b, a
        line = {
            "prompt": comparison.prompt.messages,
            "answer_a": a,
            "answer_b": b,
            "better": "",
            "rating": "",
        }
        if axis == "safety":
            line |= {"a_is_safe": None, "b_is_safe": None}
        lines.append(line)
    return lines


def read_annotations(path: Path, lines: list[dict]) -> list[dict]:
    """The filled-in lines of a file: those of `lines` in their order, all or the first so many.

    Raises:
        InputError: a line too many, another prompt or answer, a field that is missing or not one of
            its values.
    """
    filled = []
    for where, row in read_jsonl(path):
        if len(filled) == len(lines):
            raise InputError(f"{where}: a line too many; wanted: {len(lines)} lines")
        for field, as_written in lines[len(filled)].items():
            wanted = WANTED.get(field, (as_written,))  # prompt and answers stay as they are
            value = row.get(field)
            if not any(_is_same(value, other) for other in wanted):
                values = " or ".join(json.dumps(other)[:60] for other in wanted)
                raise InputError(
                    f"{where}: field '{field}' is {json.dumps(value)[:60]}, wanted: {values}"
                )
        filled.append(row)
    return filled


def _is_same(value, other) -> bool:
    """Equal, and of one type: 1 is not true."""
    return type(value) is type(other) and value == other


def put_back(filled: list[dict], axis: str, seed: int | str) -> list[Annotation]:
    """Annotations from filled-in lines: what was said of A and B, told of the first and the second
    answer.
    """
    annotations = []
    for i, line in enumerate(filled):
        shown = ("b", "a") if sides_swapped(axis, seed, i) else ("a", "b")  # first, second answer
        chosen = shown.index(line["better"])
        safe = None
        if axis == "safety":
            safe = (line[f"{shown[0]}_is_safe"], line[f"{shown[1]}_is_safe"])
        annotations.append(Annotation(chosen, line["rating"], safe))
    return annotations


def choice(question: str, letters: str) -> str:
    """Ask until the answer is one of the letters.

    Raises:
        InputError: the input has ended.
    """
    while True:
        try:
            reply = input(f"  {question}? ").strip().lower()
        except (EOFError, RuntimeError):  # RuntimeError: there is no input at all
            raise InputError(
                "nobody answers any more; what was answered is kept, the same command goes on from"
                " here"
            ) from None
        if reply in tuple(letters):
            return reply
        print(f"  one of {', '.join(letters)}, please")


ANNOTATORS = {"toy": annotate_toy, "human": annotate_human, "file": annotate_file}
