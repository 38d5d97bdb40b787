"""Folders of runs that were killed, tampered with, and gone on with. The runs are the tiny
preset's, a second each.
"""

import contextlib
import math
import shutil
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch

import eval as evaluation
import gatt
import ppo
import rejection_sampling
import reward
import runtime
import sft
from data import Dialog, world
from tests.fuzz.judge import Case, Files, OtherResult
from tests.fuzz.mutations import mutate_bytes, mutate_json_file, mutate_jsonl, mutate_pth
from tests.helpers import (
    TINY,
    Kill,
    Killer,
    assistant,
    run_quietly,
    toy_prompts,
    weights,
    write_lines,
)

ANSWERS = ["Yes.", "No.", "A robin.", "It is red."]  # learned, with their ends, in seconds
SHORT = "--max-new-tokens 12"
FEW_PAIRS = f"--helpfulness-pairs 8 --safety-pairs 8 --prompts prompts.jsonl {SHORT}"
COMMANDS = {  # stage: (main, its options, the folders that it makes)
    "sft": (
        sft.main,
        "--data dialogs.jsonl --dev-data none --epochs 4 --learning-rate 0.01",
        ["sft"],
    ),
    "reward": (reward.main, FEW_PAIRS, ["reward-helpfulness", "reward-safety"]),
    "rejection_sampling": (
        rejection_sampling.main,
        f"{FEW_PAIRS} --rounds 1 --max-prompts 8 --samples 2",
        ["rlhf-v1"],
    ),
    "gatt": (
        gatt.main,
        f"--init sft --check none --dialogs 6 --turns 2 --replay 6 --samples 2 {SHORT}",
        ["gatt"],
    ),
    "ppo": (
        ppo.main,
        f"--init sft --iterations 4 --batch 8 --evaluate-every 2 {FEW_PAIRS}",
        ["sft-ppo"],
    ),
    "eval": (
        evaluation.main,
        f"--prompts prompts.jsonl --judge annotator --dialogs 0 --threads 1 {SHORT}",
        ["eval"],
    ),
}
NEEDED = ["sft", "reward-helpfulness", "reward-safety"]  # by all others
MUTATE = {".json": mutate_json_file, ".jsonl": mutate_jsonl, ".pth": mutate_pth}


def command(stage: str, out: Path, inputs: Path) -> tuple:
    """(main, words): the stage's run into `out`."""
    main, options, _ = COMMANDS[stage]
    words = [*(() if stage == "eval" else TINY), "--out", str(out)]
    for word in options.split():
        if word.endswith(".jsonl"):
            word = str(inputs / word)
        words.append(str(out / "sft") if word == "sft" else word)
    return main, words


def make_inputs(folder: Path) -> None:
    world.ensure()  # its files are written once
    prompts = toy_prompts(12)
    dialogs = []
    for i in range(240):
        answer = assistant(ANSWERS[i // 12 % 4])
        dialogs.append(Dialog([*prompts[i % 12].messages, answer]))
    write_lines(folder / "dialogs.jsonl", dialogs)
    write_lines(folder / "prompts.jsonl", prompts)


def make_base(folder: Path) -> None:
    """SFT and reward models, which other stages need."""
    if (folder / "base").exists():
        return
    make_inputs(folder)
    for stage in ("sft", "reward"):
        start(stage, folder / "making", folder)
    (folder / "making").rename(folder / "base")


def prepare(folder: Path) -> Path:
    """`begun-STAGE-N` are killed runs, `whole-STAGE` what would have come out."""
    make_base(folder)
    for stage in COMMANDS:
        if not (folder / f"whole-{stage}").exists():
            run_and_kill(stage, folder)
    return folder


def run_and_kill(stage: str, folder: Path) -> None:
    whole = folder / "making"
    copy_needed(stage, folder, whole)
    events = start(stage, whole, folder)
    for number, share in enumerate((0.5, 0.8)):
        begun = folder / f"begun-{stage}-{number}"
        if stage == "eval":  # it trains nothing: what is finished is read again
            shutil.copytree(whole, begun)
            continue
        copy_needed(stage, folder, begun)
        with contextlib.suppress(Kill):
            start(stage, begun, folder, at=round(share * events))
    whole.rename(folder / f"whole-{stage}")


def start(stage: str, out: Path, folder: Path, at: float = math.inf) -> int:
    """Run the stage with checkpoints at short distances, up to event `at`; how many there were."""
    main, words = command(stage, out, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.optimise.__kwdefaults__, "save_every", 6)
        patch.setattr(ppo, "SAVE_EVERY", 1)
        killer = Killer(patch, at)
        run_quietly(main, *words)
        return killer.events


def copy_needed(stage: str, folder: Path, out: Path) -> None:
    made = COMMANDS[stage][2]
    for name in NEEDED:
        if name not in made and stage != "sft":
            shutil.copytree(folder / "base" / name, out / name)


def go_on(stage: str, out: Path, folder: Path) -> None:
    main, words = command(stage, out, folder)
    main(words)
    for name in COMMANDS[stage][2]:
        expected = weights(folder / f"whole-{stage}" / name)
        result = weights(out / name)
        if result.keys() != expected.keys():
            raise OtherResult(f"other files in {name}")
        for key, value in expected.items():
            found = result[key]
            if isinstance(value, torch.Tensor) and isinstance(found, torch.Tensor):
                is_same = torch.equal(value, found)
            else:
                is_same = value == found
            if not is_same:
                raise OtherResult(f"other weights in {name}")


def no_remains(before: Files, after: Files, is_accepted: bool) -> str:
    """Files that should not be there after a stage."""
    remains = [name for name in after if name.endswith(".tmp") and name not in before]
    if is_accepted:
        remains += [name for name in after if Path(name).name.startswith("checkpoint")]
    return ", ".join(remains)


def make(folder: Path, rng: Random, case: Path) -> Case:
    begun = rng.choice(sorted(folder.glob("begun-*")))
    stage = begun.name.split("-")[1]
    out = case / "out"
    shutil.copytree(begun, out)
    made = COMMANDS[stage][2] if stage != "eval" else ["eval", *NEEDED]
    found = [path for name in made for path in sorted((out / name).rglob("*")) if path.is_file()]
    path = rng.choice(found)
    if rng.random() < 0.05:
        about = "deleted"
        path.unlink()
    else:
        about, content = MUTATE.get(path.suffix, mutate_bytes)(rng, path.read_bytes())
        path.write_bytes(content)
    action = partial(runtime.run, partial(go_on, stage, out, folder))
    about = f"{begun.name} {path.relative_to(out).as_posix()}: {about}"
    return Case(about, action, case, "", no_remains)
