"""Do the scores mean something on their own? Mean score against the annotator's quality (Fig. 29),
and sureness of pairs.

    python -m experiments.figure29_calibration --seeds 1,2,3      after experiments.seeds

Each first reward model scores fresh answers to test prompts; the annotator's score without noise
stands for the paper's median of three human grades, in seven equal bins for its seven grades.
Keeps OUT/results/figure29-SEED.json: the bins (mean quality, mean and standard deviation of
sigmoid(score), count), and for pairs the expected calibration error of sigmoid(difference of
scores). Answers of several seeds are not pooled: a bin's number is the mean of the seeds' own, its
interval over seeds.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import eval as measures
from experiments.shared import results
from experiments.shared.over_seeds import claims_table, each_seed, plus_minus
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.reward_models import annotators_own, fresh_pairs, score_lists
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section
from reward import AXES, load_reward_model
from runtime import parse_settings, run, set_threads


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    repeats: int = 4  # pairs per test prompt and axis
    bins: int = 7  # of quality; paper: seven grades


class SeedsBin(NamedTuple):
    """A bin of quality that all seeds have. Every seed counts alike."""

    quality: float  # mean of the annotator's score
    scores: list[float]  # the mean sigmoid(score) of each seed
    spread: float  # mean standard deviation
    count: int  # answers in all


def measure(root: Path, settings: Settings, seed: int) -> dict:
    """One seed: {axis: bins of quality, sureness of pairs}."""
    table = {}
    for axis in AXES:
        pairs = fresh_pairs(root, seed, axis, settings.repeats)
        model, tokenizer = load_reward_model(root / str(seed) / f"reward-{axis}")
        chosen, rejected = score_lists(model, tokenizer, pairs)
        better, worse = annotators_own(pairs, axis)
        sure, error = measures.pair_calibration(chosen, rejected)
        table[axis] = {
            "bins": measures.calibration(chosen + rejected, better + worse, settings.bins),
            "pairs": sure,
            "expected calibration error": error,
        }
    return table


def bins_over_seeds(tables: list[list], bins: int) -> list[SeedsBin]:
    """Tables of `eval.Bin`, one per seed -> the bins that all seeds have."""
    groups = {}
    for table in tables:
        for one in table:
            place = min(bins - 1, int(one[0] * bins + 1e-3))
            groups.setdefault(place, []).append(one)
    common = []
    for _, group in sorted(groups.items()):
        if len(group) == len(tables):
            quality, scores, spreads, counts = map(list, zip(*group, strict=True))
            spread = statistics.fmean(spreads)
            common.append(SeedsBin(statistics.fmean(quality), scores, spread, sum(counts)))
    return common


def section(result: dict, bins: int = Settings.bins) -> Section:
    """Scores by the annotator's quality, and the calibration error of pairs."""
    of_axes = {}
    errors = {}
    for axis in AXES:
        of_axes[axis] = bins_over_seeds([one[axis]["bins"] for one in result.values()], bins)
        errors[axis] = [one[axis]["expected calibration error"] for one in result.values()]
    first, second, *_, last = (statistics.fmean(one.scores) for one in of_axes["helpfulness"])
    safe = [statistics.fmean(one.scores) for one in of_axes["safety"]]
    blocks = [
        f"The helpfulness score rises with the annotator's but for the worst answers ({first:.2f}"
        f" in the lowest bin, {second:.2f} in the next, {last:.2f} in the highest), and the safety"
        f" score is a switch ({safe[0]:.2f} in the lowest bin, {safe[-1]:.2f} in the highest)."
    ]
    for axis in AXES:
        rows = {}
        for one in of_axes[axis]:
            name = f"annotator {one.quality:.2f} ({one.count:,} answers, sd {one.spread:.3f})"
            rows[name] = one.scores
        caption = f"The {axis} model's mean sigmoid(score), by the annotator's {axis}."
        small_print = (
            "Expected calibration error of pairs:"
            f" {plus_minus(measures.interval(errors[axis]))} (each seed"
            f" {each_seed(errors[axis])})."
        )
        blocks.append(claims_table(caption, rows, small_print))
    blocks += [
        Figure(
            "Reward against the annotator's score, with ± 1 standard deviation.",
            file=results.RESULTS / "figure29.png",
        ),
        (
            "Answers without any right content are the exception: the helpfulness model cannot tell"
            " them from others. The expected calibration error says how far the probability that a"
            " model gives to the answer it prefers lies from how often it is right."
        ),
    ]
    return Section("Do the scores mean something on their own? (Fig. 29)", blocks)


def draw(result: dict, file: Path, bins: int = Settings.bins) -> None:
    """Each seed's means, thin; their mean ± 1 standard deviation, thick."""
    figure, panels = draw_panels(2)
    for panel, axis in zip(panels, AXES, strict=True):
        tables = [one[axis]["bins"] for one in result.values()]
        panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        for table in tables:
            quality = [one[0] for one in table]
            scores = [one[1] for one in table]
            panel.plot(quality, scores, color="C0", alpha=0.35, linewidth=0.8)
        common = bins_over_seeds(tables, bins)
        x = [one.quality for one in common]
        y = [statistics.fmean(one.scores) for one in common]
        panel.plot(x, y, marker="o", color="C0")
        low = [mean - one.spread for mean, one in zip(y, common, strict=True)]
        high = [mean + one.spread for mean, one in zip(y, common, strict=True)]
        panel.fill_between(x, low, high, alpha=0.2, color="C0")
        panel.set(title=f"{axis} model", xlabel=f"annotator's {axis}", ylabel="sigmoid(score)")
        panel.set(xlim=(0, 1), ylim=(0, 1))
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings.out, settings, seed)

    of_seeds = results.measure_seeds("figure29", settings, measure_seed)

    def make_section(result: dict) -> Section:
        return section(result, settings.bins)

    def draw_bins(result: dict, file: Path) -> None:
        draw(result, file, settings.bins)

    results.finish("figure29", of_seeds, settings, make_section, draw_bins)


if __name__ == "__main__":
    run(main)
