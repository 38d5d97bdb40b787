"""How many CPU seconds does the default chain take in two checkouts, stage by stage?

    python -m experiments.speed.chain OLD NEW --repeats 3

Each stage runs in one checkout, then in the other, with the same settings, on one thread; who
begins changes each time. The chain is SFT, the reward models, four rounds, the evaluation. Each
checkout keeps its own `out`, in a folder that is deleted at the end. CPU seconds are the stage's
process and all that it started. With the default preset a repeat takes about ten minutes.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from data import InputError
from report import Section, Table, print_tables
from runtime import check_positive, parse_settings, run

STAGES = ("sft", "reward", "rejection_sampling", "eval")


@dataclass
class Settings:
    old: Path  # folder of the older checkout
    new: Path  # folder of the newer one
    repeats: int = 3
    preset: str = "toy"  # of all stages

    def __post_init__(self) -> None:
        check_positive(self, "repeats")
        for folder in (self.old, self.new):
            if not (folder / "sft.py").is_file():
                raise InputError(f"{folder}: no checkout there (sft.py is missing)")


@dataclass(frozen=True)
class Spent:
    """What a process and its children took."""

    cpu: float
    wall: float


def run_stage(checkout: Path, stage: str, out: Path, seed: int, preset: str) -> Spent:
    """Runs one stage of a checkout.

    Raises:
        InputError: it failed; its last words.
    """
    command = [sys.executable, f"{stage}.py", "--threads", "1"]
    command += ["--seed", str(seed), "--out", str(out)]
    if stage != "eval":  # it looks at whatever models there are
        command += ["--preset", preset]
    with tempfile.TemporaryFile() as printed:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=checkout, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # its own times, its children's included
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            printed.seek(0)
            words = printed.read().decode(errors="replace").strip().splitlines()[-3:]
            raise InputError(f"{checkout}/{stage}.py failed: {' '.join(words)}")
    return Spent(usage.ru_utime + usage.ru_stime, wall)


def measure(settings: Settings) -> dict[str, dict[str, list[Spent]]]:
    """{stage: {"old" or "new": a time for each repeat}}."""
    checkouts = {"old": settings.old.resolve(), "new": settings.new.resolve()}
    times = {stage: {name: [] for name in checkouts} for stage in STAGES}
    for repeat in range(settings.repeats):
        folder = Path(tempfile.mkdtemp(prefix="chain-"))
        order = list(checkouts)
        if repeat % 2:
            order.reverse()
        try:
            for stage in STAGES:
                for name in order:
                    spent = run_stage(
                        checkouts[name], stage, folder / name, repeat, settings.preset
                    )
                    times[stage][name].append(spent)
                    print(f"{repeat} {stage} {name}: {spent.cpu:.1f} CPU s", flush=True)
        finally:
            shutil.rmtree(folder)
    return times


def table(times: dict[str, dict[str, list[Spent]]]) -> Table:
    """Medians by stage, and of the whole chain."""
    whole = {}
    for name in ("old", "new"):
        by_stage = [times[stage][name] for stage in STAGES]
        whole[name] = [
            Spent(sum(one.cpu for one in repeat), sum(one.wall for one in repeat))
            for repeat in zip(*by_stage, strict=True)
        ]
    rows = []
    for stage, of_stage in {**times, "the whole chain": whole}.items():
        cpu = {}
        for name, spent in of_stage.items():
            cpu[name] = statistics.median(one.cpu for one in spent)
        pairs = zip(of_stage["old"], of_stage["new"], strict=True)
        saved = [1 - new.cpu / old.cpu for old, new in pairs]
        wall = statistics.median(one.wall for one in of_stage["new"])
        rows.append(
            [
                stage,
                f"{cpu['old']:.1f}",
                f"{cpu['new']:.1f}",
                f"{statistics.median(saved):.0%}",
                f"{min(saved):.0%}, {max(saved):.0%}",
                f"{wall:.1f}",
            ]
        )
    columns = ["", "old, CPU s", "new, CPU s", "saved", "from, to", "new, wall s"]
    return Table("Medians; what is saved is compared repeat by repeat.", columns, rows)


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv=argv)
    print_tables([Section("The default chain", [table(measure(settings))])])


if __name__ == "__main__":
    run(main)
