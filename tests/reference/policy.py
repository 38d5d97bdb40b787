"""PPO in plain Python: lists of numbers, one answer and one token after the other, from the
formulas alone.

An answer is a list of its own tokens' numbers; there is no padding and no mask here.
"""

import math


def whiten(numbers: list[float], shift_mean: bool = True) -> list[float]:
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))
    new_mean = 0.0 if shift_mean else mean
    return [(x - mean) / (deviation + 1e-6) + new_mean for x in numbers]


def rewards(
    score: float, logprobs: list[float], reference: list[float], beta: float
) -> list[float]:
    """Equation 4 token by token: the KL where it arises, the score at the end."""
    of_tokens = [-beta * (p - q) for p, q in zip(logprobs, reference, strict=True)]
    of_tokens[-1] += score
    return of_tokens


def gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The sum over k of (γλ)^k δ_{t+k}, written out for each t, without recursion."""
    n = len(rewards)
    next_values = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * next_values[t] - values[t] for t in range(n)]
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    return advantages, returns


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


def value(predicted: float, wanted: float) -> float:
    error = predicted - wanted
    return error * error / 2
