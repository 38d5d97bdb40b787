"""Does the reward model see content, or only style? Two answers to an unseen prompt, alike in
style, one of them right.

    python experiments/reward_sees_content.py --seeds 1,2,3      after experiments/seeds.py

The SFT model's own log-probability nearly always tells which answer is right; the default, a scalar
head on its last state trained on sampled pairs, does not at all. Beside it: with pairs that people
wrote, alike in style and one of them wrong (many of them, in small steps: `reward.py --mix-share
0.65,0`); with two more layers for the head to read from, too (`common.deepen`); with four times as
many pairs; and, a departure from the paper, a head that reads the answer's log-probabilities
(`--head logprobs`). Each is measured where it counts, too: on pairs that the policy sampled, and by
the annotator's score of the best of 16 answers. Writes experiments/results/reward_sees_content.json
and .png. Each arm's difference from the default is printed, paired by seed, its interval over seeds
corrected for the number of arms and measures.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import eval as measures
from data import Tokenizer, encode_dialog, encode_prompt, read_prompts, world
from experiments.common import (
    RESULTS,
    accuracy,
    draw_panels,
    fresh_pairs,
    load_result,
    over_seeds,
    print_claims,
    print_percent,
    save_result,
    score_lists,
    train,
    training_pairs,
)
from model import Transformer
from rejection_sampling import best_of
from reward import score
from runtime import load_model, parse_settings, run, sample_answers, set_threads
from sft import answer_loss

SMALL_STEPS = dict(batch_tokens=500, learning_rate=8e-4)
ARMS = {  # name: (written pairs, changes of reward.py's settings)
    "the default": (0, {}),
    "9,000 written pairs": (9000, SMALL_STEPS),
    "9,000 written pairs, 2 more layers": (9000, SMALL_STEPS | dict(more_layers=2)),
    "36,000 written pairs, 2 more layers": (36_000, SMALL_STEPS | dict(more_layers=2)),
    "reads log-probabilities (not the paper's)": (0, dict(head="logprobs")),
}


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    arms: tuple[int, ...] = (0, 1, 2, 3, 4)  # which of the arms, in the order of ARMS
    pairs: int = 3000  # pairs of the test
    split: str = "test"  # of its prompts


def logprob(model: Transformer, tokenizer: Tokenizer, prompt: dict, answer: str) -> float:
    """The answer's summed log-probability under a language model, in nats."""
    with torch.inference_mode():
        dialog = encode_dialog(
            tokenizer, [*prompt["prompt"], {"role": "assistant", "content": answer}]
        )
        return -answer_loss(model, [dialog])[0].item()


def share_right(
    right: list[float], wrong: list[float], test: list[dict]
) -> dict[str, measures.Interval]:
    """Share of the written pairs whose right answer has the higher score, over all and by family.
    """
    chosen = measures.accuracy_intervals(
        right, wrong, [row["family"] for row in test], list(map(measures.cluster, test))
    )
    return {"all": chosen.pop("average"), **chosen}


def main() -> None:
    s = parse_settings(Settings, __doc__)
    result = load_result("reward_sees_content", s)
    set_threads(1)
    prompts = [
        prompt
        for prompt in read_prompts(world.ensure() / f"prompts-{s.split}.jsonl")
        if not prompt["is_safety"]
    ]
    test = [
        row for row in world.written_pairs(s.split, s.pairs) if row["family"] not in world.PROBES
    ]
    wrong = [row["rejected"] if row["chosen"] == row["right"] else row["chosen"] for row in test]
    both = [
        row | {"chosen": row["right"], "rejected": other}
        for row, other in zip(test, wrong, strict=True)
    ]
    for seed in s.seeds:
        sft, tokenizer = load_model(s.out / str(seed) / "sft")
        sampled = fresh_pairs(s.out, seed, "helpfulness", 2, s.split)
        answers = sample_answers(sft, tokenizer, prompts, key=(seed, "sees content"), samples=16)
        entry = result.setdefault(str(seed), {})
        entry["SFT's own log-probability"] = {
            "content": share_right(
                *(
                    [logprob(sft, tokenizer, row, row[side]) for row in both]
                    for side in ("chosen", "rejected")
                ),
                test,
            )
        }
        for name in [list(ARMS)[i] for i in s.arms]:
            written, changes = ARMS[name]
            rows = [
                row for row in training_pairs(s.out, seed, "helpfulness") if not row.get("extra")
            ]
            rows += [row | {"extra": True} for row in world.written_pairs("train", written, seed)]
            started = time.process_time()
            model, _ = train(s.out, seed, "helpfulness", rows, **changes)
            seconds = time.process_time() - started
            rewards = score(
                model,
                [
                    encode_prompt(tokenizer, prompts[row["index"]]["prompt"]) + row["answer_ids"]
                    for row in answers
                ],
            )
            best = best_of(rewards, [row["index"] for row in answers])
            picks = [world.helpfulness(prompts[i], answers[k]["answer"]) for i, k in best.items()]
            entry[name] = {
                "content": share_right(*score_lists(model, tokenizer, both), test),
                "cpu_seconds": seconds,
                "sampled pairs": accuracy(score_lists(model, tokenizer, sampled), sampled),
                "best of 16": measures.interval(
                    picks, [measures.cluster(prompts[i]) for i in best]
                ),
            }
            print(
                f"seed {seed}, {name}: content {entry[name]['content']['all']}, sampled pairs"
                f" {entry[name]['sampled pairs']['average']}, best of 16"
                f" {entry[name]['best of 16']}, {seconds:.0f} s",
                flush=True,
            )
        save_result("reward_sees_content", result, s)
    draw_and_print([load_result("reward_sees_content", s)[str(seed)] for seed in s.seeds])


def claims(found: list[dict]) -> dict[str, list[float]]:
    """{"arm, measure": its difference from the default, one per seed}."""
    rows = {}
    for name in [name for name in list(ARMS)[1:] if all(name in one for one in found)]:
        columns = {"content": "all", "sampled pairs": "average", "best of 16": None}
        for measure, column in columns.items():
            pairs = [(one[name][measure], one["the default"][measure]) for one in found]
            if column:
                pairs = [(arm[column], default[column]) for arm, default in pairs]
            rows[f"{name}, {measure}"] = [arm[0] - default[0] for arm, default in pairs]
    return rows


def draw_and_print(found: list[dict]) -> None:
    """The tables over seeds, and experiments/results/reward_sees_content.png: content against the
    other two measures.
    """
    names = [name for name in ARMS if all(name in one for one in found)]
    print_percent(
        f"The right one of two written answers, {len(found)} seeds",
        {
            name: over_seeds([one[name]["content"] for one in found])
            for name in ["SFT's own log-probability", *names]
        },
    )
    print_percent(
        "Pairs that the policy sampled, by rating",
        {name: over_seeds([one[name]["sampled pairs"] for one in found]) for name in names},
    )
    print_percent(
        "Annotator's helpfulness of the best of 16; CPU seconds of training "
        + ", ".join(
            f"{sum(one[name]['cpu_seconds'] for one in found) / len(found):.0f}" for name in names
        ),
        {
            name: {"best of 16": measures.interval([one[name]["best of 16"][0] for one in found])}
            for name in names
        },
    )
    if "the default" in names:
        print_claims("Difference from the default", claims(found))
    figure, panels = draw_panels(3, 3.2)
    for panel, (title, kind, column) in zip(
        panels,
        (
            ("right content, style alike", "content", "all"),
            ("sampled pairs", "sampled pairs", "average"),
            ("score of the best of 16", "best of 16", 0),
        ),
        strict=True,
    ):
        values = [
            [
                one[name][kind][column] if kind == "best of 16" else one[name][kind][column][0]
                for one in found
            ]
            for name in names
        ]
        panel.barh(names, [sum(v) / len(v) for v in values], color="tab:blue", alpha=0.4)
        for y, v in enumerate(values):
            panel.plot(v, [y] * len(v), "k.", markersize=4)
        panel.set(title=title, xlim=(0.4, 1))
        panel.invert_yaxis()
        panel.tick_params(labelleft=panel is panels[0])
    figure.savefig(RESULTS / "reward_sees_content.png", dpi=110)


if __name__ == "__main__":
    run(main)
