"""An area with known faults, to see that the fuzzing finds them. A case is about its outcome."""

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

from tests.fuzz.judge import Case, OtherResult, Wrong


def accepts(folder: Path) -> None:
    (folder / "input").read_bytes()


def differs(folder: Path) -> None:
    raise OtherResult("another number")


def refuses(folder: Path, line: str = "error: {}/input: not a number") -> None:
    print(line.format(folder), file=sys.stderr)
    sys.exit(1)


def crashes(folder: Path) -> None:
    raise KeyError("step")


def dies(folder: Path) -> None:
    os._exit(3)


def sleeps(folder: Path) -> None:
    time.sleep(600)


def writes_half(folder: Path) -> None:
    (folder / "output").write_text("ha")
    refuses(folder)


def lies(folder: Path) -> None:
    raise Wrong("1, not 2")


TRAPS = [
    ("accepted", accepts),
    ("other result", differs),
    ("refused", refuses),
    ("unclear", partial(refuses, line="error: no number")),
    ("traceback", partial(refuses, line="Traceback")),
    ("traceback", crashes),
    ("half-written", writes_half),
    ("wrong", lies),
    ("traceback", dies),
    ("hang", sleeps),
]


def prepare(folder: Path) -> None:
    pass


def make(valid: None, rng: Random, folder: Path) -> Case:
    return case_of(*rng.choice(TRAPS), folder)


def case_of(outcome: str, trap: Callable, folder: Path) -> Case:
    (folder / "input").write_text("1")
    return Case(outcome, partial(trap, folder), folder, where=str(folder))
