"""The plumbing: settings, folders of stages, files that survive a kill, log."""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import runtime
from data.errors import InputError
from runtime import lineage, machine
from runtime.settings import field_comments


@dataclass
class Settings:
    # size and speed

    # which set of values
    # to begin with
    preset: str = "toy"
    out: Path = Path("out")  # where it goes
    # §3.1: 2e-5 for 7B;
    learning_rate: float = 5e-3  # 100 % our choice
    max_steps: int | None = None
    # above
    temperatures: tuple[float, ...] = (0.6, 1.0)  # and beside
    annotator: Literal["toy", "human"] = "toy"
    fresh: bool = False  # start over
    compile: bool = True


PRESETS = {"tiny": {"learning_rate": 0.1, "max_steps": 3}, "toy": {}}


def parse(*argv):
    return runtime.parse_settings(Settings, "What it does: 100 % fun.", PRESETS, list(argv))


class Kill(BaseException):
    """Stands for SIGKILL: from the n-th change on the disk on, nothing is changed any more."""


def killed_everywhere(monkeypatch, prepare, work):
    """For n = 1, 2, …: prepare(), then work() killed before its n-th change on the disk; yields
    after each.
    """
    for n in itertools.count(1):
        state, calls = prepare(), itertools.count(1)

        def dying(function, calls=calls, n=n):
            def call(*args, **kwargs):
                if next(calls) >= n:
                    raise Kill
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in [
                (os, "fsync"),
                (os, "replace"),
                (os, "truncate"),
                (Path, "unlink"),
                (Path, "mkdir"),
                (shutil, "rmtree"),
            ]:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                work()
            except Kill:
                done = False
            else:
                done = True
        yield state
        if done:
            assert n > 1
            return


def test_parse_settings():
    assert parse() == Settings()
    got = parse(
        "--preset",
        "tiny",
        "--learning-rate",
        "0.2",
        "--temperatures",
        "0.6,0.8, 1.0",
        "--fresh",
        "--no-compile",
        "--out",
        "here",
        "--annotator",
        "human",
    )
    assert got == Settings("tiny", Path("here"), 0.2, 3, (0.6, 0.8, 1.0), "human", True, False)
    assert parse("--preset=tiny", "--max-steps", "none").max_steps is None


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--max-steps", "2.5"], "argument --max-steps: invalid int value: '2.5'"),
        (
            ["--max-steps", str(10**20)],
            f"--max-steps: {10**20}: a number of at most 2^53 is wanted",
        ),
        (["--learning-rate", "nan"], "argument --learning-rate: invalid float value: 'nan'"),
        (["--temperatures", "0.6;1"], "invalid comma-separated float value"),
        (["--preset", "huge"], "tiny"),
        (["--annotator", "cat"], "human"),
        (["--fre"], "unrecognized arguments: --fre"),
    ],
)
def test_parse_settings_refuses(argv, told, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_parse_settings_help(capsys):
    assert field_comments(Settings) == {
        "preset": "which set of values to begin with",
        "out": "where it goes",
        "max_steps": "",
        "compile": "",
        "learning_rate": "§3.1: 2e-5 for 7B; 100 % our choice",
        "temperatures": "above and beside",
        "annotator": "",
        "fresh": "start over",
    }
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for piece in (
        "100 % fun.",
        "§3.1: 2e-5 for 7B; 100 % our choice (default: 0.005)",
        "(default: 0.6,1.0)",
        "(default: none)",
        "presets: tiny: learning_rate=0.1, max_steps=3 toy: the defaults",
        "--no-compile",
    ):
        assert piece in text

    @dataclass
    class Needy:
        data: Path

    with pytest.raises(SystemExit):
        runtime.parse_settings(Needy, "", argv=[])
    assert "required: DATA" in capsys.readouterr().err
    assert runtime.parse_settings(Needy, "", argv=["rows"]).data == Path("rows")


def test_run(capsys):
    def fails(mistake):
        def main():
            raise mistake

        with pytest.raises(SystemExit) as end:
            runtime.run(main)
        return end.value.code, capsys.readouterr().err

    assert fails(InputError("a.jsonl, line 2:\nno answer")) == (
        1,
        "error: a.jsonl, line 2: no answer\n",
    )
    assert fails(FileNotFoundError(2, "No such file", "x.bin")) == (
        1,
        "error: x.bin: No such file\n",
    )
    assert fails(OSError(5, "Input/output error")) == (1, "error: [Errno 5] Input/output error\n")
    full = (errno.ENOSPC, "No space left on device")
    assert fails(OSError(*full, "x.bin")) == (1, "error: no space: x.bin\n")
    assert fails(OSError(*full)) == (1, "error: no space: on the disk\n")
    assert fails(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")) == (
        1,
        "error: the input is not text in utf-8\n",
    )
    assert fails(KeyboardInterrupt())[0] == 130
    assert fails(BrokenPipeError()) == (141, "")
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        runtime.run(lambda: 1 / 0)


def test_open_stage(tmp_path, capsys):
    folder, data = tmp_path / "out" / "sft", tmp_path / "data.jsonl"
    data.write_text("one")
    settings, inputs = {"lr": 5e-3, "temps": (0.6, 1.0), "init": Path("a"), "model": {"dim": 96}}, {
        "data": data
    }
    assert runtime.open_stage(folder, {**settings, "lr": 1e-2}, {}, fresh=True)
    assert runtime.open_stage(folder, settings, inputs), "nothing was made: begun anew"
    (folder / "metrics.jsonl").write_text("")
    assert runtime.open_stage(folder, settings, inputs), "unfinished: goes on"
    with pytest.raises(
        InputError, match=r"begun differently: lr 0.005 → 0.01; model.dim 96 → 32; run.*--fresh"
    ):
        runtime.open_stage(folder, {**settings, "lr": 1e-2, "model": {"dim": 32}}, inputs)
    runtime.finish_stage(folder, {}, (0, 0))
    assert (
        not runtime.open_stage(folder, settings, inputs)
        and "finished already" in capsys.readouterr().out
    )
    data.write_text("two")
    with pytest.raises(InputError, match="made differently: input data .*data.jsonl.* has changed"):
        runtime.open_stage(folder, settings, inputs)
    with pytest.raises(InputError, match="missing.bin is missing"):
        runtime.open_stage(folder, settings, {"data": tmp_path / "missing.bin"}, fresh=True)
    (folder / "model.pth").write_text("weights")
    assert runtime.open_stage(folder, {"lr": 1}, inputs, fresh=True)
    assert [file.name for file in folder.iterdir()] == ["stage.json"]


def test_open_stage_leaves_other_folders_alone(tmp_path):
    for name, content in [
        ("thesis.tex", "x"),
        ("stage.json", '{"play": "Hamlet"}'),
        ("stage.json", "{"),
    ]:
        folder = tmp_path / f"folder{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / name).write_text(content)
        for path, fresh in itertools.product([folder, folder / name], [True, False]):
            with pytest.raises(InputError, match="not the folder of a stage"):
                runtime.open_stage(path, {}, {}, fresh=fresh)
        assert (folder / name).read_text("utf-8") == content
    keep = tmp_path / "keep"  # a link inside is removed, not followed
    keep.mkdir()
    (keep / "precious").write_text("x")
    runtime.open_stage(tmp_path / "mine", {}, {})
    (tmp_path / "mine" / "link").symlink_to(keep, target_is_directory=True)
    runtime.open_stage(tmp_path / "mine", {}, {}, fresh=True)
    assert (keep / "precious").exists() and not (tmp_path / "mine" / "link").exists()


FINISHED = {"settings": {}, "inputs": {}, "finished": True}
NO_RECORDS = {
    "deep": "[" * 100000,
    "no UTF-8": "\udcff",
    "huge number": "1" * 10000,
    "list": "[1]",
    "lines of it": json.dumps(FINISHED) * 2,
    "clearing and more": json.dumps({"clearing": True, "mine": 1}),
    "no inputs": json.dumps({"settings": {}, "finished": True}),
}
for key, value in [
    ("settings", []),
    ("inputs", None),
    ("finished", "no"),
    ("results", 5),
    ("machines", {}),
    ("machines", [3]),
]:
    NO_RECORDS[f"{key} {value}"] = json.dumps(FINISHED | {key: value})


@pytest.mark.parametrize("case", NO_RECORDS)
def test_open_stage_refuses_a_record_that_is_none(tmp_path, case):
    record = tmp_path / "stage.json"
    record.write_bytes(NO_RECORDS[case].encode("utf-8", "surrogateescape"))
    for fresh in (False, True):
        with pytest.raises(InputError, match="not the folder of a stage .its stage.json"):
            runtime.open_stage(tmp_path, {}, {}, fresh=fresh)
    assert record.exists() and not runtime.is_finished(tmp_path)


def test_open_stage_refuses_inputs_that_it_would_change(tmp_path):
    folder = tmp_path / "out" / "sft"
    runtime.open_stage(folder, {}, {})
    (folder / "rows.jsonl").write_text("precious")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    for path in (folder / "rows.jsonl", folder, tmp_path / "link", tmp_path / "out"):
        with pytest.raises(InputError, match="input data .* lie in each other: choose another"):
            runtime.open_stage(folder, {}, {"data": path}, fresh=True)
    assert (folder / "rows.jsonl").read_text("utf-8") == "precious"
    runtime.open_stage(tmp_path / "out" / "sft-2", {}, {"data": folder / "rows.jsonl"})


def test_open_stage_removes_what_a_kill_left(tmp_path):
    """Temporary files of a killed run go at the next start, whatever becomes of it."""
    folder = tmp_path / "sft"

    def leave():
        for name in ("rows.jsonl.4711.tmp", "round/checkpoint-a.pth.tmp"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()

    runtime.open_stage(folder, {}, {})
    (folder / "a.tmp").touch()
    assert runtime.open_stage(folder, {"lr": 1}, {}), "nothing was made: begun anew"
    (folder / "rows.jsonl").touch()
    leave()
    with pytest.raises(InputError, match="begun differently"):
        runtime.open_stage(folder, {}, {})
    assert len(list(folder.rglob("*.tmp"))) == 2, "what is refused is not touched"
    assert runtime.open_stage(folder, {"lr": 1}, {}) and not list(folder.rglob("*.tmp"))
    runtime.finish_stage(folder, {}, (0, 0))
    leave()
    assert not runtime.open_stage(folder, {"lr": 1}, {}) and not list(folder.rglob("*.tmp"))


def test_open_stage_tells_of_another_machine(tmp_path, capsys):
    """Where a killed run goes on otherwise, a line says so; a finished folder is finished."""
    folder = tmp_path / "sft"

    def begin(machine):
        started = runtime.open_stage(folder, {}, {}, machine=machine)
        return started, capsys.readouterr().out

    here = {"torch": "2.1", "threads": 1, "device": "cpu"}
    begin(here)
    assert begin({"threads": 2}) and machines(folder) == [{"threads": 2}], "nothing was made yet"
    begin(here)
    (folder / "rows.jsonl").touch()
    assert begin(here)[1] == "" and machines(folder) == [here]
    told = "goes on with torch 2.1 → 2.2; threads 1 → 2: the result will not be bit-equal"
    assert told in begin(here | {"torch": "2.2", "threads": 2})[1]
    assert "threads 2 → 4" in begin(here | {"torch": "2.2", "threads": 4})[1]
    assert len(machines(folder)) == 3
    runtime.finish_stage(folder, {}, (0, 0))
    assert "finished already" in begin(here)[1] and len(machines(folder)) == 3
    old = {"settings": {}, "inputs": {}, "finished": False}  # as folders were before
    (folder / "stage.json").write_text(json.dumps(old))
    started, printed = begin(here)
    assert started and not printed and json.loads((folder / "stage.json").read_text("utf-8")) == old


def machines(folder):
    return json.loads((folder / "stage.json").read_text("utf-8"))["machines"]


def test_stage_records_the_machine(tmp_path):
    settings = runtime.StageSettings(out=tmp_path, threads=2, device="cpu", dtype="bfloat16")
    try:
        assert runtime.Stage(settings, "sft").begin({})
        assert machines(tmp_path / "sft") == [machine.describe_machine("cpu", torch.bfloat16)]
    finally:
        torch.set_num_threads(1)
    [told] = machines(tmp_path / "sft")
    wanted = {"torch": torch.__version__, "threads": 2, "device": "cpu", "dtype": "bfloat16"}
    assert wanted.items() < told.items() and told["cpu"]


def test_open_stage_survives_paths_that_are_no_text(tmp_path):
    """The bytes of a path need not be UTF-8: they are kept, and compared."""
    settings = {"data": Path("\udcff.jsonl")}
    runtime.open_stage(tmp_path / "sft", settings, {})
    runtime.finish_stage(tmp_path / "sft", {}, (0, 0))
    assert not runtime.open_stage(tmp_path / "sft", settings, {})


# ---- one process to a folder ----

HOLDING = """
import sys
from runtime.machine import hold
hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_hold(tmp_path):
    """Another process has the folder until it is killed; this one may take what it has again."""
    folder, link = tmp_path / "sft", tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert other.stdout.readline().strip() == b"held"
    for path in (folder, link):
        with pytest.raises(InputError, match="another process works in .*(sft|link)"):
            runtime.open_stage(path, {}, {})
    assert not folder.exists()
    other.kill()
    other.communicate()
    assert (tmp_path / ".sft.lock").exists(), "it could not tidy up"
    for _ in range(2):
        assert runtime.open_stage(folder, {}, {})
    runtime.finish_stage(folder, {}, (0, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "sft"]


def test_hold_is_let_go(tmp_path):
    """What is refused or finished is free again, and no file tells of it."""
    folder = tmp_path / "sft"
    runtime.open_stage(folder, {}, {})
    assert (tmp_path / ".sft.lock").exists()
    runtime.finish_stage(folder, {}, (0, 0))
    assert runtime.open_stage(folder, {}, {}) is None
    with pytest.raises(InputError, match="made differently"):
        runtime.open_stage(folder, {"lr": 1}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    with open(tmp_path / ".sft.lock", "ab") as file:  # as another process
        machine._lock(file)
        with pytest.raises(InputError, match="another process works in"):
            runtime.open_stage(folder, {}, {}, fresh=True)
    assert runtime.open_stage(folder, {}, {}, fresh=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no open file")
def test_hold_a_file_that_was_removed(tmp_path, monkeypatch):
    """Who had the folder removes its file while we wait for it: a lock on that file holds nothing.
    """
    lock, calls = machine._lock, []

    def slow_lock(file):
        if not calls:
            Path(file.name).unlink()
        calls.append(file.name)
        return lock(file)

    monkeypatch.setattr(machine, "_lock", slow_lock)
    machine.hold(tmp_path / "sft")
    assert len(calls) == 2
    with open(tmp_path / ".sft.lock", "ab") as file:
        assert not lock(file)
    machine.let_go(tmp_path / "sft")
    assert not list(tmp_path.iterdir())


def test_open_stage_fresh_survives_a_kill(tmp_path, monkeypatch):
    folder, kept = tmp_path / "out", {"stage.json", "model.pth", "round"}

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        runtime.open_stage(folder, {"lr": 1}, {})
        (folder / "round").mkdir()
        (folder / "model.pth").write_text("weights")
        runtime.finish_stage(folder, {}, (0, 0))

    for _ in killed_everywhere(
        monkeypatch, prepare, lambda: runtime.open_stage(folder, {"lr": 2}, {}, fresh=True)
    ):
        if runtime.is_finished(folder):  # nothing has happened yet
            assert kept <= {file.name for file in folder.iterdir()}
        else:  # the same command, with --fresh or without, begins anew
            assert runtime.open_stage(folder, {"lr": 2}, {})
            assert {file.name for file in folder.iterdir()} == {"stage.json"}


def test_open_stage_survives_a_kill_on_its_first_start(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    for _ in killed_everywhere(
        monkeypatch,
        lambda: shutil.rmtree(folder, ignore_errors=True),
        lambda: runtime.open_stage(folder, {"lr": 2}, {}),
    ):
        assert runtime.open_stage(folder, {"lr": 2}, {})


def test_finish_stage(tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        runtime.open_stage(folder, {}, {})
        (folder / "helpfulness").mkdir()
        for name in ("checkpoint-sft.pth", "helpfulness/checkpoint.pth.tmp", "model.pth"):
            (folder / name).touch()

    for _ in killed_everywhere(
        monkeypatch,
        prepare,
        lambda: runtime.finish_stage(folder, {"loss": math.nan, "n": 2}, (0, 0)),
    ):
        if runtime.open_stage(folder, {}, {}):
            assert (folder / "checkpoint-sft.pth").exists()
        else:
            results = json.loads((folder / "stage.json").read_text("utf-8"))["results"]
            assert {"loss": None, "n": 2}.items() < results.items()
            assert not list(folder.rglob("checkpoint*")) and (folder / "model.pth").exists()


def test_finish_stage_tells_the_seconds(tmp_path, monkeypatch, capsys):
    """Wall and CPU seconds since the stage was opened this time."""
    monkeypatch.setattr("time.time", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: now[1])
    now = [100.0, 3.0]
    started = runtime.open_stage(tmp_path / "sft", {}, {})
    now = [150.0, 93.0]
    runtime.finish_stage(tmp_path / "sft", {"loss": 1.0}, started)
    assert json.loads((tmp_path / "sft" / "stage.json").read_text("utf-8"))["results"] == {
        "loss": 1.0,
        "seconds": 50.0,
        "cpu_seconds": 90.0,
    }
    assert capsys.readouterr().out == f"wrote {tmp_path / 'sft'} in 50 s\n"


def test_kept_settings():
    """What changes the result stays; where and how a stage runs, and what is named, does not."""

    @dataclass
    class Settings:
        out: str = "out"
        epochs: int = 2
        init: str = ""
        device: str = "cpu"
        threads: int = 0
        fresh: bool = False

    assert runtime.kept_settings(Settings()) == {"epochs": 2, "init": ""}
    assert runtime.kept_settings(Settings(), "init") == {"epochs": 2}


def test_check_same_prompts(tmp_path):
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).write_text(text)
    rounds = [tmp_path / "rlhf-v1", tmp_path / "rlhf-v2"]
    for folder in rounds:
        runtime.open_stage(folder, {"max_prompts": 7}, {"prompts": tmp_path / "a"})
    runtime.check_same_prompts([*rounds, tmp_path / "no stage"], tmp_path / "a", 7)
    for file, count in (("b", 7), ("a", 8)):
        with pytest.raises(InputError, match="rlhf-v1 was made from other prompts.*--pool last"):
            runtime.check_same_prompts(rounds, tmp_path / file, count)


def test_is_finished(tmp_path):
    assert not runtime.is_finished(tmp_path / "none") and not runtime.is_finished(tmp_path)
    runtime.open_stage(tmp_path / "a", {}, {})
    assert not runtime.is_finished(tmp_path / "a")
    runtime.finish_stage(tmp_path / "a", {}, (0, 0))
    assert runtime.is_finished(tmp_path / "a")


def test_require(tmp_path):
    with pytest.raises(InputError, match="sft is missing; `python sft.py` makes it"):
        runtime.require(tmp_path / "sft", "python sft.py")
    runtime.open_stage(tmp_path / "sft", {}, {})
    (tmp_path / "sft" / "rows.jsonl").touch()
    for path in (tmp_path / "sft", tmp_path / "sft" / "rows.jsonl"):
        with pytest.raises(
            InputError, match="sft is not finished; `python sft.py` goes on with it"
        ):
            runtime.require(path, "python sft.py")
    runtime.finish_stage(tmp_path / "sft", {}, (0, 0))
    assert runtime.require(str(tmp_path / "sft"), "python sft.py") == tmp_path / "sft"


def test_fingerprint(tmp_path):
    (tmp_path / "a").write_text("x")
    assert (
        runtime.fingerprint(tmp_path / "a")
        == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    )
    before = runtime.fingerprint(tmp_path)
    for name in (
        "stage.json",
        "metrics.jsonl",
        "checkpoint-ppo.pth",
        "checkpoint.pth.tmp",
        "b.tmp",
        ".DS_Store",
    ):
        (tmp_path / name).write_text("y")
    assert runtime.fingerprint(tmp_path) == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert runtime.fingerprint(tmp_path) != before
    with contextlib.suppress(OSError):  # some systems have no such names
        (tmp_path / "\udcff").touch()
    runtime.fingerprint(tmp_path)
    with pytest.raises(InputError, match="none is missing"):
        runtime.fingerprint(tmp_path / "none")


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "file"

    def write():
        with runtime.atomic_write(path) as file:
            file.write(b"new" * 100)

    for _ in killed_everywhere(monkeypatch, lambda: path.write_bytes(b"old"), write):
        assert path.read_bytes() in (b"old", b"new" * 100)
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), runtime.atomic_write(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]


def test_save_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    state = {"model": {"w": torch.randn(3, dtype=torch.bfloat16)}, "step": 7, "best": (0.1, None)}
    runtime.save_checkpoint(path, state)
    with pytest.raises(TypeError, match=r"state\['log'\]\[1\] is a float64"):
        runtime.save_checkpoint(path, {"log": [1.0, np.float64(2)]})
    monkeypatch.setattr(torch, "save", lambda state, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        runtime.save_checkpoint(path, {"step": 8})
    again = runtime.load_checkpoint(path)
    assert (
        again["step"] == 7
        and again["best"] == (0.1, None)
        and again["model"]["w"].equal(state["model"]["w"])
    )
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_amid_a_zip(*args):
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch fails to close it

    path = tmp_path / "metrics.jsonl"
    log = runtime.Metrics(path)
    for owner, name, fails, write in (
        (os, "fsync", full, lambda: runtime.save_checkpoint(path, {"step": 1})),
        (torch, "save", full_amid_a_zip, lambda: runtime.save_checkpoint(path, {"step": 1})),
        (os, "fsync", full, lambda: runtime.append_rows(path, [{"n": 1}])),
        (runtime.metrics, "json_line", full, lambda: log.log("sft", 1)),
    ):
        with monkeypatch.context() as patch, pytest.raises(OSError) as found:
            patch.setattr(owner, name, fails)
            write()
        assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(path))


def make_fit():
    """A model after a step of its AdamW."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def saved_fit():
    return {name: part.state_dict() for name, part in make_fit().items()} | {"step": 3}


def test_restore_checkpoint(tmp_path):
    path, parts = tmp_path / "checkpoint-sft.pth", make_fit()
    runtime.save_checkpoint(path, saved_fit() | {"best": 0.5})
    with torch.no_grad():
        parts["model"].weight.zero_()
    assert runtime.restore_checkpoint(path, parts, at_most={"step": 3})["best"] == 0.5
    assert parts["model"].weight.equal(make_fit()["model"].weight)


SPOILED = {
    "no model": ("model", lambda state: state.pop("model")),
    "a list for a model": ("model", lambda state: state.update(model=[1])),
    "a weight is missing": ("model", lambda state: state["model"].pop("bias")),
    "another weight": ("model", lambda state: state["model"].update(norm=torch.ones(2))),
    "another shape": ("model", lambda state: state["model"].update(bias=torch.ones(3))),
    "no number": ("model", lambda state: state["model"]["bias"].fill_(math.nan)),
    "no optimiser": ("optimizer", lambda state: state.pop("optimizer")),
    "no groups": ("optimizer", lambda state: state["optimizer"].pop("param_groups")),
    "another group": ("optimizer", lambda state: state["optimizer"].update(param_groups=[])),
    "moments gone": ("optimizer", lambda state: state["optimizer"]["state"][0].pop("exp_avg")),
    "moments of another weight": (
        "optimizer",
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.ones(2, 2)),
    ),
    "moments infinite": (
        "optimizer",
        lambda state: state["optimizer"]["state"][1]["exp_avg_sq"].fill_(math.inf),
    ),
    "no step": ("step", lambda state: state.pop("step")),
    "a step beyond the plan": ("step", lambda state: state.update(step=4)),
    "a step before it": ("step", lambda state: state.update(step=-1)),
    "half a step": ("step", lambda state: state.update(step=0.5)),
    "a yes for a step": ("step", lambda state: state.update(step=True)),
}


@pytest.mark.parametrize("case", SPOILED)
def test_restore_checkpoint_refuses(tmp_path, case):
    named, spoil = SPOILED[case]
    path, state = tmp_path / "checkpoint-sft.pth", saved_fit()
    spoil(state)
    runtime.save_checkpoint(path, state)
    with pytest.raises(InputError, match=f"checkpoint-sft.pth: its '{named}' .*--fresh"):
        runtime.restore_checkpoint(path, make_fit(), at_most={"step": 3})


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_load_checkpoint(tmp_path):
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "code-was-run"
    with pytest.raises(InputError, match="checkpoint.pth is missing"):
        runtime.load_checkpoint(path)
    runtime.save_checkpoint(path, {"w": torch.arange(1000)})
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="checkpoint.pth is not a readable checkpoint"):
            runtime.load_checkpoint(path)
    torch.save({"w": Payload(trace)}, path)
    for malicious in (path.read_bytes(), pickle.dumps(Payload(trace), protocol=2)):
        path.write_bytes(malicious)
        with pytest.raises(InputError, match="checkpoint.pth is not a readable checkpoint"):
            runtime.load_checkpoint(path)
    assert not trace.exists()
    pickle.loads(malicious)
    assert trace.exists(), "the payload does work where a pickle is trusted"


def test_append_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    runtime.append_rows(path, [{"text": "naïve\nline", "score": math.inf}])
    runtime.append_rows(path, [{"score": np.float32(0.5), "ids": torch.tensor([1, 2])}])
    assert (
        path.read_text("utf-8")
        == '{"text": "naïve\\nline", "score": null}\n{"score": 0.5, "ids": [1, 2]}\n'
    )


def test_resume_rows(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [{"n": n, "text": "é"} for n in range(5)]
    assert runtime.resume_rows(path) == []
    runtime.append_rows(path, rows)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):  # killed after any byte
        path.write_bytes(whole[:size])
        kept = runtime.resume_rows(path)
        assert kept == rows[: whole[:size].count(b"\n")]
        runtime.append_rows(path, rows[len(kept) :])
        assert path.read_bytes() == whole
    assert runtime.resume_rows(path, batches=[2, 2, 2]) == rows[:4] == runtime.resume_rows(path)
    assert runtime.resume_rows(path, batches=[5]) == [] and path.read_bytes() == b""
    for broken in (b"{oops", b"[1, 2]", b"[" * 100000, b"\xff", b"1" * 10000, b""):
        path.write_bytes(b"{}\n" + broken + b"\n{}\n")
        with pytest.raises(InputError, match="rows.jsonl, line 2: not a JSON object"):
            runtime.resume_rows(path)
        path.write_bytes(b"{}\n" + broken + b"\n")
        assert runtime.resume_rows(path) == [{}], "the last line a kill may have broken"


def test_plain_json():
    third = 1 / 3
    assert runtime.plain_json({1: [third, True, "a"], "n": np.int64(2)}) == {
        "1": [third, True, "a"],
        "n": 2,
    }
    assert runtime.plain_json((torch.tensor(third), math.nan), digits=3) == [0.333, None]


def test_choose_device():
    assert runtime.choose_device("cpu").type == "cpu" and runtime.choose_device().type in (
        "cpu",
        "cuda",
        "mps",
    )
    for name in ("gpu", "cpu:1", "cuda:x", "cuda:99", "cuda:", "cpu:", ""):
        with pytest.raises(InputError, match=f"--device {name}"):
            runtime.choose_device(name)


def test_choose_dtype():
    assert runtime.choose_dtype("auto", "cpu") == torch.float32
    assert runtime.choose_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(InputError, match="--dtype float16"):
        runtime.choose_dtype("float16")


def test_set_seed():
    draws = []
    for seed in (3, 3, 4):
        runtime.set_seed(seed)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(InputError, match="--seed -1"):
        runtime.set_seed(-1)


def test_set_threads():
    before = torch.get_num_threads()
    runtime.set_threads(1)
    runtime.set_threads(0)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    with pytest.raises(InputError, match="--threads -1"):
        runtime.set_threads(-1)


def test_metrics(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    log = runtime.Metrics(path)
    for step in range(3):
        log.log("sft", step, loss=torch.tensor(2 / 3), bad=math.nan)
        log.log("eval", step, wins=[1 / 3, 2])
    with open(path, "a") as file:
        file.write('{"phase": "sft", "st')  # killed here
    log = runtime.Metrics(path)
    log.rewind("sft", 1)
    log.log("sft", 1, loss=0.5)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows[0] == {"phase": "sft", "step": 0, "loss": 0.666667, "bad": None}
    assert [(row["phase"], row["step"]) for row in rows] == [
        ("sft", 0),
        ("eval", 0),
        ("eval", 1),
        ("eval", 2),
        ("sft", 1),
    ]
    assert rows[1]["wins"] == [0.333333, 2]
    assert b"\r" not in path.read_bytes(), "the same bytes on every system"


@pytest.mark.parametrize(
    "row",
    ['{"step": 1}', '{"phase": "sft"}', '{"phase": "sft", "step": "1"}', '{"phase": 3, "step": 1}'],
)
def test_metrics_of_no_phase(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"phase": "sft", "step": 0}\n' + row + "\n")
    log = runtime.Metrics(path)
    with pytest.raises(InputError, match="metrics.jsonl, line 2: a row has a 'phase'"):
        log.rewind("sft", 1)


def test_a_circle_of_links_is_no_version(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    found = lineage.trace(tmp_path, 2, init=str(tmp_path / "loop"))
    assert found.refreshed[-1] == tmp_path / "loop"


def test_check_positive():
    settings = Settings(learning_rate=0.1, max_steps=0, temperatures=(0.5, 0.0))
    runtime.check_positive(settings, "learning_rate")
    for name, told in (
        ("max_steps", "--max-steps 0: must be more than 0"),
        ("temperatures", "--temperatures 0.5,0.0: must"),
    ):
        with pytest.raises(InputError, match=told):
            runtime.check_positive(settings, name)
    with pytest.raises(InputError, match="--temperatures is empty"):
        runtime.check_positive(Settings(temperatures=()), "temperatures")
    runtime.check_positive(settings, "learning_rate", or_zero=("max_steps", "temperatures"))
    for value in (-0.1, float("nan")):
        with pytest.raises(InputError, match=f"--learning-rate {value}: must be 0 or more"):
            runtime.check_positive(Settings(learning_rate=value), or_zero=("learning_rate",))
        with pytest.raises(InputError, match=f"--learning-rate {value}: must be more than 0"):
            runtime.check_positive(Settings(learning_rate=value), "learning_rate")


def test_run_with_a_reader_that_stops():
    """`| head` closes the pipe: no traceback, and an exit code as SIGPIPE gives it."""
    code = "from runtime import run; run(lambda: [print('line ' * 50) for _ in range(5000)])"
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert writer.stdout.readline().startswith(b"line")
    writer.stdout.close()
    assert writer.stderr.read() == b"" and writer.wait() == 141


def test_run_with_a_closed_output(monkeypatch, tmp_path):
    """`>&- 2>&-`: what is printed goes nowhere."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    runtime.run(lambda: (print("→"), sys.stdout.write("→"), sys.stderr.write("→")))


def test_run_with_an_output_of_few_characters(monkeypatch):
    """`PYTHONIOENCODING=ascii`, or the console of an old Windows."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    runtime.run(lambda: print("§3 → \udcff"))
    assert written.getvalue().split() == [b"\\xa73", b"\\u2192", b"\\udcff"]
