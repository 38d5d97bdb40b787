"""What does Ghost Attention miss for want of SFT's budget (Table 30)? The pipeline up to it after twice SFT's passes.

    python experiments/longer_sft.py --seeds 1,2,3          after experiments/reference.py

Each seed's default SFT, V3 and Ghost Attention beside those of a second root in which SFT saw its demonstrations twice
(--epochs 2) and reward.py, rounds 1 to 3 and gatt.py followed as by default. Measured are

    summary     helpfulness and safety on test prompts, and the win rate of each model over the default's;
    asked       single questions under two instructions with words that training never had: the share of answers that keep both,
                and the share of all answers that hold a blend, the first syllable of one word with the second of the other;
    lasting     for Ghost Attention, dialogs of 20 turns with the instruction in the first: the sets of Table 30.

Training is resumable. Writes experiments/results/longer_sft.json: per seed, root and model shares with their intervals.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, toy
from experiments.common import load_result, save_result, side_by_side
from experiments.table30_gatt import TURNS, sets
from gatt import instruct
from runtime import load_model, parse_settings, require, run, sample_answers, set_threads

STAGES = {"SFT": "sft", "V3": "rlhf-v3", "GAtt": "gatt"}


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose default pipeline is in OUT/SEED
    out: Path = Path("out/final")  # as in experiments/reference.py; the other root is OUT/SEED-two-passes
    dialogs: int = 200  # of each set
    samples: int = 4  # answers per test prompt
    split: str = "test"  # of questions and prompts
    at_once: int = 2  # seeds trained side by side


def is_blend(word: str, values: list[str]) -> bool:
    """Whether a word is made of the first syllable of one made-up word and the second of another.

    >>> is_blend("Dedu", ["Kudu", "Denu"]), is_blend("Kudu", ["Kudu", "Denu"]), is_blend("Sure", ["Kudu", "Denu"])
    (True, False, False)
    """
    return word not in values and word in {a[:2] + b[2:] for a in values for b in values}


def asked(folder: Path, constraints: list[list[dict]], split: str, seed: int) -> dict[str, measures.Interval]:
    """Single questions, each under the constraints of one dialog: shares of answers that keep all, and that hold a blend."""
    model, tokenizer = load_model(folder)
    prompts = []
    for i, found in enumerate(constraints):
        rng = random.Random(f"asked {seed} {i}")
        question = measures.ask_about(rng, split, next((c for c in found if c["kind"] in measures.PROBED), None))
        prompts.append(question | {"prompt": instruct(question["prompt"], toy.instruction(rng, found, short=0.5))})
    answers = [row["answer"] for row in sample_answers(model, tokenizer, prompts, key=(seed, "asked"), temperature=0.7)]
    keeps = [all(toy.obeys(prompt, answer, c) for c in found)
             for prompt, answer, found in zip(prompts, answers, constraints, strict=True)]
    blends = [any(is_blend(word, [c["value"] for c in found]) for word in re.findall(r"\w+", answer))
              for answer, found in zip(answers, constraints, strict=True)]
    return {"all": measures.interval([float(kept) for kept in keeps]), "blend": measures.interval([float(b) for b in blends])}


def measure(roots: dict[str, Path], s: Settings, seed: int) -> dict:
    """One seed: what the docstring above names, for the models of each root; the first root is the default's."""
    prompts, constraints, table, answers = read_prompts(toy.ensure() / f"prompts-{s.split}.jsonl"), sets(s.dialogs), {}, {}
    for root, folder in roots.items():
        table[root], answers[root] = {}, {}
        for name, stage in STAGES.items():
            rows = answers[root][name] = measures.evaluate(*load_model(folder / stage), prompts, seed=seed, samples=s.samples)
            baseline = next(iter(answers.values()))[name]
            table[root][name] = {"summary": measures.summary(prompts, rows),
                                 "asked": asked(folder / stage, constraints["two, unseen"], s.split, seed)}
            if baseline is not rows:
                table[root][name]["against default"] = measures.compare(prompts, rows, baseline)
            print(f"seed {seed} {root:<12}{name:<6}", *(f"{key} {value}" for key, value in table[root][name]["asked"].items()),
                  *(f"{key} {table[root][name]['summary'][key]}" for key in ("helpfulness", "safety")), flush=True)
        table[root]["lasting"] = {}
        for group, drawn in constraints.items():
            turns = TURNS if any(c["kind"] in measures.PROBED for pair in drawn for c in pair) else ()
            rows = measures.adherence(*load_model(folder / "gatt"), drawn, split=s.split, seed=seed, measure=turns)
            found = table[root]["lasting"][group] = measures.adherence_by_turn(rows)
            print(f"seed {seed} {root:<12}{group:<18}", *(f"{found[str(turn)].mean:.2f}" for turn in TURNS),
                  f"mean {found['mean']}", flush=True)
    return table


def main() -> None:
    # 1. the same pipeline after twice as long an SFT
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    toy.ensure()
    roots = {seed: {"default": s.out / str(seed), "two passes": s.out / f"{seed}-two-passes"} for seed in s.seeds}
    for root in roots.values():
        require(root["default"] / "gatt", "python experiments/reference.py")
    side_by_side({f"two-passes-{seed}": [[*command, "--seed", str(seed), "--out", str(root["two passes"]), "--threads", "1"]
                                         for command in (["sft.py", "--epochs", "2"], ["reward.py"],
                                                         ["rejection_sampling.py", "--rounds", "1-3"], ["gatt.py"])]
                  for seed, root in roots.items()}, s.out, s.at_once)

    # 2. measure
    for seed, root in roots.items():
        found = measure(root, s, seed)
        save_result("longer_sft", load_result("longer_sft") | {str(seed): found})


if __name__ == "__main__":
    run(main)
