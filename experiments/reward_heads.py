"""Is a reward model that also reads log-probabilities better under RLHF than the paper's scalar
head?

    python -m experiments.reward_heads --seeds 1,2,3      after experiments.seeds

From copies of the same SFT and safety model OUT/SEED-logprobs runs `reward.py --axis helpfulness
--head logprobs` (a departure from the paper), the rounds, and PPO on V4; resumable. Then each
version beside that of OUT/SEED (PPO where it was run there), on dev prompts at temperature 1: the
annotator's scores, the variant's win rate over the default, and what a reward for likely text would
show: the tokens of an answer, the policy's entropy (mean of -log π over what it sampled, nats a
token), and how likely SFT finds its answers. Last, V4-PPO against the V4 that it started from. Win
rates are shown with intervals over seeds, corrected for all that are read side by side. Keeps
OUT/results/reward_heads-SEED.json.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import eval as measures
from data import Answer, Prompt, Tokenizer, micro_batches, read_prompts, world
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    in_seeds,
    named,
    plus_minus,
    verdict,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from model import Transformer
from ppo import answer_logprobs, pad_answers
from report import Figure, Section, Table
from runtime import (
    encode_prompts,
    is_finished,
    load_model,
    parse_settings,
    require,
    run,
    sample_answers,
    set_threads,
)

VERSIONS = ("rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4", "rlhf-v4-ppo")
HEADS = ("default", "logprobs")
AXES = ("helpfulness", "safety")


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    ppo: bool = True  # also PPO on V4
    split: Literal["test", "dev", "train"] = (
        "dev"  # of the prompts; dev, since a setting is compared here
    )
    samples: int = 4  # answers per prompt
    at_once: int = 2  # seeds side by side


def commands(settings: Settings, seed: int) -> list[list[str]]:
    """What makes one seed's models with the other head, in order."""
    target = settings.out / f"{seed}-logprobs"
    for name in ("sft", "reward-safety"):
        if not (target / name).exists():
            source = require(settings.out / str(seed) / name, "python -m experiments.seeds")
            shutil.copytree(source, target / name)
    here = ["--out", str(target), "--seed", str(seed), "--threads", "1"]
    lines = [
        ["reward.py", "--axis", "helpfulness", "--head", "logprobs", *here],
        ["rejection_sampling.py", *here],
    ]
    if settings.ppo:
        lines.append(["ppo.py", *here])
    return lines


# ---- what is measured ----


@torch.no_grad()
def sft_logprob(
    sft: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], answers: list[Answer]
) -> float:
    """Mean log-probability per token that SFT gives to the answers of another version, in nats."""
    encoded = encode_prompts(tokenizer, prompts, sft.args.max_seq_len)
    tokens, mask = pad_answers(
        [encoded[answer.index] for answer in answers],
        [answer.ids for answer in answers],
        torch.device("cpu"),
    )
    total = 0.0
    for picked, length in micro_batches(mask, list(range(len(answers))), 16384):
        logprobs = answer_logprobs(sft, tokens[picked, :length], mask[picked, :length])
        total += logprobs.sum().item()
    return total / mask.sum().item()


def measure(settings: Settings, seed: int) -> dict[str, dict]:
    """Version -> the heads' summaries, entropy and likelihood, the variant's win rate over the
    default; "ppo" -> head -> win rates of V4-PPO over V4.
    """
    prompts = read_prompts(world.ensure() / f"prompts-{settings.split}.jsonl")
    roots = {"default": settings.out / str(seed), "logprobs": settings.out / f"{seed}-logprobs"}
    sft, tokenizer = load_model(roots["default"] / "sft")
    table = {}
    judged = {}
    for version in VERSIONS:
        table[version] = {}
        judged[version] = {}
        for head, root in roots.items():
            if not is_finished(root / version):
                continue
            answers = sample_answers(
                *load_model(root / version),
                prompts,
                key=(seed, "evaluation"),
                samples=settings.samples,
            )
            judgements = measures.judge(prompts, answers)
            judged[version][head] = judgements
            means = {}
            for name, value in measures.summary(prompts, judgements).items():
                means[name] = value.mean
            tokens = sum(len(answer.ids) for answer in answers)
            means["entropy"] = -sum(answer.logprob for answer in answers) / tokens
            means["log-probability under SFT"] = sft_logprob(sft, tokenizer, prompts, answers)
            table[version][head] = means
        if len(judged[version]) == 2:
            by_head = judged[version]
            table[version]["win"] = measures.compare(
                prompts, by_head["logprobs"], by_head["default"]
            )
    table["ppo"] = {}
    for head, judgements in judged["rlhf-v4-ppo"].items():
        table["ppo"][head] = measures.compare(prompts, judgements, judged["rlhf-v4"][head])
    return table


# ---- over seeds ----


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """Win rates, one per seed, of what was run: the variant's over the default, PPO's over V4."""
    rows = {}
    for axis in AXES:
        for version in VERSIONS:
            wins = [result[seed][version].get("win") for seed in seeds]
            name = f"{version}, logprobs against the default, {axis}"
            rows[name] = [win[axis][0] for win in wins if win]
        for head in HEADS:
            wins = [result[seed]["ppo"].get(head) for seed in seeds]
            name = f"V4-PPO against V4, {head}, {axis}"
            rows[name] = [win[axis][0] for win in wins if win]
    return {name: rates for name, rates in rows.items() if rates}


def _mean(result: dict, version: str, head: str, what: str) -> float:
    """A number of a version, the mean over the seeds that have it."""
    values = [one[version][head][what] for one in result.values() if head in one[version]]
    return sum(values) / len(values)


def versions_table(result: dict) -> Table:
    """Both heads' numbers, version by version."""
    first = next(iter(result.values()))
    names = list(first["rlhf-v1"]["default"])
    cells = []
    for version in VERSIONS:
        for head in HEADS:
            if head in first[version]:
                means = [_mean(result, version, head, what) for what in names]
                line = [f"{named(version)}, {head}"]
                cells.append(line + [f"{mean:.3f}" for mean in means])
    columns = [""] + [name.replace("_", " ") for name in names]
    caption = "Both heads in the rounds, on dev prompts at temperature 1, means over seeds."
    small_print = "Entropy and log-probability in nats a token."
    return Table(caption, columns, cells, small_print)


def section(result: dict) -> Section:
    """Win rates of the other head, and whether it only rewards likely text."""
    rows = claims(result, list(result))
    corrected = claimed(rows)
    name = "rlhf-v4, logprobs against the default, helpfulness"
    ppo = "V4-PPO against V4, logprobs, helpfulness"

    def both(what: str) -> str:
        """V4's number with the other head, and with the default one."""
        other = _mean(result, "rlhf-v4", "logprobs", what)
        return f"{other:.3f} against {_mean(result, 'rlhf-v4', 'default', what):.3f}"

    return Section(
        "Is a reward model that also reads log-probabilities better under RLHF?",
        [
            (
                f"Perhaps: its V4 wins {plus_minus(corrected[name])} over the default's V4 in"
                f" helpfulness, {in_seeds(rows[name], lambda rate: rate > 0.5)}, which is"
                f" {verdict(corrected[name], 0.5)} once all comparisons are corrected for."
            ),
            claims_table(
                "Win rates: above 0.5 the first one wins.",
                rows,
                "Logprobs: a head that also reads the answer's log-probabilities, not the paper's,"
                " off by default (`reward.py --head logprobs`). The default is the paper's scalar"
                " head on the last state.",
            ),
            versions_table(result),
            Figure(
                "Two heads of the helpfulness model in the rounds.",
                file=results.RESULTS / "reward_heads.png",
            ),
            (
                f"It does not just reward likely text. In V4 helpfulness is {both('helpfulness')}"
                " for the default; SFT finds the answers about as likely"
                f" ({both('log-probability under SFT')}), the policy's entropy is"
                f" {both('entropy')}, an answer has {both('tokens')} tokens. PPO on that V4 wins"
                f" {plus_minus(corrected[ppo])} over it and makes text likelier: the"
                " log-probability under SFT goes to"
                f" {_mean(result, 'rlhf-v4-ppo', 'logprobs', 'log-probability under SFT'):.3f}, the"
                f" entropy to {_mean(result, 'rlhf-v4-ppo', 'logprobs', 'entropy'):.3f}."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Both heads' scores, length and entropy by version, a thin line per seed."""
    labels = ("helpfulness", "safety", "tokens", "entropy")
    figure, panels = draw_panels(len(labels), width=3)
    for panel, label in zip(panels, labels, strict=True):
        for head, color in zip(HEADS, ("tab:blue", "tab:orange"), strict=True):
            names = []
            for name in VERSIONS:
                if all(head in one[name] for one in result.values()):
                    names.append(name)
            x = range(len(names))
            lines = [[one[name][head][label] for name in names] for one in result.values()]
            for line in lines:
                panel.plot(x, line, color=color, alpha=0.35, linewidth=1)
            means = [sum(column) / len(column) for column in zip(*lines, strict=True)]
            panel.plot(x, means, color=color, linewidth=2.5, marker="o", label=head)
        panel.set(title=label)
        panel.set_xticks(x, [named(name) for name in names])  # those of logprobs
        panel.grid(alpha=0.3)
    panels[0].legend()
    save_picture(figure, file)


def main() -> None:
    # 1. the chain with the other head
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    jobs = {}
    for seed in results.missing_seeds("reward_heads", settings):
        jobs[f"seed-{seed}-logprobs"] = commands(settings, seed)
    side_by_side(jobs, settings.out, settings.at_once)

    # 2. version by version
    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("reward_heads", settings, measure_seed)

    # 3. over seeds
    results.finish("reward_heads", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
