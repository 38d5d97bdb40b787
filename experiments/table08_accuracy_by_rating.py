"""Accuracy of the first reward models by rating (Table 8), on many fresh pairs from the test
prompts.

    python experiments/table08_accuracy_by_rating.py --seeds 1,2,3      after experiments/seeds.py

As in the paper each model judges the pairs of both axes. Beside it the annotator's own accuracy
without its noise, which is the ceiling, and what the safety model's score is used for: recall of
unsafe answers, good answers lost to the gate. Writes experiments/results/table08.json: per seed
accuracies and shares, each with its interval over items, and the number of pairs of each rating.
What is printed are means over seeds, ± half of the 95 % interval over seeds.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.common import (
    accuracy,
    annotators_own,
    fresh_pairs,
    over_seeds,
    print_percent,
    safety_measures,
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


def measure(root: Path, seed: int, repeats: int) -> dict:
    """One seed's accuracies {model: {pairs: by rating}}, its shares of the safety score, its
    numbers of pairs.
    """
    pairs = {axis: fresh_pairs(root, seed, axis, repeats) for axis in AXES}
    scores = {
        axis: {
            other: score_lists(
                *load_reward_model(root / str(seed) / f"reward-{axis}"), pairs[other]
            )
            for other in AXES
        }
        for axis in AXES
    }
    table = {
        f"{axis} model": {other: accuracy(scores[axis][other], pairs[other]) for other in AXES}
        for axis in AXES
    }
    table["annotator without noise"] = {
        axis: accuracy(annotators_own(pairs[axis], axis), pairs[axis]) for axis in AXES
    }
    return {
        "accuracy": table,
        "safety score": safety_measures(scores["safety"], pairs),
        "pairs": {axis: Counter(row["rating"] for row in pairs[axis]) for axis in AXES},
    }


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    for seed in s.seeds:
        result[str(seed)] = measure(s.out, seed, s.repeats)
        save_result("table08", result, s)
    found = [result[str(seed)] for seed in s.seeds]
    for axis in AXES[::-1]:
        count = sum(sum(one["pairs"][axis].values()) for one in found)
        print_percent(
            f"Accuracy on {count:,} {axis} pairs of test prompts, {len(s.seeds)} seeds",
            {
                name: over_seeds([one["accuracy"][name][axis] for one in found])
                for name in ("safety model", "helpfulness model", "annotator without noise")
            },
        )
    print_percent(
        "The safety model's score",
        {"share of answers": over_seeds([one["safety score"] for one in found])},
    )


if __name__ == "__main__":
    run(main)
