"""Do the scores mean something on their own? Mean score against the annotator's quality (Fig. 29),
and sureness of pairs.

    python experiments/figure29_calibration.py --seeds 1,2,3      after experiments/seeds.py

Each first reward model scores fresh answers to test prompts; the annotator's score without noise
stands for the paper's median of three human grades, in seven equal bins for its seven grades.
Writes experiments/results/figure29.json: per seed the bins (mean quality, mean and standard
deviation of sigmoid(score), count), and for pairs the expected calibration error of
sigmoid(difference of scores); and figure29.png, with the band of ± 1 standard deviation. Answers of
several seeds are not pooled: a bin's number is the mean of the seeds' own, its interval over seeds.
"""

import statistics
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
    print_claims,
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


def bins_over_seeds(tables: list[list], bins: int) -> list[tuple[float, list[float], float, int]]:
    """Tables of `eval.Bin`, one per seed -> a row for each bin that all seeds have:

    (mean quality, the mean score of each seed, mean standard deviation, answers in all).
    Every seed counts alike.
    """
    groups = {}
    for table in tables:
        for one in table:
            place = min(bins - 1, int(one[0] * bins + 1e-3))
            groups.setdefault(place, []).append(one)
    found = []
    for _, group in sorted(groups.items()):
        if len(group) == len(tables):
            quality, scores, spreads, counts = map(list, zip(*group, strict=True))
            spread = statistics.fmean(spreads)
            found.append((statistics.fmean(quality), scores, spread, sum(counts)))
    return found


def draw(result: dict, bins: int) -> None:
    """experiments/results/figure29.png: each seed's means, thin; their mean ± 1 sd, thick."""
    figure, panels = draw_panels(2)
    for panel, axis in zip(panels, AXES, strict=True):
        tables = [one[axis]["bins"] for one in result.values()]
        panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        for table in tables:
            points = [one[0] for one in table], [one[1] for one in table]
            panel.plot(*points, color="C0", alpha=0.35, linewidth=0.8)
        x, scores, spreads, _ = zip(*bins_over_seeds(tables, bins), strict=True)
        y = [statistics.fmean(column) for column in scores]
        panel.plot(x, y, marker="o", color="C0")
        low = [mean - sd for mean, sd in zip(y, spreads, strict=True)]
        high = [mean + sd for mean, sd in zip(y, spreads, strict=True)]
        panel.fill_between(x, low, high, alpha=0.2, color="C0")
        panel.set(
            title=f"{axis} model",
            xlabel=f"annotator's {axis}",
            ylabel="sigmoid(score)",
            xlim=(0, 1),
            ylim=(0, 1),
        )
    figure.savefig(RESULTS / "figure29.png", dpi=110)


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    for seed in s.seeds:
        for axis in AXES:
            pairs = fresh_pairs(s.out, seed, axis, s.repeats)
            chosen, rejected = score_lists(
                *load_reward_model(s.out / str(seed) / f"reward-{axis}"), pairs
            )
            values, quality = [*chosen, *rejected], [
                q for side in annotators_own(pairs, axis) for q in side
            ]
            sure, error = measures.pair_calibration(chosen, rejected)
            result.setdefault(str(seed), {})[axis] = {
                "bins": measures.calibration(values, quality, s.bins),
                "pairs": sure,
                "expected calibration error": error,
            }
            print(
                f"seed {seed}, {axis}: expected calibration error of {len(pairs):,} pairs"
                f" {error:.3f}"
            )
        save_result("figure29", result, s)
    draw(result, s.bins)
    for axis in AXES:
        rows, tables = {}, [one[axis]["bins"] for one in result.values()]
        for quality, scores, sd, count in bins_over_seeds(tables, s.bins):
            rows[f"annotator {quality:.2f} ({count:,} answers, sd {sd:.3f})"] = scores
        print_claims(f"{axis} model, score", rows)
        errors = [one[axis]["expected calibration error"] for one in result.values()]
        print(f"    expected calibration error {measures.interval(errors)}")


if __name__ == "__main__":
    run(main)
