"""Is V4-PPO better than V4 (Fig. 11), and what does one more round on top of it give?

    python -m experiments.figure11_ppo --seeds 1,2,3,4,5

after experiments.reference. Controls, on some of the seeds: also V5 without PPO, and PPO after V5.

On the test prompts at temperature 1, judged by the annotator: V4-PPO against V4; against V4 at its
own best temperature (chosen on dev prompts), since PPO sharpens, too; both at their own best; V5
against V4-PPO, V4 and the controls. Resumable. Keeps OUT/results/figure11_ppo-SEED.json (rates with
intervals over items); shown are means over seeds, their intervals over seeds corrected for the
number of win rates that are read side by side, and each seed's own rate. V5 without PPO has not
seen the preferences that PPO collected, either: V5 differs from it in both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import eval as measures
from data import read_prompts, world
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    each_seed,
    in_seeds,
    plus_minus,
    verdict,
)
from experiments.shared.pictures import save_picture
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section, Table
from runtime import is_finished, load_model, parse_settings, require, run, set_threads

NAMES = {
    "rlhf-v4": "V4",
    "rlhf-v4-ppo": "V4-PPO",
    "rlhf-v5": "V5",
    "rlhf-v5-no-ppo": "V5 without PPO",
    "rlhf-v5-ppo": "PPO after V5",
}
CONTROLS = ("rlhf-v5-no-ppo", "rlhf-v5-ppo")
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
AXES = ("helpfulness", "safety")


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # whose models are in OUT/SEED
    out: Path = Path("out/final")  # as in experiments.reference
    controls: tuple[int, ...] = (1, 2, 3)  # seeds that also get V5 without PPO, and PPO after V5
    # tried for V4 and V4-PPO on dev prompts
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    samples: int = 4  # answers per test prompt
    at_once: int = 2  # how many seeds run side by side


def commands(root: Path, seed: int, with_controls: bool) -> list[list[str]]:
    """What makes one seed's models, in order."""
    common = ["--seed", str(seed), "--out", str(root), "--threads", "1"]
    fifth_round = ["rejection_sampling.py", "--rounds", "5"]
    lines = [["ppo.py", *common], [*fifth_round, "--init", str(root / "rlhf-v4-ppo"), *common]]
    if with_controls:
        lines += [
            [*fifth_round, "--name", "rlhf-v5-no-ppo", *common],
            ["ppo.py", "--init", str(root / "rlhf-v5"), *common],
        ]
    return lines


# ---- what is measured ----


def best_temperature(folder: Path, temperatures: tuple[float, ...], seed: int) -> float:
    """The temperature with the highest mean of helpfulness and safety on dev prompts, by the
    annotator.
    """
    prompts = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    model, tokenizer = load_model(folder)
    table = {}
    for temperature in temperatures:
        judgements = measures.evaluate(
            model, tokenizer, prompts, seed=seed, samples=2, temperature=temperature
        )
        means = measures.summary(prompts, judgements)
        table[temperature] = means["helpfulness"].mean + means["safety"].mean
    return max(table, key=table.get)


def measure(root: Path, settings: Settings, seed: int) -> dict:
    """One seed: summaries, scores by family, win rates of PAIRS, what PPO's own record says."""
    # 1. each model at temperature 1, V4 and V4-PPO at their best one, too
    prompts = read_prompts(world.FOLDER / "prompts-test.jsonl")
    judged = {}
    for name, label in NAMES.items():
        is_wanted = name not in CONTROLS or seed in settings.controls
        if is_wanted and is_finished(root / name):
            model, tokenizer = load_model(root / name)
            judged[label] = measures.evaluate(
                model, tokenizer, prompts, seed=seed, samples=settings.samples
            )
    cool = {}
    for name in ("rlhf-v4", "rlhf-v4-ppo"):
        temperature = best_temperature(root / name, settings.temperatures, seed)
        cool[NAMES[name]] = temperature
        judged[f"{NAMES[name]} at its best T"] = measures.evaluate(
            *load_model(root / name),
            prompts,
            seed=seed + 1000,
            samples=settings.samples,
            temperature=temperature,
        )

    # 2. against each other
    wins = {}
    for first, second in PAIRS:
        if first in judged and second in judged:
            compared = measures.compare(prompts, judged[first], judged[second])
            wins[f"{first} against {second}"] = compared
    records = {}
    for name in ("rlhf-v4-ppo", "rlhf-v5-ppo"):
        if NAMES[name] in judged:
            records[NAMES[name]] = ppo_record(root / name)
    return {
        "best temperature": cool,
        "summary": {label: measures.summary(prompts, rows) for label, rows in judged.items()},
        "families": {label: measures.by_family(prompts, rows) for label, rows in judged.items()},
        "wins": wins,
        "ppo": records,
    }


def ppo_record(folder: Path) -> dict:
    """What PPO's own record says of the model that it kept, and of its cost."""
    record = json.loads((folder / "stage.json").read_text("utf-8"))["results"]
    best = record["best"]
    kept = {key: best[key] for key in ("iteration", "kl", "reward", "length")}
    kept["reward at the start"] = best["start"]["reward"]
    kept["seconds"] = record["seconds"]
    kept["cpu_seconds"] = record["cpu_seconds"]
    return kept


# ---- over seeds ----


def _pairs(result: dict) -> list[str]:
    """All comparisons that some seed has."""
    pairs = {}
    for one in result.values():
        pairs |= dict.fromkeys(one["wins"])
    return list(pairs)


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"A against B, axis": win rates, one per seed}; controls may be there for some seeds only."""
    chosen = {seed: result[seed] for seed in seeds}
    rows = {}
    for pair in _pairs(chosen):
        tables = [one["wins"][pair] for one in chosen.values() if pair in one["wins"]]
        for axis in AXES:
            rows[f"{pair}, {axis}"] = [table[axis][0] for table in tables]
    return rows


def scores_table(result: dict) -> Table:
    """Means over seeds of all that `eval.summary` tells."""
    first = next(iter(result.values()))["summary"]
    names = list(first["V4"])
    cells = []
    for label in first:
        summaries = [one["summary"][label] for one in result.values() if label in one["summary"]]
        line = [label]
        for name in names:
            interval = measures.interval([summary[name][0] for summary in summaries])
            line.append(plus_minus(interval, 1 if name == "tokens" else 3))
        cells.append(line)
    columns = [""] + [name.replace("_", " ") for name in names]
    small_print = "± is half of the 95 % interval over seeds, each alone; controls on fewer seeds."
    return Table("The annotator's scores.", columns, cells, small_print)


def record_table(result: dict) -> Table:
    """PPO's own record: reward, KL, length, cost."""
    keys = ("reward at the start", "reward", "kl", "length", "iteration", "cpu_seconds")
    cells = []
    for label in ("V4-PPO", "PPO after V5"):
        records = [one["ppo"][label] for one in result.values() if label in one["ppo"]]
        line = [label]
        for key in keys:
            digits = 2 if key in ("reward at the start", "reward", "kl") else 0
            line.append(each_seed([record[key] for record in records], digits))
        cells.append(line)
    columns = ["", "reward before", "reward after", "KL", "tokens", "iteration", "CPU seconds"]
    caption = "PPO's own record, seed by seed: the reward on held-out prompts rises."
    return Table(caption, columns, cells, "The model that is kept is that of the best iteration.")


def section(result: dict) -> Section:
    """V4-PPO and V5 against what they came from."""
    rows = claims(result, list(result))
    corrected = claimed(rows)
    main_claim = corrected["V4-PPO against V4, helpfulness"]
    rates = rows["V4-PPO against V4, helpfulness"]
    at_best = corrected["V4-PPO at its best T against V4 at its best T, helpfulness"]
    by_v4 = corrected["V4-PPO against V4 at its best T, helpfulness"]
    cool = {}
    scores = {}
    for name in ("V4", "V4-PPO"):
        cool[name] = [one["best temperature"][name] for one in result.values()]
        label = f"{name} at its best T"
        summaries = [one["summary"][label]["helpfulness"][0] for one in result.values()]
        scores[name] = measures.interval(summaries).mean
    return Section(
        "Is V4-PPO better than V4, and what does one more round give? (Fig. 11)",
        [
            (
                f"By the annotator's score a little: V4-PPO wins {plus_minus(main_claim)} over V4"
                f" in helpfulness, {in_seeds(rates, lambda rate: rate > 0.5)}, which is"
                f" {verdict(main_claim, 0.5)}; with both at their best temperature it wins"
                f" {plus_minus(at_best)}."
            ),
            claims_table(
                "Win rates on test prompts: above 0.5 the first one wins.",
                rows,
                "Temperature 1 but where told; the best T of each model is chosen on dev prompts.",
            ),
            Figure(
                "Win rates of V4-PPO, V5 and the controls: dots are seeds, bars their means.",
                file=results.RESULTS / "figure11_ppo.png",
            ),
            scores_table(result),
            record_table(result),
            (
                "What PPO does is mostly sharpening. V4 at its best temperature"
                f" ({each_seed(cool['V4'], 1)}, seed by seed) meets V4-PPO at temperature 1 with"
                f" {plus_minus(by_v4)} for V4-PPO; with both at their best (V4-PPO's is"
                f" {each_seed(cool['V4-PPO'], 1)}) V4-PPO's mean score is {scores['V4-PPO']:.3f}"
                f" and V4's {scores['V4']:.3f}. And it scores by style: its content is below V4's"
                " at temperature 0.4 and greedy (first section). V5 cannot be told from V4-PPO. A"
                " fifth round without PPO gains nothing that could be told; PPO after V5, the"
                " other order, changes nothing that so few seeds could show. V5 differs from V5"
                " without PPO in one thing more: it has seen PPO's preferences."
            ),
            (
                "Two things had to be found. The reward models know only answers of versions before"
                " the one that is tuned, and PPO goes where they are wrong: in one seed every"
                ' answer became "First get a rock, then break the ...". So PPO, too, first'
                " collects fresh preferences. And the value network: started as the policy with a"
                " new head, its guess of an answer's final reward was hardly better than the mean"
                " over the prompt's answers, so every token of an answer got the same credit and"
                " the steps were mostly noise, which forgets facts. It starts near the helpfulness"
                " model instead."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Win rate of each pair on both axes, a dot per seed, a bar for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pairs = _pairs(result)
    size = (9, 0.6 * len(pairs) + 1.4)
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    rows = claims(result, list(result))
    for offset, axis, color in ((-0.18, "helpfulness", "tab:blue"), (0.18, "safety", "tab:green")):
        rates = [rows[f"{pair}, {axis}"] for pair in pairs]
        places = [i + offset for i in range(len(pairs))]
        gains = [sum(row) / len(row) - 0.5 for row in rates]
        panel.barh(places, gains, 0.32, left=0.5, color=color, alpha=0.5, label=axis)
        for place, row in zip(places, rates, strict=True):
            panel.plot(row, [place] * len(row), ".", color=color, markersize=5)
    panel.axvline(0.5, color="black", linewidth=0.8)
    panel.set(yticks=range(len(pairs)), yticklabels=pairs)
    panel.set(xlim=(0.2, 0.8), xlabel="win rate, ties half")
    panel.invert_yaxis()
    panel.legend(loc="lower right")
    title = (
        f"Test prompts, temperature 1 but where told, annotator; up to {len(result)} seeds (dots),"
        " their mean (bars)"
    )
    figure.suptitle(title, fontsize=10)
    save_picture(figure, file)


def main(argv: list[str] | None = None) -> None:
    # 1. PPO, V5 and the controls, seed by seed
    settings = parse_settings(Settings, __doc__, argv=argv)
    set_threads(1)
    world.ensure()
    jobs = {}
    for seed in results.missing_seeds("figure11_ppo", settings):
        root = settings.out / str(seed)
        require(root / "rlhf-v4", f"python -m experiments.reference --seeds {seed}")
        jobs[f"ppo-seed-{seed}"] = commands(root, seed, seed in settings.controls)
    side_by_side(jobs, settings.out, settings.at_once)

    # 2. measure each on the test prompts
    def measure_seed(seed: int) -> dict:
        return measure(settings.out / str(seed), settings, seed)

    of_seeds = results.measure_seeds("figure11_ppo", settings, measure_seed)

    # 3. over seeds
    results.finish("figure11_ppo", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
