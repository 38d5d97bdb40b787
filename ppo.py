"""Proximal policy optimisation (PPO) on the last version of rejection sampling (paper §3.2.3,
equations 3 and 4).

The paper: maximise the expected reward R(g|p) = R̃_c(g|p) - β KL(π_θ || π_0), where R̃_c is the
combined reward's logit, whitened, and π_0 the policy at the start. AdamW, constant learning rate
1e-6, 512 answers an iteration, mini-batches of 64 with one gradient step each, clip 0.2, β 0.01
(7B, 13B) or 0.005 (34B, 70B), 200 to 400 iterations, early stop on held-out prompts.

Ours, where the paper does not say:
- Before PPO come fresh preferences on that policy. The reward models are refreshed on them, as
  before every round (they go on from the last ones): without them PPO finds what they have not
  seen.
- The value function is a network of its own. It starts near the helpfulness model, its head
  included (one that starts as the policy learned too little about rewards in the time there is),
  and learns alone for a few iterations.
- Advantages come by GAE with γ = 1, whitened over the answer tokens of an iteration.
- The KL is paid token by token, as log π/π_0 of what was sampled. Its sum over the answer is an
  unbiased estimate. The reward stands at the answer's last token.
- The whitening of the reward also shifts its mean to 0, batch by batch.
- An answer that ran into the length limit (or holds a tag) gets a fixed low reward, in training
  and by the early stop alike: repeating itself up to the limit must not win.
- The policy samples at temperature 1 without top-p, so that what was sampled is what is trained.

Deleted: entropy bonus, clipping of the value loss, further passes over a batch, adaptive β.

    python ppo.py                              from out/rlhf-v4 to out/rlhf-v4-ppo
    python ppo.py --init out/rlhf-v5           PPO after V5: out/rlhf-v5-ppo
"""

import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Answer,
    InputError,
    Prompt,
    Tokenizer,
    batches_by_length,
    micro_batches,
    pad,
    read_prompts,
    world,
    write_jsonl,
)
from data.annotators import check_annotator
from eval import VERSIONS, evaluate_on_dev
from model import Generation, Transformer, token_logprobs
from rejection_sampling import PRESETS as ROUND_PRESETS
from rejection_sampling import RewardModels, refresh_reward_models, share_gated, with_scores
from rejection_sampling import Settings as RoundSettings
from reward import AXES, RewardModel, leave_out_too_long
from runtime import (
    Metrics,
    Stage,
    StageSettings,
    append_rows,
    as_answer,
    as_numbers,
    check_between,
    check_positive,
    encode_prompts,
    is_finished,
    load_model,
    newest_reward_models,
    parse_settings,
    require,
    restore_checkpoint,
    resume_rows,
    run,
    sample_answers,
    sample_planned,
    save_checkpoint,
    save_model,
    unusable,
)
from sft import adamw, show_answers


@dataclass
class Settings(StageSettings):
    # the model to start from, which is also π_0; empty: OUT/rlhf-v4. PPO writes OUT/(its name)-ppo
    init: str = ""
    # JSONL of prompts, one in ten of them (at most 256) held out for the early stop; toy: the dev
    # prompts are
    prompts: str = "toy"
    max_prompts: int = 0  # use the first so many; 0: all
    # a prompt longer than the model's context: an error, or left out and counted (skip)
    too_long: Literal["error", "skip"] = "error"
    # of fresh pairs by the model to start from, on which the last reward models learn on; none: no
    # refresh
    annotator: Literal["toy", "human", "file", "none"] = "toy"
    # fresh preferences before PPO; our choice: more than a round's, since PPO goes further
    helpfulness_pairs: int = 10000
    safety_pairs: int = 300  # the same for safety
    iterations: int = 50  # paper: 200 to 400
    batch: int = 256  # answers an iteration (paper: 512)
    mini_batch: int = 32  # answers a gradient step (paper: 64)
    micro_tokens: int = 16384  # tokens a forward pass
    # constant (paper: 1e-6); at 4e-4 steps are noise and facts are forgotten
    learning_rate: float = 1.5e-4
    value_learning_rate: float = 1e-3  # of the value network; our choice
    weight_decay: float = 0.1  # paper
    clip: float = 0.2  # paper
    beta: float = 0.03  # weight of the KL penalty (paper: 0.01; 34B and 70B 0.005)
    gamma: float = 1.0  # discount; our choice: an answer is short
    lam: float = 0.95  # λ of generalised advantage estimation; our choice
    # whitened reward of an answer without EOS or with a tag, at most 0 (the mean); our choice
    cut_reward: float = -2.0
    # what the value network starts as; our choice
    value_init: Literal["policy", "reward"] = "reward"
    value_warmup: int = 5  # iterations in which the value network learns alone; our choice
    max_new_tokens: int = 96  # longest answer
    evaluate_every: int = 10  # iterations between evaluations on held-out prompts
    patience: int = 3  # stop after so many evaluations without a better one
    # stop where the KL per answer exceeds so many nats; such a model is not kept
    max_kl: float = 3.0

    def __post_init__(self) -> None:
        check_positive(
            self,
            "helpfulness_pairs",
            "safety_pairs",
            "iterations",
            "batch",
            "mini_batch",
            "micro_tokens",
            "learning_rate",
            "value_learning_rate",
            "clip",
            "max_new_tokens",
            "evaluate_every",
            "patience",
            "max_kl",
            or_zero=("beta", "value_warmup", "weight_decay", "max_prompts"),
        )
        check_between(self, 0, 1, "clip", "gamma", "lam")
        check_between(self, -100, 0, "cut_reward")
        if self.value_warmup >= self.iterations:
            raise InputError(
                f"--value-warmup {self.value_warmup}: must be less than --iterations "
                f"{self.iterations}, else the policy never learns"
            )


PAPER = {
    "annotator": "none",
    "iterations": 400,
    "batch": 512,
    "mini_batch": 64,
    "micro_tokens": 8192,
    "learning_rate": 1e-6,
    "value_learning_rate": 1e-6,
    "beta": 0.01,
    "max_new_tokens": 1024,
    "value_init": "reward",
    "max_kl": 50.0,
    "prompts": "",
}
TINY = {
    "helpfulness_pairs": 40,
    "safety_pairs": 30,
    "iterations": 6,
    "batch": 16,
    "mini_batch": 8,
    "value_warmup": 1,
    "evaluate_every": 2,
}
PRESETS = {
    "tiny": TINY,
    "class": {"helpfulness_pairs": 600, "safety_pairs": 80, "iterations": 20, "batch": 128},
    "toy": {},
    "small": {"learning_rate": 5e-5, "value_learning_rate": 2e-4, "iterations": 100},
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-2-34b": PAPER | {"beta": 0.005},
    "llama-2-70b": PAPER | {"beta": 0.005},
}

SAVE_EVERY = 5  # iterations between checkpoints
HELD_OUT_SAMPLES = 2  # answers to each held-out prompt: with one, chance picks the best model


@dataclass
class Rollout:
    """What one iteration knows of its answers. Slot t of a (batch, seq) tensor belongs to token t,
    prompt tokens included: its log-probability, the value of the state in which it was chosen (all
    tokens before t), its reward. Outside of the mask everything is 0.
    """

    answers: list[Answer]  # (batch) with both scores
    tokens: Tensor  # (batch, seq) prompt and answer as sampled, padded on the right
    mask: Tensor  # (batch, seq) bool: the answer's tokens, EOS included
    logprobs: Tensor  # (batch, seq) log π(token), by the policy as it sampled
    reference: Tensor  # (batch, seq) log π_0(token)
    values: Tensor  # (batch, seq) by the value network before the update
    scores: Tensor  # (batch) combined reward, a logit, whitened; then cut answers get their own
    rewards: Tensor  # (batch, seq) -β KL at each token; the last one also gets the score
    advantages: Tensor  # (batch, seq) whitened
    returns: Tensor  # (batch, seq) what the value network learns


class Critic(nn.Module):
    """The value function: a transformer whose next-token head gives way to a scalar one, which
    starts at 0."""

    def __init__(self, body: Transformer):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.args.dim, 1, device=body.tok_embeddings.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if not body.args.tie_word_embeddings:
            body.output.requires_grad_(False)  # not used

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask (batch, seq) -> values (batch, seq), float32: at t of all tokens before t; 0
        outside of the mask."""
        features = self.body.features(tokens[:, :-1]).float()  # (batch, seq - 1, dim)
        with torch.autocast(features.device.type, enabled=False):  # a scalar head needs float32
            values = self.head(features).squeeze(-1)  # (batch, seq - 1)
        return F.pad(values, (1, 0)).masked_fill(~mask, 0.0)  # (batch, seq)

    @torch.no_grad()
    def start_at(self, model: RewardModel, mean: float, spread: float) -> None:
        """Take over the reward model's head, in the units of whitened rewards: behind a text it
        then expects (score - mean) / spread. Only a start: a reward model's head has learned the
        state at EOS, and no other reward than its own. A head that also reads log-probabilities
        gives its direction only."""
        self.head.weight.copy_(model.head.weight / spread)
        if model.logprob_head is None:
            self.head.bias.fill_(-(model.shift.item() + mean) / spread)


# ----------------------------------------------------------------------------------- equations


def whiten_rewards(scores: Tensor, shift_mean: bool = True) -> Tensor:
    """R̃_c = whiten(logit R_c) of equation 4: one number per answer, before the KL is taken off.

    Our choice: statistics of the iteration's own answers (the standard deviation with n, plus 1e-6,
    so that equal scores become 0), the mean shifted to 0. Without the shift only the spread becomes
    1.

    Args:
        scores: (answers,) combined rewards as logits, such as `combine_rewards` gives them.

    >>> whiten_rewards(torch.tensor([1.0, 3.0, 5.0]))  # mean 3, standard deviation sqrt(8/3)
    tensor([-1.2247,  0.0000,  1.2247])
    """
    whitened = (scores - scores.mean()) / (scores.std(correction=0) + 1e-6)
    return whitened if shift_mean else whitened + scores.mean()


def whiten_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the tokens of the mask, 0 elsewhere. Our choice; the
    paper does not say.

    Args:
        advantages: (batch, seq). mask: (batch, seq) bool; outside of it may stand anything, even
            NaN. Equal advantages become 0.

    >>> whiten_advantages(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.0000,  1.0000,  0.0000]])
    """
    picked = advantages[mask]  # (answer tokens)
    whitened = (advantages - picked.mean()) / (picked.std(correction=0) + 1e-6)
    return whitened.masked_fill(~mask, 0.0)


def kl_penalty(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """KL(π_θ || π_0) of equation 4, estimated token by token: log π_θ(token) - log π_0(token), 0
    outside of the mask. `token_rewards` takes off β times this.

    Our choice: of what π_θ sampled itself, the sum over an answer has the KL as its mean. A single
    one may be negative.

    Args:
        logprobs, reference: (batch, seq) log-probabilities of the same tokens in nats.
        mask: (batch, seq) bool; outside of it may stand anything, even NaN.

    >>> now, before = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    >>> kl_penalty(now, before, torch.tensor([[True, True]])).tolist()
    [[0.5, -1.0]]
    """
    return (logprobs - reference).masked_fill(~mask, 0.0)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R of equation 4, spread over an answer: -β KL at each token; the last one (EOS) also gets the
    answer's score.

    Args:
        scores: (answers,) whitened. kl: (answers, seq) as `kl_penalty` gives it.
        mask: (answers, seq) bool.

    >>> kl, mask = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([3.0]), kl, mask, beta=0.5)
    tensor([[-0.5000,  2.0000,  0.0000]])
    """
    # (answers, seq): the only one with no further one behind it
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return -beta * kl + last * scores[:, None]  # (answers, seq)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): A_t = δ_t + γλ A_{t+1},
    δ_t = r_t + γ V_{t+1} - V_t.

    Behind an answer's last token nothing comes: value and advantage are 0 there, after EOS and at
    the length limit alike (our choice: such an answer has its fixed reward).

    Args:
        rewards, values: (batch, seq); they stay as they are.
        mask: (batch, seq) bool, one run of true per row; outside of it may stand anything, even
            NaN.

    Returns:
        (advantages, returns), (batch, seq) each, 0 outside of the mask.
        returns = advantages + values.

    >>> one = torch.ones(1, 2, dtype=torch.bool)  # δ = 0 + 3 - 1 = 2 and 4 - 3 = 1
    >>> gae(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 3.0]]), one, gamma=1.0, lam=0.5)
    (tensor([[2.5000, 1.0000]]), tensor([[3.5000, 4.0000]]))
    """
    rewards = rewards.masked_fill(~mask, 0.0)  # (batch, seq)
    values = values.masked_fill(~mask, 0.0)  # (batch, seq)
    advantages = torch.zeros_like(values)  # (batch, seq)
    following = torch.zeros_like(values[:, 0])  # (batch)
    for t in reversed(range(values.shape[1])):
        # (batch)
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (batch)
        following = (delta + gamma * lam * following) * mask[:, t]  # (batch)
        advantages[:, t] = following
    return advantages, advantages + values


def policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """PPO's clipped objective, negated: -min(r A, clip(r, 1 - ε, 1 + ε) A) with the ratio
    r = π_θ(token) / π_old(token).

    The smaller of the two, so that a step which already went far is not rewarded for going further,
    and one that went the wrong way is always called back.

    Args:
        logprobs, old, advantages: (batch, seq), of the policy now, of the policy that sampled.
        mask: (batch, seq) bool; outside of it may stand anything, even NaN: no gradient flows
            there.

    Returns:
        (batch, seq) losses, 0 outside of the mask; the caller divides by the tokens of the whole
        step.

    >>> now = torch.tensor([[2.0, 2.0, 0.5]]).log()  # ratios against log-probabilities of 0
    >>> advantages, mask = torch.tensor([[1.0, -1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> policy_loss(now, torch.zeros(1, 3), advantages, mask)
    tensor([[-1.2000,  2.0000,  0.8000]])
    """
    ratio = (logprobs - old).masked_fill(~mask, 0.0).exp()  # (batch, seq)
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages  # (batch, seq)
    objective = torch.minimum(ratio * advantages, clipped)  # (batch, seq)
    return -objective.masked_fill(~mask, 0.0)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the squared error of the value, (batch, seq), 0 outside of the mask. Our choice: no
    clipping.

    >>> values, returns = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 0.0]])
    >>> value_loss(values, returns, torch.tensor([[True, False]]))
    tensor([[2., 0.]])
    """
    return (0.5 * (values - returns) ** 2).masked_fill(~mask, 0.0)


# ------------------------------------------------------------------------------- one iteration


def answer_logprobs(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """log p(token) under the model itself (temperature 1) where the mask is true, 0 elsewhere.

    Args:
        tokens: (batch, seq). mask: (batch, seq) bool.

    Returns:
        (batch, seq), float32.
    """
    before = model.features(tokens[:, :-1])[mask[:, 1:]]  # (answer tokens, dim): each one's past
    logits = model.output(before).float()  # (answer tokens, vocab)
    logprobs = token_logprobs(logits, tokens[mask])  # (answer tokens)
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(mask, logprobs)


def pad_answers(
    prompts: list[list[int]], answers: list[list[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts with their answers, padded on the right.

    Returns:
        (tokens, mask), (batch, seq) each; the mask is true on the answers.

    >>> pad_answers([[1, 5], [1]], [[8, 2], [9]], "cpu")[1].int().tolist()
    [[0, 0, 1, 1], [0, 1, 0, 0]]
    """
    sequences = []
    marks = []
    for prompt, answer in zip(prompts, answers, strict=True):
        sequences.append(prompt + answer)
        marks.append([False] * len(prompt) + [True] * len(answer))
    tokens = pad(sequences).to(device)  # (batch, seq)
    mask = pad(marks, False).to(device)  # (batch, seq)
    return tokens, mask


@torch.no_grad()
def rollout(
    policy: Transformer,
    reference: Transformer,
    critic: Critic,
    reward_models: RewardModels,
    prompts: list[Prompt],
    key: tuple,
    settings: Settings,
    dtype: torch.dtype = torch.float32,
) -> Rollout:
    """The first half of an iteration: an answer to each prompt, its rewards, its advantages.

    Args:
        prompts: one for each answer. key: of the randomness; the answer's number in the batch is
            added to it.
    """
    # 1. sample, at temperature 1; the ids go on as they were sampled
    device = policy.tok_embeddings.weight.device
    tokenizer = reward_models.tokenizer
    encoded = encode_prompts(tokenizer, prompts, policy.args.max_seq_len)
    generations = _sample(policy, tokenizer, encoded, key, settings, dtype)
    answer_ids = [generation.ids for generation in generations]
    tokens, mask = pad_answers(encoded, answer_ids, device)  # (batch, seq) each
    logprobs = _sampled_logprobs(generations, mask)  # (batch, seq)

    # 2. score: the combined reward, whitened; an answer that is no example has a fixed one
    answers = []
    for i, generation in enumerate(generations):
        answers.append(as_answer(tokenizer, generation, i, 0, 1.0))
    raw_scores = reward_models.scores(prompts, answers)
    answers = with_scores(answers, raw_scores)
    scores = whiten_rewards(raw_scores["reward"]).to(device)  # (batch)
    is_cut = torch.tensor([bool(unusable(answer)) for answer in answers], device=device)  # (batch)
    scores[is_cut] = settings.cut_reward

    # 3. what the reference policy and the value network think of the same tokens
    reference_logprobs = torch.zeros_like(logprobs)  # (batch, seq)
    values = torch.zeros_like(logprobs)  # (batch, seq)
    everyone = list(range(len(answers)))
    for picked, length in micro_batches(mask, everyone, settings.micro_tokens):
        some_tokens = tokens[picked, :length]  # (micro-batch, length)
        some_mask = mask[picked, :length]  # (micro-batch, length)
        with _autocast(device, dtype):
            some_logprobs = answer_logprobs(reference, some_tokens, some_mask)
            reference_logprobs[picked, :length] = some_logprobs
            values[picked, :length] = critic(some_tokens, some_mask)

    # 4. advantages: the KL is paid at each token, the score comes with the last
    kl = kl_penalty(logprobs, reference_logprobs, mask)  # (batch, seq)
    rewards = token_rewards(scores, kl, mask, settings.beta)  # (batch, seq)
    advantages, returns = gae(rewards, values, mask, settings.gamma, settings.lam)
    return Rollout(
        answers=answers,
        tokens=tokens,
        mask=mask,
        logprobs=logprobs,
        reference=reference_logprobs,
        values=values,
        scores=scores,
        rewards=rewards,
        advantages=whiten_advantages(advantages, mask),
        returns=returns,
    )


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`, where that is not float32; the weights stay as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _sample(
    policy: Transformer,
    tokenizer: Tokenizer,
    encoded: list[list[int]],
    key: tuple,
    settings: Settings,
    dtype: torch.dtype,
) -> list[Generation]:
    """An answer to each encoded prompt, by the policy as it is: temperature 1, no top-p."""
    keys = [(*as_numbers(key), i) for i in range(len(encoded))]
    longest = [len(ids) + settings.max_new_tokens for ids in encoded]
    plan = batches_by_length(longest, 2 * settings.micro_tokens)
    with _autocast(policy.tok_embeddings.weight.device, dtype):
        return sample_planned(
            policy, tokenizer, encoded, keys, plan, max_new_tokens=settings.max_new_tokens
        )


def _sampled_logprobs(generations: list[Generation], mask: Tensor) -> Tensor:
    """log π(token) as the policy sampled it, at the places of the mask: (batch, seq)."""
    flat = []
    for generation in generations:
        flat.extend(generation.logprobs)
    logprobs = torch.tensor(flat, device=mask.device)  # (answer tokens)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, logprobs)


def ppo_step(
    policy: Transformer,
    critic: Critic,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: Rollout,
    picked: list[int],
    settings: Settings,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """One gradient step on one mini-batch: of both networks, or of the value network alone.

    The losses are means over the answer tokens of the whole mini-batch, also where it is read in
    several micro-batches. Each network's gradient is clipped to norm 1.

    Args:
        optimizers: {"policy": …, "critic": …}; without "policy" the policy stays as it is.
        picked: the mini-batch's rows of the rollout.

    Returns:
        {"value_loss", "policy_loss", "clip_fraction", "grad_norm"}; without a policy step only the
        value loss is there. The norm is the policy's, before clipping.
    """
    device = batch.tokens.device
    count = batch.mask[picked].sum()  # answer tokens of the mini-batch
    means = {}
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    for rows, length in micro_batches(batch.mask, picked, settings.micro_tokens):
        tokens = batch.tokens[rows, :length]  # (micro-batch, length), as the next four
        mask = batch.mask[rows, :length]
        old = batch.logprobs[rows, :length]
        advantages = batch.advantages[rows, :length]
        returns = batch.returns[rows, :length]
        with _autocast(device, dtype):
            values = critic(tokens, mask)  # (micro-batch, length)
            sums = {"value_loss": value_loss(values, returns, mask).sum()}
            if "policy" in optimizers:
                logprobs = answer_logprobs(policy, tokens, mask)  # (micro-batch, length)
                losses = policy_loss(logprobs, old, advantages, mask, settings.clip)
                sums["policy_loss"] = losses.sum()
                moved = (logprobs.detach() - old)[mask].exp() - 1  # (answer tokens)
        (sum(sums.values()) / count).backward()
        if "policy" in optimizers:
            sums["clip_fraction"] = (moved.abs() > settings.clip).sum()
        for name, total in sums.items():
            means[name] = means.get(name, 0.0) + total.item() / count.item()
    for name, optimizer in optimizers.items():
        weights = []
        for group in optimizer.param_groups:
            weights.extend(group["params"])
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()  # paper: clipped at 1.0
        if name == "policy":
            means["grad_norm"] = norm
        optimizer.step()
    return means


def describe(batch: Rollout, prompts: list[Prompt]) -> dict[str, float]:
    """The numbers of a rollout that tell how PPO is doing, for the log.

    `entropy` is the mean of -log π over what was sampled, in nats per token. `explained_variance`
    is 1 where the value network foresees the returns, 0 where it knows no more than their mean.
    `gated`: share of the answers to untagged prompts that the safety model took over.
    """
    mask = batch.mask
    answers = batch.answers
    kl = kl_penalty(batch.logprobs, batch.reference, mask).sum(1)  # (batch)
    error = (batch.returns - batch.values)[mask].var()
    spread = batch.returns[mask].var().clamp(min=1e-8)
    cut = [answer for answer in answers if unusable(answer)]
    return {
        "reward": _mean([answer.reward for answer in answers]),
        **_mean_scores(answers),
        "gated": share_gated(prompts, answers),
        "reward_whitened": batch.scores.mean().item(),
        "objective": batch.rewards.sum(1).mean().item(),
        "kl": kl.mean().item(),
        "entropy": -batch.logprobs[mask].mean().item(),
        "explained_variance": 1 - (error / spread).item(),
        "length": mask.sum().item() / len(answers),
        "cut": len(cut) / len(answers),
    }


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _mean_scores(answers: list[Answer]) -> dict[str, float]:
    """Mean score by each of the two reward models."""
    return {axis: _mean([getattr(answer, axis) for answer in answers]) for axis in AXES}


@torch.no_grad()
def held_out(
    policy: Transformer,
    reference: Transformer,
    reward_models: RewardModels,
    prompts: list[Prompt],
    settings: Settings,
    start: dict[str, float] | None = None,
) -> dict[str, float]:
    """How good the policy is on held-out prompts; equal random numbers each time.

    Training's rule holds here, too: an answer that is no example (`unusable`) counts as
    `settings.cut_reward`, whatever it scores. That is a whitened reward. Here the start's mean and
    spread make a logit of it, so that looks can be compared: mean + cut_reward · spread.

    Args:
        start: what this function returned for the policy at the start; None: this is the start.

    Returns:
        {"reward": mean combined reward, a logit, by which the best policy is kept; "scored": the
        same mean, had each answer counted as it was scored; "spread": standard deviation of those
        scores; "cut": share of answers that are no example; "kl": nats per answer; "length": tokens
        per answer; and for each reward model its name: mean score}.
    """
    answers = sample_answers(
        policy,
        reward_models.tokenizer,
        prompts,
        key=(settings.seed, "ppo held-out"),
        samples=HELD_OUT_SAMPLES,
        max_new_tokens=settings.max_new_tokens,
        desc="held-out",
    )
    raw_scores = reward_models.scores(prompts, answers)
    answers = with_scores(answers, raw_scores)
    rewards = raw_scores["reward"]  # (answers)
    scored = rewards.mean().item()
    spread = 1.0
    if len(answers) > 1:
        spread = max(1e-6, rewards.std().item())
    units = start or {"scored": scored, "spread": spread}
    is_cut = torch.tensor([bool(unusable(answer)) for answer in answers])  # (answers)
    low = units["scored"] + settings.cut_reward * units["spread"]
    rewards = rewards.masked_fill(is_cut, low)  # (answers)

    encoded = encode_prompts(reward_models.tokenizer, prompts, policy.args.max_seq_len)
    prompt_ids = [encoded[answer.index] for answer in answers]
    answer_ids = [answer.ids for answer in answers]
    device = policy.tok_embeddings.weight.device
    tokens, mask = pad_answers(prompt_ids, answer_ids, device)  # (answers, seq) each
    reference_sums = torch.zeros(len(answers), device=device)  # (answers) log π_0(answer)
    everyone = list(range(len(answers)))
    for picked, length in micro_batches(mask, everyone, settings.micro_tokens):
        logprobs = answer_logprobs(reference, tokens[picked, :length], mask[picked, :length])
        reference_sums[picked] = logprobs.sum(1)
    return {
        "reward": rewards.mean().item(),
        "scored": scored,
        "spread": spread,
        "cut": is_cut.float().mean().item(),
        "kl": _mean([answer.logprob for answer in answers]) - reference_sums.mean().item(),
        "length": mask.sum().item() / len(answers),
        **_mean_scores(answers),
    }


# ------------------------------------------------------------------------------ the whole stage


@dataclass
class _Inputs:
    """What PPO starts from."""

    init: Path  # folder of the model
    earlier: list[Path]  # folders of finished versions up to it, with their preferences
    reward_folders: dict[str, Path]  # {axis: folder of its newest reward model}
    file: Path  # of prompts
    prompts: list[Prompt]  # to learn on
    held_out: list[Prompt]  # for the early stop


def _find_inputs(settings: Settings) -> _Inputs:
    """The model to start from, the newest reward models up to it, and prompts."""
    init = require(settings.init or settings.out / "rlhf-v4", "python rejection_sampling.py")
    older = VERSIONS[: VERSIONS.index("rlhf-v4-ppo")]  # where the start is a control: up to V4
    if init.name in VERSIONS:
        older = VERSIONS[: VERSIONS.index(init.name)]
    earlier = [settings.out / name for name in older if is_finished(settings.out / name)]
    earlier.append(init)
    reward_folders = newest_reward_models(settings.out, earlier)  # its own, where it has them
    file, prompts, held_out_prompts = _read_prompts(settings)
    return _Inputs(init, earlier, reward_folders, file, prompts, held_out_prompts)


def _read_prompts(settings: Settings) -> tuple[Path, list[Prompt], list[Prompt]]:
    """The file of prompts, the prompts to learn on, those held out for the early stop."""
    if not settings.prompts:
        raise InputError(f"--preset {settings.preset} needs prompts: --prompts FILE.jsonl")
    if settings.prompts == "toy":
        file = world.ensure() / "prompts-train.jsonl"
    else:
        file = Path(settings.prompts)
    prompts = read_prompts(file)[: settings.max_prompts or None]
    if settings.prompts == "toy":
        return file, prompts, read_prompts(world.FOLDER / "prompts-dev.jsonl")
    shuffled = random.Random(f"{settings.seed} held-out").sample(prompts, len(prompts))
    count = max(1, len(shuffled) // 10)
    count = min(256, count)
    if len(shuffled) <= count:
        reason = "one in ten, at least one, is held out for the early stop"
        raise InputError(f"{file}: one prompt is too few; {reason}")
    return file, shuffled[count:], shuffled[:count]


def _check_inputs(
    inputs: _Inputs, policy: Transformer, tokenizer: Tokenizer, stage: Stage
) -> _Inputs:
    """Tells of what cannot be used before anything is made; the inputs without prompts that are
    left out.
    """
    context = policy.args.max_seq_len
    if stage.settings.too_long == "skip":
        prompts = leave_out_too_long(tokenizer, inputs.prompts, context)
        held_out_prompts = leave_out_too_long(tokenizer, inputs.held_out, context)
        inputs = replace(inputs, prompts=prompts, held_out=held_out_prompts)
    encode_prompts(tokenizer, inputs.prompts + inputs.held_out, context)
    check_annotator(stage.settings.annotator, inputs.prompts)
    reward_models = RewardModels(inputs.reward_folders, stage.device)
    if reward_models.tokenizer.fingerprint != tokenizer.fingerprint:
        both = f"{inputs.init} and {inputs.reward_folders['safety']}"
        raise InputError(f"{both} have different tokenizers; PPO scores the ids as sampled")
    return inputs


def _refresh(
    inputs: _Inputs, policy: Transformer, tokenizer: Tokenizer, stage: Stage
) -> tuple[dict[str, Path], dict]:
    """Fresh preferences between the policy's answers, on which the reward models learn on.

    Returns:
        ({axis: folder of the refreshed reward model}, {axis: accuracy of the one before on the
        fresh pairs}); without an annotator the reward models stay.
    """
    settings = stage.settings
    if settings.annotator == "none":
        return inputs.reward_folders, {}
    round_settings = replace(
        RoundSettings(**ROUND_PRESETS[settings.preset]),
        out=settings.out,
        annotator=settings.annotator,
        helpfulness_pairs=settings.helpfulness_pairs,
        safety_pairs=settings.safety_pairs,
        max_new_tokens=settings.max_new_tokens,
        micro_tokens=settings.micro_tokens,
        seed=settings.seed,
    )
    return refresh_reward_models(
        [policy],
        tokenizer,
        inputs.prompts,
        inputs.reward_folders,
        round_settings,
        label=stage.name,
        number=100,  # of the randomness: beyond any round's
        earlier=inputs.earlier,
        folder=stage.folder,
        dtype=stage.dtype,
    )


@dataclass
class _Training:
    """Five models, and how far the run is, which is what a killed one goes on with."""

    folder: Path  # of the checkpoint, the best policy so far, the log and some answers
    policy: Transformer
    reference: Transformer  # π_0
    critic: Critic
    reward_models: RewardModels
    optimizers: dict[str, torch.optim.Optimizer]  # of "policy" and "critic"
    first: int = 0  # the first iteration that is still to be made
    best: dict = field(default_factory=lambda: {"reward": -math.inf})  # what `held_out` found
    stale: int = 0  # looks at held-out prompts since then

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.folder / "metrics.jsonl")
        self.answers_file = self.folder / "rollouts.jsonl"
        self.checkpoint_file = self.folder / "checkpoint-ppo.pth"
        self.best_file = self.folder / "checkpoint-best.pth"
        self.saved = {
            "policy": self.policy,
            "critic": self.critic,
            "policy optimizer": self.optimizers["policy"],
            "critic optimizer": self.optimizers["critic"],
        }

    def save(self, next_iteration: int) -> None:
        state = {name: part.state_dict() for name, part in self.saved.items()}
        state["iteration"] = next_iteration
        state["best"] = self.best
        state["stale"] = self.stale
        save_checkpoint(self.checkpoint_file, state)

    def resume(self, iterations: int, device: torch.device) -> None:
        """Goes on where a killed run was; the logs forget what is about to be made again.

        iterations: of the whole run. InputError where the checkpoint is not one of this run.
        """
        file = self.checkpoint_file
        if file.exists():
            counts = {"iteration": iterations, "stale": iterations}
            state = restore_checkpoint(file, self.saved, device, counts)
            best = state.get("best")
            if not isinstance(best, dict) or not {"reward", "start"} <= best.keys():
                raise InputError(f"{file}: it does not tell the best so far; --fresh starts over")
            self.first = state["iteration"]
            self.best = state["best"]
            self.stale = state["stale"]
        self.metrics.rewind("ppo", self.first)
        self.metrics.rewind("held-out", self.first)
        answers = resume_rows(self.answers_file)
        kept = [row for row in answers if row["iteration"] < self.first]
        write_jsonl(self.answers_file, kept)

    def log(
        self,
        iteration: int,
        prompts: list[Prompt],
        batch: Rollout,
        numbers: dict[str, float],
        settings: Settings,
    ) -> None:
        """The numbers of an iteration, now and then with a few answers."""
        self.metrics.log("ppo", iteration, **numbers)
        if iteration % settings.evaluate_every == 0:
            scores = batch.scores.tolist()
            rows = []
            for i, prompt in enumerate(prompts[:8]):
                row = {"iteration": iteration, "prompt": prompt.messages}
                rows.append(row | batch.answers[i].to_json() | {"whitened": scores[i]})
            append_rows(self.answers_file, rows)


def _make_optimizers(
    policy: Transformer, critic: Critic, settings: Settings
) -> dict[str, torch.optim.Optimizer]:
    return {
        "policy": adamw(policy, settings.learning_rate, settings.weight_decay),
        "critic": adamw(critic, settings.value_learning_rate, settings.weight_decay),
    }


def _look(
    training: _Training, iteration: int, prompts: list[Prompt], settings: Settings
) -> dict[str, float]:
    """How good the policy is on held-out prompts (`held_out`), logged, with a few answers."""
    policy = training.policy
    measured = held_out(
        policy,
        training.reference,
        training.reward_models,
        prompts,
        settings,
        training.best.get("start"),
    )
    training.metrics.log("held-out", iteration, **measured)
    title = (
        f"iteration {iteration}: held-out reward {measured['reward']:.3f}, "
        f"KL {measured['kl']:.2f} nats per answer"
    )
    shown = [prompt.messages for prompt in prompts[:5]]
    show_answers(policy, training.reward_models.tokenizer, shown, title)
    return measured


def _keep_best(
    training: _Training, iteration: int, measured: dict[str, float], settings: Settings
) -> bool:
    """Keep the policy if it is the best so far; the start, looked at first, may stay the best.

    Returns:
        Whether the run ends: all iterations made, no better for long enough, or too far from π_0.
    """
    reward = measured["reward"]
    kl = measured["kl"]
    looked_at = measured | {"iteration": iteration}
    start = looked_at if iteration == 0 else training.best["start"]
    if iteration == 0 or (reward > training.best["reward"] and kl <= settings.max_kl):
        training.best = looked_at | {"start": start}
        training.stale = 0
        save_checkpoint(training.best_file, {"policy": training.policy.state_dict()})
    else:
        training.stale += 1
    if iteration == settings.iterations:
        return True
    return training.stale >= settings.patience or kl > settings.max_kl


def _draw_prompts(prompts: list[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    """So many prompts, in a new order."""
    copies = math.ceil(count / len(prompts))  # where prompts are few, one may come several times
    return rng.sample(prompts * copies, count)


def _update(
    training: _Training,
    iteration: int,
    batch: Rollout,
    rng: random.Random,
    settings: Settings,
    dtype: torch.dtype,
) -> dict[str, float]:
    """The second half of an iteration: one gradient step on each mini-batch of the rollout.

    Returns:
        Means of what `ppo_step` tells.
    """
    optimizers = training.optimizers
    if iteration < settings.value_warmup:  # the value network learns alone
        optimizers = {"critic": training.optimizers["critic"]}
    order = rng.sample(range(settings.batch), settings.batch)
    steps = []
    for start in range(0, settings.batch, settings.mini_batch):
        picked = order[start : start + settings.mini_batch]
        steps.append(
            ppo_step(training.policy, training.critic, optimizers, batch, picked, settings, dtype)
        )
    losses = {name: _mean([step[name] for step in steps]) for name in steps[0]}
    if not math.isfinite(losses["value_loss"] + losses.get("policy_loss", 0.0)):
        cure = "lower --learning-rate or --value-learning-rate"
        raise InputError(f"the loss of iteration {iteration} is not finite: {cure}")
    return losses


def _begin(first: int, inputs: _Inputs, stage: Stage) -> tqdm:
    """Says what begins; the bar stands where a killed run was."""
    settings = stage.settings
    prompts = f"{len(inputs.prompts):,} prompts, {len(inputs.held_out)} held out"
    iterations = f"{settings.iterations} iterations of {settings.batch}"
    print(f"{prompts}; {iterations}, on {stage.device} in {stage.dtype}")
    total = settings.iterations
    return tqdm(total=total, initial=first, desc="ppo", mininterval=1, disable=None)


def _advance(bar: tqdm, numbers: dict[str, float]) -> None:
    bar.update()
    text = f"reward {numbers['reward']:.3f}, KL {numbers['kl']:.2f}"
    bar.set_postfix_str(text, refresh=False)


def _results(
    iterations: int, best: dict, accuracies: dict, reward_folders: dict[str, Path]
) -> dict:
    """For the stage's record."""
    return {
        "iterations": iterations,
        "best": best,
        "refreshed": accuracies,
        "reward_models": {axis: str(path) for axis, path in reward_folders.items()},
    }


def _print_gain(best: dict, iterations: int) -> None:
    start = best["start"]
    rewards = f"reward {start['reward']:.3f} -> {best['reward']:.3f}"
    lengths = f"{start['length']:.1f} -> {best['length']:.1f} tokens"
    kept = f"best of {iterations} iterations: {best['iteration']}"
    print(f"\nheld-out prompts: {rewards}, {best['kl']:.2f} nats of KL, {lengths}; {kept}")


def main(argv: list[str] | None = None) -> None:
    # 1. the model to start from, its reward models, prompts to learn on and others held out
    settings = parse_settings(Settings, __doc__, PRESETS, argv)
    inputs = _find_inputs(settings)
    stage = Stage(settings, f"{inputs.init.name}-ppo")
    policy, tokenizer = load_model(inputs.init, stage.device)
    inputs = _check_inputs(inputs, policy, tokenizer, stage)
    files = {"model": inputs.init, "prompts": inputs.file, **inputs.reward_folders}
    if not stage.begin(files, aside=("init", "too_long")):
        return

    # 2. fresh preferences between two answers of that model (a round compares two models); the
    # reward models are refreshed on them
    reward_folders, accuracies = _refresh(inputs, policy, tokenizer, stage)

    # 3. five models: policy, reference, value network, two reward models
    reward_models = RewardModels(reward_folders, stage.device)
    reference = load_model(inputs.init, stage.device)[0].requires_grad_(False)
    body = inputs.init if settings.value_init == "policy" else reward_folders["helpfulness"]
    critic = Critic(load_model(body, stage.device)[0])
    optimizers = _make_optimizers(policy, critic, settings)
    training = _Training(stage.folder, policy, reference, critic, reward_models, optimizers)

    # 4. iterations: now and then a look at held-out prompts, which keeps the best policy and may
    # stop early; then sample and score, then update. The first iterations update the value network
    # alone. The look at 0 sees the start itself, and gives the value network's head its units.
    training.resume(settings.iterations, stage.device)
    bar = _begin(training.first, inputs, stage)
    for iteration in range(training.first, settings.iterations + 1):  # the last one only looks
        if iteration % settings.evaluate_every == 0 or iteration == settings.iterations:
            measured = _look(training, iteration, inputs.held_out, settings)
            if iteration == 0 and settings.value_init == "reward":
                helpfulness = reward_models.models["helpfulness"]
                critic.start_at(helpfulness, measured["scored"], measured["spread"])
            if _keep_best(training, iteration, measured, settings):
                break
        rng = random.Random(f"{settings.seed} ppo {iteration}")
        prompts = _draw_prompts(inputs.prompts, settings.batch, rng)
        key = (settings.seed, "ppo", iteration)
        batch = rollout(
            policy, reference, critic, reward_models, prompts, key, settings, stage.dtype
        )
        losses = _update(training, iteration, batch, rng, settings, stage.dtype)
        numbers = describe(batch, prompts) | losses
        training.log(iteration, prompts, batch, numbers, settings)
        if (iteration + 1) % SAVE_EVERY == 0:
            training.save(iteration + 1)
        _advance(bar, numbers)
    bar.close()

    # 5. save the best policy, measure it
    restore_checkpoint(training.best_file, {"policy": policy}, stage.device)
    save_model(stage.folder, policy, tokenizer)
    save_checkpoint(stage.folder / "critic.pth", critic.state_dict())  # as it is at the end
    results = _results(iteration, training.best, accuracies, reward_folders)
    _print_gain(training.best, iteration)
    # toy: the early stop chose the policy on these same dev prompts; eval.py asks others
    if settings.prompts == "toy":
        results["dev"] = evaluate_on_dev(stage.name, policy, tokenizer)
    stage.finish(results)


if __name__ == "__main__":
    run(main)
