"""Best of N (Fig. 7): the highest reward among N answers rises with N, the median stays; does the
annotator agree?

    python experiments/figure07_best_of_n.py --seeds 1,2,3      after experiments/seeds.py

SFT and the newest model of each seed, both scored by the newest reward models, on test prompts at
temperature 1. Every N is estimated from the same answers (order statistics, unbiased), so
neighbouring points are not independent. Beside the rewards the annotator's score of the very
answers that the reward picks, and the score of the annotator's own picks: the ceiling. Writes
experiments/results/figure07.json (per seed; intervals over items) and figure07.png. Whether the
pick of N is better than one answer is printed with intervals over seeds, corrected for all N and
both models.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import read_prompts, world
from experiments.common import (
    RESULTS,
    best_of_n,
    draw_curves,
    draw_panels,
    judges_of,
    print_claims,
    rows_of_intervals,
    sampled_scores,
    save_result,
    sizes_up_to,
    versions,
)
from runtime import parse_settings, run, set_threads


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    samples: int = 64  # answers per prompt: the largest N
    prompts: int = 400  # so many of the test prompts, the same for every seed


def measure(root: Path, prompts: list[dict], samples: int, seed: int) -> dict:
    """{"sft" and "newest": {maximum, median, pick, ceiling: an interval per N}}."""
    names, found = versions(root), {}
    judges = judges_of(root, names)
    for label, name in (("sft", "sft"), ("newest", names[-1])):
        scores = sampled_scores(
            root / name, prompts, {"reward": judges}, samples=samples, seed=seed
        )
        curves = best_of_n(scores["reward"], scores["annotator"], sizes_up_to(samples))
        curves["ceiling"] = best_of_n(
            scores["annotator"], scores["annotator"], sizes_up_to(samples)
        )["maximum"]
        found[label] = {
            "version": name,
            **{what: rows_of_intervals(values, prompts) for what, values in curves.items()},
        }
        print(
            f"{root} {name}: "
            + "; ".join(
                f"N = {n}: maximum {found[label]['maximum'][i].mean:.2f}, median"
                f" {found[label]['median'][i].mean:.2f}, annotator of the pick"
                f" {found[label]['pick'][i]}"
                for i, n in enumerate(sizes_up_to(samples))
                if i % 2 == 0
            )
        )
    return found


def draw(result: dict, sizes: list[int]) -> None:
    figure, panels = draw_panels(2)
    for model, color in (("sft", "tab:blue"), ("newest", "tab:orange")):
        name = next(iter(result.values()))[model]["version"]
        for panel, what, style in (
            (panels[0], "maximum", "-"),
            (panels[0], "median", "--"),
            (panels[1], "pick", "-"),
            (panels[1], "ceiling", ":"),
        ):
            label = f"{name}, " + {
                "pick": "of the reward's pick",
                "ceiling": "of its own pick",
            }.get(what, what)
            draw_curves(
                panel,
                sizes,
                [one[model][what] for one in result.values()],
                label,
                color=color,
                linestyle=style,
            )
    panels[0].set(title="reward (a logit) among N answers", xlabel="N")
    panels[1].set(title="annotator's score", xlabel="N", ylim=(0, 1))
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(RESULTS / "figure07.png", dpi=110)


def claims(found: dict, sizes: list[int]) -> dict[str, list[float]]:
    """{"model, N": what best of N changes in the annotator's score, one per seed}.

    found: {seed: what `measure` gives}.
    """
    rows = {}
    for model in ("sft", "newest"):
        curves = [table[model]["pick"] for table in found.values()]
        for i, n in list(enumerate(sizes))[1:]:
            rows[f"{model}, N = {n}"] = [curve[i][0] - curve[0][0] for curve in curves]
    return rows


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    everything = read_prompts(world.ensure() / "prompts-test.jsonl")
    prompts = random.Random(0).sample(everything, min(s.prompts, len(everything)))
    for seed in s.seeds:
        result[str(seed)] = measure(s.out / str(seed), prompts, s.samples, seed)
        save_result(
            "figure07", {"N": sizes_up_to(s.samples), "prompts": len(prompts), "seeds": result}, s
        )
        draw(result, sizes_up_to(s.samples))
    rows = claims(result, sizes_up_to(s.samples))
    print_claims("Annotator's score, pick of N - one answer", rows)


if __name__ == "__main__":
    run(main)
