"""Which rows are trained on together, and as which tensors."""

import random

import torch
from torch import Tensor


def plan_steps(
    lengths: list[int], batch_tokens: int, epochs: int = 1, seed: int = 0, micro_tokens: int = 16384
) -> list[list[list[int]]]:
    """Plan all optimiser steps beforehand: a step is a list of micro-batches, a micro-batch a list
    of row numbers.

    A step is the next rows of a shuffled epoch, up to `batch_tokens` tokens of theirs (a longer row
    stands alone): a fair sample, never a batch of rows that are alike. Within the step, rows of
    like length form micro-batches, each with at most `micro_tokens` tokens and a quarter of them
    padding; their gradients are added up.
    """
    rng, steps = random.Random(f"plan {seed}"), []
    for _ in range(epochs):
        order, step, tokens = list(range(len(lengths))), [], 0
        rng.shuffle(order)
        for row in order:
            if step and tokens + lengths[row] > batch_tokens:
                steps.append(step)
                step, tokens = [], 0
            step.append(row)
            tokens += lengths[row]
        steps += [step] if step else []
    return [
        cut(sorted(step, key=lambda row: lengths[row]), lengths, micro_tokens, padding=0.25)
        for step in steps
    ]


def cut(rows: list[int], lengths: list[int], tokens: int, padding: float = 1.0) -> list[list[int]]:
    """Cut rows, sorted by length, into batches of at most so many tokens (rows times the longest)
    and share of padding.
    """
    pieces, piece, real = [], [], 0
    for row in rows:
        padded = lengths[row] * (len(piece) + 1)
        if piece and (padded > tokens or real + lengths[row] < (1 - padding) * padded):
            pieces.append(piece)
            piece, real = [], 0
        piece.append(row)
        real += lengths[row]
    return pieces + [piece] if piece else pieces


def batches_by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Batches for reading without training: sorted by length, each at most so many tokens, padding
    counted.
    """
    return cut(sorted(range(len(lengths)), key=lambda row: lengths[row]), lengths, batch_tokens)


def micro_batches(
    mask: Tensor, picked: list[int], micro_tokens: int
) -> list[tuple[list[int], int]]:
    """The picked rows in batches of like length, each with its longest row's length: [(rows,
    length), …].

    mask: (batch, seq) bool; a row ends with its last true. picked: row numbers. micro_tokens: of a
    batch, padding counted.
    """
    # (batch)
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).tolist()
    batches = [
        [picked[i] for i in found]
        for found in batches_by_length([ends[row] for row in picked], micro_tokens)
    ]
    return [(rows, max(ends[row] for row in rows)) for rows in batches]


def pad(rows: list[list], value=0) -> Tensor:
    """Rows of different lengths as one tensor, padded on the right: (batch, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])
