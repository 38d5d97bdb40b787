"""Settings, and the command line that is made from them.

A stage's settings are a dataclass below `StageSettings`. Each field has a comment: it is the help
text of its option. Checks of values stand in `__post_init__`.
"""

import argparse
import ast
import contextlib
import dataclasses
import errno
import inspect
import io
import math
import os
import sys
import textwrap
import tokenize
import types
import typing
from pathlib import Path

from data.errors import InputError

MOST = 10**9  # of any count, rate or weight: what asks for more never ends


@dataclasses.dataclass
class StageSettings:
    """What all stages have in common."""

    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # the folder of all stages: what they read and write lies in it
    seed: int = 0  # of new weights, sampling, the annotator's noise and the order of rows
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products; weights are trained in float32
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete what is in the stage's folder


def parse_settings(Settings, description, presets=None, argv=None):
    """An instance of the dataclass `Settings`, filled from the command line.

    Field `a_b` becomes `--a-b` (and `try_`, since `try` is no name in Python, `--try`), a bool
    becomes `--a-b / --no-a-b`. A field without a default stands without its name and must be given.
    The help text is the field's comment in the source; the default is shown. Types: int, float,
    str, Path, bool, Literal, any of them `| None` (written `none`), and tuples of one kind
    (`0.6,0.8,1.0`).

    Args:
        presets: {"tiny": {field: value}, ...} for the field `preset`. What is given on the command
            line wins over a preset.

    A word that does not fit, or a whole number beyond 2⁵³ (the largest that every float holds),
    ends the program with argparse's message and exit code 2.
    """
    presets = presets or {}
    parser = argparse.ArgumentParser(
        description=description,
        epilog=_presets_help(presets),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments = field_comments(Settings)
    kinds = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        comment = comments.get(field.name, "")
        arguments = _option(field, kinds[field.name], comment, presets)
        if _default(field) is dataclasses.MISSING:
            parser.add_argument(field.name, **arguments)
        else:
            option = "--" + field.name.rstrip("_").replace("_", "-")
            parser.add_argument(option, dest=field.name, **arguments)

    given = vars(parser.parse_args(argv))
    chosen = given.get("preset", getattr(Settings, "preset", None))
    return Settings(**{**presets.get(chosen, {}), **given})


def _presets_help(presets):
    """What each preset sets, for the end of --help; None without presets."""
    if not presets:
        return None
    lines = ["presets:"]
    for name, values in presets.items():
        shown = ", ".join(f"{field}={value}" for field, value in values.items())
        lines.append(f"  {name}: {shown or 'the defaults'}")
    return "\n".join(lines)


def _option(field, kind, comment, presets):
    """The arguments of `add_argument` for a field."""
    default = _default(field)
    shown = "" if default is dataclasses.MISSING else f"(default: {_as_typed(default)})"
    arguments = {
        "default": argparse.SUPPRESS,
        "help": f"{comment} {shown}".strip().replace("%", "%%"),
    }
    bare = _without_none(kind)
    if bare is bool:
        return arguments | {"action": argparse.BooleanOptionalAction}
    names = field.metadata.get("names")
    if names:  # several words behind one option: --compare A B
        return arguments | {"type": str, "metavar": names, "nargs": len(names)}

    arguments["type"] = _converter(kind)
    arguments["metavar"] = field.name.split("_")[-1].upper()
    choices = None
    if field.name == "preset" and presets:
        choices = list(presets)
    elif typing.get_origin(bare) is typing.Literal:
        choices = typing.get_args(bare)
    if choices:
        arguments |= {"choices": choices, "metavar": "|".join(choices)}
    return arguments


def check_positive(settings, *names, or_zero=()):
    """InputError naming the first of these settings that is not more than 0 and at most MOST (a
    tuple: empty, or one of its numbers).

    or_zero: names of those that may be 0.
    """
    for name in (*names, *or_zero):
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        may_be_zero = name in or_zero
        wanted = "0 or more" if may_be_zero else "more than 0"
        if any(number > MOST for number in numbers):
            wanted = f"at most {MOST}"
        fits = [0 < number <= MOST or (number == 0 and may_be_zero) for number in numbers]
        if not fits or not all(fits):
            raise InputError(
                f"--{name.replace('_', '-')} {_as_typed(value) or 'is empty'}: must be {wanted}"
            )


def check_between(settings, low, high, *names):
    """InputError naming the first of these settings (numbers, or tuples of numbers) that does not
    lie between low and high, both included.
    """
    for name in names:
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(low <= number <= high for number in numbers):
            raise InputError(
                f"--{name.replace('_', '-')} {_as_typed(value)}: must lie between {low} and {high}"
            )


def field_comments(Settings):
    """{field: its comment} of a dataclass and those it inherits from, read from the source ({}
    where there is no source to read).

    To a field belong the comment lines above it and the comment at the end of its line. A blank
    line between comment and field makes the comment a heading.
    """
    comments = {}
    for base in reversed(Settings.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _comments_of(base)
    return comments


def _comments_of(Settings):
    """`field_comments` of this class alone."""
    try:
        source = textwrap.dedent(inspect.getsource(Settings))
    except (OSError, TypeError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {line for line, token in comments.items() if token.line.strip().startswith("#")}

    of_field = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        first, last = node.lineno, node.end_lineno
        while first - 1 in alone and comments[first - 1].start[1] == node.col_offset:
            first -= 1
        lines = []
        for line in range(first, last + 1):
            if line in comments:
                lines.append(comments[line].string.lstrip("# "))
        of_field[node.target.id] = " ".join(lines)
    return of_field


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
    return {int: _whole, float: _finite}.get(kind, kind)


def _named(name, function):
    function.__name__ = name  # argparse: "invalid <name> value"
    return function


def _finite(word):
    if not math.isfinite(float(word)):
        raise ValueError
    return float(word)


_finite.__name__ = "float"


def _whole(word):
    number = int(word)
    if abs(number) > 2**53:
        raise argparse.ArgumentTypeError(f"{word[:40]}: a number of at most 2^53 is wanted")
    return number


_whole.__name__ = "int"


def _default(field):
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return field.default_factory()


def _as_typed(value):
    """A value as one would type it: (0.6, 0.8) → 0.6,0.8."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def run(main):
    """Call main(). A user's mistake ends the program with one line `error: …` and exit code 1,
    Ctrl-C with 130, a reader of its output that stops, such as `| head`, with 141 (as SIGPIPE
    would).
    """
    _open_streams()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        _mute_streams()
        sys.exit(141)
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
        reason = f"{mistake.filename}: {mistake.strerror}" if mistake.filename else mistake
        if mistake.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space: {mistake.filename or 'on the disk'}"
        print("error:", reason, file=sys.stderr)
        sys.exit(1)


def _open_streams():
    """Output that was closed (`>&-`) goes nowhere; what its encoding lacks is printed as an escape.
    """
    for name in ("stdin", "stdout", "stderr"):  # in this order: each takes its own free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _mute_streams():
    """What is still to be printed goes nowhere: a closed pipe would complain once more at the end.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # one without a file number is no pipe
            os.dup2(nowhere, stream.fileno())
