"""The losses and the best answer in plain Python, one number after the other."""

import math


def log_softmax(row: list[float], target: int) -> float:
    top = max(row)
    return row[target] - top - math.log(sum(math.exp(value - top) for value in row))


def sft(logits: list, tokens: list, mask: list) -> tuple[float, int]:
    """Sum of -log p(token t | logits at t - 1) over tokens with mask."""
    total, count = 0.0, 0
    for rows, ids, marks in zip(logits, tokens, mask, strict=True):
        for t in range(1, len(ids)):
            if marks[t]:
                total, count = total - log_softmax(rows[t - 1], ids[t]), count + 1
    return total, count


def ranking(chosen: float, rejected: float, margin: float) -> float:
    return math.log(1 + math.exp(-(chosen - rejected - margin)))


def safety(score: float, is_safe: bool) -> float:
    probability = 1 / (1 + math.exp(-score))
    return -math.log(probability if is_safe else 1 - probability)


def best(rewards: list[float], owners: list) -> dict:
    """All pairs compared: an answer is best if no answer to its prompt is better, nor equal and
    earlier.
    """
    return {
        owner: i
        for i, owner in enumerate(owners)
        if not any(
            owners[j] == owner and (rewards[j] > rewards[i] or rewards[j] == rewards[i] and j < i)
            for j in range(len(owners))
        )
    }
