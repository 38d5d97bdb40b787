"""Accuracy of the first reward models by rating (Table 8), on many fresh pairs from the test prompts.

    python experiments/table08_accuracy_by_rating.py --seeds 1,2,3      after experiments/seeds.py

Writes experiments/results/table08.json: per seed the reward model's accuracies, the annotator's own without its noise, and the
number of pairs of each rating.
"""

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import read_prompts, toy
from experiments.common import save_result
from reward import AXES, collect_preferences, load_reward_model, pick_prompts, report
from reward import Settings as RewardSettings
from runtime import load_model, parse_settings, run, set_threads


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    repeats: int = 4  # pairs per test prompt


def main() -> None:
    s, result = parse_settings(Settings, __doc__), {}
    set_threads(1)
    prompts = read_prompts(toy.ensure() / "prompts-test.jsonl")
    for seed in s.seeds:
        policy, tokenizer = load_model(s.out / str(seed) / "sft")
        for axis in AXES:
            with tempfile.TemporaryDirectory() as folder:
                pairs = [pair for k in range(s.repeats) for pair in collect_preferences(
                    [policy], tokenizer, pick_prompts(prompts, axis, len(prompts), seed), axis, annotator="toy",
                    temperatures=RewardSettings.temperatures, key=(seed, f"table08-{k}"), folder=Path(folder))]
            model, _ = load_reward_model(s.out / str(seed) / f"reward-{axis}")
            found = report(model, tokenizer, pairs, axis, f"test (seed {seed})")
            result.setdefault(axis, {})[seed] = found | {"pairs": Counter(pair["rating"] for pair in pairs)}
            save_result("table08", result)


if __name__ == "__main__":
    run(main)
