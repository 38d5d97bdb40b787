"""Do the scores mean something on their own? Mean score against the annotator's quality (Fig. 29), and sureness of pairs.

    python experiments/figure29_calibration.py --seeds 1,2,3      after experiments/seeds.py

Each first reward model scores fresh answers to test prompts; the annotator's score without noise stands for the paper's
median of three human grades, in seven equal bins for its seven grades. Writes experiments/results/figure29.json: per seed the
bins (mean quality, mean and standard deviation of sigmoid(score), count), and for pairs the
expected calibration error of sigmoid(difference of scores); and figure29.png, with the band of ± 1 standard deviation.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from experiments.common import (
    RESULTS,
    annotators_own,
    draw_panels,
    fresh_pairs,
    save_result,
    score_lists,
)
from reward import AXES, load_reward_model
from runtime import parse_settings, run, set_threads


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    repeats: int = 4  # pairs per test prompt and axis
    bins: int = 7  # of quality; paper: seven grades


def draw(pooled: dict[str, tuple[list[float], list[float]]], bins: int) -> None:
    """experiments/results/figure29.png: points, means and ± 1 standard deviation; all seeds together."""
    figure, panels = draw_panels(2)
    for panel, (axis, (scores, quality)) in zip(panels, pooled.items(), strict=True):
        found = measures.calibration(scores, quality, bins)
        x, y = [one.x for one in found], [one.y for one in found]
        panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        panel.plot(x, y, marker="o")
        panel.fill_between(x, [one.y - one.sd for one in found], [one.y + one.sd for one in found], alpha=0.2)
        panel.set(title=f"{axis} model", xlabel=f"annotator's {axis}", ylabel="sigmoid(score)", xlim=(0, 1), ylim=(0, 1))
    figure.savefig(RESULTS / "figure29.png", dpi=110)


def main() -> None:
    s, result, pooled = parse_settings(Settings, __doc__), {}, {axis: ([], []) for axis in AXES}
    set_threads(1)
    for seed in s.seeds:
        for axis in AXES:
            pairs = fresh_pairs(s.out, seed, axis, s.repeats)
            chosen, rejected = score_lists(*load_reward_model(s.out / str(seed) / f"reward-{axis}"), pairs)
            values, quality = [*chosen, *rejected], [q for side in annotators_own(pairs, axis) for q in side]
            pooled[axis][0].extend(values)
            pooled[axis][1].extend(quality)
            sure, error = measures.pair_calibration(chosen, rejected)
            result.setdefault(str(seed), {})[axis] = {"bins": measures.calibration(values, quality, s.bins), "pairs": sure,
                                                      "expected calibration error": error}
            print(f"seed {seed}, {axis}: expected calibration error of {len(pairs):,} pairs {error:.3f}")
        save_result("figure29", result, s)
    draw(pooled, s.bins)
    for axis, (scores, quality) in pooled.items():
        print(f"\n{axis} model, {len(scores):,} answers, {len(s.seeds)} seeds\n"
              f"{'annotator':>10}{'mean score':>12}{'sd':>8}{'answers':>10}")
        for one in measures.calibration(scores, quality, s.bins):
            print(f"{one.x:>10.2f}{one.y:>12.3f}{one.sd:>8.3f}{one.count:>10,}")


if __name__ == "__main__":
    run(main)
