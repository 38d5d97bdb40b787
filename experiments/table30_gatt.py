"""Does an instruction of turn 1 last (Table 30)? Ghost Attention beside what it could be mistaken
for.

    python experiments/table30_gatt.py --seeds 1,2,3      after experiments/reference.py

Arms, each from the same V3, on the same dialogs, with the same replay and settings: GAtt (gatt.py);
its dialogs without the instruction; with the loss on all turns (no ghost mask); GAtt without the
check, on as many dialogs. Controls: the instruction on every turn. Later versions (V4 with the mix,
V4-PPO, V5) are measured where they exist; V4 is left out where its round had no
--mix. 200 dialogs of 20 turns a set, test questions, temperature .7; a name or hobby is asked for
    at turns 1, 2, 4, 6, 10, 20. The check that filters GAtt's training answers and this measure
    overlap in names and hobbies (is the name there?), and the few wordings that ask for those are
    the same in training; of markers the check wants the exact place and this one allows 16
    characters. No other question and no dialog is in both. Writes experiments/results/table30.json
    and .png: per seed, arm and set the share that obeys by turn, with its interval over dialogs.
    What the arms differ by is printed paired by seed, with intervals over seeds, corrected for all
    of these differences.
"""

import json
import random
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
import gatt
from data import read_prompts, read_sft, world
from experiments.common import (
    RESULTS,
    draw_panels,
    load_result,
    print_claims,
    save_result,
    side_by_side,
)
from runtime import (
    finish_stage,
    is_finished,
    load_model,
    open_stage,
    parse_settings,
    require,
    run,
    save_model,
    set_threads,
)
from sft import encode_rows, finetune

TURNS = (1, 2, 4, 6, 10, 20)
SEEN, UNSEEN = world.constraints("train"), world.constraints("test")
# the arms that also get the instruction on every turn; SFT gets it so only
CONTROLLED = ("SFT", "start")
CONTROL_SETS = ("styles", "names and hobbies", "unseen words")
DIFFERENCES = (  # of adherence, that are printed
    ("GAtt", "no-instruction"),
    ("GAtt", "no-ghost-mask"),
    ("GAtt", "no-check"),
    ("rlhf-v4", "GAtt"),
    ("rlhf-v4-ppo", "rlhf-v4"),
    ("rlhf-v5", "rlhf-v4-ppo"),
)
# the sets on which the other arms and the later versions are measured
COMPARED = ("styles", "unseen words")


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # fresh ones: seed 0 was used for tuning
    # as in experiments/reference.py; the arms, all from OUT/SEED/rlhf-v3, go to OUT/SEED/gatt-ARM
    out: Path = Path("out/final")
    preset: str = "toy"  # of gatt.py
    dialogs: int = 200  # of each set
    samples: int = 2  # answers per test prompt, for helpfulness and safety
    split: str = "test"  # of the questions
    at_once: int = 2  # seeds trained side by side


def sets(n: int) -> dict[str, list[list[dict]]]:
    """Name -> n times the constraints of one dialog; "two" are of different kinds."""

    def draw(rng: random.Random, pool, *kinds: str) -> dict:
        kind = rng.choice(kinds)
        return rng.choice(
            [
                c
                for c in pool
                if c["kind"] == kind
                and (pool is UNSEEN or c["value"] in world.words.FIGURES or kind != "figure")
            ]
        )

    def two(rng: random.Random) -> list[dict]:
        first, second = rng.sample(["first word", "last word", "figure"], 2)
        return [draw(rng, UNSEEN, first), draw(rng, UNSEEN, second)]

    def two_seen(rng: random.Random) -> list[dict]:
        while len(found := gatt.sample_constraints(rng)) < 2:
            pass
        return found

    makers = {
        "styles": lambda rng: [draw(rng, SEEN, "style")],
        "names and hobbies": lambda rng: [draw(rng, SEEN, "figure", "hobby")],
        "unseen words": lambda rng: [draw(rng, UNSEEN, "first word", "last word")],
        "unseen names": lambda rng: [draw(rng, UNSEEN, "figure")],
        "two, seen": two_seen,
        "two, unseen": two,
    }
    return {
        name: [make(random.Random(f"table 30 {name} {i}")) for i in range(n)]
        for name, make in makers.items()
    }


def train_arm(root: Path, arm: str, rows: list[dict]) -> None:
    """Fine-tune V3 as gatt.py did, on other rows beside the same replay, into ROOT/gatt-ARM/gatt.
    """
    folder, made = (
        root / f"gatt-{arm}" / "gatt",
        json.loads((root / "gatt" / "stage.json").read_text())["settings"],
    )
    s = gatt.Settings(**{f.name: made[f.name] for f in fields(gatt.Settings) if f.name in made})
    started = open_stage(
        folder,
        made | {"arm": arm},
        {"model": root / "rlhf-v3", "dialogs": root / "gatt" / "dialogs.jsonl"},
    )
    if not started:
        return
    model, tokenizer = load_model(root / "rlhf-v3")
    finetune(
        model,
        encode_rows(
            tokenizer, rows + read_sft(root / "gatt" / "replay.jsonl"), model.args.max_seq_len
        ),
        epochs=s.epochs,
        batch_tokens=s.batch_tokens,
        micro_tokens=s.micro_tokens,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        folder=folder,
        phase="gatt",
        seed=s.seed,
    )
    save_model(folder, model, tokenizer)
    finish_stage(folder, {}, started)


def without_instruction(row: dict) -> dict:
    """The same dialog as if nothing had been asked in turn 1."""
    first, *rest = row["messages"]
    return row | {
        "messages": [
            first | {"content": first["content"].removeprefix(row["instruction"] + " ")},
            *rest,
        ]
    }


def arms(root: Path) -> dict[str, Path]:
    """Name -> folder of every model that is measured."""
    found = {"SFT": root / "sft", "start": root / "rlhf-v3", "GAtt": root / "gatt"}
    found |= {
        name: root / f"gatt-{name}" / "gatt"
        for name in ("no-instruction", "no-ghost-mask", "no-check")
    }
    later = [name for name in ("rlhf-v4", "rlhf-v4-ppo", "rlhf-v5") if is_finished(root / name)]
    if later and "mix" not in json.loads((root / "rlhf-v4" / "stage.json").read_text())["inputs"]:
        print(
            f"{root}: V4 was made without Ghost Attention's dialogs (--mix), so V4, V4-PPO and V5"
            " are left out"
        )
        later = []
    return found | {name: root / name for name in later}


def measure(root: Path, s: Settings, seed: int) -> dict:
    """Adherence of every arm, and helpfulness and safety against V3 on the same prompts."""
    prompts, table = read_prompts(world.ensure() / f"prompts-{s.split}.jsonl"), {}
    start, tokenizer = load_model(root / "rlhf-v3")
    baseline = measures.evaluate(start, tokenizer, prompts, seed=seed, samples=s.samples)
    for arm, folder in arms(root).items():
        model, tokenizer = load_model(folder)
        rows = measures.evaluate(model, tokenizer, prompts, seed=seed, samples=s.samples)
        table[arm] = {
            "summary": measures.summary(prompts, rows),
            "against start": measures.compare(prompts, rows, baseline),
        }
        for name, constraints in sets(s.dialogs).items():
            wanted = name in (CONTROL_SETS if arm == "start" else COMPARED) or arm == "GAtt"
            controls = ["first"] * (wanted and arm != "SFT") + ["every"] * (
                arm in CONTROLLED and name in CONTROL_SETS
            )
            for control in controls:
                found = measures.adherence(
                    model,
                    tokenizer,
                    constraints,
                    instruct=control,
                    split=s.split,
                    seed=seed,
                    measure=(
                        TURNS
                        if any(c["kind"] in measures.PROBED for pair in constraints for c in pair)
                        else ()
                    ),
                )
                table[arm][name + (", control" if control == "every" else "")] = entry = (
                    measures.adherence_by_turn(found)
                )
                if len(constraints[0]) == 2:
                    entry |= {
                        f"mean of constraint {n + 1}": measures.adherence_by_turn(found, n)["mean"]
                        for n in (0, 1)
                    }
                print(
                    f"seed {seed} {arm:<15}{name:<18}{control:<6}",
                    *(f"{entry[str(t)].mean:.2f}" for t in TURNS),
                    f"mean {entry['mean']}",
                    flush=True,
                )
    return table


def draw(result: dict, seeds: tuple[int, ...], file: str) -> None:
    """experiments/results/FILE.png: the share that obeys by turn, mean over seeds, a panel for each
    set.
    """
    names, shown = list(sets(1)), list(result[str(seeds[0])])
    figure, panels = draw_panels(len(names), width=3)
    for panel, name in zip(panels, names, strict=True):
        for i, arm in enumerate(shown):
            for suffix, style in (("", "-"), (", control", ":")):
                found = [result[str(seed)].get(arm, {}).get(name + suffix) for seed in seeds]
                if all(found):
                    turns = [turn for turn in found[0] if turn.isdigit()]
                    means = [sum(table[turn][0] for table in found) / len(found) for turn in turns]
                    panel.plot(
                        [int(turn) for turn in turns],
                        means,
                        style,
                        color=f"C{i}",
                        label=arm + suffix,
                    )
        panel.set(title=name, xlabel="turn", ylim=(0, 1.02))
    lines = {
        label: line
        for panel in panels
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.savefig(RESULTS / f"{file}.png", dpi=110)


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"A - B, set": difference of the shares that obey, one per seed}; arms that all have."""
    rows = {}
    for first, second in DIFFERENCES:
        if all(first in result[seed] and second in result[seed] for seed in seeds):
            for group in COMPARED:
                pairs = [(result[seed][first], result[seed][second]) for seed in seeds]
                means = [(one[group]["mean"][0], other[group]["mean"][0]) for one, other in pairs]
                rows[f"{first} - {second}, {group}"] = [one - other for one, other in means]
    return rows


def main() -> None:
    # 1. GAtt, then the same without the check on as many dialogs; and the arms that only change the
    # rows
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    name = "table30" if s.preset == "toy" else f"table30-{s.preset}"
    load_result(name, s)  # refuses before hours of training, not after
    roots = {seed: s.out / str(seed) for seed in s.seeds}
    for root in roots.values():
        require(root / "rlhf-v3", "python rejection_sampling.py --rounds 1-3")
    common = {
        seed: ["gatt.py", "--seed", str(seed), "--preset", s.preset, "--threads", "1"]
        for seed in s.seeds
    }
    side_by_side(
        {f"gatt-{seed}": [[*common[seed], "--out", str(root)]] for seed, root in roots.items()},
        s.out,
        s.at_once,
    )
    side_by_side(
        {
            f"gatt-{seed}-no-check": [
                [
                    *common[seed],
                    "--out",
                    str(root / "gatt-no-check"),
                    "--init",
                    str(root / "rlhf-v3"),
                    "--check",
                    "none",
                    "--dialogs",
                    str(len(read_sft(root / "gatt" / "dialogs.jsonl"))),
                ]
            ]
            for seed, root in roots.items()
        },
        s.out,
        s.at_once,
    )
    for root in roots.values():
        rows = read_sft(root / "gatt" / "dialogs.jsonl")
        train_arm(root, "no-instruction", [without_instruction(row) for row in rows])
        train_arm(root, "no-ghost-mask", [row | {"train_on": "all"} for row in rows])

    # 2. measure
    for seed, root in roots.items():
        found = measure(root, s, seed)
        save_result(name, load_result(name, s) | {str(seed): found}, s)
    result = load_result(name, s)
    draw(result, s.seeds, name)
    print_claims("Differences of adherence", claims(result, [str(seed) for seed in s.seeds]))


if __name__ == "__main__":
    run(main)
