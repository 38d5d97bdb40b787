"""What do constrained dialogs among the prompts of the rounds and of PPO do (§3.3): does obeying survive RLHF?

    python experiments/constrained_prompts.py --seeds 1,2,3          after experiments/table30_gatt.py and figure11_ppo.py

The reward models know nothing of instructions that hold throughout, and the rounds of the default pipeline see single
questions only, which wears obeying away. Arms, each beside the same version of the default pipeline:

    V3 by reward   rounds 1 to 3 where one prompt in five is the open end of a dialog with an instruction in every user
                   message; its answers are sampled, judged and kept by the reward models like all others
    V3 by check    rounds 1 to 3, each with 250 such dialogs in its fine-tuning set, as far as their last question is harmless
                   (else refusals are learned from few): the newest policy's own answers that pass Ghost Attention's check, of
                   these the one with the highest reward; and Ghost Attention from that V3
    V4-PPO, V5     Ghost Attention's dialogs (instruction in turn 1 only) among the prompts, again one in five, kept by reward;
                   such a round has to have a pool of its own samples alone, since a pool joins answers to equal prompts
    V5 mix         V5 with Ghost Attention's dialogs in its fine-tuning set, as V4 has them

In the dialogs of V3's arms the earlier answers are people's demonstrations. The toy annotator passes over markers and wants
the right name or hobby. Resumable. Writes experiments/results/constrained_prompts.json: per seed and model adherence by turn
on sets of table30, helpfulness and safety on the test prompts, and win rates over the default pipeline's model.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
import rejection_sampling
from data import read_prompts, read_sft, toy, write_jsonl
from experiments.common import judges_of, load_result, save_result, side_by_side
from experiments.table30_gatt import CONTROL_SETS, TURNS, sets
from gatt import instruct, keep_answers, sampling_prompt
from runtime import load_model, parse_settings, require, run, sample_answers, set_threads

SINGLE, CONSTRAINED = 700, 175  # prompts of a round: those of the default pipeline, and one in five
ORDINARY = ("sft", "reward-helpfulness", "reward-safety")
BASELINES = {"V3 by reward": "V3", "V3 by check": "V3", "GAtt on V3 by check": "GAtt", "V4-PPO constrained": "V4-PPO",
             "V5 constrained": "V5", "V5 mix": "V5"}


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose whole pipeline is in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py; arms go to OUT/SEED-constrained
    dialogs: int = 200  # of each set, for adherence
    samples: int = 4  # answers per test prompt
    split: str = "test"  # of questions and prompts
    at_once: int = 2  # seeds trained side by side
    train_rounds: bool = False  # make "V3 by check" of these seeds and stop: a part of the whole


def constrained_dialog(rng: random.Random, turns: int) -> dict:
    """A dialog of so many turns under an instruction, the last question open; see `gatt.toy_dialogs` for the fields.

    Every earlier answer, a demonstration, obeys. A name or hobby that holds is asked for in half of the turns.
    """
    found, messages = toy.sample_constraints(rng), []
    hidden = [c for c in found if c["kind"] in measures.PROBED]
    for turn in range(turns):
        prompt = toy.under(measures.ask_about(rng, "train", rng.choice(hidden) if hidden and rng.random() < 0.5 else None), found)
        messages += prompt["prompt"]
        if turn < turns - 1:
            messages.append(toy.assistant(toy.obey(toy.write_answer(rng, prompt), found)))
    return {"messages": messages, "instruction": toy.instruction(rng, found), "constraints": found,
            "is_safety": prompt["is_safety"], "prompt": prompt}


def constrained_dialogs(count: int, key: str) -> list[dict]:
    """Dialogs of 1 to 20 turns, short ones more often."""
    rng = random.Random(f"constrained {key}")
    return [constrained_dialog(rng, 1 + int(20 * rng.random() ** 2)) for _ in range(count)]


def ghost_prompts(path: Path) -> list[dict]:
    """Ghost Attention's dialogs as prompts: the instruction in turn 1 only, the last question open."""
    kept = ("is_safety", "family", "item", "kind", "constraints")
    return [{"prompt": row["messages"][:-1]} | {name: row[name] for name in kept} for row in read_sft(path)]


def write_prompts(root: Path, made: Path, seed: int) -> None:
    """MADE/rounds.jsonl, v5.jsonl and ppo.jsonl: the world's training prompts and constrained ones.

    A round's first SINGLE prompts are those of the default pipeline, then come CONSTRAINED ones, which it also uses, then the
    rest, from which preferences are collected.
    """
    ordinary = [{k: v for k, v in prompt.items() if k != "where"} for prompt in read_prompts(toy.FOLDER / "prompts-train.jsonl")]
    every = [dialog["prompt"] | {"prompt": instruct(dialog["messages"], dialog["instruction"])}
             for dialog in constrained_dialogs(CONSTRAINED, f"prompts {seed}")]
    ghosts = ghost_prompts(root / "gatt" / "dialogs.jsonl")
    random.Random(seed).shuffle(ghosts)
    made.mkdir(parents=True, exist_ok=True)
    write_jsonl(made / "rounds.jsonl", ordinary[:SINGLE] + every + ordinary[SINGLE:])
    write_jsonl(made / "v5.jsonl", ordinary[:SINGLE] + ghosts[:CONSTRAINED] + ordinary[SINGLE:])
    write_jsonl(made / "ppo.jsonl", ordinary + ghosts[: len(ordinary) * CONSTRAINED // SINGLE])


def train_rounds(folder: Path, seed: int, dialogs: int = 250) -> None:
    """"V3 by check": before each round, the newest policy's answers to new dialogs, each to its last question alone."""
    names = ["sft", "rlhf-v1", "rlhf-v2", "rlhf-v3"]
    for version, newest in enumerate(names[:-1], 1):
        mix = folder / f"mix-{version}.jsonl"
        if not mix.exists():
            model, tokenizer = load_model(folder / newest)
            found = [dialog for dialog in constrained_dialogs(dialogs, f"mix {seed} {version}") if not dialog["is_safety"]]
            prompts = [sampling_prompt(dialog, "question") for dialog in found]
            rows = sample_answers(model, tokenizer, prompts, key=(seed, "constrained", version), samples=8, temperature=0.8)
            rows = [row | {"tokenizer": tokenizer.fingerprint} for row in rows]
            kept = keep_answers(found, rows, "toy", judges_of(folder, names[1: version]), prompts)
            write_jsonl(mix, [{"messages": [*instruct(found[i]["messages"], found[i]["instruction"]),
                                            toy.assistant(row["answer"])], "train_on": "last", "is_safety": False,
                               "answer_ids": row["answer_ids"], "tokenizer": row["tokenizer"]} for i, row in kept.items()])
        rejection_sampling.main(["--rounds", str(version), "--mix", str(mix), "--out", str(folder), "--seed", str(seed),
                                 "--threads", "1"])


def link(root: Path, folder: Path, *names: str) -> Path:
    """FOLDER with links to stages of ROOT."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).symlink_to((root / name).resolve())
    return folder


def commands(root: Path, made: Path, s: Settings, seed: int) -> list[list[str]]:
    """What trains one seed's arms, in order."""
    by_reward, by_check = (link(root, made / name, *ORDINARY) for name in ("by-reward", "by-check"))
    after = link(root, made / "after", *ORDINARY, *(f"rlhf-v{v}" for v in (1, 2, 3, 4)))
    v5 = link(root, made / "v5", *ORDINARY, *(f"rlhf-v{v}" for v in (1, 2, 3, 4)), "rlhf-v4-ppo")
    shared = ["--seed", str(seed), "--threads", "1", "--out"]
    fifth = ["rejection_sampling.py", "--rounds", "5", "--init", str(v5 / "rlhf-v4-ppo"), *shared, str(v5), "--name"]
    count = str(SINGLE + CONSTRAINED)
    return [
        ["rejection_sampling.py", "--rounds", "1-3", "--prompts", str(made / "rounds.jsonl"), "--max-prompts", count, *shared,
         str(by_reward)],
        ["experiments/constrained_prompts.py", "--train-rounds", "--seeds", str(seed), "--out", str(s.out)],
        ["gatt.py", *shared, str(by_check)],
        ["ppo.py", "--prompts", str(made / "ppo.jsonl"), *shared, str(after)],
        [*fifth, "rlhf-v5-mix", "--mix", str(root / "gatt" / "dialogs.jsonl"), "--batch-tokens", "1500"],
        [*fifth, "rlhf-v5-constrained", "--pool", "last", "--prompts", str(made / "v5.jsonl"), "--max-prompts", count],
    ]


def measured(root: Path, made: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name -> (folder, where the instruction stands when adherence is measured)."""
    return {"SFT": (root / "sft", ("every",)), "V3": (root / "rlhf-v3", ("first", "every")), "GAtt": (root / "gatt", ("first",)),
            "V4-PPO": (root / "rlhf-v4-ppo", ("first",)), "V5": (root / "rlhf-v5", ("first",)),
            "V3 by reward": (made / "by-reward" / "rlhf-v3", ("every",)),
            "V3 by check": (made / "by-check" / "rlhf-v3", ("first", "every")),
            "GAtt on V3 by check": (made / "by-check" / "gatt", ("first",)),
            "V4-PPO constrained": (made / "after" / "rlhf-v4-ppo", ("first",)),
            **{f"V5 {name}": (made / "v5" / f"rlhf-v5-{name}", ("first",)) for name in ("constrained", "mix")}}


def measure(root: Path, made: Path, s: Settings, seed: int) -> dict:
    """Adherence, helpfulness and safety of every model, and win rates over that of the default pipeline."""
    prompts, table, answers = read_prompts(toy.ensure() / f"prompts-{s.split}.jsonl"), {}, {}
    for name, (folder, controls) in measured(root, made).items():
        model, tokenizer = load_model(folder)
        answers[name] = measures.evaluate(model, tokenizer, prompts, seed=seed, samples=s.samples)
        table[name] = {"summary": measures.summary(prompts, answers[name])}
        if name in BASELINES:
            table[name]["against default"] = measures.compare(prompts, answers[name], answers[BASELINES[name]])
        for group in CONTROL_SETS:
            for control in controls:
                rows = measures.adherence(model, tokenizer, sets(s.dialogs)[group], instruct=control, split=s.split, seed=seed,
                                          measure=TURNS)
                entry = table[name][f"{group}, {control}"] = measures.adherence_by_turn(rows)
                print(f"seed {seed} {name:<20}{group:<18}{control:<6}", *(f"{entry[str(t)].mean:.2f}" for t in TURNS),
                      f"mean {entry['mean']}", flush=True)
    return table


def main() -> None:
    # 1. the arms
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    toy.ensure()
    folders = {seed: (s.out / str(seed), s.out / f"{seed}-constrained") for seed in s.seeds}
    if s.train_rounds:
        for seed, (_, made) in folders.items():
            train_rounds(made / "by-check", seed)
        return
    for seed, (root, made) in folders.items():
        require(root / "rlhf-v5", "python experiments/figure11_ppo.py")
        write_prompts(root, made, seed)
    side_by_side({f"constrained-{seed}": commands(root, made, s, seed) for seed, (root, made) in folders.items()}, s.out,
                 s.at_once)

    # 2. measure
    for seed, (root, made) in folders.items():
        save_result("constrained_prompts", load_result("constrained_prompts") | {str(seed): measure(root, made, s, seed)})

    # 3. means over seeds
    result = load_result("constrained_prompts")
    for name in result[str(s.seeds[0])]:
        found = [result[str(seed)][name] for seed in s.seeds]
        for key in [key for key in found[0] if key.startswith(CONTROL_SETS)]:
            print(f"{name:<20} {key:<26}", *(f"{sum(t[key][str(turn)][0] for t in found) / len(found):.2f}" for turn in TURNS),
                  "mean", *(f"{table[key]['mean'][0]:.3f}" for table in found))
        for axis in ("helpfulness", "safety"):
            print(f"    {axis} {measures.interval([table['summary'][axis][0] for table in found])}")
            if name in BASELINES:
                rates = [table["against default"][axis][0] for table in found]
                print(f"    win over {BASELINES[name]} in {axis}: {measures.interval(rates)};", *map("{:.3f}".format, rates))


if __name__ == "__main__":
    run(main)
