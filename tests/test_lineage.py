"""Which version comes from which: what each round starts from and looks back on."""

from pathlib import Path

import pytest

from data import InputError
from runtime.lineage import command_of, trace

OUT = Path("out")


def folders(*names: str) -> list[Path]:
    return [OUT / name for name in names]


@pytest.mark.parametrize(
    "version, newest, compared",
    [
        (1, "sft", "sft"),
        (2, "rlhf-v1", "sft"),
        (3, "rlhf-v2", "rlhf-v1"),
        (4, "rlhf-v3", "rlhf-v2"),
    ],
)
def test_trace_rounds(version, newest, compared):
    """Each round comes from the one before it; all earlier rounds count."""
    rounds = folders(*[f"rlhf-v{number}" for number in range(1, version)])
    lineage = trace(OUT, version)
    assert lineage.label == f"rlhf-v{version}"
    assert lineage.folder == OUT / f"rlhf-v{version}"
    assert lineage.sft == OUT / "sft"
    assert lineage.before == [OUT / "sft", *rounds]
    assert lineage.newest == OUT / newest
    assert lineage.compared == OUT / compared
    assert lineage.refreshed == rounds
    assert lineage.pooled == rounds


def test_trace_from_elsewhere():
    """V1 from a model of one's own: its reward models are the newest, SFT is the older policy."""
    lineage = trace(OUT, 1, init="/models/mine")
    assert lineage.newest == Path("/models/mine")
    assert lineage.compared == OUT / "sft"
    assert lineage.before == [OUT / "sft"]
    assert lineage.refreshed == [Path("/models/mine")]
    assert lineage.pooled == []


def test_trace_v5_from_v4_ppo():
    """V4-PPO comes after V4: its reward models and pairs are the newest. It is not pooled."""
    rounds = folders("rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4")
    lineage = trace(OUT, 5, init="out/rlhf-v4-ppo")
    assert lineage.newest == OUT / "rlhf-v4-ppo"
    assert lineage.compared == OUT / "rlhf-v4"
    assert lineage.refreshed == [*rounds, OUT / "rlhf-v4-ppo"]
    assert lineage.pooled == rounds
    assert lineage.folder == OUT / "rlhf-v5"


def test_trace_from_a_version_given_by_hand(tmp_path):
    """A version before is known again, however its path is written, and counts once."""
    (tmp_path / "rlhf-v1").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "rlhf-v1")
    for init in (tmp_path / "link", tmp_path / "rlhf-v1" / ".." / "rlhf-v1", tmp_path / "sft"):
        lineage = trace(tmp_path, 2, init=str(init))
        assert lineage.newest == init
        assert lineage.refreshed == [tmp_path / "rlhf-v1"]
        assert lineage.compared == tmp_path / "rlhf-v1"


def test_trace_control():
    """A folder of its own, the ancestors and random numbers of the version beside it."""
    control = trace(OUT, 5, name="rlhf-v5-no-ppo")
    version = trace(OUT, 5)
    assert control.folder == OUT / "rlhf-v5-no-ppo"
    assert control.label == version.label == "rlhf-v5"
    for field in ("before", "newest", "compared", "refreshed", "pooled"):
        assert getattr(control, field) == getattr(version, field)


def test_trace_pool_last():
    """Without the pool the reward models still go on from all earlier rounds."""
    lineage = trace(OUT, 3, pool="last")
    assert lineage.pooled == []
    assert lineage.refreshed == folders("rlhf-v1", "rlhf-v2")


def test_require_versions(tmp_path):
    """The first version that is missing is named with its command."""
    lineage = trace(tmp_path, 3)
    for name, command in [
        ("sft", "python sft.py"),
        ("rlhf-v1", "python rejection_sampling.py --rounds 1"),
        ("rlhf-v2", "python rejection_sampling.py --rounds 2"),
    ]:
        with pytest.raises(InputError, match=f"{name} is missing; `{command}` makes it"):
            lineage.require_versions()
        (tmp_path / name).mkdir()
    lineage.require_versions()


def test_command_of():
    assert command_of(0) == "python sft.py"
    assert command_of(4) == "python rejection_sampling.py --rounds 4"
