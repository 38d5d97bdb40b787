"""Do two checkouts make the same bits? The net under a rewrite that must not change any result.

    python -m tests.same_bits OLD NEW                          every run but `default`
    python -m tests.same_bits OLD NEW --only tiny margin-none  some, with those they start from
    python -m tests.same_bits OLD NEW --keep DIR               keep outputs, reuse complete ones
    python -m tests.same_bits --list                           the runs and their commands

OLD and NEW are folders of checkouts. Each one's commands run in processes of their own, on one CPU
thread, into scratch folders; then all that they wrote is compared: tensors bit for bit, rows of
JSONL files, numbers of logs and reports. Exit code 1 tells of any difference, 2 of a mistake in the
call. Bits are those of one machine and one version of torch. A tree that is not clean always runs
anew.
"""

import argparse
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Options whose words differ in NEW: the words in OLD -> the words in NEW ("": dropped), such as
#   {"--annotator none": "--no-refresh", "--micro-tokens 300": ""}
# Whole words are replaced, in every command that NEW runs.
TRANSLATE: dict[str, str] = {}

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
SHOWN = 5  # so many differences of a run are printed, each of another file; the others are counted
IGNORED = {"where", "path", "folder", "made_by", "settings", "inputs", "time"}  # paths, times
# may have more keys in NEW, as may all files of eval/
GROWING = {"stage.json", "metrics.jsonl", "rollouts.jsonl"}
ABSENT = {"is_safety": False}  # what a row means that lacks the key


# ------------------------------------------------------------------------------------------ runs


@dataclass(frozen=True)
class Run:
    """Commands, one after the other, into one folder of outputs.

    In a command OUT is that folder, START the outputs of the run it starts from, IN the folder of
    input files.
    """

    commands: tuple[str, ...]
    start: str = ""  # another run, which runs before
    copies: str = ""  # folders of its outputs that are copied into OUT
    needs: str = ""  # an option that the first command must know, else the run is left out
    asset: str = ""  # an input file that must be there, else the run is left out
    labelled: bool = False  # pairs are labelled between two calls, until a command is through
    minutes: bool = False  # takes minutes: only when named, or with --all


PAIRS = "--helpfulness-pairs 24 --safety-pairs 16"
FEW_PAIRS = "--helpfulness-pairs 12 --safety-pairs 10"
SFT = "sft.py --init START/sft --max-rows 60 --dev-data none"
REWARD = f"reward.py --prompts IN/prompts.jsonl {PAIRS}"
ROUND = (
    "rejection_sampling.py --prompts IN/prompts.jsonl --max-prompts 12 --samples 2"
    f" {FEW_PAIRS} --max-new-tokens 48"
)
PPO = (  # steps so large that a later iteration's model is kept, not the one at the start
    "ppo.py --prompts IN/prompts.jsonl --init OUT/rlhf-v1 --max-new-tokens 48"
    f" {FEW_PAIRS} --iterations 6 --evaluate-every 1 --patience 9 --learning-rate 1e-3"
)
GATT = "gatt.py --init OUT/rlhf-v1 --dialogs 12 --turns 2 --replay 10 --max-new-tokens 48"
HH = "reward.py --init START/sft --data"
REWARD_MODELS = "reward-helpfulness reward-safety"


def each(*commands: str, words: str) -> tuple[str, ...]:
    """These commands with some more words behind each."""
    return tuple(f"{command} {words}" for command in commands)


RUNS: dict[str, Run] = {
    "sft": Run(("sft.py",)),
    "tiny": Run(
        (
            "reward.py",
            "rejection_sampling.py --rounds 1-3",
            "gatt.py",
            "rejection_sampling.py --rounds 4 --mix OUT/gatt/dialogs.jsonl --batch-tokens 1500",
            "ppo.py",
            "rejection_sampling.py --rounds 5 --init OUT/rlhf-v4-ppo",
            "eval.py --split dev",
        ),
        start="sft",
        copies="sft",
    ),
    "control": Run(
        ("rejection_sampling.py --rounds 5 --name rlhf-v5-no-ppo",),
        start="tiny",
        copies=f"sft {REWARD_MODELS} rlhf-v1 rlhf-v2 rlhf-v3 rlhf-v4",
    ),
    "small": Run((REWARD, f"{ROUND} --rounds 1-2"), start="sft", copies="sft"),
    **{
        f"margin-{margin}": Run(
            each(REWARD, f"{ROUND} --rounds 1", words=f"--margin {margin}"),
            start="sft",
            copies="sft",
        )
        for margin in ("none", "small", "large")
    },
    "pool-last": Run(
        (f"{ROUND} --rounds 2 --pool last",), start="small", copies=f"sft {REWARD_MODELS} rlhf-v1"
    ),
    "start-sft": Run(
        (f"{ROUND} --rounds 2 --start sft",), start="small", copies=f"sft {REWARD_MODELS} rlhf-v1"
    ),
    "init": Run(
        (
            "sft.py --init START/rlhf-v2 --max-rows 60 --dev-data none --safety-share 0.5",
            f"{ROUND} --rounds 3 --init OUT/rlhf-v1",
        ),
        start="small",
        copies=f"{REWARD_MODELS} rlhf-v1 rlhf-v2",
    ),
    "ppo-value-policy": Run(
        (f"{PPO} --value-init policy",), start="small", copies=f"sft {REWARD_MODELS} rlhf-v1"
    ),
    "ppo-options": Run(
        (
            (
                f"{PPO} --gamma 0.9 --lam 0.8 --beta 0.2 --clip 0.1 --value-warmup 0"
                " --batch 12 --mini-batch 5 --cut-reward -1 --learning-rate 1.5e-4"
            ),
        ),
        start="small",
        copies=f"sft {REWARD_MODELS} rlhf-v1",
    ),
    "bfloat16": Run(
        each(SFT, REWARD, f"{ROUND} --rounds 1", GATT, PPO, words="--dtype bfloat16"), start="sft"
    ),
    "decay-epochs": Run(
        (
            f"{SFT} --weight-decay 0.3 --epochs 2",
            f"{REWARD} --weight-decay 0.3 --epochs 2",
            f"{ROUND} --rounds 1 --weight-decay 0.3 --epochs 1",
            f"{GATT} --weight-decay 0.3 --epochs 1",
            f"{PPO} --weight-decay 0.3",
        ),
        start="sft",
    ),
    "micro-tokens": Run(
        each(SFT, REWARD, f"{ROUND} --rounds 1", PPO, words="--micro-tokens 300"), start="sft"
    ),
    "gatt-reward": Run(
        (f"{GATT} --check reward --context dialog",),
        start="small",
        copies=f"sft {REWARD_MODELS} rlhf-v1",
    ),
    "annotator-file": Run(
        each(REWARD, f"{ROUND} --rounds 1", PPO, words="--annotator file"),
        start="sft",
        copies="sft",
        labelled=True,
    ),
    "annotator-none": Run(
        each(f"{ROUND} --rounds 1", PPO, words="--annotator none"),
        start="small",
        copies=f"sft {REWARD_MODELS}",
    ),
    "head-logprobs": Run(
        (f"{REWARD} --head logprobs", f"{ROUND} --rounds 1", PPO),
        start="sft",
        copies="sft",
        needs="--head",
    ),
    "data": Run(
        (
            (
                "reward.py --init START/sft --data START/reward-safety/pairs.jsonl"
                " --extra START/reward-helpfulness/pairs.jsonl --mix-share 0.3,0.2"
            ),
        ),
        start="small",
    ),
    "hh": Run((f"{HH} IN/hh.jsonl.gz",), start="sft"),
    "hh-folds": Run((f"{HH} IN/hh.jsonl.gz --folds 2",), start="sft"),
    "hh-scratch": Run(("reward.py --init none --data IN/hh.jsonl.gz --folds 0",)),
    "hh-assets": Run(
        (f"{HH} IN/hh-assets.jsonl.gz --max-tokens 200 --batch-tokens 4000",),
        start="sft",
        asset="hh-assets.jsonl.gz",
    ),
    "default": Run(("sft.py --preset toy", "reward.py --preset toy"), minutes=True),
}


class Mistake(Exception):
    """Something that the caller of this command has to mend."""


class Failed(Exception):
    """A command of a run failed."""


def pick_runs(names: list[str], everything: bool = False) -> list[str]:
    """The runs to compare: those named (none: all but those of minutes), in the order of RUNS.

    Raises:
        Mistake: a name that is no run.
    """
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        raise Mistake(f"no run is called {', '.join(unknown)}; there are: {', '.join(RUNS)}")
    if names:
        return [name for name in RUNS if name in names]
    return [name for name, run in RUNS.items() if everything or not run.minutes]


def with_starts(names: list[str]) -> list[str]:
    """The runs with all that they start from, in the order of RUNS."""
    wanted = set(names)
    for name in names:
        while name := RUNS[name].start:
            wanted.add(name)
    return [name for name in RUNS if name in wanted]


def translate(command: str, table: dict[str, str]) -> str:
    """A command in NEW's words.

    >>> translate("ppo.py --annotator none --beta 1", {"--annotator none": "--no-refresh"})
    'ppo.py --no-refresh --beta 1'
    """
    padded = f" {command} "
    for old, new in table.items():
        padded = padded.replace(f" {old} ", f" {new} " if new else " ")
    return " ".join(padded.split())


# ---------------------------------------------------------------------------------- input files


def make_inputs(folder: Path, old: Path) -> str:
    """Write the input files, the same for both checkouts; returns their hash."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = world_folder(old) / "prompts-train.jsonl"
    lines = prompts.read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:40]))
    write_gzip(folder / "hh.jsonl.gz", hh_sample())
    asset = assets(old) / "preferences" / "hh_rlhf_harmless_base_test.jsonl.gz"
    (folder / "hh-assets.jsonl.gz").unlink(missing_ok=True)
    if asset.is_file():
        with gzip.open(asset, "rt", encoding="utf-8") as file:
            write_gzip(folder / "hh-assets.jsonl.gz", list(itertools.islice(file, 200)))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return digest(*(f"{path.name} {digest(path.read_bytes())}" for path in files))


def world_folder(checkout: Path) -> Path:
    """The folder of a checkout's toy world, its files made if they are missing.

    Older checkouts have the world in a module of another name, and its files elsewhere.
    """
    name = "toy" if (checkout / "data" / "toy.py").exists() else "world"
    make = f"from data import {name}; print({name}.ensure())"
    done = subprocess.run(
        [sys.executable, "-c", make],
        cwd=checkout,
        env=environment(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Path(done.stdout.splitlines()[-1])


def assets(old: Path) -> Path:
    """The folder of real third-party files: TEST_ASSETS, or beside OLD or this checkout."""
    if named := os.environ.get("TEST_ASSETS"):
        return Path(named)
    beside = [root.parent / "shared" / "assets" for root in (old, Path(__file__).parents[1])]
    return next((path for path in beside if path.is_dir()), beside[0])


def hh_sample(count: int = 40) -> list[str]:
    """Lines in HH-RLHF's format: of one turn and of three, a few that cannot be used."""
    lines = []
    things = ["apples", "birds", "cars", "dogs", "eggs", "fish", "games", "hats"]
    for i in range(count):
        thing = things[i % len(things)]
        prompt = f"\n\nHuman: Tell me about {thing}, part {i // 2}."
        if i % 5 == 0:
            prompt += f"\n\nAssistant: What about {thing}?\n\nHuman: How many are {i}?"
        better = f"\n\nAssistant: There are {i} {thing}, and I like them."
        worse = f"\n\nAssistant: I do not know {things[(i + 3) % len(things)]}."
        if i % 7 == 6:
            worse = "\n\nAssistant:"  # an empty turn
        lines.append(json.dumps({"chosen": prompt + better, "rejected": prompt + worse}) + "\n")
    return lines


def write_gzip(path: Path, lines: list[str]) -> None:
    """A gz file that has the same bytes each time."""
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def label(folder: Path) -> int:
    """Fill in each `to_annotate-AXIS.jsonl` that has no labels yet; returns how many files."""
    count = 0
    for path in sorted(folder.rglob("to_annotate-*.jsonl")):
        filled = path.with_name(path.name.replace("to_annotate", "annotated"))
        if filled.exists():
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        filled.write_text("".join(json.dumps(labelled(row)) + "\n" for row in rows))
        count += 1
    return count


def labelled(row: dict) -> dict:
    """A row that waits for a person, filled in: at random, but the same each time."""
    number = zlib.crc32(f"{row['answer_a']} {row['answer_b']}".encode())
    row = row | {"better": "ab"[number % 2], "rating": RATINGS[number // 2 % 4]}
    for letter in "ab":
        if f"{letter}_is_safe" in row:
            row[f"{letter}_is_safe"] = row["better"] == letter or number // 8 % 2 == 0
    return row


# --------------------------------------------------------------------------------------- running


def digest(*parts: str | bytes) -> str:
    """A short hash of texts or bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else part.encode())
        found.update(b"\0")
    return found.hexdigest()[:16]


def environment() -> dict[str, str]:
    """The variables that commands run with: one thread, and nothing from this checkout."""
    found = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found.pop("PYTHONPATH", None)
    return found


def commit(checkout: Path) -> str:
    """The commit of a checkout; empty where its tree is not clean, or it is no git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else "failed"

    return "" if git("status", "--porcelain") else git("rev-parse", "HEAD")


@dataclass
class Side:
    """One of the two checkouts, with the folder that its runs' outputs go to."""

    name: str  # old or new
    checkout: Path
    results: Path
    inputs: Path
    inputs_hash: str
    table: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    problems: dict[str, str] = field(default_factory=dict)  # run -> why it failed

    def out(self, name: str) -> Path:
        """Where a run's outputs are."""
        return self.results / name / "out"

    def words(self, name: str, command: str) -> list[str]:
        """What is called for a command of a run, ready for `subprocess`."""
        script, *words = translate(command, self.table).split()
        words += ["--out", "OUT", "--threads", "1", "--device", "cpu"]
        if script != "eval.py" and "--preset" not in words:
            words += ["--preset", "tiny"]
        places = {"OUT": self.out(name), "IN": self.inputs, "START": self.out(RUNS[name].start)}
        found = [sys.executable, script]
        for word in words:
            place, slash, rest = word.partition("/")
            found.append(f"{places[place]}{slash}{rest}" if place in places else word)
        return found

    def key(self, name: str) -> str:
        """What a run's outputs depend on; empty where that is not known."""
        if not self.commit:
            return ""
        run = RUNS[name]
        commands = [translate(command, self.table) for command in run.commands]
        before = self.key(run.start) if run.start else ""
        machine = [platform.node(), platform.python_version(), importlib.metadata.version("torch")]
        described = json.dumps(dataclasses.asdict(run) | {"commands": commands}, sort_keys=True)
        return digest(self.commit, self.inputs_hash, before, described, *machine)

    def is_complete(self, name: str) -> bool:
        """Whether a run's outputs are there, made by this commit with these commands."""
        mark = self.results / name / "complete"
        return bool(self.key(name)) and mark.is_file() and mark.read_text() == self.key(name)

    def make(self, name: str) -> None:
        """Run a run's commands.

        Raises:
            Failed: a command failed; tells where its output is.
        """
        run, folder = RUNS[name], self.results / name
        if self.is_complete(name):
            print(f"  {self.name} {name}: complete already", flush=True)
            return
        shutil.rmtree(folder, ignore_errors=True)
        self.out(name).mkdir(parents=True)
        for copied in run.copies.split():
            shutil.copytree(self.out(run.start) / copied, self.out(name) / copied)
        for command in run.commands:
            self.call(name, command)
        (folder / "complete").write_text(self.key(name))

    def call(self, name: str, command: str) -> None:
        """One command of a run, once, or again and again while there are pairs to label."""
        words, log = self.words(name, command), self.results / name / "log.txt"
        while True:
            began = time.time()
            with log.open("a") as file:
                file.write(f"$ {' '.join(words)}\n")
                file.flush()
                done = subprocess.run(
                    words,
                    cwd=self.checkout,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            told = translate(command, self.table)
            print(f"  {self.name} {name}: {told}: {time.time() - began:.1f} s", flush=True)
            if done.returncode == 0:
                return
            if not (RUNS[name].labelled and label(self.out(name))):
                last = log.read_text(errors="replace").strip().splitlines()[-1]
                raise Failed(f"`{told}` failed in {self.name} ({last}); see {log}")

    def knows(self, command: str, option: str) -> bool:
        """Whether a command has this option, by its --help."""
        words = [sys.executable, command.split()[0], "--help"]
        done = subprocess.run(
            words, cwd=self.checkout, env=environment(), capture_output=True, text=True
        )
        return option in done.stdout.replace(",", " ").split()


# ------------------------------------------------------------------------------------- comparing


@dataclass
class Report:
    """What was compared, and what differs."""

    files: int = 0
    tensors: int = 0
    rows: int = 0
    differences: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)  # what only NEW has, where it may

    def __str__(self) -> str:
        counts = f"{self.files:,} files, {self.tensors:,} tensors, {self.rows:,} rows"
        if not self.differences:
            return f"equal: {counts}"
        firsts = {}  # file -> its first difference
        for line in self.differences:
            firsts.setdefault(line.split()[0].rstrip(":,"), line)
        lines = [f"    {line}" for line in list(firsts.values())[:SHOWN]]
        left = len(self.differences) - len(lines)
        lines += [f"    and {left:,} more differences in {len(firsts):,} files"] if left else []
        return "\n".join([f"DIFFERENT: {len(self.differences):,} in {counts}", *lines])


def compare_folders(old: Path, new: Path, aside: tuple[str, ...] = ()) -> Report:
    """Compare all files that a run wrote, in the order in which OLD wrote them.

    Those in the folders `aside` were copied from another run and are left out.
    """
    report = Report()
    olds, news = files_below(old, aside), files_below(new, aside)
    for name in sorted(olds - news):
        report.differences.append(f"{name}: missing in NEW")
    report.more += [f"file {name}" for name in sorted(news - olds)]
    if not olds:
        report.differences.append("OLD wrote no file: there is nothing to compare")
    for name in sorted(olds & news, key=lambda name: ((old / name).stat().st_mtime_ns, name)):
        report.files += 1
        compare_files(report, name, old, new)
    return report


def files_below(folder: Path, aside: tuple[str, ...] = ()) -> set[str]:
    """Names of the files to compare, relative to the folder."""
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        left_out = path.suffix in (".tmp", ".html") or path.name.startswith("checkpoint")
        if path.is_file() and name.parts[0] not in aside and not left_out:
            found.add(name.as_posix())
    return found


def compare_files(report: Report, name: str, old: Path, new: Path) -> None:
    """Compare one file of two folders of outputs, by its kind."""
    growing = Path(name).name in GROWING or name.startswith("eval/")
    if name.endswith(".pth"):
        one, two = (torch.load(at / name, "cpu", weights_only=True) for at in (old, new))
        compare_states(report, name, one, two)
    elif name.endswith(".jsonl"):
        one, two = (read_text(at, name).splitlines() for at in (old, new))
        compare_rows(report, name, one, two, growing)
    elif name.endswith(".json"):
        one, two = (json.loads(read_text(at, name)) for at in (old, new))
        compare_values(report, name, one, two, growing)
    elif (old / name).read_bytes() != (new / name).read_bytes():
        report.differences.append(f"{name}: other bytes")


def read_text(folder: Path, name: str) -> str:
    """A file's text, the folder's own path in it replaced."""
    return (folder / name).read_text("utf-8").replace(str(folder), "OUT")


def flatten(state: object, name: str = "") -> Iterator[tuple[str, object]]:
    """All values of nested dicts and lists, by dotted names."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, state


def compare_states(report: Report, where: str, old: object, new: object) -> None:
    """Compare what two .pth files hold, tensors bit for bit; more of them differ, too."""
    olds, news = dict(flatten(old)), dict(flatten(new))
    for name in [*olds, *(name for name in news if name not in olds)]:
        if name not in news or name not in olds:
            side = "NEW" if name not in news else "OLD"
            report.differences.append(f"{where} {name}: missing in {side}")
            continue
        one, two = olds[name], news[name]
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            report.tensors += 1
            if told := tensor_difference(one, two):
                report.differences.append(f"{where} {name}{told}")
        elif not same(one, two):
            report.differences.append(f"{where} {name}: {shown(one)} → {shown(two)}")


def tensor_difference(old: torch.Tensor, new: torch.Tensor) -> str:
    """Where two tensors first differ in a bit; empty where they do not.

    >>> tensor_difference(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
    '[1]: 0.0 → -0.0 (1 of 2 values)'
    """
    for what in ("dtype", "shape"):
        one, two = getattr(old, what), getattr(new, what)
        if one != two:
            return f": {what} {one} → {two}"
    if not old.numel():
        return ""
    one, two = (x.contiguous().reshape(-1) for x in (old, new))
    bits = [x.view(torch.uint8).reshape(len(x), -1) for x in (one, two)]
    differ = (bits[0] != bits[1]).any(1).nonzero().flatten().tolist()
    if not differ:
        return ""
    first = differ[0]
    values = f"{one[first].item()!r} → {two[first].item()!r}"
    return f"[{first}]: {values} ({len(differ):,} of {len(one):,} values)"


def compare_rows(
    report: Report, where: str, old: list[str], new: list[str], growing: bool = False
) -> None:
    """Compare the lines of two JSONL files, one by one."""
    if len(old) != len(new):
        report.differences.append(f"{where}: {len(old):,} rows → {len(new):,} rows")
    for number, (one, two) in enumerate(zip(old, new, strict=False), 1):
        report.rows += 1
        if one != two:
            place = f"{where} row {number}"
            compare_values(report, place, read_row(one), read_row(two), growing)


def read_row(line: str) -> dict:
    """A line of a JSONL file, with what it means where it says nothing.

    >>> read_row('{"answer": "Two."}')
    {'is_safety': False, 'answer': 'Two.'}
    """
    return ABSENT | json.loads(line)


def is_ignored(key: str) -> bool:
    """Whether a key holds a path or a time.

    >>> [is_ignored(key) for key in ("cpu_seconds", "where", "temperature")]
    [True, True, False]
    """
    return key in IGNORED or "seconds" in key


def compare_values(
    report: Report, where: str, old: object, new: object, growing: bool, key: str = ""
) -> None:
    """Compare two JSON values.

    `growing`: objects of NEW may have more keys, which are told and are no difference.
    """
    place = f"{where}, key {key}" if key else where
    deeper = functools.partial(compare_values, report, where, growing=growing)
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{key}.{name}" if key else name
            if is_ignored(name):
                continue
            if name not in new:
                report.differences.append(f"{where}, key {inner}: missing in NEW")
            elif name in old:
                deeper(old=old[name], new=new[name], key=inner)
            elif growing:
                report.more.append(f"key {inner} in {without_row(where)}")
            else:
                report.differences.append(f"{where}, key {inner}: only in NEW")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            told = f"{len(old)} entries → {len(new)} entries"
            report.differences.append(f"{place}: {told}: {shown(old)} → {shown(new)}")
            return
        for i, (one, two) in enumerate(zip(old, new, strict=True)):
            deeper(old=one, new=two, key=f"{key}[{i}]")
    elif not same(old, new):
        report.differences.append(f"{place}: {shown(old)} → {shown(new)}")


def same(old: object, new: object) -> bool:
    """Whether two plain values are the same: 1 is not 1.0, NaN is NaN, -0.0 is not 0.0."""
    return type(old) is type(new) and repr(old) == repr(new)


def shown(value: object) -> str:
    """A value, so short that two fit into a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def without_row(where: str) -> str:
    """The file of a place: "a.jsonl row 3" -> "a.jsonl"."""
    return where.partition(" row ")[0]


# --------------------------------------------------------------------------------------- the whole


def compare_run(name: str, sides: list[Side], compared: bool) -> bool:
    """Make a run on both sides and, if it is to be, compare it; false where anything differs."""
    run = RUNS[name]
    old, new = sides
    if run.asset and not (old.inputs / run.asset).exists():
        print(f"{name}: left out, the asset is not there")
        return True
    if run.needs and not old.knows(run.commands[0], run.needs):
        print(f"{name}: left out, OLD has no {run.needs}")
        return True
    for side in sides:
        if run.start in side.problems:
            side.problems[name] = f"{run.start}, from which it starts, failed in {side.name}"
            continue
        try:
            side.make(name)
        except Failed as problem:
            side.problems[name] = str(problem)
    problems = [side.problems[name] for side in sides if name in side.problems]
    if problems:
        print(f"{name}: FAILED: {'; '.join(problems)}", flush=True)
        return False
    if not compared:
        return True
    report = compare_folders(old.out(name), new.out(name), tuple(run.copies.split()))
    print(f"{name}: {report}", flush=True)
    if report.more:
        kinds = list(dict.fromkeys(report.more))
        left = f" and {len(kinds) - SHOWN:,} more" if len(kinds) > SHOWN else ""
        print(f"    only in NEW, no difference: {', '.join(kinds[:SHOWN])}{left}", flush=True)
    return not report.differences


def compare_checkouts(old: Path, new: Path, names: list[str], keep: Path) -> list[str]:
    """Compare these runs of two checkouts, outputs below `keep`; returns the runs that differ."""
    inputs = keep / "inputs"
    inputs_hash = make_inputs(inputs, old)
    sides = []
    for name, checkout, table in (("old", old, {}), ("new", new, TRANSLATE)):
        found = commit(checkout)
        print(f"{name}: {checkout} at {found[:12] or 'no clean commit: all is run anew'}")
        results = keep / f"{name}-{found[:12] or 'dirty'}"
        sides.append(Side(name, checkout, results, inputs, inputs_hash, table, found))
    different = []
    for name in with_starts(names):
        if not compare_run(name, sides, name in names):
            different.append(name)
    return different


def print_runs() -> None:
    """The runs and their commands."""
    for name, run in RUNS.items():
        told = f" from {run.start}" if run.start else ""
        rare = " (minutes: only when named, or with --all)" if run.minutes else ""
        print(f"{name}{told}{rare}")
        for command in run.commands:
            print(f"    {command}")


def parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m tests.same_bits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("old", metavar="OLD", nargs="?", type=Path)
    found.add_argument("new", metavar="NEW", nargs="?", type=Path)
    found.add_argument("--only", metavar="NAME", nargs="+", default=[], help="these runs")
    found.add_argument("--all", action="store_true", help="those that take minutes, too")
    found.add_argument("--keep", metavar="DIR", type=Path, help="keep the outputs here")
    found.add_argument("--list", action="store_true", help="print the runs and stop")
    return found


def main(argv: list[str] | None = None) -> int:
    """Compare two checkouts; returns the exit code."""
    given = parser().parse_args(argv)
    if given.list:
        print_runs()
        return 0
    try:
        if not given.old or not given.new:
            raise Mistake("wanted: two folders, OLD and NEW")
        for checkout in (given.old, given.new):
            if not (checkout / "sft.py").is_file():
                raise Mistake(f"{checkout} is no checkout: it has no sft.py")
        names = pick_runs(given.only, given.all)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as scratch:
        keep = (given.keep or Path(scratch)).resolve()
        different = compare_checkouts(given.old.resolve(), given.new.resolve(), names, keep)
    verdict = f"DIFFERENT: {', '.join(different)}" if different else "all equal"
    print(f"{verdict}; {len(names)} runs in {time.time() - began:.0f} s")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
