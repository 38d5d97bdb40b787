"""The machine that a stage runs on: device, precision, threads, seed."""

import random

import numpy as np
import torch

from data.errors import InputError


def choose_device(name="auto"):
    """The torch.device called `auto`, `cpu`, `cuda` (or `cuda:1`) or `mps`.

    auto: the first that is there of cuda, mps, cpu. InputError if the name is unknown or the device
    is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind in available if available[kind]))
    kind, _, index = name.partition(":")
    if kind not in available or not (index == "" or kind == "cuda" and index.isdecimal()):
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:0 or mps")
    if not available[kind] or (index and int(index) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: torch finds no such device on this machine")
    return torch.device(name)


def choose_dtype(name="auto", device="cpu"):
    """The precision of matrix products: `float32`, `bfloat16`, or `auto` (bfloat16 on a GPU that
    has it, else float32).

    It is meant for autocast: weights that are trained stay in float32, where a step of 1e-6 still
    moves them. There is no float16: its small range would need loss scaling.
    """
    if name == "auto":
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {name}: unknown; use auto, float32 or bfloat16")
    return getattr(torch, name)


def set_seed(seed):
    """Seed Python's, NumPy's and torch's generators; 0 ≤ seed < 2³² (NumPy's range), else
    InputError.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: must lie between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_threads(threads):
    """Let torch use so many CPU threads; 0 leaves torch's own choice. Small models are fastest with
    one or two.
    """
    if threads < 0:
        raise InputError(f"--threads {threads}: must be 0 (torch's choice) or more")
    if threads:
        torch.set_num_threads(threads)
