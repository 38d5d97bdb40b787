"""How a case went: accepted, refused with one clear line, or one of the failures."""

import contextlib
import io
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
OUTCOMES = {
    "accepted": "it runs, and nothing came out differently",
    "other result": "it runs, and the change is seen in what comes out",
    "refused": "one line `error: ...` that names the file, or argparse's",
    "unclear": "one line that does not name the file",
    "traceback": "any other exception, or the process died",
    "hang": "it took longer than the limit",
    "half-written": "refused, and yet files have changed; or accepted, and something lies about",
    "wrong": "accepted, and not what the files say",
}
FAILURES = ("traceback", "hang", "half-written", "wrong")

Files = dict[str, bytes]  # of a folder, by name


class OtherResult(Exception):
    """Raised by an action: the input is accepted, and its change shows in the result."""


class Wrong(Exception):
    """Raised by an action: the input is accepted, and the result is not what it says."""


def untouched(before: Files, after: Files, is_accepted: bool) -> str:
    """The names of files that have changed, for commands that only read."""
    names = sorted(before.keys() | after.keys())
    return ", ".join(name for name in names if before.get(name) != after.get(name))


@dataclass
class Case:
    about: str  # what was changed, in a line
    action: Callable[[], object]  # does what a command does, `runtime.run` around it
    folder: Path  # what the command sees
    where: str = ""  # what the line of a refusal has to name
    blemish: Callable[[Files, Files, bool], str] = untouched  # what is wrong with the files left


@dataclass
class Result:
    outcome: str  # one of OUTCOMES
    about: str = ""  # what the case was
    told: str = ""  # the line, or the place of the traceback
    trace: str = ""


def contents(folder: Path) -> Files:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def judge(case: Case) -> Result:
    """Run a case here and now. No output, no input."""
    before = contents(case.folder)
    result = _run(case)
    result.told = result.told.replace(str(case.folder), "CASE")
    if result.outcome in ("accepted", "other result", "refused", "unclear"):
        is_accepted = result.outcome in ("accepted", "other result")
        blemish = case.blemish(before, contents(case.folder), is_accepted)
        if blemish:
            return Result("half-written", case.about, f"{result.outcome}, yet: {blemish}")
    return result


def _run(case: Case) -> Result:
    errors = io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            case.action()
        return Result("accepted", case.about)
    except OtherResult as other:
        return Result("other result", case.about, str(other))
    except Wrong as wrong:
        return Result("wrong", case.about, str(wrong))
    except SystemExit as end:
        outcome, told = _refusal(end.code, errors.getvalue(), case.where)
        return Result(outcome, case.about, told)
    except KeyboardInterrupt:
        raise
    except BaseException as problem:
        return Result("traceback", case.about, _place(problem), traceback.format_exc())
    finally:
        sys.stdin = stdin


def _refusal(code: object, printed: str, where: str) -> tuple[str, str]:
    """(outcome, line) of a command that ended by itself."""
    lines = [line for line in printed.splitlines() if re.match(r"error: |\S.*: error: ", line)]
    if code not in (1, 2) or len(lines) != 1:
        return "traceback", f"exit code {code}, {len(lines)} lines of error"
    return ("refused" if where in lines[0] else "unclear"), lines[0]


def _place(problem: BaseException) -> str:
    """The last function of ours that the exception passed, and its message."""
    place = "?"
    for frame in traceback.extract_tb(problem.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            place = f"{path.relative_to(ROOT).as_posix()}:{frame.name}"
    message = (str(problem).splitlines() or [""])[0]
    return f"{place}: {type(problem).__name__}: {message[:100]}"
