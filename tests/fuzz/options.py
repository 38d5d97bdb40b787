"""Command lines: every option of every stage and of `python -m play`, with values out of range, up
to the settings. Nothing is run.
"""

import dataclasses
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType

import torch

import eval as evaluation
import gatt
import ppo
import rejection_sampling
import reward
import sft
from experiments import ppo_microscope
from play import best_of_n, chat, compare, ghost, samples, scores
from runtime import choose_device, choose_dtype, parse_settings, run, set_seed, set_threads
from tests.fuzz.judge import Case

COMMANDS = {  # name: (module, its settings)
    "sft": (sft, sft.Settings),
    "reward": (reward, reward.Settings),
    "rejection_sampling": (rejection_sampling, rejection_sampling.Settings),
    "gatt": (gatt, gatt.Settings),
    "ppo": (ppo, ppo.Settings),
    "eval": (evaluation, evaluation.Settings),
    "play chat": (chat, chat.Settings),
    "play try": (scores, scores.TrySettings),
    "play score": (scores, scores.ScoreSettings),
    "play best-of-n": (best_of_n, best_of_n.Settings),
    "play samples": (samples, samples.Settings),
    "play compare": (compare, compare.Settings),
    "play ghost": (ghost, ghost.Settings),
    "play microscope": (ppo_microscope, ppo_microscope.Settings),
}
NUMBERS = "0 1 2 -1 -0.0 0.5 1.5 1e-320 1e300 nan inf -inf 1_0 0x10".split()
NUMBERS += [str(2**31), str(2**32), str(2**63), str(10**20), "9" * 400, "9" * 5000]
WORDS = "none None toy auto cuda:99 cuda:-1 mps float16 1- - 4-1 1-2-3 1-99999999999".split()
WORDS += ["", " ", "../x", "a/b", "é", "\ud800", "\0", "true", "x" * 300]
LISTS = ", 1, 0.8 0.8,0.8,0.8 0,0 -1,1 nan,1 1e300,1 0.5,1 1,x 0.1,2".split()
HOSTILE = NUMBERS * 2 + WORDS + LISTS
STRAY = "-- - --seed --no-seed --preset= --fresh=1 -x --out extra --prese".split()


def words_for(settings: type, rng: Random) -> list[str]:
    """A command line with one or two options, of any value."""
    fields = dataclasses.fields(settings)
    words = []
    for field in fields:
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            words.append(rng.choice(["given", "given", "given", rng.choice(HOSTILE)]))
    for field in rng.sample(fields, min(len(fields), rng.choice([1, 1, 1, 2]))):
        option = "--" + field.name.rstrip("_").replace("_", "-")
        words.append(f"{option}={rng.choice(HOSTILE)}")
        if field.type is bool:
            words[-1] = rng.choice([option, option.replace("--", "--no-"), words[-1]])
    if rng.random() < 0.2 and hasattr(settings, "preset"):
        words.append(f"--preset={rng.choice(['tiny', 'llama-2-70b', 'x'])}")
    if rng.random() < 0.1:
        words.append(rng.choice(STRAY))
    return words


def read(module: ModuleType, kind: type, words: list[str]) -> None:
    """What the command does before it looks at files."""
    try:
        if module is reward:
            settings = reward._read_settings(words)
        else:
            settings = parse_settings(kind, "", getattr(module, "PRESETS", None), words)
        if module is rejection_sampling:
            versions = rejection_sampling._wanted_versions(settings.rounds)
            rejection_sampling._check_name(settings.name, versions)
        choose_dtype(getattr(settings, "dtype", "auto"), choose_device(settings.device))
        set_seed(getattr(settings, "seed", 0))
        set_threads(getattr(settings, "threads", 0))
    finally:
        torch.set_num_threads(1)


def prepare(folder: Path) -> None:
    pass


def make(valid: None, rng: Random, folder: Path) -> Case:
    name = rng.choice(list(COMMANDS))
    module, kind = COMMANDS[name]
    words = words_for(kind, rng)
    shown = " ".join(word[:40] for word in words)
    return Case(f"{name} {shown!a}", partial(run, partial(read, module, kind, words)), folder)
