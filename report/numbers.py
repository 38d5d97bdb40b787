"""Numbers of a report: read from the stages' logs, written as text, picked for a comparison.

`metrics` is what `eval.py` hands over and writes into metrics.json: plain JSON.
"""

import contextlib
import json
import math
import statistics
from pathlib import Path

from data.jsonl import AXES
from report.blocks import Curve, Table

# ---- logs ----


def logged(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; lines that a kill or a disk spoilt are passed over."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and "phase" in row and "step" in row:
                rows.append(row)
    return rows


def smoothed(path: Path, phase: str, key: str, points: int = 120) -> Curve:
    """A number of `metrics.jsonl` against its step, as means of consecutive steps. Where something
    else than a number stands, the row is passed over.

    points: the curve has so many at most.
    """
    values = []
    for row in logged(path):
        point = row["step"], row.get(key)
        if row["phase"] == phase and all(isinstance(part, (int, float)) for part in point):
            values.append(point)
    size = max(1, math.ceil(len(values) / points))  # steps in one mean
    x = []
    y = []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        x.append(statistics.fmean(step for step, _ in group))
        y.append(statistics.fmean(value for _, value in group))
    return Curve(key, x, y)


# ---- numbers as text ----


def number(value, digits: int = 3) -> str:
    """A number as text, or an interval [mean, low, high], or a win rate [rate, low, high, wins,
    ties, losses]. None is empty; an end that is infinite (None in JSON) is a question mark.

    >>> number(0.5, 1), number([0.5, 0.25, None], 2)
    ('0.5', '0.50 [0.25, ?]')
    """
    if value is None:
        return ""
    if not isinstance(value, (list, tuple)):
        return f"{value:.{digits}f}"
    mean, low, high = value[:3]
    ends = []
    for end in (low, high):
        is_known = end is not None and math.isfinite(end)
        ends.append(f"{end:.{digits}f}" if is_known else "?")
    return f"{mean:.{digits}f} [{', '.join(ends)}]"


def mean_of(value, digits: int = 3) -> str:
    """The mean of an interval, as text; "" where there is none."""
    return number(value[0], digits) if value else ""


def by_version(label: str, intervals: dict[str, list]) -> Curve:
    """{version: interval or win rate} as a curve with its band."""
    means, lows, highs = [], [], []
    for mean, low, high, *_ in intervals.values():
        means.append(mean)
        lows.append(low)
        highs.append(high)
    return Curve(label, list(intervals), means, lows, highs, style="-o")


def about(metrics: dict) -> str:
    """What a caption says of seeds, prompts and intervals."""
    prompts = metrics["prompts"]
    seeds = set()
    for record in metrics["stages"].values():
        if "seed" in record["settings"]:
            seeds.add(record["settings"]["seed"])
    return (
        f"One run (seed {', '.join(map(str, sorted(seeds)))}), {prompts['count']} prompts"
        f" ({prompts['kinds']['helpfulness']} judged by helpfulness, {prompts['kinds']['safety']}"
        f" by safety) of {prompts['file']}, {prompts['samples']} answer(s) each at temperature"
        f" {prompts['temperature']:g}. Brackets are 95 % intervals."
    )


def families_table(title: str, families: dict[str, dict], not_worse: float) -> Table:
    """Rows {"wins", "difference", "verdict"} by family, as `eval.compare_families` makes them.

    not_worse: a difference whose interval lies above this counts as "not worse".
    """
    rows = []
    for family, row in families.items():
        rows.append([family, number(row["wins"]), number(row["difference"]), row["verdict"]])
    caption = f"{title} by family of prompts, a kind of question: where does the gain come from?"
    small_print = (
        "Better: the whole interval of the difference lies above 0; not worse: above"
        f" {not_worse}. Worse: it lies below 0. The intervals hold for all {len(families)} families"
        " together. The paper has no such table."
    )
    if any("?" in cell for row in rows for cell in row[1:]):
        small_print += " Question marks: too few items for an interval."
    columns = ["", "win rate", "difference of scores", "verdict"]
    return Table(caption, columns, rows, small_print)


# ---- the numbers of a run that are compared with reference runs ----

STAGE_NUMBERS = {  # stage: where a number of its results stands
    "sft": ("dev_loss",),
    "reward-helpfulness": ("reward model", "average"),
    "reward-safety": ("reward model", "average"),
    "rlhf-v4-ppo": ("best", "kl"),
}


def key_numbers(metrics: dict) -> dict[str, float]:
    """The numbers of a whole run by which it is compared with the reference runs.

    V4 and what follows are named after whether Ghost Attention's dialogs went into V4, since these
    are two pipelines.
    """
    numbers = {}
    for name in metrics["versions"]:
        numbers |= _version_numbers(metrics, name)
    for name, keys in STAGE_NUMBERS.items():
        value = metrics["stages"].get(name, {}).get("results", {})
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            label = name
            if name.startswith("rlhf-v4"):
                label += pipeline(metrics)
            numbers[f"{label}: {' '.join(keys)}"] = value
    return numbers


def pipeline(metrics: dict) -> str:
    """What marks V4 and V5 where Ghost Attention's dialogs went into V4; else ""."""
    inputs = metrics["stages"].get("rlhf-v4", {}).get("inputs", {})
    return " (with GAtt)" if "mix" in inputs else ""


def _version_numbers(metrics: dict, name: str) -> dict[str, float]:
    """Means, content at each temperature, win rates by the first judge, adherence."""
    version = metrics["versions"][name]
    label = name
    if name.startswith(("rlhf-v4", "rlhf-v5")):
        label += pipeline(metrics)
    numbers = {}
    for axis in AXES:
        if axis in version["summary"]:
            numbers[f"{label}: {axis}"] = version["summary"][axis][0]
    for temperature, table in metrics.get("content", {}).items():
        if name in table:
            for key in ("content", "right", "helpfulness"):
                numbers[f"{label}: {key}, {temperature}"] = table[name][key][0]
    wins = next(iter(version["wins"].values()), {})
    for axis, win in wins.items():
        numbers[f"{label}: {axis}, win over sft"] = win[0]
    adherence = metrics.get("adherence", {})
    if name in adherence:
        numbers[f"{label}: adherence"] = adherence[name]["mean"][0]
    return numbers
