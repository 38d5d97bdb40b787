"""The planted bugs can still be planted, and a sample of them is caught; `python -m tests.planted`
runs them all.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted import BUGS, SAMPLE, Bug, function_of, planted

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted(bug):
    """The row fits today's source, its test exists, and the right version comes back."""
    function = function_of(bug)
    right = function.__code__
    with planted(bug):
        wrong = function.__code__
        parts = ("co_code", "co_consts", "co_names")
        assert any(getattr(wrong, part) != getattr(right, part) for part in parts)
    assert function.__code__ is right
    file, test = bug.test.split("[")[0].split("::")
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_rows_that_no_longer_fit_are_told():
    with pytest.raises(
        LookupError, match="holds 'nowhere to be found' 0 times, not once: mend the row"
    ):
        with planted(
            Bug("x", "sft:sft_loss", "nowhere to be found", "", "test_sft::test_sft_loss")
        ):
            pass


def test_a_sample_is_caught():
    assert len({bug.name for bug in BUGS}) == len(BUGS) and set(SAMPLE) <= {
        bug.name for bug in BUGS
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.planted", *SAMPLE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (
        done.returncode == 0
        and f"{len(SAMPLE)} of {len(SAMPLE)} planted bugs caught" in done.stdout
    ), (done.stdout + done.stderr)
