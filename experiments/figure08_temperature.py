"""Which temperature is best for best of N (Fig. 8), and does it move over the rounds?

    python -m experiments.figure08_temperature --seeds 1,2,3      after experiments.seeds

For SFT and every later version: answers to test prompts at several temperatures, scored by the
reward models of the round that sampled from this version (the newest version: its own). For each
the highest reward of N answers (order statistics, unbiased), the annotator's score of the picks,
and the temperature with the highest maximum at the rounds' own K, with the middle 95 % of where it
falls when items are drawn anew (bootstrap). Beside it what the rounds themselves chose on dev
prompts. Keeps OUT/results/figure08-SEED.json.
"""

import json
import random
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import eval as measures
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
from experiments.shared.over_seeds import each_seed, named
from experiments.shared.pictures import draw_curves, draw_panels, save_picture
from experiments.shared.settings import ExperimentSettings
from rejection_sampling import Settings as RoundSettings
from report import Figure, Section, Table
from runtime import parse_settings, run, set_threads

ROUNDS = ("sft", "rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4")  # each samples for the next one
CHOSEN = "chosen by the round"


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2, 1.4)  # as in the paper's figure
    samples: int = 32  # answers per prompt and temperature: the largest N
    prompts: int = 200  # so many of the test prompts, the same for every seed


def best_temperature(
    maxima: dict[float, list[float]], clusters: list[str], draws: int = 1000
) -> tuple[float, float, float]:
    """The temperature with the highest mean, and the middle 95 % of the temperatures that win when
    clusters are drawn with replacement.

    maxima: {temperature: one for each prompt}.
    """
    members = defaultdict(list)  # {cluster: numbers of its prompts}
    for i, cluster in enumerate(clusters):
        members[cluster].append(i)
    sums = {}  # {temperature: the sum over each cluster}
    for temperature, values in maxima.items():
        sums[temperature] = []
        for numbers in members.values():
            sums[temperature].append(sum(values[i] for i in numbers))

    # draws have unequal numbers of prompts, the same ones for every temperature
    rng = random.Random(0)
    winners = []
    for _ in range(draws):
        drawn = rng.choices(range(len(members)), k=len(members))
        totals = {}
        for temperature, of_clusters in sums.items():
            totals[temperature] = sum(of_clusters[i] for i in drawn)
        winners.append(max(totals, key=totals.get))
    winners.sort()
    best = max(maxima, key=lambda temperature: sum(maxima[temperature]))
    return best, winners[round(0.025 * draws)], winners[round(0.975 * draws) - 1]


def measure_version(
    root: Path, number: int, names: list[str], prompts: list[Prompt], settings: Settings, seed: int
) -> dict:
    """Version `number` of these at each temperature."""
    sizes = sizes_up_to(settings.samples)
    k = max(n for n in sizes if n <= RoundSettings.samples)
    judges = {"reward": reward_models_of(root, names[: number + 2])}
    table = {"maximum": {}, "pick": {}}
    maxima = {}
    for temperature in settings.temperatures:
        scores = sampled_scores(
            root / names[number],
            prompts,
            judges,
            samples=settings.samples,
            seed=seed,
            temperature=temperature,
        )
        curves = best_of_n(scores["reward"], scores["annotator"], sizes)
        maxima[temperature] = curves["maximum"][sizes.index(k)].tolist()
        for what in ("maximum", "pick"):
            table[what][temperature] = intervals_of_rows(curves[what], prompts)
    clusters = [measures.cluster(prompt) for prompt in prompts]
    table[f"best at N = {k}"] = best_temperature(maxima, clusters)
    table[CHOSEN] = None
    if number + 1 < len(names):
        record = json.loads((root / names[number + 1] / "stage.json").read_text("utf-8"))
        table[CHOSEN] = record["results"].get("temperature")
    return table


def measure(root: Path, prompts: list[Prompt], settings: Settings, seed: int) -> dict:
    """{version: its curves and best temperature}."""
    names = [name for name in versions(root) if name in ROUNDS]
    table = {}
    for number, name in enumerate(names):
        table[name] = measure_version(root, number, names, prompts, settings, seed)
    return table


def assemble(of_seeds: dict[str, dict], settings: Settings) -> dict:
    """What is published of the seeds."""
    sizes = sizes_up_to(settings.samples)
    count = len(draw_prompts(settings.prompts))
    return {"N": sizes, "prompts": count, "seeds": of_seeds}


# ---- over seeds ----


def best_of(entry: dict) -> list[float]:
    """The best temperature of a version, and where it falls when items are drawn anew."""
    [key] = [key for key in entry if key.startswith("best at")]
    return entry[key]


def _temperatures_of(result: dict, name: str) -> list[float]:
    """A version's best temperature, one per seed."""
    return [best_of(one[name])[0] for one in result["seeds"].values()]


def liked_best(result: dict, name: str) -> list[float]:
    """Where the annotator likes the picks of a version best, one per seed; of all N the last."""
    temperatures = []
    for one in result["seeds"].values():
        picks = {t: curve[-1][0] for t, curve in one[name]["pick"].items()}
        temperatures.append(float(max(picks, key=picks.get)))
    return temperatures


def section(result: dict) -> Section:
    """The best temperature of each version, by the reward and by the annotator."""
    first = next(iter(result["seeds"].values()))
    newest = list(first)[-1]
    cells = []
    for name in first:
        chosen = [one[name][CHOSEN] for one in result["seeds"].values()]
        shown = "" if None in chosen else each_seed(chosen, 1)
        best = each_seed(_temperatures_of(result, name), 1)
        cells.append([named(name), best, each_seed(liked_best(result, name), 1), shown])
    [key] = [key for key in first["sft"] if key.startswith("best at")]
    columns = ["", f"highest reward, {key.removeprefix('best at ')}"]
    columns += [f"annotator likes the picks best, N = {result['N'][-1]}", CHOSEN]
    scores = []
    for temperature in first[newest]["pick"]:
        curves = [one[newest]["pick"][temperature] for one in result["seeds"].values()]
        mean = statistics.fmean(curve[-1][0] for curve in curves)
        scores.append(f"{mean:.3f} at {temperature}")
    return Section(
        "Which temperature is best for best of N, and does it move over the rounds? (Fig. 8)",
        [
            (
                "It moves up, as in the paper: the highest reward comes at"
                f" {each_seed(_temperatures_of(result, 'sft'), 1)} for SFT and at"
                f" {each_seed(_temperatures_of(result, newest), 1)} for {named(newest)} (seed by"
                " seed). The annotator does not agree."
            ),
            Table(
                "The best temperature of each version, seed by seed.",
                columns,
                cells,
                f"{result['prompts']} test prompts. A round samples from the version before it.",
            ),
            Figure(
                "Reward and the annotator's score by temperature.",
                file=results.RESULTS / "figure08.png",
            ),
            (
                f"In between it goes up and down. The annotator's score of {named(newest)}'s picks"
                f" is {', '.join(scores)} (means over seeds): what is gained at higher temperatures"
                " are the reward model's mistakes. The rounds look at"
                f" {', '.join(map(str, RoundSettings.temperatures))} only."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Rewards and the annotator's scores by N and temperature; the best temperature by version."""
    figure, (*panels, best_panel) = draw_panels(5, width=3.3)
    first = next(iter(result["seeds"].values()))
    newest = list(first)[-1]
    titles = {"maximum": "highest reward", "pick": "annotator on the pick"}
    shown = [("sft", "maximum"), (newest, "maximum"), ("sft", "pick"), (newest, "pick")]
    for panel, (name, what) in zip(panels, shown, strict=True):
        for i, temperature in enumerate(first[name][what]):
            curves = [one[name][what][temperature] for one in result["seeds"].values()]
            draw_curves(panel, result["N"], curves, f"T {temperature}", color=f"C{i}")
        panel.set(title=f"{name}: {titles[what]} of N", xlabel="N")
        panel.set_xscale("log", base=2)
        panel.legend(fontsize=7)
    for i, (seed, one) in enumerate(result["seeds"].items()):
        best = [best_of(entry) for entry in one.values()]
        x = [place + 0.1 * i for place in range(len(one))]
        below = [max(0, value - low) for value, low, _ in best]
        above = [max(0, high - value) for value, _, high in best]
        y = [value for value, _, _ in best]
        best_panel.errorbar(x, y, [below, above], fmt="o", label=f"seed {seed}")
    temperatures = list(map(float, first["sft"]["maximum"]))
    best_panel.set(title="best temperature by version")
    best_panel.set(xticks=range(len(first)), xticklabels=list(first))
    best_panel.set_ylim(min(temperatures) - 0.1, max(temperatures) + 0.4)
    best_panel.tick_params(axis="x", rotation=30)
    best_panel.legend(fontsize=7)
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        prompts = draw_prompts(settings.prompts)
        return measure(settings.out / str(seed), prompts, settings, seed)

    of_seeds = results.measure_seeds("figure08", settings, measure_seed)
    results.finish("figure08", assemble(of_seeds, settings), settings, section, draw)


if __name__ == "__main__":
    run(main)
