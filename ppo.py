"""Proximal policy optimisation (PPO) on the last version of rejection sampling (paper §3.2.3, equations 3 and 4).

The paper: maximise the expected reward R(g|p) = R̃_c(g|p) - β KL(π_θ || π_0), where R̃_c is the combined reward's logit,
whitened, and π_0 the policy at the start. AdamW, constant learning rate 1e-6, 512 answers an iteration, mini-batches of 64
with one gradient step each, clip 0.2, β 0.01 (7B, 13B) or 0.005 (34B, 70B), 200 to 400 iterations, early stop on held-out
prompts.
Before it, fresh preferences on that policy, on which the reward models are refreshed, as before every round: without them
PPO finds what they have not seen. Ours, since the paper does not say: the value function is a network of its own, which
starts near the helpfulness model, its head included (one that starts as the policy learned too little about rewards in the
time there is), and learns alone for a few iterations; advantages by GAE with γ = 1, whitened over the answer tokens of an
iteration; KL token by token as log π/π_0 of what was sampled, whose sum over the answer is an unbiased estimate; the reward
stands at the answer's last token; the whitening of the reward also shifts its mean to 0, batch by batch; an answer that ran
into the length limit (or holds a tag) gets a fixed low reward; the policy samples at temperature 1 without top-p, so that
what was sampled is what is trained. Deleted: entropy bonus, clipping of the value loss, further passes over a batch,
adaptive β.

    python ppo.py                              from out/rlhf-v4 to out/rlhf-v4-ppo
    python ppo.py --init out/rlhf-v5           PPO after V5: out/rlhf-v5-ppo
"""

import math
import random
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import InputError, batches_by_length, has_tag, micro_batches, pad, read_prompts, toy, write_jsonl
from data.annotators import check_annotator
from eval import VERSIONS, evaluate_on_dev
from model import Transformer, generate, token_logprobs
from rejection_sampling import PRESETS as ROUND_PRESETS
from rejection_sampling import Judges, refresh_reward_models, share_gated
from rejection_sampling import Settings as RoundSettings
from reward import AXES, RewardModel
from runtime import (
    Metrics,
    append_rows,
    check_positive,
    choose_device,
    choose_dtype,
    encode_prompts,
    finish_stage,
    is_finished,
    kept_settings,
    load_checkpoint,
    load_model,
    newest_reward_models,
    open_stage,
    parse_settings,
    require,
    resume_rows,
    run,
    sample_answers,
    save_checkpoint,
    save_model,
    set_seed,
    set_threads,
    unusable,
)
from sft import adamw, show_answers


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # reads OUT/rlhf-v4 and its reward models, writes OUT/rlhf-v4-ppo
    init: str = ""  # the model to start from, which is also π_0; empty: OUT/rlhf-v4. Writes OUT/(its name)-ppo
    prompts: str = "toy"  # JSONL of prompts; one in ten of them (at most 256) is held out for the early stop
    max_prompts: int = 0  # use the first so many; 0: all
    annotator: Literal["toy", "human", "file", "none"] = "toy"  # of fresh pairs by the model to start from; none: no refresh
    helpfulness_pairs: int = 10000  # fresh preferences before PPO; our choice: more than a round's, since PPO goes further
    safety_pairs: int = 300  # the same for safety
    iterations: int = 50  # paper: 200 to 400
    batch: int = 256  # answers an iteration (paper: 512)
    mini_batch: int = 32  # answers a gradient step (paper: 64)
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 1.5e-4  # constant (paper: 1e-6); at 4e-4 steps are noise and facts are forgotten
    value_learning_rate: float = 1e-3  # of the value network; our choice
    weight_decay: float = 0.1  # paper
    clip: float = 0.2  # paper
    beta: float = 0.03  # weight of the KL penalty (paper: 0.01; 34B and 70B 0.005)
    shift_mean: bool = True  # the reward's whitening shifts the mean to 0, too; our choice
    gamma: float = 1.0  # discount; our choice: an answer is short
    lam: float = 0.95  # λ of generalised advantage estimation; our choice
    cut_reward: float = -2.0  # whitened reward of an answer without EOS, or with a tag; our choice
    value_init: Literal["policy", "reward"] = "reward"  # what the value network starts as; our choice
    value_warmup: int = 5  # iterations in which the value network learns alone; our choice
    max_new_tokens: int = 96  # longest answer
    evaluate_every: int = 10  # iterations between evaluations on held-out prompts
    held_out_samples: int = 2  # answers to each held-out prompt; our choice: with one, chance picks the best model
    patience: int = 3  # stop after so many evaluations without a better one
    max_kl: float = 3.0  # stop where the KL per answer exceeds so many nats; such a model is not kept
    save_every: int = 5  # iterations between checkpoints
    seed: int = 0  # of prompts, sampling and order
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete what is in the folder


PAPER = dict(annotator="none", iterations=400, batch=512, mini_batch=64, micro_tokens=8192, learning_rate=1e-6,
             value_learning_rate=1e-6, beta=0.01, max_new_tokens=1024, value_init="reward", max_kl=50.0, prompts="")
PRESETS = {
    "tiny": dict(helpfulness_pairs=40, safety_pairs=30, iterations=6, batch=16, mini_batch=8, value_warmup=1,
                 evaluate_every=2, save_every=2),
    "toy": {}, "small": dict(learning_rate=5e-5, value_learning_rate=2e-4, iterations=100),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-34b": PAPER | dict(beta=0.005),
    "llama-2-70b": PAPER | dict(beta=0.005),
}


@dataclass
class Rollout:
    """What one iteration knows of its answers. Slot t of a (batch, seq) tensor belongs to token t, prompt tokens included:
    its log-probability, the value of the state in which it was chosen (all tokens before t), its reward. Outside of the
    mask everything is 0.
    """

    rows: list[dict]  # (batch) text, ids, finish reason, both scores
    tokens: Tensor  # (batch, seq) prompt and answer as sampled, padded on the right
    mask: Tensor  # (batch, seq) bool: the answer's tokens, EOS included
    logprobs: Tensor  # (batch, seq) log π(token), by the policy as it sampled
    reference: Tensor  # (batch, seq) log π_0(token)
    values: Tensor  # (batch, seq) by the value network before the update
    scores: Tensor  # (batch) combined reward, a logit, whitened
    rewards: Tensor  # (batch, seq) -β KL at each token; the last one also gets the score
    advantages: Tensor  # (batch, seq) whitened
    returns: Tensor  # (batch, seq) what the value network learns


class Critic(nn.Module):
    """The value function: a transformer whose next-token head gives way to a scalar one, which starts at 0."""

    def __init__(self, body: Transformer):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.args.dim, 1, device=body.tok_embeddings.weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if not body.args.tie_word_embeddings:
            body.output.requires_grad_(False)  # not used

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens, mask (batch, seq) -> values (batch, seq), float32: at t of all tokens before t; 0 outside of the mask."""
        values = self.head(self.body.features(tokens[:, :-1])).squeeze(-1).float()  # (batch, seq - 1)
        return F.pad(values, (1, 0)).masked_fill(~mask, 0.0)  # (batch, seq)

    @torch.no_grad()
    def start_at(self, model: RewardModel, mean: float, spread: float) -> None:
        """Take over the reward model's head, in the units of whitened rewards: behind a text it then expects (score - mean) /
        spread. Only a start: a reward model's head has learned the state at EOS, and no other reward than its own. A head
        that also reads log-probabilities gives its direction only."""
        self.head.weight.copy_(model.head.weight / spread)
        if model.logprob_weights is None:
            self.head.bias.fill_(-(model.shift.item() + mean) / spread)


# ------------------------------------------------------------------------------------------------------------ equations


def whiten_rewards(scores: Tensor, shift_mean: bool = True) -> Tensor:
    """R̃_c = whiten(logit R_c) of equation 4: one number per answer, before the KL is taken off.

    Our choice: statistics of the iteration's own answers (the standard deviation with n), the mean shifted to 0. Without
    the shift only the spread becomes 1.

    Args:
        scores: (answers,) combined rewards as logits, such as `combine_rewards` gives them.

    >>> whiten_rewards(torch.tensor([1.0, 3.0, 5.0]))  # mean 3, standard deviation sqrt(8/3)
    tensor([-1.2247,  0.0000,  1.2247])
    """
    whitened = (scores - scores.mean()) / (scores.std(correction=0) + 1e-6)
    return whitened if shift_mean else whitened + scores.mean()


def whiten_advantages(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the tokens of the mask, 0 elsewhere. Our choice; the paper does not say.

    Args:
        advantages: (batch, seq). mask: (batch, seq) bool; padding may hold anything.

    >>> whiten_advantages(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.0000,  1.0000,  0.0000]])
    """
    picked = advantages[mask]  # (answer tokens)
    whitened = (advantages - picked.mean()) / (picked.std(correction=0) + 1e-6)
    return whitened.masked_fill(~mask, 0.0)


def kl_penalty(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """KL(π_θ || π_0) of equation 4, estimated token by token: log π_θ(token) - log π_0(token), 0 outside of the mask.

    Our choice: of what π_θ sampled itself, the sum over an answer has the KL as its mean. A single one may be negative.

    Args:
        logprobs, reference: (batch, seq) log-probabilities of the same tokens in nats. mask: (batch, seq) bool.

    >>> kl_penalty(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]), torch.tensor([[True, True]])).tolist()
    [[0.5, -1.0]]
    """
    return (logprobs - reference).masked_fill(~mask, 0.0)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R of equation 4, spread over an answer: -β KL at each token; the last one (EOS) also gets the answer's score.

    Args:
        scores: (answers,) whitened. kl: (answers, seq) as `kl_penalty` gives it. mask: (answers, seq) bool.

    >>> token_rewards(torch.tensor([3.0]), torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[True, True, False]]), beta=0.5)
    tensor([[-0.5000,  2.0000,  0.0000]])
    """
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # (answers, seq): the only one with no further one behind it
    return -beta * kl + last * scores[:, None]  # (answers, seq)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): A_t = δ_t + γλ A_{t+1}, δ_t = r_t + γ V_{t+1} - V_t.

    Behind an answer's last token nothing comes: value and advantage are 0 there, after EOS and at the length limit alike
    (our choice: such an answer has its fixed reward).

    Args:
        rewards, values: (batch, seq). mask: (batch, seq) bool, one run of true per row.

    Returns:
        (advantages, returns), (batch, seq) each, 0 outside of the mask. returns = advantages + values.

    >>> one = torch.ones(1, 2, dtype=torch.bool)  # δ = 0 + 3 - 1 = 2 and 4 - 3 = 1
    >>> gae(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 3.0]]), one, gamma=1.0, lam=0.5)
    (tensor([[2.5000, 1.0000]]), tensor([[3.5000, 4.0000]]))
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)  # (batch, seq)
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])  # (batch, seq), (batch)
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)  # (batch)
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (batch)
        following = (delta + gamma * lam * following) * mask[:, t]  # (batch)
        advantages[:, t] = following
    return advantages, advantages + values


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """PPO's clipped objective, negated: -min(r A, clip(r, 1 - ε, 1 + ε) A) with the ratio r = π_θ(token) / π_old(token).

    The smaller of the two, so that a step which already went far is not rewarded for going further, and one that went the
    wrong way is always called back.

    Args:
        logprobs, old, advantages: (batch, seq), of the policy now, of the policy that sampled. mask: (batch, seq) bool.

    Returns:
        (batch, seq) losses, 0 outside of the mask; the caller divides by the tokens of the whole step.

    >>> now = torch.tensor([[2.0, 2.0, 0.5]]).log()  # ratios against log-probabilities of 0
    >>> policy_loss(now, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, -1.0]]), torch.ones(1, 3, dtype=torch.bool))
    tensor([[-1.2000,  2.0000,  0.8000]])
    """
    ratio = (logprobs - old).masked_fill(~mask, 0.0).exp()  # (batch, seq)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)  # (batch, seq)
    return -objective.masked_fill(~mask, 0.0)


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the squared error of the value, (batch, seq), 0 outside of the mask. Our choice: no clipping.

    >>> value_loss(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[True, False]]))
    tensor([[2., 0.]])
    """
    return (0.5 * (values - returns) ** 2).masked_fill(~mask, 0.0)


# -------------------------------------------------------------------------------------------------------- one iteration


def answer_logprobs(model: Transformer, tokens: Tensor, mask: Tensor) -> Tensor:
    """log p(token) under the model itself (temperature 1) where the mask is true, 0 elsewhere: (batch, seq), float32."""
    before = model.features(tokens[:, :-1])[mask[:, 1:]]  # (answer tokens, dim): the position before each
    found = token_logprobs(model.output(before).float(), tokens[mask])  # (answer tokens)
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(mask, found)  # (batch, seq)


def pad_answers(prompts: list[list[int]], answers: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts with their answers as (tokens, mask), (batch, seq) each, padded on the right; the mask is true on the answers.

    >>> pad_answers([[1, 5], [1]], [[8, 2], [9]], "cpu")[1].int().tolist()
    [[0, 0, 1, 1], [0, 1, 0, 0]]
    """
    pairs = list(zip(prompts, answers, strict=True))
    tokens = pad([prompt + answer for prompt, answer in pairs])  # (batch, seq)
    mask = pad([[False] * len(prompt) + [True] * len(answer) for prompt, answer in pairs], False)  # (batch, seq)
    return tokens.to(device), mask.to(device)


@torch.no_grad()
def rollout(policy: Transformer, reference: Transformer, critic: Critic, judges: Judges, prompts: list[dict], key: tuple,
            s: Settings, dtype: torch.dtype = torch.float32) -> Rollout:
    """Phases 1 to 3 of an iteration: an answer to each prompt, its rewards, its advantages.

    Args:
        prompts: {"prompt": messages, "is_safety": bool, …}, one for each answer. key: of the randomness; the answer's
            number in the batch is added to it.
    """
    # 1. sample, at temperature 1; the ids go on as they were sampled
    tokenizer, device = judges.tokenizer, policy.tok_embeddings.weight.device
    key = tuple(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key)
    encoded = encode_prompts(tokenizer, prompts, policy.args.max_seq_len)
    found = {}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in batches_by_length([len(ids) + s.max_new_tokens for ids in encoded], 2 * s.micro_tokens):
            answers = generate(policy, [encoded[i] for i in batch], [(*key, i) for i in batch], s.max_new_tokens, 1.0,
                               eos_id=tokenizer.eos_id)
            found |= dict(zip(batch, answers, strict=True))
    answers = [found[i] for i in range(len(encoded))]
    tokens, mask = pad_answers(encoded, [answer.ids for answer in answers], device)  # (batch, seq) each
    sampled = torch.tensor([value for answer in answers for value in answer.logprobs], device=device)  # (answer tokens)
    logprobs = torch.zeros(tokens.shape, device=device).masked_scatter(mask, sampled)  # (batch, seq)

    # 2. score: both reward models, whitened; what the reference policy thinks of the same tokens
    rows = []
    for i, answer in enumerate(answers):
        text = tokenizer.decode(answer.ids).strip()
        rows.append({"index": i, "answer": text, "answer_ids": answer.ids, "finish_reason": answer.finish_reason,
                     "has_tag": has_tag(text)})
    scores = whiten_rewards(judges.rewards(prompts, rows), s.shift_mean).to(device)  # (batch)
    scores[torch.tensor([bool(unusable(row)) for row in rows], device=device)] = s.cut_reward
    before, values = torch.zeros_like(logprobs), torch.zeros_like(logprobs)  # (batch, seq) each
    for picked, length in micro_batches(mask, list(range(len(rows))), s.micro_tokens):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            before[picked, :length] = answer_logprobs(reference, tokens[picked, :length], mask[picked, :length])
            values[picked, :length] = critic(tokens[picked, :length], mask[picked, :length])

    # 3. advantages: the KL is paid at each token, the score comes with the last
    rewards = token_rewards(scores, kl_penalty(logprobs, before, mask), mask, s.beta)  # (batch, seq)
    advantages, returns = gae(rewards, values, mask, s.gamma, s.lam)
    return Rollout(rows, tokens, mask, logprobs, before, values, scores, rewards, whiten_advantages(advantages, mask), returns)


def ppo_step(policy: Transformer, critic: Critic, optimizers: dict[str, torch.optim.Optimizer], batch: Rollout,
             picked: list[int], s: Settings, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """One gradient step on one mini-batch, of both networks; {} has no "policy": of the value network alone.

    The losses are means over the answer tokens of the whole mini-batch, also where it is read in several micro-batches.

    Args:
        optimizers: {"policy": …, "critic": …}. picked: the mini-batch's rows of the rollout.

    Returns:
        {"policy_loss", "value_loss", "clip_fraction", "grad_norm"}; without a policy step only the value loss is there.
    """
    device, count = batch.tokens.device, batch.mask[picked].sum()
    sums = {}
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    for rows, length in micro_batches(batch.mask, picked, s.micro_tokens):
        tokens, mask, old, advantages, returns = (
            x[rows, :length] for x in (batch.tokens, batch.mask, batch.logprobs, batch.advantages, batch.returns))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = {"value_loss": value_loss(critic(tokens, mask), returns, mask).sum()}
            if "policy" in optimizers:
                logprobs = answer_logprobs(policy, tokens, mask)  # (micro-batch, length)
                found["policy_loss"] = policy_loss(logprobs, old, advantages, mask, s.clip).sum()
                moved = (logprobs.detach() - old)[mask].exp() - 1  # (answer tokens)
        (sum(found.values()) / count).backward()
        if "policy" in optimizers:
            found["clip_fraction"] = (moved.abs() > s.clip).sum()
        sums = {name: sums.get(name, 0.0) + value.item() / count.item() for name, value in found.items()}
    for name, optimizer in optimizers.items():
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()  # paper: clipped at 1.0
        sums |= {"grad_norm": norm} if name == "policy" else {}
        optimizer.step()
    return sums


def describe(batch: Rollout, prompts: list[dict]) -> dict[str, float]:
    """The numbers of a rollout that tell how PPO is doing, for the log.

    `entropy` is the mean of -log π over what was sampled, in nats per token. `explained_variance` is 1 where the value
    network foresees the returns, 0 where it knows no more than their mean. `gated`: share of the answers to untagged
    prompts that the safety model took over.
    """
    n, mask = len(batch.rows), batch.mask
    kl = kl_penalty(batch.logprobs, batch.reference, mask).sum(1)  # (batch)
    error, spread = (batch.returns - batch.values)[mask].var(), batch.returns[mask].var()
    return {"reward": sum(row["reward"] for row in batch.rows) / n,
            **{axis: sum(row[axis] for row in batch.rows) / n for axis in AXES},
            "gated": share_gated(prompts, batch.rows),
            "reward_whitened": batch.scores.mean().item(), "objective": batch.rewards.sum(1).mean().item(),
            "kl": kl.mean().item(), "entropy": -batch.logprobs[mask].mean().item(),
            "explained_variance": 1 - (error / spread.clamp(min=1e-8)).item(),
            "length": mask.sum().item() / n, "cut": sum(bool(unusable(row)) for row in batch.rows) / n}


@torch.no_grad()
def held_out(policy: Transformer, reference: Transformer, judges: Judges, prompts: list[dict], s: Settings) -> dict[str, float]:
    """Mean combined reward and its standard deviation ("spread"), KL per answer in nats and length on held-out prompts; equal
    random numbers each time."""
    rows = sample_answers(policy, judges.tokenizer, prompts, key=(s.seed, "ppo held-out"), samples=s.held_out_samples,
                          max_new_tokens=s.max_new_tokens, desc="held-out")
    rewards = judges.rewards(prompts, rows)  # (answers)
    encoded, device = encode_prompts(judges.tokenizer, prompts, policy.args.max_seq_len), policy.tok_embeddings.weight.device
    tokens, mask = pad_answers([encoded[row["index"]] for row in rows], [row["answer_ids"] for row in rows], device)
    reference_sum = torch.zeros(len(rows), device=device)  # (answers) log π_0(answer)
    for picked, length in micro_batches(mask, list(range(len(rows))), s.micro_tokens):
        reference_sum[picked] = answer_logprobs(reference, tokens[picked, :length], mask[picked, :length]).sum(1)
    kl = sum(row["logprob"] for row in rows) / len(rows) - reference_sum.mean().item()
    spread = max(1e-6, rewards.std().item()) if len(rows) > 1 else 1.0
    return {"reward": rewards.mean().item(), "spread": spread, "kl": kl, "length": mask.sum().item() / len(rows),
            **{axis: sum(row[axis] for row in rows) / len(rows) for axis in AXES}}


def main(argv: list[str] | None = None) -> None:
    # 1. settings, prompts, models
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    check_positive(s, "helpfulness_pairs", "safety_pairs", "iterations", "batch", "mini_batch", "micro_tokens", "learning_rate",
                   "value_learning_rate", "clip", "max_new_tokens", "evaluate_every", "held_out_samples", "patience", "max_kl",
                   "save_every", or_zero=("beta", "value_warmup", "weight_decay", "max_prompts"))
    if not (0 <= s.gamma <= 1 and 0 <= s.lam <= 1):
        raise InputError(f"wanted: --gamma and --lam from 0 to 1 (are {s.gamma}, {s.lam})")
    set_threads(s.threads)
    set_seed(s.seed)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    init = require(s.init or s.out / "rlhf-v4", "python rejection_sampling.py")
    older = VERSIONS[: VERSIONS.index(init.name if init.name in VERSIONS else "rlhf-v4-ppo")]  # a control's: V1 to V4
    folder, earlier = s.out / f"{init.name}-ppo", [*(s.out / name for name in older if is_finished(s.out / name)), init]
    judge_folders = newest_reward_models(s.out, earlier)  # its own, where it has them
    if not s.prompts:
        raise InputError(f"--preset {s.preset} needs prompts: --prompts FILE.jsonl")
    train_file = toy.ensure() / "prompts-train.jsonl" if s.prompts == "toy" else Path(s.prompts)
    prompts = read_prompts(train_file)[: s.max_prompts or None]
    if s.prompts == "toy":
        dev = read_prompts(toy.FOLDER / "prompts-dev.jsonl")
    else:
        order = random.Random(f"{s.seed} held-out").sample(prompts, len(prompts))
        held = min(256, max(1, len(order) // 10))
        dev, prompts = order[:held], order[held:]
    if not prompts:
        raise InputError(f"{train_file}: one prompt is too few; one in ten, at least one, is held out for the early stop")
    policy, tokenizer = load_model(init, device)
    encode_prompts(tokenizer, prompts + dev, policy.args.max_seq_len)  # tells of a prompt that cannot be used
    check_annotator(s.annotator, prompts)
    if Judges(judge_folders, device).tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"{init} and {judge_folders['safety']} have different tokenizers; PPO scores the ids as sampled")
    started = open_stage(folder, kept_settings(s, "init"), {"model": init, "prompts": train_file, **judge_folders}, s.fresh)
    if not started:
        return

    # 2. fresh preferences on the model to start from, on which the reward models are refreshed, as before every round
    tables = {}
    if s.annotator != "none":
        shared = ("out", "annotator", "helpfulness_pairs", "safety_pairs", "max_new_tokens", "micro_tokens", "seed")
        fresh = replace(RoundSettings(), **ROUND_PRESETS[s.preset] | {name: getattr(s, name) for name in shared})
        judge_folders, tables = refresh_reward_models([policy], tokenizer, prompts, judge_folders, fresh, label=folder.name,
                                                      number=100, earlier=earlier, folder=folder, dtype=dtype)

    # 3. five models: policy, reference, value network, two reward models
    judges = Judges(judge_folders, device)
    reference = load_model(init, device)[0].requires_grad_(False)
    critic = Critic(load_model(init if s.value_init == "policy" else judge_folders["helpfulness"], device)[0])
    optimizers = {"policy": adamw(policy, s.learning_rate, s.weight_decay),
                  "critic": adamw(critic, s.value_learning_rate, s.weight_decay)}
    parts = {"policy": policy, "critic": critic, **{f"{name} optimizer": x for name, x in optimizers.items()}}

    # 4. go on where a killed run was
    checkpoint, best_file, samples = folder / "checkpoint-ppo.pth", folder / "checkpoint-best.pth", folder / "rollouts.jsonl"
    first, best, stale = 0, {"reward": -math.inf}, 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, device)
        first, best, stale = state["iteration"], state["best"], state["stale"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.rewind("ppo", first)
    metrics.rewind("held-out", first)
    write_jsonl(samples, [row for row in resume_rows(samples) if row["iteration"] < first])
    print(f"{len(prompts):,} prompts, {len(dev)} held out; {s.iterations} iterations of {s.batch}, on {device} in {dtype}")

    # 5. iterations: sample, score, advantages (see `rollout`), update; now and then the early stop's look at other prompts
    bar = tqdm(total=s.iterations, initial=first, desc="ppo", mininterval=1, disable=None)
    for iteration in range(first, s.iterations + 1):
        if iteration % s.evaluate_every == 0 or iteration == s.iterations:
            found = held_out(policy, reference, judges, dev, s) | {"iteration": iteration}
            metrics.log("held-out", iteration, **{k: v for k, v in found.items() if k != "iteration"})
            start = found if iteration == 0 else best["start"]
            if iteration == 0 and s.value_init == "reward":
                shift = found["reward"] * (1 if s.shift_mean else 1 - found["spread"])  # see `whiten_rewards`
                critic.start_at(judges.models["helpfulness"], shift, found["spread"])
            if found["reward"] > best["reward"] and found["kl"] <= s.max_kl:
                best, stale = found | {"start": start}, 0
                save_checkpoint(best_file, {"policy": policy.state_dict()})
            else:
                stale += 1
            show_answers(policy, tokenizer, [prompt["prompt"] for prompt in dev[:5]],
                         f"iteration {iteration}: held-out reward {found['reward']:.3f}, KL {found['kl']:.2f} nats per answer")
            if stale >= s.patience or found["kl"] > s.max_kl:
                break
        if iteration == s.iterations:
            break
        rng = random.Random(f"{s.seed} ppo {iteration}")
        picked = [prompts[i] for i in rng.sample([*range(len(prompts))] * -(-s.batch // len(prompts)), s.batch)]
        batch = rollout(policy, reference, critic, judges, picked, (s.seed, "ppo", iteration), s, dtype)
        used, steps, order = optimizers, [], rng.sample(range(s.batch), s.batch)
        if iteration < s.value_warmup:
            used = {"critic": optimizers["critic"]}
        for i in range(0, s.batch, s.mini_batch):
            steps.append(ppo_step(policy, critic, used, batch, order[i: i + s.mini_batch], s, dtype))
        numbers = describe(batch, picked) | {k: sum(step[k] for step in steps) / len(steps) for k in steps[0]}
        if not math.isfinite(numbers["value_loss"] + numbers.get("policy_loss", 0.0)):
            raise InputError(f"the loss of iteration {iteration} is not finite: lower --learning-rate or --value-learning-rate")
        metrics.log("ppo", iteration, **numbers)
        if iteration % s.evaluate_every == 0:
            append_rows(samples, [{"iteration": iteration, "prompt": prompt["prompt"], **row, "whitened": score} for prompt, row,
                                  score in zip(picked[:8], batch.rows[:8], batch.scores[:8].tolist(), strict=True)])
        bar.update()
        bar.set_postfix_str(f"reward {numbers['reward']:.3f}, KL {numbers['kl']:.2f}", refresh=False)
        if (iteration + 1) % s.save_every == 0:
            save_checkpoint(checkpoint, {name: part.state_dict() for name, part in parts.items()}
                            | {"iteration": iteration + 1, "best": best, "stale": stale})
    bar.close()

    # 6. save the best, measure
    policy.load_state_dict(load_checkpoint(best_file, device)["policy"])
    save_model(folder, policy, tokenizer)
    save_checkpoint(folder / "critic.pth", critic.state_dict())  # as it is at the end; for experiments/ppo_microscope.py
    results = {"iterations": iteration, "best": best, "refreshed": tables,
               "reward_models": {axis: str(path) for axis, path in judge_folders.items()}}
    print(f"\nheld-out prompts: reward {best['start']['reward']:.3f} -> {best['reward']:.3f}, {best['kl']:.2f} nats of KL, "
          f"{best['start']['length']:.1f} -> {best['length']:.1f} tokens; best of {iteration} iterations: {best['iteration']}")
    if s.prompts == "toy":
        results["dev"] = evaluate_on_dev(folder.name, policy, tokenizer)
    finish_stage(folder, results, started)


if __name__ == "__main__":
    run(main)
