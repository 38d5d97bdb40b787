"""What every stage does around its work: read settings, find inputs, remember what was done, go on
after a kill.

A stage is a command that fills one folder. `stage.json` in it says with which settings and from
which inputs:

    {"settings": {...}, "inputs": {name: sha256}, "finished": false}

It is always replaced whole (`checkpoint.atomic_write`), so a kill at any moment leaves a folder
from which the same command goes on; the stage's own checkpoint and JSONL files say how far it had
come.
"""

import argparse
import ast
import dataclasses
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
import tokenize
import types
import typing
from pathlib import Path

from data.errors import InputError
from data.jsonl import AXES
from runtime.checkpoint import atomic_write, plain_json

RECORD = "stage.json"
# where a stage keeps its unfinished work; `*` at the end: a temporary file too
CHECKPOINTS = "checkpoint*.pth*"


# ---- the command line ----


def parse_settings(Settings, description, presets=None, argv=None):
    """An instance of the dataclass `Settings`, filled from the command line.

    Field `a_b` becomes `--a-b` (and `try_`, since `try` is no name in Python, `--try`), a bool
    becomes `--a-b / --no-a-b`, a field without a default must be given. The help text is the
    field's comment in the source; the default is shown. Types: int, float, str, Path, bool,
    Literal, any of them `| None` (written `none`), and tuples of one kind (`0.6,0.8,1.0`).
    presets: {"tiny": {field: value}, …} for the field `preset`; what is given on the command line
        wins over a preset. A word that does not fit ends the program with argparse's message and
        exit code 2.
    """
    epilog = "presets:\n" + "\n".join(
        f"  {name}: "
        + (", ".join(f"{field}={value}" for field, value in values.items()) or "the defaults")
        for name, values in (presets or {}).items()
    )
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog if presets else None,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments, kinds = field_comments(Settings), typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        kind, default = _without_none(kinds[field.name]), _default(field)
        required = default is dataclasses.MISSING
        shown = "required" if required else f"default: {_as_typed(default)}"
        options = {
            "default": argparse.SUPPRESS,
            "required": required,
            "help": f"{comments.get(field.name, '')} ({shown})".strip().replace("%", "%%"),
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {
                "type": _converter(kinds[field.name]),
                "metavar": field.name.split("_")[-1].upper(),
            }
            # several words behind one option: --compare A B
            if names := field.metadata.get("names"):
                options |= {"type": str, "metavar": names, "nargs": len(names)}
            if field.name == "preset" and presets:
                options |= {"choices": list(presets), "metavar": "|".join(presets)}
            elif typing.get_origin(kind) is typing.Literal:
                options |= {
                    "choices": typing.get_args(kind),
                    "metavar": "|".join(typing.get_args(kind)),
                }
        parser.add_argument(
            "--" + field.name.rstrip("_").replace("_", "-"), dest=field.name, **options
        )

    given = vars(parser.parse_args(argv))
    chosen = given.get("preset", getattr(Settings, "preset", None))
    return Settings(**{**(presets or {}).get(chosen, {}), **given})


def check_positive(settings, *names, or_zero=()):
    """InputError naming the first of these settings that is not more than 0 (a tuple: empty, or one
    of its numbers).

    or_zero: names of those that may be 0.
    """
    for name in (*names, *or_zero):
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or not (min(numbers) > 0 or name in or_zero and min(numbers) == 0):
            wanted = "0 or more" if name in or_zero else "more than 0"
            raise InputError(
                f"--{name.replace('_', '-')} {_as_typed(value) or 'is empty'}: must be {wanted}"
            )


def field_comments(Settings):
    """{field: its comment} of a dataclass, read from the source ({} where there is no source to
    read).

    To a field belong the comment at the end of its line, the comment lines above it at its own
    indent, and the comment lines below it that are indented further. A blank line between comment
    and field makes the comment a heading.
    """
    try:
        source = textwrap.dedent(inspect.getsource(Settings))
    except (OSError, TypeError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line, token in comments.items() if token.line.strip().startswith("#")}

    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first, last = node.lineno, node.end_lineno
        while first - 1 in alone and comments[first - 1].start[1] == node.col_offset:
            first -= 1
        while last + 1 in alone and comments[last + 1].start[1] > node.col_offset:
            last += 1
        lines = [
            comments[line].string.lstrip("# ")
            for line in range(first, last + 1)
            if line in comments
        ]
        found[node.target.id] = " ".join(lines)
    return found


def _without_none(kind):
    """`int | None` → `int`; anything else as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _converter(kind):
    """The function that reads a word of the command line as a value of this type (ValueError if it
    is none).
    """
    inner = _without_none(kind)
    if inner is not kind:
        read = _converter(inner)
        return _named(read.__name__, lambda word: None if word.lower() == "none" else read(word))
    if typing.get_origin(kind) is tuple:
        read = _converter(typing.get_args(kind)[0])
        return _named(
            f"comma-separated {read.__name__}",
            lambda words: tuple(read(word.strip()) for word in words.split(",") if word.strip()),
        )
    if typing.get_origin(kind) is typing.Literal:
        return _converter(type(typing.get_args(kind)[0]))
    return _finite if kind is float else kind


def _named(name, function):
    function.__name__ = name  # argparse: "invalid <name> value"
    return function


def _finite(word):
    if not math.isfinite(float(word)):
        raise ValueError
    return float(word)


_finite.__name__ = "float"


def _default(field):
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _as_typed(value):
    """A value as one would type it: (0.6, 0.8) → 0.6,0.8."""
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else "none" if value is None else str(value)
    )


def run(main):
    """Call main(); a user's mistake ends the program with one line `error: …` and exit code 1,
    Ctrl-C with 130.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(
            "\ninterrupted; the same command (without --fresh) goes on from here", file=sys.stderr
        )
        sys.exit(130)
    except InputError as mistake:
        print("error:", " ".join(str(mistake).split()), file=sys.stderr)
        sys.exit(1)
    except UnicodeDecodeError as mistake:  # typed or piped in; files have messages of their own
        print(f"error: the input is not text in {mistake.encoding}", file=sys.stderr)
        sys.exit(1)
    except OSError as mistake:  # no such file, no permission, no space left, ...
        print(
            "error:",
            f"{mistake.filename}: {mistake.strerror}" if mistake.filename else mistake,
            file=sys.stderr,
        )
        sys.exit(1)


# ---- the folder of a stage ----


def kept_settings(settings, *aside):
    """{name: value} of the settings that change a stage's result: not where and how it runs, and
    not those named here.
    """
    left_out = ("out", "fresh", "threads", "device", *aside)
    return {
        name: value for name, value in dataclasses.asdict(settings).items() if name not in left_out
    }


def open_stage(folder, settings, inputs, fresh=False):
    """Begin, go on with, or refuse the stage that fills `folder`.

    Returns the clock's readings (wall, CPU seconds), for `finish_stage`, if there is work to do;
    None if it is finished.
    settings: {name: value}, only those that change the result (`kept_settings`). inputs: {name:
        path}. InputError if the folder was filled with other settings or inputs (each difference is
        named; a folder that nothing was made in yet is begun anew), if it is not a stage's folder,
        or if an input is missing. fresh: the folder's content is deleted first, but only that of a
        stage's folder.
    """
    folder = Path(folder)
    new = {
        "settings": json.loads(json.dumps(plain_json(settings))),
        "inputs": {name: fingerprint(path) for name, path in inputs.items()},
        "finished": False,
    }
    old = _read_record(folder)
    if old and (fresh or old.get("clearing")):
        _clear(folder)
    elif old and (old["finished"] or {path.name for path in folder.iterdir()} != {RECORD}):
        differences = _differences(old["settings"], new["settings"])
        differences += [
            f"input {name} ({inputs.get(name, 'not used now')}) has changed"
            for name in {**old["inputs"], **new["inputs"]}
            if old["inputs"].get(name) != new["inputs"].get(name)
        ]
        if differences:
            raise InputError(
                f"{folder} was {'made' if old['finished'] else 'begun'} differently: "
                f"{'; '.join(differences)}; run it as it was, or start over with --fresh "
                f"(which deletes what is in {folder})"
            )
        if old["finished"]:
            _remove_checkpoints(folder)
            print(
                f"{folder} is finished already, with these settings and inputs; --fresh starts over"
            )
        return None if old["finished"] else (time.time(), time.process_time())
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, new)
    return time.time(), time.process_time()


def finish_stage(folder, results, started):
    """Write {"finished": true, "results": results} into the folder's record, then remove its
    checkpoints.

    The seconds since `started`, wall and CPU, become results, too. They are those of the last
    start, where a run was killed.
    """
    folder = Path(folder)
    seconds, cpu_seconds = time.time() - started[0], time.process_time() - started[1]
    results = {**results, "seconds": seconds, "cpu_seconds": cpu_seconds}
    _write_record(
        folder, {**_read_record(folder), "finished": True, "results": plain_json(results)}
    )
    _remove_checkpoints(folder)
    print(f"wrote {folder} in {seconds:.0f} s")


def is_finished(folder):
    """True if a stage filled this folder to the end."""
    record = _read_record(Path(folder), strict=False)
    return bool(record and record.get("finished"))


def require(path, command):
    """The path; InputError naming the command that makes it where it is missing or was left
    unfinished.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is missing; `{command}` makes it")
    for folder in (path, path.parent):
        if (folder / RECORD).is_file() and not is_finished(folder):
            raise InputError(f"{folder} is not finished; `{command}` goes on with it")
    return path


def newest_reward_models(out, rounds=None, axes=AXES):
    """{axis: its reward model's folder}: of the last of these rounds that refreshed it, or the
    first one.

    rounds: folders; None: all in OUT that are finished, V4-PPO among them, no controls.
    InputError naming the command that makes it where an axis has no reward model.
    """
    if rounds is None:
        finished = (
            path
            for path in out.glob("rlhf-v*")
            if re.fullmatch(r"\d+|4-ppo", path.name[6:]) and is_finished(path)
        )
        rounds = sorted(
            finished, key=lambda path: (int(path.name[6:].removesuffix("-ppo")), path.name)
        )
    found = {}
    for axis in axes:
        refreshed = [
            path / f"reward-{axis}"
            for path in rounds
            if (path / f"reward-{axis}" / "reward_head.pth").exists()
        ]
        found[axis] = (
            refreshed[-1] if refreshed else require(out / f"reward-{axis}", "python reward.py")
        )
    return found


def check_same_prompts(rounds, file, max_prompts):
    """InputError naming the first of these folders whose round asked other prompts than the first
    `max_prompts` of `file`.
    """
    for folder in rounds:
        record = _read_record(folder, strict=False)
        if record and (record["inputs"]["prompts"], record["settings"]["max_prompts"]) != (
            fingerprint(file),
            max_prompts,
        ):
            raise InputError(
                f"{folder} was made from other prompts; the pool joins answers to the same ones:"
                " give the same --prompts and --max-prompts, or --pool last"
            )


def fingerprint(path):
    """sha256 (hex) of a file's content, or of names and contents of all files in a folder.

    In a folder only what later stages read counts: not the record, log, checkpoints, temporary and
    hidden files.
    """
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if (
                file.is_file()
                and not any(part.startswith(".") for part in name.parts)
                and not (
                    file.name in (RECORD, "metrics.jsonl")
                    or file.suffix == ".tmp"
                    or file.match(CHECKPOINTS)
                )
            ):
                digest.update(f"{name.as_posix()} {fingerprint(file)}\n".encode())
        return digest.hexdigest()
    if not path.is_file():
        raise InputError(f"{path} is missing")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_record(folder, strict=True):
    """The record; None for an empty or missing folder. InputError (None if not strict) where the
    folder is not ours.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        if isinstance(record, dict) and (
            record.get("clearing") or {"settings", "inputs", "finished"} <= record.keys()
        ):
            return record
        reason = f"its {RECORD} was not written by a stage"
    except FileNotFoundError:
        if not folder.exists() or {file.name for file in folder.iterdir()} <= {RECORD + ".tmp"}:
            return None
        reason = f"it holds files but no {RECORD}"
    except (NotADirectoryError, ValueError):
        reason = f"its {RECORD} cannot be read" if folder.is_dir() else "it is a file"
    if strict:
        raise InputError(
            f"{folder} is not the folder of a stage ({reason}): nothing was touched; choose another"
            " --out"
        )
    return None


def _write_record(folder, record):
    with atomic_write(folder / RECORD) as file:
        file.write((json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def _clear(folder):
    """Delete all but the record, which says meanwhile that whoever comes next has to clear to the
    end.
    """
    _write_record(folder, {"clearing": True})
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()


def _remove_checkpoints(folder):
    for path in list(folder.rglob(CHECKPOINTS)):
        path.unlink()


def _differences(old, new, prefix=""):
    """["learning_rate 0.005 → 0.001", …]; nested dicts by dotted names."""
    found = []
    for key in {**old, **new}:
        a, b = old.get(key, "(not set)"), new.get(key, "(not set)")
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} {a} → {b}")
    return found
