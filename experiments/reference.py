"""Reference runs: the whole default pipeline for several seeds, so that the report can say whether
a run is healthy.

    python experiments/reference.py --seeds 1,2,3,4,5    makes what is missing (a quarter of an
                                                         hour a seed), then collects
    python experiments/reference.py --collect            collects from runs that are there

Writes experiments/results/reference.json, {seed: {number: value}}: for each version the annotator's
scores and win rates over SFT on the test prompts, the losses and accuracies of the stages, the KL
of PPO, the adherence under Ghost Attention, as `python eval.py` finds them in OUT/SEED (its report
is there, too). Prints each number's mean and prediction interval.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import world
from experiments.common import load_result, save_result, side_by_side
from runtime import is_finished, parse_settings, run, set_threads
from runtime.report import PIPELINE, command

CONTROLS = ("rlhf-v5-no-ppo", "rlhf-v5-ppo", "second")  # not a part of the pipeline


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # fresh ones: seed 0 was used for tuning
    out: Path = Path("out/final")  # each seed's models go to OUT/SEED
    at_once: int = 2  # how many seeds run side by side
    collect: bool = False  # only collect: run no stage


def missing_commands(root: Path, seed: int) -> list[list[str]]:
    """The stages of the pipeline whose folders are not finished, in their order, each once."""
    wanted = [
        command(name, root)
        for name in PIPELINE
        if name not in CONTROLS and not is_finished(root / name)
    ]
    return [
        [*line.split()[1:], "--seed", str(seed), "--threads", "1"] for line in dict.fromkeys(wanted)
    ]


def main() -> None:
    # 1. the pipeline, seed by seed
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    if not s.collect:
        side_by_side(
            {f"seed-{seed}": missing_commands(s.out / str(seed), seed) for seed in s.seeds},
            s.out,
            s.at_once,
        )

    # 2. the report of each, and its numbers
    result = load_result("reference", s)
    for seed in s.seeds:
        measures.main(["--out", str(s.out / str(seed)), "--threads", "1"])
        result[str(seed)] = json.loads((s.out / str(seed) / "eval" / "metrics.json").read_text())[
            "numbers"
        ]
        save_result("reference", result, s)

    # 3. where one more run lies
    for name in dict.fromkeys(name for numbers in result.values() for name in numbers):
        values = [numbers[name] for numbers in result.values() if name in numbers]
        print(
            f"{name:<48}{measures.prediction_interval(values)}  seeds",
            *(f"{value:.3f}" for value in values),
        )


if __name__ == "__main__":
    run(main)
