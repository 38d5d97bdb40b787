"""Commands side by side, each a process of its own on one thread."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

Commands = list[list[str]]  # each the words behind `python`


def side_by_side(jobs: dict[str, Commands], log_folder: Path, at_once: int) -> None:
    """Run several lists of commands in the repository's root, `at_once` lists at a time.

    A list stops at its first failure. Output goes to log_folder/NAME.log.

    Raises:
        SystemExit: names what failed, once all others are done.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    waiting = [(name, commands) for name, commands in jobs.items() if commands]
    running = {}  # name: its process, and its commands from this one on
    failed = []
    while waiting or running:
        while waiting and len(running) < at_once:
            name, commands = waiting.pop(0)
            running[name] = _start(commands[0], log_folder / f"{name}.log"), commands
        for name, (process, commands) in list(running.items()):
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            del running[name]
            done, *rest = commands
            line = f"{name}: {' '.join(done)}"
            if process.returncode:
                print(f"{line}: FAILED", flush=True)
                failed.append(f"{line}; see {log_folder / name}.log")
                continue
            print(f"{line}: done", flush=True)
            if rest:
                running[name] = _start(rest[0], log_folder / f"{name}.log"), rest
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


def _start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
