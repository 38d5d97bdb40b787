"""Iterative RLHF by rejection sampling, versions V1 to V4 (paper §3.2.3).

The paper: with the newest model, sample K answers to each prompt, keep the one that the best reward model likes most, and
fine-tune on those as in SFT; new preferences are collected and the reward models refreshed before every round. V3 looked
at the samples of the last iteration only and forgot (it rhymed worse); from then on top samples of all iterations count.
Ours: the pool is the answers of all rounds to the same prompts, scored again with the newest reward models, one kept per
prompt. The reward models learn a round's fresh pairs mixed with as many old ones, 2,400 at most. K, the prompts per round and the
fine-tuning settings are not in the paper.

    python rejection_sampling.py                      rounds V1 to V4, from out/sft
    python rejection_sampling.py --rounds 1-3         so many of them; --rounds 5 --init out/rlhf-v4-ppo
    python rejection_sampling.py --rounds 5 --name rlhf-v5-no-ppo          a control beside V5, in a folder of its own
    python rejection_sampling.py --answer "Name three animals." --n 16     one answer by best of N, and its rivals
"""

import random
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import (
    InputError,
    Tokenizer,
    encode_prompt,
    read_jsonl,
    read_preferences,
    read_prompts,
    read_sft,
    toy,
    write_jsonl,
)
from data.annotators import NotAnnotated, check_annotator
from eval import VERSIONS, evaluate_on_dev
from model import Transformer
from reward import (
    AXES,
    RewardModel,
    collect_preferences,
    combine_rewards,
    encode_answer,
    load_reward_model,
    pick_prompts,
    report,
    save_reward_model,
    score,
    set_shift,
    train_reward_model,
)
from runtime import (
    Metrics,
    append_rows,
    check_positive,
    check_same_prompts,
    choose_device,
    choose_dtype,
    finish_stage,
    is_finished,
    kept_settings,
    load_model,
    newest_reward_models,
    open_stage,
    parse_settings,
    require,
    resume_rows,
    run,
    sample_answers,
    save_model,
    set_seed,
    set_threads,
    terminal,
    unusable,
)
from sft import encode_rows, finetune, show_answers


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # reads OUT/sft and OUT/reward-*, writes OUT/rlhf-v1 ...
    rounds: str = "1-4"  # which versions to make: 1-4, or one, such as 5
    init: str = ""  # the model that the first of these rounds samples from; empty: the version before it
    name: str = ""  # folder of a single round; empty: rlhf-vN. Others begin with it: rlhf-v5-no-ppo
    start: Literal["last", "sft"] = "last"  # fine-tune from the last version or from sft, each round (the paper is ambiguous)
    pool: Literal["all", "last"] = "all"  # best of the answers of all rounds, or of the last round only (the paper's V3)
    prompts: str = "toy"  # JSONL of prompts, the same for every round
    max_prompts: int = 700  # use the first so many
    mix: str = ""  # JSONL of dialogs added to the fine-tuning set (Ghost Attention's come in here)
    samples: int = 8  # K, answers to each prompt; the paper does not say
    max_new_tokens: int = 96  # longest answer; one that gets there has no end to learn from and is left out
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)  # tried on dev prompts; the paper finds the best one moves
    annotator: Literal["toy", "human", "file", "none"] = "toy"  # toy, human, file (label pairs, run again) or none (no refresh)
    helpfulness_pairs: int = 2400  # fresh preferences a round; our choice: late rounds differ in content, seen by fresh ones
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
    answer: str = ""  # no round: answer this prompt by best of N with the newest model, show all candidates
    n: int = 16  # N of --answer
    temperature: float = 1.0  # of --answer
    seed: int = 0  # of sampling, order and the annotator's noise
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete these rounds' folders


PAPER = dict(samples=20, max_new_tokens=1024, epochs=2, batch_tokens=64 * 4096, micro_tokens=4096, learning_rate=2e-5,
             reward_learning_rate=1e-5, reward_batch_tokens=1024 * 1024, max_prompts=0, temperatures=(0.8, 1.0, 1.2),
             annotator="none")
PRESETS = {
    "tiny": dict(max_prompts=24, samples=4, helpfulness_pairs=40, safety_pairs=30, temperatures=(0.8, 1.0)),
    "toy": {}, "small": dict(max_prompts=2000, learning_rate=2e-4, batch_tokens=4096),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-34b": PAPER, "llama-2-70b": PAPER | dict(reward_learning_rate=5e-6),
}

MAX_REPLAY = 2400  # earlier pairs that a reward model sees again in a refresh; our choice


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
    """The two reward models, and what they give to sampled answers. They share a tokenizer, not always the policy's."""

    def __init__(self, folders: dict[str, Path], device: torch.device):
        self.models: dict[str, RewardModel] = {}
        tokenizers = []
        for axis, folder in folders.items():
            self.models[axis], tokenizer = load_reward_model(folder, device)
            tokenizers.append(tokenizer)
        self.tokenizer = tokenizers[0]
        if any(other.fingerprint != self.tokenizer.fingerprint for other in tokenizers):
            raise InputError(f"the reward models {' and '.join(map(str, folders.values()))} have different tokenizers")

    def sequences(self, prompts: list[dict], rows: list[dict]) -> list[list[int]]:
        """Prompt and answer as ids: those that were sampled, where the row's tokenizer is the judges', else the text's."""
        encoded = {i: encode_prompt(self.tokenizer, prompts[i]["prompt"]) for i in {row["index"] for row in rows}}
        context, found = min(model.body.args.max_seq_len for model in self.models.values()), []
        for row in rows:
            if row.get("tokenizer", self.tokenizer.fingerprint) == self.tokenizer.fingerprint:
                found.append(encoded[row["index"]] + list(row["answer_ids"]))
            else:
                text = "" if row["has_tag"] else row["answer"]  # one that holds a tag is never kept, whatever it scores
                found.append(encode_answer(self.tokenizer, prompts[row["index"]]["prompt"], text))
            if len(found[-1]) > context:
                raise InputError(f"an answer to prompt {row['index']} has, with its prompt, {len(found[-1])} tokens, the reward "
                                 f"model's context only {context}; lower --max-new-tokens")
        return found

    def rewards(self, prompts: list[dict], rows: list[dict]) -> Tensor:
        """Both scores are written into the rows; returns the combined reward (answers,), a logit."""
        if not rows:
            return torch.zeros(0)
        sequences = self.sequences(prompts, rows)
        scores = {axis: score(model, sequences) for axis, model in self.models.items()}  # (answers) each
        is_safety = torch.tensor([prompts[row["index"]]["is_safety"] for row in rows])  # (answers)
        rewards = combine_rewards(scores["safety"], scores["helpfulness"], is_safety)  # (answers)
        for i, row in enumerate(rows):
            row |= {axis: round(scores[axis][i].item(), 4) for axis in AXES} | {"reward": round(rewards[i].item(), 4)}
        return rewards


def share_gated(prompts: list[dict], rows: list[dict]) -> float:
    """Share of the judged answers to untagged prompts that the safety model took over (§3.2.3); it should leave these alone."""
    untagged = [row for row in rows if not prompts[row["index"]]["is_safety"]]
    return sum(row["reward"] == row["safety"] for row in untagged) / max(1, len(untagged))


def sample_and_score(model: Transformer, tokenizer: Tokenizer, prompts: list[dict], judges: Judges, version: str,
                     **options) -> list[dict]:
    """`sample_answers`, each row with both scores and the reward; with `path` they are written batch by batch together."""
    def finish(rows: list[dict]) -> None:
        for row in rows:
            row |= {"version": version, "tokenizer": tokenizer.fingerprint}
        judges.rewards(prompts, rows)

    return sample_answers(model, tokenizer, prompts, finish=finish, **options)


class SamplePool:
    """The answers of all rounds to one list of prompts; each round the newest reward models score them all again."""

    def __init__(self, prompts: list[dict]):
        self.prompts, self.rows, self.left_out = prompts, [], {}

    def add(self, version: str, rows: list[dict]) -> None:
        """Add a round's answers, such as have something to learn from; the others are counted by their reason."""
        for row in rows:
            if reason := unusable(row):
                self.left_out[reason] = self.left_out.get(reason, 0) + 1
            else:
                self.rows.append(row | {"version": version})

    def rescore(self, judges: Judges, path: Path | None = None, *, batch_rows: int = 2000) -> None:
        """Score all answers in the pool again. `path`: JSONL to which the scores are written batch by batch; what is there
        already is not scored again."""
        batches = [self.rows[start: start + batch_rows] for start in range(0, len(self.rows), batch_rows)]
        done = resume_rows(path, [len(batch) for batch in batches]) if path else []
        for row, scores in zip(self.rows, done, strict=False):
            row |= scores
        seen, kept = 0, ("version", "index", "sample", *AXES, "reward")
        for batch in batches:
            seen += len(batch)
            if seen > len(done):
                judges.rewards(self.prompts, batch)
                if path:
                    append_rows(path, [{key: row[key] for key in kept} for row in batch])

    def best(self) -> list[dict]:
        """The answer with the highest reward to each prompt, as SFT rows; reward and version beside them."""
        picked = best_of(torch.tensor([row["reward"] for row in self.rows]), [row["index"] for row in self.rows])
        result = []
        for index in sorted(picked):
            row, prompt = self.rows[picked[index]], self.prompts[index]
            result.append({"messages": [*prompt["prompt"], {"role": "assistant", "content": row["answer"]}],
                           "train_on": "last", "is_safety": prompt["is_safety"],
                           **{key: row[key] for key in ("answer_ids", "tokenizer", "version", "reward", *AXES, "temperature")}})
        return result


def search_temperature(model: Transformer, tokenizer: Tokenizer, prompts: list[dict], judges: Judges, version: str, *,
                       temperatures: tuple[float, ...], folder: Path, **options) -> tuple[float, dict[float, float]]:
    """The temperature whose best of K answers has the highest mean reward on dev prompts (§3.2.3, Fig. 8).

    Only answers that the pool would take count; a prompt without one at some temperature counts there as the worst prompt
    of the whole probe (our choice). `options` go to `sample_answers`; answers and scores to `folder/probe-T.jsonl`.

    Returns:
        (the best temperature, {temperature: mean over prompts of the maximal reward, a logit}).

    Raises:
        InputError: no answer at any temperature can be used.
    """
    maxima: dict[float, dict[int, float]] = {}  # temperature -> prompt -> the reward of its best answer
    for temperature in temperatures:
        rows = sample_and_score(model, tokenizer, prompts, judges, version, temperature=temperature,
                                path=folder / f"probe-{temperature}.jsonl", desc=f"temperature {temperature}", **options)
        rows = [row for row in rows if not unusable(row)]
        picked = best_of(torch.tensor([row["reward"] for row in rows]), [row["index"] for row in rows])
        maxima[temperature] = {index: rows[i]["reward"] for index, i in picked.items()}
    everything = [reward for found in maxima.values() for reward in found.values()]
    if not everything:
        raise InputError(f"no answer to the {len(prompts)} prompts of the temperature search can be used: all are empty, hold "
                         "a tag, or are cut at --max-new-tokens; raise it, or fine-tune the model on answers that end")
    table = {temperature: statistics.fmean(found.get(i, min(everything)) for i in range(len(prompts)))
             for temperature, found in maxima.items()}
    return max(table, key=table.get), table


def refresh_reward_models(policies: list[Transformer], tokenizer: Tokenizer, prompts: list[dict], current: dict[str, Path],
                          s: Settings, *, label: str, number: int, earlier: list[Path], folder: Path,
                          dtype: torch.dtype) -> tuple[dict[str, Path], dict]:
    """Fresh preferences between answers of the newest policies (§3.2.1), on which the reward models learn on (§3.2.2): the
    fresh pairs and as many earlier ones (at most MAX_REPLAY), so that they know the new answers and forget nothing.

    Args:
        prompts: to collect on. current: {axis: folder of the reward model so far}. s: pairs of each axis, annotator, …
        label, number: of the randomness. earlier: folders of rounds, whose pairs count as earlier ones.
        folder: gets pairs-AXIS.jsonl and reward-AXIS.

    Returns:
        ({axis: folder of the refreshed reward model}, {axis: accuracy of the one so far on the fresh pairs}).

    Raises:
        NotAnnotated: a person has to label the pairs first.
    """
    fresh, tables, refreshed, waiting = {}, {}, {}, []
    zero = read_preferences(require(s.out / "reward-helpfulness" / "pairs.jsonl", "python reward.py"))  # see `set_shift`
    for axis in AXES:
        picked = pick_prompts(prompts, axis, getattr(s, f"{axis}_pairs"), s.seed * 1000 + number)
        try:
            fresh[axis] = collect_preferences(policies, tokenizer, picked, axis, annotator=s.annotator,
                                              temperatures=s.pair_temperatures, key=(s.seed, label), folder=folder,
                                              max_new_tokens=s.max_new_tokens)
            write_jsonl(folder / f"pairs-{axis}.jsonl", fresh[axis])
        except NotAnnotated as stop:  # both files are written, then a person has both to label
            waiting.append(str(stop))
    if waiting:
        raise NotAnnotated(". ".join(waiting))
    for axis in AXES:
        refreshed[axis] = folder / f"reward-{axis}"
        model, judges_tokenizer = load_reward_model(current[axis], policies[0].tok_embeddings.weight.device)
        if fresh[axis]:
            tables[axis] = report(model, judges_tokenizer, fresh[axis], axis, "fresh (not yet learned)")
        if not (refreshed[axis] / "reward_head.pth").exists():
            files = [s.out / f"reward-{axis}" / "pairs.jsonl", *(path / f"pairs-{axis}.jsonl" for path in earlier)]
            older = [row for file in files if file.exists() for _, row in read_jsonl(file)]
            count = min(len(older), len(fresh[axis]), MAX_REPLAY)
            replay = random.Random(f"{s.seed} {number} {axis}").sample(older, count)
            train_reward_model(model, judges_tokenizer, fresh[axis] + replay, margin=s.margin,
                               auxiliary_weight=float(axis == "safety"), epochs=1, batch_tokens=s.reward_batch_tokens,
                               micro_tokens=s.micro_tokens, learning_rate=s.reward_learning_rate,
                               weight_decay=s.weight_decay, folder=folder, phase=axis, seed=s.seed + number, dtype=dtype)
            if axis == "helpfulness":
                set_shift(model, judges_tokenizer, zero)
            save_reward_model(refreshed[axis], model, judges_tokenizer)
    return refreshed, tables


def run_round(version: int, s: Settings) -> None:
    """One round: RLHF-V(n) from V(n-1). Everything it makes is in OUT/rlhf-vN; nothing of an earlier stage is touched."""
    label = f"rlhf-v{version}"
    name = s.name or label  # a control draws the same random numbers as the version that it stands beside
    device, folder = choose_device(s.device), s.out / name
    dtype = choose_dtype(s.dtype, device)
    before = [s.out / ("sft" if v == 0 else f"rlhf-v{v}") for v in range(version)]
    commands = ["python sft.py", *(f"python rejection_sampling.py --rounds {v}" for v in range(1, version))]
    for path, command in zip(before, commands, strict=True):
        require(path, command)
    newest = Path(s.init) if s.init else before[-1]
    elsewhere = newest.resolve() not in {path.resolve() for path in before}  # such as V4-PPO
    earlier = before[1:] + [newest] * elsewhere  # whose reward models and pairs this round goes on from
    judges_before = newest_reward_models(s.out, earlier)
    train_file = toy.ensure() / "prompts-train.jsonl" if s.prompts == "toy" else Path(s.prompts)
    inputs = {"model": newest, "prompts": train_file, **judges_before} | ({"mix": Path(s.mix)} if s.mix else {})
    settings = kept_settings(s, "rounds", "init", "mix", "name", "answer", "n", "temperature")
    mix = read_sft(s.mix) if s.mix else []
    pooled = before[1:] if s.pool == "all" else []  # the earlier rounds whose answers count
    inputs |= {f"samples of {path.name}": path / "samples.jsonl" for path in pooled}
    check_same_prompts(pooled, train_file, s.max_prompts)
    started = open_stage(folder, settings, inputs, s.fresh)
    if not started:
        return
    all_prompts = read_prompts(train_file)
    check_annotator(s.annotator, all_prompts)
    prompts = all_prompts[: s.max_prompts or None]
    dev = read_prompts(toy.FOLDER / "prompts-dev.jsonl") if s.prompts == "toy" else []
    model, tokenizer = load_model(newest, device)
    mix = encode_rows(tokenizer, mix, model.args.max_seq_len)  # now: a mistake in it is told before hours of sampling
    metrics = Metrics(folder / "metrics.jsonl")
    print(f"\n=== {name}: {len(prompts)} prompts x {s.samples} answers from {newest}")

    # 1. annotate: fresh preferences between the newest model and the one before it; refresh the reward models
    tables, current = {}, judges_before
    if s.annotator != "none":
        older = load_model(before[-1] if s.init else before[max(0, version - 2)], device)[0]
        current, tables = refresh_reward_models([model, older], tokenizer, all_prompts, judges_before, s, label=label,
                                                number=version, earlier=earlier, folder=folder, dtype=dtype)
    judges = Judges(current, device)

    # 2. choose the temperature on dev prompts
    probe = (dev or prompts)[:48]
    temperature, table = search_temperature(model, tokenizer, probe, judges, name, temperatures=s.temperatures, folder=folder,
                                            samples=s.samples, max_new_tokens=s.max_new_tokens,
                                            key=(s.seed, label, "temperature"))
    metrics.rewind("temperature")
    metrics.log("temperature", 0, chosen=temperature, **{f"reward_at_{t}": value for t, value in table.items()})
    print("best of", s.samples, "by temperature:", ", ".join(f"{t}: {value:.3f}" for t, value in table.items()))

    # 3. sample and score
    rows = sample_and_score(model, tokenizer, prompts, judges, name, key=(s.seed, label), samples=s.samples,
                            temperature=temperature, max_new_tokens=s.max_new_tokens, path=folder / "samples.jsonl")
    write_jsonl(folder / "samples.jsonl", rows)  # by prompt, all K answers of one together

    # 4. keep the best of all rounds, the earlier answers scored again
    pool = SamplePool(prompts)
    for path in pooled:
        pool.add(path.name, [row for _, row in read_jsonl(path / "samples.jsonl")])
    pool.rescore(judges, folder / "rescored.jsonl")
    pool.add(name, rows)
    best = pool.best()
    if not best:
        raise InputError(f"{folder}: no answer is left to train on ({pool.left_out}); sample more or longer ones")
    write_jsonl(folder / "best.jsonl", best)
    sources = {v: sum(row["version"] == v for row in best) for v in sorted({row["version"] for row in best})}
    gated = share_gated(prompts, rows)
    print(f"the safety gate takes over {gated:.1%} of the answers to untagged prompts")
    means = [statistics.fmean(row["reward"] for row in picked) for picked in (rows, best)]
    print(f"reward of all answers {means[0]:.3f}, of the best {means[1]:.3f}; "
          f"best from {sources}; left out {pool.left_out}")

    # 5. fine-tune
    if s.start == "sft":
        model, tokenizer = load_model(before[0], device)
    dialogs = encode_rows(tokenizer, best, model.args.max_seq_len) + mix
    finetune(model, dialogs, epochs=s.epochs, batch_tokens=s.batch_tokens, micro_tokens=s.micro_tokens,
             learning_rate=s.learning_rate, weight_decay=s.weight_decay, folder=folder, phase="finetune",
             seed=s.seed + version, dtype=dtype)
    save_model(folder, model, tokenizer)
    show_answers(model, tokenizer, [prompt["prompt"] for prompt in prompts[:5]], f"{name} answers")

    # 6. measure
    results = {"temperature": temperature, "sources": sources, "left_out": pool.left_out, "gated": gated, "reward_models": tables}
    if s.prompts == "toy":
        results["dev"] = evaluate_on_dev(name, model, tokenizer)
    finish_stage(folder, results, started)


def candidates(model: Transformer, tokenizer: Tokenizer, judges: Judges, question: str, *, n: int, seed: int = 0,
               **options) -> list[dict]:
    """N answers to one prompt, the best first; those that cannot be used stand last. `options` go to `sample_answers`."""
    prompts = [{"prompt": [{"role": "user", "content": question}], "is_safety": False}]
    rows = sample_and_score(model, tokenizer, prompts, judges, "answer", samples=n, key=(seed, "answer"), **options)
    return sorted(rows, key=lambda row: (bool(unusable(row)), -row["reward"]))


def show_candidates(s: Settings) -> None:
    """`--answer`: best of N with the newest model and the newest reward models of OUT, all candidates shown."""
    device, made = choose_device(s.device), [s.out / name for name in VERSIONS if is_finished(s.out / name)]
    folder = Path(s.init) if s.init else made[-1] if made else require(s.out / "sft", "python sft.py")
    judge_folders = newest_reward_models(s.out, made)
    rows = candidates(*load_model(folder, device), Judges(judge_folders, device), s.answer, n=s.n, seed=s.seed,
                      temperature=s.temperature, max_new_tokens=s.max_new_tokens)
    terminal.print_candidates(folder, judge_folders, rows)


def main(argv: list[str] | None = None) -> None:
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    check_positive(s, "samples", "max_new_tokens", "n", "temperature", "epochs", "batch_tokens", "micro_tokens",
                   "learning_rate", "temperatures", "pair_temperatures", "helpfulness_pairs", "safety_pairs",
                   or_zero=("weight_decay", "max_prompts"))
    set_threads(s.threads)
    set_seed(s.seed)
    if s.answer:
        show_candidates(s)
        return
    try:
        first, _, last = s.rounds.partition("-")
        versions = range(int(first), int(last or first) + 1)
    except ValueError:
        raise InputError(f"--rounds {s.rounds}: wanted: a number or a range, such as 1-4") from None
    if not versions or versions[0] < 1:
        raise InputError(f"--rounds {s.rounds}: rounds count from 1 upwards")
    if s.name and (len(versions) > 1 or not re.fullmatch(rf"rlhf-v{versions[0]}(-[\w.-]+)?", s.name)):
        raise InputError(f"--name {s.name}: wanted: --rounds with one number N, and a name such as rlhf-vN-no-ppo")
    for version in versions:
        run_round(version, s if version == versions[0] else replace(s, init=""))


if __name__ == "__main__":
    run(main)
