"""What is missed for want of SFT's budget? The whole pipeline after twice SFT's passes.

    python experiments/longer_sft.py --seeds 1,2,3          after experiments/reference.py

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

Training is resumable. Writes experiments/results/longer_sft.json and .png: per seed, root and model
shares with their intervals over items. Win rates over the default's model are printed with
intervals over seeds, corrected for all of them.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, world
from experiments.common import (
    RESULTS,
    draw_panels,
    load_result,
    print_claims,
    save_result,
    side_by_side,
)
from experiments.reference import missing_commands
from experiments.table30_gatt import CONTROL_SETS, TURNS, sets
from gatt import instruct
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


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose default pipeline is in OUT/SEED
    # as in experiments/reference.py; the other root is OUT/SEED-two-passes
    out: Path = Path("out/final")
    dialogs: int = 200  # of each set
    samples: int = 4  # answers per test prompt
    cool: float = 0.4  # the second temperature
    split: str = "test"  # of questions and prompts
    at_once: int = 2  # seeds trained side by side


def commands(root: Path, seed: int) -> list[list[str]]:
    """What is missing of the whole pipeline in ROOT, SFT with two passes."""
    return [
        [*line, *["--epochs", "2"] * (line[0] == "sft.py")] for line in missing_commands(root, seed)
    ]


def is_blend(word: str, values: list[str]) -> bool:
    """Whether a word is made of the first syllable of one made-up word and the second of another.

    >>> [is_blend(word, ["Kudu", "Denu"]) for word in ("Dedu", "Kudu", "Sure")]
    [True, False, False]
    """
    return word not in values and word in {a[:2] + b[2:] for a in values for b in values}


def asked(
    folder: Path, constraints: list[list[dict]], split: str, seed: int
) -> dict[str, measures.Interval]:
    """Single questions, each under the constraints of one dialog: shares of answers that keep all,
    and that hold a blend.
    """
    model, tokenizer = load_model(folder)
    prompts = []
    for i, found in enumerate(constraints):
        rng = random.Random(f"asked {seed} {i}")
        question = measures.ask_about(
            rng, split, next((c for c in found if c["kind"] in measures.PROBED), None)
        )
        prompts.append(
            question | {
                "prompt": instruct(question["prompt"], world.instruction(rng, found, short=0.5))
            }
        )
    answers = [
        row["answer"]
        for row in sample_answers(model, tokenizer, prompts, key=(seed, "asked"), temperature=0.7)
    ]
    keeps = [
        all(world.obeys(prompt, answer, c) for c in found)
        for prompt, answer, found in zip(prompts, answers, constraints, strict=True)
    ]
    blends = [
        any(is_blend(word, [c["value"] for c in found]) for word in re.findall(r"\w+", answer))
        for answer, found in zip(answers, constraints, strict=True)
    ]
    return {
        "all": measures.interval([float(kept) for kept in keeps]),
        "blend": measures.interval([float(b) for b in blends]),
    }


def compared(roots: dict[str, Path], split: str, **sampling) -> dict:
    """Root -> model -> summary, and win rates over its own SFT and over the default's model; the
    first root is the default's.
    """
    prompts, table, answers = read_prompts(world.ensure() / f"prompts-{split}.jsonl"), {}, {}
    for root, folder in roots.items():
        table[root], answers[root] = {}, {}
        for name, stage in STAGES.items():
            rows = answers[root][name] = measures.evaluate(
                *load_model(folder / stage), prompts, **sampling
            )
            table[root][name] = {"summary": measures.summary(prompts, rows)} | {
                f"against {other}": measures.compare(prompts, rows, baseline)
                for other, baseline in (
                    ("SFT", answers[root]["SFT"]),
                    ("default", next(iter(answers.values()))[name]),
                )
                if baseline is not rows
            }
            print(
                f"{sampling} {root:<12}{name:<8}",
                *(f"{key} {table[root][name]['summary'][key]}" for key in measures.AXES),
                *(
                    f"{axis} {wins}"
                    for axis, wins in table[root][name].get("against default", {}).items()
                ),
                flush=True,
            )
    return table


def measure(roots: dict[str, Path], s: Settings, seed: int) -> dict:
    """One seed: what the docstring above names, for the models of each root."""
    table, constraints = compared(roots, s.split, seed=seed, samples=s.samples), sets(s.dialogs)
    for root, cool in compared(roots, s.split, seed=seed + 1000, temperature=s.cool).items():
        for name in ASKED:
            table[root][name]["asked"] = asked(
                roots[root] / STAGES[name], constraints["two, unseen"], s.split, seed
            )
        table[root]["cool"] = cool
    wanted = [("lasting", "gatt", "first", group) for group in constraints]
    for kind, stage, where, group in wanted + [
        ("control", "rlhf-v3", "every", group) for group in CONTROL_SETS
    ]:
        drawn = constraints[group]
        turns = TURNS if any(c["kind"] in measures.PROBED for pair in drawn for c in pair) else ()
        rows = measures.adherence(
            *load_model(roots["two passes"] / stage),
            drawn,
            instruct=where,
            split=s.split,
            seed=seed,
            measure=turns,
        )
        found = table["two passes"].setdefault(kind, {})[group] = measures.adherence_by_turn(rows)
        print(
            f"seed {seed} {kind:<8}{group:<18}",
            *(f"{found[str(turn)].mean:.2f}" for turn in TURNS),
            f"mean {found['mean']}",
            flush=True,
        )
    return table


def draw(result: dict, seeds: list[str]) -> None:
    """experiments/results/longer_sft.png: helpfulness and safety by version, a line per root, a dot
    per seed.
    """
    figure, panels = draw_panels(2)
    for panel, axis in zip(panels, measures.AXES, strict=True):
        for root, color in (("default", "C0"), ("two passes", "C1")):
            scores = [
                [result[seed][root][name]["summary"][axis][0] for seed in seeds] for name in STAGES
            ]
            panel.plot(
                list(STAGES),
                [sum(row) / len(row) for row in scores],
                "-",
                color=color,
                label=f"SFT: {root}",
            )
            for name, row in zip(STAGES, scores, strict=True):
                panel.plot([name] * len(row), row, ".", color=color)
        panel.set(title=f"{axis}, annotator's score", ylim=(0, 1))
    panels[0].legend(loc="lower right")
    figure.suptitle(
        f"Test prompts, temperature 1; {len(seeds)} seeds (dots), their mean (lines)", fontsize=10
    )
    figure.savefig(RESULTS / "longer_sft.png", dpi=110)


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """Win rates of two passes over the default's same model, one per seed, at both temperatures."""
    rows = {}
    for name in STAGES:
        for axis in measures.AXES:
            warm = [result[seed]["two passes"][name] for seed in seeds]
            cool = [result[seed]["two passes"]["cool"][name] for seed in seeds]
            for title, found in ((name, warm), (f"{name}, cool", cool)):
                rates = [table["against default"][axis][0] for table in found]
                rows[f"{title}, {axis}"] = rates
    return rows


def main() -> None:
    # 1. the same pipeline after twice as long an SFT
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    load_result("longer_sft", s)  # refuses before hours of training, not after
    roots = {
        seed: {"default": s.out / str(seed), "two passes": s.out / f"{seed}-two-passes"}
        for seed in s.seeds
    }
    for root in roots.values():
        require(root["default"] / "rlhf-v5", "python experiments/reference.py")
    side_by_side(
        {f"two-passes-{seed}": commands(root["two passes"], seed) for seed, root in roots.items()},
        s.out,
        s.at_once,
    )

    # 2. measure
    for seed, root in roots.items():
        save_result(
            "longer_sft", load_result("longer_sft", s) | {str(seed): measure(root, s, seed)}, s
        )
    result, seeds = load_result("longer_sft", s), [str(seed) for seed in s.seeds]
    draw(result, seeds)
    print_claims("Win rates of two passes over the default", claims(result, seeds))


if __name__ == "__main__":
    run(main)
