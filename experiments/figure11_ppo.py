"""PPO and V5 (Fig. 11): is V4-PPO better than V4, and what does one more round on top of it give?

    python experiments/figure11_ppo.py --seeds 1,2,3,4,5
    python experiments/figure11_ppo.py --seeds 1,2,3 --controls

after experiments/reference.py. Controls: also V5 without PPO, and PPO after V5.

On the test prompts at temperature 1, judged by the annotator: V4-PPO against V4; against V4 at its
own best temperature (chosen on dev prompts), since PPO sharpens, too; both at their own best; V5
against V4-PPO, V4 and the controls. Resumable. Writes experiments/results/figure11_ppo.json and
.png; prints means over seeds, their intervals over seeds corrected for the number of win rates that
are read side by side, and each seed's own rate (with its interval over items in the JSON). V5
without PPO has not seen the preferences that PPO collected, either: V5 differs from it in both.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, world
from experiments.common import RESULTS, load_result, print_claims, save_result, side_by_side
from runtime import is_finished, load_model, parse_settings, require, run, set_threads

NAMES = {
    "rlhf-v4": "V4",
    "rlhf-v4-ppo": "V4-PPO",
    "rlhf-v5": "V5",
    "rlhf-v5-no-ppo": "V5 without PPO",
    "rlhf-v5-ppo": "PPO after V5",
}
PAIRS = (
    ("V4-PPO", "V4"),
    ("V4-PPO", "V4 at its best T"),
    ("V4-PPO at its best T", "V4 at its best T"),
    ("V5", "V4-PPO"),
    ("V5", "V4"),
    ("V5", "V5 without PPO"),
    ("V5 without PPO", "V4"),
    ("PPO after V5", "V5"),
    ("PPO after V5", "V4-PPO"),
)


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # whose models are in OUT/SEED
    out: Path = Path("out/final")  # as in experiments/reference.py
    controls: bool = False  # also V5 without PPO, and PPO after V5
    # tried for V4 and V4-PPO on dev prompts
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    samples: int = 4  # answers per test prompt
    at_once: int = 2  # how many seeds run side by side


def commands(root: Path, seed: int, controls: bool) -> list[list[str]]:
    """What makes one seed's models, in order."""
    common = ["--seed", str(seed), "--out", str(root), "--threads", "1"]
    found = [
        ["ppo.py", *common],
        ["rejection_sampling.py", "--rounds", "5", "--init", str(root / "rlhf-v4-ppo"), *common],
    ]
    if controls:
        found += [
            ["rejection_sampling.py", "--rounds", "5", "--name", "rlhf-v5-no-ppo", *common],
            ["ppo.py", "--init", str(root / "rlhf-v5"), *common],
        ]
    return found


def best_temperature(folder: Path, temperatures: tuple[float, ...], seed: int) -> float:
    """The temperature with the highest mean of helpfulness and safety on dev prompts, by the
    annotator.
    """
    dev, table = read_prompts(world.FOLDER / "prompts-dev.jsonl"), {}
    for temperature in temperatures:
        rows = measures.evaluate(
            *load_model(folder), dev, seed=seed, samples=2, temperature=temperature
        )
        found = measures.summary(dev, rows)
        table[temperature] = found["helpfulness"].mean + found["safety"].mean
    return max(table, key=table.get)


def measure(root: Path, s: Settings, seed: int) -> dict:
    """One seed: summaries, scores by family, win rates of PAIRS, what PPO's own record says."""
    prompts = read_prompts(world.FOLDER / "prompts-test.jsonl")
    judged = {
        label: measures.evaluate(*load_model(root / name), prompts, seed=seed, samples=s.samples)
        for name, label in NAMES.items()
        if is_finished(root / name)
    }
    cool = {
        name: best_temperature(root / name, s.temperatures, seed)
        for name in ("rlhf-v4", "rlhf-v4-ppo")
    }
    for name, temperature in cool.items():
        judged[f"{NAMES[name]} at its best T"] = measures.evaluate(
            *load_model(root / name),
            prompts,
            seed=seed + 1000,
            samples=s.samples,
            temperature=temperature,
        )
    records = {
        name: json.loads((root / name / "stage.json").read_text())["results"]
        for name in ("rlhf-v4-ppo", "rlhf-v5-ppo")
        if NAMES[name] in judged
    }
    return {
        "best temperature": {NAMES[name]: temperature for name, temperature in cool.items()},
        "summary": {label: measures.summary(prompts, rows) for label, rows in judged.items()},
        "families": {label: measures.by_family(prompts, rows) for label, rows in judged.items()},
        "wins": {
            f"{a} against {b}": measures.compare(prompts, judged[a], judged[b])
            for a, b in PAIRS
            if a in judged and b in judged
        },
        "ppo": {
            NAMES[name]: (
                {key: record["best"][key] for key in ("iteration", "kl", "reward", "length")}
                | {
                    "reward at the start": record["best"]["start"]["reward"],
                    "seconds": record["seconds"],
                    "cpu_seconds": record["cpu_seconds"],
                }
            )
            for name, record in records.items()
        },
    }


def draw(result: dict, seeds: list[str]) -> None:
    """experiments/results/figure11_ppo.png: win rate of each pair on both axes, a dot per seed, a
    bar for the mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = list(dict.fromkeys(pair for seed in seeds for pair in result[seed]["wins"]))
    figure, panel = plt.subplots(figsize=(9, 0.6 * len(pairs) + 1.4), layout="constrained")
    for offset, axis, color in ((-0.18, "helpfulness", "tab:blue"), (0.18, "safety", "tab:green")):
        rates = [
            [result[seed]["wins"][pair][axis][0] for seed in seeds if pair in result[seed]["wins"]]
            for pair in pairs
        ]
        places = [i + offset for i in range(len(pairs))]
        panel.barh(
            places,
            [sum(row) / len(row) - 0.5 for row in rates],
            0.32,
            left=0.5,
            color=color,
            alpha=0.5,
            label=axis,
        )
        for place, row in zip(places, rates, strict=True):
            panel.plot(row, [place] * len(row), ".", color=color, markersize=5)
    panel.axvline(0.5, color="black", linewidth=0.8)
    panel.set(
        yticks=range(len(pairs)), yticklabels=pairs, xlim=(0.2, 0.8), xlabel="win rate, ties half"
    )
    panel.invert_yaxis()
    panel.legend(loc="lower right")
    figure.suptitle(
        f"Test prompts, temperature 1 but where told, annotator; up to {len(seeds)} seeds (dots),"
        " their mean (bars)",
        fontsize=10,
    )
    figure.savefig(RESULTS / "figure11_ppo.png", dpi=110)


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"A against B, axis": win rates, one per seed}; controls may be there for some seeds only."""
    rows = {}
    for pair in dict.fromkeys(pair for seed in seeds for pair in result[seed]["wins"]):
        tables = [result[seed]["wins"][pair] for seed in seeds if pair in result[seed]["wins"]]
        for axis in ("helpfulness", "safety"):
            rows[f"{pair}, {axis}"] = [table[axis][0] for table in tables]
    return rows


def main(argv: list[str] | None = None) -> None:
    # 1. PPO, V5 and the controls, seed by seed
    s = parse_settings(Settings, __doc__, argv=argv)
    set_threads(1)
    world.ensure()
    result = load_result("figure11_ppo", s)  # refuses before hours of training, not after
    for seed in s.seeds:
        require(s.out / str(seed) / "rlhf-v4", f"python experiments/reference.py --seeds {seed}")
    side_by_side(
        {f"ppo-seed-{seed}": commands(s.out / str(seed), seed, s.controls) for seed in s.seeds},
        s.out,
        s.at_once,
    )

    # 2. measure each on the test prompts
    for seed in s.seeds:
        result[str(seed)] = measure(s.out / str(seed), s, seed)
        save_result("figure11_ppo", result, s)

    # 3. seed by seed, and means over seeds
    result, seeds = load_result("figure11_ppo", s), [str(seed) for seed in s.seeds]
    draw(result, seeds)
    print_claims("Win rates", claims(result, seeds))
    for label in dict.fromkeys(label for seed in seeds for label in result[seed]["summary"]):
        found = [
            result[seed]["summary"][label] for seed in seeds if label in result[seed]["summary"]
        ]
        print(
            f"{label}:",
            ", ".join(
                f"{key} {measures.interval([row[key][0] for row in found])}" for key in found[0]
            ),
        )
    for seed in seeds:
        print(f"seed {seed}:", result[seed]["ppo"])


if __name__ == "__main__":
    run(main)
