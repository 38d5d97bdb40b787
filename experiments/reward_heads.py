"""Two heads of the helpfulness model under RLHF: the paper's scalar one, and one that also reads
log-probabilities.

    python experiments/reward_heads.py --seeds 1,2,3      after experiments/seeds.py

From copies of the same SFT and safety model OUT/SEED-logprobs runs `reward.py --axis helpfulness
--head logprobs` (a departure from the paper), the rounds, and PPO on V4; resumable. Then each
version beside that of OUT/SEED (PPO where it was run there), on dev prompts at temperature 1: the
annotator's scores, the variant's win rate over the default, and what a reward for likely text would
show: the tokens of an answer, the policy's entropy (mean of -log π over what it sampled, nats a
token), and how likely SFT finds its answers. Last, V4-PPO against the V4 that it started from. Win
rates are printed with intervals over seeds, corrected for all that are read side by side. Writes
experiments/results/reward_heads.json and .png.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import eval as measures
from data import read_prompts, world
from experiments.common import (
    RESULTS,
    draw_panels,
    load_result,
    print_claims,
    save_result,
    side_by_side,
)
from ppo import answer_logprobs, micro_batches, pad_answers
from runtime import (
    encode_prompts,
    is_finished,
    load_model,
    parse_settings,
    require,
    run,
    set_threads,
)

VERSIONS = ("rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4", "rlhf-v4-ppo")


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    ppo: bool = True  # also PPO on V4
    split: str = "dev"  # of the prompts; dev, since a setting is compared here
    samples: int = 4  # answers per prompt
    at_once: int = 2  # seeds side by side


def commands(s: Settings, seed: int) -> list[list[str]]:
    """What makes one seed's models with the other head, in order."""
    target, options = s.out / f"{seed}-logprobs", ["--seed", str(seed), "--threads", "1"]
    for name in ("sft", "reward-safety"):
        if not (target / name).exists():
            shutil.copytree(
                require(s.out / str(seed) / name, "python experiments/seeds.py"), target / name
            )
    here = ["--out", str(target), *options]
    found = [
        ["reward.py", "--axis", "helpfulness", "--head", "logprobs", *here],
        ["rejection_sampling.py", *here],
    ]
    return found + [["ppo.py", *here]] * s.ppo


@torch.no_grad()
def sft_logprob(sft, tokenizer, prompts: list[dict], rows: list[dict]) -> float:
    """Mean log-probability per token that SFT gives to the answers of another version, in nats."""
    encoded = encode_prompts(tokenizer, prompts, sft.args.max_seq_len)
    tokens, mask = pad_answers(
        [encoded[row["index"]] for row in rows],
        [row["answer_ids"] for row in rows],
        torch.device("cpu"),
    )
    total = sum(
        answer_logprobs(sft, tokens[picked, :length], mask[picked, :length]).sum().item()
        for picked, length in micro_batches(mask, list(range(len(rows))), 16384)
    )
    return total / mask.sum().item()


def measure(s: Settings, seed: int, prompts: list[dict]) -> dict[str, dict]:
    """Version -> the heads' summaries, entropy and likelihood, the variant's win rate over the
    default; "ppo" -> head -> win rates of V4-PPO over V4."""
    roots = {"default": s.out / str(seed), "logprobs": s.out / f"{seed}-logprobs"}
    sft, tokenizer = load_model(roots["default"] / "sft")
    table, judged = {}, {}
    for version in VERSIONS:
        judged[version] = {
            head: measures.evaluate(
                *load_model(root / version), prompts, seed=seed, samples=s.samples
            )
            for head, root in roots.items()
            if is_finished(root / version)
        }
        table[version] = {
            head: {
                **{name: value.mean for name, value in measures.summary(prompts, rows).items()},
                "entropy": (
                    -sum(row["logprob"] for row in rows)
                    / sum(len(row["answer_ids"]) for row in rows)
                ),
                "log-probability under SFT": sft_logprob(sft, tokenizer, prompts, rows),
            }
            for head, rows in judged[version].items()
        }
        if len(judged[version]) == 2:
            table[version]["win"] = measures.compare(
                prompts, judged[version]["logprobs"], judged[version]["default"]
            )
    table["ppo"] = {
        head: measures.compare(prompts, rows, judged["rlhf-v4"][head])
        for head, rows in judged["rlhf-v4-ppo"].items()
    }
    return table


def draw(result: dict, seeds: tuple[int, ...]) -> None:
    """experiments/results/reward_heads.png: both heads' scores, length and entropy by version, a
    thin line per seed.
    """
    labels = ("helpfulness", "safety", "tokens", "entropy")
    figure, panels = draw_panels(len(labels), width=3)
    for panel, label in zip(panels, labels, strict=True):
        for head, color in (("default", "tab:blue"), ("logprobs", "tab:orange")):
            names = [
                name for name in VERSIONS if all(head in result[str(seed)][name] for seed in seeds)
            ]
            lines = [[result[str(seed)][name][head][label] for name in names] for seed in seeds]
            for line in lines:
                panel.plot(range(len(names)), line, color=color, alpha=0.35, linewidth=1)
            panel.plot(
                range(len(names)),
                [sum(column) / len(column) for column in zip(*lines, strict=True)],
                color=color,
                linewidth=2.5,
                marker="o",
                label=head,
            )
        panel.set(title=label)
        # those of logprobs
        panel.set_xticks(range(len(names)), [name.removeprefix("rlhf-").upper() for name in names])
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(RESULTS / "reward_heads.png", dpi=110)


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """Win rates, one per seed, of what was run: the variant's over the default, PPO's over V4."""
    rows = {}
    for axis in ("helpfulness", "safety"):
        for version in VERSIONS:
            found = [result[seed][version].get("win") for seed in seeds]
            name = f"{version}, logprobs against the default, {axis}"
            rows[name] = [win[axis][0] for win in found if win]
        for head in ("default", "logprobs"):
            found = [result[seed]["ppo"].get(head) for seed in seeds]
            name = f"V4-PPO against V4, {head}, {axis}"
            rows[name] = [win[axis][0] for win in found if win]
    return {name: rates for name, rates in rows.items() if rates}


def main() -> None:
    # 1. the chain with the other head
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    prompts = read_prompts(world.ensure() / f"prompts-{s.split}.jsonl")
    load_result("reward_heads", s)  # refuses before hours of training, not after
    side_by_side({f"seed-{seed}-logprobs": commands(s, seed) for seed in s.seeds}, s.out, s.at_once)

    # 2. version by version
    for seed in s.seeds:
        save_result(
            "reward_heads",
            load_result("reward_heads", s) | {str(seed): measure(s, seed, prompts)},
            s,
        )
    result = load_result("reward_heads", s)
    draw(result, s.seeds)
    for version in VERSIONS:
        print(version)
        for head in ("default", "logprobs"):
            found = [
                result[str(seed)][version] for seed in s.seeds if head in result[str(seed)][version]
            ]
            print(
                f"    {head:<10}",
                ", ".join(
                    f"{name} {sum(row[head][name] for row in found) / len(found):.3f}"
                    for name in (found[0][head] if found else ())
                ),
            )
    print_claims("Win rates", claims(result, [str(seed) for seed in s.seeds]))


if __name__ == "__main__":
    run(main)
