"""docs/speed.md, made from experiments/results/speed.json: no number in it is typed by hand.

python -m experiments.speed.page
"""

import argparse
import json

from experiments.publish import DOCS, as_markdown
from experiments.shared.results import RESULTS
from experiments.speed.measuring import Row, table
from report import Figure, Section, Table
from runtime import atomic_write, run

RESULT = RESULTS / "speed.json"
PICTURE = RESULTS / "speed.png"
PAGE = DOCS.parent / "speed.md"

WORDS = (
    "Ours and a peer's run in turn, in one process on one thread, with equal weights, precision,"
    " sampling settings and numbers of new tokens. Numbers are medians of CPU seconds. The *ratio*"
    " is the peer's seconds divided by ours: above 1 we are faster. *From, to* are its smallest and"
    " largest value over the repeats. *Share* is how much of the machine's own speed we reach, of"
    " its matrix products or, where one answer is sampled alone, of reading the weights. Only"
    " products that have to be made count, so padding lowers it."
)
RAGGED = (
    "Mind the padding in SFT on ragged dialogs: as TRL takes them, one long dialog pads all others"
    " of its step, and the more so the larger the step. That depends on the data. Where TRL sorts"
    " by length there is less of it; its longest step then comes first and is not timed, in its"
    " favour."
)


def section(result: dict) -> Section:
    """The answer, the machine, a table for each kind of work, the figure."""
    rows = [Row.from_json(row) for row in result["rows"]]
    blocks = [answer(rows), WORDS, RAGGED, machine_table(result["machine"])]
    for kind in dict.fromkeys(row.kind for row in rows):
        blocks.append(table(kind, [row for row in rows if row.kind == kind]))
    if result["cost"]:
        blocks.append(
            Figure("Time and memory of a token against size, length and batch.", file=PICTURE)
        )
    return Section("How fast is it?", blocks)


def answer(rows: list[Row]) -> str:
    """How many cases are faster than their peers, and how many reach their target."""
    compared = [row for row in rows if row.ratio is not None]
    if not compared:
        return "No peer was installed: only our own speed is known."
    faster = [row for row in compared if row.ratio > 1]
    aimed = [row for row in compared if row.target]
    reached = [row for row in aimed if row.ratio >= row.target]
    return (
        f"In {len(faster)} of {len(compared)} comparisons we are faster than the peer;"
        f" {len(reached)} of {len(aimed)} targets are reached."
    )


def machine_table(machine: dict) -> Table:
    """What it was measured on, and with."""
    rows = [
        ["processor", machine["processor"]],
        ["cores, threads used", f"{machine['cores']}, {machine['threads']}"],
        ["Python", machine["python"]],
    ]
    rows += [list(one) for one in machine["versions"].items()]
    for dtype, speed in machine["matmul"].items():
        rows.append([f"matrix products, {dtype}", f"{speed / 1e9:.1f} GFLOP/s"])
    rows.append(["reading a matrix", f"{machine['reading'] / 1e9:.1f} GB/s"])
    return Table("The machine, and what ran on it.", ["", ""], rows)


def page(result: dict) -> str:
    """The whole page as Markdown."""
    intro = "This page is made by `python -m experiments.speed`. No number is typed by hand.\n"
    source = "Numbers: [speed.json](../experiments/results/speed.json).\n"
    made = as_markdown(section(result), level=1)
    heading, _, rest = made.partition("\n")
    return f"{heading}\n\n{intro}{rest}\n{source}"


def write(result: dict) -> None:
    """The page into docs/."""
    with atomic_write(PAGE) as file:
        file.write(page(result).encode())
    print(f"wrote {PAGE}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    run(main)
