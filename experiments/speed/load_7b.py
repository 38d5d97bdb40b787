"""How long does a checkpoint of Llama 2 7B's size take to load, and how much memory? Random
weights, bfloat16, 13.5 GB.

    python -m experiments.speed.load_7b FOLDER    # FOLDER must be new; it is deleted at the end

Making the file and loading it are processes of their own. The file is dropped from the page cache
before `cat` and before the loader, so both read the disk. Peak memory is VmHWM, reset just before
loading, less what the process held then: anonymous memory and the mapped pages of the file
together, at their highest.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from data import Tokenizer, world
from model import PRESETS, Transformer, generate
from runtime import load_model, save_model


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def make(folder: Path, n_layers: int) -> None:
    """Writes the checkpoint, in Meta's layout, with our toy tokenizer beside it. Needs the model's
    size in memory.
    """
    args = replace(PRESETS["llama-2-7b"], n_layers=n_layers)
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16)
    model.to_empty(device="cpu").init_weights(0)
    save_model(folder, model, Tokenizer(world.TOKENIZER))


def load(folder: Path) -> None:
    """Loads it and answers a few tokens."""
    torch.nn.Embedding(2, 2, device="meta")  # the imports that this costs are not the loader's
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    model, _ = load_model(folder, dtype=torch.bfloat16)
    seconds = time.perf_counter() - start
    peak = status("VmHWM") - before
    size = sum(weight.nbytes for weight in model.parameters())
    print(
        f"load_model: {seconds:.1f} s, peak {peak / 1e9:.2f} GB = {peak / size:.3f} of the model's"
        f" {size / 1e9:.2f}"
    )
    start = time.perf_counter()
    answer = generate(model, [[1, 15043, 29892]], [(0,)], 4, temperature=0, eos_id=2)[0]
    print(
        f"{len(answer.ids)} tokens: {time.perf_counter() - start:.1f} s, {answer.ids}", flush=True
    )


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="a new folder for the checkpoint, deleted at the end"
    )
    parser.add_argument("--layers", type=int, default=32, help="fewer for a try (default: 32)")
    parser.add_argument("--step", choices=("make", "load"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "make":
        return make(arguments.folder, arguments.layers)
    if arguments.step == "load":
        return load(arguments.folder)
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists already")
    again = [sys.executable, "-m", "experiments.speed.load_7b", str(arguments.folder)]
    again += ["--layers", str(arguments.layers), "--step"]
    path = arguments.folder / "consolidated.00.pth"
    try:
        subprocess.run([*again, "make"], check=True)
        forget(path)
        start = time.perf_counter()
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
        print(
            f"cat: {time.perf_counter() - start:.1f} s for {path.stat().st_size / 1e9:.2f} GB",
            flush=True,
        )
        forget(path)
        subprocess.run([*again, "load"], check=True)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
