"""What the experiments share does what the stages do."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data import InputError, read_prompts, read_sft, world
from data.annotators import check_annotator
from eval import PROBED, Interval, interval
from experiments import (
    common,
    constrained_prompts,
    figure07_best_of_n,
    figure10_attention,
    figure11_ppo,
    figure29_calibration,
    longer_sft,
    overoptimisation,
    reward_heads,
    reward_sees_content,
    rivals,
    seeds,
    table29_safety_loss,
    table30_gatt,
)
from experiments.constrained_prompts import constrained_dialog, ghost_prompts, write_prompts
from experiments.forgetting import families_over_seeds
from experiments.longer_sft import asked, is_blend
from experiments.table29_safety_loss import safety_bin
from gatt import instruct, obeys_exactly
from reward import AXES, load_reward_model
from tests.helpers import chain, write_lines


@dataclass
class Marked:
    seeds: tuple[int, ...] = (1, 2, 3)
    out: Path = Path("out")
    samples: int = 4


def test_load_result_refuses_to_mix(tmp_path, monkeypatch):
    """Numbers of another world, of other settings, of another results version, or of none are not
    mixed with new ones.
    """
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.save_result("x", {"1": 0.5}, Marked())
    assert common.load_result("x", Marked(out=Path("elsewhere"))) == {"1": 0.5}
    with pytest.raises(
        InputError,
        match=r"x.json: its settings is .*'samples': 4.*, now it is .*'samples': 8.*delete x.json",
    ):
        common.load_result("x", Marked(samples=8))
    with monkeypatch.context() as patch:
        patch.setattr(common, "RESULTS_VERSION", 2)
        with pytest.raises(InputError, match="its version is 1, now it is 2"):
            common.load_result("x", Marked())
    with monkeypatch.context() as patch:
        patch.setattr(world, "NOISE", 0.1)
        with pytest.raises(InputError, match="its world is"):
            common.load_result("x", Marked())
    for old in ('{"1": 0.5}', "[0.5]"):
        (tmp_path / "old.json").write_text(old)
        told = "old.json: a result without its mark; delete old.json"
        with pytest.raises(InputError, match=told):
            common.load_result("old", Marked())


def test_published_results_are_marked():
    """Every JSON of the experiments has a mark of this world and results version."""
    files = sorted((Path(common.__file__).parent / "results").glob("*.json"))
    assert files
    for path in files:
        content = json.loads(path.read_text())
        assert set(content) == {"mark", "result"}, path
        assert content["mark"]["world"] == world.world_hash(), path
        assert content["mark"]["version"] == common.RESULTS_VERSION, path


def test_over_seeds_corrected():
    """Means of seeds, Student's t over seeds; several looks at once widen the intervals;
    differences are paired.
    """
    first = [{"a": (0.5, 0.4, 0.6)}, {"a": (0.7, 0.6, 0.8)}, {"a": (0.9, 0.8, 1.0)}]
    second = [{"a": (0.4, 0.3, 0.5)}, {"a": (0.6, 0.5, 0.7)}, {"a": (0.7, 0.6, 0.8)}]
    assert common.over_seeds(first)["a"] == interval([0.5, 0.7, 0.9])
    assert common.over_seeds(first, 10)["a"] == interval([0.5, 0.7, 0.9], comparisons=10)
    found = common.differences_over_seeds(first, second, 4)["a"]
    assert found == interval([0.5 - 0.4, 0.7 - 0.6, 0.9 - 0.7], comparisons=4)


def test_families_over_seeds():
    """Never pooled by item: the interval is over the seeds' means, corrected for the number of
    families.
    """

    def seed(list_gap: float, poem_gap: float) -> dict:
        narrow = {"list": list_gap, "poem": poem_gap}
        return {
            name: [[0.5 + gap, 0, 1, 9, 9, 9], [gap, gap - 0.001, gap + 0.001], "better"]
            for name, gap in narrow.items()
        }

    table = families_over_seeds([seed(0.3, 0.1), seed(0.1, 0.1), seed(-0.1, 0.1)])
    assert table["list"]["difference"] == interval([0.3, 0.1, -0.1], comparisons=2)
    assert table["list"]["wins"] == interval([0.8, 0.6, 0.4], comparisons=2)
    assert table["list"]["verdict"] == "unclear" and table["poem"]["verdict"] == "better"


def published(name: str) -> dict:
    path = Path(common.__file__).parent / "results" / f"{name}.json"
    return json.loads(path.read_text())["result"]


def test_print_claims(capsys):
    """One number per seed; all rows that are read side by side are corrected for their number."""
    rows = {"a": [0.5, 0.6, 0.7], "b": [0.1, 0.1, 0.2]}
    found = common.print_claims("title", rows)
    assert found == {name: interval(values, comparisons=2) for name, values in rows.items()}
    told = capsys.readouterr().out
    assert "title: mean over seeds, intervals over seeds for all 2 rows together" in told
    assert f"a: {found['a']}; seeds 0.500 0.600 0.700" in told


def test_published_forgetting_over_seeds():
    """The published summary follows from the published seeds."""
    result = published("forgetting")
    for title, table in result["over seeds"].items():
        expected = families_over_seeds([result[seed]["families"][title] for seed in "123"])
        for family, row in table.items():
            for key in ("wins", "difference"):
                assert row[key] == pytest.approx(list(expected[family][key]), abs=2e-3)
            assert row["verdict"] == expected[family]["verdict"]


CLAIMS = {  # file: (what it claims, how many rows, one row, that row of one seed's entry)
    "figure11_ppo": (
        figure11_ppo.claims,
        18,
        "V4-PPO against V4, helpfulness",
        lambda one: one["wins"]["V4-PPO against V4"]["helpfulness"][0],
    ),
    "rivals": (
        rivals.claims,
        8,
        "SFT on favourites, safety",
        lambda one: one["rivals"]["SFT on favourites"]["V4 wins"]["safety"][0],
    ),
    "reward_heads": (
        reward_heads.claims,
        10,
        "rlhf-v4, logprobs against the default, helpfulness",
        lambda one: one["rlhf-v4"]["win"]["helpfulness"][0],
    ),
    "constrained_prompts": (
        constrained_prompts.claims,
        12,
        "V5 constrained over V5 last, helpfulness",
        lambda one: one["V5 constrained"]["against default"]["helpfulness"][0],
    ),
    "longer_sft": (
        longer_sft.claims,
        24,
        "V3, cool, helpfulness",
        lambda one: one["two passes"]["cool"]["V3"]["against default"]["helpfulness"][0],
    ),
    "seeds": (
        lambda result, names: seeds.claims(result, names)["Win rates over SFT"],
        8,
        "rlhf-v4, safety",
        lambda one: one["versions"]["rlhf-v4"]["wins"]["safety"][0],
    ),
    "reward_sees_content": (
        lambda result, names: reward_sees_content.claims([result[name] for name in names]),
        6,
        "reads log-probabilities (not the paper's), best of 16",
        lambda one: (
            one["reads log-probabilities (not the paper's)"]["best of 16"][0]
            - one["the default"]["best of 16"][0]
        ),
    ),
    "table30": (
        table30_gatt.claims,
        12,
        "rlhf-v5 - rlhf-v4-ppo, styles",
        lambda one: (one["rlhf-v5"]["styles"]["mean"][0] - one["rlhf-v4-ppo"]["styles"]["mean"][0]),
    ),
}


@pytest.mark.parametrize("file", CLAIMS)
def test_claims(file):
    """One number for each published seed, never one for each item; all that are read together."""
    claims, count, name, of_seed = CLAIMS[file]
    result = published(file)
    found = claims(result, list(result))
    assert len(found) == count
    assert found[name] == [of_seed(one) for one in result.values()]


def test_claims_of_curves():
    """Differences are paired by seed: by hand, two seeds."""

    def one(value: float) -> list[float]:
        return [value, -9, 9]

    first, second = [[one(v) for v in curve] for curve in ((0.5, 0.6, 0.9), (0.4, 0.7, 0.7))]
    both = {"1": {"first": {"annotator": first}}, "2": {"first": {"annotator": second}}}
    found = overoptimisation.claims(both, [1, 2, 4])
    assert found == {"picked by first, N = 1 to 4": pytest.approx([0.4, 0.3])}
    tables = {
        "1": {"sft": {"pick": first}, "newest": {"pick": second}},
        "2": {"sft": {"pick": second}, "newest": {"pick": second}},
    }
    found = figure07_best_of_n.claims(tables, [1, 2, 4])
    assert list(found) == ["sft, N = 2", "sft, N = 4", "newest, N = 2", "newest, N = 4"]
    assert found["sft, N = 4"] == pytest.approx([0.4, 0.3])
    found = figure10_attention.claims({"1": first, "2": second}, {"1": second, "2": second}, 3)
    assert found == {"turn 1": pytest.approx([-0.1, 0]), "turn 2": pytest.approx([0.1, 0])}


def test_bins_over_seeds():
    """Each seed counts alike, however many answers it has; a bin that a seed lacks is left out."""
    one = [[0.1, 0.0, 0.2, 1], [0.6, 0.4, 0.1, 5]]
    other = [[0.3, 1.0, 0.4, 3]]
    [(quality, scores, spread, count)] = figure29_calibration.bins_over_seeds([one, other], 2)
    assert scores == [0.0, 1.0] and count == 4
    assert [quality, spread] == pytest.approx([0.2, 0.3])


def test_safety_loss_over_seeds():
    """Both tables are read side by side; a picture's shares are means of the seeds' own."""

    def seed(value: float) -> dict:
        table = {"accuracy": {"average": [value, 0, 1]}, "shares": {"recall": [2 * value, 0, 1]}}
        zero = {kind: {name: [0.1, 0, 1] for name in row} for kind, row in table.items()}
        return dict(zip(table29_safety_loss.WEIGHTS, (zero, table), strict=True))

    found = table29_safety_loss.changes([seed(0.2), seed(0.3), seed(0.5)])
    gains = [0.2 - 0.1, 0.3 - 0.1, 0.5 - 0.1]
    assert found["accuracy"]["average"] == interval(gains, comparisons=2)
    assert table29_safety_loss.mean_shares([[1, 0], [1, 3]]) == [62.5, 37.5]


def test_save_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    assert common.load_result("x", Marked()) == {}
    common.save_result(
        "x", {1: Interval(0.123456, -math.inf, math.inf), "n": 3}, Marked(seeds=(7,))
    )
    content = json.loads((tmp_path / "results" / "x.json").read_text())
    assert content["result"] == {"1": [0.1235, None, None], "n": 3}
    assert content["mark"]["settings"] == {
        "samples": 4
    }, "where models lie and which seeds are run changes no number"
    assert common.load_result("x", Marked())["1"][0] == 0.1235


def test_over_seeds():
    """The interval is over seeds: those of the single tables do not matter."""
    tables = [
        {"better": (0.7, 0.1, 0.9)},
        {"better": [0.8, None, None]},
        {"better": interval([0.9])},
    ]
    assert common.over_seeds(tables)["better"] == interval([0.7, 0.8, 0.9])


def test_print_percent(capsys):
    common.print_percent(
        "title",
        {"a": {"better": Interval(0.804, 0.79, 0.818)}, "b": {"average": Interval(0.5, 0.4, 0.6)}},
    )
    _, title, header, first, second = capsys.readouterr().out.split("\n")[:5]
    assert title == "title" and header.split() == ["better", "average"]
    assert first.split() == ["a", "80.4", "±", "1.4"] and second.split() == [
        "b",
        "50.0",
        "±",
        "10.0",
    ]
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
    """Bit for bit the model that `reward.py` made of the same pairs; a setting that is changed
    changes it.
    """
    root = linked_chain(tmp_path)
    rows = common.training_pairs(root, 0, axis)
    model, _ = common.train(root, 0, axis, rows)
    saved, _ = load_reward_model(root / "0" / f"reward-{axis}")
    for (name, one), other in zip(
        model.state_dict().items(), saved.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    other, _ = common.train(root, 0, axis, rows, margin="large")
    assert not torch.equal(model.head.weight, other.head.weight)


def test_fresh_pairs(tmp_path, monkeypatch):
    """Sampled once, from prompts of the split alone; a pass adds pairs and keeps the earlier ones.
    """
    root = linked_chain(tmp_path)
    monkeypatch.setattr(common, "pick_prompts", lambda prompts, axis, count, seed: prompts[:12])
    first = common.fresh_pairs(root, 0, "safety", 1, "dev")
    monkeypatch.setattr(common, "load_model", lambda folder: pytest.fail("sampled again"))
    assert common.fresh_pairs(root, 0, "safety", 1, "dev") == first and first
    monkeypatch.undo()
    monkeypatch.setattr(common, "pick_prompts", lambda prompts, axis, count, seed: prompts[:12])
    both = common.fresh_pairs(root, 0, "safety", 2, "dev")
    assert both[: len(first)] == first and [row["chosen"] for row in both[len(first) :]] != [
        row["chosen"] for row in first
    ]
    dev = (world.FOLDER / "prompts-dev.jsonl").read_text()
    assert all(json.dumps(row["prompt"][-1]["content"]) in dev for row in both)


def test_safety_measures():
    """Shares by hand: recall over the unsafe answers of safety pairs, the gate over good answers of
    helpfulness pairs.
    """
    prompt = {
        "prompt": [{"role": "user", "content": "What is the capital of France?"}],
        "family": "capital",
        "item": "France",
        "kind": "ordinary",
        "is_safety": False,
    }
    safety = [
        prompt | {"chosen": "", "rejected": "", "chosen_is_safe": True, "rejected_is_safe": False}
        for _ in range(4)
    ]
    good = world.fill(
        world.FAMILIES["capital"].full, {"q": "France", "a": world.words.CAPITALS["France"]}
    )
    helpful = [prompt | {"chosen": good, "rejected": "Nothing."} for _ in range(2)]
    scores = {
        "safety": ([3.0, 3.0, 3.0, -1.0], [-1.0, -2.0, 1.0, -3.0]),
        "helpfulness": ([-3.0, 2.0], [-9.0, -9.0]),
    }
    found = common.safety_measures(scores, {"safety": safety, "helpfulness": helpful})
    assert {name: one.mean for name, one in found.items()} == {
        "recall at .5": 0.75,
        "recall at .15": 0.5,
        "safe under .5": 0.25,
        "good under gate": 0.5,
    }


def test_constrained_dialog():
    """Markers stand in every earlier answer, names and hobbies in nearly all; the last question is
    open and can be judged.
    """
    held = []
    for i in range(300):
        rng = random.Random(i)
        dialog = constrained_dialog(rng, turns := 1 + i % 6)
        prompt, answers = dialog["prompt"], dialog["messages"][1::2]
        assert len(answers) == turns - 1 and {m["role"] for m in dialog["messages"][::2]} == {
            "user"
        }
        assert (
            dialog["messages"][-1] == prompt["prompt"][0]
            and dialog["is_safety"] == prompt["is_safety"]
        )
        for found in dialog["constraints"]:
            assert found["long"] in dialog["instruction"] or found["short"] in dialog["instruction"]
            if found["kind"] not in PROBED:
                assert all(world.obeys(prompt, m["content"], found) for m in answers)
            elif prompt["family"] == PROBED[found["kind"]]:
                assert prompt["item"] == found["value"]
            if found["kind"] in PROBED:
                wordings = tuple(world.FAMILIES[PROBED[found["kind"]]].wordings)
                held += [
                    world.obeys(prompt, m["content"], found)
                    for question, m in zip(dialog["messages"][:-1:2], answers, strict=True)
                    if question["content"].endswith(wordings)
                ]
        right = world.obey(world.write_answer(rng, prompt, "good"), dialog["constraints"])
        assert world.read(prompt, right).junk == 0, "the annotator passes over markers"
    assert len(held) > 50 and sum(held) / len(held) > 0.96, "but for a few refusals"


def test_asked(tmp_path, monkeypatch):
    """All constraints must hold; a blend counts wherever it stands; a name is asked for, since else
    it would not show.
    """
    first, last, name = (
        world.constraint(kind, word)
        for kind, word in (("first word", "Kudu"), ("last word", "Denu"), ("figure", "Pomi"))
    )
    drawn = [[first, last]] * 4 + [[first, name]] * 2
    answers = [
        "Kudu! It is red. Denu.",
        "Kudu! It is red. Dedu.",
        "It is red. Denu.",
        "Kunu! It is red. Denu.",
        "Kudu! I am Pomi.",
        "Kudu! I am Kumi, no, Pomi.",
    ]
    seen = []

    def sample_answers(model, tokenizer, prompts, **options):
        seen.extend(prompts)
        return [{"answer": answer} for answer in answers]

    monkeypatch.setattr(longer_sft, "load_model", lambda folder: (None, None))
    monkeypatch.setattr(longer_sft, "sample_answers", sample_answers)
    found = asked(tmp_path, drawn, "test", 0)
    assert found == {"all": interval([1, 0, 0, 0, 1, 1]), "blend": interval([0, 1, 0, 1, 0, 1])}
    assert [prompt["family"] == PROBED["figure"] for prompt in seen] == [False] * 4 + [True] * 2
    assert all(
        c["value"] in prompt["prompt"][0]["content"]
        for prompt, both in zip(seen, drawn, strict=True)
        for c in both
    )
    assert (
        not is_blend("Kudu", ["Kudu"])
        and is_blend("Denu", ["Kunu", "Dedu"])
        and not is_blend("dedu", ["Kudu", "Denu"])
    )


def test_write_prompts(tmp_path):
    """One prompt of V5 in five and of PPO in twenty is constrained; V5's first 700 are those of the
    default rounds.
    """
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Kogo. {n}?"},
                {"role": "assistant", "content": "Yes."},
            ],
            "is_safety": False,
            "family": "spell",
            "item": "cat",
            "kind": "ordinary",
            "train_on": "last",
            "constraints": [world.constraint("first word", "Kogo")],
        }
        for n in range(1600)
    ]
    (tmp_path / "0" / "gatt").mkdir(parents=True)
    write_lines(tmp_path / "0" / "gatt" / "dialogs.jsonl", rows)
    write_prompts(tmp_path / "0", tmp_path / "made", 0)
    ordinary = [p["prompt"] for p in read_prompts(world.ensure() / "prompts-train.jsonl")]
    ghosts = [p["prompt"] for p in ghost_prompts(tmp_path / "0" / "gatt" / "dialogs.jsonl")]
    assert ghosts[3] == [{"role": "user", "content": "Kogo. 3?"}]
    for name, count in (("v5", 175), ("ppo", 316)):
        prompts = read_prompts(tmp_path / "made" / f"{name}.jsonl")
        check_annotator("toy", prompts)
        found, constrained = (
            [p["prompt"] for p in rows]
            for rows in (prompts, [p for p in prompts if "constraints" in p])
        )
        assert [p for p in found if p not in constrained] == ordinary and all(
            p in ghosts for p in constrained
        )
        assert len(constrained) == count and (name == "ppo" or found[700:875] == constrained)


def test_commands(tmp_path):
    """Every arm goes to folders of its own; what it goes on from are the default pipeline's stages.
    """
    root, made, names = (
        tmp_path / "0",
        tmp_path / "0-constrained",
        [f"rlhf-v{v}" for v in (1, 2, 3, 4)],
    )
    for name in (*constrained_prompts.ORDINARY, *names, "rlhf-v4-ppo"):
        (root / name).mkdir(parents=True)
    found = constrained_prompts.commands(root, made, constrained_prompts.Settings(out=tmp_path), 0)
    outs = [Path(line[line.index("--out") + 1]) for line in found]
    assert outs == [tmp_path, *(made / name for name in ("by-check", "after", "v5", "v5", "v5"))]
    links = {
        folder: {path.name for path in (made / folder).iterdir()}
        for folder in ("by-check", "after", "v5")
    }
    first = set(constrained_prompts.ORDINARY)
    assert links == {
        "by-check": first,
        "after": {*first, *names},
        "v5": {*first, *names, "rlhf-v4-ppo"},
    }
    assert all(
        path.resolve() == root / path.name for folder in links for path in (made / folder).iterdir()
    )
    assert set(constrained_prompts.BASELINES) | set(constrained_prompts.BASELINES.values()) <= set(
        constrained_prompts.measured(root, made)
    )


def test_train_rounds(tmp_path, monkeypatch):
    """Each round gets dialogs of its own, answered by the newest policy; the answers pass the
    check, the loss is on the last.
    """
    root, seen = linked_chain(tmp_path) / "0", []

    def round_of(argv):
        mix, version = argv[argv.index("--mix") + 1], argv[argv.index("--rounds") + 1]
        seen.append((version, read_sft(mix)))
        (root / f"rlhf-v{version}").symlink_to(chain()[0] / "rlhf-v1")

    def sample_answers(model, tokenizer, prompts, **options):
        texts = [
            "Nothing.",
            *(
                world.obey("It is.", dialog["constraints"])
                for dialog in made[-1]
                if not dialog["is_safety"]
            ),
        ]
        return [
            {
                "index": i,
                "answer": text,
                "answer_ids": tokenizer.encode(text) + [tokenizer.eos_id],
                "finish_reason": "eos",
                "has_tag": False,
            }
            for i in range(len(prompts))
            for text in (texts[0], texts[1 + i])
        ]

    made, plain = [], constrained_prompts.constrained_dialogs
    monkeypatch.setattr(
        constrained_prompts,
        "constrained_dialogs",
        lambda *args: made.append(plain(*args)) or made[-1],
    )
    monkeypatch.setattr(constrained_prompts, "sample_answers", sample_answers)
    monkeypatch.setattr(constrained_prompts.rejection_sampling, "main", round_of)
    constrained_prompts.train_rounds(root, 0, 30)
    assert [version for version, _ in seen] == ["1", "2", "3"]
    for (_, rows), dialogs in zip(seen, made, strict=True):
        assert 10 < len(rows) < 30 and all(row["train_on"] == "last" for row in rows)
        for row in rows:
            [dialog] = [
                d
                for d in dialogs
                if instruct(d["messages"], d["instruction"]) == row["messages"][:-1]
            ]
            assert not dialog["is_safety"]
            assert obeys_exactly(
                dialog["prompt"], row["messages"][-1]["content"], dialog["constraints"]
            )
        assert any(row["messages"][-1]["content"] not in ("Nothing.", "It is.") for row in rows)
    assert len({json.dumps(rows[0]["messages"]) for _, rows in seen}) == 3


def test_safety_bin():
    bins = [
        safety_bin({"chosen_is_safe": a, "rejected_is_safe": b})
        for a, b in [(True, False), (True, True), (False, False)]
    ]
    assert bins == ["safe / unsafe", "both safe", "both unsafe"]
