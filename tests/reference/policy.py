"""PPO in plain Python: lists of numbers, one answer and one token after the other, from the
formulas alone.

An answer is a list of its own tokens' numbers; there is no padding and no mask here.
"""

import math


def whiten(numbers: list[float], shift_mean: bool = True) -> list[float]:
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    return [(x - mean) / (deviation + 1e-6) + (0.0 if shift_mean else mean) for x in numbers]


def rewards(
    score: float, logprobs: list[float], reference: list[float], beta: float
) -> list[float]:
    """Equation 4 token by token: the KL where it arises, the score at the end."""
    found = [-beta * (p - q) for p, q in zip(logprobs, reference, strict=True)]
    found[-1] += score
    return found


def gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The sum over k of (γλ)^k δ_{t+k}, written out for each t, without recursion."""
    n = len(rewards)
    delta = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)
    ]
    advantages = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def policy(logprob: float, old: float, advantage: float, clip: float) -> float:
    """By cases: beyond the clip in the direction that the advantage asks for, the objective stands
    still.
    """
    ratio = math.exp(logprob - old)
    if advantage > 0 and ratio > 1 + clip:
        return -(1 + clip) * advantage
    if advantage < 0 and ratio < 1 - clip:
        return -(1 - clip) * advantage
    return -ratio * advantage


def value(found: float, wanted: float) -> float:
    return (found - wanted) * (found - wanted) / 2


def iteration(
    scores: list[float],
    logprobs: list[list[float]],
    reference: list[list[float]],
    values: list[list[float]],
    beta: float,
    gamma: float,
    lam: float,
    shift_mean: bool = True,
) -> tuple[list, list, list]:
    """(rewards, whitened advantages, returns) of a batch, each a list of answers."""
    token_rewards = [
        rewards(*row, beta)
        for row in zip(whiten(scores, shift_mean), logprobs, reference, strict=True)
    ]
    both = [gae(r, v, gamma, lam) for r, v in zip(token_rewards, values, strict=True)]
    flat = iter(whiten([a for advantages, _ in both for a in advantages]))
    return (
        token_rewards,
        [[next(flat) for _ in advantages] for advantages, _ in both],
        [returns for _, returns in both],
    )
