"""Iterative RLHF by rejection sampling, versions V1 to V4 (paper §3.2.3).

The paper: with the newest model, sample K answers to each prompt, keep the one that the best reward model likes most, and
fine-tune on those as in SFT; new preferences are collected and the reward models refreshed before every round. V3 looked
at the samples of the last iteration only and forgot (it rhymed worse); from then on top samples of all iterations count.
Ours: the pool is the answers of all rounds to the same prompts, scored again with the newest reward models, one kept per
prompt. The reward models learn a round's fresh pairs mixed with as many old ones. K, the prompts per round and the
fine-tuning settings are not in the paper.

    python rejection_sampling.py                      rounds V1 to V4, from out/sft
    python rejection_sampling.py --rounds 1-3         so many of them; --rounds 5 --init out/rlhf-v4-ppo
"""

import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import InputError, Tokenizer, encode_prompt, read_jsonl, read_prompts, read_sft, toy, write_jsonl
from data.annotators import check_annotator
from eval import Settings as EvalSettings
from eval import evaluate, print_table, summary
from model import Transformer
from reward import (
    AXES,
    RewardModel,
    collect_preferences,
    combine_rewards,
    load_reward_model,
    pick_prompts,
    report,
    save_reward_model,
    score,
    train_reward_model,
)
from runtime import (
    Metrics,
    check_positive,
    choose_device,
    choose_dtype,
    fingerprint,
    finish_stage,
    load_model,
    open_stage,
    parse_settings,
    require,
    run,
    sample_answers,
    save_model,
    set_seed,
    set_threads,
)
from sft import encode_rows, finetune, show_answers


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # reads OUT/sft and OUT/reward-*, writes OUT/rlhf-v1 ...
    rounds: str = "1-4"  # which versions to make: 1-4, or one, such as 5
    init: str = ""  # the model that the first of these rounds samples from; empty: the version before it
    start: Literal["last", "sft"] = "last"  # fine-tune from the last version or from sft, each round (the paper is ambiguous)
    pool: Literal["all", "last"] = "all"  # best of the answers of all rounds, or of the last round only (the paper's V3)
    prompts: str = "toy"  # JSONL of prompts, the same for every round
    max_prompts: int = 700  # use the first so many
    mix: str = ""  # JSONL of dialogs added to the fine-tuning set (Ghost Attention's come in here)
    samples: int = 8  # K, answers to each prompt; the paper does not say
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)  # tried on dev prompts; the paper finds the best one moves
    annotator: Literal["toy", "human", "none"] = "toy"  # toy, human, or none: the reward models stay as they are
    helpfulness_pairs: int = 600  # fresh preferences a round; our choice
    safety_pairs: int = 300  # the same for safety
    pair_temperatures: tuple[float, ...] = (0.8, 1.1)  # of the two answers of a pair
    margin: Literal["none", "small", "large"] = "small"  # as in reward.py
    reward_learning_rate: float = 5e-4  # of the refresh; our choice
    reward_batch_tokens: int = 1200  # as in reward.py
    epochs: int = 2  # over the best answers; our choice
    batch_tokens: int = 500  # tokens a step
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 5e-4  # our choice; the paper says "similar to SFT"
    weight_decay: float = 0.1  # paper, of SFT
    seed: int = 0  # of sampling, order and the annotator's noise
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete these rounds' folders


PAPER = dict(samples=20, epochs=2, batch_tokens=64 * 4096, micro_tokens=4096, learning_rate=2e-5,
             reward_learning_rate=1e-5, reward_batch_tokens=1024 * 1024, max_prompts=0, temperatures=(0.8, 1.0, 1.2),
             annotator="none")
PRESETS = {
    "tiny": dict(max_prompts=24, samples=4, helpfulness_pairs=40, safety_pairs=30, temperatures=(0.8, 1.0)),
    "toy": {}, "small": dict(max_prompts=2000, learning_rate=2e-4, batch_tokens=4096),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-70b": PAPER | dict(reward_learning_rate=5e-6),
}


def best_of(rewards: Tensor, owners: list[int]) -> dict[int, int]:
    """For each prompt the number of its best answer; of equal ones the first.

    Args:
        rewards: (answers,) any numbers. owners: the prompt that each answer belongs to.

    >>> best_of(torch.tensor([0.1, 0.9, 0.5]), [7, 7, 8])
    {7: 1, 8: 2}
    """
    best: dict[int, int] = {}
    for i, (reward, owner) in enumerate(zip(rewards.tolist(), owners, strict=True)):
        if owner not in best or reward > rewards[best[owner]]:
            best[owner] = i
    return best


class Judges:
    """The two reward models, and what they give to sampled answers."""

    def __init__(self, folders: dict[str, Path], device: torch.device):
        self.models: dict[str, RewardModel] = {}
        for axis, folder in folders.items():
            self.models[axis], self.tokenizer = load_reward_model(folder, device)

    def rewards(self, prompts: list[dict], rows: list[dict]) -> Tensor:
        """Both scores are written into the rows; returns the combined reward (answers,), a logit."""
        if not rows:
            return torch.zeros(0)
        encoded = {i: encode_prompt(self.tokenizer, prompts[i]["prompt"]) for i in {row["index"] for row in rows}}
        sequences = [encoded[row["index"]] + row["answer_ids"] for row in rows]
        scores = {axis: score(model, sequences) for axis, model in self.models.items()}  # (answers) each
        is_safety = torch.tensor([prompts[row["index"]]["is_safety"] for row in rows])  # (answers)
        rewards = combine_rewards(scores["safety"], scores["helpfulness"], is_safety)  # (answers)
        for i, row in enumerate(rows):
            row |= {axis: round(scores[axis][i].item(), 4) for axis in AXES} | {"reward": round(rewards[i].item(), 4)}
        return rewards


class SamplePool:
    """The answers of all rounds to one list of prompts; each round the newest reward models score them all again."""

    def __init__(self, prompts: list[dict]):
        self.prompts, self.rows, self.left_out = prompts, [], {"cut at the length limit": 0, "holds a tag or nothing": 0}

    def add(self, version: str, rows: list[dict]) -> None:
        """Add a round's answers. Those that ran into the length limit have no EOS to learn from: left out and counted."""
        for row in rows:
            if row["finish_reason"] != "eos":
                self.left_out["cut at the length limit"] += 1
            elif row["has_tag"] or not row["answer"]:
                self.left_out["holds a tag or nothing"] += 1
            else:
                self.rows.append(row | {"version": version})

    def best(self, judges: Judges) -> list[dict]:
        """The best answer to each prompt as SFT rows; reward and version beside them."""
        picked = best_of(judges.rewards(self.prompts, self.rows), [row["index"] for row in self.rows])
        result = []
        for index in sorted(picked):
            row, prompt = self.rows[picked[index]], self.prompts[index]
            result.append({"messages": [*prompt["prompt"], {"role": "assistant", "content": row["answer"]}],
                           "train_on": "last", "is_safety": prompt["is_safety"], "answer_ids": row["answer_ids"],
                           "tokenizer": judges.tokenizer.fingerprint,
                           **{key: row[key] for key in ("version", "reward", "helpfulness", "safety", "temperature")}})
        return result


def search_temperature(model: Transformer, tokenizer: Tokenizer, prompts: list[dict], judges: Judges, *,
                       temperatures: tuple[float, ...], samples: int, key: tuple) -> tuple[float, dict[float, float]]:
    """The temperature whose best of K answers has the highest mean reward on dev prompts (§3.2.3, Fig. 8).

    Returns:
        (the best temperature, {temperature: mean over prompts of the maximal reward, a logit}).
    """
    table = {}
    for temperature in temperatures:
        rows = sample_answers(model, tokenizer, prompts, key=key, samples=samples, temperature=temperature,
                              desc=f"temperature {temperature}")
        rewards = judges.rewards(prompts, rows)  # (answers)
        picked = best_of(rewards, [row["index"] for row in rows])
        table[temperature] = rewards[list(picked.values())].mean().item()
    return max(table, key=table.get), table


def run_round(version: int, s: Settings) -> None:
    """One round: RLHF-V(n) from V(n-1). Everything it makes is in OUT/rlhf-vN; nothing of an earlier stage is touched."""
    started, cpu, name = time.time(), time.process_time(), f"rlhf-v{version}"
    device, folder = choose_device(s.device), s.out / name
    dtype = choose_dtype(s.dtype, device)
    before = [s.out / ("sft" if v == 0 else f"rlhf-v{v}") for v in range(version)]
    commands = ["python sft.py", *(f"python rejection_sampling.py --rounds {v}" for v in range(1, version))]
    for path, command in zip(before, commands, strict=True):
        require(path, command)
    newest = Path(s.init) if s.init else before[-1]
    judges_before = {}  # the newest reward models: of the last round that refreshed them, or the first ones
    for axis in AXES:
        refreshed = [path / f"reward-{axis}" for path in before[1:] if (path / f"reward-{axis}").is_dir()]
        judges_before[axis] = refreshed[-1] if refreshed else require(s.out / f"reward-{axis}", "python reward.py")
    train_file = toy.ensure() / "prompts-train.jsonl" if s.prompts == "toy" else Path(s.prompts)
    inputs = {"model": newest, "prompts": train_file, **judges_before} | ({"mix": Path(s.mix)} if s.mix else {})
    settings = {k: v for k, v in asdict(s).items() if k not in ("out", "fresh", "threads", "device", "rounds", "init", "mix")}
    mix = read_sft(s.mix) if s.mix else []
    for path in [path for path in before[1:] if s.pool == "all" and (path / "stage.json").exists()]:
        record = json.loads((path / "stage.json").read_text())
        if (record["inputs"]["prompts"], record["settings"]["max_prompts"]) != (fingerprint(train_file), s.max_prompts):
            raise InputError(f"{path} was made from other prompts; the pool joins answers to the same ones: give the same "
                             "--prompts and --max-prompts, or --pool last")
    if not open_stage(folder, settings, inputs, s.fresh):
        return
    all_prompts = read_prompts(train_file)
    check_annotator(s.annotator, all_prompts)
    prompts = all_prompts[: s.max_prompts or None]
    dev = read_prompts(toy.FOLDER / "prompts-dev.jsonl") if s.prompts == "toy" else []
    model, tokenizer = load_model(newest, device)
    metrics = Metrics(folder / "metrics.jsonl")
    print(f"\n=== {name}: {len(prompts)} prompts x {s.samples} answers from {newest}")

    # 1. annotate: fresh preferences between the newest model and the one before it; refresh the reward models
    tables, current = {}, dict(judges_before)
    if s.annotator != "none":
        older = load_model(before[-1] if s.init else before[max(0, version - 2)], device)[0]
        for axis in AXES:
            picked = pick_prompts(all_prompts, axis, getattr(s, f"{axis}_pairs"), s.seed * 1000 + version)
            fresh = collect_preferences([model, older], tokenizer, picked, axis, annotator=s.annotator,
                                        temperatures=s.pair_temperatures, key=(s.seed, name), folder=folder)
            write_jsonl(folder / f"pairs-{axis}.jsonl", fresh)
            current[axis] = folder / f"reward-{axis}"
            reward_model, _ = load_reward_model(judges_before[axis], device)
            tables[axis] = report(reward_model, tokenizer, fresh, axis, "fresh (not yet learned)")
            if not (current[axis] / "reward_head.pth").exists():
                files = [s.out / f"reward-{axis}" / "pairs.jsonl", *(path / f"pairs-{axis}.jsonl" for path in before[1:])]
                earlier = [row for file in files if file.exists() for _, row in read_jsonl(file)]
                replay = random.Random(f"{s.seed} {version} {axis}").sample(earlier, min(len(earlier), len(fresh)))
                train_reward_model(reward_model, tokenizer, fresh + replay, margin=s.margin,
                                   auxiliary_weight=float(axis == "safety"), epochs=1, batch_tokens=s.reward_batch_tokens,
                                   micro_tokens=s.micro_tokens, learning_rate=s.reward_learning_rate,
                                   weight_decay=s.weight_decay, folder=folder, phase=axis, seed=s.seed + version, dtype=dtype)
                save_reward_model(current[axis], reward_model, tokenizer)
    judges = Judges(current, device)

    # 2. choose the temperature on dev prompts
    probe = (dev or prompts)[:48]
    temperature, table = search_temperature(model, tokenizer, probe, judges, temperatures=s.temperatures, samples=s.samples,
                                            key=(s.seed, name, "temperature"))
    metrics.rewind("temperature")
    metrics.log("temperature", 0, chosen=temperature, **{f"reward_at_{t}": value for t, value in table.items()})
    print("best of", s.samples, "by temperature:", ", ".join(f"{t}: {value:.3f}" for t, value in table.items()))

    # 3. sample and score
    rows = sample_answers(model, tokenizer, prompts, key=(s.seed, name), samples=s.samples, temperature=temperature,
                          path=folder / "samples.jsonl")
    rewards = judges.rewards(prompts, rows)
    write_jsonl(folder / "samples.jsonl", [row | {"version": name, "tokenizer": tokenizer.fingerprint} for row in rows])

    # 4. keep the best of all rounds
    pool = SamplePool(prompts)
    for v in range(1, version) if s.pool == "all" else ():
        pool.add(f"rlhf-v{v}", [row for _, row in read_jsonl(s.out / f"rlhf-v{v}" / "samples.jsonl")])
    pool.add(name, rows)
    best = pool.best(judges)
    if not best:
        raise InputError(f"{folder}: no answer is left to train on ({pool.left_out}); sample more or longer ones")
    write_jsonl(folder / "best.jsonl", best)
    sources = {v: sum(row["version"] == v for row in best) for v in sorted({row["version"] for row in best})}
    harmless = [row for row in rows if not prompts[row["index"]]["is_safety"]]  # the gate should leave these alone
    gated = sum(row["reward"] == row["safety"] for row in harmless) / max(1, len(harmless))
    print(f"the safety gate takes over {gated:.1%} of the answers to untagged prompts")
    print(f"reward of all answers {rewards.mean():.3f}, of the best {sum(row['reward'] for row in best) / len(best):.3f}; "
          f"best from {sources}; left out {pool.left_out}")

    # 5. fine-tune
    if s.start == "sft":
        model, tokenizer = load_model(before[0], device)
    tuning = best + mix
    finetune(model, encode_rows(tokenizer, tuning, model.args.max_seq_len), epochs=s.epochs, batch_tokens=s.batch_tokens,
             micro_tokens=s.micro_tokens, learning_rate=s.learning_rate, weight_decay=s.weight_decay,
             folder=folder, phase="finetune", seed=s.seed + version, dtype=dtype)
    save_model(folder, model, tokenizer)
    show_answers(model, tokenizer, [prompt["prompt"] for prompt in prompts[:5]], f"{name} answers")

    # 6. measure
    results = {"temperature": temperature, "sources": sources, "left_out": pool.left_out, "gated": gated, "reward_models": tables,
               "seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu}
    if s.prompts == "toy":
        found = summary(dev, evaluate(model, tokenizer, dev, seed=EvalSettings.seed))
        print_table({f"{name} (dev)": found})
        results["dev"] = {key: value.mean for key, value in found.items()}
    finish_stage(folder, results)
    print(f"wrote {folder} in {time.time() - started:.0f} s")


def main(argv: list[str] | None = None) -> None:
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    check_positive(s, "samples", "epochs", "batch_tokens", "micro_tokens", "learning_rate", "temperatures",
                   "pair_temperatures", "helpfulness_pairs", "safety_pairs")
    set_threads(s.threads)
    set_seed(s.seed)
    try:
        first, _, last = s.rounds.partition("-")
        versions = range(int(first), int(last or first) + 1)
    except ValueError:
        raise InputError(f"--rounds {s.rounds}: wanted: a number or a range, such as 1-4") from None
    if not versions or versions[0] < 1:
        raise InputError(f"--rounds {s.rounds}: rounds count from 1 upwards")
    for version in versions:
        run_round(version, s if version == versions[0] else replace(s, init=""))


if __name__ == "__main__":
    run(main)
