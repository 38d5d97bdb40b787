"""The world's files: made from the code in this folder, and checked against the published ones.

Two things can make them differ from `hashes.json`, which holds the published files' hashes:

* Somebody changed a file. Deleting the folder makes it again.
* Somebody changed the world: a family, a word, a rule. The files are made again by themselves, for
  `made_by.json` beside them says which code made them. Then they are of another world, and so are
  all numbers that come from them; `python -m data.world --write-hashes` accepts that.
"""

import hashlib
import json
import random
from pathlib import Path

from data.errors import InputError
from data.jsonl import write_jsonl, write_records
from data.world import annotator
from data.world.asking import prompts
from data.world.demonstrations import sft_rows, single
from data.world.instructions import constraints
from data.world.pairs import written_pairs
from data.world.splits import SEED

HERE = Path(__file__).parent
FOLDER = HERE / "files"
HASHES = HERE / "hashes.json"  # file name -> sha256 of the published file
TOKENIZER = HERE / "toy.tiktoken"

SFT_DEV_ROWS = 800
WRITTEN_PAIRS = 9000
PROMPT_FILES = {  # name: (split, how many of each kind)
    "prompts-train": ("train", {"ordinary": 3600, "borderline": 900, "unsafe": 1500}),
    "prompts-dev": ("dev", {"ordinary": 216, "borderline": 72, "unsafe": 108}),
    "prompts-test": ("test", {"ordinary": 640, "borderline": 216, "unsafe": 320}),
}


def fingerprint() -> str:
    """Which code makes the files: sha256 over its source, 64 hex digits."""
    not_makers = ("__init__.py", "__main__.py", "bpe.py")
    sources = [HERE.parent / "jsonl.py", HERE.parent / "records.py"]
    for path in sorted(HERE.glob("*.py")):
        if path.name not in not_makers:
            sources.append(path)
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.name}\n{path.read_text(encoding='utf-8')}".encode())
    return digest.hexdigest()


# read as the code is loaded: what is edited while a stage runs is not what made its files
FINGERPRINT = fingerprint()


def make(folder: Path = FOLDER) -> None:
    """Write the world's files:

    sft.jsonl             the demonstrations: one pass over them is SFT
    sft-dev.jsonl         demonstrations on dev prompts, for the held-out loss
    pairs-written.jsonl   preferences between answers that people wrote, alike in style, one wrong
    prompts-train.jsonl   for preferences, and (its first lines) for rejection sampling and PPO
    prompts-dev.jsonl     for every choice that is made
    prompts-test.jsonl    for published numbers only
    constraints-train.jsonl, constraints-test.jsonl    for Ghost Attention
    made_by.json          the code that made them, and their hashes
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "sft.jsonl", sft_rows())
    rng = random.Random(f"{SEED} sft dev")
    dev_rows = [single(rng, split="dev") for _ in range(SFT_DEV_ROWS)]
    write_records(folder / "sft-dev.jsonl", dev_rows)
    write_records(folder / "pairs-written.jsonl", written_pairs("train", WRITTEN_PAIRS))
    for name, (split, shares) in PROMPT_FILES.items():
        write_records(folder / f"{name}.jsonl", prompts(split, shares, seed=0))
    for split in ("train", "test"):
        write_jsonl(folder / f"constraints-{split}.jsonl", constraints(split))
    write_made_by(folder)


def write_made_by(folder: Path) -> None:
    """Note beside the files which code made them, and their hashes."""
    write_jsonl(folder / "made_by.json", [{"code": FINGERPRINT, "files": hashes(folder)}])


def read_made_by(folder: Path) -> dict:
    """{"code": fingerprint, "files": {name: hash}}; empty ones where nothing readable is noted."""
    try:
        made_by = json.loads((folder / "made_by.json").read_text("utf-8"))
        return {"code": made_by["code"], "files": made_by["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {"code": "", "files": {}}


def hashes(folder: Path = FOLDER) -> dict[str, str]:
    """File name -> sha256, 64 hex digits, of the JSONL files in the folder."""
    hash_of = {}
    for path in sorted(folder.glob("*.jsonl")):
        hash_of[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hash_of


def world_hash() -> str:
    """What the world is: its published files and the annotator's rules, noise, grade cuts and ties;
    16 hex digits.
    """
    rules = annotator.RULES.split()  # words alone: the layout of a rule is no rule
    judge = [rules, annotator.NOISE, annotator.RATING_CUTS, annotator.TIE]
    world = json.dumps([HASHES.read_text("utf-8"), judge])
    return hashlib.sha256(world.encode()).hexdigest()[:16]


def ensure(folder: Path = FOLDER) -> Path:
    """The folder of the world's files, made if they are missing or of other code.

    Raises:
        InputError: a file is not the published one, so published numbers would not mean this world.
            Says whether the file or the world was changed, and the way out.
    """
    published = json.loads(HASHES.read_text("utf-8"))
    is_complete = published.keys() <= hashes(folder).keys()
    if not is_complete or read_made_by(folder)["code"] != FINGERPRINT:
        make(folder)
    present = hashes(folder)
    as_made = read_made_by(folder)["files"]
    for name in published:
        if present.get(name) == published[name]:
            continue
        if present.get(name) != as_made.get(name):
            raise InputError(
                f"{folder / name}: not the published toy world: the file was changed after it was"
                " made; delete the folder to make it again"
            )
        raise InputError(
            f"{folder / name}: not the published toy world: the code in {HERE} was changed and now"
            " makes another file. Take the change back, or accept the world as it is now with"
            " `python -m data.world --write-hashes`; published numbers are then of another world"
        )
    return folder


def write_hashes(folder: Path) -> None:
    """Make the files and accept them as the published ones."""
    make(folder)
    text = json.dumps(hashes(folder), indent=1) + "\n"
    HASHES.write_text(text, encoding="utf-8", newline="\n")
