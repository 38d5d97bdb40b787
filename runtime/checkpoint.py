"""Files that survive a kill at any moment: whole files are replaced in one step, growing files lose
their last line.
"""

import contextlib
import itertools
import json
import math
import os
from pathlib import Path

import torch

from data.errors import InputError


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
        with open(temporary, "wb") as file:
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

    InputError naming the file if it is missing, cut short or holds code: `weights_only` reads
    tensors and plain values and refuses to call anything that a pickle names, so no file can run
    code.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Exception as problem:  # zip, pickle and tensor errors of many classes
        raise InputError(
            f"{path} is not a readable checkpoint: it is cut short or broken, or a pickle with code"
            " in it (which is never run)"
        ) from problem


def append_rows(path, rows):
    """Append rows to a JSONL file; they are on the disk when this returns. After a kill,
    `resume_rows` comes first.
    """
    with open(path, "ab") as file:
        file.write(
            "".join(json.dumps(plain_json(row), ensure_ascii=False) + "\n" for row in rows).encode()
        )
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
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError
            ends.append(ends[-1] + len(line))
        except ValueError:
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
    elif not (
        value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)
    ):
        raise TypeError(
            f"{name} is a {type(value).__name__}: a checkpoint holds tensors, numbers and text"
        )
