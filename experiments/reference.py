"""Is a run healthy? The whole default pipeline for several seeds, which other runs are compared
with.

    python -m experiments.reference --seeds 1,2,3,4,5   makes what is missing (a quarter of an hour
                                                        a seed), then collects
    python -m experiments.reference --collect           collects from runs that are there

Keeps OUT/results/reference-SEED.json, {number: value}: for each version the annotator's scores and
win rates over SFT on the test prompts, its content at each temperature, the losses and accuracies
of the stages, the KL of PPO, the adherence under Ghost Attention, as `python eval.py` finds them in
OUT/SEED (its report is there, too).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import eval as measures
from data import world
from experiments.shared import results
from experiments.shared.over_seeds import claims_table, each_seed, in_seeds, plus_minus
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from report import PIPELINE, Section, Table, command
from runtime import is_finished, parse_settings, run, set_threads

CONTROLS = ("rlhf-v5-no-ppo", "rlhf-v5-ppo", "second")  # not a part of the pipeline
TEMPERATURES = ("temperature 1", "temperature 0.4", "greedy")
NAMES = {  # how the numbers name the versions, and how the section does
    "sft": "SFT",
    "rlhf-v1": "V1",
    "rlhf-v2": "V2",
    "rlhf-v3": "V3",
    "gatt": "Ghost Attention on V3",
    "rlhf-v4 (with GAtt)": "V4",
    "rlhf-v4-ppo (with GAtt)": "V4-PPO",
    "rlhf-v5 (with GAtt)": "V5",
}


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # fresh ones: seed 0 was used for tuning
    out: Path = Path("out/final")  # each seed's models go to OUT/SEED
    at_once: int = 2  # how many seeds run side by side
    collect: bool = False  # only collect: run no stage


# ---- the pipeline ----


def missing_commands(root: Path, seed: int) -> list[list[str]]:
    """The stages of the pipeline whose folders are not finished, in their order, each once."""
    wanted = []
    for name in PIPELINE:
        if name not in CONTROLS and not is_finished(root / name):
            wanted.append(command(name, root))
    commands = []
    for line in dict.fromkeys(wanted):
        commands.append([*line.split()[1:], "--seed", str(seed), "--threads", "1"])
    return commands


def measure(root: Path) -> dict[str, float]:
    """The numbers of one finished pipeline, as its report has them."""
    measures.main(["--out", str(root), "--threads", "1"])
    return json.loads((root / "eval" / "metrics.json").read_text("utf-8"))["numbers"]


# ---- over seeds ----


def values_of(result: dict, name: str) -> list[float]:
    """A number of each seed that has it."""
    return [numbers[name] for numbers in result.values() if name in numbers]


def versions_of(result: dict) -> dict[str, str]:
    """NAMES of the versions that all seeds have."""
    versions = {}
    for version, name in NAMES.items():
        if len(values_of(result, f"{version}: helpfulness")) == len(result):
            versions[version] = name
    return versions


def differences(result: dict) -> dict[str, list[float]]:
    """{"version, temperature": content minus SFT's, one per seed}."""
    rows = {}
    for version, name in versions_of(result).items():
        if version == "sft":
            continue
        for temperature in TEMPERATURES:
            content = values_of(result, f"{version}: content, {temperature}")
            baseline = values_of(result, f"sft: content, {temperature}")
            gaps = [one - other for one, other in zip(content, baseline, strict=True)]
            rows[f"{name}, {temperature}"] = gaps
    return rows


def content_table(result: dict) -> Table:
    """Content and right beside helpfulness, by version and temperature."""
    cells = []
    for version, name in versions_of(result).items():
        line = [name]
        for temperature in TEMPERATURES:
            for what in ("content", "right", "helpfulness"):
                values = values_of(result, f"{version}: {what}, {temperature}")
                line.append(f"{measures.interval(values).mean:.3f}")
        cells.append(line)
    columns = [""]
    for temperature in TEMPERATURES:
        columns += [f"content, {temperature}", "right", "helpfulness"]
    caption = (
        "Content and right beside helpfulness, version by version: helpfulness rises, content and"
        " right do not."
    )
    small_print = "Means over seeds, harmless test prompts, judged by the annotator."
    return Table(caption, columns, cells, small_print)


def wins_table(result: dict) -> Table:
    """Scores, win rates over SFT and adherence of each version."""
    measured = ("helpfulness", "helpfulness, win over sft", "safety", "safety, win over sft")
    cells = []
    for version, name in versions_of(result).items():
        line = [name]
        for what in (*measured, "adherence"):
            values = values_of(result, f"{version}: {what}")
            line.append(plus_minus(measures.interval(values)) if values else "")
        cells.append(line)
    caption = "The same versions by the annotator's scores at temperature 1, and adherence."
    small_print = (
        "± is half of the 95 % interval over seeds, each alone. Adherence is that of the report:"
        " one or two instructions of any kind, dialogs of 20 turns."
    )
    return Table(caption, ["", *measured, "adherence"], cells, small_print)


def stages_table(result: dict) -> Table:
    """The numbers of the stages, and where one more run lies."""
    shown = {
        "sft: dev_loss": "SFT's held-out loss, nats a token",
        "reward-helpfulness: reward model average": "helpfulness model's held-out accuracy",
        "reward-safety: reward model average": "safety model's held-out accuracy",
        "rlhf-v4-ppo (with GAtt): best kl": "KL of V4-PPO, nats an answer",
    }
    cells = []
    for name, title in shown.items():
        values = values_of(result, name)
        if not values:
            continue
        cells.append([title, str(measures.prediction_interval(values)), each_seed(values)])
    caption = "Numbers of the stages: where one more healthy run lies."
    small_print = (
        "Brackets are 95 % prediction intervals. `python eval.py` compares all numbers of a run"
        " with such intervals."
    )
    return Table(caption, ["", "mean and prediction interval", "each seed"], cells, small_print)


def headline(gaps: dict[str, list[float]]) -> str:
    """How content moves, from the newest version back to V4."""
    newest, *earlier = (name for name in reversed(NAMES.values()) if f"{name}, greedy" in gaps)
    lost = gaps[f"{newest}, greedy"]
    others = []
    for name in earlier:
        if name.startswith("V4"):
            others.append(f"{name}'s by {plus_minus(measures.interval(gaps[f'{name}, greedy']))}")
    return (
        "The whole pipeline makes answers nicer and safer and loses content, too: that of"
        f" {newest}'s greedy answers differs from SFT's by {plus_minus(measures.interval(lost))}"
        f" (it is below it {in_seeds(lost, lambda gap: gap < 0)})"
        + "".join(f", {one}" for one in others)
        + "."
    )


def obeying(result: dict) -> str:
    """What one more round does to adherence; "" where there is no V5."""
    v4 = values_of(result, "rlhf-v4 (with GAtt): adherence")
    v5 = values_of(result, "rlhf-v5 (with GAtt): adherence")
    if not v4 or len(v4) != len(v5):
        return ""
    gaps = [one - other for one, other in zip(v5, v4, strict=True)]
    return (
        "One more round on single questions wears obeying away: V5's adherence differs from V4's by"
        f" {plus_minus(measures.interval(gaps))} (below it {in_seeds(gaps, lambda gap: gap < 0)}). "
    )


def section(result: dict) -> Section:
    """The whole pipeline: content and right beside helpfulness, scores, stages."""
    gaps = differences(result)
    return Section(
        "What does the whole pipeline do?",
        [
            headline(gaps),
            content_table(result),
            claims_table("Content minus SFT's: below 0 the version knows less.", gaps),
            wins_table(result),
            stages_table(result),
            obeying(result)
            + "That Ghost Attention on V3 scores high in helpfulness at temperature"
            " 1 is no gain over V4: it also learned from ordinary answers that were sampled at 0.7,"
            " which sharpens. At temperature 0.4 the first table compares them fairly.",
        ],
    )


def main() -> None:
    # 1. the pipeline, seed by seed
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    if not settings.collect:
        jobs = {}
        for seed in results.missing_seeds("reference", settings):
            jobs[f"seed-{seed}"] = missing_commands(settings.out / str(seed), seed)
        side_by_side(jobs, settings.out, settings.at_once)

    # 2. the report of each, and its numbers
    def measure_seed(seed: int) -> dict:
        return measure(settings.out / str(seed))

    of_seeds = results.measure_seeds("reference", settings, measure_seed)

    # 3. over seeds
    results.finish("reference", of_seeds, settings, section)


if __name__ == "__main__":
    run(main)
