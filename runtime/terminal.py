"""Answers in the terminal: tables of scores, a loop in which you type prompts and answers and see
their scores at once, and one in which you judge pairs of answers, not knowing whose they are."""

import json
import random
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from data import InputError, world
from data.annotators import choice, sides_swapped
from data.jsonl import RATINGS
from runtime.checkpoint import append_rows, resume_rows
from runtime.sampling import unusable

# dialogs {"prompt", "answer", "is_safety"?} -> the same with their scores
Judge = Callable[[list[dict]], list[dict]]


def add_annotator(dialogs: list[dict]) -> list[dict]:
    """Dialogs whose prompt, by its text, is one of the toy world's gain its tag and the annotator's
    two scores.
    """
    files = [world.FOLDER / f"prompts-{split}.jsonl" for split in ("train", "dev", "test")]
    rows = [
        json.loads(line)
        for file in files
        if file.exists()
        for line in file.read_text("utf-8").splitlines()
    ]
    known = {row["prompt"][0]["content"]: row for row in rows if len(row["prompt"]) == 1}
    found = []
    for dialog in dialogs:
        row = (
            known.get(dialog["prompt"][0]["content"].strip())
            if len(dialog["prompt"]) == 1
            else None
        )
        own = (
            {
                "family": row["family"],
                "is_safety": row["is_safety"],
                "annotator": (
                    world.helpfulness(row, dialog["answer"]),
                    world.safety(row, dialog["answer"]),
                ),
            }
            if row
            else {}
        )
        found.append(dialog | own)
    return found


def print_scores(rows: list[dict]) -> None:
    """One table a prompt: the combined reward and both scores of each answer, as logit (sigmoid),
    then the answer.
    """
    for prompt, answers in groupby(rows, key=lambda row: row["prompt"]):
        answers = list(answers)
        tagged = ", tagged as possibly unsafe" if answers[0].get("is_safety") else ""
        family = f", toy world: {answers[0]['family']}" if "annotator" in answers[0] else ""
        turn = sum(message["role"] == "user" for message in prompt)
        print(f"\n{prompt[-1]['content']!r} (turn {turn}{tagged}{family})")
        names = [name for name in ("reward", "helpfulness", "safety") if name in answers[0]]
        print(
            "".join(f"{name:>19}" for name in names)
            + ("   annotator: helpfulness safety" if family else "")
            + "   answer"
        )
        for row in answers:
            which = row.get("which", "answer")
            side = "" if which == "answer" else f"{which}: "
            print(
                "".join(f"{row[name][0]:>+11.3f} ({row[name][1]:.3f})" for name in names)
                + ("{:>25.2f} {:>6.2f}".format(*row["annotator"]) if family else "")
                + f"   {side}{row['answer']!r}"
            )


def print_accuracies(title: str, table: dict[str, dict[str, float]]) -> None:
    """Accuracy by rating and on average, a line for each of `table`'s names."""
    print(
        f"\n{title}\n"
        + " " * 16
        + "".join(f"{name.replace('_better', ''):>15}" for name in (*RATINGS, "average"))
    )
    for name, found in table.items():
        print(
            f"{name:<16}"
            + "".join(
                f"{found.get(rating, float('nan')):>15.3f}" for rating in (*RATINGS, "average")
            )
        )


def print_candidates(folder: Path, judges: dict[str, Path], rows: list[dict]) -> None:
    """Candidates of best of N with their scores, in the given order; `folder` answered, `judges`
    are the reward models.
    """
    print(
        f"{folder}, judged by {' and '.join(map(str, judges.values()))}; scores are logits, the"
        " reward is the safety\nscore where that is below -1.73 (a probability of 0.15), else the"
        " helpfulness score\n\n  reward  helpf.  safety  answer"
    )
    for row in rows:
        print(
            f"{row['reward']:8.2f}{row['helpfulness']:8.2f}{row['safety']:8.2f}  {row['answer']}"
            + (f"  [{unusable(row)}]" if unusable(row) else "")
        )


def try_answers(judge: Judge) -> None:
    """Ask for a prompt and answers to it, and show the scores of all of them after each one, until
    an empty prompt.
    """
    print(
        "Type a prompt, then answers to it, as many as you like; an empty line goes back, an empty"
        " prompt ends."
    )
    while prompt := ask("\nprompt> "):
        answers: list[dict] = []
        while answer := ask("answer> "):
            try:
                scored = judge(
                    add_annotator(
                        [{"prompt": [{"role": "user", "content": prompt}], "answer": answer}]
                    )
                )
            except InputError as error:
                print(f"  {error}")
                continue
            answers = [*answers, *scored]
            print_scores(
                sorted(
                    answers,
                    key=lambda row: -row.get("reward", row.get("helpfulness", row.get("safety")))[
                        0
                    ],
                )
            )


def ask(question: str) -> str:
    """A line as it was typed, "" at the end of the input."""
    try:
        return input(question).strip()
    except EOFError:
        return ""


def unswap(grade: int, swapped: bool) -> int:
    """What was typed, 1 (the left answer is much better) to 7 (the right one), as 3 (the first
    model's is much better) to -3.

    >>> unswap(1, False), unswap(1, True), unswap(4, True)
    (3, -3, 0)
    """
    return grade - 4 if swapped else 4 - grade


def ask_grades(
    prompts: list[dict], rows: list[dict], baseline: list[dict], path: Path, seed: int = 0
) -> list[dict]:
    """A person compares answers pair by pair, not knowing whose they are (§3.4.2, A.3.7: seven
    grades, sides at random).

    What is answered stands in `path` and is not asked again; equal answers are ties unasked. "q"
    ends the asking.

    Returns:
        rows {"index", "sample", "grade"} of all pairs judged so far, from 3 (the first model's
        answer is much better) to -3.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = rows[0]["made_by"] + baseline[0]["made_by"]
    order = random.Random(f"{seed} human").sample(range(len(rows)), len(rows))
    done = {
        (row["index"], row["sample"]): row
        for row in resume_rows(path)
        if row.get("made_by") == mark
    }
    for number, i in enumerate(order, 1):
        first, second, typed = rows[i], baseline[i], "4"
        swapped = sides_swapped("human", seed, i)
        if (first["index"], first["sample"]) in done:
            continue
        if first["answer"] != second["answer"]:
            print(f"\n[{number}/{len(rows)}]")
            for message in prompts[first["index"]]["prompt"]:
                print(f"  {message['role']}: {message['content']}")
            left, right = (second, first) if swapped else (first, second)
            print(f"  LEFT:  {left['answer']}\n  RIGHT: {right['answer']}")
            typed = choice(
                "left is much better 1, better 2, slightly 3; equal 4; right is slightly 5, better"
                " 6, much better 7; stop q",
                "1234567q",
            )
        if typed == "q":
            break
        row = {
            "index": first["index"],
            "sample": first["sample"],
            "grade": unswap(int(typed), swapped),
            "swapped": swapped,
            "made_by": mark,
        }
        append_rows(path, [row])
        done[row["index"], row["sample"]] = row
    return list(done.values())
