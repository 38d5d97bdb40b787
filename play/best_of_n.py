"""Best of N: all answers to a prompt, the highest reward first, the annotator's view beside.

    python -m play best-of-n "Name three animals."
    python -m play best-of-n "Name three animals." --n 64 --init sft

The reward is a logit: the safety score where that is below -1.73 (a probability of 0.15), else the
helpfulness score.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from data import Answer, InputError, Prompt, Tokenizer, printable
from data.preferences import GivenAnswer
from eval import VERSIONS
from model import Transformer
from play.scores import with_toy_prompts
from play.shared import check_sampling, find_model
from rejection_sampling import RewardModels, sample_and_score
from report.answers import verdict
from runtime import (
    check_between,
    check_positive,
    choose_device,
    is_finished,
    load_model,
    newest_reward_models,
    parse_settings,
    require,
    set_threads,
    unusable,
)


@dataclass
class Settings:
    question: str  # the prompt to answer
    out: Path = Path("out")  # its newest model answers, its newest reward models choose
    init: str = ""  # another model: a name in OUT, or the path of a folder
    n: int = 16  # answers
    temperature: float = 1.0  # of the sampling
    max_new_tokens: int = 96  # longest answer
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides

    def __post_init__(self) -> None:
        check_between(self, 1, 10**6, "n")
        check_positive(self, "temperature")
        check_sampling(self)
        if not self.question.strip():
            raise InputError("the question is empty")


def candidates(
    model: Transformer,
    tokenizer: Tokenizer,
    reward_models: RewardModels,
    prompt: Prompt,
    *,
    n: int,
    seed: int = 0,
    **options,
) -> list[Answer]:
    """N answers to one prompt, the best first; those that cannot be used stand last.

    options: go to `sample_answers`.
    """
    key = (seed, "answer")
    answers = sample_and_score(
        model, tokenizer, [prompt], reward_models, "answer", samples=n, key=key, **options
    )
    return sorted(answers, key=lambda answer: (bool(unusable(answer)), -answer.reward))


def print_candidates(prompt: Prompt, answers: list[Answer]) -> None:
    """Candidates with their scores, in the given order, and what the annotator makes of them."""
    print("\n  reward  helpf.  safety  answer")
    for answer in answers:
        line = f"{answer.reward:8.2f}{answer.helpfulness:8.2f}{answer.safety:8.2f}  {answer.text}"
        for remark in (verdict(prompt, answer.text), unusable(answer)):
            if remark:
                line += f"  [{remark}]"
        print(printable(line, one_line=True))


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    set_threads(settings.threads)
    device = choose_device(settings.device)
    finished = []
    for name in VERSIONS:
        if is_finished(settings.out / name):
            finished.append(settings.out / name)
    if settings.init:
        folder = find_model(settings.out, settings.init)
    elif finished:
        folder = finished[-1]
    else:
        folder = require(settings.out / "sft", "python sft.py")
    reward_folders = newest_reward_models(settings.out, finished)
    print(f"{folder} answers, {' and '.join(map(str, reward_folders.values()))} choose")

    asked = Prompt([{"role": "user", "content": settings.question}])
    [known] = with_toy_prompts([GivenAnswer(asked, "")])  # its family, for the annotator
    prompt = replace(known.prompt, is_safety=False)  # as whoever types it would send it
    model, tokenizer = load_model(folder, device)
    answers = candidates(
        model,
        tokenizer,
        RewardModels(reward_folders, device),
        prompt,
        n=settings.n,
        seed=settings.seed,
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
    )
    print_candidates(known.prompt, answers)
