"""Does the margin of equation 2 help? Tables 27 and 28, and the histograms of scores of Fig. 27.

    python experiments/table28_margin.py --seeds 1,2,3,4,5      after experiments/seeds.py

Each seed trains three helpfulness models on its own pairs, equal but for the margin, and judges the
same fresh pairs of test prompts. Writes experiments/results/table28.json: per seed and margin the
accuracy by rating (intervals over items), the mean gap between chosen and rejected by rating, the
held-out loss of equation 1 (no margin, so that the three compare) and a histogram of
sigmoid(score), the score being shifted by the saved mean; and table28.png.

What a margin adds is printed paired by seed. Two margins times four grades and the average are ten
differences that are read side by side, so each interval over seeds is corrected for ten
comparisons. Alone, the small margin's gain on significantly better pairs (+.65 ± .55) would look
significant; corrected it is not (± 1.12).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import eval as measures
from data.jsonl import RATINGS
from experiments.common import (
    RESULTS,
    accuracy,
    differences_over_seeds,
    draw_panels,
    fresh_pairs,
    load_result,
    over_seeds,
    print_percent,
    save_result,
    score_lists,
    train,
    training_pairs,
)
from reward import MARGINS, ranking_loss
from runtime import parse_settings, run, set_threads

BINS = 20


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    repeats: int = 4  # pairs per test prompt
    max_pairs: int = 0  # train on so many pairs only; 0: all


def measure(root: Path, seed: int, margin: str, rows: list[dict], tests: list[dict]) -> dict:
    """A model trained with this margin, judged on the test pairs."""
    scores = score_lists(*train(root, seed, "helpfulness", rows, margin=margin), tests)
    gaps = [c - r for c, r in zip(*scores, strict=True)]
    chosen, rejected = (torch.tensor(side) for side in scores)  # (pairs) each
    places = [
        min(BINS - 1, int(BINS * measures.sigmoid(score))) for side in scores for score in side
    ]
    return {
        "accuracy": accuracy(scores, tests),
        "gap": {
            rating: measures.interval(
                [gap for gap, row in zip(gaps, tests, strict=True) if row["rating"] == rating]
            )
            for rating in RATINGS
        },
        "held-out loss": ranking_loss(chosen, rejected, torch.zeros(len(tests))).mean().item(),
        "histogram": [places.count(k) / len(places) for k in range(BINS)],
    }


def draw(found: list[dict]) -> None:
    """experiments/results/table28.png: share of answers by sigmoid(score), mean over seeds (Fig.
    27).
    """
    figure, panels = draw_panels(len(MARGINS), 3.4)
    for panel, margin in zip(panels, MARGINS, strict=True):
        columns = zip(*(one[margin]["histogram"] for one in found), strict=True)
        panel.bar(
            [(k + 0.5) / BINS for k in range(BINS)],
            [100 * sum(column) / len(found) for column in columns],
            0.9 / BINS,
        )
        panel.set(title=f"margin: {margin}", xlabel="sigmoid(score)", ylabel="% of answers")
    panels[0].sharey(panels[1])
    panels[1].sharey(panels[2])
    figure.savefig(RESULTS / "table28.png", dpi=110)


def main() -> None:
    s = parse_settings(Settings, __doc__)
    result = load_result("table28", s)
    set_threads(1)
    for seed in s.seeds:
        rows = training_pairs(s.out, seed, "helpfulness")[: s.max_pairs or None]
        tests = fresh_pairs(s.out, seed, "helpfulness", s.repeats)
        result[str(seed)] = {
            margin: measure(s.out, seed, margin, rows, tests) for margin in MARGINS
        } | {"pairs": len(tests)}
        save_result("table28", result, s)
    found = [result[str(seed)] for seed in s.seeds]
    draw(found)
    tables = {margin: [one[margin]["accuracy"] for one in found] for margin in MARGINS}
    print_percent(
        f"Helpfulness accuracy on {sum(one['pairs'] for one in found):,} pairs, {len(found)} seeds",
        {margin: over_seeds(table) for margin, table in tables.items()},
    )
    # two margins, each grade and the average: read side by side
    looked_at = 2 * len(tables["none"][0])
    changes = {}
    for margin in ("small", "large"):
        changes[margin] = differences_over_seeds(tables[margin], tables["none"], looked_at)
    print_percent(
        f"Difference to no margin, paired by seed, corrected for {looked_at} comparisons", changes
    )
    for margin in MARGINS:
        gaps, loss = over_seeds([one[margin]["gap"] for one in found]), [
            one[margin]["held-out loss"] for one in found
        ]
        print(
            f"{margin:<6} gap between chosen and rejected: "
            + ", ".join(f"{name} {gap.mean:.2f}" for name, gap in gaps.items())
            + f"; held-out loss without margin {measures.interval(loss)}"
        )


if __name__ == "__main__":
    run(main)
