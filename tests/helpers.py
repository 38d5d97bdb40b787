"""What several test files share: a tiny model, hand-made rows, the chain run once, and simulated
kills.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import eval as evaluation
import rejection_sampling
import reward
import runtime
import sft
from data import Dialog, Prompt, Tokenizer, world
from model import ModelArgs, Transformer


@functools.cache
def toy_tokenizer() -> Tokenizer:
    return Tokenizer(world.TOKENIZER)


def tiny_model(seed: int = 0, **changes) -> Transformer:
    """A model of 32 dimensions with random weights over the toy vocabulary."""
    args = dict(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=toy_tokenizer().vocab_size,
        multiple_of=32,
        max_seq_len=256,
    )
    model = Transformer(ModelArgs(**args | changes))
    model.init_weights(seed)
    return model.eval()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def toy_prompts(n: int, split: str = "train", seed: int = 0) -> list[Prompt]:
    """So many of the toy world's prompts, a third of each kind."""
    shares = {"ordinary": n - 2 * (n // 3), "borderline": n // 3, "unsafe": n // 3}
    return world.prompts(split, shares, seed)


def toy_dialogs(n: int, seed: int = 0) -> list[Dialog]:
    """So many of the toy world's demonstrations."""
    rng = random.Random(seed)
    return [world.single(rng) for _ in range(n)]


def write_lines(path: Path, rows: list) -> Path:
    """A JSONL file of rows or records; a row that is text already is written as it is."""
    lines = []
    for row in rows:
        if hasattr(row, "to_json"):
            row = row.to_json()
        lines.append(row if isinstance(row, str) else json.dumps(row))
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run_quietly(main, *argv) -> str:
    """main(argv) in this process; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        main([str(word) for word in argv])
    return printed.getvalue()


@functools.cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="llama-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


TINY = ("--preset", "tiny", "--threads", "1", "--device", "cpu")


@functools.cache
def chain() -> tuple[Path, dict[str, str]]:
    """`out/` of the whole chain on the tiny preset, rounds 1 and 2, and what each command printed;
    read only.
    """
    out, printed = scratch() / "chain", {}
    printed["sft"] = run_quietly(sft.main, *TINY, "--out", out, "--max-rows", 1500)
    printed["reward"] = run_quietly(
        reward.main, *TINY, "--out", out, "--helpfulness-pairs", 100, "--safety-pairs", 60
    )
    printed["rejection_sampling"] = run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        out,
        "--rounds",
        "1-2",
        "--max-prompts",
        16,
        "--helpfulness-pairs",
        20,
        "--safety-pairs",
        20,
    )
    printed["eval"] = run_quietly(evaluation.main, "--out", out, "--split", "dev", "--threads", 1)
    return out, printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all model files under a folder, by file and name."""
    found = {}
    for path in sorted(folder.rglob("*.pth")):
        for name, tensor in runtime.load_checkpoint(path).items():
            found[f"{path.relative_to(folder)} {name}"] = tensor
    return found


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first and first.keys() == second.keys()
    for name in first:
        one, two = first[name], second[name]
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name


class Kill(BaseException):
    """Stands for SIGKILL: from some moment on the process changes nothing any more."""


class Killer:
    """Counts optimiser steps, batches of sampling and changes on the disk; raises `Kill` from
    number `at` on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: float = float("inf")):
        self.at, self.events, self.kinds = at, 0, []
        for owner, name in [
            (torch.optim.AdamW, "step"),
            (runtime.sampling, "generate"),
            (os, "fsync"),
            (os, "replace"),
        ]:
            monkeypatch.setattr(owner, name, self.counting(getattr(owner, name), name))
        # a dead process does not tidy up either
        for owner, name in [(Path, "unlink"), (os, "truncate")]:
            monkeypatch.setattr(owner, name, self.counting(getattr(owner, name), ""))

    def counting(self, function, kind):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if kind:
                self.events += 1
                self.kinds.append(kind)
            if self.events >= self.at:
                raise Kill
            return function(*args, **kwargs)

        return call


DYING = """
import os, signal, sys, torch, runtime, sft
from importlib import import_module
def dying(step, left=[int(sys.argv[2])]):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return step(*args, **kwargs)
    return call
torch.optim.AdamW.step = dying(torch.optim.AdamW.step)
sft.optimise.__kwdefaults__["save_every"] = 2
runtime.sample_answers.__kwdefaults__["batch_rows"] = 8
import_module(sys.argv[1]).main(sys.argv[3:])
"""


def die(stage: str, steps: int, argv: list) -> None:
    """Run a stage in a process of its own that kills itself (SIGKILL: no handler runs) after so
    many optimiser steps.
    """
    done = subprocess.run(
        [sys.executable, "-c", DYING, stage, str(steps), *argv],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode not in (0, 1), done.stderr
