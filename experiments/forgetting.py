"""What is forgotten? The pool of all rounds against the last round only, by family of prompts.

    python -m experiments.forgetting --seeds 1,2,3      after experiments.seeds

The paper's V3 was tuned on samples of the last round alone and forgot how to rhyme. The same rounds
with `--pool last` are run in OUT/SEED-last, from copies of the same SFT and reward models
(resumable). Then each last version against SFT, and the one against the other: the annotator's
scores of answers to all test prompts at temperature 1, paired by prompt. A seed's own intervals are
clustered by item. What is claimed is over seeds: the mean of the seeds' means, with Student's t
over seeds, corrected for the number of families. (Answers of several seeds to one item are not
independent tests of whether training forgets, so they are never pooled.) Keeps
OUT/results/forgetting-SEED.json.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import eval as measures
from data import Prompt, read_prompts, world
from experiments.shared import results
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, families_table
from reward import AXES
from runtime import load_model, parse_settings, require, run, set_threads

PAIRS = {  # title: (a model, its baseline)
    "pool of all rounds against SFT": ("pool of all rounds", "sft"),
    "last round only against SFT": ("last round only", "sft"),
    "pool of all rounds against last round only": ("pool of all rounds", "last round only"),
}
OVER_SEEDS = "over seeds"


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    preset: str = "toy"  # as there
    rounds: int = 4  # compare the models of this round
    samples: int = 4  # answers per test prompt
    at_once: int = 2  # seeds side by side


# ---- the rounds without the pool ----


def copy_start(settings: Settings, seed: int) -> Path:
    """OUT/SEED-last, with copies of the seed's SFT and reward models."""
    target = settings.out / f"{seed}-last"
    for name in ("sft", *(f"reward-{axis}" for axis in AXES)):
        if not (target / name).exists():
            source = require(settings.out / str(seed) / name, "python -m experiments.seeds")
            shutil.copytree(source, target / name)
    return target


def command(settings: Settings, seed: int) -> list[str]:
    """The rounds on the last round's answers only."""
    line = ["rejection_sampling.py", "--pool", "last", "--rounds", f"1-{settings.rounds}"]
    line += ["--seed", str(seed), "--out", str(copy_start(settings, seed))]
    return [*line, "--preset", settings.preset, "--threads", "1"]


# ---- by family ----


def judged_answers(
    settings: Settings, seed: int, prompts: list[Prompt]
) -> dict[str, list[measures.Judgement]]:
    """Judged answers of SFT and of the last version of either pool, to the same random numbers."""
    root = settings.out / str(seed)
    newest = f"rlhf-v{settings.rounds}"
    folders = {
        "sft": root / "sft",
        "pool of all rounds": root / newest,
        "last round only": settings.out / f"{seed}-last" / newest,
    }
    judged = {}
    for name, folder in folders.items():
        model, tokenizer = load_model(require(folder, "python -m experiments.seeds"))
        judged[name] = measures.evaluate(
            model, tokenizer, prompts, seed=seed, samples=settings.samples
        )
    return judged


def measure(settings: Settings, seed: int) -> dict:
    """One seed: each pair of models by family, and summaries."""
    prompts = read_prompts(world.ensure() / "prompts-test.jsonl")
    judged = judged_answers(settings, seed, prompts)
    families = {}
    for title, (model, baseline) in PAIRS.items():
        families[title] = measures.compare_families(prompts, judged[model], judged[baseline])
    summaries = {name: measures.summary(prompts, rows) for name, rows in judged.items()}
    return {"families": families, "summary": summaries}


def families_over_seeds(tables: list[dict]) -> dict[str, dict]:
    """Tables of `compare_families`, one per seed -> {family: {"wins", "difference", "verdict"}}
    over seeds.

    Both intervals are over the seeds' means and hold for all families together.
    """
    families = {}
    for family in tables[0]:
        rates = [table[family][0][0] for table in tables]
        differences = [table[family][1][0] for table in tables]
        gap = measures.interval(differences, comparisons=len(tables[0]))
        wins = measures.interval(rates, comparisons=len(tables[0]))
        families[family] = {"wins": wins, "difference": gap, "verdict": measures.verdict(gap)}
    return families


def assemble(of_seeds: dict[str, dict]) -> dict:
    """What is published of the seeds."""
    over_seeds = {}
    for title in PAIRS:
        tables = [one["families"][title] for one in of_seeds.values()]
        over_seeds[title] = families_over_seeds(tables)
    return of_seeds | {OVER_SEEDS: over_seeds}


def _with_verdict(table: dict, verdict: str) -> list[str]:
    """The families of this verdict."""
    return [family for family, row in table.items() if row["verdict"] == verdict]


def section(result: dict) -> Section:
    """Each pair of models, family by family."""
    tables = result[OVER_SEEDS]
    against_sft, _, between = tables.values()
    better = _with_verdict(against_sft, "better")
    worse = _with_verdict(against_sft, "worse")
    apart = [family for family, row in between.items() if row["verdict"] in ("better", "worse")]
    seeds = [seed for seed in result if seed != OVER_SEEDS]
    blocks = [
        f"With {len(seeds)} seeds little can be told: by the annotator's score V4 is better than"
        f" SFT in {len(better)} of {len(against_sft)} families and worse in {len(worse) or 'none'};"
        f" between the pool of all rounds and the last round only {len(apart) or 'no'} family"
        " differs."
    ]
    for title, table in tables.items():
        blocks.append(families_table(title[0].upper() + title[1:], table, measures.NOT_WORSE))
    blocks += [
        Figure(
            "Differences of the annotator's scores from SFT's, by family.",
            file=results.RESULTS / "forgetting.png",
        ),
        (
            "The paper's V3 was tuned on samples of the last round only and forgot how to rhyme."
            " Here we can say neither that nothing is forgotten nor that the pool helps: the"
            " intervals over seeds, corrected for the number of families, are wide. These are"
            " scores at temperature 1, which pay for style, too. By content something *is*"
            " forgotten: see the first section."
        ),
    ]
    return Section("What is forgotten, and does the pool of all rounds help?", blocks)


def draw(result: dict, file: Path) -> None:
    """The differences from SFT by family, for both pools."""
    figure, (panel,) = draw_panels(1, width=7)
    for i, (title, table) in enumerate(list(result[OVER_SEEDS].items())[:2]):
        means, below, above = [], [], []
        for mean, low, high in (row["difference"] for row in table.values()):
            means.append(mean)
            below.append(mean - low if low is not None else 0)  # a single seed has no interval
            above.append(high - mean if high is not None else 0)
        places = [place + 0.2 * i for place in range(len(table))]
        panel.errorbar(means, places, xerr=[below, above], fmt="o", label=title)
    panel.set_yticks(range(len(table)), list(table))
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set(
        xlabel=(
            "difference of the annotator's scores (intervals over seeds, for all families together)"
        )
    )
    panel.legend(fontsize=7)
    save_picture(figure, file)


def main() -> None:
    # 1. the rounds without the pool
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    jobs = {}
    for seed in results.missing_seeds("forgetting", settings):
        jobs[f"seed-{seed}-last"] = [command(settings, seed)]
    side_by_side(jobs, settings.out, settings.at_once)

    # 2. by family: each seed, then over seeds
    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("forgetting", settings, measure_seed)
    results.finish("forgetting", assemble(of_seeds), settings, section, draw)


if __name__ == "__main__":
    run(main)
