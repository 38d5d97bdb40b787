"""Files that survive a kill at any moment: whole files are replaced in one step, growing files lose
their last line.
"""

import contextlib
import itertools
import json
import math
import os
import zipfile
from pathlib import Path

import torch

from data.errors import InputError


@contextlib.contextmanager
def naming(path):
    """An OSError in the block names this file, if it names none: what a full disk says, does not.

    `torch.save` then fails once more, as it closes its zip; what is raised is the OSError.
    """
    try:
        yield
    except (OSError, RuntimeError) as problem:
        first = problem if isinstance(problem, OSError) else problem.__context__
        if not isinstance(first, OSError):
            raise
        if first.filename is None:
            first.filename = str(path)
        raise first from None


@contextlib.contextmanager
def atomic_write(path):
    """A binary file to write to; it becomes `path` when the block ends, and `path` stays as it was
    if it does not end.

    The content goes to `path.tmp` and is on the disk (fsync) before the rename, so no reader ever
    sees half a file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path, state):
    """Write a (nested) dict of tensors, numbers and text atomically; TypeError, before writing, for
    anything else.
    """
    _check_plain(state, "state")
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote, tensors on `device`.

    InputError naming the file if it is missing, cut short, changed by one bit (`check_zip`), holds
    code or is no nested dict of tensors, numbers and text: `weights_only` reads tensors and plain
    values and refuses to call anything that a pickle names, so no file can run code.
    """
    try:
        check_zip(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except torch.OutOfMemoryError:  # the file is good
        raise
    except Exception as problem:  # zip, pickle and tensor errors of many classes
        raise InputError(
            f"{path} is not a readable checkpoint: it is cut short or broken, or a pickle with code"
            " in it (which is never run)"
        ) from problem
    try:
        if not isinstance(state, dict):
            raise TypeError(f"state is a {type(state).__name__}, not a dict")
        _check_plain(state, "state")
    except TypeError as problem:
        raise InputError(f"{path} is not a readable checkpoint: {problem}") from None
    except RecursionError:
        raise InputError(f"{path} is not a readable checkpoint: it is nested too deeply") from None
    return state


def check_zip(path):
    """zipfile.BadZipFile (or what `open` raises) unless every record in a file of `torch.save` is
    as it was written.

    torch writes a checksum of each and never looks at it, so we do: one more reading of the file,
    of about a second for each GB. Compressed records are refused, since torch takes
    their bytes for numbers where it maps a file into memory.
    """
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
        if len({record.filename for record in records}) < len(records):
            raise zipfile.BadZipFile("a record is there twice")
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{record.filename!r} is compressed")
            if record.CRC == 0:  # torch was told to compute none
                continue
            with file.open(record) as content:
                while content.read(2**20):  # BadZipFile at the end if the checksum does not fit
                    pass


def restore_checkpoint(path, parts, device="cpu", at_most=None):
    """Put what `save_checkpoint` wrote back into models and optimisers.

    Args:
        parts: {name in the file: the model or AdamW whose `state_dict` was saved}.
        at_most: {name of a count in the file, such as the steps made: the largest that it may be}.

    Returns:
        all that is in the file.

    Raises:
        InputError: the file cannot be read (`load_checkpoint`) or is not one of this run: something
            is missing, of other names or shapes, not finite, or a count beyond its largest.
    """
    state = load_checkpoint(path, device)
    cure = "--fresh starts over"
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
            _check_fit(part)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # of many classes: missing names, other shapes, no dict
            raise InputError(f"{path}: its '{name}' does not fit this run; {cure}") from problem
    for name, largest in (at_most or {}).items():
        count = state.get(name)
        if type(count) is not int or not 0 <= count <= largest:
            wanted = f"a whole number from 0 to {largest}"
            raise InputError(f"{path}: its '{name}' is {count!r:.40}, wanted: {wanted}; {cure}")
    return state


def _check_fit(part):
    """ValueError if the numbers that a model or an AdamW has loaded are not finite, or the AdamW's
    are not those of its weights.
    """
    if isinstance(part, torch.nn.Module):
        numbers = list(part.state_dict().values())
    else:
        numbers = []
        for weight, moments in part.state.items():
            numbers += [moments["step"], moments["exp_avg"], moments["exp_avg_sq"]]
            if not moments["exp_avg"].shape == moments["exp_avg_sq"].shape == weight.shape:
                raise ValueError("moments of another shape than their weight")
    if not all(torch.as_tensor(number).isfinite().all() for number in numbers):
        raise ValueError("a number that is not finite")


def append_rows(path, rows):
    """Append rows to a JSONL file; they are on the disk when this returns. After a kill,
    `resume_rows` comes first.
    """
    with naming(path), open(path, "ab") as file:
        file.write(b"".join(json_line(plain_json(row)) for row in rows))
        file.flush()
        os.fsync(file.fileno())


def resume_rows(path, batches=None):
    """The rows of a JSONL file that a kill may have cut: what is incomplete is cut off the file as
    well. No file: [].

    batches: the planned batch sizes in their order; then only whole batches are kept (a batch is
    redone whole). InputError for a broken line before the last, since no kill leaves one.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows, ends = [], [0]  # ends[n]: bytes of the first n rows
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
            rows.append(row)
            ends.append(ends[-1] + len(line))
        except (ValueError, RecursionError):  # not JSON; brackets in brackets
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: not a JSON object; mend the line, or delete the file"
                ) from None
    kept = len(rows)
    if batches is not None:
        kept = max(
            total for total in itertools.accumulate(batches, initial=0) if total <= len(rows)
        )
    if ends[kept] < path.stat().st_size:
        os.truncate(path, ends[kept])
    return rows[:kept]


def json_line(value, indent=None):
    """A value as the bytes of a line of JSON. Half of a character, such as a path may hold that is
    no UTF-8, is written as its escape.

    >>> json_line({"data": "naïve \\udcff"}).decode()
    '{"data": "naïve \\\\udcff"}\\n'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def plain_json(value, digits=17):
    """The value as JSON can hold it: paths become text, tensors and NumPy numbers Python's, NaN and
    infinity null.

    digits: significant digits of a float; 17 keep it exactly.
    >>> plain_json({"loss": float("nan"), "seen": (torch.tensor(2), Path("out"), 2 / 3)}, digits=4)
    {'loss': None, 'seen': [2, 'out', 0.6667]}
    """
    if isinstance(value, dict):
        return {str(key): plain_json(item, digits) for key, item in value.items()}
    if hasattr(value, "tolist"):  # tensors, NumPy arrays and numbers
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain_json(item, digits) for item in value]
    if isinstance(value, float):  # JSON has no NaN, and many readers refuse a file with one
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _check_plain(value, name):
    """TypeError naming the entry that torch would write and then refuse to read, such as a NumPy
    number.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
    elif isinstance(value, torch.Tensor):
        stored = value.layout == torch.strided and not value.is_nested
        if not stored or value.is_meta or value.is_quantized or value.requires_grad:
            raise TypeError(
                f"{name} is a tensor that is sparse, quantised, without numbers (meta) or requires"
                " grad: a checkpoint holds plain ones"
            )
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(
            f"{name} is a {type(value).__name__}: a checkpoint holds tensors, numbers and text"
        )
