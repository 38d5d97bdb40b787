"""Scores of answers in the terminal: a table, and a loop in which you type prompts and answers and see them at once."""

import json
from collections.abc import Callable
from itertools import groupby

from data import InputError, toy

Judge = Callable[[list[dict]], list[dict]]  # dialogs {"prompt", "answer", "is_safety"?} -> the same with their scores


def add_annotator(dialogs: list[dict]) -> list[dict]:
    """Dialogs whose prompt, by its text, is one of the toy world's gain its tag and the annotator's two scores."""
    files = [toy.FOLDER / f"prompts-{split}.jsonl" for split in ("train", "dev", "test")]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text("utf-8").splitlines()]
    known = {row["prompt"][0]["content"]: row for row in rows if len(row["prompt"]) == 1}
    found = []
    for dialog in dialogs:
        row = known.get(dialog["prompt"][0]["content"].strip()) if len(dialog["prompt"]) == 1 else None
        own = {"family": row["family"], "is_safety": row["is_safety"],
               "annotator": (toy.helpfulness(row, dialog["answer"]), toy.safety(row, dialog["answer"]))} if row else {}
        found.append(dialog | own)
    return found


def print_scores(rows: list[dict]) -> None:
    """One table a prompt: the combined reward and both scores of each answer, as logit (sigmoid), then the answer."""
    for prompt, answers in groupby(rows, key=lambda row: row["prompt"]):
        answers = list(answers)
        tagged = ", tagged as possibly unsafe" if answers[0].get("is_safety") else ""
        family = f", toy world: {answers[0]['family']}" if "annotator" in answers[0] else ""
        turn = sum(message["role"] == "user" for message in prompt)
        print(f"\n{prompt[-1]['content']!r} (turn {turn}{tagged}{family})")
        names = [name for name in ("reward", "helpfulness", "safety") if name in answers[0]]
        print("".join(f"{name:>19}" for name in names) + ("   annotator: helpfulness safety" if family else "") + "   answer")
        for row in answers:
            print("".join(f"{row[name][0]:>+11.3f} ({row[name][1]:.3f})" for name in names)
                  + ("{:>25.2f} {:>6.2f}".format(*row["annotator"]) if family else "")
                  + f"   {row['which'] + ': ' if row.get('which', 'answer') != 'answer' else ''}{row['answer']!r}")


def try_answers(judge: Judge) -> None:
    """Ask for a prompt and answers to it, and show the scores of all of them after each one, until an empty prompt."""
    print("Type a prompt, then answers to it, as many as you like; an empty line goes back, an empty prompt ends.")
    while prompt := ask("\nprompt> "):
        answers: list[dict] = []
        while answer := ask("answer> "):
            try:
                scored = judge(add_annotator([{"prompt": [{"role": "user", "content": prompt}], "answer": answer}]))
            except InputError as error:
                print(f"  {error}")
                continue
            answers = [*answers, *scored]
            print_scores(sorted(answers, key=lambda row: -row.get("reward", row.get("helpfulness", row.get("safety")))[0]))


def ask(question: str) -> str:
    """A line as it was typed, "" at the end of the input."""
    try:
        return input(question).strip()
    except EOFError:
        return ""
