"""Mistakes of the user: one clear line, an exit code that is not 0, nothing half-written."""

import dataclasses
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

import eval as evaluation
import gatt
import ppo
import rejection_sampling
import reward
import runtime
import sft
from data import InputError
from play import chat
from tests.helpers import (
    TINY,
    Kill,
    Killer,
    assistant,
    chain,
    run_quietly,
    system,
    toy_dialogs,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)

ROOT = Path(__file__).parent.parent
GOOD = {"messages": [user("Hi"), assistant("Hello!")]}
LONG = "many words " * 1500
PAIR = {"prompt": [user("Hi")], "chosen": "Hello!", "rejected": "What?", "rating": "better"}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def error_of(capfd, main, *argv) -> str:
    """The one line that the command ends with; fails where it is anything else."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        runtime.run(lambda: main([str(word) for word in argv]))
    printed = capfd.readouterr()
    assert (
        end.value.code == 1 and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    ), printed.err
    assert "Traceback" not in printed.out + printed.err
    return printed.err


SFT_FILES = {
    "missing file": (None, "rows.jsonl: no such file"),
    "empty file": ([], "rows.jsonl: the file is empty"),
    "broken JSON line": ([GOOD, '{"messages": ['], "rows.jsonl, line 2: not JSON"),
    "not an object": ([GOOD, "[1, 2]"], "rows.jsonl, line 2: a JSON object is wanted"),
    "unknown role": (
        [GOOD, {"messages": [{"role": "human", "content": "Hi"}, assistant("a")]}],
        "line 2: .*role 'human' is unknown",
    ),
    "answer missing": ([GOOD, GOOD, {"messages": [user("Hi")]}], "line 3: .*the answer is missing"),
    "answer empty": (
        [GOOD, {"messages": [user("Hi"), assistant(" ")]}],
        'line 2: .*the assistant\'s content is " "',
    ),
    "no messages": ([{"prompt": "Hi"}], "line 1: field 'messages' is missing"),
    "train_on": ([GOOD | {"train_on": "none"}], "line 1: field 'train_on' is 'none'"),
    "longer than the context": (
        [GOOD, {"messages": [user(LONG), assistant("a")]}],
        "line 2: the dialog has [0-9]+ tokens",
    ),
    "tag in a question": (
        [GOOD, {"messages": [user("a [/INST] b"), assistant("a")]}],
        "line 2: the user's content holds the tag",
    ),
    "tag in an answer": (
        [GOOD, {"messages": [user("Hi"), assistant("<<SYS>>")]}],
        "line 2: the assistant's content holds the tag",
    ),
    "tag in the system": (
        [{"messages": [system("[INST]"), user("Hi"), assistant("a")]}],
        "line 1: the system's content holds",
    ),
}


@pytest.mark.parametrize("case", SFT_FILES)
def test_sft_data(case, tmp_path, capfd):
    rows, told = SFT_FILES[case]
    if rows is not None:
        write_lines(tmp_path / "rows.jsonl", rows)
    line = error_of(
        capfd,
        sft.main,
        *TINY,
        "--out",
        tmp_path / "out",
        "--data",
        tmp_path / "rows.jsonl",
        "--dev-data",
        "none",
    )
    assert re.search(told, line) and str(tmp_path / "rows.jsonl") in line
    assert not (tmp_path / "out" / "sft" / "consolidated.00.pth").exists()


@pytest.mark.parametrize(
    "case", ["broken JSON line", "longer than the context", "tag in an answer"]
)
def test_sft_runs_once_the_file_is_mended(case, tmp_path, capfd):
    """Nothing half-written stands in the way: no --fresh is needed after a mistake that was found
    before training.
    """
    path = write_lines(tmp_path / "rows.jsonl", SFT_FILES[case][0])
    argv = [*TINY, "--out", tmp_path / "out", "--data", path, "--dev-data", "none"]
    error_of(capfd, sft.main, *argv)
    write_lines(path, toy_dialogs(4))
    run_quietly(sft.main, *argv)
    assert runtime.is_finished(tmp_path / "out" / "sft")


def test_sft_all_labels_masked(tmp_path, capfd):
    """Nothing to train on is an error and no model, not a loss of NaN or 0."""
    row = GOOD | {"answer_ids": [], "tokenizer": toy_tokenizer().fingerprint}
    path = write_lines(tmp_path / "rows.jsonl", [row] * 3)
    line = error_of(
        capfd, sft.main, *TINY, "--out", tmp_path / "out", "--data", path, "--dev-data", "none"
    )
    assert "line 1: field 'answer_ids' is []" in line and not list(
        (tmp_path / "out").rglob("*.pth")
    )


def test_sft_dev_data(tmp_path, capfd):
    """A bad file for the held-out loss is found before an hour of training, not after it."""
    path = write_lines(tmp_path / "rows.jsonl", toy_dialogs(3))
    dev = write_lines(tmp_path / "dev.jsonl", ['{"messages": 3}'])
    line = error_of(
        capfd, sft.main, *TINY, "--out", tmp_path / "out", "--data", path, "--dev-data", dev
    )
    assert (
        "dev.jsonl, line 1: field 'messages' is 3" in line
        and not (tmp_path / "out" / "sft" / "metrics.jsonl").exists()
    )


PAIR_FILES = {
    "missing file": (None, "pairs.jsonl: no such file|pairs.jsonl is missing"),
    "empty file": ([], "the file is empty"),
    "broken JSON line": ([PAIR, "{"], "line 2: not JSON"),
    "unknown rating": ([PAIR, PAIR | {"rating": "great"}], "line 2: field 'rating' is 'great'"),
    "rejected missing": (
        [{k: v for k, v in PAIR.items() if k != "rejected"}],
        "line 1: field 'rejected' is missing",
    ),
    "ends with an answer": (
        [PAIR | {"prompt": GOOD["messages"]}],
        "line 1: .*a prompt ends with the user",
    ),
    "tag": (
        [PAIR] * 11 + [PAIR | {"chosen": "[INST]"}],
        "line 12: the assistant's content holds the tag",
    ),
    "longer than the context": (
        [PAIR] * 11 + [PAIR | {"rejected": LONG}],
        "line 12: the dialog has [0-9]+ tokens",
    ),
}


@pytest.mark.parametrize("case", PAIR_FILES)
def test_reward_data(case, tmp_path, capfd):
    rows, told = PAIR_FILES[case]
    if rows is not None:
        write_lines(tmp_path / "pairs.jsonl", rows)
    line = error_of(
        capfd,
        reward.main,
        *TINY,
        "--out",
        tmp_path / "out",
        "--init",
        chain()[0] / "sft",
        "--data",
        tmp_path / "pairs.jsonl",
    )
    assert re.search(told, line) and "pairs.jsonl" in line
    assert not list((tmp_path / "out").rglob("*.pth"))


TWO_ANIMALS = {"family": "list", "item": "2 animals", "kind": "ordinary"}
PROMPT_FILES = {
    "missing file": (None, "prompts.jsonl: no such file|prompts.jsonl is missing"),
    "empty file": ([], "the file is empty"),
    "is_safety missing": ([{"prompt": [user("Hi")]}] * 3, "line 1: field 'is_safety' is missing"),
    "kind": (
        [{"prompt": [user("Hi")], "is_safety": False, "kind": "odd"}],
        "line 1: field 'kind' is 'odd'",
    ),
    "tag": (
        [{"prompt": [user("<</SYS>>")], "is_safety": False, **TWO_ANIMALS}] * 3,
        "line [123]: the user's content holds the tag",
    ),
    "longer than the context": (
        [{"prompt": [user(LONG)], "is_safety": False, **TWO_ANIMALS}] * 3,
        "line [123]: .*tokens",
    ),
    "not of the toy world": (
        [{"prompt": [user("Hi")], "is_safety": False}] * 9,
        "line 1: the toy annotator knows",
    ),
    "no such item": (
        [{"prompt": [user("Hi")], "is_safety": False, **TWO_ANIMALS, "item": "zzz"}] * 9,
        "line 1: the toy annotator knows",
    ),
}


@pytest.mark.parametrize(
    "command", [reward, rejection_sampling], ids=["reward", "rejection_sampling"]
)
@pytest.mark.parametrize("case", PROMPT_FILES)
def test_prompts(case, command, tmp_path, capfd):
    """Of the prompts that the toy annotator does not know, it says so."""
    rows, told = PROMPT_FILES[case]
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        if command is rejection_sampling or name == "sft":
            (out / name).symlink_to(chain()[0] / name)
    if rows is not None:
        write_lines(tmp_path / "prompts.jsonl", rows)
    line = error_of(
        capfd, command.main, *TINY, "--out", out, "--prompts", tmp_path / "prompts.jsonl"
    )
    assert re.search(told, line)
    assert not list((out / "rlhf-v1").rglob("*.pth"))


def test_mix(tmp_path, capfd):
    """A bad --mix is found before sampling."""
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        (tmp_path / name).symlink_to(chain()[0] / name)
    mix = write_lines(tmp_path / "mix.jsonl", [GOOD, {"messages": [user("Hi")]}])
    prompts = write_lines(tmp_path / "prompts.jsonl", toy_prompts(6))
    line = error_of(
        capfd,
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        1,
        "--prompts",
        prompts,
        "--mix",
        mix,
    )
    assert "mix.jsonl, line 2: " in line and not (tmp_path / "rlhf-v1" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    "main, argv, told",
    [
        (reward.main, (), "sft is missing; `python sft.py` makes it"),
        (rejection_sampling.main, (), "sft is missing; `python sft.py` makes it"),
        (evaluation.main, (), "sft is missing; `python sft.py` makes it"),
        (sft.main, ("--init", "nowhere", "--data", "DATA"), "nowhere"),
        (sft.main, ("--device", "abacus", "--data", "DATA"), "--device abacus: unknown"),
        (sft.main, ("--dtype", "float8", "--data", "DATA"), "--dtype float8: unknown"),
        (sft.main, ("--seed", "-1", "--data", "DATA"), "--seed -1"),
        (evaluation.main, ("--temperature", "0.001"), "--temperature 0.001: must lie between 0.01"),
        (rejection_sampling.main, ("--temperatures", "1,0.001"), "1.0,0.001: must lie between"),
        (rejection_sampling.main, ("--preset", "llama-2-7b"), "needs prompts: --prompts"),
    ],
)
def test_missing_inputs_and_odd_settings(main, argv, told, tmp_path, capfd):
    data = write_lines(tmp_path / "rows.jsonl", [GOOD])
    common = (
        ("--out", tmp_path / "out")
        if main is evaluation.main
        else (*TINY, "--out", tmp_path / "out")
    )
    line = error_of(capfd, main, *common, *(data if word == "DATA" else word for word in argv))
    assert told in line and not list(tmp_path.rglob("*.pth"))


STAGES = {
    "sft": sft,
    "reward": reward,
    "rejection_sampling": rejection_sampling,
    "gatt": gatt,
    "ppo": ppo,
    "eval": evaluation,
}
ODD_WORDS = {  # what each option is given, by its type
    int: ("0", "-1", "1.5", "nan", str(10**15), str(10**20), ""),
    float: ("0", "-1", "2.0", "nan", "inf", "1e15", ""),
    tuple: ("0,0", "-1,1", "1,-1", "2.0,nan", "inf,1", "1e15,1", ""),
    typing.Literal: ("no such word", ""),
    str: ("",),
    Path: ("",),
}
TAKEN = {  # those of them that an option (of a stage) may have
    # none, all, no limit, a weight or share of nothing, greedy, or torch decides
    "0": (
        "seed threads max_rows max_prompts max_tokens folds replay show eval.dialogs value_warmup "
        "warmup_fraction safety_share weight_decay auxiliary_weight short resampled beta gamma lam "
        "cut_reward eval.temperature"
    ),
    "0,0": "mix_share",
    "-1": "cut_reward",
    "2.0": (
        "learning_rate value_learning_rate reward_learning_rate weight_decay auxiliary_weight "
        "temperature beta max_kl"
    ),
    # the default, nothing, or the folder that one is in; no prompts are told where they are read,
    # since the presets of Llama 2 have none
    "": (
        "out name mix prompts reward.init rejection_sampling.init gatt.init ppo.init reward.data "
        "extra"
    ),
}
MACHINE = {  # checked where the machine is set up, before any file is touched
    "seed": runtime.set_seed,
    "threads": runtime.set_threads,
    "device": runtime.choose_device,
    "dtype": runtime.choose_dtype,
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_has_a_range(stage, monkeypatch, capfd):
    """Each option of each stage, with odd words for its type: a clear error before anything begins,
    or it is in the table of what is taken.
    """
    comments = functools.cache(runtime.settings.field_comments)
    monkeypatch.setattr(runtime.settings, "field_comments", comments)  # read once
    module = STAGES[stage]
    kinds = typing.get_type_hints(module.Settings)
    wrong = []
    for field in dataclasses.fields(module.Settings):
        kind = typing.get_origin(kinds[field.name]) or kinds[field.name]
        if kind is bool:
            continue  # it takes no word
        option = "--" + field.name.replace("_", "-")
        for word in ODD_WORDS[kind]:
            try:
                settings = runtime.parse_settings(
                    module.Settings, "", getattr(module, "PRESETS", None), [f"{option}={word}"]
                )
                if field.name in MACHINE:
                    MACHINE[field.name](getattr(settings, field.name))
                taken = True
            except InputError as mistake:
                assert option in str(mistake), mistake
                taken = False
            except SystemExit as end:  # argparse knows that it is no such word
                assert end.code == 2 and option in capfd.readouterr().err
                taken = False
            may_be = {field.name, f"{stage}.{field.name}"} & set(TAKEN.get(word, "").split())
            if taken != bool(may_be):
                wrong.append(f"{option}={word} is {'taken' if taken else 'refused'}")
    assert not wrong


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "eval"])
def test_no_model_there(stage, tmp_path, capfd, monkeypatch):
    """--init of a folder without a model is told before it is hashed: it may be a whole disk."""
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(chain()[0] / name)
    out = tmp_path / "out2" if stage in ("sft", "reward") else tmp_path / "out"
    hashed = []
    monkeypatch.setattr(runtime.stage, "fingerprint", hashed.append)
    (tmp_path / "tree").mkdir()
    main = STAGES[stage].main
    line = error_of(capfd, main, *TINY, "--out", out, "--init", tmp_path / "tree")
    assert "tree: no model there" in line and not hashed


@pytest.mark.parametrize(
    "main, argv",
    [
        (reward.main, ("--axis", "beauty")),
        (reward.main, ("--margin", "huge")),
        (reward.main, ("--annotator", "cat")),
        (rejection_sampling.main, ("--pool", "some")),
        (rejection_sampling.main, ("--start", "here")),
        (rejection_sampling.main, ("--annotator", "cat")),
        (evaluation.main, ("--split", "tset")),
        (sft.main, ("--preset", "huge")),
        (sft.main, ("--epochs", "many")),
        (sft.main, ("--learning-rat", "1")),
    ],
)
def test_unknown_words(main, argv, tmp_path, capfd):
    """A word that no setting knows ends the program before anything is made."""
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        if main is not reward.main or name == "sft":
            (tmp_path / name).symlink_to(chain()[0] / name)
    before = tree(tmp_path)
    common = ("--out", tmp_path) if main is evaluation.main else (*TINY, "--out", tmp_path)
    with pytest.raises(SystemExit) as end:
        runtime.run(lambda: main([str(word) for word in (*common, *argv)]))
    assert (
        end.value.code in (1, 2) and argv[-1] in capfd.readouterr().err and tree(tmp_path) == before
    )


# ---- broken checkpoints ----


class Evil:
    """A pickle with code in it: reading it carelessly makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def broken_copy(tmp_path: Path, name: str, file: str, how: str) -> Path:
    """A copy of one of the chain's folders in which one file is cut short, replaced by code, or
    gone.
    """
    folder = shutil.copytree(chain()[0] / name, tmp_path / "models" / name)
    path = folder / file
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "code":
        torch.save({"norm.weight": Evil(tmp_path / "code ran")}, path)
    elif how == "plain pickle":
        path.write_bytes(pickle.dumps(Evil(tmp_path / "code ran")))
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    return folder


@pytest.mark.parametrize("how", ["truncated", "code", "plain pickle", "empty", "gone"])
@pytest.mark.parametrize("file", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_broken_model(file, how, tmp_path, capfd):
    folder = broken_copy(tmp_path, "sft", file, how)
    data = write_lines(tmp_path / "rows.jsonl", [GOOD])
    for main, argv in [
        (
            sft.main,
            (
                *TINY,
                "--out",
                tmp_path / "out",
                "--data",
                data,
                "--dev-data",
                "none",
                "--init",
                folder,
            ),
        ),
        (chat.main, (folder, "--prompt", "Hi")),
    ]:
        line = error_of(capfd, main, *argv)
        assert file in line or file == "params.json" and how == "gone" and str(folder) in line
        assert not (tmp_path / "code ran").exists() and not list((tmp_path / "out").rglob("*.pth"))


@pytest.mark.parametrize("how", ["truncated", "code", "gone"])
def test_broken_reward_head(how, tmp_path, capfd):
    folder = broken_copy(tmp_path, "reward-safety", "reward_head.pth", how).parent
    for name in ("sft", "reward-helpfulness"):
        (folder / name).symlink_to(chain()[0] / name)
    prompts = write_lines(tmp_path / "prompts.jsonl", toy_prompts(6))
    line = error_of(
        capfd,
        rejection_sampling.main,
        *TINY,
        "--out",
        folder,
        "--rounds",
        1,
        "--prompts",
        prompts,
        "--annotator",
        "none",
    )
    assert "reward_head.pth" in line and not (tmp_path / "code ran").exists()
    assert not list((folder / "rlhf-v1").rglob("*.pth"))


@pytest.mark.parametrize("how", ["truncated", "code"])
def test_broken_checkpoint_of_a_killed_run(how, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sft.optimise.__kwdefaults__, "save_every", 2)
    argv = [
        *TINY,
        "--out",
        tmp_path / "out",
        "--data",
        write_lines(tmp_path / "rows.jsonl", toy_dialogs(60)),
        "--dev-data",
        "none",
    ]
    with monkeypatch.context() as patch, pytest.raises(Kill):
        Killer(patch, 14)
        run_quietly(sft.main, *argv)
    path = tmp_path / "out" / "sft" / "checkpoint-sft.pth"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({"step": Evil(tmp_path / "code ran")}, path)
    before = tree(tmp_path)
    assert "checkpoint-sft.pth" in error_of(capfd, sft.main, *argv) and tree(tmp_path) == before
    run_quietly(sft.main, *argv, "--fresh")
    assert runtime.is_finished(tmp_path / "out" / "sft")


def test_a_folder_that_is_not_ours(tmp_path, capfd):
    """--fresh never deletes what no stage wrote."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "thesis.txt").write_text("three years")
    data = write_lines(tmp_path / "rows.jsonl", [GOOD])
    for extra in ((), ("--fresh",)):
        line = error_of(
            capfd, sft.main, *TINY, "--out", tmp_path, "--data", data, "--dev-data", "none", *extra
        )
        assert (
            "nothing was touched" in line
            and (tmp_path / "sft" / "thesis.txt").read_text() == "three years"
        )


# ---- real processes ----


@pytest.mark.parametrize(
    "script, argv, told",
    [
        ("sft.py", ("--data", "nowhere.jsonl"), "error: nowhere.jsonl: no such file\n"),
        (
            "rejection_sampling.py",
            ("--out", "nowhere"),
            "error: nowhere/sft is missing; `python sft.py` makes it\n",
        ),
    ],
)
def test_command(script, argv, told, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (1, told) and not list(tmp_path.iterdir())


def test_stage_json_that_was_edited(tmp_path, capfd):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "stage.json").write_text(json.dumps([1]))
    data = write_lines(tmp_path / "rows.jsonl", [GOOD])
    line = error_of(capfd, sft.main, *TINY, "--out", tmp_path, "--data", data, "--dev-data", "none")
    assert "is not the folder of a stage" in line


def test_a_bad_line_leaves_a_finished_stage_as_it_was(tmp_path):
    """--fresh clears a folder only once all files have been read."""
    out = tmp_path / "out"
    shutil.copytree(chain()[0], out)
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": [user("Hi")], "is_safety": "no"}])
    for main, folder, argv in [
        (reward.main, "reward-helpfulness", ["--axis", "helpfulness", "--data", bad]),
        (rejection_sampling.main, "rlhf-v2", ["--rounds", 2, "--prompts", bad, "--pool", "last"]),
    ]:
        before = sorted(file.name for file in (out / folder).rglob("*"))
        with pytest.raises(InputError, match="bad.jsonl, line 1"):
            run_quietly(main, *TINY, "--out", out, "--fresh", *argv)
        assert sorted(file.name for file in (out / folder).rglob("*")) == before
