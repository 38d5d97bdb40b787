"""The fuzzing finds the faults that it is there for, and a small sample of it finds none; `python
-m tests.fuzz` runs it all.
"""

import gzip
from random import Random

import pytest

from tests.fuzz import readers, stages, traps
from tests.fuzz.__main__ import main
from tests.fuzz.judge import FAILURES, OUTCOMES, contents, judge
from tests.fuzz.workers import Area

IN_PROCESS = [trap for trap in traps.TRAPS if trap[1] not in (traps.sleeps, traps.dies)]
SAMPLE = {"readers": 200, "folders": 80, "options": 60}


@pytest.mark.parametrize("outcome, trap", IN_PROCESS)
def test_judge(outcome, trap, tmp_path):
    """Each kind of outcome is told from the others."""
    result = judge(traps.case_of(outcome, trap, tmp_path))
    assert result.outcome == outcome and str(tmp_path) not in result.told


SEED = 421  # with it the first ten cases are the ten traps


def test_main(capsys):
    """In processes: a hang is ended, a crash is survived; each failure comes with its command."""
    assert main(f"--only traps --count 10 --limit 2 --seed {SEED}".split()) == 1
    printed = capsys.readouterr().out
    table = printed[printed.index("area ") :].split("\n")
    counts = dict(zip(["tried", *OUTCOMES], table[1].split()[1:], strict=True))
    wanted = {"tried": "10", "traceback": "3"}
    assert counts == dict.fromkeys(OUTCOMES, "1") | wanted
    assert printed.count(f"python -m tests.fuzz --only traps --seed {SEED} --case") == 6


@pytest.mark.parametrize("name", ["readers", "folders", "options"])
def test_a_case_follows_from_its_number(name, tmp_path):
    made = []
    for folder in ("one", "other"):
        area = Area(name, 3, tmp_path / folder)
        area.make(1)
        made.append((area.make(7).about, contents(area.folder)))
    assert made[0] == made[1]
    assert area.make(8).about != made[0][0]


@pytest.mark.parametrize("name, rows, read", readers.READERS)
def test_valid_files_are_accepted(name, rows, read, tmp_path):
    """Or the fuzzing would only see refusals."""
    (tmp_path / "valid").mkdir()
    (tmp_path / "case").mkdir()
    valid = readers.prepare(tmp_path / "valid")
    content = gzip.compress(valid[name]) if name.endswith(".gz") else valid[name]
    read(readers.put(valid, tmp_path / "case", name, content))


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name, tmp_path):
    """No traceback, nothing half-written, nothing that is read otherwise than it says."""
    area = Area(name, 0, tmp_path)
    failures = []
    for number in range(SAMPLE[name]):
        result = area.run(number)
        if result.outcome in FAILURES:
            failures.append(f"{name} {number}: {result.outcome}, {result.told} ({result.about})")
    assert not failures, "\n".join(failures)


def test_sample_of_stages(tmp_path):
    """SFT killed, its folder tampered with, and gone on with."""
    stages.make_inputs(tmp_path)
    stages.run_and_kill("sft", tmp_path)
    for number in range(4):
        folder = tmp_path / f"case {number}"
        folder.mkdir()
        result = judge(stages.make(tmp_path, Random(number), folder))
        assert result.outcome not in FAILURES, f"{number}: {result}"
