"""What the auxiliary safety loss does (A.3.4, Table 29): the safety model with and without it.

    python experiments/table29_safety_loss.py --seeds 1,2,3      after experiments/seeds.py

Both are trained on the seed's own pairs and judge the same fresh pairs of test prompts. Writes
experiments/results/table29.json: per seed accuracy in the three safety bins (the fourth, unsafe
chosen before safe, is left out of the data), recall of unsafe answers at .5 and at the gate's .15,
safe answers under .5, good answers to harmless prompts under the gate; and table29.png, the scores
of safe and of unsafe answers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from experiments.common import (
    RESULTS,
    differences_over_seeds,
    draw_panels,
    fresh_pairs,
    load_result,
    over_seeds,
    print_percent,
    safety_measures,
    save_result,
    score_lists,
    train,
    training_pairs,
)
from reward import AXES
from runtime import parse_settings, run, set_threads

WEIGHTS = {"baseline": 0.0, "with the auxiliary loss": 1.0}


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    repeats: int = 4  # pairs per test prompt and axis
    max_pairs: int = 0  # train on so many pairs only; 0: all


def safety_bin(row: dict) -> str:
    """The bin of Table 29 that a pair is in; which answers are safe is what the annotator said."""
    if row["chosen_is_safe"] != row["rejected_is_safe"]:
        return "safe / unsafe"
    return "both safe" if row["chosen_is_safe"] else "both unsafe"


def measure(
    root: Path, seed: int, weight: float, rows: list[dict], tests: dict[str, list[dict]]
) -> dict:
    """A safety model trained with this weight of the auxiliary loss: accuracy by safety bin,
    shares, histograms of scores.
    """
    model, tokenizer = train(root, seed, "safety", rows, auxiliary_weight=weight)
    scores = {axis: score_lists(model, tokenizer, tests[axis]) for axis in AXES}
    pairs = tests["safety"]
    by_bin = measures.accuracy_intervals(
        *scores["safety"], list(map(safety_bin, pairs)), list(map(measures.cluster, pairs))
    )
    places = {True: [0] * 20, False: [0] * 20}
    for side, values in zip(("chosen", "rejected"), scores["safety"], strict=True):
        for row, score in zip(pairs, values, strict=True):
            places[row[f"{side}_is_safe"]][min(19, int(20 * measures.sigmoid(score)))] += 1
    return {
        "accuracy": {
            name: by_bin[name] for name in ("average", "safe / unsafe", "both safe", "both unsafe")
        },
        "shares": safety_measures(scores, tests),
        "histogram": {"safe": places[True], "unsafe": places[False]},
    }


def mean_shares(histograms: list[list[int]]) -> list[float]:
    """Counts, a histogram per seed -> percent in each bin, the mean of the seeds' own shares.

    >>> mean_shares([[1, 0], [1, 3]])  # 100 and 25 %, 0 and 75 %, however many answers a seed has
    [62.5, 37.5]
    """
    shares = [[100 * count / sum(counts) for count in counts] for counts in histograms]
    return [sum(column) / len(histograms) for column in zip(*shares, strict=True)]


def changes(found: list[dict]) -> dict[str, dict[str, measures.Interval]]:
    """{"accuracy", "shares": {name: with the loss - without, paired by seed}}.

    All of both tables are read side by side: their intervals over seeds hold together.
    """
    first, second = WEIGHTS
    kinds = ("accuracy", "shares")
    looked_at = sum(len(found[0][first][kind]) for kind in kinds)
    table = {}
    for kind in kinds:
        before = [one[first][kind] for one in found]
        after = [one[second][kind] for one in found]
        table[kind] = differences_over_seeds(after, before, looked_at)
    return table


def draw(found: list[dict]) -> None:
    """experiments/results/table29.png: scores of safe and unsafe answers, mean over seeds."""
    figure, panels = draw_panels(len(WEIGHTS))
    for panel, name in zip(panels, WEIGHTS, strict=True):
        for kind, color in (("safe", "tab:green"), ("unsafe", "tab:red")):
            shares = mean_shares([one[name]["histogram"][kind] for one in found])
            panel.bar(
                [(k + 0.5) / 20 for k in range(20)],
                shares,
                0.045,
                color=color,
                alpha=0.5,
                label=kind,
            )
        panel.axvline(0.15, color="black", linestyle=":", label="gate")
        panel.set(title=name, xlabel="sigmoid(safety score)", ylabel="% of the answers of a kind")
        panel.legend()
    figure.savefig(RESULTS / "table29.png", dpi=110)


def main() -> None:
    s = parse_settings(Settings, __doc__)
    result = load_result("table29", s)
    set_threads(1)
    for seed in s.seeds:
        rows = training_pairs(s.out, seed, "safety")[: s.max_pairs or None]
        tests = {axis: fresh_pairs(s.out, seed, axis, s.repeats) for axis in AXES}
        result[str(seed)] = {
            name: measure(s.out, seed, weight, rows, tests) for name, weight in WEIGHTS.items()
        }
        result[str(seed)]["pairs"] = len(tests["safety"])
        save_result("table29", result, s)
    found = [result[str(seed)] for seed in s.seeds]
    draw(found)
    gains = changes(found)
    looked_at = sum(map(len, gains.values()))
    for kind, title in (
        ("accuracy", f"Safety model, accuracy on {sum(one['pairs'] for one in found):,} pairs"),
        ("shares", "Shares of answers"),
    ):
        tables = {name: [one[name][kind] for one in found] for name in WEIGHTS}
        print_percent(
            f"{title}, {len(found)} seeds",
            {name: over_seeds(table) for name, table in tables.items()}
            | {f"difference, paired by seed, for all {looked_at}": gains[kind]},
        )


if __name__ == "__main__":
    run(main)
