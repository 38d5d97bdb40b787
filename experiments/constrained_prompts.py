"""What do constrained dialogs in the rounds and among PPO's prompts do (§3.3): does obeying survive
RLHF?

    python experiments/constrained_prompts.py --seeds 1,2,3          after experiments/reference.py

The reward models know nothing of instructions that hold throughout; rounds 1 to 3 and 5 of the
default pipeline see single questions only, which wears obeying away. Each arm stands beside the
same version of the default pipeline:

    V3 by check      Before each of the rounds 1 to 3, 250 dialogs are drawn with an instruction in
                     every user message. Those whose last question is unsafe are dropped: refusals
                     would be learned from few. The newest policy answers the other last questions,
                     each alone, 8 times; of the answers that pass Ghost Attention's check the one
                     with the highest reward joins the fine-tuning set. Then Ghost Attention from
                     that V3.
    V4-PPO constrained, V5 constrained
                     From the default V4 and V4-PPO: some prompts are Ghost Attention's dialogs
                     (instruction in turn 1 only), sampled, judged and learned from like all others,
                     by reward alone: one in five for V5, one in twenty for PPO (at one in five an
                     iteration took several times as long). This V5 keeps the best of its own
                     answers only (--pool last), since earlier rounds answered other prompts; "V5
                     last" does so without such dialogs.
    V5 mix           V5 with Ghost Attention's dialogs in its fine-tuning set, as V4 has them.

A file of prompts also means that the temperature and PPO's early stop look at training prompts
instead of dev ones. Fresh preferences are collected on the whole file: 3 % of V5's, 5 % of PPO's
are constrained (the annotator passes over markers and wants the right name or hobby). Training is
resumable. Writes experiments/results/constrained_prompts.json: per seed and model adherence by
turn, helpfulness and safety on test prompts, and win rates over the default pipeline's model. These
are printed with intervals over seeds, corrected for the number of arms and axes.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
import rejection_sampling
from data import InputError, read_prompts, read_sft, world, write_jsonl
from experiments.common import judges_of, load_result, print_claims, save_result, side_by_side
from experiments.table30_gatt import CONTROL_SETS, TURNS, sets
from gatt import instruct, keep_answers, sampling_prompt
from runtime import (
    fingerprint,
    is_finished,
    load_model,
    parse_settings,
    require,
    run,
    sample_answers,
    set_threads,
)

# prompts of a round, constrained ones beside them, and PPO's beside 6,000
SINGLE, CONSTRAINED, PPO_CONSTRAINED = 700, 175, 316
ORDINARY = ("sft", "reward-helpfulness", "reward-safety")
BASELINES = {
    "V3 by check": "V3",
    "GAtt on V3 by check": "GAtt",
    "V4-PPO constrained": "V4-PPO",
    "V5 last": "V5",
    "V5 constrained": "V5 last",
    "V5 mix": "V5",
}


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose whole pipeline is in OUT/SEED
    out: Path = Path("out/final")  # as in experiments/reference.py; arms go to OUT/SEED-constrained
    dialogs: int = 64  # of each set, for adherence
    samples: int = 4  # answers per test prompt
    split: str = "test"  # of questions and prompts
    at_once: int = 2  # seeds trained side by side
    train_rounds: bool = False  # make "V3 by check" of these seeds and stop: a part of the whole


def constrained_dialog(rng: random.Random, turns: int) -> dict:
    """A dialog of so many turns under an instruction, the last question open; see
    `gatt.toy_dialogs` for the fields.

    The earlier answers are demonstrations that obey. A name or hobby that holds is asked for in
    half of the turns.
    """
    found, messages = world.sample_constraints(rng), []
    hidden = [c for c in found if c["kind"] in measures.PROBED]
    for turn in range(turns):
        prompt = world.under(
            measures.ask_about(
                rng, "train", rng.choice(hidden) if hidden and rng.random() < 0.5 else None
            ),
            found,
        )
        messages += prompt["prompt"]
        if turn < turns - 1:
            # others get names and hobbies wrong
            writer = "good" if prompt["family"] in world.PROBES else None
            messages.append(
                world.assistant(world.obey(world.write_answer(rng, prompt, writer), found))
            )
    return {
        "messages": messages,
        "instruction": world.instruction(rng, found),
        "constraints": found,
        "is_safety": prompt["is_safety"],
        "prompt": prompt,
    }


def constrained_dialogs(count: int, key: str) -> list[dict]:
    """Dialogs of 1 to 20 turns, short ones more often."""
    rng = random.Random(f"constrained {key}")
    return [constrained_dialog(rng, 1 + int(20 * rng.random() ** 2)) for _ in range(count)]


def ghost_prompts(path: Path) -> list[dict]:
    """Ghost Attention's dialogs as prompts: the instruction in turn 1 only, the last question open.
    """
    kept, rows = ("is_safety", "family", "item", "kind", "constraints"), read_sft(path)
    for row in rows:
        if missing := [name for name in kept if name not in row]:
            raise InputError(
                f"{row['where']}: field '{missing[0]}' is missing, as an older gatt.py wrote it;"
                " run it again"
            )
    return [{"prompt": row["messages"][:-1]} | {name: row[name] for name in kept} for row in rows]


def write_prompts(root: Path, made: Path, seed: int) -> None:
    """MADE/v5.jsonl and ppo.jsonl: the world's training prompts and constrained ones.

    V5 samples answers to the first SINGLE + CONSTRAINED; the first SINGLE are those of the default
    pipeline.
    """
    ordinary = [
        {k: v for k, v in prompt.items() if k != "where"}
        for prompt in read_prompts(world.FOLDER / "prompts-train.jsonl")
    ]
    ghosts = ghost_prompts(root / "gatt" / "dialogs.jsonl")
    random.Random(seed).shuffle(ghosts)
    made.mkdir(parents=True, exist_ok=True)
    write_jsonl(made / "v5.jsonl", ordinary[:SINGLE] + ghosts[:CONSTRAINED] + ordinary[SINGLE:])
    write_jsonl(made / "ppo.jsonl", ordinary + ghosts[:PPO_CONSTRAINED])


def train_rounds(folder: Path, seed: int, dialogs: int = 250) -> None:
    """ "V3 by check": before each round, the newest policy's answers to new dialogs, each to its
    last question alone.
    """
    names = ["sft", "rlhf-v1", "rlhf-v2", "rlhf-v3"]
    for version, newest in enumerate(names[:-1], 1):
        mix = folder / f"mix-{version}.jsonl"
        if not is_finished(folder / f"rlhf-v{version}"):
            model, tokenizer = load_model(folder / newest)
            found = [
                dialog
                for dialog in constrained_dialogs(dialogs, f"mix {seed} {version}")
                if not dialog["is_safety"]
            ]
            prompts = [sampling_prompt(dialog, "question") for dialog in found]
            rows = sample_answers(
                model,
                tokenizer,
                prompts,
                key=(seed, "constrained", version),
                samples=8,
                temperature=0.8,
            )
            rows = [row | {"tokenizer": tokenizer.fingerprint} for row in rows]
            kept = keep_answers(found, rows, "toy", judges_of(folder, names[1:version]), prompts)
            write_jsonl(
                mix,
                [
                    {
                        "messages": [
                            *instruct(found[i]["messages"], found[i]["instruction"]),
                            world.assistant(row["answer"]),
                        ],
                        "train_on": "last",
                        "is_safety": False,
                        "answer_ids": row["answer_ids"],
                        "tokenizer": row["tokenizer"],
                    }
                    for i, row in kept.items()
                ],
            )
        rejection_sampling.main(
            [
                "--rounds",
                str(version),
                "--mix",
                str(mix),
                "--out",
                str(folder),
                "--seed",
                str(seed),
                "--threads",
                "1",
            ]
        )


def link(root: Path, folder: Path, *names: str) -> Path:
    """FOLDER with links to stages of ROOT."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).symlink_to((root / name).resolve())
    return folder


def commands(root: Path, made: Path, s: Settings, seed: int) -> list[list[str]]:
    """What trains one seed's arms, in order."""
    by_check = link(root, made / "by-check", *ORDINARY)
    after = link(root, made / "after", *ORDINARY, *(f"rlhf-v{v}" for v in (1, 2, 3, 4)))
    v5 = link(root, made / "v5", *ORDINARY, *(f"rlhf-v{v}" for v in (1, 2, 3, 4)), "rlhf-v4-ppo")
    shared = ["--seed", str(seed), "--threads", "1", "--out"]
    fifth = [
        "rejection_sampling.py",
        "--rounds",
        "5",
        "--init",
        str(v5 / "rlhf-v4-ppo"),
        *shared,
        str(v5),
        "--name",
    ]
    return [
        [
            "experiments/constrained_prompts.py",
            "--train-rounds",
            "--seeds",
            str(seed),
            "--out",
            str(s.out),
        ],
        ["gatt.py", *shared, str(by_check)],
        ["ppo.py", "--prompts", str(made / "ppo.jsonl"), *shared, str(after)],
        [
            *fifth,
            "rlhf-v5-mix",
            "--mix",
            str(root / "gatt" / "dialogs.jsonl"),
            "--batch-tokens",
            "1500",
        ],
        [*fifth, "rlhf-v5-last", "--pool", "last"],
        [
            *fifth,
            "rlhf-v5-constrained",
            "--pool",
            "last",
            "--prompts",
            str(made / "v5.jsonl"),
            "--max-prompts",
            str(SINGLE + CONSTRAINED),
        ],
    ]


def measured(root: Path, made: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name -> (folder, where the instruction stands when adherence is measured)."""
    default = {"GAtt": "gatt", "V4": "rlhf-v4", "V4-PPO": "rlhf-v4-ppo", "V5": "rlhf-v5"}
    both, first = ("first", "every"), ("first",)
    return {
        "SFT": (root / "sft", ("every",)),
        "V3": (root / "rlhf-v3", both),
        **{name: (root / folder, first) for name, folder in default.items()},
        "V3 by check": (made / "by-check" / "rlhf-v3", both),
        "GAtt on V3 by check": (made / "by-check" / "gatt", first),
        "V4-PPO constrained": (made / "after" / "rlhf-v4-ppo", first),
        **{
            f"V5 {name}": (made / "v5" / f"rlhf-v5-{name}", first)
            for name in ("last", "constrained", "mix")
        },
    }


def measure(root: Path, made: Path, s: Settings, seed: int) -> dict:
    """Adherence, helpfulness and safety of every model, and win rates over that of the default
    pipeline.
    """
    prompts, table, answers = read_prompts(world.ensure() / f"prompts-{s.split}.jsonl"), {}, {}
    for name, (folder, controls) in measured(root, made).items():
        if not is_finished(folder):
            continue
        model, tokenizer = load_model(folder)
        answers[name] = measures.evaluate(model, tokenizer, prompts, seed=seed, samples=s.samples)
        table[name] = {"summary": measures.summary(prompts, answers[name])}
        if name in BASELINES:
            table[name]["against default"] = measures.compare(
                prompts, answers[name], answers[BASELINES[name]]
            )
        for group in CONTROL_SETS:
            for control in controls:
                rows = measures.adherence(
                    model,
                    tokenizer,
                    sets(s.dialogs)[group],
                    instruct=control,
                    split=s.split,
                    seed=seed,
                    measure=TURNS,
                )
                entry = table[name][f"{group}, {control}"] = measures.adherence_by_turn(rows)
                print(
                    f"seed {seed} {name:<20}{group:<18}{control:<6}",
                    *(f"{entry[str(t)].mean:.2f}" for t in TURNS),
                    f"mean {entry['mean']}",
                    flush=True,
                )
    return table


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"arm over its baseline, axis": win rates, one per seed}."""
    rows = {}
    for name, baseline in BASELINES.items():
        tables = [result[seed][name]["against default"] for seed in seeds if name in result[seed]]
        for axis in ("helpfulness", "safety") if tables else ():
            rows[f"{name} over {baseline}, {axis}"] = [table[axis][0] for table in tables]
    return rows


def main() -> None:
    # 1. the arms
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    folders = {seed: (s.out / str(seed), s.out / f"{seed}-constrained") for seed in s.seeds}
    if s.train_rounds:
        for seed, (_, made) in folders.items():
            train_rounds(made / "by-check", seed)
        return
    load_result("constrained_prompts", s)  # refuses before hours of training, not after
    for seed, (root, made) in folders.items():
        require(root / "rlhf-v5", "python experiments/reference.py")
        dialogs = root / "gatt" / "dialogs.jsonl"
        if json.loads((root / "rlhf-v4" / "stage.json").read_text())["inputs"].get(
            "mix"
        ) != fingerprint(dialogs):
            raise InputError(
                f"{root / 'rlhf-v4'} was made without {dialogs}; experiments/reference.py makes it"
                " with them"
            )
        write_prompts(root, made, seed)
    side_by_side(
        {
            f"constrained-{seed}": commands(root, made, s, seed)
            for seed, (root, made) in folders.items()
        },
        s.out,
        s.at_once,
    )

    # 2. measure
    for seed, (root, made) in folders.items():
        found = measure(root, made, s, seed)
        save_result(
            "constrained_prompts", load_result("constrained_prompts", s) | {str(seed): found}, s
        )

    # 3. means over seeds
    result = load_result("constrained_prompts", s)
    for name in result[str(s.seeds[0])]:
        found = [result[str(seed)][name] for seed in s.seeds if name in result[str(seed)]]
        for key in [key for key in found[0] if key.startswith(CONTROL_SETS)]:
            print(
                f"{name:<20} {key:<26}",
                *(f"{sum(t[key][str(turn)][0] for t in found) / len(found):.2f}" for turn in TURNS),
                "mean",
                *(f"{table[key]['mean'][0]:.3f}" for table in found),
            )
        for axis in ("helpfulness", "safety"):
            print(f"    {axis} {measures.interval([table['summary'][axis][0] for table in found])}")
    print_claims("Win rates", claims(result, [str(seed) for seed in s.seeds]))


if __name__ == "__main__":
    run(main)
