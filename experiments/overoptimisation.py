"""Over-optimisation: the reward of the best of N rises for ever; does the annotator's score of the
same answers?

    python experiments/overoptimisation.py --seeds 1,2,3      after experiments/seeds.py

Many answers of one version (SFT) to some test prompts at temperature 1, picked by several versions
of the reward models: the first ones and those of every round. Every N is estimated from the same
answers (order statistics, unbiased). Writes experiments/results/overoptimisation.json (per seed;
intervals over items) and overoptimisation.png. What the last two doublings of N change in the
annotator's score is printed with intervals over seeds, corrected for the number of reward models.
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
from reward import AXES
from runtime import parse_settings, run, set_threads


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    policy: str = "sft"  # the version that answers
    samples: int = 256  # answers per prompt: the largest N
    prompts: int = 100  # so many of the test prompts, the same for every seed


def measure(root: Path, prompts: list[dict], s: Settings, seed: int) -> dict:
    """{reward models: {"proxy": their reward of the best of N, "annotator": its score of the same
    answers}}, intervals per N.
    """
    sizes, judges, found = sizes_up_to(s.samples), {"first": judges_of(root, [])}, {}
    for name in versions(root):
        if all((root / name / f"reward-{axis}").is_dir() for axis in AXES):
            judges[name] = judges_of(root, [name])
    scores = sampled_scores(root / s.policy, prompts, judges, samples=s.samples, seed=seed)
    for name in [*judges, "annotator"]:
        curves = best_of_n(scores[name], scores["annotator"], sizes)
        found[name] = {
            "proxy": rows_of_intervals(curves["maximum"], prompts),
            "annotator": rows_of_intervals(curves["pick"], prompts),
        }
        print(
            f"{root} reward models {name}: annotator's score of the best of N "
            + ", ".join(
                f"{n}: {one.mean:.3f}"
                for n, one in zip(sizes, found[name]["annotator"], strict=True)
            )
        )
    return found


def draw(result: dict, sizes: list[int]) -> None:
    figure, panels = draw_panels(2)
    for i, name in enumerate(next(iter(result.values()))):
        for panel, what in zip(panels, ("proxy", "annotator"), strict=True):
            if (name, what) != ("annotator", "proxy"):
                draw_curves(
                    panel,
                    sizes,
                    [one[name][what] for one in result.values()],
                    f"{name}'s pick",
                    color=f"C{i}",
                )
    panels[0].set(title="reward (a logit) of the best of N", xlabel="N")
    panels[1].set(title="annotator's score of the same answers", xlabel="N", ylim=(0, 1))
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.savefig(RESULTS / "overoptimisation.png", dpi=110)


def claims(found: dict, sizes: list[int]) -> dict[str, list[float]]:
    """{reward models: what the last two doublings change in the annotator's score, one per seed}.

    found: {seed: what `measure` gives}; versions that a seed lacks are left out.
    """
    tables, rows = list(found.values()), {}
    for name in [name for name in tables[0] if all(name in table for table in tables)]:
        curves = [table[name]["annotator"] for table in tables]
        title = f"picked by {name}, N = {sizes[-3]} to {sizes[-1]}"
        rows[title] = [curve[-1][0] - curve[-3][0] for curve in curves]
    return rows


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    everything = read_prompts(world.ensure() / "prompts-test.jsonl")
    prompts = random.Random(0).sample(everything, min(s.prompts, len(everything)))
    for seed in s.seeds:
        result[str(seed)] = measure(s.out / str(seed), prompts, s, seed)
        save_result(
            "overoptimisation",
            {
                "N": sizes_up_to(s.samples),
                "policy": s.policy,
                "prompts": len(prompts),
                "seeds": result,
            },
            s,
        )
        draw(result, sizes_up_to(s.samples))
    if s.samples >= 4:
        print_claims("Change of the annotator's score", claims(result, sizes_up_to(s.samples)))


if __name__ == "__main__":
    run(main)
