"""PPO: each equation by hand and against plain Python; what flows through an iteration; the whole
command.
"""

import json
import math
import random
import re
import shutil

import pytest
import torch
import torch.nn.functional as F

import ppo
import runtime
from data import InputError, encode_prompt, micro_batches, world
from model import Generation, generate
from ppo import (
    Critic,
    Rollout,
    Settings,
    answer_logprobs,
    describe,
    gae,
    held_out,
    kl_penalty,
    pad_answers,
    policy_loss,
    ppo_step,
    rollout,
    token_rewards,
    value_loss,
    whiten_advantages,
    whiten_rewards,
)
from rejection_sampling import Judges
from reward import AXES, RewardModel, save_reward_model
from runtime import encode_prompts, load_checkpoint, load_model, newest_reward_models
from sft import adamw
from tests.helpers import (
    TINY,
    chain,
    run_quietly,
    tiny_model,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)
from tests.reference import policy as slow

NAN = float("nan")
SMALL = Settings(max_new_tokens=12, beta=0.2, lam=0.9, gamma=0.95, micro_tokens=100)


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Judges:
    """Two different reward models with random weights."""
    folders = {}
    for seed, axis in enumerate(AXES):
        torch.manual_seed(seed)
        folders[axis] = tmp_path_factory.mktemp(axis)
        model = RewardModel(tiny_model(seed))
        save_reward_model(folders[axis], model, toy_tokenizer())
    return Judges(folders, torch.device("cpu"))


@pytest.fixture(scope="module")
def batch(judges) -> Rollout:
    """One rollout of a random policy against another reference; the EOS is likely enough that some
    answers end early.
    """
    return rollout(
        talkative(3), tiny_model(4), lively_critic(), judges, toy_prompts(9), (0, "test", 5), SMALL
    )


def talkative(seed: int):
    """A random model that says EOS now and then: its row of the output matrix grows."""
    model = tiny_model(seed)
    model.output.weight.data[toy_tokenizer().eos_id] *= 4
    return model


def lively_critic(seed: int = 5) -> Critic:
    critic = Critic(tiny_model(seed))
    torch.manual_seed(seed)
    torch.nn.init.normal_(critic.head.weight, std=0.3)
    return critic


def ragged(seed: int, rows: int = 6, longest: int = 7) -> tuple[list[int], list[int], torch.Tensor]:
    """Where each row's answer begins and ends in a padded batch, and the mask; one fills the batch
    to its end.
    """
    rng = random.Random(seed)
    starts = [rng.randrange(1, 4) for _ in range(rows)]
    ends = [
        longest + 3 if row == 0 else start + rng.randrange(1, longest)
        for row, start in enumerate(starts)
    ]
    mask = torch.zeros(rows, longest + 3, dtype=torch.bool)
    for row in range(rows):
        mask[row, starts[row] : ends[row]] = True
    return starts, ends, mask


def cut_out(tensor: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    """The answers' own numbers as lists."""
    return [row[marks].tolist() for row, marks in zip(tensor, mask, strict=True)]


def assert_close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, two in zip(found, wanted, strict=True):
        assert one == pytest.approx(two, abs=2e-4)


# ---- equations ----


def test_whiten_rewards():
    """By hand: 2, 4, 9 have mean 5 and variance (9 + 1 + 16) / 3."""
    deviation = math.sqrt(26 / 3)
    scores = torch.tensor([2.0, 4.0, 9.0])
    assert whiten_rewards(scores).tolist() == pytest.approx(
        [-3 / deviation, -1 / deviation, 4 / deviation], abs=1e-5
    )
    unshifted = [5 - 3 / deviation, 5 - 1 / deviation, 5 + 4 / deviation]
    assert whiten_rewards(scores, shift_mean=False).tolist() == pytest.approx(unshifted, abs=1e-5)
    assert whiten_rewards(torch.full((4,), 7.0)).tolist() == [
        0,
        0,
        0,
        0,
    ], "equal scores: nothing to learn, no NaN"
    assert whiten_rewards(torch.tensor([7.0])).tolist() == [0]
    random_scores = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 4 + 3
    for shift in (True, False):
        found = whiten_rewards(random_scores, shift).tolist()
        assert found == pytest.approx(slow.whiten(random_scores.tolist(), shift), abs=1e-4)


def test_whiten_advantages():
    """Over the answers' tokens, whatever stands in the padding, and as one batch, not row by row.
    """
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    # 1, 3, 5: mean 3, variance 8/3
    advantages = torch.tensor([[50.0, 1.0, 3.0, -90.0], [5.0, 70.0, 80.0, 9.0]])
    step = 2 / math.sqrt(8 / 3)
    found = whiten_advantages(advantages, mask)
    assert found.flatten().tolist() == pytest.approx([0, -step, 0, 0, step, 0, 0, 0], abs=1e-5)
    garbage = advantages.masked_fill(~mask, NAN)
    assert torch.equal(whiten_advantages(garbage, mask), found)
    assert whiten_advantages(torch.ones(1, 3), torch.tensor([[True, True, False]])).tolist() == [
        [0, 0, 0]
    ]
    _, _, mask = ragged(0)
    numbers = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * 3 + 2
    wanted = iter(slow.whiten([x for row in cut_out(numbers, mask) for x in row]))
    assert whiten_advantages(numbers, mask)[mask].tolist() == pytest.approx(list(wanted), abs=1e-4)


def test_kl_penalty():
    """log π - log π_0 of the answers' tokens, its sign kept; nothing before the answer and nothing
    after EOS.
    """
    now, before = torch.tensor([[-1.0, -2.0, -0.5, -9.0]]), torch.tensor([[-4.0, -1.5, -1.5, NAN]])
    mask = torch.tensor([[False, True, True, False]])
    assert kl_penalty(now, before, mask).tolist() == [[0, -0.5, 1.0, 0]]


def test_kl_penalty_has_the_kl_as_its_mean():
    """Weighted by the sampling policy's own probabilities, the estimate is the KL divergence."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    # (3 tokens, 1)
    estimate = kl_penalty(p.log()[:, None], q.log()[:, None], torch.ones(3, 1, dtype=torch.bool))
    assert (p * estimate[:, 0]).sum().item() == pytest.approx(
        F.kl_div(q.log(), p, reduction="sum").item(), abs=1e-6
    )


def test_token_rewards():
    """The score stands at the last token of each answer, wherever that is, beside that token's KL.
    """
    mask = torch.tensor(
        [[False, True, True, True], [False, True, False, False], [True, True, False, False]]
    )
    kl = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    found = token_rewards(torch.tensor([10.0, 20.0, -5.0]), kl, mask, beta=0.1)
    wanted = [[0, -0.1, 0.2, 9.7], [0, 19.6, 0, 0], [0, -5.05, 0, 0]]
    assert found.tolist() == [pytest.approx(row, abs=1e-6) for row in wanted]
    assert token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, mask, beta=0.0).sum(1).tolist() == [
        1,
        2,
        3,
    ]


def test_gae():
    """Three tokens, γ = .5, λ = .5, by hand: δ = (1 + .5·4 - 2, 0 + .5·6 - 4, 8 - 6) = (1, -1, 2).
    """
    mask = torch.tensor([[False, True, True, True, False]])
    rewards, values = torch.tensor([[9.0, 1.0, 0.0, 8.0, 9.0]]), torch.tensor(
        [[9.0, 2.0, 4.0, 6.0, 9.0]]
    )
    # A = (1 + .25·-.5, -1 + .25·2, 2)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0, 0.875, -0.5, 2, 0]] and returns.tolist() == [
        [0, 2.875, 3.5, 8, 0]
    ]
    undiscounted = torch.tensor([[1.0, 2.0, 4.0]])
    every = torch.ones(1, 3, dtype=torch.bool)
    assert gae(undiscounted, torch.zeros(1, 3), every, 1.0, 1.0)[0].tolist() == [
        [7, 6, 4]
    ], "rewards to go"
    assert gae(undiscounted, torch.tensor([[3.0, 1.0, 5.0]]), every, 1.0, 0.0)[0].tolist() == [
        [-1, 6, -1]
    ], "one step"


def test_gae_ends_with_the_answer():
    """What stands behind EOS, be it not even a number, changes nothing: the value there is 0, not
    the critic's guess.
    """
    mask = torch.tensor([[True, True, False, False]])
    clean = gae(
        torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.25, 0.0, 0.0]]), mask, 0.9, 0.8
    )
    dirty = gae(
        torch.tensor([[1.0, 2.0, 50.0, NAN]]),
        torch.tensor([[0.5, 0.25, 70.0, NAN]]),
        mask,
        0.9,
        0.8,
    )
    assert all(torch.equal(one, two) for one, two in zip(clean, dirty, strict=True))
    assert (
        clean[0][0, 1].item() == 1.75 and clean[1][0, 1].item() == 2.0
    ), "the last return is the last reward"


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (0.0, 0.9)]
)
def test_gae_equals_the_slow_one(gamma, lam):
    _, _, mask = ragged(2)
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(0))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    both = [
        slow.gae(r, v, gamma, lam)
        for r, v in zip(cut_out(rewards, mask), cut_out(values, mask), strict=True)
    ]
    assert_close(cut_out(advantages, mask), [a for a, _ in both])
    assert_close(cut_out(returns, mask), [r for _, r in both])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_policy_loss():
    """Ratio 1.5 and .5 against a clip of .2, for both signs of the advantage; and what the gradient
    does there.
    """
    ratios, signs = torch.tensor([[1.5, 0.5, 1.1, 1.5, 0.5, 1.1]]), torch.tensor(
        [[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]]
    )
    old = torch.full((1, 6), -3.0)
    now = (old + ratios.log()).requires_grad_()
    found = policy_loss(now, old, signs, torch.ones(1, 6, dtype=torch.bool), clip=0.2)
    assert found[0].tolist() == pytest.approx([-2.4, -1.0, -2.2, 3.0, 1.6, 2.2], abs=1e-5)
    found.sum().backward()  # d(-rA)/d log π = -rA, and nothing where the clip holds
    assert now.grad[0].tolist() == pytest.approx([0, -1.0, -2.2, 3.0, 0, 2.2], abs=1e-5)


def test_policy_loss_outside_of_the_mask():
    """Padding adds nothing to the loss, and no NaN to the gradient."""
    now = torch.tensor([[-1.0, 300.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    found = policy_loss(
        now, torch.tensor([[-1.0, 0.0, NAN]]), torch.tensor([[2.0, 5.0, 5.0]]), mask
    )
    assert found.tolist() == [[-2, 0, 0]]
    found.sum().backward()
    assert now.grad.nan_to_num(7.0).tolist()[0][:2] == [-2, 0]


def test_policy_loss_equals_the_slow_one():
    now, old, advantages = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    for clip in (0.1, 0.2, 0.5):
        found = (
            policy_loss(now, old, advantages, torch.ones(5, 8, dtype=torch.bool), clip)
            .flatten()
            .tolist()
        )
        wanted = [
            slow.policy(*row, clip)
            for row in zip(*(x.flatten().tolist() for x in (now, old, advantages)), strict=True)
        ]
        assert found == pytest.approx(wanted, abs=1e-5)


def test_value_loss():
    values, returns = torch.tensor([[1.0, 5.0, 2.0]], requires_grad=True), torch.tensor(
        [[3.0, 0.0, 2.5]]
    )
    found = value_loss(values, returns, torch.tensor([[True, False, True]]))
    assert found.tolist() == [[2, 0, 0.125]]
    assert found[0, 2].item() == slow.value(2.0, 2.5) and found[0, 0].item() == slow.value(1.0, 3.0)
    found.sum().backward()
    assert values.grad.tolist() == [[-2, 0, -0.5]]


# ---- models ----


def test_critic_starts_at_the_reward_model(judges):
    """Behind a text's last token it expects (score - mean) / spread, the reward model's own score
    with its shift.
    """
    model = judges.models["helpfulness"]
    model.shift.fill_(0.7)
    # the body of that reward model
    critic, ids = Critic(tiny_model(0)), torch.tensor([[1, 5, 6, 7, 8]])
    critic.start_at(model, 2.0, 4.0)
    # (1, 6)
    found = critic(torch.tensor([[1, 5, 6, 7, 8, 2]]), torch.tensor([[False] * 5 + [True]]))
    wanted = (model(ids, torch.tensor([5])) - 2.0) / 4.0
    model.shift.zero_()
    assert found[0, 5].item() == pytest.approx(wanted.item(), abs=1e-5) and not found[0, :5].any()


def test_critic():
    """0 at the start; the value at t knows the tokens before t and no others; nothing outside of
    the mask.
    """
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 2:6] = True
    assert not Critic(tiny_model())(tokens, mask).any()
    critic = lively_critic()
    values = critic(tokens, mask)
    assert values.shape == (2, 9) and values[mask].all() and not values[~mask].any()
    features = critic.body.features(tokens)  # (2, 9, dim)
    assert values[0, 5].item() == pytest.approx(
        (features[0, 4] @ critic.head.weight[0]).item(), abs=1e-5
    )
    changed = tokens.clone()
    changed[0, 5:] = 7
    again = critic(changed, mask)
    assert torch.allclose(again[0, :6], values[0, :6], atol=1e-5) and not torch.allclose(
        again[0, 6:], values[0, 6:], atol=1e-3
    )
    assert not [
        name
        for name, weight in critic.named_parameters()
        if weight.requires_grad and "output" in name
    ]


def test_answer_logprobs():
    """Those of the whole forward pass, of the tokens that stand there, at temperature 1; gradients
    flow.
    """
    model, mask = tiny_model(1), torch.zeros(2, 8, dtype=torch.bool)
    tokens = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    mask[0, 2:8] = mask[1, 4:6] = True
    found = answer_logprobs(model, tokens, mask)
    table = model(tokens).log_softmax(-1)  # (2, 8, vocab)
    for row in range(2):
        for t in range(8):
            wanted = table[row, t - 1, tokens[row, t]].item() if mask[row, t] else 0.0
            assert found[row, t].item() == pytest.approx(wanted, abs=1e-5)
    found.sum().backward()
    assert model.output.weight.grad.abs().sum() > 0


def test_micro_batches():
    """Each picked row once, with room for its last token; one batch where there is room for one."""
    _, ends, mask = ragged(3)
    picked = [4, 0, 5, 2]
    for tokens in (1, 12, 1000):
        found = micro_batches(mask, picked, tokens)
        assert sorted(row for rows, _ in found for row in rows) == sorted(picked)
        assert all(length == max(ends[row] for row in rows) for rows, length in found)
        assert all(len(rows) == 1 or len(rows) * length <= tokens for rows, length in found)
    assert len(found) == 1


def test_pad_answers():
    """The answer begins where its own prompt ends; an id that also stands in the padding counts
    where it was sampled.
    """
    tokens, mask = pad_answers([[1, 4, 5], [1], [1, 7]], [[0], [8, 0, 2], [2]], torch.device("cpu"))
    assert tokens.tolist() == [[1, 4, 5, 0], [1, 8, 0, 2], [1, 7, 2, 0]]
    assert mask.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0]]


# ---- one iteration ----


def test_rollout_samples_as_the_model_is(batch):
    """At temperature 1, keyed by the answer's number; ids, log-probabilities and mask are those of
    the sampling.
    """
    policy, prompts = talkative(3), toy_prompts(9)
    encoded = encode_prompts(toy_tokenizer(), prompts, 256)
    found = generate(
        policy,
        encoded,
        [(0, ppo.zlib.crc32(b"test"), 5, i) for i in range(9)],
        12,
        1.0,
        eos_id=toy_tokenizer().eos_id,
    )
    assert len({tuple(answer.ids) for answer in found}) > 5 and {
        answer.finish_reason for answer in found
    } == {"eos", "length"}
    for i, answer in enumerate(found):
        start, end = len(encoded[i]), len(encoded[i]) + len(answer.ids)
        assert (
            batch.rows[i]["answer_ids"] == answer.ids
            and batch.rows[i]["finish_reason"] == answer.finish_reason
        )
        assert batch.tokens[i, :end].tolist() == encoded[i] + answer.ids
        assert batch.mask[i].nonzero().flatten().tolist() == list(
            range(start, end)
        ), "EOS counts, nothing after it"
        assert batch.logprobs[i, start:end].tolist() == pytest.approx(answer.logprobs, abs=1e-4)


def test_rollout_keeps_the_ids_as_sampled(judges, monkeypatch):
    """Where the text of an answer, encoded again, would be other tokens: the sampled ones are
    scored and trained.
    """
    tokenizer, scored = toy_tokenizer(), []
    ids = [tokenizer.encode(letter)[0] for letter in "lion"] + [tokenizer.eos_id]
    assert tokenizer.encode(tokenizer.decode(ids)) + [tokenizer.eos_id] != ids
    monkeypatch.setattr(
        ppo,
        "generate",
        lambda model, prompts, *_, **__: [Generation(ids, [-1.0] * 5, "eos") for _ in prompts],
    )
    monkeypatch.setattr(
        judges,
        "rewards",
        lambda prompts, rows: scored.extend(row["answer_ids"] for row in rows) or torch.ones(2),
    )
    batch = rollout(
        tiny_model(), tiny_model(), lively_critic(), judges, toy_prompts(2), (0, "test"), SMALL
    )
    assert scored == [ids, ids] == [row["answer_ids"] for row in batch.rows]
    assert [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)] == [
        ids,
        ids,
    ]
    assert batch.logprobs[batch.mask].tolist() == [-1.0] * 10


def test_rollout_logprobs_equal_those_of_training(batch):
    """So the ratio of the first step is 1."""
    again = answer_logprobs(talkative(3), batch.tokens, batch.mask)
    assert torch.allclose(again, batch.logprobs, atol=1e-4) and not again[~batch.mask].any()
    assert torch.allclose(
        answer_logprobs(tiny_model(4), batch.tokens, batch.mask), batch.reference, atol=1e-4
    )
    assert torch.allclose(lively_critic()(batch.tokens, batch.mask), batch.values, atol=1e-4)
    assert (batch.reference - batch.logprobs).abs().max() > 0.1 and batch.values.abs().max() > 0.1


def test_rollout_equals_the_slow_one(batch, judges):
    """From the scores on: whitened before the KL, the KL on each token, the score on the last, GAE,
    whitened over tokens.
    """
    raw = judges.rewards(toy_prompts(9), [dict(row) for row in batch.rows]).tolist()
    assert [row["reward"] for row in batch.rows] == pytest.approx(raw, abs=1e-3)
    usable = [row["finish_reason"] == "eos" and bool(row["answer"]) for row in batch.rows]
    assert len(set(usable)) == 2
    scores = [x if ok else SMALL.cut_reward for x, ok in zip(slow.whiten(raw), usable, strict=True)]
    assert batch.scores.tolist() == pytest.approx(scores, abs=1e-4)
    parts = [cut_out(x, batch.mask) for x in (batch.logprobs, batch.reference, batch.values)]
    rewards = [
        slow.rewards(score, p, q, SMALL.beta)
        for score, p, q in zip(scores, *parts[:2], strict=True)
    ]
    both = [slow.gae(r, v, SMALL.gamma, SMALL.lam) for r, v in zip(rewards, parts[2], strict=True)]
    advantages = iter(slow.whiten([a for row, _ in both for a in row]))
    assert_close(cut_out(batch.rewards, batch.mask), rewards)
    assert_close(cut_out(batch.returns, batch.mask), [returns for _, returns in both])
    assert_close(
        cut_out(batch.advantages, batch.mask), [[next(advantages) for _ in row] for row, _ in both]
    )
    for tensor in (
        batch.rewards,
        batch.advantages,
        batch.returns,
        batch.values,
        batch.reference,
        batch.logprobs,
    ):
        assert not tensor[~batch.mask].any(), "nothing in the prompt, nothing after EOS"


class Frozen:
    """An optimiser that clears gradients and changes nothing, so that they can be looked at."""

    def __init__(self, model):
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.param_groups = [{"params": self.weights}]

    def zero_grad(self):
        for weight in self.weights:
            weight.grad = None

    def step(self):
        pass


def gradient(model) -> torch.Tensor:
    return torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )


def test_ppo_step_is_reinforce():
    """No whitening, value 0, γ = λ = 1, β = 0, ratio 1: the gradient is that of -R log π(answer),
    the textbook's.
    """
    policy, scores = talkative(3), torch.tensor([1.5, -2.0, 0.5])
    prompts = encode_prompts(toy_tokenizer(), toy_prompts(3), 256)
    answers = generate(
        policy, prompts, [(1, i) for i in range(3)], 12, 1.0, eos_id=toy_tokenizer().eos_id
    )
    # (3, seq) each
    tokens, mask = pad_answers(prompts, [answer.ids for answer in answers], torch.device("cpu"))
    zero = torch.zeros(tokens.shape)
    logprobs = answer_logprobs(policy, tokens, mask).detach()
    rewards = token_rewards(scores, kl_penalty(logprobs, zero, mask), mask, beta=0.0)
    advantages, returns = gae(rewards, zero, mask, gamma=1.0, lam=1.0)
    batch = Rollout([], tokens, mask, logprobs, zero, zero, scores, rewards, advantages, returns)
    policy_optimizer, critic = Frozen(policy), Critic(tiny_model())
    s = Settings(clip=0.2, micro_tokens=10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
        ppo_step(
            policy,
            critic,
            {"policy": policy_optimizer, "critic": Frozen(critic)},
            batch,
            [0, 1, 2],
            s,
        )
    found = gradient(policy)
    policy_optimizer.zero_grad()
    loss = torch.zeros(())
    # one by one, without padding
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        logits = policy(torch.tensor([prompt + answer.ids]))[0]  # (seq, vocab)
        for t, token in enumerate(answer.ids, start=len(prompt)):
            loss = loss - score * logits[t - 1].log_softmax(-1)[token]
    (loss / sum(len(answer.ids) for answer in answers)).backward()
    wanted = gradient(policy)
    assert found.norm() > 0.1 and torch.allclose(found, wanted, atol=1e-4 * wanted.abs().max())


def test_ppo_step_counts_tokens_not_batches(batch):
    """However a mini-batch is cut into micro-batches, the gradient of both networks is that of the
    whole.
    """
    found = []
    for micro_tokens in (1, 60, 10**6):
        policy, critic = tiny_model(6), lively_critic()
        s = Settings(micro_tokens=micro_tokens)
        optimizers = {"policy": Frozen(policy), "critic": Frozen(critic)}
        if micro_tokens == 60:
            # a step before: nothing of its gradient is left
            ppo_step(policy, critic, optimizers, batch, [3, 4], s)
        numbers = ppo_step(policy, critic, optimizers, batch, [7, 1, 2, 8, 0], s)
        found.append((gradient(policy), gradient(critic), numbers))
    for policy, critic, numbers in found[:2]:
        assert torch.allclose(policy, found[2][0], atol=1e-5) and torch.allclose(
            critic, found[2][1], atol=1e-5
        )
        assert numbers == pytest.approx(found[2][2], abs=1e-4)
    rows = [7, 1, 2, 8, 0]
    mask = batch.mask[rows]
    now = answer_logprobs(tiny_model(6), batch.tokens[rows], mask)
    numbers = found[2][2]
    wanted = [
        slow.policy(*x, 0.2)
        for x in zip(
            *(y[mask].tolist() for y in (now, batch.logprobs[rows], batch.advantages[rows])),
            strict=True,
        )
    ]
    assert numbers["policy_loss"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    values = lively_critic()(batch.tokens[rows], mask)[mask].tolist()
    wanted = [slow.value(*x) for x in zip(values, batch.returns[rows][mask].tolist(), strict=True)]
    assert numbers["value_loss"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    far = ((now - batch.logprobs[rows])[mask].exp() - 1).abs() > 0.2
    assert (
        numbers["clip_fraction"] == pytest.approx(far.float().mean().item())
        and 0 < numbers["clip_fraction"] < 1
    )


def snapshot(*models) -> list[torch.Tensor]:
    return [tensor.clone() for model in models for tensor in model.state_dict().values()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_ppo_step_changes_what_it_should(judges):
    """Policy and value network move, by steps clipped to norm 1; reward models and reference do
    not.
    """
    policy, reference, critic = talkative(3), tiny_model(4), Critic(tiny_model(5))
    still, prompts = snapshot(reference, *judges.models.values()), toy_prompts(6)
    optimizers = {"policy": adamw(policy, 1e-3), "critic": adamw(critic, 1e-3)}
    batch = rollout(policy, reference, critic, judges, prompts, (0, "test"), SMALL)
    first = snapshot(policy), snapshot(critic)
    numbers = ppo_step(policy, critic, {"critic": optimizers["critic"]}, batch, [0, 1, 2], SMALL)
    assert (
        set(numbers) == {"value_loss"}
        and equal(snapshot(policy), first[0])
        and not equal(snapshot(critic), first[1])
    )
    numbers = ppo_step(policy, critic, optimizers, batch, [3, 4, 5], SMALL)
    assert numbers["clip_fraction"] == 0 and not equal(snapshot(policy), first[0])
    assert gradient(policy).norm().item() == pytest.approx(min(1.0, numbers["grad_norm"]), rel=1e-3)
    assert equal(snapshot(reference, *judges.models.values()), still)
    assert all(
        weight.grad is None
        for model in (reference, *judges.models.values())
        for weight in model.parameters()
    )


def test_ppo_step_raises_what_is_rewarded(judges):
    """A few steps on one rollout make its better answers likelier than its worse ones."""
    policy, critic, prompts = talkative(3), Critic(tiny_model(5)), toy_prompts(12)
    batch = rollout(
        policy,
        talkative(3),
        critic,
        judges,
        prompts,
        (0, "test"),
        Settings(max_new_tokens=12, beta=0.0, lam=1.0),
    )
    optimizers = {"policy": adamw(policy, 3e-3), "critic": adamw(critic, 1e-3)}
    for _ in range(8):
        ppo_step(policy, critic, optimizers, batch, list(range(12)), SMALL)
    moved = (answer_logprobs(policy, batch.tokens, batch.mask) - batch.logprobs)[batch.mask]
    assert (moved * batch.advantages[batch.mask]).mean() > 0.01


def test_describe(batch):
    numbers = describe(batch, toy_prompts(9))
    p, q, values, returns = (
        cut_out(x, batch.mask)
        for x in (batch.logprobs, batch.reference, batch.values, batch.returns)
    )
    n = sum(map(len, p))
    assert numbers["length"] == n / 9 and numbers["entropy"] == pytest.approx(
        -sum(map(sum, p)) / n, abs=1e-4
    )
    assert numbers["kl"] == pytest.approx(
        sum(sum(a) - sum(b) for a, b in zip(p, q, strict=True)) / 9, abs=1e-3
    )
    flat = [r for row in returns for r in row]
    errors = [
        r - v for a, b in zip(returns, values, strict=True) for r, v in zip(a, b, strict=True)
    ]
    variance = [sum((x - sum(y) / n) ** 2 for x in y) for y in (errors, flat)]
    assert numbers["explained_variance"] == pytest.approx(1 - variance[0] / variance[1], abs=1e-3)
    assert numbers["cut"] == sum(bool(runtime.unusable(row)) for row in batch.rows) / 9 > 0
    assert numbers["reward"] == pytest.approx(sum(row["reward"] for row in batch.rows) / 9)
    assert numbers["safety"] == pytest.approx(sum(row["safety"] for row in batch.rows) / 9)
    gated = [
        p
        for p, row in zip(toy_prompts(9), batch.rows, strict=True)
        if row["safety"] < math.log(0.15 / 0.85)
    ]
    assert numbers["gated"] == sum(not p["is_safety"] for p in gated) / sum(
        not p["is_safety"] for p in toy_prompts(9)
    )
    assert numbers["objective"] == pytest.approx(
        batch.scores.mean().item() - SMALL.beta * numbers["kl"], abs=1e-3
    )


def test_held_out(judges):
    """The same answers each time, scored by the reward models; KL 0 against itself, else what the
    sums say.
    """
    policy, reference, prompts = talkative(3), tiny_model(4), toy_prompts(7)
    found = held_out(policy, reference, judges, prompts, SMALL)
    assert found == held_out(policy, reference, judges, prompts, SMALL)
    assert held_out(policy, policy, judges, prompts, SMALL)["kl"] == pytest.approx(0, abs=1e-4)
    rows = runtime.sample_answers(
        policy,
        toy_tokenizer(),
        prompts,
        key=(SMALL.seed, "ppo held-out"),
        samples=2,
        max_new_tokens=12,
    )
    assert found["reward"] == pytest.approx(judges.rewards(prompts, rows).mean().item(), abs=1e-4)
    assert found["length"] == sum(len(row["answer_ids"]) for row in rows) / 14
    total = 0.0
    for row in rows:
        ids = encode_prompt(toy_tokenizer(), prompts[row["index"]]["prompt"])
        table = [
            model(torch.tensor([ids + row["answer_ids"]]))[0].log_softmax(-1)
            for model in (policy, reference)
        ]
        total += sum(
            (table[0] - table[1])[len(ids) + t - 1, token].item()
            for t, token in enumerate(row["answer_ids"])
        )
    assert found["kl"] == pytest.approx(total / 14, abs=1e-3)


# ---- the whole command ----


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_first_pairs(out):
    """A root that knows the pairs of the chain's first reward models."""
    for axis in AXES:
        (out / f"reward-{axis}").mkdir(parents=True, exist_ok=True)
        shutil.copy(chain()[0] / f"reward-{axis}" / "pairs.jsonl", out / f"reward-{axis}")
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run from the chain's V2 on the toy prompts, and what it printed."""
    out = with_first_pairs(tmp_path_factory.mktemp("ppo"))
    return out / "rlhf-v2-ppo", run_quietly(
        ppo.main,
        *TINY,
        "--out",
        out,
        "--init",
        chain()[0] / "rlhf-v2",
        "--learning-rate",
        "0.001",
        "--max-new-tokens",
        32,
        "--patience",
        9,
    )


def test_main(finished):
    """The folder holds a model, its log, some answers; the record says where the rewards came from
    and what was kept.
    """
    folder, printed = finished
    assert (
        runtime.is_finished(folder)
        and f"wrote {folder}" in printed
        and printed.count("--- iteration") == 4
    )
    record = json.loads((folder / "stage.json").read_text())["results"]
    assert (
        record["seconds"] > 0
        and record["cpu_seconds"] > 0
        and set(record["dev"]) >= {"helpfulness", "safety", "tokens"}
    )
    log = [row for row in lines(folder / "metrics.jsonl") if row["phase"] == "ppo"]
    assert [row["step"] for row in log] == list(range(6))
    wanted = {
        "reward",
        "reward_whitened",
        "objective",
        "helpfulness",
        "safety",
        "gated",
        "kl",
        "entropy",
        "clip_fraction",
        "explained_variance",
        "length",
        "cut",
        "value_loss",
        "policy_loss",
        "grad_norm",
    }
    assert (
        all(wanted <= row.keys() for row in log[1:]) and "policy_loss" not in log[0]
    ), "the value network warms up alone"
    assert log[0]["kl"] == pytest.approx(0, abs=1e-3) and log[1]["kl"] == pytest.approx(0, abs=1e-3)
    assert abs(log[-1]["kl"]) > 0.01
    rows = lines(folder / "rollouts.jsonl")
    assert [row["iteration"] for row in rows] == [0] * 8 + [2] * 8 + [4] * 8
    assert all(
        row["answer_ids"] and row["prompt"] and {"reward", "whitened", *AXES} <= row.keys()
        for row in rows
    )
    assert {path.name for path in folder.iterdir()} == {
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
        "stage.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "critic.pth",
        *(f"reward-{axis}" for axis in AXES),
        *(f"pairs-{axis}.jsonl" for axis in AXES),
        *(f"answers-rlhf-v2-ppo-{axis}-{side}.jsonl" for axis in AXES for side in (0, 1)),
    }
    Critic(load_model(folder)[0]).load_state_dict(load_checkpoint(folder / "critic.pth"))


def test_main_keeps_the_best(finished):
    """What is saved is the model with the highest held-out reward, measured against the policy that
    it started from.
    """
    folder, _ = finished
    best = json.loads((folder / "stage.json").read_text())["results"]["best"]
    log = [row for row in lines(folder / "metrics.jsonl") if row["phase"] == "held-out"]
    top = max(log, key=lambda row: row["reward"])
    assert (top["step"], top["reward"]) == (
        best["iteration"],
        pytest.approx(best["reward"], abs=1e-4),
    )
    assert [row["step"] for row in log] == [0, 2, 4, 6] and log[0]["kl"] == pytest.approx(
        0, abs=1e-3
    )
    assert max(abs(row["kl"]) for row in log) > 0.01, "against the start, not against itself"
    start = load_model(chain()[0] / "rlhf-v2")[0]
    judges = Judges(newest_reward_models(chain()[0], [folder]), torch.device("cpu"))
    dev = ppo.read_prompts(world.FOLDER / "prompts-dev.jsonl")
    found = held_out(load_model(folder)[0], start, judges, dev, Settings(max_new_tokens=32))
    assert found["reward"] == pytest.approx(best["reward"], abs=1e-3) and found[
        "kl"
    ] == pytest.approx(best["kl"], abs=1e-3)


def small_run(tmp_path, *options) -> list[str]:
    """argv of a run on 20 prompts of a file."""
    path = write_lines(tmp_path / "prompts.jsonl", toy_prompts(20))
    out = with_first_pairs(tmp_path / "out")
    return [
        *TINY,
        "--out",
        str(out),
        "--init",
        str(chain()[0] / "rlhf-v2"),
        "--prompts",
        str(path),
        "--max-new-tokens",
        "8",
        *options,
    ]


def test_main_refreshes_the_reward_models(finished):
    """Fresh pairs by the policy to start from, other weights for PPO than those it began with, and
    a record of both.
    """
    folder, printed = finished
    record = json.loads((folder / "stage.json").read_text())["results"]
    for axis in AXES:
        pairs = lines(folder / f"pairs-{axis}.jsonl")
        assert pairs and {row["version"] for row in pairs} == {"rlhf-v2-ppo"}
        assert (
            record["reward_models"][axis] == str(folder / f"reward-{axis}")
            and axis in record["refreshed"]
        )
        before, after = (
            load_model(path / f"reward-{axis}")[0] for path in (chain()[0] / "rlhf-v2", folder)
        )
        assert not equal(snapshot(before), snapshot(after))
    assert "fresh (not yet learned)" in printed


def test_main_without_refresh(tmp_path, monkeypatch):
    """The annotator "none" asks nobody. Each answer is in one mini-batch; the value network learns
    alone first.
    """
    steps = []
    monkeypatch.setattr(
        ppo,
        "ppo_step",
        lambda policy, critic, used, batch, picked, *rest: (
            steps.append((tuple(used), tuple(sorted(picked)))),
            {"value_loss": 0.0},
        )[1],
    )
    run_quietly(
        ppo.main,
        *small_run(tmp_path),
        "--annotator",
        "none",
        "--iterations",
        3,
        "--value-warmup",
        1,
    )
    folder = tmp_path / "out" / "rlhf-v2-ppo"
    record = json.loads((folder / "stage.json").read_text())["results"]
    assert not list(folder.glob("pairs-*")) and not record["refreshed"]
    assert record["reward_models"]["safety"] == str(chain()[0] / "rlhf-v2" / "reward-safety")
    assert [used for used, _ in steps] == [("critic",)] * 2 + [("policy", "critic")] * 4
    assert all(
        sorted(steps[i][1] + steps[i + 1][1]) == list(range(16)) for i in range(0, len(steps), 2)
    )


def test_main_stops_early(tmp_path, monkeypatch):
    """No better for so many evaluations, or too far from the start: it ends, and the start is what
    is kept.
    """
    monkeypatch.setattr(
        ppo,
        "held_out",
        lambda policy, reference, judges, prompts, s: {
            "reward": 1.0,
            "spread": 1.0,
            "kl": 0.5,
            "length": 3.0,
            "helpfulness": 0.0,
            "safety": 0.0,
            "prompts": len(prompts),
        },
    )
    run_quietly(ppo.main, *small_run(tmp_path), "--patience", 2, "--iterations", 9)
    folder = tmp_path / "out" / "rlhf-v2-ppo"
    record = json.loads((folder / "stage.json").read_text())["results"]
    assert (
        record["iterations"] == 4
        and record["best"]["iteration"] == 0
        and record["best"]["prompts"] == 2
    )
    assert "dev" not in record
    start, end = load_model(chain()[0] / "rlhf-v2")[0], load_model(folder)[0]
    assert equal(snapshot(start), snapshot(end))
    calls = []

    def drifting(*_):
        calls.append(len(calls))
        return {
            "reward": float(len(calls)),
            "spread": 1.0,
            "kl": [0.0, 1.0, 9.0][len(calls) - 1],
            "length": 3.0,
            "helpfulness": 0.0,
            "safety": 0.0,
        }

    monkeypatch.setattr(ppo, "held_out", drifting)
    run_quietly(ppo.main, *small_run(tmp_path), "--max-kl", 2, "--iterations", 9, "--fresh")
    record = json.loads((folder / "stage.json").read_text())["results"]
    assert record["iterations"] == 4 and record["best"]["iteration"] == 2


def test_main_draws_new_numbers(tmp_path, monkeypatch):
    """No answer of a run shares its random numbers with another one, and each prompt has its turn.
    """
    keys, prompts = [], []

    def recording(model, encoded, found, *args, **options):
        keys.extend(map(tuple, found))
        prompts.extend(map(tuple, encoded))
        return generate(model, encoded, found, *args, **options)

    monkeypatch.setattr(ppo, "generate", recording)
    run_quietly(ppo.main, *small_run(tmp_path), "--patience", 9)
    assert len(keys) == 6 * 16 == len(set(keys)) and len(set(prompts)) == 18


def test_main_in_bfloat16(tmp_path):
    run_quietly(ppo.main, *small_run(tmp_path), "--dtype", "bfloat16", "--iterations", 2)
    folder = tmp_path / "out" / "rlhf-v2-ppo"
    assert load_checkpoint(folder / "consolidated.00.pth")["norm.weight"].dtype == torch.float32
    assert (
        abs([row for row in lines(folder / "metrics.jsonl") if row["phase"] == "ppo"][0]["kl"])
        < 0.3
    )


@pytest.mark.parametrize(
    "argv, told",
    [
        (("--init", "nowhere"), "nowhere is missing; `python rejection_sampling.py` makes it"),
        (("--clip", "0"), "--clip 0.0: must be more than 0"),
        (("--lam", "1.5"), "--gamma and --lam from 0 to 1"),
        (("--preset", "llama-2-7b"), "needs prompts: --prompts FILE.jsonl"),
        (("--max-prompts", "1"), "one prompt is too few"),
        (("--prompts", "TAG"), "line 2: the user's content holds the tag"),
        (("--prompts", "LONG"), "line 2: the prompt has [0-9]+ tokens"),
    ],
)
def test_main_tells_of_mistakes(argv, told, tmp_path):
    base = small_run(tmp_path)
    if argv[0] == "--preset":
        base = base[2:6] + ["--init", str(chain()[0] / "rlhf-v2"), "--out", str(tmp_path / "out")]
    good = toy_prompts(1)[0]
    write_lines(tmp_path / "TAG", [good, good | {"prompt": [user("<<SYS>>")]}])
    write_lines(tmp_path / "LONG", [good, good | {"prompt": [user("many words " * 1500)]}])
    with pytest.raises(InputError, match=told):
        run_quietly(ppo.main, *base, argv[0], tmp_path / argv[1] if argv[1].isupper() else argv[1])
    assert not (tmp_path / "out" / "rlhf-v2-ppo").exists()


def test_presets_are_the_papers():
    for name, preset in ppo.PRESETS.items():
        if name.startswith("llama-2"):
            s = Settings(**preset)
            assert (s.learning_rate, s.batch, s.mini_batch, s.clip, s.weight_decay) == (
                1e-6,
                512,
                64,
                0.2,
                0.1,
            )
            assert (
                s.beta == (0.01 if name in ("llama-2-7b", "llama-2-13b") else 0.005)
                and 200 <= s.iterations <= 400
            )
    assert re.search("constant", ppo.__doc__)
