"""A stage: a command that fills one folder, remembers what was done, and goes on after a kill.

`stage.json` in the folder says with which settings and from which inputs:

    {"settings": {...}, "inputs": {name: sha256}, "finished": false, "machines": [{...}]}

"machines" are those that worked on it, one after the other (`describe_machine`): one, or more where
a killed run went on with other threads, another torch or elsewhere. Its bits are then those of no
single machine.

The record is always replaced whole (`checkpoint.atomic_write`), so a kill at any moment leaves a
folder from which the same command goes on; the stage's own checkpoint and JSONL files say how far
it had come.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from data.errors import InputError
from data.jsonl import AXES
from runtime.checkpoint import atomic_write, json_line, plain_json
from runtime.machine import (
    choose_device,
    choose_dtype,
    describe_machine,
    hold,
    let_go,
    set_seed,
    set_threads,
)
from runtime.metrics import Metrics

RECORD = "stage.json"
# where a stage keeps its unfinished work; `*` at the end: a temporary file too
CHECKPOINTS = "checkpoint*.pth*"
TEMPORARY = "*.tmp"  # what a kill leaves of a file that was being written


class Stage:
    """A stage at work: its folder OUT/NAME, and the machine that it runs on.

        stage = Stage(settings, "sft")
        if not stage.begin(inputs):
            return  # it is finished already
        ...
        stage.finish(results)

    Making one sets threads and seeds, and touches no file.
    """

    def __init__(self, settings, name):
        set_threads(settings.threads)
        set_seed(settings.seed)
        self.settings = settings
        self.name = name
        self.folder = Path(settings.out) / name
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)  # of matrix products
        self.started = None  # the clock's readings, once it has begun

    def begin(self, inputs, aside=(), **also):
        """Open the folder: True if there is work to do, begun now or by a run that was killed.

        Args:
            inputs: {name: path} of all that is read.
            aside: names of settings that do not change the result. also: more to remember.

        Raises:
            InputError: as `open_stage`.
        """
        settings = kept_settings(self.settings, *aside) | also
        machine = describe_machine(self.device, self.dtype)
        self.started = open_stage(self.folder, settings, inputs, self.settings.fresh, machine)
        return self.started is not None

    @property
    def metrics(self):
        """The log of numbers in the folder."""
        return Metrics(self.folder / "metrics.jsonl")

    def seconds(self):
        """Seconds since it began this time."""
        return time.time() - self.started[0]

    def finish(self, results):
        """Mark the folder as finished, with these results and the seconds that it took."""
        finish_stage(self.folder, results, self.started)


def kept_settings(settings, *aside):
    """{name: value} of the settings that change a stage's result: not where and how it runs, and
    not those named here.
    """
    left_out = ("out", "fresh", "threads", "device", *aside)
    kept = dataclasses.asdict(settings)
    for name in left_out:
        kept.pop(name, None)
    return kept


def open_stage(folder, settings, inputs, fresh=False, machine=None):
    """Begin, go on with, or refuse the stage that fills `folder`; while there is work to do, the
    folder is this process's alone.

    Args:
        settings: {name: value}, only those that change the result (`kept_settings`).
        inputs: {name: path}.
        fresh: the folder's content is deleted first, but only that of a stage's folder.
        machine: what the stage runs on; None: `describe_machine()`.

    Returns:
        the clock's readings (wall, CPU seconds), for `finish_stage`, if there is work to do; None
        if it is finished.

    Raises:
        InputError: the folder was filled with other settings or inputs (each difference is named; a
            folder that nothing was made in yet is begun anew), it is not a stage's folder, an input
            is missing or lies in the folder (or the folder in it), or another process works there.
    """
    folder = Path(folder)
    _refuse_overlap(folder, inputs)
    new = {
        "settings": json.loads(json.dumps(plain_json(settings))),
        "inputs": {name: fingerprint(path) for name, path in inputs.items()},
        "finished": False,
        "machines": [machine or describe_machine()],
    }
    clock = time.time(), time.process_time()
    hold(folder)
    try:
        begun = _begin(folder, new, inputs, fresh)
    except BaseException:
        let_go(folder)
        raise
    if begun:
        return clock
    let_go(folder)
    return None


def _begin(folder, new, inputs, fresh):
    """Whether there is work to do in the folder, which is then ready for it."""
    old = _read_record(folder)
    if old and (fresh or old.get("clearing")):
        _clear(folder)
    elif old and (old["finished"] or _holds_work(folder)):
        _refuse_differences(folder, old, new, inputs)
        _remove(folder, TEMPORARY)
        if not old["finished"]:
            _note_machine(folder, old, new["machines"][0])
            return True
        _remove(folder, CHECKPOINTS)
        print(f"{folder} is finished already, with these settings and inputs; --fresh starts over")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder, TEMPORARY)
    _write_record(folder, new)
    return True


def _holds_work(folder):
    """Whether the folder holds more than its record and temporary files."""
    return any(path.name != RECORD and not path.match(TEMPORARY) for path in folder.iterdir())


def _refuse_overlap(folder, inputs):
    """InputError if an input lies in the folder that is to be filled, or that folder in the input.

    The run would change its own input, and --fresh would delete it.
    """
    filled = Path(os.path.realpath(folder))
    for name, path in inputs.items():
        read = Path(os.path.realpath(path))
        if read.is_relative_to(filled) or filled.is_relative_to(read):
            raise InputError(
                f"input {name} ({path}) and {folder}, which is to be filled, lie in each other:"
                " choose another --out"
            )


def _note_machine(folder, record, machine):
    """Say that the result will not be bit-equal where another machine goes on, and record it."""
    machines = record.get("machines")
    if not machines or machines[-1] == machine:  # older folders do not say
        return
    changed = "; ".join(_differences(machines[-1], machine))
    print(f"{folder} goes on with {changed}: the result will not be bit-equal to that of one run")
    _write_record(folder, {**record, "machines": [*machines, machine]})


def _refuse_differences(folder, old, new, inputs):
    """InputError that names each setting and input in which the folder was made differently."""
    differences = _differences(old["settings"], new["settings"])
    for name in {**old["inputs"], **new["inputs"]}:
        if old["inputs"].get(name) != new["inputs"].get(name):
            differences.append(f"input {name} ({inputs.get(name, 'not used now')}) has changed")
    if differences:
        begun = "made" if old["finished"] else "begun"
        raise InputError(
            f"{folder} was {begun} differently: {'; '.join(differences)}; run it as it was, or "
            f"start over with --fresh (which deletes what is in {folder})"
        )


def finish_stage(folder, results, started):
    """Write {"finished": true, "results": results} into the folder's record, remove its checkpoints
    and let go of it.

    The seconds since `started`, wall and CPU, become results, too. They are those of the last
    start, where a run was killed.
    """
    folder = Path(folder)
    seconds, cpu_seconds = time.time() - started[0], time.process_time() - started[1]
    results = {**results, "seconds": seconds, "cpu_seconds": cpu_seconds}
    _write_record(
        folder, {**_read_record(folder), "finished": True, "results": plain_json(results)}
    )
    _remove(folder, CHECKPOINTS)
    let_go(folder)
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
        rounds = _finished_rounds(out)
    newest = {}
    for axis in axes:
        for folder in rounds:
            if (folder / f"reward-{axis}" / "reward_head.pth").exists():
                newest[axis] = folder / f"reward-{axis}"
        if axis not in newest:
            newest[axis] = require(out / f"reward-{axis}", "python reward.py")
    return newest


def _finished_rounds(out):
    """The folders of finished rounds in OUT and of V4-PPO, in their order; no controls."""
    rounds = []
    for path in out.glob("rlhf-v*"):
        match = re.fullmatch(r"rlhf-v(\d+)|rlhf-v(4)-ppo", path.name)
        if match and is_finished(path):
            rounds.append((int(match[1] or match[2]), path.name, path))
    return [path for _, _, path in sorted(rounds)]


def check_same_prompts(rounds, file, max_prompts):
    """InputError naming the first of these folders whose round asked other prompts than the first
    `max_prompts` of `file`.
    """
    for folder in rounds:
        record = _read_record(folder, strict=False)
        if not record:
            continue
        same_file = record["inputs"].get("prompts") == fingerprint(file)
        if not same_file or record["settings"].get("max_prompts") != max_prompts:
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
            if file.is_file() and not _is_passed_over(name):
                line = f"{name.as_posix()} {fingerprint(file)}\n"
                digest.update(line.encode("utf-8", "surrogatepass"))  # a name may be no UTF-8
        return digest.hexdigest()
    if not path.is_file():
        raise InputError(f"{path} is missing")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_passed_over(name):
    """Whether `fingerprint` leaves out this file (its path inside the folder)."""
    hidden = any(part.startswith(".") for part in name.parts)
    log = name.name in (RECORD, "metrics.jsonl")
    return hidden or log or name.suffix == ".tmp" or name.match(CHECKPOINTS)


def _read_record(folder, strict=True):
    """The record; None for an empty or missing folder. InputError (None if not strict) where the
    folder is not ours.
    """
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        if record == {"clearing": True} or _is_record(record):
            return record
        reason = f"its {RECORD} was not written by a stage"
    except FileNotFoundError:
        if not folder.exists() or {file.name for file in folder.iterdir()} <= {RECORD + ".tmp"}:
            return None
        reason = f"it holds files but no {RECORD}"
    except (NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        reason = f"its {RECORD} cannot be read" if folder.is_dir() else "it is a file"
    if strict:
        raise InputError(
            f"{folder} is not the folder of a stage ({reason}): nothing was touched; choose another"
            " --out"
        )
    return None


def _is_record(record):
    """Whether what was read from JSON is what a stage writes."""
    if not isinstance(record, dict):
        return False
    record = {"results": {}, "machines": []} | record  # which may be missing
    kinds = {"settings": dict, "inputs": dict, "finished": bool, "results": dict, "machines": list}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind):
            return False
    return all(isinstance(machine, dict) for machine in record["machines"])


def _write_record(folder, record):
    with atomic_write(folder / RECORD) as file:
        file.write(json_line(record, indent=2))


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


def _remove(folder, pattern):
    """Remove the files of this pattern below the folder."""
    for path in list(folder.rglob(pattern)):
        if not path.is_dir():
            path.unlink()


def _differences(old, new, prefix=""):
    """["learning_rate 0.005 → 0.001", …]; nested dicts by dotted names."""
    differences = []
    for key in {**old, **new}:
        a, b = old.get(key, "(not set)"), new.get(key, "(not set)")
        if isinstance(a, dict) and isinstance(b, dict):
            differences += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            differences.append(f"{prefix}{key} {a} → {b}")
    return differences
