"""What the experiments share: where results go, and running commands side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def save_result(name: str, result: dict) -> None:
    """Write experiments/results/NAME.json, small enough to be committed; floats to four digits."""

    def rounded(value):
        if isinstance(value, dict):
            return {str(key): rounded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(item) for item in value]
        return round(value, 4) if isinstance(value, float) else value

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(f"wrote {RESULTS / name}.json")


def side_by_side(jobs: dict[str, list[list[str]]], log_folder: Path, at_once: int) -> None:
    """Run several lists of commands, `at_once` lists at a time, one thread each; each command in the repository's root.

    A list stops at its first failure. Output goes to log_folder/NAME.log. Raises SystemExit naming what failed.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(jobs.items()), {}, []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def start(name: str, commands: list[list[str]]) -> None:
        if commands:
            log = (log_folder / f"{name}.log").open("a")
            command = [sys.executable, *commands[0]]
            running[name] = (subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), commands)

    while waiting or running:
        while waiting and len(running) < at_once:
            start(*waiting.pop(0))
        for name, (process, commands) in list(running.items()):
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            del running[name]
            print(f"{name}: {' '.join(commands[0])}: {'done' if process.returncode == 0 else 'FAILED'}", flush=True)
            if process.returncode:
                failed.append(f"{name}: {' '.join(commands[0])}; see {log_folder / name}.log")
            else:
                start(name, commands[1:])
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))
