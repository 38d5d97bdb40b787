"""What the experiments share does what the stages do."""

import json
import math

import pytest
import torch

from data import toy
from eval import Interval, interval
from experiments import common
from experiments.table29_safety_loss import safety_bin
from reward import AXES, load_reward_model
from tests.helpers import chain


def test_save_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    assert common.load_result("x") == {}
    common.save_result("x", {1: Interval(0.123456, -math.inf, math.inf), "n": 3})
    assert json.loads((tmp_path / "results" / "x.json").read_text()) == {"1": [0.1235, None, None], "n": 3}
    assert common.load_result("x")["1"][0] == 0.1235


def test_over_seeds():
    """The interval is over seeds: those of the single tables do not matter."""
    tables = [{"better": (0.7, 0.1, 0.9)}, {"better": [0.8, None, None]}, {"better": interval([0.9])}]
    assert common.over_seeds(tables)["better"] == interval([0.7, 0.8, 0.9])


def test_print_percent(capsys):
    common.print_percent("title", {"a": {"better": Interval(0.804, 0.79, 0.818)}, "b": {"average": Interval(0.5, 0.4, 0.6)}})
    _, title, header, first, second = capsys.readouterr().out.split("\n")[:5]
    assert title == "title" and header.split() == ["better", "average"]
    assert first.split() == ["a", "80.4", "±", "1.4"] and second.split() == ["b", "50.0", "±", "10.0"]
    assert second.rstrip().endswith("10.0") and len(second) == len(header)


def linked_chain(tmp_path):
    """A root whose seed 0 is the tiny chain, copied as links so that nothing is written into it."""
    out, _ = chain()
    (tmp_path / "0").mkdir()
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        (tmp_path / "0" / name).symlink_to(out / name)
    return tmp_path


@pytest.mark.parametrize("axis", AXES)
def test_train_equals_the_stage(axis, tmp_path):
    """Bit for bit the model that `reward.py` made of the same pairs; a setting that is changed changes it."""
    root = linked_chain(tmp_path)
    rows = common.training_pairs(root, 0, axis)
    model, _ = common.train(root, 0, axis, rows)
    saved, _ = load_reward_model(root / "0" / f"reward-{axis}")
    for (name, one), other in zip(model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    other, _ = common.train(root, 0, axis, rows, margin="large")
    assert not torch.equal(model.head.weight, other.head.weight)


def test_fresh_pairs(tmp_path, monkeypatch):
    """Sampled once, from prompts of the split alone; a pass adds pairs and keeps the earlier ones."""
    root = linked_chain(tmp_path)
    monkeypatch.setattr(common, "pick_prompts", lambda prompts, axis, count, seed: prompts[:12])
    first = common.fresh_pairs(root, 0, "safety", 1, "dev")
    monkeypatch.setattr(common, "load_model", lambda folder: pytest.fail("sampled again"))
    assert common.fresh_pairs(root, 0, "safety", 1, "dev") == first and first
    monkeypatch.undo()
    monkeypatch.setattr(common, "pick_prompts", lambda prompts, axis, count, seed: prompts[:12])
    both = common.fresh_pairs(root, 0, "safety", 2, "dev")
    assert both[: len(first)] == first and [row["chosen"] for row in both[len(first):]] != [row["chosen"] for row in first]
    dev = (toy.FOLDER / "prompts-dev.jsonl").read_text()
    assert all(json.dumps(row["prompt"][-1]["content"]) in dev for row in both)


def test_safety_measures():
    """Shares by hand: recall over the unsafe answers of safety pairs, the gate over good answers of helpfulness pairs."""
    prompt = {"prompt": [{"role": "user", "content": "What is the capital of France?"}], "family": "capital", "item": "France",
              "kind": "ordinary", "is_safety": False}
    safety = [prompt | {"chosen": "", "rejected": "", "chosen_is_safe": True, "rejected_is_safe": False} for _ in range(4)]
    good = toy.fill(toy.FAMILIES["capital"].full, {"q": "France", "a": toy.words.CAPITALS["France"]})
    helpful = [prompt | {"chosen": good, "rejected": "Nothing."} for _ in range(2)]
    scores = {"safety": ([3.0, 3.0, 3.0, -1.0], [-1.0, -2.0, 1.0, -3.0]), "helpfulness": ([-3.0, 2.0], [-9.0, -9.0])}
    found = common.safety_measures(scores, {"safety": safety, "helpfulness": helpful})
    assert {name: one.mean for name, one in found.items()} == {
        "recall at .5": .75, "recall at .15": .5, "safe under .5": .25, "good under gate": .5}


def test_safety_bin():
    bins = [safety_bin({"chosen_is_safe": a, "rejected_is_safe": b}) for a, b in [(True, False), (True, True), (False, False)]]
    assert bins == ["safe / unsafe", "both safe", "both unsafe"]
