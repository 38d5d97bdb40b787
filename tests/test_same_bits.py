"""The comparing functions of `tests.same_bits`: no bit, row or file may change unseen."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests import same_bits

ROWS = [
    {
        "index": 0,
        "answer": "A cow moos.",
        "answer_ids": [5, 6, 2],
        "reward": 0.25,
        "where": "a.jsonl, line 1",
    },
    {"index": 1, "answer": "Two.", "answer_ids": [7, 2], "reward": -1.5, "seconds": 3.0},
]
METRICS = {"versions": {"sft": {"summary": {"helpfulness": [0.5, 0.4, 0.6]}}}, "cpu_seconds": 3}


def write_outputs(folder: Path) -> Path:
    """What a run leaves, at its smallest."""
    for name in ("rlhf-v1", "eval"):
        (folder / name).mkdir(parents=True)
    state = {"norm.weight": torch.tensor([1.0, 2.0, 0.0]), "step": 3}
    torch.save(state, folder / "rlhf-v1" / "consolidated.00.pth")
    for name in ("samples", "metrics"):
        write_rows(folder / "rlhf-v1" / f"{name}.jsonl", ROWS)
    (folder / "eval" / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "rlhf-v1" / "tokenizer.model").write_bytes(b"abc")
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Two folders with the same outputs."""
    return write_outputs(tmp_path / "old"), write_outputs(tmp_path / "new")


def compare_changed_rows(pair, name: str = "samples.jsonl", **changes) -> same_bits.Report:
    """The report where the last row of a file of NEW has these changes."""
    old, new = pair
    write_rows(new / "rlhf-v1" / name, [ROWS[0], ROWS[1] | changes])
    return same_bits.compare_folders(old, new)


def test_equal(pair):
    report = same_bits.compare_folders(*pair)
    assert not report.differences
    assert str(report) == "equal: 5 files, 1 tensors, 4 rows"


@pytest.mark.parametrize("place", [0, 2])
def test_one_flipped_bit(pair, place):
    """Also the sign of a zero, which == does not see."""
    old, new = pair
    path = new / "rlhf-v1" / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    bits = state["norm.weight"].view(torch.int32)
    bits[place] ^= 1 if place == 0 else -(2**31)
    torch.save(state, path)
    [told] = same_bits.compare_folders(old, new).differences
    assert told.startswith(f"rlhf-v1/consolidated.00.pth norm.weight[{place}]: ")
    assert told.endswith("(1 of 3 values)")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"norm.weight": torch.tensor([1.0, 2.0])}, "shape"),
        ({"norm.weight": torch.tensor([1.0, 2.0, 0.0], dtype=torch.bfloat16)}, "dtype"),
        ({"step": 4}, "step: 3 → 4"),
        ({"more": torch.zeros(1)}, "more: missing in OLD"),
    ],
)
def test_other_states(pair, change, told):
    old, new = pair
    path = new / "rlhf-v1" / "consolidated.00.pth"
    torch.save(torch.load(path, weights_only=True) | change, path)
    [difference] = same_bits.compare_folders(old, new).differences
    assert told in difference


def test_kinds_of_tensors():
    """A number alone, nothing at all, whole numbers, and a NaN that is the same NaN."""
    for tensor in (
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.tensor([torch.nan]),
    ):
        assert not same_bits.tensor_difference(tensor, tensor.clone())
    assert (
        same_bits.tensor_difference(torch.tensor(1), torch.tensor(2))
        == "[0]: 1 → 2 (1 of 1 values)"
    )
    assert same_bits.tensor_difference(torch.eye(2).T, torch.eye(2)) == ""


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"answer_ids": [8, 2]}, "key answer_ids[0]: 7 → 8"),
        ({"answer_ids": [7]}, "key answer_ids: 2 entries → 1 entries"),
        ({"answer": "Two!"}, "key answer: 'Two.' → 'Two!'"),
        ({"reward": -1.5000000000000002}, "key reward: -1.5 → -1.5000000000000002"),
        ({"index": 1.0}, "key index: 1 → 1.0"),
        ({"extra": True}, "key extra: only in NEW"),
    ],
)
def test_changed_row(pair, changes, told):
    [difference] = compare_changed_rows(pair, **changes).differences
    assert difference.startswith(f"rlhf-v1/samples.jsonl row 2, {told}")


def test_times_and_paths_do_not_count(pair):
    """By their key, and where a text names the folder itself."""
    assert not compare_changed_rows(pair, seconds=9.0, where="b.jsonl, line 7").differences
    old, new = pair
    for folder in pair:
        write_rows(folder / "rlhf-v1" / "samples.jsonl", [{"from": f"{folder}/sft"}])
    assert not same_bits.compare_folders(old, new).differences


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_log_may_have_more_keys(pair, name):
    for folder in pair:
        write_rows(folder / "rlhf-v1" / name, ROWS)
    report = compare_changed_rows(pair, name, content=0.5)
    assert not report.differences
    assert report.more == [f"key content in rlhf-v1/{name}"]


def test_a_row_that_is_not_tagged_is_no_safety(pair):
    """In either of the two; true is another matter."""
    old, new = pair
    assert not compare_changed_rows(pair, is_safety=False).differences
    assert not same_bits.compare_folders(new, old).differences
    [difference] = compare_changed_rows(pair, is_safety=True).differences
    assert difference == "rlhf-v1/samples.jsonl row 2, key is_safety: False → True"


def test_report_may_have_more_keys_but_not_fewer(pair):
    old, new = pair
    path = new / "eval" / "metrics.json"
    path.write_text(json.dumps(METRICS | {"content": {}, "cpu_seconds": 4}))
    report = same_bits.compare_folders(old, new)
    assert not report.differences
    assert report.more == ["key content in eval/metrics.json"]
    path.write_text(json.dumps({"versions": {"sft": {"summary": {}}}}))
    assert same_bits.compare_folders(old, new).differences == [
        "eval/metrics.json, key versions.sft.summary.helpfulness: missing in NEW"
    ]


def test_missing_row(pair):
    old, new = pair
    write_rows(new / "rlhf-v1" / "samples.jsonl", ROWS[:1])
    assert same_bits.compare_folders(old, new).differences == [
        "rlhf-v1/samples.jsonl: 2 rows → 1 rows"
    ]


def test_missing_and_new_file(pair):
    old, new = pair
    (new / "rlhf-v1" / "samples.jsonl").rename(new / "rlhf-v1" / "other.jsonl")
    report = same_bits.compare_folders(old, new)
    assert report.differences == ["rlhf-v1/samples.jsonl: missing in NEW"]
    assert report.more == ["file rlhf-v1/other.jsonl"]


def test_other_bytes(pair):
    old, new = pair
    (new / "rlhf-v1" / "tokenizer.model").write_bytes(b"abd")
    assert same_bits.compare_folders(old, new).differences == [
        "rlhf-v1/tokenizer.model: other bytes"
    ]


def test_nothing_is_not_equal(tmp_path):
    """Two runs that wrote nothing, or only what was copied, have not been compared."""
    assert same_bits.compare_folders(tmp_path, tmp_path).differences
    folder = write_outputs(tmp_path / "out")
    assert same_bits.compare_folders(folder, folder, ("rlhf-v1", "eval")).differences


def test_many_differences_are_counted():
    """Five files are named, with the first difference of each."""
    lines = [f"file{i // 2}.jsonl row {i}: 1 → 2" for i in range(14)]
    told = str(same_bits.Report(files=7, differences=lines)).splitlines()
    assert [line.split()[0] for line in told[1:6]] == [f"file{i}.jsonl" for i in range(5)]
    assert told[1].endswith("row 0: 1 → 2")
    assert told[6].strip() == "and 9 more differences in 7 files"


def test_files_come_as_they_were_written(pair):
    """What went wrong first is told first."""
    old, new = pair
    for name, written in (("samples", 9), ("metrics", 5)):
        write_rows(new / "rlhf-v1" / f"{name}.jsonl", [ROWS[1], ROWS[1]])
        os.utime(old / "rlhf-v1" / f"{name}.jsonl", (written, written))
    differences = same_bits.compare_folders(old, new).differences
    assert differences[0].startswith("rlhf-v1/metrics.jsonl")
    assert differences[-1].startswith("rlhf-v1/samples.jsonl")


# -------------------------------------------------------------------------------------------- runs


def test_unknown_run(capsys, tmp_path):
    (tmp_path / "sft.py").touch()
    assert same_bits.main([str(tmp_path), str(tmp_path), "--only", "tinny"]) == 2
    assert "no run is called tinny; there are: sft, tiny, " in capsys.readouterr().err


def test_no_checkout(capsys, tmp_path):
    assert same_bits.main([str(tmp_path), str(tmp_path)]) == 2
    assert "is no checkout" in capsys.readouterr().err


def test_runs_come_in_order():
    """A run stands behind the one it starts from, and copies what that one has or was given."""
    names = list(same_bits.RUNS)
    for name, run in same_bits.RUNS.items():
        assert not run.start or names.index(run.start) < names.index(name)
        assert run.start or not run.copies
        assert run.start or not any("START" in command for command in run.commands)
    assert same_bits.with_starts(["control"]) == ["sft", "tiny", "control"]
    assert "default" not in same_bits.pick_runs([])
    assert "default" in same_bits.pick_runs([], everything=True) and same_bits.pick_runs(
        ["default"]
    ) == ["default"]


def side(tmp_path, **changes) -> same_bits.Side:
    inputs = tmp_path / "in"
    return same_bits.Side("old", tmp_path, tmp_path, inputs, "hash", **{"commit": "abc"} | changes)


def test_words(tmp_path):
    words = side(tmp_path, table={"--a 1": "--b"}).words(
        "hh", "reward.py --a 1 --init START/sft --data IN/x"
    )
    assert words[1:7] == [
        "reward.py",
        "--b",
        "--init",
        f"{tmp_path}/sft/out/sft",
        "--data",
        f"{tmp_path}/in/x",
    ]
    assert words[7:] == [
        "--out",
        f"{tmp_path}/hh/out",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--preset",
        "tiny",
    ]


def test_complete_only_for_the_same_commit_and_words(tmp_path):
    """Outputs are used again only if nothing behind them changed; never of a tree with changes."""
    one = side(tmp_path)
    assert not one.is_complete("hh")
    (tmp_path / "hh").mkdir()
    (tmp_path / "hh" / "complete").write_text(one.key("hh"))
    assert one.is_complete("hh")
    assert not side(tmp_path, commit="abd").is_complete("hh")
    assert not side(
        tmp_path, table={"--preset tiny": "", "--init START/sft": "--from START/sft"}
    ).is_complete("hh")
    (tmp_path / "hh" / "complete").write_text("")
    assert not side(tmp_path, commit="").is_complete("hh")


@pytest.mark.parametrize("name", ["toy", "world"])
def test_world_folder(tmp_path, name):
    """Checkouts of before and after the world's move; what it prints first does not matter."""
    (tmp_path / "data").mkdir()
    module = f"def ensure():\n    print('making it')\n    return '/files of {name}'\n"
    (tmp_path / "data" / f"{name}.py").write_text(module)
    assert same_bits.world_folder(tmp_path) == Path(f"/files of {name}")


def test_labels(tmp_path):
    """Each file of pairs is filled in once, alike each time."""
    row = {
        "prompt": [],
        "answer_a": "x",
        "answer_b": "y",
        "better": "",
        "rating": "",
        "a_is_safe": None,
        "b_is_safe": None,
    }
    write_rows(tmp_path / "to_annotate-safety.jsonl", [row])
    assert same_bits.label(tmp_path) == 1 and same_bits.label(tmp_path) == 0
    found = json.loads((tmp_path / "annotated-safety.jsonl").read_text())
    assert found == same_bits.labelled(row)
    assert found["better"] in ("a", "b") and found["rating"] in same_bits.RATINGS
    assert found[f"{found['better']}_is_safe"] is True
