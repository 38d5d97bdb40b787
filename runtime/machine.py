"""The machine that a stage runs on: device, precision, threads, seed; and one process to a folder.
"""

import atexit
import contextlib
import os
import random
from pathlib import Path

import numpy as np
import torch

from data.errors import InputError

if os.name == "nt":
    import msvcrt
else:
    import fcntl

# lock file -> it, open. The system ends the lock with the process, however that ends.
_held = {}


def choose_device(name="auto"):
    """The torch.device called `auto`, `cpu`, `cuda` (or `cuda:1`) or `mps`.

    auto: the first that is there of cuda, mps, cpu. InputError if the name is unknown or the device
    is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind in available if available[kind]))
    kind, _, index = name.partition(":")
    has_index = ":" in name
    if kind not in available or (has_index and not (kind == "cuda" and index.isdecimal())):
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:0 or mps")
    if not available[kind] or (has_index and int(index) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: torch finds no such device on this machine")
    return torch.device(kind, int(index)) if has_index else torch.device(kind)


def choose_dtype(name="auto", device="cpu"):
    """The precision of matrix products: `float32`, `bfloat16`, or `auto` (bfloat16 on a GPU that
    has it, else float32).

    It is meant for autocast: weights that are trained stay in float32, where a step of 1e-6 still
    moves them. There is no float16: its small range would need loss scaling.
    """
    if name == "auto":
        fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {name}: unknown; use auto, float32 or bfloat16")
    return getattr(torch, name)


def set_seed(seed):
    """Seed Python's, NumPy's and torch's generators; 0 ≤ seed < 2³² (NumPy's range), else
    InputError.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed}: must lie between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_threads(threads):
    """Let torch use so many CPU threads; 0 leaves torch's own choice. Small models are fastest with
    one or two.
    """
    if not 0 <= threads <= 1024:
        raise InputError(f"--threads {threads}: must be 0 (torch's choice) or more, at most 1024")
    if threads:
        torch.set_num_threads(threads)


def describe_machine(device="cpu", dtype=torch.float32):
    """{"torch", "threads", "device", "dtype", "cpu"}: on what the last bits of a result depend
    beside its settings and inputs, as it is now.

    device: a GPU is named by its model. cpu: the instructions that torch uses, such as AVX2.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def hold(folder):
    """Take a folder for this process, until `let_go` or the end of the process, however it ends.

    It is a lock of the operating system on the file `.NAME.lock` beside the folder. A killed
    process leaves the file behind, but no lock. Only the holder removes the file. So whoever gets a
    lock looks whether the file that it opened is still the one of that name: two never hold a
    folder.

    There is no lock where the file cannot be made (nothing else can be written there, either) and
    where the file system knows none.

    Raises:
        InputError: another process holds it.
    """
    path = _lock_file(folder)
    for _ in range(100):  # more only where a file system tells no file from another
        if path in _held:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
        except OSError:
            return
        if not _lock(file):
            file.close()
            raise InputError(
                f"another process works in {folder}: wait until it ends, or end it (it has locked"
                f" {path})"
            )
        if _is_in_place(file, path):
            _held[path] = file
        else:
            file.close()


def let_go(folder):
    """The end of `hold`; nothing where this process does not hold the folder."""
    path = _lock_file(folder)
    if path in _held:
        _release(path)


@atexit.register
def _let_go_of_all():
    for path in list(_held):
        _release(path)


def _lock_file(folder):
    """The file that stands for a folder, however its path is written."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f".{folder.name}.lock")


def _release(path):
    file = _held.pop(path)
    if os.name == "nt":  # it removes no open file, not even one that another process has open
        file.close()
    try:
        with contextlib.suppress(OSError):
            path.unlink()  # elsewhere while it is still locked
    finally:
        file.close()


def _lock(file):
    """Lock an open file, at once; False if another process has locked it."""
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX, Windows: another process has it
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_in_place(file, path):
    """Whether this open file is the one of that path, and not one that was removed."""
    if os.name == "nt":  # where no open file can be removed
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
