"""What is forgotten? The pool of all rounds against the last round only, by family of prompts.

    python experiments/forgetting.py --seeds 1,2,3      after experiments/seeds.py

The paper's V3 was tuned on samples of the last round alone and forgot how to rhyme. The same rounds
with `--pool last` are run in OUT/SEED-last, from copies of the same SFT and reward models
(resumable). Then each last version against SFT, and the one against the other: the annotator's
scores of answers to all test prompts at temperature 1, paired by prompt. A seed's own intervals are
clustered by item. What is claimed is over seeds: the mean of the seeds' means, with Student's t
over seeds, corrected for the number of families. (Answers of several seeds to one item are not
independent tests of whether training forgets, so they are never pooled.) Writes
experiments/results/forgetting.json (per seed and over seeds) and forgetting.png.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, world
from experiments.common import RESULTS, draw_panels, save_result, side_by_side
from reward import AXES
from runtime import load_model, parse_settings, report, require, run, set_threads


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    preset: str = "toy"  # as there
    rounds: int = 4  # compare the models of this round
    samples: int = 4  # answers per test prompt
    at_once: int = 2  # seeds side by side


def answers(root: Path, s: Settings, seed: int, prompts: list[dict]) -> dict[str, list[dict]]:
    """Judged answers of SFT and of the last version of either pool, to the same random numbers."""
    folders = {
        "sft": root / "sft",
        "pool of all rounds": root / f"rlhf-v{s.rounds}",
        "last round only": root.with_name(f"{seed}-last") / f"rlhf-v{s.rounds}",
    }
    return {
        name: measures.evaluate(
            *load_model(require(folder, "python experiments/seeds.py")),
            prompts,
            seed=seed,
            samples=s.samples,
        )
        for name, folder in folders.items()
    }


def compare(found: dict[str, list[dict]], prompts: list[dict]) -> dict[str, dict]:
    pairs = {
        "pool of all rounds against SFT": ("pool of all rounds", "sft"),
        "last round only against SFT": ("last round only", "sft"),
        "pool of all rounds against last round only": ("pool of all rounds", "last round only"),
    }
    return {
        title: measures.compare_families(prompts, found[a], found[b])
        for title, (a, b) in pairs.items()
    }


def families_over_seeds(tables: list[dict]) -> dict[str, dict]:
    """Tables of `compare_families`, one per seed -> {family: {"wins", "difference", "verdict"}}
    over seeds.

    Both intervals are over the seeds' means and hold for all families together.
    """
    found = {}
    for family in tables[0]:
        rates = [table[family][0][0] for table in tables]
        differences = [table[family][1][0] for table in tables]
        gap = measures.interval(differences, comparisons=len(tables[0]))
        wins = measures.interval(rates, comparisons=len(tables[0]))
        found[family] = {"wins": wins, "difference": gap, "verdict": measures.verdict(gap)}
    return found


def draw(tables: dict[str, dict]) -> None:
    figure, (panel,) = draw_panels(1, width=7)
    for i, title in enumerate(list(tables)[:2]):
        table = tables[title]
        values = [one["difference"] for one in table.values()]
        panel.errorbar(
            [value.mean for value in values],
            [j + 0.2 * i for j in range(len(table))],
            xerr=[[v.mean - v.low for v in values], [v.high - v.mean for v in values]],
            fmt="o",
            label=title,
        )
    panel.set_yticks(range(len(table)), list(table))
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set(
        xlabel=(
            "difference of the annotator's scores (intervals over seeds, for all families together)"
        )
    )
    panel.legend(fontsize=7)
    figure.savefig(RESULTS / "forgetting.png", dpi=110)


def main() -> None:
    # 1. the rounds without the pool
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    jobs = {}
    for seed in s.seeds:
        target = s.out / f"{seed}-last"
        for name in ("sft", *(f"reward-{axis}" for axis in AXES)):
            if not (target / name).exists():
                shutil.copytree(
                    require(s.out / str(seed) / name, "python experiments/seeds.py"), target / name
                )
        jobs[f"seed-{seed}-last"] = [
            [
                "rejection_sampling.py",
                "--seed",
                str(seed),
                "--out",
                str(target),
                "--pool",
                "last",
                "--rounds",
                f"1-{s.rounds}",
                "--preset",
                s.preset,
                "--threads",
                "1",
            ]
        ]
    side_by_side(jobs, s.out, s.at_once)

    # 2. by family: each seed, then over seeds
    prompts, result = read_prompts(world.ensure() / "prompts-test.jsonl"), {}
    for seed in s.seeds:
        found = answers(s.out / str(seed), s, seed, prompts)
        result[str(seed)] = {
            "families": compare(found, prompts),
            "summary": {name: measures.summary(prompts, rows) for name, rows in found.items()},
        }
    result["over seeds"] = {}
    for title in result[str(s.seeds[0])]["families"]:
        table = families_over_seeds([result[str(seed)]["families"][title] for seed in s.seeds])
        result["over seeds"][title] = table
        report.print_tables(
            [
                report.Section(
                    "Over seeds", [report.families_table(title, table, measures.NOT_WORSE)]
                )
            ]
        )
    save_result("forgetting", result, s)
    draw(result["over seeds"])


if __name__ == "__main__":
    run(main)
