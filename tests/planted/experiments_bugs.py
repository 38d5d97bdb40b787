"""Planted bugs in `experiments`: see `tests/planted/__init__.py`."""
# ruff: noqa: E501 (a table is easier to read with one bug a row)

from tests.planted.bug import Bug

BUGS = [
    Bug("one of two words is enough", "experiments.longer_sft:asked", "all(toy.obeys", "any(toy.obeys", "test_experiments::test_asked"),
    Bug("a right word counts as a blend", "experiments.longer_sft:is_blend", "word not in values and ", "", "test_experiments::test_asked"),
]
