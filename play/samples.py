"""The same prompts, answered by each model in OUT, with the annotator's view of each answer.

python -m play samples
python -m play samples --show 20 --temperature 0.4
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import report
from eval import find_models, find_prompts
from play.shared import check_sampling
from report.answers import verdict
from report.blocks import Section, Shown, ShownAnswer
from runtime import (
    check_positive,
    choose_device,
    load_model,
    parse_settings,
    sample_answers,
    set_threads,
)


@dataclass
class Settings:
    out: Path = Path("out")  # the models
    split: Literal["test", "dev", "train"] = "test"  # of the toy world's prompts
    prompts: str = ""  # JSONL of prompts to ask instead
    show: int = 8  # how many prompts: the first of each family
    temperature: float = 1.0  # 1: the model as it is; 0: always the likeliest token
    max_new_tokens: int = 96  # longest answer
    seed: int = 0  # of the sampling
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 0  # CPU threads; 0: torch decides

    def __post_init__(self) -> None:
        check_positive(self, "show")
        check_sampling(self)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    set_threads(settings.threads)
    device = choose_device(settings.device)
    _, prompts = find_prompts(settings)
    prompts = [prompts[i] for i in report.pick_shown(prompts, settings.show)]
    answered = [[] for _ in prompts]  # of each prompt the answers of all models
    for name in find_models(settings.out):
        model, tokenizer = load_model(settings.out / name, device)
        answers = sample_answers(
            model,
            tokenizer,
            prompts,
            key=(settings.seed, "samples"),
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            desc=name,
        )
        for answer in answers:
            judged = verdict(prompts[answer.index], answer.text)
            answered[answer.index].append(ShownAnswer(name, answer.text, judged))
    blocks = []
    for prompt, answers in zip(prompts, answered, strict=True):
        blocks.append(Shown(prompt.question, answers))
    title = f"The same prompts, model by model, at temperature {settings.temperature:g}"
    report.print_tables([Section(title, blocks)])
