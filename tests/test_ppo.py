"""PPO: each equation by hand and against plain Python; what flows through an iteration; the whole
command.
"""

import json
import math
import random
import re
import shutil
import zlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ppo
import runtime
from data import InputError, encode_prompt, micro_batches, read_prompts, world
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
from rejection_sampling import RewardModels
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
def reward_models(tmp_path_factory) -> RewardModels:
    """Two different reward models with random weights."""
    folders = {}
    for seed, axis in enumerate(AXES):
        torch.manual_seed(seed)
        folders[axis] = tmp_path_factory.mktemp(axis)
        model = RewardModel(tiny_model(seed))
        save_reward_model(folders[axis], model, toy_tokenizer())
    return RewardModels(folders, torch.device("cpu"))


@pytest.fixture(scope="module")
def batch(reward_models) -> Rollout:
    """One rollout of a random policy against another reference; the EOS is likely enough that some
    answers end early.
    """
    policy, reference, critic = talkative(3), tiny_model(4), lively_critic()
    key = (0, "test", 5)
    return rollout(policy, reference, critic, reward_models, toy_prompts(9), key, SMALL)


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


def ragged(seed: int, rows: int = 6, longest: int = 7) -> tuple[list[int], torch.Tensor]:
    """Where each row's answer ends in a padded batch, and the mask; one fills the batch to its end.
    """
    rng = random.Random(seed)
    starts = [rng.randrange(1, 4) for _ in range(rows)]
    ends = [longest + 3]
    for start in starts[1:]:
        ends.append(start + rng.randrange(1, longest))
    mask = torch.zeros(rows, longest + 3, dtype=torch.bool)
    for row in range(rows):
        mask[row, starts[row] : ends[row]] = True
    return ends, mask


def cut_out(tensor: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    """The answers' own numbers as lists."""
    return [row[marks].tolist() for row, marks in zip(tensor, mask, strict=True)]


def flat(lists: list[list[float]]) -> list[float]:
    numbers = []
    for some in lists:
        numbers.extend(some)
    return numbers


def assert_close(measured: list[list[float]], expected: list[list[float]]) -> None:
    for one, two in zip(measured, expected, strict=True):
        assert len(one) == len(two)
        assert one == pytest.approx(two, abs=2e-4)


# ---- equations ----


def test_whiten_rewards():
    """By hand: 2, 4, 9 have mean 5 and variance (9 + 1 + 16) / 3."""
    deviation = math.sqrt(26 / 3)
    scores = torch.tensor([2.0, 4.0, 9.0])
    expected = [-3 / deviation, -1 / deviation, 4 / deviation]
    assert whiten_rewards(scores).tolist() == pytest.approx(expected, abs=1e-5)
    unshifted = [5 - 3 / deviation, 5 - 1 / deviation, 5 + 4 / deviation]
    assert whiten_rewards(scores, shift_mean=False).tolist() == pytest.approx(unshifted, abs=1e-5)
    equal_scores = whiten_rewards(torch.full((4,), 7.0))
    assert equal_scores.tolist() == [0, 0, 0, 0], "nothing to learn, no NaN"
    assert whiten_rewards(torch.tensor([7.0])).tolist() == [0]
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 4 + 3
    for shift_mean in (True, False):
        expected = slow.whiten(scores.tolist(), shift_mean)
        assert whiten_rewards(scores, shift_mean).tolist() == pytest.approx(expected, abs=1e-4)


def test_whiten_advantages():
    """Over the answers' tokens, whatever stands in the padding, and as one batch, not row by row.
    """
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    # 1, 3, 5: mean 3, variance 8/3
    advantages = torch.tensor([[50.0, 1.0, 3.0, -90.0], [5.0, 70.0, 80.0, 9.0]])
    step = 2 / math.sqrt(8 / 3)
    whitened = whiten_advantages(advantages, mask)
    assert whitened.flatten().tolist() == pytest.approx([0, -step, 0, 0, step, 0, 0, 0], abs=1e-5)
    garbage = advantages.masked_fill(~mask, NAN)
    assert torch.equal(whiten_advantages(garbage, mask), whitened)
    equal_ones = whiten_advantages(torch.ones(1, 3), torch.tensor([[True, True, False]]))
    assert equal_ones.tolist() == [[0, 0, 0]]
    _, mask = ragged(0)
    advantages = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1)) * 3 + 2
    expected = slow.whiten(flat(cut_out(advantages, mask)))
    whitened = whiten_advantages(advantages, mask)
    assert whitened[mask].tolist() == pytest.approx(expected, abs=1e-4)


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
    mask = torch.ones(3, 1, dtype=torch.bool)
    estimates = kl_penalty(p.log()[:, None], q.log()[:, None], mask)  # (3 tokens, 1)
    divergence = F.kl_div(q.log(), p, reduction="sum").item()
    assert (p * estimates[:, 0]).sum().item() == pytest.approx(divergence, abs=1e-6)


def test_token_rewards():
    """The score stands at the last token of each answer, wherever that is, beside that token's KL.
    """
    mask = torch.tensor(
        [[False, True, True, True], [False, True, False, False], [True, True, False, False]]
    )
    kl = torch.tensor([[0.0, 1.0, -2.0, 3.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0, -5.0]), kl, mask, beta=0.1)
    expected = [[0, -0.1, 0.2, 9.7], [0, 19.6, 0, 0], [0, -5.05, 0, 0]]
    assert rewards.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    without_kl = token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, mask, beta=0.0)
    assert without_kl.sum(1).tolist() == [1, 2, 3]


def test_gae():
    """Three tokens, γ = .5, λ = .5, by hand: δ = (1 + .5·4 - 2, 0 + .5·6 - 4, 8 - 6) = (1, -1, 2).
    """
    mask = torch.tensor([[False, True, True, True, False]])
    rewards = torch.tensor([[9.0, 1.0, 0.0, 8.0, 9.0]])
    values = torch.tensor([[9.0, 2.0, 4.0, 6.0, 9.0]])
    # A = (1 + .25·-.5, -1 + .25·2, 2)
    given = [rewards.clone(), values.clone(), mask.clone()]
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0, 0.875, -0.5, 2, 0]]
    assert returns.tolist() == [[0, 2.875, 3.5, 8, 0]]
    assert equal([rewards, values, mask], given), "what is given stays as it was"
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards_to_go, _ = gae(rewards, torch.zeros(1, 3), mask, 1.0, 1.0)
    assert rewards_to_go.tolist() == [[7, 6, 4]]
    one_step, _ = gae(rewards, torch.tensor([[3.0, 1.0, 5.0]]), mask, 1.0, 0.0)
    assert one_step.tolist() == [[-1, 6, -1]]


def test_gae_ends_with_the_answer():
    """What stands behind EOS, be it not even a number, changes nothing: the value there is 0, not
    the critic's guess.
    """
    mask = torch.tensor([[True, True, False, False]])
    rewards = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    dirty_rewards = torch.tensor([[1.0, 2.0, 50.0, NAN]])
    dirty_values = torch.tensor([[0.5, 0.25, 70.0, NAN]])
    dirty_advantages, dirty_returns = gae(dirty_rewards, dirty_values, mask, 0.9, 0.8)
    assert torch.equal(advantages, dirty_advantages)
    assert torch.equal(returns, dirty_returns)
    assert advantages[0, 1].item() == 1.75
    assert returns[0, 1].item() == 2.0, "the last return is the last reward"


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (0.0, 0.9)]
)
def test_gae_equals_the_slow_one(gamma, lam):
    _, mask = ragged(2)
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(0))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected_advantages, expected_returns = [], []
    for r, v in zip(cut_out(rewards, mask), cut_out(values, mask), strict=True):
        of_answer = slow.gae(r, v, gamma, lam)
        expected_advantages.append(of_answer[0])
        expected_returns.append(of_answer[1])
    assert_close(cut_out(advantages, mask), expected_advantages)
    assert_close(cut_out(returns, mask), expected_returns)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_policy_loss():
    """Ratio 1.5 and .5 against a clip of .2, for both signs of the advantage; and what the gradient
    does there.
    """
    ratios = torch.tensor([[1.5, 0.5, 1.1, 1.5, 0.5, 1.1]])
    advantages = torch.tensor([[2.0, 2.0, 2.0, -2.0, -2.0, -2.0]])
    old = torch.full((1, 6), -3.0)
    now = (old + ratios.log()).requires_grad_()
    losses = policy_loss(now, old, advantages, torch.ones(1, 6, dtype=torch.bool), clip=0.2)
    assert losses[0].tolist() == pytest.approx([-2.4, -1.0, -2.2, 3.0, 1.6, 2.2], abs=1e-5)
    losses.sum().backward()  # d(-rA)/d log π = -rA, and nothing where the clip holds
    assert now.grad[0].tolist() == pytest.approx([0, -1.0, -2.2, 3.0, 0, 2.2], abs=1e-5)


def test_policy_loss_outside_of_the_mask():
    """Padding adds nothing to the loss, and no NaN to the gradient."""
    now = torch.tensor([[-1.0, 300.0, NAN]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0, NAN]])
    advantages = torch.tensor([[2.0, 5.0, NAN]])
    losses = policy_loss(now, old, advantages, torch.tensor([[True, False, False]]))
    assert losses.tolist() == [[-2, 0, 0]]
    losses.sum().backward()
    assert now.grad.tolist() == [[-2, 0, 0]]


def test_policy_loss_equals_the_slow_one():
    now, old, advantages = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    mask = torch.ones(5, 8, dtype=torch.bool)
    numbers = [tensor.flatten().tolist() for tensor in (now, old, advantages)]
    for clip in (0.1, 0.2, 0.5):
        losses = policy_loss(now, old, advantages, mask, clip)
        expected = [slow.policy(*of_token, clip) for of_token in zip(*numbers, strict=True)]
        assert losses.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_value_loss():
    values = torch.tensor([[1.0, 5.0, 2.0]], requires_grad=True)
    returns = torch.tensor([[3.0, 0.0, 2.5]])
    losses = value_loss(values, returns, torch.tensor([[True, False, True]]))
    assert losses.tolist() == [[2, 0, 0.125]]
    assert losses[0, 0].item() == slow.value(1.0, 3.0)
    assert losses[0, 2].item() == slow.value(2.0, 2.5)
    losses.sum().backward()
    assert values.grad.tolist() == [[-2, 0, -0.5]]


# ---- models ----


def test_critic_starts_at_the_reward_model(reward_models):
    """Behind a text's last token it expects (score - mean) / spread, the reward model's own score
    with its shift.
    """
    model = reward_models.models["helpfulness"]
    model.shift.fill_(0.7)
    critic = Critic(tiny_model(0))  # the body of that reward model
    critic.start_at(model, 2.0, 4.0)
    ids = [1, 5, 6, 7, 8]
    values = critic(torch.tensor([ids + [2]]), torch.tensor([[False] * 5 + [True]]))  # (1, 6)
    score = model(torch.tensor([ids]), torch.tensor([5])).item()
    model.shift.zero_()
    assert values[0, 5].item() == pytest.approx((score - 2.0) / 4.0, abs=1e-5)
    assert not values[0, :5].any()


def test_critic():
    """0 at the start; the value at t knows the tokens before t and no others; nothing outside of
    the mask.
    """
    tokens = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:9] = True
    mask[1, 2:6] = True
    assert not Critic(tiny_model())(tokens, mask).any()
    critic = lively_critic()
    values = critic(tokens, mask)
    assert values.shape == (2, 9) and values[mask].all() and not values[~mask].any()
    features = critic.body.features(tokens)  # (2, 9, dim)
    expected = (features[0, 4] @ critic.head.weight[0]).item()
    assert values[0, 5].item() == pytest.approx(expected, abs=1e-5)
    changed = tokens.clone()
    changed[0, 5:] = 7
    again = critic(changed, mask)
    assert torch.allclose(again[0, :6], values[0, :6], atol=1e-5)
    assert not torch.allclose(again[0, 6:], values[0, 6:], atol=1e-3)
    trained = [name for name, weight in critic.named_parameters() if weight.requires_grad]
    assert not [name for name in trained if "output" in name]


def test_critic_in_bfloat16():
    """The scalar head computes in float32: near values do not fall together."""
    critic = lively_critic()
    tokens = torch.randint(3, 300, (8, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 40, dtype=torch.bool)
    mask[:, 0] = False
    with torch.autocast("cpu", torch.bfloat16):
        features = critic.body.features(tokens[:, :-1])  # (8, 39, dim)
        values = critic(tokens, mask)  # (8, 40)
    assert values.dtype == torch.float32
    assert torch.equal(values[:, 1:], critic.head(features.float()).squeeze(-1))


def test_answer_logprobs():
    """Those of the whole forward pass, of the tokens that stand there, at temperature 1; gradients
    flow.
    """
    model, mask = tiny_model(1), torch.zeros(2, 8, dtype=torch.bool)
    tokens = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
    mask[0, 2:8] = True
    mask[1, 4:6] = True
    logprobs = answer_logprobs(model, tokens, mask)
    table = model(tokens).log_softmax(-1)  # (2, 8, vocab)
    for row in range(2):
        for t in range(8):
            expected = table[row, t - 1, tokens[row, t]].item() if mask[row, t] else 0.0
            assert logprobs[row, t].item() == pytest.approx(expected, abs=1e-5)
    logprobs.sum().backward()
    assert model.output.weight.grad.abs().sum() > 0


def test_micro_batches():
    """Each picked row once, with room for its last token; one batch where there is room for one."""
    ends, mask = ragged(3)
    picked = [4, 0, 5, 2]
    for tokens in (1, 12, 1000):
        batches = micro_batches(mask, picked, tokens)
        seen = []
        for rows, length in batches:
            seen += rows
            assert length == max(ends[row] for row in rows)
            assert len(rows) == 1 or len(rows) * length <= tokens
        assert sorted(seen) == sorted(picked)
    assert len(batches) == 1


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
    keys = [(0, zlib.crc32(b"test"), 5, i) for i in range(9)]
    generations = generate(policy, encoded, keys, 12, 1.0, eos_id=toy_tokenizer().eos_id)
    assert len({tuple(generation.ids) for generation in generations}) > 5
    assert {generation.finish_reason for generation in generations} == {"eos", "length"}
    for i, generation in enumerate(generations):
        answer = batch.answers[i]
        assert answer.ids == generation.ids
        assert answer.finish_reason == generation.finish_reason
        start = len(encoded[i])
        end = start + len(generation.ids)
        assert batch.tokens[i, :end].tolist() == encoded[i] + generation.ids
        places = batch.mask[i].nonzero().flatten().tolist()
        assert places == list(range(start, end)), "EOS counts, nothing after it"
        logprobs = batch.logprobs[i, start:end].tolist()
        assert logprobs == pytest.approx(generation.logprobs, abs=1e-4)


def test_rollout_keeps_the_ids_as_sampled(reward_models, monkeypatch):
    """Where the text of an answer, encoded again, would be other tokens: the sampled ones are
    scored and trained.
    """
    tokenizer, scored = toy_tokenizer(), []
    ids = [tokenizer.encode(letter)[0] for letter in "lion"] + [tokenizer.eos_id]
    assert tokenizer.encode(tokenizer.decode(ids)) + [tokenizer.eos_id] != ids

    def generate_lion(model, prompts, *args, **options):
        return [Generation(ids, [-1.0] * 5, "eos") for _ in prompts]

    def scores(prompts, answers):
        scored.extend(answer.ids for answer in answers)
        return {name: torch.ones(2) for name in (*AXES, "reward")}

    monkeypatch.setattr(runtime.sampling, "generate", generate_lion)
    monkeypatch.setattr(reward_models, "scores", scores)
    policy, reference, critic = tiny_model(), tiny_model(), lively_critic()
    key = (0, "test")
    batch = rollout(policy, reference, critic, reward_models, toy_prompts(2), key, SMALL)
    assert scored == [ids, ids] == [answer.ids for answer in batch.answers]
    assert cut_out(batch.tokens, batch.mask) == [ids, ids]
    assert batch.logprobs[batch.mask].tolist() == [-1.0] * 10


def test_rollout_logprobs_equal_those_of_training(batch):
    """So the ratio of the first step is 1."""
    again = answer_logprobs(talkative(3), batch.tokens, batch.mask)
    assert torch.allclose(again, batch.logprobs, atol=1e-4) and not again[~batch.mask].any()
    reference = answer_logprobs(tiny_model(4), batch.tokens, batch.mask)
    assert torch.allclose(reference, batch.reference, atol=1e-4)
    assert torch.allclose(lively_critic()(batch.tokens, batch.mask), batch.values, atol=1e-4)
    assert (batch.reference - batch.logprobs).abs().max() > 0.1 and batch.values.abs().max() > 0.1


def test_rollout_equals_the_slow_one(batch, reward_models):
    """From the scores on: whitened before the KL, the KL on each token, the score on the last, GAE,
    whitened over tokens.
    """
    # the scores, whitened
    raw = reward_models.scores(toy_prompts(9), batch.answers)["reward"].tolist()
    assert [answer.reward for answer in batch.answers] == pytest.approx(raw, abs=1e-3)
    usable = [answer.finish_reason == "eos" and bool(answer.text) for answer in batch.answers]
    assert len(set(usable)) == 2
    scores = slow.whiten(raw)
    for i in range(9):
        if not usable[i]:
            scores[i] = SMALL.cut_reward
    assert batch.scores.tolist() == pytest.approx(scores, abs=1e-4)

    # answer by answer: rewards, advantages, returns
    logprobs = cut_out(batch.logprobs, batch.mask)
    reference = cut_out(batch.reference, batch.mask)
    values = cut_out(batch.values, batch.mask)
    rewards, advantages, returns = [], [], []
    for i in range(9):
        rewards.append(slow.rewards(scores[i], logprobs[i], reference[i], SMALL.beta))
        of_answer = slow.gae(rewards[i], values[i], SMALL.gamma, SMALL.lam)
        advantages.append(of_answer[0])
        returns.append(of_answer[1])
    assert_close(cut_out(batch.rewards, batch.mask), rewards)
    assert_close(cut_out(batch.returns, batch.mask), returns)

    # the advantages, whitened over the tokens of all answers
    whitened = slow.whiten(flat(advantages))
    assert [len(row) for row in cut_out(batch.advantages, batch.mask)] == list(map(len, advantages))
    assert batch.advantages[batch.mask].tolist() == pytest.approx(whitened, abs=2e-4)
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
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return torch.cat([one.flatten() for one in gradients])


def test_ppo_step_is_reinforce():
    """No whitening, value 0, γ = λ = 1, β = 0, ratio 1: the gradient is that of -R log π(answer),
    the textbook's.
    """
    policy, critic = talkative(3), Critic(tiny_model())
    scores = torch.tensor([1.5, -2.0, 0.5])
    prompts = encode_prompts(toy_tokenizer(), toy_prompts(3), 256)
    keys = [(1, i) for i in range(3)]
    answers = generate(policy, prompts, keys, 12, 1.0, eos_id=toy_tokenizer().eos_id)
    # (3, seq) each
    tokens, mask = pad_answers(prompts, [answer.ids for answer in answers], torch.device("cpu"))
    zero = torch.zeros(tokens.shape)
    logprobs = answer_logprobs(policy, tokens, mask).detach()
    rewards = token_rewards(scores, kl_penalty(logprobs, zero, mask), mask, beta=0.0)
    advantages, returns = gae(rewards, zero, mask, gamma=1.0, lam=1.0)
    batch = Rollout([], tokens, mask, logprobs, zero, zero, scores, rewards, advantages, returns)
    optimizers = {"policy": Frozen(policy), "critic": Frozen(critic)}
    settings = Settings(clip=0.2, micro_tokens=10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
        ppo_step(policy, critic, optimizers, batch, [0, 1, 2], settings)
    of_step = gradient(policy)

    # the textbook's, one by one, without padding
    optimizers["policy"].zero_grad()
    loss = torch.zeros(())
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        logits = policy(torch.tensor([prompt + answer.ids]))[0]  # (seq, vocab)
        for t, token in enumerate(answer.ids, start=len(prompt)):
            loss = loss - score * logits[t - 1].log_softmax(-1)[token]
    (loss / sum(len(answer.ids) for answer in answers)).backward()
    expected = gradient(policy)
    assert of_step.norm() > 0.1
    assert torch.allclose(of_step, expected, atol=1e-4 * expected.abs().max())


def test_ppo_step_counts_tokens_not_batches(batch):
    """However a mini-batch is cut into micro-batches, the gradient of both networks is that of the
    whole.
    """
    rows = [7, 1, 2, 8, 0]
    steps = []  # gradient of the policy, of the critic, and what the step tells
    for micro_tokens in (1, 60, 10**6):
        policy, critic = tiny_model(6), lively_critic()
        settings = Settings(micro_tokens=micro_tokens)
        optimizers = {"policy": Frozen(policy), "critic": Frozen(critic)}
        if micro_tokens == 60:
            # a step before: nothing of its gradient is left
            ppo_step(policy, critic, optimizers, batch, [3, 4], settings)
        numbers = ppo_step(policy, critic, optimizers, batch, rows, settings)
        steps.append((gradient(policy), gradient(critic), numbers))
    whole = steps[2]
    for policy_gradient, critic_gradient, numbers in steps[:2]:
        assert torch.allclose(policy_gradient, whole[0], atol=1e-5)
        assert torch.allclose(critic_gradient, whole[1], atol=1e-5)
        assert numbers == pytest.approx(whole[2], abs=1e-4)

    # token by token
    numbers, mask = whole[2], batch.mask[rows]
    old = batch.logprobs[rows][mask]  # (answer tokens), as the next four
    advantages = batch.advantages[rows][mask]
    returns = batch.returns[rows][mask]
    now = answer_logprobs(tiny_model(6), batch.tokens[rows], mask)[mask]
    values = lively_critic()(batch.tokens[rows], mask)[mask]
    of_tokens = zip(now.tolist(), old.tolist(), advantages.tolist(), strict=True)
    losses = [slow.policy(*of_token, 0.2) for of_token in of_tokens]
    assert numbers["policy_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    of_tokens = zip(values.tolist(), returns.tolist(), strict=True)
    losses = [slow.value(*of_token) for of_token in of_tokens]
    assert numbers["value_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    far = ((now - old).exp() - 1).abs() > 0.2
    assert numbers["clip_fraction"] == pytest.approx(far.float().mean().item())
    assert 0 < numbers["clip_fraction"] < 1


def snapshot(*models) -> list[torch.Tensor]:
    return [tensor.clone() for model in models for tensor in model.state_dict().values()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_ppo_step_changes_what_it_should(reward_models):
    """Policy and value network move, by steps clipped to norm 1; reward models and reference do
    not.
    """
    policy, reference, critic = talkative(3), tiny_model(4), Critic(tiny_model(5))
    still = (reference, *reward_models.models.values())
    still_before = snapshot(*still)
    optimizers = {"policy": adamw(policy, 1e-3), "critic": adamw(critic, 1e-3)}
    key = (0, "test")
    batch = rollout(policy, reference, critic, reward_models, toy_prompts(6), key, SMALL)
    policy_before, critic_before = snapshot(policy), snapshot(critic)
    numbers = ppo_step(policy, critic, {"critic": optimizers["critic"]}, batch, [0, 1, 2], SMALL)
    assert set(numbers) == {"value_loss"}
    assert equal(snapshot(policy), policy_before)
    assert not equal(snapshot(critic), critic_before)
    numbers = ppo_step(policy, critic, optimizers, batch, [3, 4, 5], SMALL)
    assert numbers["clip_fraction"] == 0 and not equal(snapshot(policy), policy_before)
    assert gradient(policy).norm().item() == pytest.approx(min(1.0, numbers["grad_norm"]), rel=1e-3)
    assert equal(snapshot(*still), still_before)
    for model in still:
        assert all(weight.grad is None for weight in model.parameters())


def test_ppo_step_raises_what_is_rewarded(reward_models):
    """A few steps on one rollout make its better answers likelier than its worse ones."""
    policy, reference, critic = talkative(3), talkative(3), Critic(tiny_model(5))
    settings = Settings(max_new_tokens=12, beta=0.0, lam=1.0)
    key = (0, "test")
    batch = rollout(policy, reference, critic, reward_models, toy_prompts(12), key, settings)
    optimizers = {"policy": adamw(policy, 3e-3), "critic": adamw(critic, 1e-3)}
    for _ in range(8):
        ppo_step(policy, critic, optimizers, batch, list(range(12)), SMALL)
    moved = (answer_logprobs(policy, batch.tokens, batch.mask) - batch.logprobs)[batch.mask]
    assert (moved * batch.advantages[batch.mask]).mean() > 0.01


def variance(numbers: list[float]) -> float:
    """Times the count."""
    mean = sum(numbers) / len(numbers)
    return sum((x - mean) ** 2 for x in numbers)


def test_describe(batch):
    prompts, answers = toy_prompts(9), batch.answers
    numbers = describe(batch, prompts)
    logprobs = flat(cut_out(batch.logprobs, batch.mask))
    reference = flat(cut_out(batch.reference, batch.mask))
    assert numbers["length"] == len(logprobs) / 9
    assert numbers["entropy"] == pytest.approx(-sum(logprobs) / len(logprobs), abs=1e-4)
    assert numbers["kl"] == pytest.approx((sum(logprobs) - sum(reference)) / 9, abs=1e-3)

    values = flat(cut_out(batch.values, batch.mask))
    returns = flat(cut_out(batch.returns, batch.mask))
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    explained = 1 - variance(errors) / variance(returns)
    assert numbers["explained_variance"] == pytest.approx(explained, abs=1e-3)

    assert numbers["cut"] == sum(bool(runtime.unusable(answer)) for answer in answers) / 9 > 0
    assert numbers["reward"] == pytest.approx(sum(answer.reward for answer in answers) / 9)
    assert numbers["safety"] == pytest.approx(sum(answer.safety for answer in answers) / 9)
    gated, untagged = 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if not prompt.is_safety:
            untagged += 1
            gated += answer.safety < math.log(0.15 / 0.85)
    assert numbers["gated"] == gated / untagged
    objective = batch.scores.mean().item() - SMALL.beta * numbers["kl"]
    assert numbers["objective"] == pytest.approx(objective, abs=1e-3)


def test_held_out(reward_models):
    """The same answers each time, scored by the reward models; KL 0 against itself, else what the
    sums say.
    """
    policy, reference, prompts = talkative(3), tiny_model(4), toy_prompts(7)
    measured = held_out(policy, reference, reward_models, prompts, SMALL)
    assert measured == held_out(policy, reference, reward_models, prompts, SMALL)
    against_itself = held_out(policy, policy, reward_models, prompts, SMALL)
    assert against_itself["kl"] == pytest.approx(0, abs=1e-4)
    assert ppo.HELD_OUT_SAMPLES == 2
    answers = runtime.sample_answers(
        policy,
        toy_tokenizer(),
        prompts,
        key=(SMALL.seed, "ppo held-out"),
        samples=2,
        max_new_tokens=12,
    )
    rewards = reward_models.scores(prompts, answers)["reward"]
    assert measured["scored"] == pytest.approx(rewards.mean().item(), abs=1e-4)
    assert measured["length"] == sum(len(answer.ids) for answer in answers) / 14
    total = 0.0
    for answer in answers:
        prompt = encode_prompt(toy_tokenizer(), prompts[answer.index].messages)
        tokens = torch.tensor([prompt + answer.ids])
        table = policy(tokens)[0].log_softmax(-1) - reference(tokens)[0].log_softmax(-1)
        for t, token in enumerate(answer.ids):
            total += table[len(prompt) + t - 1, token].item()
    assert measured["kl"] == pytest.approx(total / 14, abs=1e-3)


def test_held_out_counts_as_training_does(reward_models, monkeypatch):
    """An answer without EOS counts as `cut_reward`, in the start's units, however well it scores:
    one that repeats itself up to the limit cannot win.
    """
    policy, prompts = talkative(3), toy_prompts(7)
    settings = replace(SMALL, cut_reward=-1.5)
    found = []

    def scores(prompts, answers):
        raw = [100.0 if runtime.unusable(answer) else float(len(answer.ids)) for answer in answers]
        found.append((raw, [bool(runtime.unusable(answer)) for answer in answers]))
        return {name: torch.tensor(raw) for name in (*AXES, "reward")}

    monkeypatch.setattr(reward_models, "scores", scores)
    start = held_out(policy, policy, reward_models, prompts, settings)
    [(raw, cut)] = found
    assert 0 < sum(cut) < 14
    mean, spread = torch.tensor(raw).mean().item(), torch.tensor(raw).std().item()
    counted = [mean - 1.5 * spread if is_cut else one for one, is_cut in zip(raw, cut, strict=True)]
    assert start["reward"] == pytest.approx(sum(counted) / 14, rel=1e-4)
    assert (start["scored"], start["spread"]) == pytest.approx((mean, spread), rel=1e-4)
    assert start["cut"] == pytest.approx(sum(cut) / 14)

    # answers of one token: none ends with something said
    cut_short = replace(settings, max_new_tokens=1)
    later = held_out(policy, policy, reward_models, prompts, cut_short, start)
    assert later["cut"] == 1 and later["scored"] == 100 > start["scored"]
    assert later["reward"] == pytest.approx(mean - 1.5 * spread, rel=1e-4)


# ---- the whole command ----


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(folder, phase: str) -> list[dict]:
    return [row for row in lines(folder / "metrics.jsonl") if row["phase"] == phase]


def results_of(folder) -> dict:
    return json.loads((folder / "stage.json").read_text())["results"]


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
    where = ["--out", out, "--init", chain()[0] / "rlhf-v2"]
    training = ["--learning-rate", "0.001", "--max-new-tokens", 32, "--patience", 9]
    return out / "rlhf-v2-ppo", run_quietly(ppo.main, *TINY, *where, *training)


def test_main(finished):
    """The folder holds a model, its log, some answers; the record says where the rewards came from
    and what was kept.
    """
    folder, printed = finished
    assert runtime.is_finished(folder)
    assert f"wrote {folder}" in printed
    assert printed.count("--- iteration") == 4
    results = results_of(folder)
    assert results["seconds"] > 0 and results["cpu_seconds"] > 0
    assert set(results["dev"]) >= {"helpfulness", "safety", "tokens"}

    log = log_of(folder, "ppo")
    assert [row["step"] for row in log] == list(range(6))
    expected = {
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
    assert all(expected <= row.keys() for row in log[1:])
    assert "policy_loss" not in log[0], "the value network warms up alone"
    assert log[0]["kl"] == pytest.approx(0, abs=1e-3) and log[1]["kl"] == pytest.approx(0, abs=1e-3)
    assert abs(log[-1]["kl"]) > 0.01

    answers = lines(folder / "rollouts.jsonl")
    assert [row["iteration"] for row in answers] == [0] * 8 + [2] * 8 + [4] * 8
    for row in answers:
        assert row["answer_ids"] and row["prompt"]
        assert {"reward", "whitened", *AXES} <= row.keys()
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
    best = results_of(folder)["best"]
    log = log_of(folder, "held-out")
    top = max(log, key=lambda row: row["reward"])
    assert top["step"] == best["iteration"]
    assert top["reward"] == pytest.approx(best["reward"], abs=1e-4)
    assert [row["step"] for row in log] == [0, 2, 4, 6]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert max(abs(row["kl"]) for row in log) > 0.01, "against the start, not against itself"

    policy, start = load_model(folder)[0], load_model(chain()[0] / "rlhf-v2")[0]
    newest = newest_reward_models(chain()[0], [folder])
    reward_models = RewardModels(newest, torch.device("cpu"))
    dev = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    settings = Settings(max_new_tokens=32)
    measured = held_out(policy, start, reward_models, dev, settings, best["start"])
    assert measured["reward"] == pytest.approx(best["reward"], abs=1e-3)
    assert measured["kl"] == pytest.approx(best["kl"], abs=1e-3)


def small_run(tmp_path, *options) -> list[str]:
    """argv of a run on 20 prompts of a file."""
    prompts = write_lines(tmp_path / "prompts.jsonl", toy_prompts(20))
    out = with_first_pairs(tmp_path / "out")
    where = ["--out", str(out), "--init", str(chain()[0] / "rlhf-v2"), "--prompts", str(prompts)]
    return [*TINY, *where, "--max-new-tokens", "8", *options]


def test_main_refreshes_the_reward_models(finished):
    """Fresh pairs by the policy to start from, other weights for PPO than those it began with, and
    a record of both.
    """
    folder, printed = finished
    results = results_of(folder)
    for axis in AXES:
        pairs = lines(folder / f"pairs-{axis}.jsonl")
        assert pairs and {pair["version"] for pair in pairs} == {"rlhf-v2-ppo"}
        assert results["reward_models"][axis] == str(folder / f"reward-{axis}")
        assert axis in results["refreshed"]
        before, _ = load_model(chain()[0] / "rlhf-v2" / f"reward-{axis}")
        after, _ = load_model(folder / f"reward-{axis}")
        assert not equal(snapshot(before), snapshot(after))
    assert "fresh (not yet learned)" in printed


def test_main_without_refresh(tmp_path, monkeypatch):
    """The annotator "none" asks nobody. Each answer is in one mini-batch; the value network learns
    alone first.
    """
    trained, mini_batches = [], []

    def recorded_step(policy, critic, optimizers, batch, picked, *rest):
        trained.append(tuple(optimizers))
        mini_batches.append(picked)
        return {"value_loss": 0.0}

    monkeypatch.setattr(ppo, "ppo_step", recorded_step)
    options = ["--annotator", "none", "--iterations", 3, "--value-warmup", 1]
    run_quietly(ppo.main, *small_run(tmp_path), *options)
    folder = tmp_path / "out" / "rlhf-v2-ppo"
    results = results_of(folder)
    assert not list(folder.glob("pairs-*")) and not results["refreshed"]
    assert results["reward_models"]["safety"] == str(chain()[0] / "rlhf-v2" / "reward-safety")
    assert trained == [("critic",)] * 2 + [("policy", "critic")] * 4
    for first in (0, 2, 4):  # two mini-batches an iteration
        assert sorted(mini_batches[first] + mini_batches[first + 1]) == list(range(16))


def test_main_stops_early(tmp_path, monkeypatch):
    """No better for so many evaluations, or too far from the start: it ends, and the start is what
    is kept.
    """
    folder = tmp_path / "out" / "rlhf-v2-ppo"
    measured = {"scored": 1.0, "spread": 1.0, "length": 3.0, "helpfulness": 0.0, "safety": 0.0}
    starts = []

    def no_better(policy, reference, reward_models, prompts, settings, start):
        starts.append(start)
        return measured | {"reward": 1.0, "kl": 0.5, "prompts": len(prompts)}

    monkeypatch.setattr(ppo, "held_out", no_better)
    run_quietly(ppo.main, *small_run(tmp_path), "--patience", 2, "--iterations", 9)
    results = results_of(folder)
    assert results["iterations"] == 4
    assert results["best"]["iteration"] == 0 and results["best"]["prompts"] == 2
    assert starts[0] is None and starts[1]["iteration"] == starts[2]["iteration"] == 0
    assert "dev" not in results
    start, end = load_model(chain()[0] / "rlhf-v2")[0], load_model(folder)[0]
    assert equal(snapshot(start), snapshot(end))

    rewards, kls = iter([1.0, 2.0, 3.0]), iter([0.0, 1.0, 9.0])

    def drifting(*_):
        return measured | {"reward": next(rewards), "kl": next(kls)}

    monkeypatch.setattr(ppo, "held_out", drifting)
    run_quietly(ppo.main, *small_run(tmp_path), "--max-kl", 2, "--iterations", 9, "--fresh")
    results = results_of(folder)
    assert results["iterations"] == 4 and results["best"]["iteration"] == 2


def test_main_draws_new_numbers(tmp_path, monkeypatch):
    """No answer of a run shares its random numbers with another one, and each prompt has its turn.
    """
    drawn, asked = [], []

    def recorded(policy, tokenizer, encoded, keys, *args, **options):
        drawn.extend(map(tuple, keys))
        asked.extend(map(tuple, encoded))
        return runtime.sample_planned(policy, tokenizer, encoded, keys, *args, **options)

    monkeypatch.setattr(ppo, "sample_planned", recorded)
    run_quietly(ppo.main, *small_run(tmp_path), "--patience", 9)
    assert len(drawn) == 6 * 16 == len(set(drawn)) and len(set(asked)) == 18


def test_resume_refuses_what_is_not_of_this_run(tmp_path):
    def training() -> ppo._Training:
        policy, critic = tiny_model(1), Critic(tiny_model(2))
        optimizers = ppo._make_optimizers(policy, critic, Settings())
        return ppo._Training(tmp_path, policy, policy, critic, None, optimizers)

    killed, again = training(), training()
    killed.best = {"reward": 1.0, "start": {"reward": 0.5}}
    killed.save(3)
    again.resume(5, torch.device("cpu"))
    assert (again.first, again.best, again.stale) == (3, killed.best, 0)
    with pytest.raises(InputError, match="checkpoint-ppo.pth"):
        again.resume(2, torch.device("cpu"))
    state = load_checkpoint(again.checkpoint_file)
    for wrong in ({"best": 1.0}, {"best": {}}, {"stale": -1}, {"critic": state["policy"]}):
        runtime.save_checkpoint(again.checkpoint_file, state | wrong)
        with pytest.raises(InputError, match="checkpoint-ppo.pth"):
            again.resume(5, torch.device("cpu"))


def test_main_in_bfloat16(tmp_path):
    argv = small_run(tmp_path)
    long = {"prompt": [user("many words " * 1500)], "is_safety": False}
    with open(tmp_path / "prompts.jsonl", "a") as file:
        file.write(json.dumps(long) + "\n")
    options = [
        "--dtype",
        "bfloat16",
        "--iterations",
        2,
        "--too-long",
        "skip",
        "--annotator",
        "none",
    ]
    printed = run_quietly(ppo.main, *argv, *options)
    assert " rows are left out: longer than the model's context" in printed
    folder = tmp_path / "out" / "rlhf-v2-ppo"
    assert load_checkpoint(folder / "consolidated.00.pth")["norm.weight"].dtype == torch.float32
    assert abs(log_of(folder, "ppo")[0]["kl"]) < 0.3


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--init", "nowhere"), "nowhere is missing; `python rejection_sampling.py` makes it"),
        (("--clip", "0"), "--clip 0.0: must be more than 0"),
        (("--lam", "1.5"), "--lam 1.5: must lie between 0 and 1"),
        (("--value-warmup", "6"), "--value-warmup 6: must be less than --iterations 6"),
        (("--preset", "llama-2-7b"), "needs prompts: --prompts FILE.jsonl"),
        (("--max-prompts", "1"), "one prompt is too few"),
        (("--prompts", "TAG"), "line 2: the user's content holds the tag"),
        (("--prompts", "LONG"), "line 2: the prompt has [0-9]+ tokens"),
    ],
)
def test_main_tells_of_mistakes(argv, message, tmp_path):
    option, value = argv
    base = small_run(tmp_path)
    if option == "--preset":
        where = ["--init", str(chain()[0] / "rlhf-v2"), "--out", str(tmp_path / "out")]
        base = [*TINY[2:], *where]
    good = toy_prompts(1)[0]
    write_lines(tmp_path / "TAG", [good, replace(good, messages=[user("<<SYS>>")])])
    write_lines(tmp_path / "LONG", [good, replace(good, messages=[user("many words " * 1500)])])
    if value.isupper():
        value = tmp_path / value
    with pytest.raises(InputError, match=message):
        run_quietly(ppo.main, *base, option, value)
    assert not (tmp_path / "out" / "rlhf-v2-ppo").exists()


def test_presets_are_the_papers():
    for name, preset in ppo.PRESETS.items():
        if not name.startswith("llama-2"):
            continue
        settings = Settings(**preset)
        assert settings.learning_rate == 1e-6
        assert (settings.batch, settings.mini_batch) == (512, 64)
        assert settings.clip == 0.2
        assert settings.weight_decay == 0.1
        assert settings.beta == (0.01 if name in ("llama-2-7b", "llama-2-13b") else 0.005)
        assert 200 <= settings.iterations <= 400
    assert re.search("constant", ppo.__doc__)
