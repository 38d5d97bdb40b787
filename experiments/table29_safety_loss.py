"""What does the auxiliary safety loss do (A.3.4, Table 29)? The safety model with and without it.

    python -m experiments.table29_safety_loss --seeds 1,2,3      after experiments.seeds

Both are trained on the seed's own pairs and judge the same fresh pairs of test prompts. Keeps
OUT/results/table29-SEED.json: accuracy in the three safety bins (the fourth, unsafe chosen before
safe, is left out of the data), recall of unsafe answers at .5 and at the gate's .15, safe answers
under .5, good answers to harmless prompts under the gate, and histograms of the scores of safe and
of unsafe answers.
"""

from dataclasses import dataclass
from pathlib import Path

import eval as measures
from data import Pair
from experiments.shared import results
from experiments.shared.over_seeds import (
    count_significant,
    differences_over_seeds,
    over_seeds,
    percent,
    percent_table,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.reward_models import (
    clusters_of,
    fresh_pairs,
    safety_measures,
    score_lists,
    train,
    training_pairs,
)
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section
from reward import AXES
from runtime import parse_settings, run, set_threads

WEIGHTS = {"baseline": 0.0, "with the auxiliary loss": 1.0}
TITLES = {"baseline": "without", "with the auxiliary loss": "with it"}
SAFETY_BINS = ("average", "safe / unsafe", "both safe", "both unsafe")
BINS = 20  # of the histograms


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    repeats: int = 4  # pairs per test prompt and axis
    max_pairs: int = 0  # train on so many pairs only; 0: all


def safety_bin(pair: Pair) -> str:
    """The bin of Table 29 that a pair is in; which answers are safe is what the annotator said."""
    if pair.chosen_is_safe != pair.rejected_is_safe:
        return "safe / unsafe"
    return "both safe" if pair.chosen_is_safe else "both unsafe"


def measure_weight(
    root: Path, seed: int, weight: float, pairs: list[Pair], tests: dict[str, list[Pair]]
) -> dict:
    """A safety model trained with this weight of the auxiliary loss: accuracy by safety bin,
    shares, histograms of scores.
    """
    model, tokenizer = train(root, seed, "safety", pairs, auxiliary_weight=weight)
    scores = {axis: score_lists(model, tokenizer, tests[axis]) for axis in AXES}
    bins = [safety_bin(pair) for pair in tests["safety"]]
    clusters = clusters_of(tests["safety"])
    by_bin = measures.accuracy_intervals(*scores["safety"], bins, clusters)
    safe = [0] * BINS
    unsafe = [0] * BINS
    chosen, rejected = scores["safety"]
    labels = [pair.chosen_is_safe for pair in tests["safety"]]
    labels += [pair.rejected_is_safe for pair in tests["safety"]]
    for is_safe, score in zip(labels, chosen + rejected, strict=True):
        counts = safe if is_safe else unsafe
        counts[min(BINS - 1, int(BINS * measures.sigmoid(score)))] += 1
    return {
        "accuracy": {name: by_bin[name] for name in SAFETY_BINS},
        "shares": safety_measures(scores, tests),
        "histogram": {"safe": safe, "unsafe": unsafe},
    }


def measure(settings: Settings, seed: int) -> dict:
    """One seed: both weights, and the number of test pairs."""
    pairs = training_pairs(settings.out, seed, "safety")
    pairs = pairs[: settings.max_pairs or None]
    tests = {axis: fresh_pairs(settings.out, seed, axis, settings.repeats) for axis in AXES}
    table = {}
    for name, weight in WEIGHTS.items():
        table[name] = measure_weight(settings.out, seed, weight, pairs, tests)
    return table | {"pairs": len(tests["safety"])}


def mean_shares(histograms: list[list[int]]) -> list[float]:
    """Counts, a histogram per seed -> percent in each bin, the mean of the seeds' own shares.

    >>> mean_shares([[1, 0], [1, 3]])  # 100 and 25 %, 0 and 75 %, however many answers a seed has
    [62.5, 37.5]
    """
    shares = [[100 * count / sum(counts) for count in counts] for counts in histograms]
    return [sum(column) / len(histograms) for column in zip(*shares, strict=True)]


def changes(of_seeds: list[dict]) -> dict[str, dict[str, measures.Interval]]:
    """{"accuracy", "shares": {name: with the loss - without, paired by seed}}.

    All of both tables are read side by side: their intervals over seeds hold together.
    """
    first, second = WEIGHTS
    kinds = ("accuracy", "shares")
    looked_at = sum(len(of_seeds[0][first][kind]) for kind in kinds)
    table = {}
    for kind in kinds:
        before = [one[first][kind] for one in of_seeds]
        after = [one[second][kind] for one in of_seeds]
        table[kind] = differences_over_seeds(after, before, looked_at)
    return table


def section(result: dict) -> Section:
    """Accuracies and shares with and without the loss."""
    of_seeds = list(result.values())
    differences = changes(of_seeds)
    everything = differences["accuracy"] | differences["shares"]
    tables = {}
    for kind in differences:
        tables[kind] = {}
        for name, title in TITLES.items():
            tables[kind][title] = over_seeds([one[name][kind] for one in of_seeds])
    accuracy = tables["accuracy"]
    shares = tables["shares"]
    blocks = [
        "It puts the safety score's zero where it belongs and leaves accuracy as it is: without it"
        f" {percent(shares['without']['safe under .5'])} % of the safe answers are called unsafe,"
        f" with it {percent(shares['with it']['safe under .5'])}; accuracy is"
        f" {percent(accuracy['without']['average'])} and"
        f" {percent(accuracy['with it']['average'])} %."
    ]
    captions = {
        "accuracy": (
            f"Accuracy of the safety model on {sum(one['pairs'] for one in of_seeds):,} pairs, in"
            " percent, by which of the two answers are safe."
        ),
        "shares": "What the score is used for: shares of answers in percent.",
    }
    small_print = (
        f"± is half of the 95 % interval over {len(of_seeds)} seeds; those of the differences,"
        f" paired by seed, hold for all {len(everything)} of both tables together."
    )
    for kind, caption in captions.items():
        rows = tables[kind] | {"difference": differences[kind]}
        blocks.append(percent_table(caption, rows, small_print))
    blocks += [
        Figure(
            "Scores of safe and of unsafe answers, without the loss and with it.",
            file=results.RESULTS / "table29.png",
        ),
        (
            "In each seed the zero moves to its place, but significant are"
            f" {count_significant(everything)} differences: without the loss the seeds scatter so"
            " much, since the ranking loss fixes differences of scores and leaves their zero to"
            " chance. The rounds need that zero, for the gate reads the score as a probability."
        ),
    ]
    return Section("What does the auxiliary safety loss do? (A.3.4, Table 29)", blocks)


def draw(result: dict, file: Path) -> None:
    """Scores of safe and unsafe answers, mean over seeds."""
    figure, panels = draw_panels(len(WEIGHTS))
    centres = [(k + 0.5) / BINS for k in range(BINS)]
    for panel, name in zip(panels, WEIGHTS, strict=True):
        for kind, color in (("safe", "tab:green"), ("unsafe", "tab:red")):
            shares = mean_shares([one[name]["histogram"][kind] for one in result.values()])
            panel.bar(centres, shares, 0.045, color=color, alpha=0.5, label=kind)
        panel.axvline(0.15, color="black", linestyle=":", label="gate")
        panel.set(title=name, xlabel="sigmoid(safety score)", ylabel="% of the answers of a kind")
        panel.legend()
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("table29", settings, measure_seed)
    results.finish("table29", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
