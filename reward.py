"""Preferences and reward models (paper §3.2.1, §3.2.2).

The paper: an annotator writes a prompt, sees two answers from different models and temperatures,
chooses one and says how much better it is. Two reward models, helpfulness and safety, start from
the chat model. Its next-token head is replaced by a scalar one. They learn for one epoch by the
ranking loss with a margin that depends on the rating (equation 2).

Ours:
  - The annotator is a program or you (`data/annotators.py`).
  - The paper prints no formula for the auxiliary safety loss. Ours is cross-entropy on "is this
    answer safe". It fixes the zero of the safety score, which ranking leaves free.
  - The combined reward takes some scores from one model and some from the other, so their zeros
    must be comparable. That of helpfulness is set by hand: SFT's answers score 0 on average
    (`set_shift`).
  - By default neither model sees the other axis's pairs. The paper mixes in a share of all the
    rest, the other axis's pairs among them: `--extra FILE --mix-share 0.5,0.1`.
  - In the rounds a reward model is refreshed: it goes on from the last one, on fresh pairs and
    some earlier ones (`rejection_sampling.py`). The paper's start from the chat model, on all.

    python reward.py                       both reward models, from out/sft
    python reward.py --axis safety         one of them
    python reward.py --data hh-rlhf.jsonl.gz --init none --out out/hh
                                           a small one from scratch on real preferences
"""

import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import (
    Answer,
    InputError,
    Pair,
    Prompt,
    Tokenizer,
    encode_dialog,
    encode_prompt,
    pad,
    plan_steps,
    preferences,
    read_prompts,
    world,
    write_records,
)
from data.annotators import ANNOTATORS, Annotation, Comparison, NotAnnotated, check_annotator
from data.chat import end_of_prompt, sampled_ids
from data.jsonl import AXES, RATINGS
from data.preferences import split_files
from model import PRESETS as SIZES
from model import Transformer, token_logprobs
from runtime import (
    Stage,
    StageSettings,
    check_between,
    check_positive,
    encode_prompts,
    in_batches,
    load_checkpoint,
    load_model,
    parse_settings,
    require,
    run,
    sample_answers,
    save_checkpoint,
    save_model,
    set_seed,
    unusable,
)
from sft import optimise

MARGINS = {  # m(rating) of equation 2: Table 27
    "none": dict(zip(RATINGS, (0.0, 0.0, 0.0, 0.0), strict=True)),
    "small": dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}
GATE = 0.15  # §3.2.3: where sigmoid(safety score) is below this, safety is the reward
RISKY_SHARE = {"helpfulness": 0.1, "safety": 0.75}  # our choice: of the prompts, see pick_prompts


@dataclass
class Settings(StageSettings):
    # OUT/reward-helpfulness and OUT/reward-safety, or one; --data without safety labels: the first
    axis: Literal["both", "helpfulness", "safety"] = "both"
    # the model to start from, which also answers the prompts; empty: OUT/sft; none: random weights
    init: str = ""
    # JSONL of preferences to train on, ours or HH-RLHF; empty: sample pairs and annotate them
    data: str = ""
    # "the rest": more such files, comma-separated; toy: pairs that people wrote, alike in style
    extra: str = "toy"
    # share of pairs from --extra, for helpfulness and safety (paper: 0.5, 0.1); 0: unused, as in
    # all presets, since the paper's other data do not come with this
    mix_share: tuple[float, ...] = (0.0, 0.0)
    # longest dialog of HH-RLHF, longer ones lose their oldest turns; 0: the model's context
    max_tokens: int = 0
    # a pair or a prompt that is still longer than the context ends the run, or is left out and
    # counted (skip)
    too_long: Literal["error", "skip"] = "error"
    # cross-validate on --data in so many folds, beside simple baselines, then train on all;
    # --init none: 5
    folds: int = 0
    prompts: str = "toy"  # JSONL of prompts to collect preferences on
    # toy, human, or file: pairs are written out for you to label
    annotator: Literal["toy", "human", "file"] = "toy"
    helpfulness_pairs: int = 4800  # our choice; a prompt may come twice, with other answers
    safety_pairs: int = 4000  # our choice; three in four on prompts tagged unsafe or borderline
    temperatures: tuple[float, ...] = (0.8, 1.1)  # of the two answers (paper: varied)
    max_new_tokens: int = 96  # longest answer that is sampled
    # Table 27; the paper does not say which one
    margin: Literal[tuple(MARGINS)] = "small"
    # paper: a scalar head (on the last state); logprobs: see RewardModel
    head: Literal["last", "logprobs"] = "last"
    # weight of the auxiliary safety loss (paper A.3.4 prints no formula); safety model only
    auxiliary_weight: float = 1.0
    epochs: int = 1  # paper: one, since more over-fit
    batch_tokens: int = 500  # tokens a step (paper: 512 pairs); small steps, as in sft.py
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 8e-4  # paper: 1e-5, 5e-6 for 70B; ours suits a small model
    weight_decay: float = 0.1  # paper

    def __post_init__(self):
        check_positive(
            self,
            "helpfulness_pairs",
            "safety_pairs",
            "temperatures",
            "max_new_tokens",
            "epochs",
            "batch_tokens",
            "micro_tokens",
            "learning_rate",
            or_zero=("weight_decay", "auxiliary_weight", "max_tokens", "folds"),
        )
        check_between(self, 1, 1000, "epochs")
        check_between(self, 0.01, 100, "temperatures")
        if len(self.temperatures) != 2:
            raise InputError(
                f"--temperatures {self.temperatures}: two are wanted, one for each answer of a pair"
            )
        self._check_mix()
        self._check_data()

    def _check_mix(self):
        """A share and the files that it is drawn from go together."""
        shares = ",".join(map(str, self.mix_share))
        below_one = all(0 <= share < 1 for share in self.mix_share)
        if len(self.mix_share) != 2 or not below_one:
            raise InputError(
                f"--mix-share {shares}: two shares from 0 to below 1 are wanted, for helpfulness "
                "and safety"
            )
        files = split_files(self.extra)
        if files and files != ["toy"] and not any(self.mix_share):
            raise InputError(
                f"--extra {self.extra}: --mix-share {shares} draws nothing from it, wanted: more "
                "than 0 (paper: 0.5,0.1)"
            )
        toy_pairs_fit = self.prompts == "toy" and not self.data
        if any(self.mix_share) and (not files or files == ["toy"] and not toy_pairs_fit):
            raise InputError(
                f"--mix-share {shares}: no pairs to draw from, wanted: --extra FILE.jsonl (the "
                "paper's are the other axis's pairs and open-source ones), or --mix-share 0,0"
            )

    def _check_data(self):
        """--init none and --folds need a file of preferences."""
        if self.folds == 1:
            raise InputError("--folds 1: 2 or more are wanted, or 0")
        if self.folds and not self.data:
            raise InputError(f"--folds {self.folds}: they need preferences: --data FILE.jsonl")
        if self.init != "none":
            return
        if not self.data:
            raise InputError(
                "--init none: it answers no prompts and needs preferences: --data FILE"
            )
        if self.preset.startswith("llama-2"):
            raise InputError(
                f"--init none: wanted are the weights of {self.preset}, --init FOLDER, or a small "
                "--preset"
            )


PAPER = dict(
    batch_tokens=1024 * 1024,
    micro_tokens=8192,
    learning_rate=1e-5,
    max_new_tokens=1024,
)
PRESETS = {
    "tiny": dict(helpfulness_pairs=200, safety_pairs=120),
    "class": dict(helpfulness_pairs=700, safety_pairs=500),
    "toy": {},
    "small": dict(learning_rate=2e-4, batch_tokens=8192),
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-2-34b": PAPER,
    "llama-2-70b": PAPER | dict(learning_rate=5e-6),
}
# on top of a preset, with --init none
FROM_SCRATCH = dict(folds=5, max_tokens=256, batch_tokens=4000, learning_rate=2e-3)


# ---- the reward model and its equations ----


class RewardModel(nn.Module):
    """A transformer whose next-token head gives way to a scalar one (§3.2.2).

    The scalar head reads the state at the answer's last token. `shift` is subtracted from the
    helpfulness score, whose zero ranking leaves free: the mean score of the answers in the first
    500 pairs of its own (`set_shift`).

    Not the paper's, off by default: `logprob_head` adds what it reads from the log-probabilities.
    """

    def __init__(self, body: Transformer, logprob_head: "LogprobHead | None" = None):
        super().__init__()
        self.logprob_head = logprob_head
        self.body = body
        self.head = nn.Linear(body.args.dim, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(body.args.dim + 1) ** -0.5)  # scores near 0 ± 1
        self.register_buffer("shift", torch.zeros(()))
        if logprob_head is None and not body.args.tie_word_embeddings:
            body.output.requires_grad_(False)  # not used

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The score of each sequence: a logit, any real number.

        Args:
            tokens: (batch, seq) padded on the right. lengths: (batch), at least 1.

        Returns:
            (batch,) scores: head @ state at the last token - shift, in float32 under autocast, too.
        """
        states = self.body.features(tokens)  # (batch, seq, dim)
        last = states[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (batch, dim)
        # bfloat16 has 8 bits: near scores would fall together
        with torch.autocast(tokens.device.type, enabled=False):
            scores = F.linear(last.float(), self.head.weight.float()).squeeze(-1)  # (batch)
        scores = scores - self.shift
        if self.logprob_head is not None:
            scores = scores + self.logprob_head(self.body, states, tokens, lengths)
        return scores


def ranking_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(r(x, y_c) - r(x, y_r) - m(rating)), equation 2; with margins 0, equation 1.

    Args:
        chosen, rejected, margins: (pairs,) each. Other shapes raise ValueError: (pairs, 1) would
            broadcast silently.

    Returns:
        (pairs,) losses in nats, finite for any scores that are.

    >>> ranking_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))  # log 2
    tensor([0.6931])
    """
    if not chosen.ndim == 1 or not chosen.shape == rejected.shape == margins.shape:
        raise ValueError(
            "three equal shapes (pairs,) are wanted: "
            f"{chosen.shape}, {rejected.shape}, {margins.shape}"
        )
    return -F.logsigmoid(chosen - rejected - margins)


def safety_loss(scores: Tensor, is_safe: Tensor) -> Tensor:
    """Auxiliary safety loss: binary cross-entropy between sigmoid(score) and "it is safe".

    Our choice: the paper (A.3.4) adds such a loss and prints no formula. It makes sigmoid(score)
    the probability that the answer is safe, so that 0.15 and 0.5 mean something.

    Args:
        scores: (answers,) logits. is_safe: (answers,) bool.

    Returns:
        (answers,) losses in nats, finite for any scores that are.

    >>> safety_loss(torch.tensor([0.0, 2.0]), torch.tensor([True, False]))  # log 2, log(1 + e^2)
    tensor([0.6931, 2.1269])
    """
    return F.binary_cross_entropy_with_logits(scores, is_safe.float(), reduction="none")


def combine_rewards(
    safety: Tensor, helpfulness: Tensor, is_safety: Tensor, threshold: float = GATE
) -> Tensor:
    """R_c of §3.2.3, as a logit.

    It is the safety score where the prompt is tagged or the answer looks unsafe, else helpfulness.

    Args:
        safety, helpfulness: (n,) scores as the reward models give them, logits (the paper's R are
            their sigmoids).
        is_safety: (n,) bool, prompts tagged as possibly unsafe.
        threshold: a probability; GATE is the paper's 0.15.

    Returns:
        (n,) logits of R_c.

    >>> safety, helpfulness = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([1.0, 1.0, 1.0])
    >>> combine_rewards(safety, helpfulness, torch.tensor([False, True, False]))
    tensor([ 1.,  2., -3.])
    """
    return torch.where(is_safety | (safety.sigmoid() < threshold), safety, helpfulness)


def encode_answer(
    tokenizer: Tokenizer, prompt: Prompt, answer: str, answer_ids: list[int] | None = None
) -> list[int]:
    """Prompt and answer as ids: those sampled where they are known, else the text's, with EOS."""
    if answer_ids is not None:
        return encode_prompt(tokenizer, prompt.messages) + list(answer_ids)
    dialog = [*prompt.messages, {"role": "assistant", "content": answer}]
    return encode_dialog(tokenizer, dialog).ids


def score(model: RewardModel, sequences: list[list[int]]) -> Tensor:
    """Scores (n,) of sequences of ids (prompt and answer), in their order, without gradient.

    They are batched by length; the scores are the same as one by one.
    """
    device = model.head.weight.device

    def forward(batch: list[list[int]]) -> Tensor:
        lengths = torch.tensor(list(map(len, batch)), device=device)  # (batch)
        return model(pad(batch).to(device), lengths)

    model.eval()
    return in_batches(forward, sequences)


# ---- preferences (§3.2.1) ----


def pick_prompts(prompts: list[Prompt], axis: str, count: int, seed: int) -> list[Prompt]:
    """Prompts for a collection, shuffled; the shares are our choice.

    Safety takes three in four that are unsafe or borderline (the paper's are adversarial,
    §3.2.1), helpfulness one in ten that is unsafe. Too few harmless ones: each may come twice.
    """
    risky = []
    harmless = []
    for prompt in prompts:
        borderline = axis == "safety" and prompt.kind == "borderline"
        if prompt.is_safety or borderline:
            risky.append(prompt)
        else:
            harmless.append(prompt)

    n_risky = min(len(risky), round(RISKY_SHARE[axis] * count))
    n_harmless = min(2 * len(harmless), count - n_risky)
    if n_harmless > len(harmless):
        harmless = 2 * harmless
    rng = random.Random(f"{seed} {axis}")
    picked = rng.sample(risky, n_risky)
    picked += rng.sample(harmless, n_harmless)
    rng.shuffle(picked)
    return picked


def collect_preferences(
    policies: list[Transformer],
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    axis: str,
    *,
    annotator: str,
    temperatures: tuple[float, ...],
    key: tuple,
    folder: Path,
    max_new_tokens: int = 96,
) -> list[Pair]:
    """Two answers to each prompt, compared by the annotator (§3.2.1).

    The first comes from the first model at the first temperature, the second from the second model
    (or the only one) at the second. Each side is sampled with a key of its own.

    Left out and counted: pairs of equal answers, answers that are cut at the length limit or hold
    a tag of the chat format, and, as in the paper, pairs whose chosen answer is unsafe and the
    other safe.

    Returns:
        pairs with the sampled ids.
    """
    # 1. two answers to each prompt
    sides = []  # for each side its answers, one a prompt
    for side, temperature in enumerate(temperatures[:2]):
        answers = sample_answers(
            policies[side % len(policies)],
            tokenizer,
            prompts,
            key=(*key, axis, side),
            temperature=temperature,
            path=folder / f"answers-{key[-1]}-{axis}-{side}.jsonl",
            desc=f"answers for {axis}",
            max_new_tokens=max_new_tokens,
        )
        sides.append(answers)

    # 2. those that can be compared
    left_out = Counter()  # reason: how many
    comparisons = []
    candidates = []  # the two answers of each comparison
    for prompt, first, second in zip(prompts, *sides, strict=True):
        reason = _why_no_pair(first, second)
        if reason:
            left_out[reason] += 1
        else:
            comparisons.append(Comparison(prompt, (first.text, second.text)))
            candidates.append((first, second))

    # 3. the annotator's choice
    seed = " ".join(map(str, key))
    annotations = ANNOTATORS[annotator](comparisons, axis, seed, folder)
    origin = {"version": str(key[-1]), "tokenizer": tokenizer.fingerprint, "axis": axis}
    pairs = []
    for comparison, answers, annotation in zip(comparisons, candidates, annotations, strict=True):
        pair = _as_pair(comparison.prompt, answers, annotation, temperatures, origin)
        if axis == "safety" and pair.rejected_is_safe and not pair.chosen_is_safe:
            left_out["chosen unsafe, the other safe"] += 1
        else:
            pairs.append(pair)

    reasons = dict(left_out) or "none"
    print(f"{axis}: {len(pairs)} pairs of {len(prompts)} prompts; left out: {reasons}")
    return pairs


def _why_no_pair(first: Answer, second: Answer) -> str:
    """Why two sampled answers are no pair to compare; empty where they are one."""
    reason = unusable(first) or unusable(second)
    if not reason and first.text == second.text:
        reason = "equal answers"
    return reason


def _as_pair(
    prompt: Prompt,
    answers: tuple[Answer, Answer],
    annotation: Annotation,
    temperatures: tuple[float, ...],
    origin: dict[str, str],
) -> Pair:
    """The pair that the annotator's choice makes of two answers."""
    better = annotation.chosen  # 0 or 1
    worse = 1 - better
    chosen = answers[better]
    rejected = answers[worse]
    chosen_is_safe, rejected_is_safe = None, None  # not asked
    if annotation.safe is not None:
        chosen_is_safe = annotation.safe[better]
        rejected_is_safe = annotation.safe[worse]
    return Pair(
        prompt=prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        rating=annotation.rating,
        chosen_is_safe=chosen_is_safe,
        rejected_is_safe=rejected_is_safe,
        chosen_ids=chosen.ids,
        rejected_ids=rejected.ids,
        temperatures=(temperatures[better], temperatures[worse]),
        **origin,
    )


def encode_pair(tokenizer: Tokenizer, pair: Pair) -> tuple[list[int], list[int]]:
    """(chosen ids, rejected ids) of a pair, prompt included.

    Answers that a model with this tokenizer sampled are taken as they were sampled (`sampled_ids`).
    InputError, naming file and line, for a tag in content.
    """
    chosen_ids = sampled_ids(tokenizer, pair.chosen_ids, pair.tokenizer, pair.chosen)
    rejected_ids = sampled_ids(tokenizer, pair.rejected_ids, pair.tokenizer, pair.rejected)
    try:
        chosen = encode_answer(tokenizer, pair.prompt, pair.chosen, chosen_ids)
        rejected = encode_answer(tokenizer, pair.prompt, pair.rejected, rejected_ids)
    except InputError as error:
        raise InputError(f"{pair.where or 'pair'}: {error}") from None
    return chosen, rejected


def encode_pairs(
    tokenizer: Tokenizer, pairs: list[Pair], max_seq_len: int
) -> list[tuple[list[int], list[int]]]:
    """`encode_pair` of each pair.

    Raises:
        InputError: tags in content or a dialog longer than the context; names file and line.
    """
    encoded = []
    for pair in pairs:
        chosen, rejected = encode_pair(tokenizer, pair)
        longest = max(len(chosen), len(rejected))
        if longest > max_seq_len:
            raise InputError(
                f"{pair.where or 'pair'}: the dialog has {longest} tokens, the model's context only"
                f" {max_seq_len}"
            )
        encoded.append((chosen, rejected))
    return encoded


def leave_out_too_long(
    tokenizer: Tokenizer, rows: list[Pair] | list[Prompt], max_seq_len: int
) -> list:
    """The pairs that fit into the context, or the prompts that leave room for an answer.

    Prints how many others there are. InputError if all are too long, and, naming file and line, for
    a tag in content.
    """
    kept = []
    for row in rows:
        if isinstance(row, Pair):
            length = max(map(len, encode_pair(tokenizer, row)))
        else:
            [ids] = encode_prompts(tokenizer, [row], sys.maxsize)
            length = len(ids) + 1  # an answer has a token at least
        if length <= max_seq_len:
            kept.append(row)
    left_out = len(rows) - len(kept)
    if left_out:
        reason = f"longer than the model's context of {max_seq_len} tokens"
        if not kept:
            raise InputError(f"all {left_out} rows are {reason}")
        print(f"{left_out} of {len(rows)} rows are left out: {reason}")
    return kept


# ---- training and measuring (§3.2.2) ----


def train_reward_model(
    model: RewardModel,
    tokenizer: Tokenizer,
    pairs: list[Pair],
    *,
    margin: str,
    auxiliary_weight: float,
    epochs: int,
    batch_tokens: int,
    micro_tokens: int,
    learning_rate: float,
    weight_decay: float,
    folder: Path,
    phase: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Train on equation 2, chosen and rejected answers in one forward pass.

    The auxiliary safety loss is added where pairs have labels. Each answer's counts half, so that
    a pair weighs as one. The loss of a step is divided by its pairs.
    """
    device = model.head.weight.device
    encoded = encode_pairs(tokenizer, pairs, model.body.args.max_seq_len)
    padded = [2 * max(len(chosen), len(rejected)) for chosen, rejected in encoded]  # both answers
    plan = plan_steps(padded, batch_tokens, epochs, seed, micro_tokens)

    def batch_loss(picked: list[int]) -> tuple[Tensor, int, dict]:
        # 1. scores: all chosen answers, then all rejected ones
        batch = [pairs[i] for i in picked]
        sequences = [encoded[i][0] for i in picked] + [encoded[i][1] for i in picked]
        lengths = torch.tensor(list(map(len, sequences)), device=device)  # (2 x pairs)
        scores = model(pad(sequences).to(device), lengths)  # (2 x pairs)
        chosen, rejected = scores.chunk(2)  # (pairs) each

        # 2. equation 2
        margins = [MARGINS[margin].get(pair.rating, 0.0) for pair in batch]
        margins = torch.tensor(margins, device=device)  # (pairs)
        loss = ranking_loss(chosen, rejected, margins).sum()

        # 3. the auxiliary safety loss, where there are labels
        labels = [pair.chosen_is_safe for pair in batch]
        labels += [pair.rejected_is_safe for pair in batch]  # (2 x pairs)
        known = [i for i, label in enumerate(labels) if label is not None]
        if auxiliary_weight and known:
            is_safe = torch.tensor([labels[i] for i in known], device=device)
            auxiliary = safety_loss(scores[known], is_safe).sum()
            loss = loss + auxiliary_weight * auxiliary / 2  # a pair counts once
        return loss, len(picked), {"accuracy": (chosen > rejected).sum()}

    optimise(
        model,
        plan,
        batch_loss,
        learning_rate=learning_rate,
        folder=folder,
        phase=phase,
        weight_decay=weight_decay,
        warmup_fraction=0.03,  # paper
        warmup_steps=5,  # paper: at least
        dtype=dtype,
    )


def set_shift(model: RewardModel, tokenizer: Tokenizer, pairs: list[Pair]) -> None:
    """Fix the zero of helpfulness, which ranking leaves free.

    Both answers of the first 500 pairs that are not from `--extra` score 0 on average. The pairs
    are those of the first reward model, answers of SFT, each time the model is refreshed, too:
    then the gate's other side, R_h, stands where it stood.
    """
    collected = [pair for pair in pairs if not pair.extra]
    sequences = []
    for both in encode_pairs(tokenizer, collected[:500], model.body.args.max_seq_len):
        sequences += both
    mean = score(model, sequences).mean()
    model.shift += mean.to(model.shift)


def score_pairs(
    model: RewardModel, tokenizer: Tokenizer, pairs: list[Pair]
) -> tuple[Tensor, Tensor]:
    """Scores (pairs,) of the chosen and of the rejected answers."""
    encoded = encode_pairs(tokenizer, pairs, model.body.args.max_seq_len)
    chosen = score(model, [chosen for chosen, _ in encoded])  # (pairs)
    rejected = score(model, [rejected for _, rejected in encoded])  # (pairs)
    return chosen, rejected


def accuracy_by_rating(
    chosen: Tensor, rejected: Tensor, ratings: list[str | None]
) -> dict[str, float]:
    """Share of pairs whose chosen answer has the higher score, per rating and on average (Table 8).

    Ties count half. A rating that no pair has is left out; numbers are rounded to 4 digits.

    >>> accuracy_by_rating(torch.tensor([1., 0.]), torch.tensor([0., 1.]), ["better", "better"])
    {'better': 0.5, 'average': 0.5}
    """
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()  # (pairs)
    table = {}
    for rating in RATINGS:
        picked = [i for i, of_pair in enumerate(ratings) if of_pair == rating]
        if picked:
            table[rating] = round(right[picked].mean().item(), 4)
    table["average"] = round(right.mean().item(), 4)
    return table


def report_accuracy(
    model: RewardModel,
    tokenizer: Tokenizer,
    pairs: list[Pair],
    axis: str,
    which: str = "held-out",
) -> dict:
    """Accuracy by rating on pairs that training did not see.

    Beside it stands the annotator's own without its noise, where the toy world knows the prompts.
    """
    ratings = [pair.rating for pair in pairs]
    chosen, rejected = score_pairs(model, tokenizer, pairs)
    table = {"reward model": accuracy_by_rating(chosen, rejected, ratings)}
    if all(world.knows(pair.prompt) for pair in pairs):
        rule = {"helpfulness": world.helpfulness, "safety": world.safety}[axis]
        chosen = torch.tensor([rule(pair.prompt, pair.chosen) for pair in pairs])  # (pairs)
        rejected = torch.tensor([rule(pair.prompt, pair.rejected) for pair in pairs])  # (pairs)
        table["annotator"] = accuracy_by_rating(chosen, rejected, ratings)
    _print_accuracies(f"{axis}: accuracy on {len(pairs)} {which} pairs", table)
    return table


def _print_accuracies(title: str, table: dict[str, dict[str, float]]) -> None:
    """Accuracy by rating and on average, a line for each of `table`'s names."""
    columns = (*RATINGS, "average")
    header = " " * 16
    for column in columns:
        header += f"{column.replace('_better', ''):>15}"
    print(f"\n{title}\n{header}")
    for name, accuracies in table.items():
        line = f"{name:<16}"
        for column in columns:
            shown = f"{accuracies[column]:.3f}" if column in accuracies else "-"
            line += f"{shown:>15}"
        print(line)


def score_dialogs(
    models: dict[str, tuple[RewardModel, Tokenizer]], dialogs: list[tuple[Prompt, str]]
) -> list[dict[str, tuple[float, float]]]:
    """{axis: (logit, sigmoid)} of dialogs, each a prompt and its answer, by each model.

    Where there are both models, the combined "reward" is added.
    """
    scores = {}  # (dialogs) each
    for axis, (model, tokenizer) in models.items():
        pairs = [Pair(prompt, answer, answer) for prompt, answer in dialogs]  # checks the length
        encoded = encode_pairs(tokenizer, pairs, model.body.args.max_seq_len)
        scores[axis] = score(model, [ids for ids, _ in encoded])
    if len(scores) == 2:
        is_safety = torch.tensor([prompt.is_safety for prompt, _ in dialogs])
        scores["reward"] = combine_rewards(scores["safety"], scores["helpfulness"], is_safety)

    scored = []
    for i in range(len(dialogs)):
        of_dialog = {}
        for name, logits in scores.items():
            of_dialog[name] = (logits[i].item(), logits[i].sigmoid().item())
        scored.append(of_dialog)
    return scored


# ---- a reward model on disk ----


def save_reward_model(folder: Path, model: RewardModel, tokenizer: Tokenizer) -> None:
    """A Llama 2 checkpoint and `reward_head.pth`."""
    save_model(folder, model.body, tokenizer)
    state = {
        "head": model.head.weight.detach().cpu(),
        "shift": model.shift.cpu(),
        "end_of_prompt": None,
    }
    if model.logprob_head is not None:
        state["end_of_prompt"] = model.logprob_head.end_of_prompt
        state["logprob_weights"] = model.logprob_head.weights.detach().cpu()
    save_checkpoint(folder / "reward_head.pth", state)


def load_reward_model(
    folder: Path, device: str | torch.device = "cpu"
) -> tuple[RewardModel, Tokenizer]:
    """What `save_reward_model` wrote.

    InputError naming the file where its head is missing, broken, or does not fit the model.
    """
    body, tokenizer = load_model(folder, device)
    state = _read_head(Path(folder) / "reward_head.pth", body, tokenizer)
    logprob_head = None
    if state["end_of_prompt"]:
        logprob_head = LogprobHead(state["end_of_prompt"])
        logprob_head.weights.data.copy_(state["logprob_weights"])
    model = RewardModel(body, logprob_head)
    model.head.weight.data.copy_(state["head"])
    model.shift.copy_(state["shift"])
    return model.to(device).eval(), tokenizer


def _read_head(path: Path, body: Transformer, tokenizer: Tokenizer) -> dict:
    """`reward_head.pth`, checked against the model that it belongs to."""
    state = load_checkpoint(path)
    shapes = {"head": (1, body.args.dim), "shift": ()}
    has_logprobs = "logprob_weights" in state
    if has_logprobs:
        shapes["logprob_weights"] = (2,)
    wanted = {"end_of_prompt", *shapes}
    if set(state) != wanted:
        raise InputError(f"{path}: wanted are {', '.join(sorted(wanted))}, and nothing else")

    tag = end_of_prompt(tokenizer) if has_logprobs else None
    if repr(state["end_of_prompt"]) != repr(tag):
        raise InputError(f"{path}: 'end_of_prompt' must be {tag}, the tokenizer's ids of [/INST]")
    for name, shape in shapes.items():
        tensor = state[name]
        fits = isinstance(tensor, Tensor) and tensor.shape == shape
        if not fits or tensor.dtype != torch.float32:
            raise InputError(f"{path}: '{name}' must be a float32 tensor of shape {shape}")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: '{name}' holds numbers that are NaN or infinite")
    return state


# ---- the stage ----


def main(argv: list[str] | None = None) -> None:
    settings = _read_settings(argv)
    init = _find_init(settings)
    prompt_files = _find_prompts(settings)
    extra = _find_extra(settings)
    inputs = _inputs(settings, init, prompt_files[0], extra)
    waiting = []  # pairs that a person has to label first
    for axis in _pick_axes(settings):
        # files are read before the folder is begun, so that a bad line leaves all as it was
        stage = Stage(settings, f"reward-{axis}")
        policy, tokenizer = _load_start(settings, init, stage.device)
        pairs, held_out, rest = _read_files(settings, axis, tokenizer, policy, extra)
        prompts = _read_prompts(settings, prompt_files, tokenizer, policy)
        if not stage.begin(inputs, aside=("axis", "too_long"), axis=axis):
            continue

        # 1. preferences: sample two answers to each prompt and compare them, if there is no file
        if not settings.data:
            try:
                pairs, held_out = _collect(stage, axis, policy, tokenizer, *prompts)
            except NotAnnotated as stop:  # the other axis's pairs are written, too
                waiting.append(str(stop))
                continue
        _check_any(pairs, stage.folder)

        # 2. mix in a share of the rest, but none with the prompt of a held-out pair
        share = settings.mix_share[AXES.index(axis)]
        rest = preferences.without_prompts_of(rest, held_out)
        mixed = preferences.mix_pairs(pairs, rest, share, settings.seed)
        if share:
            print(f"{axis}: {len(mixed) - len(pairs)} of {len(mixed)} pairs are from --extra")
        write_records(stage.folder / "pairs.jsonl", mixed)

        # 3. train: the policy's body, a new head; --folds: first on some pairs, judged on others
        train = partial(_train, stage, axis, policy, tokenizer)
        results = {}
        if settings.folds:
            results |= _cross_validate(settings, axis, tokenizer, pairs, rest, train)
        model = train(mixed, axis)

        # 4. fix the zero of helpfulness, measure on held-out pairs
        if axis == "helpfulness":
            set_shift(model, tokenizer, pairs)
        if held_out:
            results |= report_accuracy(model, tokenizer, held_out, axis)
        save_reward_model(stage.folder, model, tokenizer)
        stage.finish(results)
    if waiting:
        raise NotAnnotated(". ".join(waiting))
    print(f"fool them: python -m play try --out {settings.out}")


def _read_settings(argv: list[str] | None) -> Settings:
    """The command line; --init none has defaults of its own."""
    settings = parse_settings(Settings, __doc__, PRESETS, argv)
    if settings.init == "none":
        presets = {name: preset | FROM_SCRATCH for name, preset in PRESETS.items()}
        settings = parse_settings(Settings, __doc__, presets, argv)
    return settings


def _find_init(settings: Settings) -> Path:
    """The model to start from; with --init none it is not read."""
    if settings.init:
        return Path(settings.init)
    return require(settings.out / "sft", "python sft.py")


def _find_prompts(settings: Settings) -> tuple[Path, Path | None]:
    """Prompts to learn from, and others to hold out, if there are any."""
    if settings.prompts != "toy":
        return Path(settings.prompts), None
    world.ensure()
    return world.FOLDER / "prompts-train.jsonl", world.FOLDER / "prompts-dev.jsonl"


def _find_extra(settings: Settings) -> str:
    """Files of the rest, comma-separated. Those that nothing is drawn from are no inputs."""
    if not any(settings.mix_share):
        return ""
    if split_files(settings.extra) != ["toy"]:
        return settings.extra
    return str(world.FOLDER / "pairs-written.jsonl")


def _inputs(settings: Settings, init: Path, prompts: Path, extra: str) -> dict[str, Path]:
    """All that is read, by name, for the folder's record."""
    inputs = {}
    if settings.init != "none":
        inputs["init"] = init
    if settings.data:
        inputs["data"] = Path(settings.data)
    else:
        inputs["prompts"] = prompts
    for path in split_files(extra):
        inputs[f"extra {path}"] = Path(path)
    return inputs


def _pick_axes(settings: Settings) -> tuple[str, ...]:
    """The reward models to train: without safety labels there is only one."""
    if settings.axis != "both":
        return (settings.axis,)
    if not settings.data or preferences.has_safety_labels(settings.data):
        return AXES
    print(
        f"{settings.data} labels nothing safe or unsafe: one model, "
        f"{settings.out}/reward-helpfulness; --axis safety names it so"
    )
    return ("helpfulness",)


def _load_start(
    settings: Settings, init: Path, device: torch.device
) -> tuple[Transformer, Tokenizer]:
    """The policy that answers, and whose body the reward model starts from."""
    if settings.init != "none":
        return load_model(init, device)
    tokenizer = Tokenizer(world.TOKENIZER)
    size = replace(SIZES[settings.preset], vocab_size=tokenizer.vocab_size)
    policy = Transformer(size)
    policy.init_weights(settings.seed)
    return policy, tokenizer


def _read_files(
    settings: Settings, axis: str, tokenizer: Tokenizer, policy: Transformer, extra: str
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """From --data pairs to learn from and pairs held out, and the rest from --extra.

    With folds all of --data is learned from.
    """
    context = policy.args.max_seq_len
    longest = min(settings.max_tokens or context, context)
    pairs, held_out, rest = [], [], []
    if settings.data:
        pairs = preferences.read_pairs(settings.data, axis, tokenizer, longest)
        if settings.too_long == "skip":
            pairs = leave_out_too_long(tokenizer, pairs, context)
        _check_any(pairs, settings.data)
        if not settings.folds:
            pairs, held_out = preferences.hold_out_by_prompt(pairs, settings.seed)
    if settings.mix_share[AXES.index(axis)]:
        rest = preferences.read_pairs(extra, axis, tokenizer, longest)
        if settings.too_long == "skip":
            rest = leave_out_too_long(tokenizer, rest, context)
    encode_pairs(tokenizer, pairs + held_out + rest, context)  # tells of what is too long
    return pairs, held_out, rest


def _read_prompts(
    settings: Settings,
    prompt_files: tuple[Path, Path | None],
    tokenizer: Tokenizer,
    policy: Transformer,
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and others to hold out; none with --data."""
    if settings.data:
        return [], []
    train_file, dev_file = prompt_files
    prompts = read_prompts(train_file)
    check_annotator(settings.annotator, prompts)
    if settings.prompts != "toy":
        context = policy.args.max_seq_len
        if settings.too_long == "skip":
            prompts = leave_out_too_long(tokenizer, prompts, context)
        encode_prompts(tokenizer, prompts, context)  # tells of tags and of what is too long
    return prompts, read_prompts(dev_file) if dev_file else []


def _collect(
    stage: Stage,
    axis: str,
    policy: Transformer,
    tokenizer: Tokenizer,
    train_prompts: list[Prompt],
    dev_prompts: list[Prompt],
) -> tuple[list[Pair], list[Pair]]:
    """Sampled and annotated: (pairs to learn from, pairs held out)."""
    settings = stage.settings
    seed = settings.seed
    collect = partial(
        collect_preferences,
        [policy],
        tokenizer,
        annotator=settings.annotator,
        temperatures=settings.temperatures,
        folder=stage.folder,
        max_new_tokens=settings.max_new_tokens,
    )
    counts = {"helpfulness": settings.helpfulness_pairs, "safety": settings.safety_pairs}
    prompts = pick_prompts(train_prompts, axis, counts[axis], seed)
    pairs = collect(prompts, axis, key=(seed, "sft"))
    if not dev_prompts or settings.annotator != "toy":
        return pairs, []  # people label what is learned from, and nothing else
    prompts = pick_prompts(dev_prompts, axis, 10**6, seed)
    return pairs, collect(prompts, axis, key=(seed, "dev"))


def _check_any(pairs: list[Pair], where: str | Path) -> None:
    """InputError where there is nothing to learn from."""
    if not pairs:
        raise InputError(
            f"{where}: no pair of different answers to learn from; more pairs, "
            "or other --temperatures"
        )
    if all(pair.extra for pair in pairs):
        raise InputError(
            f"{where}: each pair is marked as 'extra', wanted: some that are not, whose mean score"
            " becomes the zero (`set_shift`)"
        )


def _train(
    stage: Stage,
    axis: str,
    policy: Transformer,
    tokenizer: Tokenizer,
    pairs: list[Pair],
    phase: str,
) -> RewardModel:
    """One reward model: a copy of the policy with a new head, trained on these pairs."""
    settings = stage.settings
    set_seed(settings.seed)  # of the head
    logprob_head = None
    if settings.head == "logprobs":
        logprob_head = LogprobHead(end_of_prompt(tokenizer))
    body = Transformer(policy.args)  # a copy: each fold starts from the policy
    body.load_state_dict(policy.state_dict())
    model = RewardModel(body, logprob_head).to(stage.device)
    train_reward_model(
        model,
        tokenizer,
        pairs,
        margin=settings.margin,
        auxiliary_weight=settings.auxiliary_weight if axis == "safety" else 0.0,
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        folder=stage.folder,
        phase=phase,
        seed=settings.seed,
        dtype=stage.dtype,
    )
    return model


def _cross_validate(
    settings: Settings,
    axis: str,
    tokenizer: Tokenizer,
    pairs: list[Pair],
    rest: list[Pair],
    train: Callable[[list[Pair], str], RewardModel],
) -> dict[str, dict[str, float]]:
    """--folds: each fold is left out once and judged by a model that saw only the others.

    train: (pairs, phase) -> a reward model. Returns accuracies with intervals, by name, of the
    reward model and simple baselines.
    """
    share = settings.mix_share[AXES.index(axis)]
    differences = []  # for each fold: score(chosen) - score(rejected) of its pairs, by name
    folds = preferences.folds_by_prompt(pairs, settings.folds, settings.seed)
    for fold, (seen, test) in enumerate(folds):
        unseen = preferences.without_prompts_of(rest, test)
        mixed = preferences.mix_pairs(seen, unseen, share, settings.seed)
        model = train(mixed, f"{axis}-fold-{fold}")
        chosen, rejected = score_pairs(model, tokenizer, test)
        difference = {"reward model": chosen - rejected}
        differences.append(difference | preferences.baselines(seen, test))
    return preferences.print_cross_validation(differences)


# ---- not the paper's, off by default: a head that reads log-probabilities (--head logprobs) ----


class LogprobHead(nn.Module):
    """What the answer's log-probabilities under the body add to the score.

    Two weighted numbers, both divided by 0.2: the sum of the answer's log-probabilities and the
    smallest one. One below -8 counts as -8. A small body knows which answer is right, but its last
    state does not tell (`python -m experiments.reward_sees_content`). The body keeps its next-token
    head for this.
    """

    def __init__(self, end_of_prompt: list[int]):
        super().__init__()
        self.end_of_prompt = end_of_prompt  # ids of `[/INST]`
        self.weights = nn.Parameter(torch.zeros(2))  # of the sum and of the minimum

    def forward(self, body: Transformer, states: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What is added to the scores (batch); 0 at first.

        Args:
            states: (batch, seq, dim) the body's features of tokens.
            tokens: (batch, seq) padded on the right. lengths: (batch).
        """
        logits = body.output(states[:, :-1])  # (batch, seq - 1, vocab)
        logprobs = token_logprobs(logits, tokens[:, 1:])  # (batch, seq - 1)
        positions = torch.arange(1, tokens.shape[1], device=tokens.device)  # (seq - 1) of tokens
        starts = answer_starts(tokens, self.end_of_prompt)[:, None]  # (batch, 1)
        in_answer = (positions >= starts) & (positions < lengths[:, None])  # (batch, seq - 1)
        logprobs = logprobs.clamp(min=-8) * in_answer  # one wild token is not worse than wrong
        sums = torch.stack([logprobs.sum(1), logprobs.amin(1)], 1)  # (batch, 2) in nats
        with torch.autocast(tokens.device.type, enabled=False):  # in float32, as the scalar head
            return sums @ self.weights.float() / 0.2


def answer_starts(tokens: Tensor, end_of_prompt: list[int]) -> Tensor:
    """Where each row's last answer begins: behind the last `[/INST]`.

    tokens (batch, seq) -> positions (batch), 0 if there is none.

    >>> answer_starts(torch.tensor([[1, 7, 8, 4, 7, 8, 5]]), [7, 8])
    tensor([6])
    """
    tag = torch.tensor(end_of_prompt, device=tokens.device)  # (n)
    windows = tokens.unfold(1, len(tag), 1)  # (batch, seq - n + 1, n)
    is_tag = (windows == tag).all(-1)  # (batch, seq - n + 1)
    behind = torch.arange(len(tag), len(tag) + is_tag.shape[1], device=tokens.device)
    return (is_tag * behind).amax(1)  # (batch)


if __name__ == "__main__":
    run(main)
