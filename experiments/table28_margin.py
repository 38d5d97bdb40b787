"""Does the margin of equation 2 help? Tables 27 and 28, and the histograms of scores of Fig. 27.

    python -m experiments.table28_margin --seeds 1,2,3,4,5      after experiments.seeds

Each seed trains three helpfulness models on its own pairs, equal but for the margin, and judges the
same fresh pairs of test prompts. Keeps OUT/results/table28-SEED.json: for each margin the accuracy
by rating (intervals over items), the mean gap between chosen and rejected by rating, the held-out
loss of equation 1 (no margin, so that the three compare) and a histogram of sigmoid(score), the
score being shifted by the saved mean.

What a margin adds is shown paired by seed. Two margins times four grades and the average are ten
differences that are read side by side, so each interval over seeds is corrected for ten
comparisons. Alone, the small margin's gain on significantly better pairs would look significant.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import eval as measures
from data import Pair
from data.jsonl import RATINGS
from experiments.shared import results
from experiments.shared.over_seeds import (
    count_significant,
    differences_over_seeds,
    mean_of,
    over_seeds,
    percent,
    percent_table,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.reward_models import (
    accuracy,
    fresh_pairs,
    score_lists,
    train,
    training_pairs,
)
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, Table
from reward import MARGINS, ranking_loss
from runtime import parse_settings, run, set_threads

BINS = 20


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    repeats: int = 4  # pairs per test prompt
    max_pairs: int = 0  # train on so many pairs only; 0: all


def measure_margin(
    root: Path, seed: int, margin: str, pairs: list[Pair], tests: list[Pair]
) -> dict:
    """A model trained on the pairs with this margin, judged on the test pairs."""
    model, tokenizer = train(root, seed, "helpfulness", pairs, margin=margin)
    chosen, rejected = score_lists(model, tokenizer, tests)
    gaps = {rating: [] for rating in RATINGS}
    for pair, better, worse in zip(tests, chosen, rejected, strict=True):
        gaps[pair.rating].append(better - worse)
    no_margin = torch.zeros(len(tests))
    losses = ranking_loss(torch.tensor(chosen), torch.tensor(rejected), no_margin)  # (pairs)
    places = [min(BINS - 1, int(BINS * measures.sigmoid(one))) for one in chosen + rejected]
    return {
        "accuracy": accuracy((chosen, rejected), tests),
        "gap": {rating: measures.interval(values) for rating, values in gaps.items()},
        "held-out loss": losses.mean().item(),
        "histogram": [places.count(k) / len(places) for k in range(BINS)],
    }


def measure(settings: Settings, seed: int) -> dict:
    """One seed: every margin, and the number of test pairs."""
    pairs = training_pairs(settings.out, seed, "helpfulness")
    pairs = pairs[: settings.max_pairs or None]
    tests = fresh_pairs(settings.out, seed, "helpfulness", settings.repeats)
    table = {}
    for margin in MARGINS:
        table[margin] = measure_margin(settings.out, seed, margin, pairs, tests)
    return table | {"pairs": len(tests)}


def gains(result: dict) -> dict[str, dict[str, measures.Interval]]:
    """What each margin adds to accuracy, paired by seed; corrected for all that are read together.
    """
    of_seeds = list(result.values())
    tables = {margin: [one[margin]["accuracy"] for one in of_seeds] for margin in MARGINS}
    margins = [margin for margin in MARGINS if margin != "none"]
    looked_at = len(margins) * len(tables["none"][0])
    changes = {}
    for margin in margins:
        changes[margin] = differences_over_seeds(tables[margin], tables["none"], looked_at)
    return changes


def gaps_table(result: dict) -> Table:
    """How far scores of chosen and rejected answers lie apart, and the held-out loss."""
    of_seeds = list(result.values())
    cells = []
    for margin in MARGINS:
        gaps = over_seeds([one[margin]["gap"] for one in of_seeds])
        loss = measures.interval([one[margin]["held-out loss"] for one in of_seeds])
        cells.append([margin, *(f"{gap.mean:.2f}" for gap in gaps.values()), str(loss)])
    ratings = [rating.replace("_", " ") for rating in RATINGS]
    caption = "The gap between the scores of chosen and rejected answers, in logits: it grows."
    columns = ["margin", *ratings, "held-out loss without margin"]
    return Table(caption, columns, cells, "Means over seeds; the last column's interval, too.")


def section(result: dict) -> Section:
    """Accuracies, what the margins add, gaps."""
    of_seeds = list(result.values())
    accuracies = {}
    for margin in MARGINS:
        accuracies[f"margin: {margin}"] = over_seeds([one[margin]["accuracy"] for one in of_seeds])
    changes = gains(result)
    flat = {}
    for margin, row in changes.items():
        for name, change in row.items():
            flat[f"{margin}, {name}"] = change
    largest = max(flat, key=lambda name: abs(flat[name].mean))
    gap = {}
    for margin in MARGINS:
        gap[margin] = mean_of([one[margin]["gap"][RATINGS[0]] for one in of_seeds])
    titles = {f"{margin} - none": row for margin, row in changes.items()}
    return Section(
        "Does the margin of equation 2 help? (Tables 27 and 28, Fig. 27)",
        [
            (
                "Hardly: it pushes scores apart"
                f" ({gap['none']:.2f} without, {gap['small']:.2f} with the small and"
                f" {gap['large']:.2f} with the large margin on significantly better pairs), but"
                f" significant are {count_significant(flat)} gains in accuracy; the largest is"
                f" {percent(flat[largest])} points ({largest.replace('_', ' ')})."
            ),
            percent_table(
                f"Accuracy on {sum(one['pairs'] for one in of_seeds):,} helpfulness pairs of test"
                " prompts, in percent.",
                accuracies,
                f"± is half of the 95 % interval over {len(of_seeds)} seeds, each alone. The margin"
                " of equation 2 asks for a larger gap between scores where the rating is clearer;"
                " the small one is our default, both are the paper's.",
            ),
            percent_table(
                "What a margin adds, in points, paired by seed.",
                titles,
                f"Corrected so that all {len(flat)} hold together.",
            ),
            gaps_table(result),
            Figure(
                "Scores of answers under the three margins: the larger it is, the more of them lie"
                " at the ends.",
                file=results.RESULTS / "table28.png",
            ),
            (
                "The paper's figure has the same shape. Read alone, some of these differences would"
                " look significant; read side by side they are not. The held-out loss, which has no"
                " margin in it, gets worse with it."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Share of answers by sigmoid(score), mean over seeds (Fig. 27)."""
    figure, panels = draw_panels(len(MARGINS), 3.4)
    centres = [(k + 0.5) / BINS for k in range(BINS)]
    for panel, margin in zip(panels, MARGINS, strict=True):
        columns = zip(*(one[margin]["histogram"] for one in result.values()), strict=True)
        heights = [100 * sum(column) / len(result) for column in columns]
        panel.bar(centres, heights, 0.9 / BINS)
        panel.set(title=f"margin: {margin}", xlabel="sigmoid(score)", ylabel="% of answers")
    panels[0].sharey(panels[1])
    panels[1].sharey(panels[2])
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("table28", settings, measure_seed)
    results.finish("table28", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
