"""What is missed for want of SFT's budget? The whole pipeline after twice SFT's passes.

    python -m experiments.longer_sft --seeds 1,2,3          after experiments.reference

Each seed's default models beside those of a second root in which SFT saw its demonstrations twice
(--epochs 2) and everything else followed as by default. It is not the default itself, since the
default chain is to take six minutes at most. Measured are

    summary     helpfulness and safety on test prompts, and the win rates over the same root's SFT
                and over the default's model;
    cool        the same at temperature 0.4, near V4's best (figure11_ppo.py), one answer each: is
                it more than sharpening?
    asked       for SFT, V3 and Ghost Attention, single questions under two instructions with words
                that training never had: the share of answers that keep both, and the share of all
                answers that hold a blend, the first syllable of one word with the second of the
                other;
    lasting     for the second root's Ghost Attention, the sets of Table 30 (table30_gatt.py has the
                default's);
    control     for its V3, with the instruction in every user message.

Training is resumable. Keeps OUT/results/longer_sft-SEED.json: shares with their intervals over
items. Win rates over the default's model are shown with intervals over seeds, corrected for all of
them.
"""

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import eval as measures
from data import Prompt, read_prompts, world
from experiments.reference import missing_commands
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    count_significant,
    each_seed,
    mean_of,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from experiments.table30_gatt import CONTROL_SETS, TURNS, measure_set, sets
from gatt import instruct
from report import Figure, Section, Table
from runtime import load_model, parse_settings, require, run, sample_answers, set_threads

STAGES = {
    "SFT": "sft",
    "V3": "rlhf-v3",
    "GAtt": "gatt",
    "V4": "rlhf-v4",
    "V4-PPO": "rlhf-v4-ppo",
    "V5": "rlhf-v5",
}
ASKED = ("SFT", "V3", "GAtt")
ROOTS = ("default", "two passes")


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose default pipeline is in OUT/SEED
    # as in experiments.reference; the other root is OUT/SEED-two-passes
    out: Path = Path("out/final")
    dialogs: int = 200  # of each set
    samples: int = 4  # answers per test prompt
    cool: float = 0.4  # the second temperature
    split: Literal["test", "dev", "train"] = "test"  # of questions and prompts
    at_once: int = 2  # seeds trained side by side


def roots_of(settings: Settings, seed: int) -> dict[str, Path]:
    """Where the two pipelines of a seed lie."""
    default = settings.out / str(seed)
    require(default / "rlhf-v5", "python -m experiments.reference")
    return {"default": default, "two passes": settings.out / f"{seed}-two-passes"}


def commands(root: Path, seed: int) -> list[list[str]]:
    """What is missing of the whole pipeline in ROOT, SFT with two passes."""
    lines = []
    for line in missing_commands(root, seed):
        if line[0] == "sft.py":
            line = [*line, "--epochs", "2"]
        lines.append(line)
    return lines


# ---- single questions under two instructions ----


def is_blend(word: str, values: list[str]) -> bool:
    """Whether a word is made of the first syllable of one made-up word and the second of another.

    >>> [is_blend(word, ["Kudu", "Denu"]) for word in ("Dedu", "Kudu", "Sure")]
    [True, False, False]
    """
    blends = set()
    for first in values:
        for second in values:
            blends.add(first[:2] + second[2:])
    return word not in values and word in blends


def asked_prompt(seed: int, number: int, split: str, constraints: list[dict]) -> Prompt:
    """A question under these constraints. It asks for a name or hobby that holds, since else it
    would not show.
    """
    rng = random.Random(f"asked {seed} {number}")
    hidden = [one for one in constraints if one["kind"] in measures.PROBED]
    probe = hidden[0] if hidden else None
    question = measures.ask_about(rng, split, probe)
    instruction = world.instruction(rng, constraints, short=0.5)
    return replace(question, messages=instruct(question.messages, instruction))


def asked(
    folder: Path, constraints: list[list[dict]], split: str, seed: int
) -> dict[str, measures.Interval]:
    """Single questions, each under the constraints of one dialog: shares of answers that keep all,
    and that hold a blend.
    """
    model, tokenizer = load_model(folder)
    prompts = []
    for number, of_dialog in enumerate(constraints):
        prompts.append(asked_prompt(seed, number, split, of_dialog))
    answers = sample_answers(model, tokenizer, prompts, key=(seed, "asked"), temperature=0.7)
    keeps = []
    blends = []
    for prompt, answer, of_dialog in zip(prompts, answers, constraints, strict=True):
        obeyed = all(world.obeys(prompt, answer.text, one) for one in of_dialog)
        values = [one["value"] for one in of_dialog]
        words = re.findall(r"\w+", answer.text)
        blended = any(is_blend(word, values) for word in words)
        keeps.append(float(obeyed))
        blends.append(float(blended))
    return {"all": measures.interval(keeps), "blend": measures.interval(blends)}


# ---- what is measured ----


def compared(roots: dict[str, Path], split: str, **sampling) -> dict:
    """Root -> model -> summary, and win rates over its own SFT and over the default's model; the
    first root is the default's.
    """
    prompts = read_prompts(world.ensure() / f"prompts-{split}.jsonl")
    judged = {}  # (root, model): its judged answers
    table = {}
    for root, folder in roots.items():
        table[root] = {}
        for name, stage in STAGES.items():
            model, tokenizer = load_model(folder / stage)
            judged[root, name] = measures.evaluate(model, tokenizer, prompts, **sampling)
            entry = {"summary": measures.summary(prompts, judged[root, name])}
            baselines = {"SFT": (root, "SFT"), "default": ("default", name)}
            for title, baseline in baselines.items():
                if baseline != (root, name):
                    wins = measures.compare(prompts, judged[root, name], judged[baseline])
                    entry[f"against {title}"] = wins
            table[root][name] = entry
            shown = [f"{axis} {entry['summary'][axis]}" for axis in measures.AXES]
            print(f"{sampling} {root:<12}{name:<8}", *shown, flush=True)
    return table


def measure(roots: dict[str, Path], settings: Settings, seed: int) -> dict:
    """One seed: what the docstring above names, for the models of each root."""
    split = settings.split
    table = compared(roots, split, seed=seed, samples=settings.samples)
    constraints = sets(settings.dialogs)
    cool = compared(roots, split, seed=seed + 1000, temperature=settings.cool)
    for root in roots:
        for name in ASKED:
            folder = roots[root] / STAGES[name]
            table[root][name]["asked"] = asked(folder, constraints["two, unseen"], split, seed)
        table[root]["cool"] = cool[root]

    wanted = [("lasting", "gatt", "first", group) for group in constraints]
    wanted += [("control", "rlhf-v3", "every", group) for group in CONTROL_SETS]
    for kind, stage, where, group in wanted:
        model, tokenizer = load_model(roots["two passes"] / stage)
        shares = measure_set(
            model, tokenizer, constraints[group], instruct=where, split=split, seed=seed
        )
        table["two passes"].setdefault(kind, {})[group] = measures.adherence_by_turn(shares)
    return table


# ---- over seeds ----


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """Win rates of two passes over the default's same model, one per seed, at both temperatures."""
    rows = {}
    for name in STAGES:
        for axis in measures.AXES:
            warm = [result[seed]["two passes"][name] for seed in seeds]
            cool = [result[seed]["two passes"]["cool"][name] for seed in seeds]
            for title, tables in ((name, warm), (f"{name}, cool", cool)):
                rates = [table["against default"][axis][0] for table in tables]
                rows[f"{title}, {axis}"] = rates
    return rows


def _scores(result: dict, root: str, name: str, axis: str) -> list[float]:
    """A model's mean score at temperature 1, one per seed."""
    return [one[root][name]["summary"][axis][0] for one in result.values()]


def _wins(result: dict, root: str, name: str) -> list[float]:
    """A model's win rates in helpfulness over its own root's SFT, one per seed."""
    return [one[root][name]["against SFT"]["helpfulness"][0] for one in result.values()]


def scores_table(result: dict) -> Table:
    """Both pipelines' scores, version by version."""
    cells = []
    for name in STAGES:
        line = [name]
        for axis in measures.AXES:
            for root in ROOTS:
                of_seeds = _scores(result, root, name, axis)
                line.append(f"{measures.interval(of_seeds).mean:.3f} ({each_seed(of_seeds)})")
        for root in ROOTS:
            summaries = [one[root]["cool"][name]["summary"] for one in result.values()]
            line.append(f"{mean_of([summary['helpfulness'] for summary in summaries]):.3f}")
        cells.append(line)
    columns = [""]
    for title in (*measures.AXES, "cool helpfulness"):
        columns += [f"{title}, default", f"{title}, after two passes"]
    caption = "The annotator's scores of both pipelines."
    small_print = (
        "Means over seeds, in brackets each seed. Temperature 1; cool: everything is sampled at"
        " temperature 0.4, which asks whether it is more than sharpening. GAtt is Ghost Attention"
        " on V3."
    )
    return Table(caption, columns, cells, small_print)


def adherence_table(result: dict) -> Table:
    """Ghost Attention and the control of V3 after two passes."""
    cells = []
    for kind, title in (("lasting", "Ghost Attention"), ("control", "control of V3")):
        for group in next(iter(result.values()))["two passes"][kind]:
            tables = [one["two passes"][kind][group] for one in result.values()]
            means = [table["mean"][0] for table in tables]
            last = mean_of([table[str(TURNS[-1])] for table in tables])
            mean = measures.interval(means).mean
            row = [f"{title}, {group}", f"{mean:.2f} ({each_seed(means, 2)})", f"{last:.2f}"]
            cells.append(row)
    columns = ["", "mean over turns", f"turn {TURNS[-1]}"]
    caption = (
        "Adherence after two passes; Table 30 below has the same sets for the default, and says"
        " what they are."
    )
    small_print = "The control has the instruction in every user message. In brackets each seed."
    return Table(caption, columns, cells, small_print)


def asked_table(result: dict) -> Table:
    """Single questions under two instructions: shares that keep both, and that blend the words."""
    cells = []
    for name in ASKED:
        line = [name]
        for root in ROOTS:
            for what in ("all", "blend"):
                shares = [one[root][name]["asked"][what][0] for one in result.values()]
                line.append(each_seed(shares, 2))
        cells.append(line)
    columns = ["", "keeps both, default", "blends, default"]
    columns += ["keeps both, two passes", "blends, two passes"]
    caption = (
        "Single questions under two instructions with words that training never had: each seed."
    )
    return Table(caption, columns, cells)


def section(result: dict) -> Section:
    """Both pipelines side by side, and what a longer SFT does to Ghost Attention."""
    rows = claims(result, list(result))
    default, longer = (_scores(result, root, "V3", "helpfulness") for root in ROOTS)
    safeties = {root: _scores(result, root, "V5", "safety") for root in ROOTS}
    return Section(
        "What is missed for want of SFT's budget?",
        [
            (
                "Helpfulness: after two passes of SFT instead of one, V3's is"
                f" {measures.interval(longer).mean:.3f} instead of"
                f" {measures.interval(default).mean:.3f}, and it wins"
                f" {claimed(rows)['V3, helpfulness'].mean:.3f} of the cases over the default's V3"
                f" (each seed {each_seed(rows['V3, helpfulness'])})."
            ),
            scores_table(result),
            claims_table(
                "Win rates of the pipeline with two passes over the default, version by version.",
                rows,
                f"Significant are {count_significant(claimed(rows), level=0.5)}.",
            ),
            Figure(
                "Helpfulness and safety by version, SFT with one pass and with two.",
                file=results.RESULTS / "longer_sft.png",
            ),
            (
                "In helpfulness V3 wins"
                f" {each_seed(_wins(result, 'two passes', 'V3'))} of the cases over its own SFT, by"
                f" default {each_seed(_wins(result, 'default', 'V3'))}. In safety the seeds change"
                " places: in each pipeline one seed stands still over the rounds, not the same one."
                f" The lowest of V5's safeties is {min(safeties['two passes']):.3f} after two"
                f" passes, where PPO mends it, and {min(safeties['default']):.3f} by default. One"
                " more pass takes longer than the default chain is allowed to, so it stays an"
                " option: `python sft.py --epochs 2`."
            ),
            adherence_table(result),
            asked_table(result),
            (
                "Ghost Attention, too, gains from a longer SFT: names and hobbies are kept"
                ' throughout. Two made-up words at once are blended: "End every answer with the'
                ' word Kudu. Begin every answer with the word Denu." gives "Dedu! ... Kunu." A'
                " small model copies syllable by syllable and takes the second one from the wrong"
                " word. SFT learns to keep them apart in some runs and not in others."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Helpfulness and safety by version, a line per root, a dot per seed."""
    figure, panels = draw_panels(2)
    for panel, axis in zip(panels, measures.AXES, strict=True):
        for root, color in zip(ROOTS, ("C0", "C1"), strict=True):
            scores = [_scores(result, root, name, axis) for name in STAGES]
            means = [sum(row) / len(row) for row in scores]
            panel.plot(list(STAGES), means, "-", color=color, label=f"SFT: {root}")
            for name, row in zip(STAGES, scores, strict=True):
                panel.plot([name] * len(row), row, ".", color=color)
        panel.set(title=f"{axis}, annotator's score", ylim=(0, 1))
    panels[0].legend(loc="lower right")
    title = f"Test prompts, temperature 1; {len(result)} seeds (dots), their mean (lines)"
    figure.suptitle(title, fontsize=10)
    save_picture(figure, file)


def main() -> None:
    # 1. the same pipeline after twice as long an SFT
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    jobs = {}
    for seed in results.missing_seeds("longer_sft", settings):
        jobs[f"two-passes-{seed}"] = commands(roots_of(settings, seed)["two passes"], seed)
    side_by_side(jobs, settings.out, settings.at_once)

    # 2. measure
    def measure_seed(seed: int) -> dict:
        return measure(roots_of(settings, seed), settings, seed)

    of_seeds = results.measure_seeds("longer_sft", settings, measure_seed)

    # 3. over seeds
    results.finish("longer_sft", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
