"""Which questions are held out for dev and test.

They are held out by their *unit*: the item where the task composes (count and category, verb and
object), item and wording together where it is a fact. Small sums and comparisons count as facts:
their test is a new wording, not a new sum.
"""

import hashlib
from functools import cache

from data.world.families import FAMILIES, PROBES, Family

SEED = 2307  # of the world itself: which units are held out, what the files hold
TEST_SHARE = 0.18  # of the units
DEV_SHARE = 0.07


def point_of(text: str) -> float:
    """A number in [0, 1) that belongs to the text: its hash with the world's seed."""
    digest = hashlib.sha256(f"{SEED} {text}".encode()).hexdigest()
    return int(digest[:8], 16) / 2**32


def unit(family: Family, item: str, wording: int) -> str:
    """What is held out as one: training never sees any prompt of a test unit.

    A comparison is the same one in either order of its numbers.
    """
    if family.name == "bigger":
        item = "?".join(sorted(item.split("?")))
    if family.composes:
        return f"{family.name}:{item}"
    return f"{family.name}:{item}:{wording}"


@cache
def split_of(unit: str) -> str:
    """The unit's split: "test" (18 % of the units), "dev" (7 %) or "train".

    Probes are not held out.
    """
    family = unit.split(":")[0]
    if family in PROBES:
        return "train"
    point = point_of(unit)
    if point < TEST_SHARE:
        return "test"
    if point < TEST_SHARE + DEV_SHARE:
        return "dev"
    return "train"


@cache
def questions(name: str, split: str) -> tuple[tuple[str, int], ...]:
    """All (item, wording) of the family of that name that belong to a split."""
    family = FAMILIES[name]
    in_split = []
    for item in family.items:
        for wording in range(len(family.wordings)):
            if split_of(unit(family, item, wording)) == split:
                in_split.append((item, wording))
    return tuple(in_split)
