"""The temperature of best of N (Fig. 8): which one gives the highest maximum, and does it move over
the rounds?

    python experiments/figure08_temperature.py --seeds 1,2,3      after experiments/seeds.py

For SFT and every later version: answers to test prompts at several temperatures, scored by the
reward models of the round that sampled from this version (the newest version: its own). For each
the highest reward of N answers (order statistics, unbiased), the annotator's score of the picks,
and the temperature with the highest maximum at the rounds' own K, with the middle 95 % of where it
falls when items are drawn anew (bootstrap). Beside it what the rounds themselves chose on dev
prompts. Writes experiments/results/figure08.json and figure08.png.
"""

import json
import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, world
from experiments.common import (
    RESULTS,
    best_of_n,
    draw_curves,
    draw_panels,
    judges_of,
    rows_of_intervals,
    sampled_scores,
    save_result,
    sizes_up_to,
    versions,
)
from rejection_sampling import Settings as RoundSettings
from runtime import parse_settings, run, set_threads

ROUNDS = ("sft", "rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4")  # each samples for the next one


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2, 1.4)  # as in the paper's figure
    samples: int = 32  # answers per prompt and temperature: the largest N
    prompts: int = 200  # so many of the test prompts, the same for every seed


def best_temperature(
    maxima: dict[float, list[float]], clusters: list[str], draws: int = 1000
) -> tuple[float, float, float]:
    """The temperature with the highest mean of maxima {temperature: one per prompt}, and the middle
    95 % of the temperatures that win when clusters are drawn with replacement."""
    groups, rng, winners = defaultdict(list), random.Random(0), []
    for i, cluster in enumerate(clusters):
        groups[cluster].append(i)
    sums = {
        t: [sum(values[i] for i in group) for group in groups.values()]
        for t, values in maxima.items()
    }
    # draws have unequal numbers of prompts, the same ones for every temperature
    for _ in range(draws):
        drawn = rng.choices(range(len(groups)), k=len(groups))
        winners.append(max(sums, key=lambda t: sum(sums[t][i] for i in drawn)))
    winners.sort()
    return (
        max(maxima, key=lambda t: sum(maxima[t])),
        winners[round(0.025 * draws)],
        winners[round(0.975 * draws) - 1],
    )


def measure(root: Path, prompts: list[dict], s: Settings, seed: int) -> dict:
    names, found, sizes = (
        [name for name in versions(root) if name in ROUNDS],
        {},
        sizes_up_to(s.samples),
    )
    k = max(n for n in sizes if n <= RoundSettings.samples)
    for i, name in enumerate(names):
        judges, curves = judges_of(root, names[: i + 2]), {}
        for t in s.temperatures:
            scores = sampled_scores(
                root / name,
                prompts,
                {"reward": judges},
                samples=s.samples,
                seed=seed,
                temperature=t,
            )
            curves[t] = best_of_n(scores["reward"], scores["annotator"], sizes)
        maxima = {t: curve["maximum"][sizes.index(k)].tolist() for t, curve in curves.items()}
        record = root / names[i + 1] / "stage.json" if i + 1 < len(names) else None
        found[name] = {
            "maximum": {
                t: rows_of_intervals(curve["maximum"], prompts) for t, curve in curves.items()
            },
            "pick": {t: rows_of_intervals(curve["pick"], prompts) for t, curve in curves.items()},
            f"best at N = {k}": best_temperature(
                maxima, [measures.cluster(prompt) for prompt in prompts]
            ),
            "chosen by the round": (
                json.loads(record.read_text())["results"].get("temperature") if record else None
            ),
        }
        print(
            f"{root} {name}: best of {k} at temperature {found[name][f'best at N = {k}']}, chosen"
            f" by the round {found[name]['chosen by the round']}"
        )
    return found


def draw(result: dict, s: Settings) -> None:
    figure, panels = draw_panels(5, width=3.3)
    first = next(iter(result.values()))
    newest, sizes = list(first)[-1], sizes_up_to(s.samples)
    shown = [("sft", "maximum"), (newest, "maximum"), ("sft", "pick"), (newest, "pick")]
    for panel, (name, what) in zip(panels, shown, strict=False):
        for i, t in enumerate(s.temperatures):
            draw_curves(
                panel,
                sizes,
                [one[name][what][t] for one in result.values()],
                f"T {t}",
                color=f"C{i}",
            )
        panel.set(
            title=(
                f"{name}: {'highest reward' if what == 'maximum' else 'annotator on the pick'} of N"
            ),
            xlabel="N",
        )
        panel.set_xscale("log", base=2)
        panel.legend(fontsize=7)
    for i, (seed, one) in enumerate(result.items()):
        best = [
            next(value for key, value in row.items() if key.startswith("best"))
            for row in one.values()
        ]
        x = [j + 0.1 * i for j in range(len(one))]
        panels[4].errorbar(
            x,
            [b[0] for b in best],
            [[max(0, b[0] - b[1]) for b in best], [max(0, b[2] - b[0]) for b in best]],
            fmt="o",
            label=f"seed {seed}",
        )
    panels[4].set(
        title="best temperature by version", xticks=range(len(first)), xticklabels=list(first)
    )
    panels[4].set_ylim(min(s.temperatures) - 0.1, max(s.temperatures) + 0.4)
    panels[4].tick_params(axis="x", rotation=30)
    panels[4].legend(fontsize=7)
    figure.savefig(RESULTS / "figure08.png", dpi=110)


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    everything = read_prompts(world.ensure() / "prompts-test.jsonl")
    prompts = random.Random(0).sample(everything, min(s.prompts, len(everything)))
    for seed in s.seeds:
        result[str(seed)] = measure(s.out / str(seed), prompts, s, seed)
        save_result(
            "figure08", {"N": sizes_up_to(s.samples), "prompts": len(prompts), "seeds": result}, s
        )
        draw(result, s)


if __name__ == "__main__":
    run(main)
