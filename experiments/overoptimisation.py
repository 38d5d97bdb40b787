"""Over-optimisation: the reward of the best of N rises for ever; does the annotator's score of the
same answers?

    python -m experiments.overoptimisation --seeds 1,2,3      after experiments.seeds

Many answers of one version (SFT) to some test prompts at temperature 1, picked by several versions
of the reward models: the first ones and those of every round. Every N is estimated from the same
answers (order statistics, unbiased). Keeps OUT/results/overoptimisation-SEED.json (intervals over
items). What the last two doublings of N change in the annotator's score is shown with intervals
over seeds, corrected for the number of reward models.
"""

from dataclasses import dataclass
from pathlib import Path

from data import Prompt
from experiments.shared import results
from experiments.shared.best_of_n import (
    best_of_n,
    draw_prompts,
    has_reward_models,
    intervals_of_rows,
    reward_models_of,
    sampled_scores,
    sizes_up_to,
    versions,
)
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    count_significant,
    mean_curve,
    named,
    plus_minus,
)
from experiments.shared.pictures import draw_curves, draw_panels, save_picture
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, Table
from runtime import parse_settings, run, set_threads


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    policy: str = "sft"  # the version that answers
    samples: int = 256  # answers per prompt: the largest N
    prompts: int = 100  # so many of the test prompts, the same for every seed


def measure(root: Path, prompts: list[Prompt], settings: Settings, seed: int) -> dict:
    """{reward models: {"proxy": their reward of the best of N, "annotator": its score of the same
    answers}}, intervals per N.
    """
    judges = {"first": reward_models_of(root, [])}
    for name in versions(root):
        if has_reward_models(root / name):
            judges[name] = reward_models_of(root, [name])
    scores = sampled_scores(
        root / settings.policy, prompts, judges, samples=settings.samples, seed=seed
    )
    sizes = sizes_up_to(settings.samples)
    table = {}
    for name in [*judges, "annotator"]:
        curves = best_of_n(scores[name], scores["annotator"], sizes)
        table[name] = {
            "proxy": intervals_of_rows(curves["maximum"], prompts),
            "annotator": intervals_of_rows(curves["pick"], prompts),
        }
    return table


def assemble(of_seeds: dict[str, dict], settings: Settings) -> dict:
    """What is published of the seeds."""
    return {
        "N": sizes_up_to(settings.samples),
        "policy": settings.policy,
        "prompts": len(draw_prompts(settings.prompts)),
        "seeds": of_seeds,
    }


# ---- over seeds ----


def _common_judges(of_seeds: dict) -> list[str]:
    """The reward models that all seeds have."""
    first, *others = of_seeds.values()
    return [name for name in first if all(name in other for other in others)]


def claims(of_seeds: dict, sizes: list[int]) -> dict[str, list[float]]:
    """{reward models: what the last two doublings change in the annotator's score, one per seed}.

    of_seeds: {seed: what `measure` gives}; versions that a seed lacks are left out.
    """
    rows = {}
    for name in _common_judges(of_seeds):
        curves = [table[name]["annotator"] for table in of_seeds.values()]
        title = f"picked by {name}, N = {sizes[-3]} to {sizes[-1]}"
        rows[title] = [curve[-1][0] - curve[-3][0] for curve in curves]
    return rows


def curves_table(result: dict) -> Table:
    """The annotator's score of the best of N by each reward model, and its reward."""
    cells = []
    for name in _common_judges(result["seeds"]):
        tables = [table[name] for table in result["seeds"].values()]
        for what, digits in (("proxy", 2), ("annotator", 3)):
            if (name, what) != ("annotator", "proxy"):
                means = mean_curve([table[what] for table in tables])
                title = f"{named(name)}'s pick, {'its reward' if what == 'proxy' else 'annotator'}"
                cells.append([title, *(f"{mean:.{digits}f}" for mean in means)])
    columns = [""] + [f"N = {n}" for n in result["N"]]
    small_print = (
        "First: the reward models that were trained on SFT's answers; V1 to V4: those of that"
        f" round. {result['prompts']} test prompts, answers of {named(result['policy'])} at"
        " temperature 1."
    )
    return Table("The best of N answers, means over seeds.", columns, cells, small_print)


def section(result: dict) -> Section:
    """Rewards and the annotator's scores as N grows."""
    sizes = result["N"]
    rows = claims(result["seeds"], sizes)
    corrected = claimed(rows)
    by_models = {name: one for name, one in corrected.items() if "annotator" not in name}
    [own] = [one for name, one in corrected.items() if "annotator" in name]
    changes = [interval.mean for interval in by_models.values()]
    return Section(
        "Over-optimisation: the reward of the best of N goes on rising; does the annotator's"
        " score?",
        [
            (
                f"It nearly stands still: from N = {sizes[-3]} to {sizes[-1]} the annotator's score"
                f" of the picks changes by {min(changes):+.3f} to {max(changes):+.3f}, depending on"
                f" the reward models; significant are {count_significant(by_models)}."
            ),
            claims_table("What the last two doublings of N change in the annotator's score.", rows),
            curves_table(result),
            Figure(
                "Rewards and the annotator's scores of the picks as N grows.",
                file=results.RESULTS / "overoptimisation.png",
            ),
            (
                "Every reward goes on rising, but the later the reward models, the more of that the"
                f" annotator sees. Its own picks go on: by {plus_minus(own)}."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """The reward of the best of N on the left, the annotator's score of it on the right."""
    figure, panels = draw_panels(2)
    for i, name in enumerate(next(iter(result["seeds"].values()))):
        for panel, what in zip(panels, ("proxy", "annotator"), strict=True):
            if (name, what) != ("annotator", "proxy"):
                curves = [one[name][what] for one in result["seeds"].values()]
                draw_curves(panel, result["N"], curves, f"{name}'s pick", color=f"C{i}")
    panels[0].set(title="reward (a logit) of the best of N", xlabel="N")
    panels[1].set(title="annotator's score of the same answers", xlabel="N", ylim=(0, 1))
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        prompts = draw_prompts(settings.prompts)
        return measure(settings.out / str(seed), prompts, settings, seed)

    of_seeds = results.measure_seeds("overoptimisation", settings, measure_seed)
    result = assemble(of_seeds, settings)
    results.finish("overoptimisation", result, settings, section, draw)


if __name__ == "__main__":
    run(main)
