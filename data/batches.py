"""Which rows are trained on together, and as which tensors."""

import random

import torch
from torch import Tensor


def plan_steps(lengths: list[int], batch_tokens: int, epochs: int = 1, seed: int = 0,
               micro_tokens: int | None = None) -> list[list[list[int]]]:
    """Plan all optimiser steps beforehand: a step is a list of micro-batches, a micro-batch a list of row numbers.

    Rows are shuffled, then neighbours of like length (within 8 batches' worth) go together, so that little is padding and
    a batch still holds a mixture. A step holds at most `batch_tokens` tokens, padding counted; a longer row stands alone.
    A micro-batch holds at most `micro_tokens` (default: the whole step); its gradients are added up (accumulation).
    """
    rng, steps = random.Random(f"plan {seed}"), []
    mean = sum(lengths) / max(1, len(lengths))
    window = max(1, int(8 * batch_tokens / max(1.0, mean)))
    for _ in range(epochs):
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch = []
        for start in range(0, len(order), window):
            near = sorted(order[start: start + window], key=lambda row: lengths[row])
            epoch += cut(near, lengths, batch_tokens)
        rng.shuffle(epoch)
        steps += epoch
    return [cut(step, lengths, micro_tokens or batch_tokens) for step in steps]


def cut(rows: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """Cut a list of rows into pieces of at most so many tokens each: rows times the longest."""
    pieces, piece, longest = [], [], 0
    for row in rows:
        longest = max(longest, lengths[row])
        if piece and longest * (len(piece) + 1) > tokens:
            pieces.append(piece)
            piece, longest = [], lengths[row]
        piece.append(row)
    return pieces + [piece] if piece else pieces


def batches_by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Batches for reading without training: sorted by length, each at most so many tokens, padding counted."""
    return cut(sorted(range(len(lengths)), key=lambda row: lengths[row]), lengths, batch_tokens)


def pad(rows: list[list], value=0) -> Tensor:
    """Rows of different lengths as one tensor, padded on the right: (batch, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])
