"""Statistics over seeds, and the tables and words that show them.

A claim about learning is one over seeds: one number for each seed, never one for each answer. Where
several intervals are read side by side, each is widened so that all hold together (Bonferroni).
"""

import re
import statistics
from collections.abc import Callable

import eval as measures
from report import Table

Tables = list[dict]  # one for each seed: {name: interval}


# ---- statistics ----


def over_seeds(tables: Tables, comparisons: int = 1) -> dict[str, measures.Interval]:
    """Tables of intervals, one for each seed -> the means of their means, with intervals over
    seeds.

    comparisons: how many of these intervals are read side by side; each is widened so that all hold
    together.
    """
    intervals = {}
    for name in tables[0]:
        means = [table[name][0] for table in tables]
        intervals[name] = measures.interval(means, comparisons=comparisons)
    return intervals


def differences_over_seeds(
    first: Tables, second: Tables, comparisons: int = 1
) -> dict[str, measures.Interval]:
    """Tables of intervals, one for each seed -> first - second, paired by seed, with intervals over
    seeds.
    """
    intervals = {}
    for name in first[0]:
        means = [table[name][0] for table in first]
        others = [table[name][0] for table in second]
        intervals[name] = measures.difference(means, others, comparisons=comparisons)
    return intervals


def claimed(rows: dict[str, list[float]]) -> dict[str, measures.Interval]:
    """What is claimed over seeds: {name: a number for each seed} -> {name: interval}.

    All rows are read side by side, so their intervals hold together with 95 %.
    """
    count = len(rows)
    return {name: measures.interval(values, comparisons=count) for name, values in rows.items()}


def mean_of(values: list[list[float]]) -> float:
    """The mean over seeds of intervals' means."""
    return statistics.fmean(value[0] for value in values)


def mean_curve(curves: list[list]) -> list[float]:
    """Curves of intervals, one for each seed -> at each place the mean over seeds."""
    return [mean_of(values) for values in zip(*curves, strict=True)]


# ---- tables ----


def claims_table(caption: str, rows: dict[str, list[float]], small_print: str = "") -> Table:
    """The rows of `claimed`, with each seed's own number."""
    cells = []
    for name, interval in claimed(rows).items():
        cells.append([named(name), str(interval), each_seed(rows[name])])
    corrected = (
        "Brackets are 95 % intervals over seeds (Student's t), corrected so that all"
        f" {len(rows)} rows hold together."
    )
    small_print = f"{corrected} {small_print}".strip()
    return Table(caption, ["", "mean over seeds", "each seed"], cells, small_print)


def percent_table(
    caption: str, rows: dict[str, dict[str, measures.Interval]], small_print: str = ""
) -> Table:
    """Shares in percent, as the paper prints accuracies, each ± half of its 95 % interval."""
    names = {}  # of the columns, in the order in which they come
    for row in rows.values():
        names |= dict.fromkeys(row)
    cells = []
    for title, row in rows.items():
        line = [title]
        for name in names:
            line.append(percent(row[name]) if name in row else "")
        cells.append(line)
    columns = [""] + [name.replace("_", " ") for name in names]
    return Table(caption, columns, cells, small_print)


# ---- numbers and words ----


def named(text: str) -> str:
    """The same text with the models' folders under their names.

    >>> named("rlhf-v4-ppo against sft"), named("gatt")
    ('V4-PPO against SFT', 'Ghost Attention')
    """
    text = re.sub(r"rlhf-v(\d)", r"V\1", text).replace("-ppo", "-PPO")
    text = re.sub(r"\bgatt\b", "Ghost Attention", text)
    return re.sub(r"\bsft\b", "SFT", text)


def percent(interval: measures.Interval) -> str:
    """A share as percent.

    >>> percent(measures.Interval(0.804, 0.79, 0.818))
    '80.4 ± 1.4'
    """
    return f"{100 * interval.mean:.1f} ± {50 * (interval.high - interval.low):.1f}"


def plus_minus(interval: measures.Interval, digits: int = 3) -> str:
    """A mean and half of its interval.

    >>> plus_minus(measures.Interval(0.804, 0.79, 0.818))
    '0.804 ± 0.014'
    """
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:.{digits}f} ± {half:.{digits}f}"


def each_seed(values: list[float], digits: int = 3) -> str:
    """Each seed's number.

    >>> each_seed([0.5, 0.25], 2)
    '0.50 0.25'
    """
    return " ".join(f"{value:.{digits}f}" for value in values)


def in_seeds(values: list[float], is_so: Callable[[float], bool]) -> str:
    """In how many of the seeds something is so.

    >>> in_seeds([0.6, 0.4], lambda rate: rate > 0.5), in_seeds([0.6, 0.7], lambda rate: rate > 0.5)
    ('in 1 of 2 seeds', 'in each of 2 seeds')
    """
    count = sum(is_so(value) for value in values)
    if count == len(values):
        return f"in each of {count} seeds"
    return f"in {count or 'none'} of {len(values)} seeds"


def verdict(interval: measures.Interval, level: float = 0.0) -> str:
    """Whether an interval lies on one side of a level.

    >>> verdict(measures.Interval(0.6, 0.4, 0.8), level=0.5)
    'not significant'
    """
    if interval.low > level or interval.high < level:
        return "significant"
    return "not significant"


def count_significant(intervals: dict[str, measures.Interval], level: float = 0.0) -> str:
    """How many of them are.

    >>> count_significant({"a": measures.Interval(0.6, 0.4, 0.8)}, level=0.5)
    'none of 1'
    """
    count = sum(verdict(interval, level) == "significant" for interval in intervals.values())
    return f"{count or 'none'} of {len(intervals)}"
