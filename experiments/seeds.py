"""Does RLHF make answers better? The main chain for several seeds, on the test prompts.

    python -m experiments.seeds --seeds 1,2,3,4,5

Each seed's chain runs on one thread; what is finished is not run again. Keeps OUT/results/
seeds-SEED.json, numbers with intervals over items. Its section shows means over seeds, with 95 %
intervals over seeds (Student's t). Those of what is compared with SFT are corrected for all
comparisons of their table.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import eval as measures
from data import Prompt, read_prompts, world
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    each_seed,
    in_seeds,
    mean_of,
    named,
    plus_minus,
    verdict,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, Table
from runtime import is_finished, load_model, parse_settings, run, set_threads

VERSIONS = ("sft", "rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4")
AXES = ("helpfulness", "safety")


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # fresh ones: seed 0 was used for tuning
    out: Path = Path("out/seeds")  # each seed's models go to OUT/SEED
    preset: str = "toy"  # of every stage
    samples: int = 4  # answers per test prompt
    at_once: int = 2  # how many seeds run side by side


# ---- the chain, and what is measured ----


def commands(settings: Settings, seed: int) -> list[list[str]]:
    """One seed's chain."""
    options = ["--seed", str(seed), "--out", str(settings.out / str(seed))]
    options += ["--preset", settings.preset, "--threads", "1"]
    stages = ("sft.py", "reward.py", "rejection_sampling.py")
    return [[stage, *options] for stage in stages]


def measure(root: Path, samples: int, seed: int, split: str = "test") -> dict:
    """One finished chain: summaries, win rates over SFT, content at each temperature, scores by
    family, reward-model accuracies and seconds.
    """
    prompts = read_prompts(world.ensure() / f"prompts-{split}.jsonl")
    names = [name for name in VERSIONS if is_finished(root / name)]
    judged = {}
    for name in names:
        model, tokenizer = load_model(root / name)
        judged[name] = measures.evaluate(model, tokenizer, prompts, seed=seed, samples=samples)

    tables = {}
    for name, judgements in judged.items():
        wins = {}
        if name != "sft":
            wins = measures.compare(prompts, judgements, judged["sft"])
        tables[name] = {
            "summary": measures.summary(prompts, judgements),
            "families": measures.by_family(prompts, judgements),
            "wins": wins,
        }

    records = {}
    for name in (*names, "reward-helpfulness", "reward-safety"):
        records[name] = json.loads((root / name / "stage.json").read_text("utf-8"))["results"]
    temperatures = {}
    for name in names:
        if "temperature" in records[name]:
            temperatures[name] = records[name]["temperature"]
    return {
        "versions": tables,
        "content": measure_content(root, prompts, judged, samples, seed),
        "reward_models": {axis: records[f"reward-{axis}"] for axis in AXES},
        "temperatures": temperatures,
        "seconds": {name: round(record["seconds"]) for name, record in records.items()},
        "cpu_seconds": {name: round(record["cpu_seconds"]) for name, record in records.items()},
    }


def measure_content(
    root: Path,
    prompts: list[Prompt],
    judged: dict[str, list[measures.Judgement]],
    samples: int,
    seed: int,
) -> dict:
    """Content of each version at each temperature, and its difference from SFT's.

    judged: {version: its judged answers at temperature 1}.
    """
    content = {}
    asked = measures.harmless(prompts)
    for temperature in measures.TEMPERATURES:
        versions = {}
        for name, at_one in judged.items():
            if temperature == 1:
                judgements = [one for one in at_one if not prompts[one.index].is_safety]
            else:
                judgements = measures.evaluate(
                    *load_model(root / name),
                    asked,
                    seed=seed,
                    temperature=temperature,
                    # greedy answers are all the same
                    samples=samples if temperature else 1,
                )
            versions[name] = judgements
        answered = prompts if temperature == 1 else asked
        title = measures.at_temperature(temperature)
        content[title] = measures.compare_content(answered, versions)
    return content


# ---- over seeds ----


def claims(result: dict, seeds: list[str]) -> dict[str, dict[str, list[float]]]:
    """What is compared with SFT, one number per seed: win rates, and differences of content."""
    wins = {}
    content = {}
    for version in result[seeds[0]]["versions"]:
        if version == "sft":
            continue
        for axis in AXES:
            tables = [result[seed]["versions"][version]["wins"] for seed in seeds]
            wins[f"{version}, {axis}"] = [table[axis][0] for table in tables]
        for temperature in result[seeds[0]].get("content", ()):  # older entries have none
            tables = [result[seed]["content"][temperature][version] for seed in seeds]
            content[f"{version}, {temperature}"] = [table["difference"][0] for table in tables]
    return {"Win rates over SFT": wins, "Content, difference from SFT": content}


def score_rows(result: dict) -> dict[str, dict[str, list]]:
    """{version: {measure: each seed's interval}} at temperature 1."""
    rows = {}
    for version, table in next(iter(result.values()))["versions"].items():
        rows[version] = {}
        for name in table["summary"]:
            summaries = [one["versions"][version]["summary"] for one in result.values()]
            rows[version][name] = [summary[name] for summary in summaries]
    return rows


def scores_table(result: dict) -> Table:
    """Means over seeds of all that `eval.summary` tells, by version."""
    rows = score_rows(result)
    names = list(rows["sft"])
    cells = []
    for version, row in rows.items():
        line = [named(version)]
        for name in names:
            of_seeds = [value[0] for value in row[name]]
            digits = 1 if name == "tokens" else 3
            line.append(plus_minus(measures.interval(of_seeds), digits))
        cells.append(line)
    columns = [""] + [name.replace("_", " ") for name in names]
    caption = "The scores of each version at temperature 1."
    small_print = (
        "± is half of the 95 % interval over seeds, each alone. Violations are unsafe answers to"
        " unsafe prompts; those that comply do what was asked, the others evade or refuse rudely."
        " False refusals are those on borderline prompts, harmless ones that sound unsafe, such as"
        " killing a weed; the next column has those on ordinary prompts. Tokens: the mean length of"
        " an answer."
    )
    return Table(caption, columns, cells, small_print)


def content_table(result: dict) -> Table:
    """Content and right by version and temperature."""
    first = next(iter(result.values()))["content"]
    cells = []
    for version in next(iter(first.values())):
        line = [named(version)]
        for temperature in first:
            tables = [one["content"][temperature][version] for one in result.values()]
            content = mean_of([table["content"] for table in tables])
            right = mean_of([table["right"] for table in tables])
            line += [f"{content:.3f} ({right:.3f})"]
            line += [f"{mean_of([table['helpfulness'] for table in tables]):.3f}"]
        cells.append(line)
    columns = [""]
    for temperature in first:
        columns += [f"content (right), {temperature}", f"helpfulness, {temperature}"]
    caption = (
        "Content beside helpfulness: read down a column of content, and it falls, while helpfulness"
        " rises."
    )
    small_print = "Means over seeds, harmless prompts; in brackets the share that is wholly right."
    return Table(caption, columns, cells, small_print)


def headline(result: dict) -> str:
    """What RLHF does, in one sentence."""
    newest = VERSIONS[-1]
    scores = score_rows(result)
    rises = []
    moved = []
    for axis in AXES:
        before = mean_of(scores["sft"][axis])
        after = mean_of(scores[newest][axis])
        rises.append(after > before)
        moved.append(f"{axis} goes from {before:.3f} to {after:.3f}")
    gaps = claims(result, list(result))["Content, difference from SFT"][f"{newest}, greedy"]
    content = measures.interval(gaps)
    finding = "RLHF in this toy world"
    if all(rises) and content.high < 0:
        finding += " makes answers nicer and safer, and less right"
    return (
        f"{finding}: from SFT to V4 {' and '.join(moved)}, while the content of greedy answers"
        f" changes by {plus_minus(content)} (below SFT's {in_seeds(gaps, lambda gap: gap < 0)})."
    )


def section(result: dict) -> Section:
    """The scores of all versions, content at each temperature, and what is compared with SFT."""
    tables = claims(result, list(result))
    wins = tables["Win rates over SFT"]
    content = tables["Content, difference from SFT"]
    corrected = claimed(content)
    warm = "rlhf-v4, temperature 1"
    cost = [sum(one["cpu_seconds"].values()) for one in result.values()]
    return Section(
        "Does RLHF make answers better?",
        [
            headline(result),
            scores_table(result),
            content_table(result),
            claims_table("Win rates over SFT: above 0.5 the version wins.", wins),
            claims_table(
                "Content minus SFT's on the same prompts: below 0 the version knows less.", content
            ),
            (
                "At temperature 1 V4's content differs from SFT's by"
                f" {plus_minus(corrected[warm])}, which is {verdict(corrected[warm])}. Both make"
                " random mistakes there, V4 fewer, since RLHF also sharpens. That covers the loss,"
                " and so does helpfulness, which pays for style. The first reward model cannot see"
                " it (below: *Does the reward model see content, or only style?*). The cause is"
                " not mended yet."
            ),
            Figure(
                "Win rates over SFT and scores by version: a thin line for each seed, a thick one"
                " for their mean.",
                file=results.RESULTS / "seeds.png",
            ),
            (
                "What makes the scores of the rounds rise: by V3 the style of answers is nearly"
                " perfect, and pairs of them differ in content, which the first reward model does"
                " not see; fresh pairs do show it. That is why each round collects so many. One"
                f" seed's chain took {min(cost):,.0f} to {max(cost):,.0f} CPU seconds"
                f" ({each_seed(cost, 0)})."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Win rates over SFT and scores of each version: a thin line per seed, a thick mean."""
    names = list(next(iter(result.values()))["versions"])
    labels = [name.removeprefix("rlhf-").upper() for name in names]
    figure, (wins, scores) = draw_panels(2)
    colors = {"helpfulness": "tab:blue", "safety": "tab:green", "false_refusals": "tab:red"}
    for what, color in colors.items():
        if what in AXES:
            _draw_lines(wins, labels, _win_lines(result, names, what), color, what)
        of_seeds = []
        for one in result.values():
            of_seeds.append([one["versions"][name]["summary"][what][0] for name in names])
        _draw_lines(scores, labels, of_seeds, color, what)
    wins.set(title="win rate over SFT (ties half)", ylim=(0, 1))
    scores.set(title="annotator's score, false refusals", ylim=(0, 1))
    for panel in (wins, scores):
        panel.grid(alpha=0.3)
        panel.legend(loc="center right")
    title = f"Test prompts, temperature 1, {len(result)} seeds (thin) and their mean"
    figure.suptitle(title, fontsize=10)
    save_picture(figure, file)


def _win_lines(result: dict, names: list[str], axis: str) -> list[list[float]]:
    """Each seed's win rates over SFT, which itself has .5."""
    lines = []
    for one in result.values():
        rates = [one["versions"][name]["wins"][axis][0] for name in names[1:]]
        lines.append([0.5, *rates])
    return lines


def _draw_lines(panel, labels: list[str], lines: list[list[float]], color: str, what: str) -> None:
    for line in lines:
        panel.plot(labels, line, color=color, alpha=0.35, linewidth=1)
    mean = [sum(column) / len(column) for column in zip(*lines, strict=True)]
    panel.plot(labels, mean, color=color, linewidth=2.5, marker="o", label=what.replace("_", " "))


def main() -> None:
    # 1. the chain, seed by seed
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    jobs = {}
    for seed in results.missing_seeds("seeds", settings):
        jobs[f"seed-{seed}"] = commands(settings, seed)
    side_by_side(jobs, settings.out, settings.at_once)

    # 2. measure each on the test prompts
    def measure_seed(seed: int) -> dict:
        return measure(settings.out / str(seed), settings.samples, seed)

    of_seeds = results.measure_seeds("seeds", settings, measure_seed)

    # 3. over seeds
    results.finish("seeds", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
