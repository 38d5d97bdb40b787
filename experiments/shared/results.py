"""Where results are kept.

OUT/results/NAME-SEED.json    one seed of one experiment, written when it has been measured; so an
                              experiment goes on seed by seed, and seeds can run side by side
experiments/results/NAME.json what is published: put together from those of the published seeds

Both hold {"mark", "result"}. The mark says what a result was made with. Results of two worlds,
settings or versions are never mixed.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import report
from data import InputError, world
from runtime import atomic_write, plain_json

RESULTS = Path(__file__).parent.parent / "results"

# raised by hand when a change of code, world or defaults makes published numbers another thing's
RESULTS_VERSION = 1

# settings that change no number: which seeds are run, and where and how
WHERE_AND_HOW = {
    "seeds",
    "out",
    "at_once",
    "threads",
    "device",
    "collect",
    "train_rounds",
    "publish",
}
# settings that say which parts are measured: no number of a part depends on the others
PARTS = {"controls", "arms", "sizes", "ppo"}


# ---- marks ----


def mark_of(settings, with_parts: bool = False) -> dict:
    """The mark of a result: the world, the experiment's settings, the results version. Never the
    commit.

    Args:
        settings: a dataclass. Left out are WHERE_AND_HOW and PARTS.
        with_parts: keep PARTS, as the files of single seeds do.
    """
    left_out = WHERE_AND_HOW if with_parts else WHERE_AND_HOW | PARTS
    kept = {}
    for name, value in dataclasses.asdict(settings).items():
        if name not in left_out:
            kept[name] = value
    return {
        "version": RESULTS_VERSION,
        "world": world.world_hash(),
        "settings": json.loads(json.dumps(plain_json(kept))),
    }


def is_published(settings) -> bool:
    """Whether these settings are the experiment's defaults, seeds included: what is published."""
    defaults = type(settings)()
    if getattr(settings, "seeds", ()) != getattr(defaults, "seeds", ()):
        return False
    return mark_of(settings, with_parts=True) == mark_of(defaults, with_parts=True)


# ---- files ----


def save(file: Path, result: dict, mark: dict) -> None:
    """Write {"mark", "result"}, small enough to be committed: whole or not at all.

    Floats are written to four digits, infinite ones as null.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"mark": mark, "result": _rounded(result)}
    with atomic_write(file) as out:
        out.write((json.dumps(content, indent=1) + "\n").encode())


def _rounded(value):
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def load(file: Path, mark: dict) -> dict | None:
    """The result in a file; None where there is none.

    Raises:
        InputError: it has no mark, or another one than this.
    """
    if not file.exists():
        return None
    way_out = f"delete {file.name} to make it again, or run with what it was made with"
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise InputError(f"{file}: not JSON; {way_out}") from None
    if not isinstance(content, dict) or set(content) != {"mark", "result"}:
        raise InputError(f"{file}: a result without its mark; {way_out}")
    for part, wanted in mark.items():
        made_with = content["mark"].get(part)
        if made_with != wanted:
            raise InputError(f"{file}: its {part} is {made_with}, now it is {wanted}; {way_out}")
    return content["result"]


def published(name: str) -> dict:
    """The published result of an experiment.

    Raises:
        InputError: there is none.
    """
    file = RESULTS / f"{name}.json"
    if not file.exists():
        raise InputError(f"{file} is missing")
    return json.loads(file.read_text("utf-8"))["result"]


# ---- seed by seed ----


def seed_file(name: str, seed: int, settings) -> Path:
    return Path(settings.out) / "results" / f"{name}-{seed}.json"


def save_seed(name: str, seed: int, result: dict, settings) -> None:
    """Keep what one seed gave."""
    file = seed_file(name, seed, settings)
    save(file, result, mark_of(settings, with_parts=True))
    print(f"wrote {file}", flush=True)


def load_seed(name: str, seed: int, settings) -> dict | None:
    """What one seed gave; None where it has not been measured.

    Raises:
        InputError: it was measured with other settings (`load`).
    """
    return load(seed_file(name, seed, settings), mark_of(settings, with_parts=True))


def missing_seeds(name: str, settings) -> list[int]:
    """The seeds that have not been measured."""
    return [seed for seed in settings.seeds if load_seed(name, seed, settings) is None]


def measure_seeds(name: str, settings, measure: Callable[[int], dict]) -> dict[str, dict]:
    """{seed: its result} of all seeds; what is missing is measured and kept."""
    for seed in missing_seeds(name, settings):
        save_seed(name, seed, measure(seed), settings)
    return {str(seed): load_seed(name, seed, settings) for seed in settings.seeds}


# ---- at the end ----


def finish(
    name: str,
    result: dict,
    settings,
    section: Callable[[dict], report.Section],
    draw: Callable[[dict, Path], None] | None = None,
) -> None:
    """Save the result, draw its picture, print its section.

    They go to experiments/results where the settings are the published ones, else to OUT/results.
    """
    folder = RESULTS
    if not is_published(settings):
        folder = Path(settings.out) / "results"
    file = folder / f"{name}.json"
    save(file, result, mark_of(settings))
    result = json.loads(file.read_text("utf-8"))["result"]  # as everybody else reads it
    if draw:
        draw(result, file.with_suffix(".png"))
    report.print_tables([section(result)])
    print(f"\nwrote {file}")
    if folder == RESULTS:
        print("`python -m experiments.publish` takes it into docs/results.md")
    else:
        print("(the numbers are this run's; the words were written for the published ones)")
