"""What the commands share: which model is meant, and which settings are possible."""

from pathlib import Path

from data import InputError
from runtime import check_between, check_positive

MODEL = ("params.json", "config.json")  # one of them is in every folder of a model


def find_model(out: Path, name: str) -> Path:
    """The folder of a model that answers, by its name in OUT or by its path: any Llama 2
    checkpoint.

    Raises:
        InputError: neither is one; names those in OUT. Or it is a reward model.
    """
    for folder in (out / name, Path(name)):
        if name.strip() and _holds(folder, *MODEL):
            if _holds(folder, "reward_head.pth"):
                raise InputError(f"{folder} is a reward model: it gives scores, no answers")
            return folder
    known = []
    if out.is_dir():
        for folder in sorted(out.iterdir()):
            if _holds(folder, *MODEL) and not _holds(folder, "reward_head.pth"):
                known.append(folder.name)
    raise InputError(
        f"{name!r} is neither a model in {out} ({', '.join(known) or 'it holds none'}) nor the path"
        " of one"
    )


def _holds(folder: Path, *files: str) -> bool:
    """Whether one of these files is in the folder."""
    return any((folder / file).is_file() for file in files)


def check_sampling(settings) -> None:
    """InputError where the settings of the sampling (temperature, max_new_tokens, seed) are out of
    range.
    """
    check_positive(settings, "max_new_tokens")
    check_between(settings, 0, 2**32 - 1, "seed")
    if settings.temperature != 0:  # 0: always the likeliest token
        check_between(settings, 0.01, 100, "temperature")
