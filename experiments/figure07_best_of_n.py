"""Best of N (Fig. 7): the highest reward among N answers rises with N; does the annotator agree?

    python -m experiments.figure07_best_of_n --seeds 1,2,3      after experiments.seeds

SFT and the newest model of each seed, both scored by the newest reward models, on test prompts at
temperature 1. Every N is estimated from the same answers (order statistics, unbiased), so
neighbouring points are not independent. Beside the rewards the annotator's score of the very
answers that the reward picks, and the score of the annotator's own picks: the ceiling. Keeps
OUT/results/figure07-SEED.json (intervals over items). Whether the pick of N is better than one
answer is shown with intervals over seeds, corrected for all N and both models.
"""

from dataclasses import dataclass
from pathlib import Path

from data import Prompt
from experiments.shared import results
from experiments.shared.best_of_n import (
    best_of_n,
    draw_prompts,
    intervals_of_rows,
    reward_models_of,
    sampled_scores,
    sizes_up_to,
    versions,
)
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    mean_curve,
    named,
    plus_minus,
    verdict,
)
from experiments.shared.pictures import draw_curves, draw_panels, save_picture
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, Table
from runtime import parse_settings, run, set_threads

MODELS = ("sft", "newest")


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    samples: int = 64  # answers per prompt: the largest N
    prompts: int = 400  # so many of the test prompts, the same for every seed


def measure(root: Path, prompts: list[Prompt], samples: int, seed: int) -> dict:
    """{"sft" and "newest": {maximum, median, pick, ceiling: an interval per N}}."""
    names = versions(root)
    judges = {"reward": reward_models_of(root, names)}
    sizes = sizes_up_to(samples)
    table = {}
    for label, name in zip(MODELS, ("sft", names[-1]), strict=True):
        scores = sampled_scores(root / name, prompts, judges, samples=samples, seed=seed)
        curves = best_of_n(scores["reward"], scores["annotator"], sizes)
        own = best_of_n(scores["annotator"], scores["annotator"], sizes)
        curves["ceiling"] = own["maximum"]
        table[label] = {"version": name}
        for what, values in curves.items():
            table[label][what] = intervals_of_rows(values, prompts)
    return table


def assemble(of_seeds: dict[str, dict], settings: Settings) -> dict:
    """What is published of the seeds."""
    sizes = sizes_up_to(settings.samples)
    count = len(draw_prompts(settings.prompts))
    return {"N": sizes, "prompts": count, "seeds": of_seeds}


# ---- over seeds ----


def claims(of_seeds: dict, sizes: list[int]) -> dict[str, list[float]]:
    """{"model, N": what best of N changes in the annotator's score, one per seed}.

    of_seeds: {seed: what `measure` gives}.
    """
    rows = {}
    for model in MODELS:
        curves = [table[model]["pick"] for table in of_seeds.values()]
        for i, n in enumerate(sizes):
            if i > 0:
                rows[f"{model}, N = {n}"] = [curve[i][0] - curve[0][0] for curve in curves]
    return rows


def curves_table(result: dict) -> Table:
    """Rewards and the annotator's scores by N, means over seeds."""
    cells = []
    for model in MODELS:
        of_seeds = [table[model] for table in result["seeds"].values()]
        for what in ("maximum", "median", "pick", "ceiling"):
            digits = 2 if what in ("maximum", "median") else 3
            means = mean_curve([table[what] for table in of_seeds])
            name = named(of_seeds[0]["version"])
            cells.append([f"{name}, {what}", *(f"{mean:.{digits}f}" for mean in means)])
    columns = [""] + [f"N = {n}" for n in result["N"]]
    small_print = (
        "Maximum and median: of the rewards of N answers, a logit. Pick: the annotator's score of"
        " the answer with the highest reward. Ceiling: its score of the answer that it likes best"
        " itself."
    )
    return Table("The best of N answers, means over seeds.", columns, cells, small_print)


def section(result: dict) -> Section:
    """Rewards and scores by N, and what the pick of N changes."""
    sizes = result["N"]
    rows = claims(result["seeds"], sizes)
    changes = claimed(rows)
    sft, newest = (changes[f"{model}, N = {sizes[-1]}"] for model in MODELS)
    name = named(next(iter(result["seeds"].values()))["newest"]["version"])
    picks = mean_curve([table["newest"]["pick"] for table in result["seeds"].values()])
    best = picks.index(max(picks))
    return Section(
        "Best of N: the reward rises with N; does the annotator agree? (Fig. 7)",
        [
            (
                f"For SFT it does, for {name} it does not: the pick of {sizes[-1]} changes the"
                f" annotator's score by {plus_minus(sft)} for SFT ({verdict(sft)}) and by"
                f" {plus_minus(newest)} for {name} ({verdict(newest)})."
            ),
            curves_table(result),
            claims_table(
                "The annotator's score of the pick of N minus that of one answer.",
                rows,
                f"{result['prompts']} test prompts, temperature 1.",
            ),
            Figure(
                "Rewards and the annotator's scores of the best of N.",
                file=results.RESULTS / "figure07.png",
            ),
            (
                "As in the paper the maximal reward rises with N and the median hardly does."
                f" Beside it stands what the paper could not show. {name} is judged here by the"
                " reward models that it was tuned with: the annotator's score of its picks is"
                f" highest at N = {sizes[best]} ({picks[best]:.3f}) and ends at {picks[-1]:.3f}."
                " Among its own answers the highest rewards are mistakes of the reward model. That"
                " is why every round starts with fresh preferences, and PPO, too."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Rewards on the left, the annotator's scores on the right."""
    figure, (rewards, scores) = draw_panels(2)
    shown = (
        (rewards, "maximum", "maximum", "-"),
        (rewards, "median", "median", "--"),
        (scores, "pick", "of the reward's pick", "-"),
        (scores, "ceiling", "of its own pick", ":"),
    )
    for model, color in zip(MODELS, ("tab:blue", "tab:orange"), strict=True):
        tables = [one[model] for one in result["seeds"].values()]
        for panel, what, title, style in shown:
            label = f"{tables[0]['version']}, {title}"
            curves = [table[what] for table in tables]
            draw_curves(panel, result["N"], curves, label, color=color, linestyle=style)
    rewards.set(title="reward (a logit) among N answers", xlabel="N")
    scores.set(title="annotator's score", xlabel="N", ylim=(0, 1))
    for panel in (rewards, scores):
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        prompts = draw_prompts(settings.prompts)
        return measure(settings.out / str(seed), prompts, settings.samples, seed)

    of_seeds = results.measure_seeds("figure07", settings, measure_seed)
    results.finish("figure07", assemble(of_seeds, settings), settings, section, draw)


if __name__ == "__main__":
    run(main)
