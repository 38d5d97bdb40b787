"""How do the scores move over the versions (Fig. 20)? The reward models' distributions, the
annotator's beside them.

    python -m experiments.figure20_score_drift --seeds 1,2,3      after experiments.reference

Each version's answers to the test prompts at temperature 1: helpfulness on harmless prompts, safety
on unsafe ones, as probabilities (sigmoid). Scored by the newest reward models (the picture) and by
the first ones: where the two drift apart, or move on while the annotator stands still, the reward
is running away from what it stands for. Keeps OUT/results/figure20-SEED.json: means with intervals
over items, and histograms.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import eval as measures
from data import Prompt, read_prompts, world
from experiments.shared import results
from experiments.shared.best_of_n import annotator_scores, reward_models_of, versions
from experiments.shared.over_seeds import each_seed, in_seeds, named
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, Table
from reward import AXES
from runtime import load_model, parse_settings, run, sample_answers, set_threads

BINS = 20  # of the histograms, between 0 and 1
JUDGES = ("first reward model", "newest reward model", "annotator")


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/final")  # as in experiments.reference
    samples: int = 2  # answers per test prompt


def measure_version(root: Path, name: str, judges: dict, samples: int, seed: int) -> dict:
    """One version: {axis: {judge: {"mean": interval, "histogram": shares of answers}}}."""
    prompts = read_prompts(world.ensure() / "prompts-test.jsonl")
    model, tokenizer = load_model(root / name)
    answers = sample_answers(model, tokenizer, prompts, key=(seed, "evaluation"), samples=samples)
    axes = [measures.axis_of(prompts[answer.index]) for answer in answers]
    views = {}  # judge: a score in [0, 1] of each answer on its prompt's axis
    for title, reward_models in judges.items():
        scored = reward_models.score(prompts, answers)
        logits = [getattr(answer, axis) for answer, axis in zip(scored, axes, strict=True)]
        views[title] = [measures.sigmoid(logit) for logit in logits]
    views["annotator"] = annotator_scores(prompts, answers)
    owners = [prompts[answer.index] for answer in answers]
    table = {}
    for axis in AXES:
        picked = [i for i, of_answer in enumerate(axes) if of_answer == axis]
        table[axis] = {}
        for title, values in views.items():
            chosen = [values[i] for i in picked]
            table[axis][title] = _distribution(chosen, [owners[i] for i in picked])
    return table


def _distribution(values: list[float], prompts: list[Prompt]) -> dict:
    """The mean of scores, clustered by item, and the share of them in each bin."""
    clusters = [measures.cluster(prompt) for prompt in prompts]
    counts = torch.histc(torch.tensor(values), BINS, 0, 1) / len(values)  # (BINS)
    return {"mean": measures.interval(values, clusters), "histogram": counts.tolist()}


def measure(root: Path, samples: int, seed: int) -> dict:
    """{version: {axis: {judge: its distribution}}}."""
    names = versions(root)
    judges = {
        "first reward model": reward_models_of(root, []),
        "newest reward model": reward_models_of(root, names),
    }
    table = {}
    for name in names:
        table[name] = measure_version(root, name, judges, samples, seed)
    return table


# ---- over seeds ----


def _means(result: dict, name: str, axis: str, judge: str) -> list[float]:
    """A judge's mean score of a version, one per seed."""
    return [one[name][axis][judge]["mean"][0] for one in result.values()]


def _mean(result: dict, name: str, axis: str, judge: str) -> float:
    return measures.interval(_means(result, name, axis, judge)).mean


def _common_versions(result: dict) -> list[str]:
    """The versions that all seeds have."""
    first = next(iter(result.values()))
    return [name for name in first if all(name in one for one in result.values())]


def scores_table(result: dict, axis: str) -> Table:
    """The judges' mean scores of each version."""
    cells = []
    for name in _common_versions(result):
        line = [named(name)]
        for judge in JUDGES:
            values = _means(result, name, axis, judge)
            line.append(f"{measures.interval(values).mean:.3f} ({each_seed(values, 2)})")
        cells.append(line)
    caption = f"Mean {axis} of each version's answers by each judge, from 0 to 1."
    small_print = "The reward models' scores are sigmoids. Means over seeds, in brackets each seed."
    return Table(caption, ["", *JUDGES], cells, small_print)


def section(result: dict) -> Section:
    """The judges' mean scores, version by version."""
    *_, newest = _common_versions(result)
    first_judge, _, annotator = JUDGES
    gaps = []
    for one in result.values():
        of_newest = one[newest]["helpfulness"]
        gaps.append(of_newest[first_judge]["mean"][0] - of_newest[annotator]["mean"][0])
    shown = []
    for judge in JUDGES:
        before = _mean(result, "sft", "helpfulness", judge)
        after = _mean(result, newest, "helpfulness", judge)
        shown.append(f"by the {judge} from {before:.3f} to {after:.3f}")
    return Section(
        "How do the scores move over the versions? (Fig. 20)",
        [
            (
                "They rise for every judge, most for the reward models: from SFT to"
                f" {named(newest)} helpfulness goes {', '.join(shown)}. The first reward model ends"
                f" above the annotator {in_seeds(gaps, lambda gap: gap > 0)}."
            ),
            *(scores_table(result, axis) for axis in AXES),
            Figure(
                "The distributions of the scores by the newest reward models and by the annotator.",
                file=results.RESULTS / "figure20.png",
            ),
            (
                "Where a reward model's scores move on while the annotator's stand still, the"
                " reward is running away from what it stands for. Style is what the reward models"
                " agree on; the annotator's helpfulness counts what is right, too."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """The distributions by version, mean over seeds."""
    figure, panels = draw_panels(4, width=3.4)
    centres = [(i + 0.5) / BINS for i in range(BINS)]
    shown = [(axis, judge) for axis in AXES for judge in JUDGES[1:]]
    for panel, (axis, judge) in zip(panels, shown, strict=True):
        for i, name in enumerate(_common_versions(result)):
            histograms = [one[name][axis][judge]["histogram"] for one in result.values()]
            mean = [sum(column) / len(column) for column in zip(*histograms, strict=True)]
            panel.step(centres, mean, where="mid", label=name, color=f"C{i}")
        title = f"{axis}: {judge}"
        panel.set(title=title, xlabel="score", ylabel="share of answers", ylim=(0, None))
        panel.legend(fontsize=7)
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings.out / str(seed), settings.samples, seed)

    of_seeds = results.measure_seeds("figure20", settings, measure_seed)
    results.finish("figure20", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
