"""How the scores move over the versions (Fig. 20): the reward models' distributions, the
annotator's beside them.

    python experiments/figure20_score_drift.py --seeds 1,2,3      after experiments/seeds.py

Each version's answers to the test prompts at temperature 1: helpfulness on harmless prompts, safety
on unsafe ones, as probabilities (sigmoid). Scored by the newest reward models (the picture) and by
the first ones: where the two drift apart, or move on while the annotator stands still, the reward
is running away from what it stands for. Writes experiments/results/figure20.json (per seed means
with intervals over items, and histograms) and figure20.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import eval as measures
from data import read_prompts, world
from experiments.common import RESULTS, draw_panels, judges_of, save_result, versions
from reward import AXES
from runtime import load_model, parse_settings, run, sample_answers, set_threads

BINS = 20  # of the histograms, between 0 and 1


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    samples: int = 2  # answers per test prompt


def measure(root: Path, prompts: list[dict], samples: int, seed: int) -> dict:
    """{version: {axis: {judge: {"mean": interval, "histogram": shares of answers}}}}."""
    names, found = versions(root), {}
    judges = {
        "first reward model": judges_of(root, []),
        "newest reward model": judges_of(root, names),
    }
    for name in names:
        rows = sample_answers(
            *load_model(root / name), prompts, key=(seed, "evaluation"), samples=samples
        )
        views = {}
        for which, judge in judges.items():
            judge.rewards(prompts, rows)
            views[which] = [
                measures.sigmoid(row[measures.axis_of(prompts[row["index"]])]) for row in rows
            ]
        views["annotator"] = [
            row[measures.axis_of(prompts[row["index"]])] for row in measures.judge(prompts, rows)
        ]
        found[name] = {axis: {} for axis in AXES}
        for axis in AXES:
            picked = [
                i for i, row in enumerate(rows) if measures.axis_of(prompts[row["index"]]) == axis
            ]
            clusters = [measures.cluster(prompts[rows[i]["index"]]) for i in picked]
            for which, values in views.items():
                values = [values[i] for i in picked]
                counts = torch.histc(torch.tensor(values), BINS, 0, 1) / len(values)
                found[name][axis][which] = {
                    "mean": measures.interval(values, clusters),
                    "histogram": counts.tolist(),
                }
            print(
                f"{root} {name} {axis}: "
                + ", ".join(f"{which} {one['mean']}" for which, one in found[name][axis].items())
            )
    return found


def draw(result: dict) -> None:
    figure, panels = draw_panels(4, width=3.4)
    names = [
        name for name in next(iter(result.values())) if all(name in one for one in result.values())
    ]
    centres = [(i + 0.5) / BINS for i in range(BINS)]
    shown = [(axis, which) for axis in AXES for which in ("newest reward model", "annotator")]
    for panel, (axis, which) in zip(panels, shown, strict=True):
        for i, name in enumerate(names):
            histograms = [one[name][axis][which]["histogram"] for one in result.values()]
            mean = [sum(column) / len(column) for column in zip(*histograms, strict=True)]
            panel.step(centres, mean, where="mid", label=name, color=f"C{i}")
        panel.set(
            title=f"{axis}: {which}", xlabel="score", ylabel="share of answers", ylim=(0, None)
        )
        panel.legend(fontsize=7)
    figure.savefig(RESULTS / "figure20.png", dpi=110)


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    prompts = read_prompts(world.ensure() / "prompts-test.jsonl")
    for seed in s.seeds:
        result[str(seed)] = measure(s.out / str(seed), prompts, s.samples, seed)
        save_result("figure20", result, s)
        draw(result)


if __name__ == "__main__":
    run(main)
