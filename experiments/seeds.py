"""The main chain for several seeds side by side, one thread each, measured on the test prompts.

    python experiments/seeds.py --seeds 1,2,3

Resumable: what is finished is not run again. Writes experiments/results/seeds.json, one entry per
seed, each number with its interval over items. Printed are means over seeds with their 95 %
intervals (Student's t over seeds) and each seed's own number; the intervals of what is compared
with SFT are corrected for all comparisons that are read side by side.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, world
from experiments.common import RESULTS, load_result, print_claims, save_result, side_by_side
from runtime import is_finished, load_model, parse_settings, run, set_threads


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # fresh ones: seed 0 was used for tuning
    out: Path = Path("out/seeds")  # each seed's models go to OUT/SEED
    preset: str = "toy"  # of every stage
    samples: int = 4  # answers per test prompt
    at_once: int = 2  # how many seeds run side by side


def measure(root: Path, samples: int, seed: int, split: str = "test") -> dict:
    """Summaries, win rates over SFT, content at each temperature, scores by family, reward-model
    accuracies and seconds of one finished chain."""
    prompts = read_prompts(world.ensure() / f"prompts-{split}.jsonl")
    names = [
        name for name in ("sft", *(f"rlhf-v{v}" for v in range(1, 5))) if is_finished(root / name)
    ]
    judged = {
        name: measures.evaluate(*load_model(root / name), prompts, seed=seed, samples=samples)
        for name in names
    }
    asked, content = measures.harmless(prompts), {}
    for temperature in measures.TEMPERATURES:
        if temperature == 1:
            rows = {
                name: [row for row in judged[name] if not prompts[row["index"]]["is_safety"]]
                for name in names
            }
            content[measures.at_temperature(1)] = measures.compare_content(prompts, rows)
            continue
        rows = {}
        for name in names:
            rows[name] = measures.evaluate(
                *load_model(root / name),
                asked,
                seed=seed,
                temperature=temperature,
                # greedy answers are all the same
                samples=samples if temperature else 1,
            )
        content[measures.at_temperature(temperature)] = measures.compare_content(asked, rows)
    records = {
        name: json.loads((root / name / "stage.json").read_text())["results"]
        for name in [*names, "reward-helpfulness", "reward-safety"]
    }
    return {
        "versions": {
            name: {
                "summary": measures.summary(prompts, rows),
                "families": measures.by_family(prompts, rows),
                "wins": measures.compare(prompts, rows, judged["sft"]) if name != "sft" else {},
            }
            for name, rows in judged.items()
        },
        "content": content,
        "reward_models": {axis: records[f"reward-{axis}"] for axis in ("helpfulness", "safety")},
        "temperatures": {
            name: records[name]["temperature"] for name in names if "temperature" in records[name]
        },
        "seconds": {name: round(record["seconds"]) for name, record in records.items()},
        "cpu_seconds": {name: round(record["cpu_seconds"]) for name, record in records.items()},
    }


def draw(result: dict, seeds: tuple[int, ...]) -> None:
    """experiments/results/seeds.png: win rates over SFT and scores of each version, a thin line per
    seed, a thick mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(result[str(seeds[0])]["versions"])
    labels = [name.removeprefix("rlhf-").upper() for name in names]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, title in zip(
        panels, ("win rate over SFT (ties half)", "annotator's score, false refusals"), strict=True
    ):
        for what, color in (
            ("helpfulness", "tab:blue"),
            ("safety", "tab:green"),
            ("false_refusals", "tab:red"),
        ):
            if what == "false_refusals" and panel is panels[0]:
                continue
            lines = [
                [
                    (
                        (0.5 if name == "sft" else row["wins"][what][0])
                        if panel is panels[0]
                        else row["summary"][what][0]
                    )
                    for name, row in result[str(seed)]["versions"].items()
                ]
                for seed in seeds
            ]
            for line in lines:
                panel.plot(labels, line, color=color, alpha=0.35, linewidth=1)
            panel.plot(
                labels,
                [sum(column) / len(column) for column in zip(*lines, strict=True)],
                color=color,
                linewidth=2.5,
                marker="o",
                label=what.replace("_", " "),
            )
        panel.set(title=title, ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend(loc="center right")
    figure.suptitle(
        f"Test prompts, temperature 1, {len(seeds)} seeds (thin) and their mean", fontsize=10
    )
    figure.savefig(RESULTS / "seeds.png", dpi=110)


def claims(result: dict, seeds: list[str]) -> dict[str, dict[str, list[float]]]:
    """What is compared with SFT, one number per seed: win rates, and differences of content."""
    versions = [name for name in result[seeds[0]]["versions"] if name != "sft"]
    wins, content = {}, {}
    for version in versions:
        for axis in ("helpfulness", "safety"):
            tables = [result[seed]["versions"][version]["wins"] for seed in seeds]
            wins[f"{version}, {axis}"] = [table[axis][0] for table in tables]
        for temperature in result[seeds[0]].get("content", ()):  # older entries have none
            tables = [result[seed]["content"][temperature][version] for seed in seeds]
            content[f"{version}, {temperature}"] = [table["difference"][0] for table in tables]
    return {"Win rates over SFT": wins, "Content, difference from SFT": content}


def main() -> None:
    # 1. the chain, seed by seed
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    name = "seeds" if s.preset == "toy" else f"seeds-{s.preset}"
    result = load_result(name, s)  # refuses before hours of training, not after
    stages = ("sft.py", "reward.py", "rejection_sampling.py")
    side_by_side(
        {
            f"seed-{seed}": [
                [
                    stage,
                    "--seed",
                    str(seed),
                    "--out",
                    str(s.out / str(seed)),
                    "--preset",
                    s.preset,
                    "--threads",
                    "1",
                ]
                for stage in stages
            ]
            for seed in s.seeds
        },
        s.out,
        s.at_once,
    )

    # 2. measure each on the test prompts
    for seed in s.seeds:
        result[str(seed)] = measure(s.out / str(seed), s.samples, seed)
        save_result(name, result, s)

    # 3. means over seeds
    result = load_result(name, s)
    draw(result, s.seeds)
    for version in result[str(s.seeds[0])]["versions"]:
        found = [result[str(seed)]["versions"][version] for seed in s.seeds]
        print(
            f"{version}:",
            ", ".join(
                f"{key} {measures.interval([row['summary'][key][0] for row in found])}"
                for key in found[0]["summary"]
            ),
        )
        for temperature in result[str(s.seeds[0])]["content"]:
            tables = [result[str(seed)]["content"][temperature][version] for seed in s.seeds]
            for key in [key for key in tables[0] if key != "difference"]:
                values = [table[key][0] for table in tables]
                print(
                    f"    {key}, {temperature}: {measures.interval(values)}; seeds",
                    *(f"{value:.3f}" for value in values),
                )
    for title, rows in claims(result, [str(seed) for seed in s.seeds]).items():
        print_claims(title, rows)


if __name__ == "__main__":
    run(main)
