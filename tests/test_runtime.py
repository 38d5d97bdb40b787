"""The plumbing: settings, folders of stages, files that survive a kill, log."""

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
    assert fails(OSError(28, "No space left on device")) == (
        1,
        "error: [Errno 28] No space left on device\n",
    )
    assert fails(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")) == (
        1,
        "error: the input is not text in utf-8\n",
    )
    assert fails(KeyboardInterrupt())[0] == 130
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
        assert (folder / name).read_text() == content
    keep = tmp_path / "keep"  # a link inside is removed, not followed
    keep.mkdir()
    (keep / "precious").write_text("x")
    runtime.open_stage(tmp_path / "mine", {}, {})
    (tmp_path / "mine" / "link").symlink_to(keep, target_is_directory=True)
    runtime.open_stage(tmp_path / "mine", {}, {}, fresh=True)
    assert (keep / "precious").exists() and not (tmp_path / "mine" / "link").exists()


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
            results = json.loads((folder / "stage.json").read_text())["results"]
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
    assert json.loads((tmp_path / "sft" / "stage.json").read_text())["results"] == {
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
    for broken in (b"{oops", b"[1, 2]"):
        path.write_bytes(b"{}\n" + broken + b"\n{}\n")
        with pytest.raises(InputError, match="rows.jsonl, line 2: not a JSON object"):
            runtime.resume_rows(path)


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
    for name in ("gpu", "cpu:1", "cuda:x", "cuda:99"):
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
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"phase": "sft", "step": 0, "loss": 0.666667, "bad": None}
    assert [(row["phase"], row["step"]) for row in rows] == [
        ("sft", 0),
        ("eval", 0),
        ("eval", 1),
        ("eval", 2),
        ("sft", 1),
    ]
    assert rows[1]["wins"] == [0.333333, 2]


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
    """`| head` closes the pipe: no traceback, no error."""
    code = "from runtime import run; run(lambda: [print('line ' * 50) for _ in range(5000)])"
    found = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1',
        shell=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert found.stdout.startswith("line") and found.stderr == ""
