"""Which version comes from which (§3.2.3): where a round of rejection sampling stands.

    sft -> rlhf-v1 -> rlhf-v2 -> rlhf-v3 -> rlhf-v4     each round from the one before it
    rlhf-v4 -> rlhf-v4-ppo -> rlhf-v5                   with `--init out/rlhf-v4-ppo`

No file is read or written. Symbolic links are followed, to tell whether two folders are the same.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from runtime.stage import require


@dataclass(frozen=True)
class Lineage:
    """The folders that one round looks back on, and the one that it fills."""

    label: str  # rlhf-vN; it keys the random numbers of the round and of a control beside it
    folder: Path  # what the round fills: OUT/rlhf-vN, or a control's
    before: list[Path]  # SFT, V1 ... V(N-1): all of them have to be there
    newest: Path  # the model that answers the prompts and is tuned
    compared: Path  # an older policy; its answers stand beside those of the newest in fresh pairs
    refreshed: list[Path]  # whose reward models and pairs this round goes on from, the oldest first
    pooled: list[Path]  # the earlier rounds whose answers count again

    @property
    def sft(self) -> Path:
        return self.before[0]

    def require_versions(self) -> None:
        """InputError where a version before is missing or unfinished, naming its command."""
        for version, folder in enumerate(self.before):
            require(folder, command_of(version))


def command_of(version: int) -> str:
    """The command that makes this version; version 0 is SFT.

    >>> command_of(0), command_of(2)
    ('python sft.py', 'python rejection_sampling.py --rounds 2')
    """
    if version == 0:
        return "python sft.py"
    return f"python rejection_sampling.py --rounds {version}"


def trace(out: Path, version: int, *, init: str = "", name: str = "", pool: str = "all") -> Lineage:
    """The lineage of round `version` (1 or more) in the folder OUT.

    Args:
        init: folder of the model that the round starts from; empty: the version before it. One that
            is none of the versions before it, such as V4-PPO, comes last in `refreshed`: reward
            models and pairs in its folder are the newest.
        name: folder of a control, inside OUT; empty: rlhf-vN.
        pool: "all": the answers of all earlier rounds count again; "last": those of none.

    The policy that the newest is compared with stands one version before it: V(N-2), or SFT where
    there is none. With `init` it is V(N-1), since a model given by hand comes after that one.

    >>> lineage = trace(Path("out"), 3)
    >>> lineage.newest.name, lineage.compared.name, [folder.name for folder in lineage.pooled]
    ('rlhf-v2', 'rlhf-v1', ['rlhf-v1', 'rlhf-v2'])
    """
    label = f"rlhf-v{version}"
    earlier_rounds = [out / f"rlhf-v{number}" for number in range(1, version)]
    before = [out / "sft", *earlier_rounds]
    newest = before[-1]
    compared = before[max(0, version - 2)]
    refreshed = list(earlier_rounds)
    if init:
        newest = Path(init)
        compared = before[-1]
        if not _is_one_of(newest, before):
            refreshed.append(newest)
    return Lineage(
        label=label,
        folder=out / (name or label),
        before=before,
        newest=newest,
        compared=compared,
        refreshed=refreshed,
        pooled=earlier_rounds if pool == "all" else [],
    )


def _is_one_of(folder: Path, others: list[Path]) -> bool:
    """True if one of the others is the same folder, however it is written."""
    return os.path.realpath(folder) in [os.path.realpath(other) for other in others]
