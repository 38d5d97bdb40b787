"""Planted bugs: is every silent mistake that others shipped caught by the test that is there for
it?

    python -m tests.planted              plants all of them, one after the other (some ten minutes)
    python -m tests.planted NAME ...     some of them
    python -m tests.planted --list

The rows stand in `NAME_bugs.py`, a file for each module that they change. A row is (name, function,
its right line, the wrong one, the test that must fail). The function's code is exchanged in place,
so that every module that imported it has the wrong version. Each named test must pass before the
bug is planted.
"""

import ast
import contextlib
import importlib
import inspect
import io
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.planted.bug import Bug

ROWS = sorted(path.stem for path in Path(__file__).parent.glob("*_bugs.py"))
BUGS = [bug for name in ROWS for bug in importlib.import_module(f"tests.planted.{name}").BUGS]

SAMPLE = [
    "loss mask one off",
    "accumulation: mean of means",
    "double BOS",
    "log-probabilities at the sampling temperature",
    "margin broadcasts",
    "gate on the raw logit",
    "reward one slot late",
    "GAE bootstraps past EOS",
]


def function_of(bug: Bug) -> types.FunctionType:
    module, _, path = bug.function.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return inspect.unwrap(found)


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The wrong version in the function's place, until the block ends."""
    function = function_of(bug)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(bug.right) != 1:
        count = source.count(bug.right)
        raise LookupError(
            f"{bug.name}: {bug.function} holds {bug.right!r} {count} times, not once: mend the row"
        )
    tree = ast.parse(source.replace(bug.right, bug.wrong))
    tree.body[0].decorator_list = []
    scope: dict = {}
    exec(compile(tree, f"<{bug.name}>", "exec"), function.__globals__, scope)
    right, function.__code__ = function.__code__, scope[function.__name__].__code__
    caches = [c for c in vars(inspect.getmodule(function)).values() if hasattr(c, "cache_clear")]
    try:
        for cached in caches:
            cached.cache_clear()
        yield
    finally:
        function.__code__ = right
        for cached in caches:
            cached.cache_clear()


class Outcome:
    """A pytest plugin that keeps what happened, and with which kind of exception tests failed."""

    def __init__(self):
        self.passed, self.failed, self.kinds = set(), set(), set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            (self.failed if report.failed else self.passed if report.passed else set()).add(
                report.nodeid
            )

    def pytest_exception_interact(self, call):
        self.kinds.add(call.excinfo.type.__name__)


def run_tests(tests: list[str]) -> Outcome:
    outcome = Outcome()
    named = [f"tests/{test.replace('::', '.py::', 1)}" for test in tests]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", *named], [outcome])
    return outcome


def main(names: list[str]) -> int:
    """Plant the bugs of these names (all: none named); 0 if every one is caught."""
    if "--list" in names:
        print("\n".join(f"{bug.name:<48}{bug.function:<40}{bug.test}" for bug in BUGS))
        return 0
    bugs = [bug for bug in BUGS if bug.name in (names or [bug.name])]
    if missing := set(names) - {bug.name for bug in bugs}:
        print(f"no such bug: {', '.join(sorted(missing))}; --list shows them")
        return 2
    clean = {test: run_tests([test]) for test in dict.fromkeys(bug.test for bug in bugs)}
    bad = 0
    for bug in bugs:
        if clean[bug.test].failed or not clean[bug.test].passed:
            verdict = (
                f"CANNOT TELL: {bug.test} does not pass without the bug"
                f" ({', '.join(clean[bug.test].kinds) or 'skipped'})"
            )
        else:
            try:
                with planted(bug):
                    outcome = run_tests([bug.test])
            except LookupError as error:
                outcome, verdict = None, f"CANNOT PLANT: {error}"
            if outcome:
                clumsy = outcome.kinds & {
                    "NameError",
                    "SyntaxError",
                    "UnboundLocalError",
                    "AttributeError",
                    "ImportError",
                }
                verdict = (
                    "NOT CAUGHT"
                    if not outcome.failed
                    else f"CLUMSY ({', '.join(clumsy)})" if clumsy else f"caught by {bug.test}"
                )
        bad += not verdict.startswith("caught")
        print(f"{bug.name:<48}{verdict}", flush=True)
    print(f"{len(bugs) - bad} of {len(bugs)} planted bugs caught")
    return min(bad, 1)
