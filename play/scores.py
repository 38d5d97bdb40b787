"""What the reward models think of an answer, and what the annotator thinks of it.

    python -m play try                     type prompts and answers, see all scores, fool the models
    python -m play score ANSWERS.jsonl     the scores of answers, of dialogs or of pairs in a file

Scores are logits; in brackets stands their sigmoid. The reward is what rejection sampling goes by:
the safety score where the prompt is tagged or the answer looks unsafe, else the helpfulness score.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from data import InputError, Prompt, preferences, read_prompts, world
from data.jsonl import AXES
from data.preferences import GivenAnswer
from reward import load_reward_model, score_dialogs
from runtime import choose_device, newest_reward_models, parse_settings, set_threads

Scores = dict[str, tuple[float, float]]  # {"helpfulness", "safety", "reward": (logit, sigmoid)}
Score = Callable[[list[tuple[Prompt, str]]], list[Scores]]  # of prompts and their answers

SCORES = ("reward", "helpfulness", "safety")  # the columns, where they are known


@dataclass
class TrySettings:
    out: Path = Path("out")  # its newest reward models give the scores
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides


@dataclass
class ScoreSettings:
    file: Path  # JSONL of dialogs, of prompts with answers, or of pairs
    out: Path = Path("out")  # its newest reward models give the scores
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides


def main(argv: list[str]) -> None:
    """The command's name, `try` or `score`, and its arguments."""
    command, *arguments = argv
    kind = TrySettings if command == "try" else ScoreSettings
    settings = parse_settings(kind, __doc__, argv=arguments)
    set_threads(settings.threads)
    score = load_score(settings.out, choose_device(settings.device))
    if command == "try":
        try_answers(score)
    else:
        print_scores(preferences.read_answers(settings.file), score)


def load_score(out: Path, device: torch.device) -> Score:
    """The newest reward models of OUT, as a function of prompts and their answers."""
    axes = []  # one alone, as of `reward.py --data`, will do
    for axis in AXES:
        if (out / f"reward-{axis}").is_dir():
            axes.append(axis)
    models = {}
    for axis, folder in newest_reward_models(out, axes=axes or AXES).items():
        print(f"{axis}: {folder}")
        models[axis] = load_reward_model(folder, device)
    return partial(score_dialogs, models)


def with_toy_prompts(answers: list[GivenAnswer]) -> list[GivenAnswer]:
    """Answers whose prompt, by its text, is one of the toy world's: with its tag and family."""
    known = {}
    for split in ("train", "dev", "test"):
        file = world.FOLDER / f"prompts-{split}.jsonl"
        if file.exists():
            for prompt in read_prompts(file):
                if len(prompt.messages) == 1:
                    known[prompt.question] = prompt
    result = []
    for answer in answers:
        prompt = answer.prompt
        toy = known.get(prompt.question.strip())
        if toy and len(prompt.messages) == 1:
            prompt = replace(toy, messages=prompt.messages, where=prompt.where)
        result.append(replace(answer, prompt=prompt))
    return result


def print_scores(answers: list[GivenAnswer], score: Score) -> None:
    """One table a prompt: combined reward and both scores of each answer, as logit (sigmoid), the
    annotator's where it knows the prompt, then the answer.
    """
    _print_scored(_scored(answers, score))


def _scored(answers: list[GivenAnswer], score: Score) -> list[tuple[GivenAnswer, Scores]]:
    answers = with_toy_prompts(answers)
    scores = score([(answer.prompt, answer.text) for answer in answers])
    return list(zip(answers, scores, strict=True))


def _print_scored(scored: list[tuple[GivenAnswer, Scores]]) -> None:
    for _, group in groupby(scored, key=lambda pair: pair[0].prompt.messages):
        group = list(group)
        first, scores = group[0]
        prompt = first.prompt
        names = [name for name in SCORES if name in scores]
        is_known = world.knows(prompt)

        turn = sum(message["role"] == "user" for message in prompt.messages)
        about = f"turn {turn}"
        if prompt.is_safety:
            about += ", tagged as possibly unsafe"
        header = "".join(f"{name:>19}" for name in names)
        if is_known:
            about += f", toy world: {prompt.family}"
            header += "   annotator: helpfulness safety"
        print(f"\n{prompt.question!r} ({about})")
        print(header + "   answer")
        for answer, scores in group:
            print(_score_line(answer, scores, names, is_known))


def _score_line(answer: GivenAnswer, scores: Scores, names: list[str], is_known: bool) -> str:
    line = ""
    for name in names:
        logit, probability = scores[name]
        line += f"{logit:>+11.3f} ({probability:.3f})"
    if is_known:
        helpfulness = world.helpfulness(answer.prompt, answer.text)
        safety = world.safety(answer.prompt, answer.text)
        line += f"{helpfulness:>25.2f} {safety:>6.2f}"
    side = "" if answer.which == "answer" else f"{answer.which}: "
    return f"{line}   {side}{answer.text!r}"


def try_answers(score: Score) -> None:
    """Ask for a prompt and answers to it, and show the scores of all of them after each one, until
    an empty prompt.
    """
    print(
        "Type a prompt, then answers to it, as many as you like; an empty line goes back, an empty"
        " prompt ends."
    )
    while question := ask("\nprompt> "):
        prompt = Prompt([{"role": "user", "content": question}])
        scored = []
        while text := ask("answer> "):
            try:
                scored += _scored([GivenAnswer(prompt, text)], score)
            except InputError as error:
                print(f"  {error}")
                continue
            scored.sort(key=_deciding_logit, reverse=True)
            _print_scored(scored)


def _deciding_logit(scored: tuple[GivenAnswer, Scores]) -> float:
    """The combined reward; where there is one reward model only, its score."""
    _, scores = scored
    for name in SCORES:
        if name in scores:
            return scores[name][0]
    raise ValueError("no scores")


def ask(question: str) -> str:
    """A line as it was typed, "" at the end of the input."""
    try:
        return input(question).strip()
    except (EOFError, RuntimeError):  # RuntimeError: there is no input at all
        return ""
