"""The stages one after the other on the tiny preset; killed at any moment and run again, they make
the same bits.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch

import ppo
import rejection_sampling
import reward
import runtime
import sft
from data import InputError, read_sft, world
from model import PRESETS
from play import chat
from tests.helpers import (
    TINY,
    Kill,
    Killer,
    assert_same_weights,
    chain,
    die,
    run_quietly,
    scratch,
    toy_dialogs,
    toy_prompts,
    weights,
    write_lines,
)

ROOT = Path(__file__).parent.parent
KWDEFAULTS = [
    (sft.optimise, "save_every", 2),
    (runtime.sample_answers, "batch_rows", 8),
    (rejection_sampling.SamplePool.rescore, "batch_rows", 8),
]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Checkpoints and batches of sampling so small that a kill falls between many of them."""
    chain()  # with the usual ones
    for function, name, value in KWDEFAULTS:
        monkeypatch.setitem(function.__kwdefaults__, name, value)
    monkeypatch.setattr(ppo, "SAVE_EVERY", 1)


# ---- the whole chain ----


def test_chain():
    out, printed = chain()
    names = ["sft", "reward-helpfulness", "reward-safety", "rlhf-v1", "rlhf-v2"]
    for name in names:
        assert runtime.is_finished(out / name) and f"wrote {out / name}" in "".join(
            printed.values()
        )
        record = json.loads((out / name / "stage.json").read_text("utf-8"))
        assert record["results"]["seconds"] > 0 and record["results"]["cpu_seconds"] > 0
        model, tokenizer = runtime.load_model(out / name)
        assert (
            model.args.dim == PRESETS["tiny"].dim and model.args.vocab_size == tokenizer.vocab_size
        )
        assert not list((out / name).rglob("checkpoint*")) and not list((out / name).rglob("*.tmp"))
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {*names, "eval"}
    assert len({runtime.fingerprint(out / name / "consolidated.00.pth") for name in names}) == len(
        names
    ), "each learned something"
    assert (
        read_sft(out / "rlhf-v1" / "best.jsonl")
        and (out / "rlhf-v2" / "reward-safety" / "reward_head.pth").is_file()
    )


def test_chain_learns():
    """SFT on real rows of the toy world: the held-out loss is far below that of guessing words by
    their frequency.
    """
    out, printed = chain()
    log = [
        json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    assert log[0]["loss"] > 6 and sum(row["loss"] for row in log[-20:]) / 20 < 3.5
    assert json.loads((out / "sft" / "stage.json").read_text("utf-8"))["results"]["dev_loss"] < 3.5
    assert printed["sft"].count("--- after") >= 5, "the same prompts answered now and then"
    assert "parameters" in printed["sft"] and "held-out loss" in printed["sft"]


def test_chat_with_what_the_chain_made():
    out, _ = chain()
    question = ("--prompt", "Hi! Name two birds.", "--temperature", 0, "--device", "cpu")
    assert run_quietly(chat.main, out / "rlhf-v2", *question).strip()


# ---- killed, and run again ----


@functools.cache
def inputs() -> Path:
    """Small input files, made once."""
    folder = scratch() / "inputs"
    folder.mkdir()
    write_lines(folder / "dialogs.jsonl", toy_dialogs(60))
    write_lines(folder / "prompts.jsonl", toy_prompts(30))
    return folder


def command(stage: str, out: Path) -> tuple:
    """(main, argv) of a small run of a stage into `out`, whose inputs are the chain's."""
    common = [*TINY, "--out", str(out)]
    if stage == "sft":
        return sft.main, [*common, "--data", str(inputs() / "dialogs.jsonl"), "--dev-data", "none"]
    common += ["--prompts", str(inputs() / "prompts.jsonl")]
    needed = ["sft"]
    if stage != "reward":
        needed += [f"reward-{axis}" for axis in reward.AXES]
    out.mkdir(parents=True, exist_ok=True)
    for name in needed:
        if not (out / name).exists():
            (out / name).symlink_to(chain()[0] / name)
    if stage == "reward":
        sizes = "--helpfulness-pairs 18 --safety-pairs 12 --batch-tokens 300"
        return reward.main, [*common, *sizes.split()]
    if stage == "ppo":
        sizes = "--iterations 12 --batch 8 --evaluate-every 3 --max-new-tokens 12 --patience 9"
        return ppo.main, [*common, "--init", str(chain()[0] / "rlhf-v2"), *sizes.split()]
    sizes = (
        "--rounds 1-2 --max-prompts 10 --samples 2 --helpfulness-pairs 10 --safety-pairs 8"
        " --epochs 1 --batch-tokens 150 --reward-batch-tokens 300"
    )
    return rejection_sampling.main, [*common, *sizes.split()]


MAKES = {
    "sft": ["sft"],
    "reward": ["reward-helpfulness", "reward-safety"],
    "rejection_sampling": ["rlhf-v1", "rlhf-v2"],
    "ppo": ["rlhf-v2-ppo"],
}


@functools.cache
def uninterrupted(stage: str) -> tuple[Path, list[str]]:
    """`out` of the run that nobody killed, and the moments at which it could have been."""
    out = scratch() / f"whole-{stage}"
    main, argv = command(stage, out)
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch)
        run_quietly(main, *argv)
    return out, killer.kinds


def tear(out: Path, stage: str) -> None:
    """Half a line at the end of every file that a stage was appending to, and half a file beside
    it, as a kill amid a write leaves them.
    """
    for name in MAKES[stage]:
        if runtime.is_finished(out / name):
            continue
        if (out / name / "stage.json").exists():
            (out / name / "pairs.jsonl.4711.tmp").touch()
        for path in [
            *(out / name).glob("metrics.jsonl"),
            *(out / name).glob("answers-*.jsonl"),
            *(out / name).glob("samples.jsonl"),
            *(out / name).glob("probe-*.jsonl"),
            *(out / name).glob("rescored.jsonl"),
            *(out / name).glob("rollouts.jsonl"),
        ]:
            with path.open("a") as file:
                file.write('{"index": 0, "samp')


def assert_same_results(stage: str, out: Path) -> None:
    whole, _ = uninterrupted(stage)
    for name in MAKES[stage]:
        assert runtime.is_finished(out / name)
        assert_same_weights(whole / name, out / name)
        files = {path.relative_to(whole) for path in (whole / name).rglob("*.jsonl")}
        assert files == {path.relative_to(out) for path in (out / name).rglob("*.jsonl")}
        for file in files:
            rows = [sorted((folder / file).read_bytes().splitlines()) for folder in (whole, out)]
            assert rows[0] == rows[1], file
        assert {path.name for path in (whole / name).iterdir()} == {
            path.name for path in (out / name).iterdir()
        }


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("stage", MAKES)
def test_killed_and_run_again(stage, moment, tmp_path, monkeypatch):
    """Optimiser steps, batches of sampling, writes: a kill before any of them costs nothing but
    time.
    """
    _, kinds = uninterrupted(stage)
    assert {"step", "replace", "fsync"} <= set(kinds) and (stage == "sft" or "generate" in kinds)
    main, argv = command(stage, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        Killer(patch, 1 + round(moment * (len(kinds) - 1)))
        run_quietly(main, *argv)
    assert not runtime.is_finished(tmp_path / MAKES[stage][-1])
    tear(tmp_path, stage)
    run_quietly(main, *argv)
    assert_same_results(stage, tmp_path)


@pytest.mark.parametrize("stage", MAKES)
def test_killed_again_and_again(stage, tmp_path, monkeypatch):
    """A run that is killed after every so many events gets to the same end."""
    _, kinds = uninterrupted(stage)
    main, argv = command(stage, tmp_path)
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            Killer(patch, max(12, len(kinds) // 4))  # enough for two steps and a checkpoint
            try:
                run_quietly(main, *argv)
                break
            except Kill:
                kills += 1
                assert kills < 40
                tear(tmp_path, stage)
    assert kills >= 2
    assert_same_results(stage, tmp_path)


@pytest.mark.parametrize("stage", MAKES)
def test_sigkill(stage, tmp_path):
    """The real thing: the process is gone in the midst of its last training, no handler has run."""
    _, kinds = uninterrupted(stage)
    main, argv = command(stage, tmp_path)
    die(stage, kinds.count("step") - 2, argv)
    assert not runtime.is_finished(tmp_path / MAKES[stage][-1])
    run_quietly(main, *argv)
    assert_same_results(stage, tmp_path)
    assert not list(tmp_path.glob(".*.lock")), "none is left behind"


# ---- finished, changed, --fresh ----


def contents(folder: Path) -> dict[str, tuple]:
    """All files; the lock of a run that was killed is no content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


@pytest.mark.parametrize("stage", MAKES)
def test_finished_stage_says_so(stage):
    out, _ = uninterrupted(stage)
    main, argv = command(stage, out)
    before = contents(out)
    printed = run_quietly(main, *argv)
    for name in MAKES[stage]:
        assert f"{out / name} is finished already" in printed and "--fresh" in printed
    assert contents(out) == before


@pytest.mark.parametrize(
    "stage, change, told",
    [
        ("sft", ("--learning-rate", "0.002"), "learning_rate [0-9.e-]+ → 0.002"),
        ("sft", ("--data", "OTHER"), "input data .*OTHER.* has changed"),
        ("reward", ("--margin", "large"), "margin small → large"),
        ("reward", ("--prompts", "OTHER"), "has changed"),
        ("rejection_sampling", ("--samples", "3"), "samples 2 → 3"),
        ("rejection_sampling", ("--prompts", "OTHER"), "has changed"),
        ("ppo", ("--beta", "0.5"), "beta 0.03 → 0.5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_changed_settings_are_refused(stage, change, told, finished, tmp_path, monkeypatch):
    """Naming the difference and --fresh, for a finished folder and for one that was only begun;
    nothing is touched.
    """
    if finished:
        out, _ = uninterrupted(stage)
        main, argv = command(stage, out)
    else:
        out = tmp_path / "out"
        main, argv = command(stage, out)
        with monkeypatch.context() as patch, pytest.raises(Kill):
            Killer(patch, 6)
            run_quietly(main, *argv)
    other = tmp_path / "OTHER"
    source = inputs() / ("dialogs.jsonl" if stage == "sft" else "prompts.jsonl")
    other.write_text(source.read_text("utf-8").replace("Hi! ", ""), "utf-8")
    before = contents(out)
    with pytest.raises(InputError, match=f"was (made|begun) differently: .*{told}.*--fresh"):
        run_quietly(main, *argv, *(str(other) if word == "OTHER" else word for word in change))
    assert contents(out) == before


@pytest.mark.parametrize("stage", ["sft", "rejection_sampling"])
def test_fresh(stage, tmp_path):
    """--fresh deletes what is there and makes it anew; other settings are then welcome."""
    main, argv = command(stage, tmp_path)
    name = MAKES[stage][0]
    shutil.copytree(uninterrupted(stage)[0] / name, tmp_path / name)
    (tmp_path / name / "left-over.txt").write_text("")
    argv = [*argv, "--seed", "1"] + (["--rounds", "1"] if stage == "rejection_sampling" else [])
    run_quietly(main, *argv, "--fresh")
    assert runtime.is_finished(tmp_path / name) and not (tmp_path / name / "left-over.txt").exists()
    old, new = weights(uninterrupted(stage)[0] / name), weights(tmp_path / name)
    assert not torch.equal(
        old["consolidated.00.pth norm.weight"], new["consolidated.00.pth norm.weight"]
    )
    with pytest.raises(InputError, match="seed 1 → 0"):
        run_quietly(main, *argv, "--seed", "0")
    if stage == "sft":
        run_quietly(main, *argv, "--seed", "0", "--fresh")
        assert_same_weights(uninterrupted(stage)[0] / name, tmp_path / name)


def test_where_and_how_fast_makes_no_difference(tmp_path):
    """--out and --threads are no settings of the result: moved and run elsewhere, a folder is still
    finished.
    """
    shutil.copytree(uninterrupted("sft")[0] / "sft", tmp_path / "moved" / "sft")
    main, argv = command("sft", tmp_path / "moved")
    assert "is finished already" in run_quietly(main, *argv, "--threads", "1")


def test_an_unfinished_stage_is_no_input(tmp_path, monkeypatch):
    main, argv = command("sft", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        Killer(patch, 8)
        run_quietly(main, *argv)
    with pytest.raises(InputError, match="sft is not finished; `python sft.py` goes on with it"):
        run_quietly(reward.main, *TINY, "--out", tmp_path)


def test_seeds_differ(tmp_path):
    """Another seed is another model; the toy world stays the same."""
    main, argv = command("sft", tmp_path)
    run_quietly(main, *argv, "--seed", "3")
    old, new = weights(uninterrupted("sft")[0] / "sft"), weights(tmp_path / "sft")
    assert not torch.equal(
        old["consolidated.00.pth norm.weight"], new["consolidated.00.pth norm.weight"]
    )
    assert world.hashes() == json.loads(world.HASHES.read_text("utf-8"))
