"""What does a token cost, in time and memory, against a model's size, its length and the batch?

    python -m experiments.speed.cost

Ours alone, float32, one thread. From a middle point one of the three is changed at a time.
Generation: CPU time of a new token, the prompt's reading included. Training: CPU time of a token of
a step. Memory is the peak of the process beyond what it held before the model was made. Each point
is a process of its own, so that none inherits another's memory.
"""

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data import EncodedDialog
from experiments.speed.measuring import time_steps, time_whole
from model import ModelArgs, Transformer, generate
from runtime import parse_settings
from sft import answer_loss, optimise

ROOT = Path(__file__).parent.parent.parent
STATUS = Path("/proc/self/status")
VOCABULARY = 1024


@dataclass(frozen=True)
class Point:
    """What is measured: a model's width, tokens a row, rows."""

    dim: int = 192
    length: int = 128  # half of it is a prompt where answers are sampled
    batch: int = 16


@dataclass
class Settings:
    tiny: bool = False  # tiny models: to see that all of it runs
    point: tuple[int, ...] = ()  # only this one: dimensions, tokens, rows
    work: Literal["generation", "training"] = "generation"  # what is done at that point


AXES = {"dim": (64, 128, 192, 256, 384), "length": (64, 128, 256, 512), "batch": (1, 4, 16, 64)}
TINY_AXES = {"dim": (32, 64), "length": (8, 16), "batch": (1, 2)}
LABELS = {"dim": "dimensions of the model", "length": "tokens a row", "batch": "rows"}
WORK = ("generation", "training")


def model_of(point: Point) -> Transformer:
    """Four layers, heads of 32 numbers, half as many key heads."""
    heads = point.dim // 32
    args = ModelArgs(
        dim=point.dim,
        n_layers=4,
        n_heads=heads,
        n_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        vocab_size=VOCABULARY,
        multiple_of=32,
        max_seq_len=max(512, point.length),
    )
    model = Transformer(args)
    model.init_weights(0)
    return model


def measure(point: Point, work: str) -> dict[str, float]:
    """{"microseconds": CPU time a token, "megabytes": peak, "parameters"} of one point."""
    torch.set_num_threads(1)
    run = {"generation": sampling_time, "training": training_time}[work]
    smallest = Point(dim=32, length=8, batch=1)
    run(model_of(smallest), random_rows(smallest))  # loads what torch loads at first use
    before = forget_peak()
    model = model_of(point)
    seconds = run(model, random_rows(point))
    return {
        "microseconds": 1e6 * seconds,
        "megabytes": (peak() - before) / 1e6,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }


def random_rows(point: Point) -> list[list[int]]:
    rng = random.Random(0)
    rows = []
    for _ in range(point.batch):
        rows.append([rng.randrange(3, VOCABULARY) for _ in range(point.length)])
    return rows


def sampling_time(model: Transformer, rows: list[list[int]]) -> float:
    """CPU seconds of a new token: the second half of each row is sampled."""
    half = len(rows[0]) // 2
    prompts = [row[:half] for row in rows]
    keys = [(0, i) for i in range(len(rows))]

    def sample() -> None:
        generate(model, prompts, keys, half, 1.0, eos_id=-1)

    sample()  # warms up
    return time_whole(sample).cpu / (half * len(rows))


def training_time(model: Transformer, rows: list[list[int]]) -> float:
    """CPU seconds of a token of a training step."""
    steps = 4
    dialogs = [EncodedDialog(ids, [True] * len(ids), [0] * len(ids)) for ids in rows]

    def batch_loss(picked: list[int]):
        return *answer_loss(model, [dialogs[i] for i in picked]), {}

    def train(folder: str) -> None:
        plan = [[list(range(len(rows)))]] * steps
        optimise(model, plan, batch_loss, learning_rate=1e-4, folder=Path(folder), phase="speed")

    with tempfile.TemporaryDirectory() as folder:
        return time_steps(lambda: train(folder)).cpu / (steps * len(rows) * len(rows[0]))


# ---- memory: the system's own account, where it keeps one ----


def forget_peak() -> float:
    """Starts a new peak; what the process holds now, in bytes. NaN where Linux does not tell."""
    if not STATUS.exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")
    return read_status("VmRSS")


def peak() -> float:
    """The most that the process has held since, in bytes."""
    return read_status("VmHWM") if STATUS.exists() else float("nan")


def read_status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no {name}")


# ---- all points ----


def measure_all(tiny: bool) -> list[dict]:
    """Rows of {"axis", "work", the point, what it costs}; each in a process of its own."""
    axes = TINY_AXES if tiny else AXES
    middle = Point(dim=32, length=16, batch=2) if tiny else Point()
    rows = []
    for axis, values in axes.items():
        for value in values:
            point = replace(middle, **{axis: value})
            for work in WORK:
                row = {"axis": axis, "work": work, **asdict(point)} | measure_apart(point, work)
                print(describe(row), flush=True)
                rows.append(row)
    return rows


def measure_apart(point: Point, work: str) -> dict[str, float]:
    """`measure` in a new process."""
    numbers = ",".join(map(str, astuple(point)))
    command = [sys.executable, "-m", __spec__.name, "--point", numbers, "--work", work]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return json.loads(done.stdout)


def describe(row: dict) -> str:
    place = f"{row['dim']} dimensions, {row['length']} tokens, {row['batch']} rows"
    return f"{row['work']} | {place} | {row['microseconds']:.1f} µs | {row['megabytes']:.1f} MB"


def draw(rows: list[dict], file: Path) -> None:
    """Time above, memory below; a panel for each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(LABELS), figsize=(12, 6), layout="constrained")
    heights = {"microseconds": "CPU time of a token, µs", "megabytes": "peak memory, MB"}
    for column, (axis, label) in enumerate(LABELS.items()):
        for line, (measured, height) in enumerate(heights.items()):
            panel = panels[line][column]
            for work in WORK:
                found = [row for row in rows if (row["axis"], row["work"]) == (axis, work)]
                x = [row[axis] for row in found]
                panel.plot(x, [row[measured] for row in found], marker="o", label=work)
            panel.set(xscale="log", yscale="log", xlabel=label, ylabel=height)
            panel.set_xticks(x, list(map(str, x)))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    if settings.point:
        print(json.dumps(measure(Point(*settings.point), settings.work)))
    else:
        measure_all(settings.tiny)


if __name__ == "__main__":
    main()
