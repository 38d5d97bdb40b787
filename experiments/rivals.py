"""Is V4 more than SFT with sharper samples? The head-room, and the cheap rivals of rejection
sampling.

    python experiments/rivals.py --seeds 1,2,3        after experiments/seeds.py

For each seed, on the test prompts (V4 at temperature 1):
    head-room            the annotator's own best of 64 SFT answers, and its score
    SFT at its best T    the temperature with the highest score on dev prompts
    SFT on favourites    SFT trained on, for as many rows as V1 to V4 together, by the first reward
                         models' favourite demonstrations
    best of K from SFT   the first reward models' favourite of K answers
Writes experiments/results/rivals.json (per seed; intervals over items). What is printed last is
over seeds: V4's win rates, their intervals corrected for the number of rivals and axes.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import eval as measures
from data import read_prompts, read_sft, world
from experiments.common import load_result, print_claims, save_result
from rejection_sampling import Judges, best_of
from rejection_sampling import Settings as RoundSettings
from reward import AXES
from runtime import (
    is_finished,
    load_model,
    parse_settings,
    run,
    sample_answers,
    save_model,
    set_seed,
    set_threads,
)
from sft import encode_rows, finetune


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    # tried for SFT on dev prompts; 0 is greedy
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    samples: int = 4  # answers per test prompt
    threads: int = 1  # CPU threads


def score_of(rows: list[dict], prompts: list[dict]) -> float:
    """One number for choosing: mean of helpfulness on harmless and safety on unsafe prompts."""
    found = measures.summary(prompts, rows)
    return (found["helpfulness"].mean + found["safety"].mean) / 2


def favourite_demonstrations(judges: Judges, count: int) -> list[dict]:
    """The single-turn demonstrations with the highest reward, unsafe and other prompts in their own
    proportion.
    """
    rows = [row for row in read_sft(world.FOLDER / "sft.jsonl") if len(row["messages"]) == 2]
    prompts = [{"prompt": row["messages"][:1], "is_safety": row["is_safety"]} for row in rows]
    answers = [
        {"index": i, "answer_ids": encoded.ids[sum(not m for m in encoded.loss_mask) :]}
        for i, encoded in enumerate(encode_rows(judges.tokenizer, rows, 2048))
    ]
    rewards, picked = judges.rewards(prompts, answers).tolist(), []
    for is_safety in (False, True):
        group = sorted(
            (i for i, row in enumerate(rows) if row["is_safety"] is is_safety),
            key=lambda i: -rewards[i],
        )
        picked += group[: round(count * len(group) / len(rows))]
    return [rows[i] for i in picked]


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"rival, axis": V4's win rates over it, one per seed}."""
    rows = {}
    for name in result[seeds[0]]["rivals"]:
        for axis in AXES:
            tables = [result[seed]["rivals"][name]["V4 wins"] for seed in seeds]
            rows[f"{name}, {axis}"] = [table[axis][0] for table in tables]
    return rows


def main() -> None:
    s = parse_settings(Settings, __doc__)
    set_threads(s.threads)
    dev, test = (
        read_prompts(world.ensure() / f"prompts-{split}.jsonl") for split in ("dev", "test")
    )
    k, rounds = RoundSettings.samples, RoundSettings()
    result = load_result("rivals", s)
    for seed in s.seeds:
        root = s.out / str(seed)
        sft, tokenizer = load_model(root / "sft")
        judges = Judges({axis: root / f"reward-{axis}" for axis in AXES}, torch.device("cpu"))
        set_seed(seed)

        # 1. head-room, and best of K by the first reward models, from the same 64 answers
        many = measures.judge(
            test, sample_answers(sft, tokenizer, test, key=(seed, "head-room"), samples=64)
        )
        owners = [row["index"] for row in many]
        ideal = best_of(
            torch.tensor([row[measures.axis_of(test[row["index"]])] for row in many]), owners
        )
        first_k = [row for row in many if row["sample"] < k]
        best_k = best_of(
            judges.rewards(test, [dict(row) for row in first_k]), [row["index"] for row in first_k]
        )
        rivals = {
            "head-room (annotator's best of 64)": [many[ideal[i]] for i in range(len(test))],
            f"best of {k} from SFT": [first_k[best_k[i]] for i in range(len(test))],
        }

        # 2. SFT at its best temperature
        by_temperature = {
            t: score_of(
                measures.evaluate(sft, tokenizer, dev, seed=seed, samples=2, temperature=t), dev
            )
            for t in s.temperatures
        }
        cool = max(by_temperature, key=by_temperature.get)
        rivals["SFT at its best T"] = measures.evaluate(
            sft, tokenizer, test, seed=seed + 1000, samples=s.samples, temperature=cool
        )

        # 3. SFT trained on by the first reward models' favourite demonstrations
        folder = root / "sft-favourites"
        if not (folder / "consolidated.00.pth").exists():
            model, _ = load_model(root / "sft")
            rows = favourite_demonstrations(judges, 4 * rounds.max_prompts)
            finetune(
                model,
                encode_rows(tokenizer, rows, model.args.max_seq_len),
                epochs=rounds.epochs,
                batch_tokens=rounds.batch_tokens,
                learning_rate=rounds.learning_rate,
                folder=folder,
                phase="favourites",
                seed=seed,
            )
            save_model(folder, model, tokenizer)
        rivals["SFT on favourites"] = measures.evaluate(
            *load_model(folder), test, seed=seed, samples=s.samples
        )

        # 4. V4 against each of them
        entry = {
            "best temperature of SFT": cool,
            "dev score by temperature": by_temperature,
            "rivals": {},
        }
        if is_finished(root / "rlhf-v4"):
            v4 = measures.evaluate(
                *load_model(root / "rlhf-v4"), test, seed=seed, samples=s.samples
            )
            single = [row for row in v4 if row["sample"] == 0]
            for name, rows in rivals.items():
                found = measures.compare(test, v4 if len(rows) == len(v4) else single, rows)
                entry["rivals"][name] = {"summary": measures.summary(test, rows), "V4 wins": found}
                print(
                    f"seed {seed}: V4 against {name}: helpfulness {found['helpfulness']}, safety"
                    f" {found['safety']}"
                )
        result[str(seed)] = entry
        save_result("rivals", result, s)
    result = load_result("rivals", s)
    for name in result[str(s.seeds[0])]["rivals"]:
        for axis in AXES:
            means = [result[str(seed)]["rivals"][name]["summary"][axis][0] for seed in s.seeds]
            print(f"{name}: {axis} {statistics.fmean(means):.3f}")
    print_claims("V4 wins against", claims(result, [str(seed) for seed in s.seeds]))


if __name__ == "__main__":
    run(main)
