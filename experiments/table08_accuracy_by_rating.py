"""How often are the first reward models right? Accuracy by rating (Table 8), on many fresh pairs
from the test prompts.

    python -m experiments.table08_accuracy_by_rating --seeds 1,2,3      after experiments.seeds

As in the paper each model judges the pairs of both axes. Beside it the annotator's own accuracy
without its noise, which is the ceiling, and what the safety model's score is used for: recall of
unsafe answers, good answers lost to the gate. Keeps OUT/results/table08-SEED.json: accuracies and
shares, each with its interval over items, and the number of pairs of each rating. Shown are means
over seeds, ± half of the 95 % interval over seeds.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from experiments.shared import results
from experiments.shared.over_seeds import over_seeds, percent, percent_table
from experiments.shared.reward_models import (
    accuracy,
    annotators_own,
    fresh_pairs,
    safety_measures,
    score_lists,
)
from experiments.shared.settings import ExperimentSettings
from report import Section
from reward import AXES, load_reward_model
from runtime import parse_settings, run, set_threads


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    repeats: int = 4  # pairs per test prompt and axis


def measure(root: Path, seed: int, repeats: int) -> dict:
    """One seed's accuracies {model: {pairs: by rating}}, its shares of the safety score, its
    numbers of pairs.
    """
    pairs = {axis: fresh_pairs(root, seed, axis, repeats) for axis in AXES}
    table = {}
    scores = {}
    for axis in AXES:
        model, tokenizer = load_reward_model(root / str(seed) / f"reward-{axis}")
        scores[axis] = {}
        table[f"{axis} model"] = {}
        for other in AXES:
            scores[axis][other] = score_lists(model, tokenizer, pairs[other])
            table[f"{axis} model"][other] = accuracy(scores[axis][other], pairs[other])
    ceiling = {}
    for axis in AXES:
        ceiling[axis] = accuracy(annotators_own(pairs[axis], axis), pairs[axis])
    table["annotator without noise"] = ceiling
    return {
        "accuracy": table,
        "safety score": safety_measures(scores["safety"], pairs),
        "pairs": {axis: Counter(pair.rating for pair in pairs[axis]) for axis in AXES},
    }


def section(result: dict) -> Section:
    """Accuracies by rating, and what the safety score is used for."""
    of_seeds = list(result.values())

    def accuracies(model: str, axis: str) -> dict:
        return over_seeds([one["accuracy"][model][axis] for one in of_seeds])

    helpful = accuracies("helpfulness model", "helpfulness")
    safe = accuracies("safety model", "safety")
    blocks = [
        f"They are right in {percent(helpful['significantly_better'])} % of the significantly"
        f" better helpfulness pairs and {percent(safe['significantly_better'])} % of the safety"
        f" pairs; of the negligibly better ones in {percent(helpful['negligibly_better'])} and"
        f" {percent(safe['negligibly_better'])} %, where the annotator itself is hardly surer."
    ]
    for axis in AXES[::-1]:
        count = sum(sum(one["pairs"][axis].values()) for one in of_seeds)
        rows = {}
        for model in ("safety model", "helpfulness model", "annotator without noise"):
            rows[model] = accuracies(model, axis)
        caption = f"Accuracy on {count:,} {axis} pairs of test prompts, in percent."
        ceiling = "The annotator without its noise is about what a perfect model would reach."
        blocks.append(percent_table(caption, rows, ceiling))
    shares = over_seeds([one["safety score"] for one in of_seeds])
    blocks.append(
        percent_table("The safety model's score.", {"share of answers in percent": shares})
    )
    blocks.append(
        "Recall is the share of unsafe answers whose safety is called lower than the number, 0.5 or"
        " the gate's 0.15. Good answers under the gate are harmless, good ones that would be judged"
        " by their safety by mistake. ± is half of the 95 % interval over"
        f" {len(of_seeds)} seeds, each alone."
    )
    return Section("How often are the first reward models right? (Table 8)", blocks)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings.out, seed, settings.repeats)

    of_seeds = results.measure_seeds("table08", settings, measure_seed)
    results.finish("table08", of_seeds, settings, section)


if __name__ == "__main__":
    run(main)
