"""Two models against each other: wins, ties and losses, over all prompts and by family.

python -m play compare rlhf-v4 sft                    judged by the annotator
python -m play compare rlhf-v4 sft --judge reward     by the reward models
python -m play compare rlhf-v4 sft --judge human      by you, not knowing whose answers they are
"""

import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import report
from data import Answer, Prompt, printable
from data.annotators import choice, sides_swapped
from eval import (
    NOT_WORSE,
    Judgement,
    compare,
    compare_families,
    find_prompts,
    load_judges,
    sampling,
)
from play.shared import check_sampling, find_model
from runtime import (
    append_rows,
    cached_answers,
    check_between,
    choose_device,
    hold,
    parse_settings,
    resume_rows,
    set_threads,
)


@dataclass
class Settings:
    first: str  # a model: a name in OUT, or the path of a folder
    second: str  # the one that it is compared with
    out: Path = Path("out")  # the models; answers and grades are kept in OUT/eval
    # auto: annotator; on other prompts, reward; human: you
    judge: Literal["auto", "annotator", "reward", "human"] = "auto"
    split: Literal["test", "dev", "train"] = "test"
    prompts: str = ""  # JSONL of prompts to ask instead of the toy world's
    answers: int = 1  # answers per prompt
    temperature: float = 1.0  # 1: the model as it is
    max_new_tokens: int = 96  # longest answer
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides

    def __post_init__(self) -> None:
        check_between(self, 1, 10**6, "answers")
        check_sampling(self)


def main(argv: list[str] | None = None) -> None:
    # 1. the answers of both
    settings = parse_settings(Settings, __doc__, argv=argv)
    set_threads(settings.threads)
    device = choose_device(settings.device)
    _, prompts = find_prompts(settings)
    names = (settings.first, settings.second)
    folders = [find_model(settings.out, name) for name in names]
    hold(settings.out / "eval")  # `eval.py` keeps its answers there, too
    answers = []
    labels = []
    for name, folder in zip(names, folders, strict=True):
        label = re.sub(r"[^\w.-]", "-", name.strip("/"))  # a part of files' names
        path = settings.out / "eval" / f"answers-{label}.jsonl"
        answers.append(cached_answers(folder, prompts, path, **sampling(settings, device)))
        labels.append(label)

    # 2. judged by a person, or by the first judge that there is
    if settings.judge == "human":
        who = "a person"
        tie = 0.0
        path = settings.out / "eval" / f"human-{'-'.join(labels)}.jsonl"
        grades = ask_grades(prompts, *answers, path, settings.seed)
        if not grades:
            print("nothing was judged")
            return
        judgements = _as_judgements(grades)
    else:
        judges = load_judges(settings.out, prompts, settings.judge, device)
        who, judge = next(iter(judges.items()))
        tie = judge.tie
        judgements = [judge.judge_answers(prompts, of_model) for of_model in answers]

    # 3. who wins
    title = printable(f"{settings.first} against {settings.second}", one_line=True)
    print(
        f"{title}: {len(judgements[0])} pairs of answers at temperature {settings.temperature}, "
        f"judged by {who}; ties (differences up to {tie}) count half\n"
    )
    for axis, wins in compare(prompts, *judgements, tie).items():
        print(f"{axis:<14}{wins}")
    families = {}
    for family, result in compare_families(prompts, *judgements, tie).items():
        families[family] = result._asdict()
    table = report.families_table(title, families, NOT_WORSE)
    report.print_tables([report.Section("By family", [table])])


# ---- a person is the judge ----


@dataclass(frozen=True)
class Grade:
    """What a person says of a pair of answers."""

    index: int  # number of the prompt
    sample: int
    grade: int  # from 3 (the first model's answer is much better) to -3
    swapped: bool  # whether the first model's answer stood on the right
    made_by: str  # marks of both models' answers


def unswap(grade: int, swapped: bool) -> int:
    """What was typed, 1 (the left answer is much better) to 7 (the right one), as 3 (the first
    model's is much better) to -3.

    >>> unswap(1, False), unswap(1, True), unswap(4, True)
    (3, -3, 0)
    """
    return grade - 4 if swapped else 4 - grade


def ask_grades(
    prompts: list[Prompt],
    answers: list[Answer],
    baseline: list[Answer],
    path: Path,
    seed: int = 0,
) -> list[Grade]:
    """A person compares answers pair by pair, not knowing whose they are (§3.4.2, A.3.7: seven
    grades, sides at random).

    What is answered stands in `path` and is not asked again; equal answers are ties unasked. "q"
    ends the asking.

    Args:
        answers, baseline: of two models to the same prompts, in the same order.

    Returns:
        the grades of all pairs judged so far.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = answers[0].made_by + baseline[0].made_by
    done = {}
    for row in resume_rows(path):
        if row.get("made_by") == mark:
            done[row["index"], row["sample"]] = Grade(**row)
    order = random.Random(f"{seed} human").sample(range(len(answers)), len(answers))
    for count, number in enumerate(order, 1):
        first = answers[number]
        second = baseline[number]
        if (first.index, first.sample) in done:
            continue
        swapped = sides_swapped("human", seed, number)
        typed = "4"
        if first.text != second.text:
            print(f"\n[{count}/{len(order)}]")
            sides = (second, first) if swapped else (first, second)
            typed = _ask_grade(prompts[first.index], *sides)
        if typed == "q":
            break
        grade = Grade(first.index, first.sample, unswap(int(typed), swapped), swapped, mark)
        append_rows(path, [asdict(grade)])
        done[first.index, first.sample] = grade
    return list(done.values())


def _ask_grade(prompt: Prompt, left: Answer, right: Answer) -> str:
    """Show a pair and ask for its grade: "1" to "7", or "q"."""
    for message in prompt.messages:
        print(printable(f"  {message['role']}: {message['content']}"))
    print(printable(f"  LEFT:  {left.text}\n  RIGHT: {right.text}"))
    return choice(
        "left is much better 1, better 2, slightly 3; equal 4; right is slightly 5, better 6, much"
        " better 7; stop q",
        "1234567q",
    )


def _as_judgements(grades: list[Grade]) -> list[list[Judgement]]:
    """A person's grades as judgements of both models: the first has the grade, the second 0."""
    first = []
    second = []
    for grade in grades:
        first.append(Judgement(grade.index, helpfulness=grade.grade, safety=grade.grade))
        second.append(Judgement(grade.index, helpfulness=0, safety=0))
    return [first, second]
