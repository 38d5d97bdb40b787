"""A stage: a command that fills one folder, remembers what was done, and goes on after a kill.

`stage.json` in the folder says with which settings and from which inputs:

    {"settings": {...}, "inputs": {name: sha256}, "finished": false}

It is always replaced whole (`checkpoint.atomic_write`), so a kill at any moment leaves a folder
from which the same command goes on; the stage's own checkpoint and JSONL files say how far it had
come.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import time
from pathlib import Path

from data.errors import InputError
from data.jsonl import AXES
from runtime.checkpoint import atomic_write, plain_json
from runtime.machine import choose_device, choose_dtype, set_seed, set_threads
from runtime.metrics import Metrics

RECORD = "stage.json"
# where a stage keeps its unfinished work; `*` at the end: a temporary file too
CHECKPOINTS = "checkpoint*.pth*"


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
            InputError: the folder was filled with other settings or inputs.
        """
        settings = kept_settings(self.settings, *aside) | also
        self.started = open_stage(self.folder, settings, inputs, self.settings.fresh)
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


def open_stage(folder, settings, inputs, fresh=False):
    """Begin, go on with, or refuse the stage that fills `folder`.

    Args:
        settings: {name: value}, only those that change the result (`kept_settings`).
        inputs: {name: path}.
        fresh: the folder's content is deleted first, but only that of a stage's folder.

    Returns:
        the clock's readings (wall, CPU seconds), for `finish_stage`, if there is work to do; None
        if it is finished.

    Raises:
        InputError: the folder was filled with other settings or inputs (each difference is named; a
            folder that nothing was made in yet is begun anew), it is not a stage's folder, or an
            input is missing.
    """
    folder = Path(folder)
    new = {
        "settings": json.loads(json.dumps(plain_json(settings))),
        "inputs": {name: fingerprint(path) for name, path in inputs.items()},
        "finished": False,
    }
    clock = time.time(), time.process_time()
    old = _read_record(folder)
    if old and (fresh or old.get("clearing")):
        _clear(folder)
    elif old and (old["finished"] or {path.name for path in folder.iterdir()} != {RECORD}):
        _refuse_differences(folder, old, new, inputs)
        if not old["finished"]:
            return clock
        _remove_checkpoints(folder)
        print(f"{folder} is finished already, with these settings and inputs; --fresh starts over")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, new)
    return clock


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
        same_file = record["inputs"]["prompts"] == fingerprint(file)
        if not same_file or record["settings"]["max_prompts"] != max_prompts:
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
                digest.update(f"{name.as_posix()} {fingerprint(file)}\n".encode())
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
    keys = {"settings", "inputs", "finished"}
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        if isinstance(record, dict) and (record.get("clearing") or keys <= record.keys()):
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
    differences = []
    for key in {**old, **new}:
        a, b = old.get(key, "(not set)"), new.get(key, "(not set)")
        if isinstance(a, dict) and isinstance(b, dict):
            differences += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            differences.append(f"{prefix}{key} {a} → {b}")
    return differences
