"""Commands that really run, on the tiny preset, with one option of a strange value: a refused one
leaves nothing finished, an accepted one a model that can be loaded.
"""

import typing
from functools import partial
from pathlib import Path
from random import Random

import runtime
from runtime import load_model
from tests.fuzz.judge import Case
from tests.fuzz.options import COMMANDS as SETTINGS
from tests.fuzz.options import LISTS
from tests.fuzz.stages import COMMANDS, command, copy_needed, make_base, no_remains

NUMBERS = ["0", "1", "-1", "0.5", "1.5", "1e-320", "1e300", "1e20", str(10**20), str(2**63)]
WORDS = ["", "none", "toy", "x", "../x", "/", "é", "1-2", "1-"]
NOT_HERE = ("out", "preset", "threads", "device", "fresh", "init")


def prepare(folder: Path) -> Path:
    make_base(folder)
    return folder


def value_for(kind: object, rng: Random) -> str:
    """A strange value that the parser may let through."""
    text = str(kind)
    if "tuple" in text:
        return rng.choice(LISTS)
    if "int" in text or "float" in text:
        return rng.choice(NUMBERS)
    return rng.choice(WORDS)


def run_stage(stage: str, words: list[str], out: Path) -> None:
    main, _, made = COMMANDS[stage]
    main(words)
    for name in made:
        if (out / name / "params.json").exists():
            load_model(out / name)


def remains(out: Path, made: list[str], before: dict, after: dict, is_accepted: bool) -> str:
    finished = [name for name in made if runtime.is_finished(out / name)]
    if finished == made and not is_accepted:
        return f"{', '.join(finished)} finished"
    return no_remains(before, after, is_accepted)


def make(folder: Path, rng: Random, case: Path) -> Case:
    stage = rng.choice(list(COMMANDS))
    made = COMMANDS[stage][2]
    out = case / "out"
    out.mkdir()
    copy_needed(stage, folder, out)
    kinds = typing.get_type_hints(SETTINGS[stage][1])
    field = rng.choice([name for name in kinds if name not in NOT_HERE])
    strange = f"--{field.replace('_', '-')}={value_for(kinds[field], rng)}"
    _, words = command(stage, out, folder)
    action = partial(runtime.run, partial(run_stage, stage, [*words, strange], out))
    return Case(f"{stage} {strange!a}", action, case, "", partial(remains, out, made))
