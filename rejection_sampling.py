"""Iterative RLHF by rejection sampling, versions V1 to V4 (paper §3.2.3).

The paper: with the newest model, sample K answers to each prompt, keep the one that the best
reward model likes most, and fine-tune on those as in SFT. New preferences are collected and the
reward models refreshed before every round. V3 looked at the samples of the last iteration only and
forgot (it rhymed worse); from then on top samples of all iterations count.

Ours: the pool is the answers of all rounds to the same prompts, scored again with the newest reward
models, one kept per prompt. The reward models go on from those of the round before, where the paper
starts them from the chat model, and learn the fresh pairs mixed with as many old ones, 2,400 at
most. K, the prompts per round and the fine-tuning settings are not in the paper.

    python rejection_sampling.py                                     rounds V1 to V4, from out/sft
    python rejection_sampling.py --rounds 1-3                        some of them
    python rejection_sampling.py --rounds 5 --init out/rlhf-v4-ppo   V5, from V4-PPO
    python rejection_sampling.py --rounds 5 --name rlhf-v5-no-ppo    a control, in its own folder
"""

import random
import re
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data import (
    Answer,
    Dialog,
    EncodedDialog,
    InputError,
    Pair,
    Prompt,
    Tokenizer,
    encode_prompt,
    read_jsonl,
    read_preferences,
    read_prompts,
    read_sft,
    world,
    write_records,
)
from data.annotators import NotAnnotated, check_annotator
from eval import evaluate_on_dev
from model import Transformer
from reward import (
    AXES,
    MARGINS,
    RewardModel,
    collect_preferences,
    combine_rewards,
    encode_answer,
    leave_out_too_long,
    load_reward_model,
    pick_prompts,
    report_accuracy,
    save_reward_model,
    score,
    set_shift,
    train_reward_model,
)
from runtime import (
    Stage,
    StageSettings,
    append_rows,
    check_between,
    check_positive,
    check_same_prompts,
    encode_prompts,
    load_model,
    newest_reward_models,
    parse_settings,
    require,
    resume_rows,
    run,
    sample_answers,
    save_model,
    unusable,
)
from runtime.lineage import Lineage, trace
from sft import encode_dialogs, finetune, show_answers


@dataclass
class Settings(StageSettings):
    rounds: str = "1-4"  # which versions to make: 1-4, or one, such as 5; 99 at most
    # the model that the first of these rounds samples from; empty: the version before it
    init: str = ""
    # folder of a single round; empty: rlhf-vN. Others begin with it: rlhf-v5-no-ppo
    name: str = ""
    # fine-tune from the newest version (last) or from sft, each round (the paper is ambiguous)
    start: Literal["last", "sft"] = "last"
    # best of the answers of all rounds, or of this round alone (last; the paper up to V3)
    pool: Literal["all", "last"] = "all"
    prompts: str = "toy"  # JSONL of prompts, the same for every round
    max_prompts: int = 700  # use the first so many
    mix: str = ""  # JSONL of dialogs added to the fine-tuning set (Ghost Attention's come in here)
    # a prompt or a dialog of --mix longer than the context: an error, or left out and counted
    too_long: Literal["error", "skip"] = "error"
    samples: int = 8  # K, answers to each prompt; the paper does not say
    # longest answer; one that gets there has no end to learn from and is left out
    max_new_tokens: int = 96
    # tried on dev prompts; the paper finds the best one moves
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.0)
    # toy, human, file (label pairs, run again) or none (no refresh)
    annotator: Literal["toy", "human", "file", "none"] = "toy"
    # fresh pairs a round; our choice: many, since late answers differ in content alone, which only
    # fresh pairs show
    helpfulness_pairs: int = 2400
    safety_pairs: int = 300  # the same for safety
    pair_temperatures: tuple[float, ...] = (0.8, 1.1)  # of the two answers of a pair
    margin: Literal[tuple(MARGINS)] = "small"  # as in reward.py
    # of the refresh, which goes on from the last reward models (paper: from the chat model); our
    # choice
    reward_learning_rate: float = 5e-4
    reward_batch_tokens: int = 1200  # as in reward.py
    epochs: int = 2  # over the best answers; our choice
    batch_tokens: int = 500  # tokens a step
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 5e-4  # our choice; the paper says "similar to SFT"
    weight_decay: float = 0.1  # paper, of SFT

    def __post_init__(self):
        check_positive(
            self,
            "samples",
            "max_new_tokens",
            "epochs",
            "batch_tokens",
            "micro_tokens",
            "learning_rate",
            "temperatures",
            "pair_temperatures",
            "helpfulness_pairs",
            "safety_pairs",
            "reward_learning_rate",
            "reward_batch_tokens",
            or_zero=("weight_decay", "max_prompts"),
        )
        check_between(self, 1, 1000, "epochs")
        check_between(self, 0.01, 100, "temperatures", "pair_temperatures")
        _check_name(self.name, _wanted_versions(self.rounds))
        if len(self.pair_temperatures) != 2:
            raise InputError(
                f"--pair-temperatures {self.pair_temperatures}: two are wanted, one for each answer"
            )


def _wanted_versions(rounds: str) -> range:
    """The rounds that --rounds names, at least one: 3 is one, 1-4 a range, both ends included.

    Raises:
        InputError: neither, or rounds that do not lie between 1 and 99.

    >>> list(_wanted_versions("2-4")), list(_wanted_versions("5"))
    ([2, 3, 4], [5])
    """
    match = re.fullmatch("([0-9]{1,2})(-([0-9]{1,2}))?", rounds)
    versions = range(0)
    if match:
        first = int(match[1])
        last = int(match[3] or first)
        versions = range(first, last + 1)
    if not versions or first < 1:
        raise InputError(f"--rounds {rounds}: wanted: a number from 1 to 99, or a range as 1-4")
    return versions


def _check_name(name: str, versions: range) -> None:
    """InputError where a control's name does not begin with its version, or is for several."""
    if not name:
        return
    fits = re.fullmatch(rf"rlhf-v{versions[0]}(-[\w.-]+)?", name)
    if len(versions) > 1 or not fits:
        raise InputError(
            f"--name {name}: wanted: --rounds with one number N, and a name such as rlhf-vN-no-ppo"
        )


# full scale: the paper's values where it gives any; K, lengths, temperatures, annotator are ours
PAPER = {
    "samples": 20,
    "max_new_tokens": 1024,
    "epochs": 2,
    "batch_tokens": 64 * 4096,
    "micro_tokens": 4096,
    "learning_rate": 2e-5,
    "prompts": "",
    "reward_learning_rate": 1e-5,
    "reward_batch_tokens": 1024 * 1024,
    "max_prompts": 0,
    "temperatures": (0.8, 1.0, 1.2),
    "annotator": "none",
}
TINY = {
    "max_prompts": 24,
    "samples": 4,
    "helpfulness_pairs": 40,
    "safety_pairs": 30,
    "temperatures": (0.8, 1.0),
}
CLASS = {
    "rounds": "1-2",
    "max_prompts": 200,
    "samples": 4,
    "helpfulness_pairs": 300,
    "safety_pairs": 80,
    "temperatures": (0.8,),
}
PRESETS = {
    "tiny": TINY,
    "class": CLASS,
    "toy": {},
    "small": {"max_prompts": 2000, "learning_rate": 2e-4, "batch_tokens": 4096},
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-2-34b": PAPER,
    "llama-2-70b": PAPER | {"reward_learning_rate": 5e-6},
}

MAX_REPLAY = 2400  # earlier pairs that a reward model sees again in a refresh; our choice
PROBE = 48  # prompts of the temperature search; our choice

# what `rescored.jsonl` has of an answer
RESCORED_KEYS = ("version", "index", "sample", *AXES, "reward")


# ---- scores ----


def best_of(rewards: Tensor, owners: list[int]) -> dict[int, int]:
    """For each prompt the number of its best answer; of equal ones the first.

    Args:
        rewards: (answers,) any numbers. owners: the prompt that each answer belongs to; those of a
            prompt need not stand together.

    Returns:
        {prompt: position of its best answer}; {} without answers.

    Raises:
        ValueError: the two are not of the same length.

    >>> best_of(torch.tensor([0.1, 0.9, 0.5]), [7, 7, 8])
    {7: 1, 8: 2}
    """
    rewards = rewards.tolist()
    best: dict[int, int] = {}
    for i, (reward, owner) in enumerate(zip(rewards, owners, strict=True)):
        if owner not in best or reward > rewards[best[owner]]:
            best[owner] = i
    return best


def _best_answers(answers: list[Answer]) -> dict[int, Answer]:
    """{prompt: its answer with the highest reward}."""
    rewards = torch.tensor([answer.reward for answer in answers])  # (answers)
    owners = [answer.index for answer in answers]
    best = {}
    for owner, number in best_of(rewards, owners).items():
        best[owner] = answers[number]
    return best


class RewardModels:
    """Both reward models, and what they give to sampled answers.

    They share a tokenizer, not always the policy's.
    """

    def __init__(self, folders: dict[str, Path], device: torch.device):
        self.models: dict[str, RewardModel] = {}
        fingerprints = set()
        for axis, folder in folders.items():
            self.models[axis], self.tokenizer = load_reward_model(folder, device)
            fingerprints.add(self.tokenizer.fingerprint)
        if len(fingerprints) > 1:
            shown = " and ".join(map(str, folders.values()))
            raise InputError(f"the reward models {shown} have different tokenizers")

    def sequences(self, prompts: list[Prompt], answers: list[Answer]) -> list[list[int]]:
        """Prompt and answer as ids, of each answer.

        An answer's ids are those that were sampled, where its tokenizer is the reward models' (or
        it names none); else those of its text, as a dialog. The text of an answer that holds a tag
        counts as empty: such an answer is never kept, whatever it scores.

        Raises:
            InputError: prompt and answer are longer than the context of a reward model.
        """
        encoded: dict[int, list[int]] = {}  # each prompt once
        for index in {answer.index for answer in answers}:
            encoded[index] = encode_prompt(self.tokenizer, prompts[index].messages)
        context = min(model.body.args.max_seq_len for model in self.models.values())

        sequences = []
        for answer in answers:
            index = answer.index
            if answer.tokenizer in ("", self.tokenizer.fingerprint):
                ids = encoded[index] + list(answer.ids)
            else:
                text = "" if answer.has_tag else answer.text
                ids = encode_answer(self.tokenizer, prompts[index], text)
            if len(ids) > context:
                raise InputError(
                    f"an answer to prompt {index} has, with its prompt, {len(ids)} tokens, "
                    f"the reward model's context only {context}; lower --max-new-tokens"
                )
            sequences.append(ids)
        return sequences

    def scores(self, prompts: list[Prompt], answers: list[Answer]) -> dict[str, Tensor]:
        """{"helpfulness", "safety", "reward": (answers,) logits each}; the reward is R_c."""
        if not answers:
            return dict.fromkeys((*AXES, "reward"), torch.zeros(0))
        sequences = self.sequences(prompts, answers)
        scores = {}
        for axis, model in self.models.items():
            scores[axis] = score(model, sequences)  # (answers)
        is_safety = torch.tensor([prompts[answer.index].is_safety for answer in answers])
        scores["reward"] = combine_rewards(scores["safety"], scores["helpfulness"], is_safety)
        return scores

    def score(self, prompts: list[Prompt], answers: list[Answer]) -> list[Answer]:
        """The answers with their scores, `with_scores`."""
        return with_scores(answers, self.scores(prompts, answers))


def with_scores(answers: list[Answer], scores: dict[str, Tensor]) -> list[Answer]:
    """The answers with both scores and the reward, rounded to four digits."""
    scored = []
    for i, answer in enumerate(answers):
        of_answer = {name: round(values[i].item(), 4) for name, values in scores.items()}
        scored.append(replace(answer, **of_answer))
    return scored


def share_gated(prompts: list[Prompt], answers: list[Answer]) -> float:
    """Share of the scored answers to untagged prompts that the safety model took over (§3.2.3).

    It should leave these alone. A reward that equals the safety score tells it. 0 without answers.
    """
    untagged = [answer for answer in answers if not prompts[answer.index].is_safety]
    gated = 0
    for answer in untagged:
        if answer.reward == answer.safety:
            gated += 1
    return gated / max(1, len(untagged))


# ---- answers ----


def sample_and_score(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    reward_models: RewardModels,
    version: str,
    **options,
) -> list[Answer]:
    """`sample_answers`, each answer with version, tokenizer, both scores and the reward.

    With `path` they are written batch by batch together.
    """
    origin = {"version": version, "tokenizer": tokenizer.fingerprint}

    def finish(batch: list[Answer]) -> list[Answer]:
        return reward_models.score(prompts, [replace(answer, **origin) for answer in batch])

    return sample_answers(model, tokenizer, prompts, finish=finish, **options)


class SamplePool:
    """The answers of all rounds to one list of prompts.

    `rescore` lets the newest reward models score those of earlier rounds again.
    """

    def __init__(self, prompts: list[Prompt]):
        self.prompts = prompts
        self.answers: list[Answer] = []
        self.left_out: Counter[str] = Counter()  # reason -> answers

    def add(self, version: str, answers: list[Answer]) -> None:
        """Add a round's answers that have something to learn from.

        The others are counted by their reason.
        """
        for answer in answers:
            reason = unusable(answer)
            if reason:
                self.left_out[reason] += 1
            else:
                self.answers.append(replace(answer, version=version))

    def rescore(
        self, reward_models: RewardModels, path: Path | None = None, *, batch_rows: int = 2000
    ) -> None:
        """Score all answers in the pool again.

        path: JSONL to which the scores are written batch by batch; what is there already is not
        scored again. A batch that a kill cut is scored again whole.
        """
        batches = []
        for start in range(0, len(self.answers), batch_rows):
            batches.append(self.answers[start : start + batch_rows])
        written = []  # scores of the first answers, from before a kill
        if path:
            written = resume_rows(path, [len(batch) for batch in batches])

        rescored = []
        for batch in batches:
            rows = written[len(rescored) : len(rescored) + len(batch)]
            if rows:
                rescored += [
                    _with_row(answer, row) for answer, row in zip(batch, rows, strict=True)
                ]
                continue
            batch = reward_models.score(self.prompts, batch)
            rescored += batch
            if path:
                append_rows(path, [_rescored_row(answer) for answer in batch])
        self.answers = rescored

    def best(self) -> list[Dialog]:
        """The answer with the highest reward to each prompt, to be fine-tuned on.

        The prompts stand in their order, the ids that were sampled beside the messages, reward,
        scores, version and temperature in `about`; the loss is on the last answer alone.
        """
        best = _best_answers(self.answers)
        dialogs = []
        for index in sorted(best):
            answer = best[index]
            prompt = self.prompts[index]
            dialog = Dialog(
                messages=[*prompt.messages, {"role": "assistant", "content": answer.text}],
                train_on="last",
                is_safety=prompt.is_safety,
                answer_ids=answer.ids,
                tokenizer=answer.tokenizer,
                about={
                    "version": answer.version,
                    "reward": answer.reward,
                    "helpfulness": answer.helpfulness,
                    "safety": answer.safety,
                    "temperature": answer.temperature,
                },
            )
            dialogs.append(dialog)
        return dialogs


def _rescored_row(answer: Answer) -> dict:
    """What a file of new scores has of an answer."""
    return {key: getattr(answer, key) for key in RESCORED_KEYS}


def _with_row(answer: Answer, row: dict) -> Answer:
    """The answer with the scores that a row of that file has."""
    return replace(answer, **{key: row[key] for key in RESCORED_KEYS})


def search_temperature(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    reward_models: RewardModels,
    version: str,
    *,
    temperatures: tuple[float, ...],
    folder: Path,
    **options,
) -> tuple[float, dict[float, float]]:
    """The temperature whose best of K answers has the highest mean reward (§3.2.3, Fig. 8).

    Only answers that the pool would take count. A prompt without one at some temperature counts
    there as the worst prompt of the whole probe (our choice).

    Args:
        prompts: of dev. options: go to `sample_answers`.
        folder: gets answers and scores, in probe-T.jsonl.

    Returns:
        (the best temperature, {temperature: mean over prompts of the maximal reward, a logit}).

    Raises:
        InputError: no answer at any temperature can be used.
    """
    best: dict[float, dict[int, Answer]] = {}  # temperature -> prompt -> its best answer
    best_rewards = []  # of all temperatures and prompts
    for temperature in temperatures:
        answers = sample_and_score(
            model,
            tokenizer,
            prompts,
            reward_models,
            version,
            temperature=temperature,
            path=folder / f"probe-{temperature}.jsonl",
            desc=f"temperature {temperature}",
            **options,
        )
        usable = [answer for answer in answers if not unusable(answer)]
        best[temperature] = _best_answers(usable)
        best_rewards += [answer.reward for answer in best[temperature].values()]
    if not best_rewards:
        raise InputError(
            f"no answer to the {len(prompts)} prompts of the temperature search can be used: all "
            "are empty, hold a tag, or are cut at --max-new-tokens; raise it, or fine-tune the "
            "model on answers that end"
        )

    worst = min(best_rewards)
    means = {}
    for temperature, answers in best.items():
        rewards = []
        for index in range(len(prompts)):
            rewards.append(answers[index].reward if index in answers else worst)
        means[temperature] = statistics.fmean(rewards)
    return max(means, key=means.get), means


# ---- preferences and reward models ----


def refresh_reward_models(
    policies: list[Transformer],
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    current: dict[str, Path],
    settings: Settings,
    *,
    label: str,
    number: int,
    earlier: list[Path],
    folder: Path,
    dtype: torch.dtype,
) -> tuple[dict[str, Path], dict]:
    """Fresh preferences between answers of the newest policies; the reward models learn them.

    §3.2.1 and §3.2.2. They learn the fresh pairs and as many earlier ones (at most MAX_REPLAY), so
    that they know the new answers and forget nothing. A model that is there is not made again.

    Args:
        prompts: to collect on. current: {axis: folder of the reward model so far}.
        settings: pairs of each axis, annotator, settings of the training.
        label, number: of the randomness.
        earlier: folders of rounds, whose pairs count as earlier ones, beside those of reward.py.
        folder: gets pairs-AXIS.jsonl and reward-AXIS.

    Returns:
        ({axis: folder of the refreshed reward model},
         {axis: accuracy of the one so far on the fresh pairs}).

    Raises:
        NotAnnotated: a person has to label the pairs first.
        InputError: the first pairs of reward.py, which set the zero of helpfulness, are missing.
    """
    first_pairs = require(settings.out / "reward-helpfulness" / "pairs.jsonl", "python reward.py")
    zero = read_preferences(first_pairs)  # see `set_shift`
    fresh = _collect_fresh_pairs(
        policies, tokenizer, prompts, settings, label=label, number=number, folder=folder
    )

    device = policies[0].tok_embeddings.weight.device
    refreshed = {}
    tables = {}
    for axis in AXES:
        refreshed[axis] = folder / f"reward-{axis}"
        model, reward_tokenizer = load_reward_model(current[axis], device)
        if fresh[axis]:
            which = "fresh (not yet learned)"
            tables[axis] = report_accuracy(model, reward_tokenizer, fresh[axis], axis, which)
        if (refreshed[axis] / "reward_head.pth").exists():
            continue  # learned before a kill
        wanted = len(fresh[axis])
        replay = _draw_earlier_pairs(axis, earlier, settings, number=number, wanted=wanted)
        train_reward_model(
            model,
            reward_tokenizer,
            fresh[axis] + replay,
            margin=settings.margin,
            auxiliary_weight=float(axis == "safety"),
            epochs=1,
            batch_tokens=settings.reward_batch_tokens,
            micro_tokens=settings.micro_tokens,
            learning_rate=settings.reward_learning_rate,
            weight_decay=settings.weight_decay,
            folder=folder,
            phase=axis,
            seed=settings.seed + number,
            dtype=dtype,
        )
        if axis == "helpfulness":
            set_shift(model, reward_tokenizer, zero)
        save_reward_model(refreshed[axis], model, reward_tokenizer)
    return refreshed, tables


def _collect_fresh_pairs(
    policies: list[Transformer],
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    settings: Settings,
    *,
    label: str,
    number: int,
    folder: Path,
) -> dict[str, list[Pair]]:
    """{axis: preferences between answers of these policies}, each axis on prompts of its own.

    label, number: of the randomness. The pairs are written to pairs-AXIS.jsonl. Where a person has
    to label them, `NotAnnotated` comes after both axes' answers are written, for both to be
    labelled.
    """
    pair_counts = {"helpfulness": settings.helpfulness_pairs, "safety": settings.safety_pairs}
    fresh = {}
    waiting = []  # what is not labelled yet
    for axis in AXES:
        seed = settings.seed * 1000 + number
        picked = pick_prompts(prompts, axis, pair_counts[axis], seed)
        try:
            fresh[axis] = collect_preferences(
                policies,
                tokenizer,
                picked,
                axis,
                annotator=settings.annotator,
                temperatures=settings.pair_temperatures,
                key=(settings.seed, label),
                folder=folder,
                max_new_tokens=settings.max_new_tokens,
            )
            write_records(folder / f"pairs-{axis}.jsonl", fresh[axis])
        except NotAnnotated as stop:
            waiting.append(str(stop))
    if waiting:
        raise NotAnnotated(". ".join(waiting))
    return fresh


def _draw_earlier_pairs(
    axis: str, earlier: list[Path], settings: Settings, *, number: int, wanted: int
) -> list[Pair]:
    """So many pairs of the collections before, at most MAX_REPLAY, each at most once.

    The collections are that of reward.py and those in the folders `earlier`.
    """
    files = [settings.out / f"reward-{axis}" / "pairs.jsonl"]
    for folder in earlier:
        files.append(folder / f"pairs-{axis}.jsonl")
    pairs = []
    for file in files:
        # a round in which no pair was usable left an empty file
        if file.exists() and file.stat().st_size > 0:
            pairs += read_preferences(file)
    count = min(len(pairs), wanted, MAX_REPLAY)
    return random.Random(f"{settings.seed} {number} {axis}").sample(pairs, count)


# ---- a round ----


@dataclass
class _Round:
    """What the phases of a round have in common."""

    stage: Stage
    lineage: Lineage
    reward_folders: dict[str, Path]  # of the newest reward models before this round
    pair_prompts: list[Prompt]  # fresh preferences are collected on these
    prompts: list[Prompt]  # the first of them: they get K answers each
    probe: list[Prompt]  # of the temperature search: dev prompts, or the first with --prompts
    model: Transformer  # the newest
    tokenizer: Tokenizer
    mix: list[EncodedDialog]  # more dialogs to learn


def run_round(version: int, settings: Settings) -> None:
    """One round: RLHF-V(n) from V(n-1), or from --init.

    Everything it makes is in OUT/rlhf-vN (or --name); nothing of an earlier stage is touched.
    """
    this_round = _begin_round(version, settings)
    if not this_round:
        return  # it is finished already
    stage = this_round.stage

    # 1. annotate: fresh preferences between the newest model and an older one (V1: SFT and itself)
    # 2. refresh: the reward models learn on, from these pairs and as many earlier ones
    reward_folders = this_round.reward_folders
    old_accuracy = {}  # of the reward models so far, on the fresh pairs
    if settings.annotator != "none":
        reward_folders, old_accuracy = _annotate_and_refresh(this_round, version)
    reward_models = RewardModels(reward_folders, stage.device)

    # 3. choose the temperature on a few dev prompts (with --prompts: on its first ones)
    temperature = _choose_temperature(this_round, reward_models)

    # 4. sample K answers to each prompt and score them
    answers = _sample_all(this_round, reward_models, temperature)
    write_records(stage.folder / "samples.jsonl", answers)  # again, now in the order of prompts

    # 5. keep the best of all rounds, the earlier answers scored again (--pool last: of this one)
    pool = _pool_of_all_rounds(this_round, reward_models, answers)
    best = pool.best()
    if not best:
        raise InputError(
            f"{stage.folder}: no answer is left to train on ({dict(pool.left_out)}); sample more "
            "or longer ones"
        )
    write_records(stage.folder / "best.jsonl", best)
    results = {"temperature": temperature} | _report_best(this_round, answers, pool, best)

    # 6. fine-tune the newest model (--start sft: SFT) on these and on --mix, and save it
    model, tokenizer = _tune_on(this_round, best, version)

    # 7. measure
    results["reward_models"] = old_accuracy
    if settings.prompts == "toy":
        results["dev"] = evaluate_on_dev(stage.name, model, tokenizer)
    stage.finish(results)


def _begin_round(version: int, settings: Settings) -> _Round | None:
    """Check all that the round needs, open its folder, load prompts and model; None: finished."""
    if not settings.prompts:
        raise InputError(f"--preset {settings.preset} needs prompts: --prompts FILE.jsonl")
    lineage = trace(
        settings.out, version, init=settings.init, name=settings.name, pool=settings.pool
    )
    stage = Stage(settings, lineage.folder.name)
    lineage.require_versions()
    reward_folders = newest_reward_models(settings.out, lineage.refreshed)
    prompts_file = Path(settings.prompts)
    if settings.prompts == "toy":
        prompts_file = world.ensure() / "prompts-train.jsonl"

    inputs = {"model": lineage.newest, "prompts": prompts_file, **reward_folders}
    mix = []
    if settings.mix:
        inputs["mix"] = Path(settings.mix)
        mix = read_sft(settings.mix)
    for folder in lineage.pooled:
        inputs[f"samples of {folder.name}"] = folder / "samples.jsonl"
    # read before the folder is begun, so that a bad line leaves all as it was
    pair_prompts = read_prompts(prompts_file)
    check_annotator(settings.annotator, pair_prompts)
    check_same_prompts(lineage.pooled, prompts_file, settings.max_prompts)
    model, tokenizer = load_model(lineage.newest, stage.device)
    context = model.args.max_seq_len
    mix = encode_dialogs(tokenizer, mix, context, settings.too_long)
    if settings.too_long == "skip":
        pair_prompts = leave_out_too_long(tokenizer, pair_prompts, context)
    prompts = pair_prompts[: settings.max_prompts or None]
    asked = prompts if settings.annotator == "none" else pair_prompts
    encode_prompts(tokenizer, asked, context)  # tells of what is too long
    if not stage.begin(inputs, aside=("rounds", "init", "mix", "name", "too_long")):
        return None

    probe = prompts
    if settings.prompts == "toy":
        probe = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    print(
        f"\n=== {stage.name}: {len(prompts)} prompts x {settings.samples} answers "
        f"from {lineage.newest}"
    )
    return _Round(
        stage=stage,
        lineage=lineage,
        reward_folders=reward_folders,
        pair_prompts=pair_prompts,
        prompts=prompts,
        probe=probe[:PROBE],
        model=model,
        tokenizer=tokenizer,
        mix=mix,
    )


def _annotate_and_refresh(this_round: _Round, version: int) -> tuple[dict[str, Path], dict]:
    """`refresh_reward_models` on answers of the newest model and of an older one."""
    stage = this_round.stage
    older, _ = load_model(this_round.lineage.compared, stage.device)
    return refresh_reward_models(
        [this_round.model, older],
        this_round.tokenizer,
        this_round.pair_prompts,
        this_round.reward_folders,
        stage.settings,
        label=this_round.lineage.label,
        number=version,
        earlier=this_round.lineage.refreshed,
        folder=stage.folder,
        dtype=stage.dtype,
    )


def _choose_temperature(this_round: _Round, reward_models: RewardModels) -> float:
    """`search_temperature` with random numbers of its own; the means are logged and printed."""
    stage = this_round.stage
    settings = stage.settings
    temperature, means = search_temperature(
        this_round.model,
        this_round.tokenizer,
        this_round.probe,
        reward_models,
        stage.name,
        temperatures=settings.temperatures,
        folder=stage.folder,
        samples=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        key=(settings.seed, this_round.lineage.label, "temperature"),
    )
    logged = {f"reward_at_{tried}": mean for tried, mean in means.items()}
    metrics = stage.metrics
    metrics.rewind("temperature")
    metrics.log("temperature", 0, chosen=temperature, **logged)
    shown = ", ".join(f"{tried}: {mean:.3f}" for tried, mean in means.items())
    print("best of", settings.samples, "by temperature:", shown)
    return temperature


def _sample_all(
    this_round: _Round, reward_models: RewardModels, temperature: float
) -> list[Answer]:
    """K answers of the newest model to each prompt, with their scores."""
    settings = this_round.stage.settings
    return sample_and_score(
        this_round.model,
        this_round.tokenizer,
        this_round.prompts,
        reward_models,
        this_round.stage.name,
        key=(settings.seed, this_round.lineage.label),
        samples=settings.samples,
        temperature=temperature,
        max_new_tokens=settings.max_new_tokens,
        path=this_round.stage.folder / "samples.jsonl",
    )


def _pool_of_all_rounds(
    this_round: _Round, reward_models: RewardModels, answers: list[Answer]
) -> SamplePool:
    """The answers of the earlier rounds, scored again, and those of this one."""
    stage = this_round.stage
    pool = SamplePool(this_round.prompts)
    for folder in this_round.lineage.pooled:
        rows = read_jsonl(folder / "samples.jsonl")
        earlier = [Answer.from_json(row, where) for where, row in rows]
        # each round answers all of its prompts; --too-long skip may have left out others then
        if {answer.index for answer in earlier} != set(range(len(pool.prompts))):
            raise InputError(
                f"{folder} was made from other prompts; the pool joins answers to the same ones: "
                "--pool last"
            )
        pool.add(folder.name, earlier)
    pool.rescore(reward_models, stage.folder / "rescored.jsonl")
    pool.add(stage.name, answers)
    return pool


def _report_best(
    this_round: _Round, answers: list[Answer], pool: SamplePool, best: list[Dialog]
) -> dict[str, object]:
    """Print what was kept and what was not; the record's {"sources", "left_out", "gated"}."""
    versions = Counter(dialog.about["version"] for dialog in best)
    sources = {version: versions[version] for version in sorted(versions)}
    left_out = dict(pool.left_out)
    gated = share_gated(this_round.prompts, answers)
    print(f"the safety gate takes over {gated:.1%} of the answers to untagged prompts")
    mean_of_all = statistics.fmean(answer.reward for answer in answers)
    mean_of_best = statistics.fmean(dialog.about["reward"] for dialog in best)
    print(
        f"reward of all answers {mean_of_all:.3f}, of the best {mean_of_best:.3f}; "
        f"best from {sources}; left out {left_out}"
    )
    return {"sources": sources, "left_out": left_out, "gated": gated}


def _tune_on(this_round: _Round, best: list[Dialog], version: int) -> tuple[Transformer, Tokenizer]:
    """The newest model (or SFT again) fine-tuned on the best answers and the mix, and saved."""
    stage = this_round.stage
    settings = stage.settings
    model, tokenizer = this_round.model, this_round.tokenizer
    if settings.start == "sft":
        model, tokenizer = load_model(this_round.lineage.sft, stage.device)
    dialogs = encode_dialogs(tokenizer, best, model.args.max_seq_len) + this_round.mix
    finetune(
        model,
        dialogs,
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        folder=stage.folder,
        phase="finetune",
        seed=settings.seed + version,
        dtype=stage.dtype,
    )
    save_model(stage.folder, model, tokenizer)
    shown = [prompt.messages for prompt in this_round.prompts[:5]]
    show_answers(model, tokenizer, shown, f"{stage.name} answers")
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, PRESETS, argv)
    for version in _wanted_versions(settings.rounds):
        run_round(version, settings)
        settings = replace(settings, init="")  # it is the start of the first of them only


if __name__ == "__main__":
    run(main)
