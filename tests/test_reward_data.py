"""Preferences from files, mixes, cross-validation and its baselines, and the scores that a student
asks for.
"""

import gzip
import json
import re
from collections import Counter

import pytest
import torch

import reward
import runtime
from data import InputError, encode_dialog, read_preferences, world
from data.preferences import (
    bag_of_words,
    baselines,
    drop_oldest_turns,
    drop_unsafe_choices,
    folds_by_prompt,
    has_safety_labels,
    hold_out_by_prompt,
    is_hh_rlhf,
    mix_pairs,
    parse_hh_rlhf,
    print_cross_validation,
    read_answers,
    read_pairs,
)
from reward import score_dialogs
from runtime import newest_reward_models, terminal
from tests.helpers import (
    TINY,
    assistant,
    chain,
    run_quietly,
    system,
    toy_tokenizer,
    user,
    write_lines,
)

HEAD = "\n\nHuman: Hi there\n\nAssistant: Hello!\n\nHuman: How do I bake\n\nbread?"
CHOSEN, REJECTED = (
    HEAD + "\n\nAssistant: Mix flour.\n\n1. Knead it.",
    HEAD + "\n\nAssistant: No idea. ",
)


def pair(text: str = "Hi", chosen: str = "Hello!", rejected: str = "What?", **fields) -> dict:
    return {"prompt": [user(text)], "chosen": chosen, "rejected": rejected, **fields}


def hh(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        side: f"\n\nHuman: {prompt}\n\nAssistant: {answer}"
        for side, answer in (("chosen", chosen), ("rejected", rejected))
    }


# ---- HH-RLHF ----


def test_parse_hh_rlhf():
    """The prompt is all before the last "Assistant:"; blank lines inside a turn belong to it."""
    row, reason = parse_hh_rlhf(CHOSEN, REJECTED)
    assert reason == "" and row == {
        "prompt": [user("Hi there"), assistant("Hello!"), user("How do I bake\n\nbread?")],
        "chosen": "Mix flour.\n\n1. Knead it.",
        "rejected": "No idea.",
    }


@pytest.mark.parametrize(
    "chosen, rejected, told",
    [
        (CHOSEN, REJECTED.replace("Hi", "Ho"), "different prompts"),
        (CHOSEN, HEAD.split("\n\nHuman: How")[0], "different prompts"),
        (CHOSEN, HEAD + "\n\nAssistant:", "an empty turn"),
        (CHOSEN.replace("Hello!", ""), REJECTED.replace("Hello!", " "), "different prompts"),
        (CHOSEN.replace("Hello!", ""), REJECTED.replace("Hello!", ""), "an empty turn"),
        (CHOSEN, CHOSEN + "  ", "equal answers"),
        (CHOSEN + " [/INST]", REJECTED, "a tag of the chat format"),
        (
            CHOSEN.replace("bake", "<<SYS>>"),
            REJECTED.replace("bake", "<<SYS>>"),
            "a tag of the chat format",
        ),
        (CHOSEN + "\n\nHuman: Thanks", REJECTED + "\n\nHuman: Thanks", "turns do not alternate"),
        (
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: d",
            "turns do not alternate",
        ),
        (
            "\n\nAssistant: a\n\nHuman: b\n\nAssistant: c",
            "\n\nAssistant: a\n\nHuman: b\n\nAssistant: d",
            "turns do not alternate",
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: d",
            "turns do not alternate",
        ),
        (
            "Note\n\nHuman: a\n\nAssistant: b",
            "Note\n\nHuman: a\n\nAssistant: c",
            "turns do not alternate",
        ),
        ("\n\nAssistant: a", "\n\nAssistant: b", "turns do not alternate"),
    ],
)
def test_parse_hh_rlhf_cannot_use(chosen, rejected, told):
    assert parse_hh_rlhf(chosen, rejected) == (None, told)


def test_is_hh_rlhf():
    assert is_hh_rlhf({"chosen": CHOSEN, "rejected": REJECTED}) and is_hh_rlhf({"chosen": CHOSEN})
    assert (
        not is_hh_rlhf(pair())
        and not is_hh_rlhf(pair(chosen=CHOSEN))
        and not is_hh_rlhf({"chosen": "a", "rejected": "b"})
    )


def test_drop_oldest_turns():
    """Whole turns go, the oldest first, and only as many as must."""
    turns = [
        message
        for k in range(4)
        for message in (user(f"question {k} " * 5), assistant(f"answer {k}"))
    ]
    row = {"prompt": [*turns, user("last")], "chosen": "short", "rejected": "a longer answer " * 3}

    def length(prompt, side):
        return len(encode_dialog(toy_tokenizer(), [*prompt, assistant(row[side])]).ids)

    for dropped in range(5):
        kept = row["prompt"][2 * dropped :]
        longest = max(length(kept, "chosen"), length(kept, "rejected"))
        assert drop_oldest_turns(toy_tokenizer(), row, longest) == row | {"prompt": kept}
    assert drop_oldest_turns(toy_tokenizer(), row, longest - 1) is None
    assert length(kept, "chosen") <= longest - 1, "the longer of the two answers decides"


def test_read_pairs(tmp_path, capsys):
    """Both formats, plain or packed, several files; what was left out is told by reason."""
    many = "\n\nAssistant: yes\n\nHuman: ".join(f"question number {k} is this" for k in range(30))
    rows = [
        hh("Hi", "Hello!", "What?"),
        hh("Hi", "Same", "Same"),
        hh("Hi", "a", ""),
        hh(many, "yes", "no"),
        hh("word " * 400, "yes", "no"),
    ]
    packed = tmp_path / "hh.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    ours = write_lines(tmp_path / "ours.jsonl", [pair("Hey " * 200, rating="better")])
    found = read_pairs(f"{packed},{ours}", "helpfulness", toy_tokenizer(), 100)
    assert [row["chosen"] for row in found] == ["Hello!", "yes", "Hello!"]
    assert found[0] == pair() | {"where": f"{packed}, line 1"}
    assert (
        found[1]["prompt"][-1] == user("question number 29 is this")
        and 1 < len(found[1]["prompt"]) < 59
    )
    assert found[2] == read_preferences(ours)[0], "our own rows are never shortened"
    assert capsys.readouterr().out.splitlines() == [
        (
            f"{packed}: 2 pairs; left out: an empty turn 1; left out: equal answers 1; left out:"
            " the last turn is too long 1; shortened: oldest turns dropped 1"
        ),
        f"{ours}: 1 pairs",
    ]


@pytest.mark.parametrize(
    "lines, told",
    [
        ([hh("Hi", "a", "b"), "{"], "line 2: not JSON"),
        ([hh("Hi", "a", "b"), {"chosen": "x"}], "line 2: field 'rejected' is missing"),
        ([hh("Hi", "a", "b"), {"chosen": CHOSEN, "rejected": 3}], "line 2: field 'rejected' is 3"),
        ([hh("Hi", "a", "a")], "no pair can be used .*equal answers"),
        ([{"chosen": "a", "rejected": "b"}], "line 1: field 'prompt' is missing"),
        ([pair(), hh("Hi", "a", "b")], "line 2: field 'prompt' is missing"),
        ([pair(rating="great")], "line 1: field 'rating' is 'great'"),
    ],
)
def test_read_pairs_refuses(lines, told, tmp_path):
    with pytest.raises(InputError, match=told):
        read_pairs(
            str(write_lines(tmp_path / "pairs.jsonl", lines)), "helpfulness", toy_tokenizer(), 100
        )


def test_read_pairs_of_the_real_file(assets):
    """All 2,312 pairs are accounted for; what is kept is what the text says."""
    path = assets / "preferences" / "hh_rlhf_harmless_base_test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    lines = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")][:400]
    reasons, kept = Counter(), 0
    for line in lines:
        row, reason = parse_hh_rlhf(line["chosen"], line["rejected"])
        reasons[reason] += 1
        if row:
            kept += 1
            for side in ("chosen", "rejected"):
                names = {"user": "Human", "assistant": "Assistant"}
                text = "".join(
                    f"{names[m['role']]}: {m['content']} "
                    for m in [*row["prompt"], assistant(row[side])]
                )
                assert text.split() == line[side].split()
    assert kept == reasons[""] > 390 and sum(reasons.values()) == 400


# ---- bins and mixes ----


def test_drop_unsafe_choices():
    """Of the paper's bins three stay; a pair is dropped only where both labels say so."""
    labels = [
        (True, False),
        (True, True),
        (False, False),
        (False, True),
        (False, None),
        (None, True),
        (None, None),
    ]
    rows = [
        pair(
            n=n,
            **{
                f"{side}_is_safe": safe
                for side, safe in zip(("chosen", "rejected"), both, strict=True)
                if safe is not None
            },
        )
        for n, both in enumerate(labels)
    ]
    assert [row["n"] for row in drop_unsafe_choices(rows)] == [0, 1, 2, 4, 5, 6]


def test_read_pairs_leaves_out_unsafe_choices(tmp_path, capsys):
    """For the safety model only: such pairs are what helpfulness looks like."""
    rows = [
        pair(chosen_is_safe=False, rejected_is_safe=True),
        pair(chosen_is_safe=True, rejected_is_safe=False),
    ]
    path = str(write_lines(tmp_path / "pairs.jsonl", rows))
    assert len(read_pairs(path, "helpfulness", toy_tokenizer(), 100)) == 2
    [row] = read_pairs(path, "safety", toy_tokenizer(), 100)
    assert (
        row["chosen_is_safe"]
        and "left out: chosen unsafe, the other safe 1" in capsys.readouterr().out
    )


def test_has_safety_labels(tmp_path):
    assert has_safety_labels(write_lines(tmp_path / "a", [pair(), pair(rejected_is_safe=False)]))
    assert not has_safety_labels(write_lines(tmp_path / "b", [pair(chosen_is_safe=None), pair()]))


@pytest.mark.parametrize("share, taken", [(0.0, 0), (0.1, 10), (0.5, 90), (0.9, 200)])
def test_mix_pairs(share, taken):
    own, rest = [{"own": i} for i in range(90)], [{"rest": i} for i in range(200)]
    mixed = mix_pairs(own, rest, share, seed=3)
    assert (
        mixed[:90] == own and len({row["rest"] for row in mixed[90:]}) == len(mixed) - 90 == taken
    )
    assert share == 0.9 or taken / len(mixed) == share
    assert mixed == mix_pairs(own, rest, share, 3) and (
        not taken or mixed != mix_pairs(own, rest, share, 4)
    )
    assert len(own) == 90 and mix_pairs(own, [], share, 0) == own


# ---- cross-validation ----


def test_folds_by_prompt():
    rows = [pair(f"prompt {i % 23}", n=i) for i in range(60)]
    folds = folds_by_prompt(rows, 5, 0)
    assert len(folds) == 5 and sorted(row["n"] for _, test in folds for row in test) == list(
        range(60)
    )
    for train, test in folds:
        assert sorted(row["n"] for row in train + test) == list(range(60))
        assert not {row["prompt"][0]["content"] for row in train} & {
            row["prompt"][0]["content"] for row in test
        }
        assert 4 * 2 <= len(test) <= 5 * 3
    assert folds == folds_by_prompt(rows, 5, 0) != folds_by_prompt(rows, 5, 1)
    assert folds_by_prompt(rows, 0, 0) == []
    with pytest.raises(InputError, match="--folds 5: the pairs have only 4 different prompts"):
        folds_by_prompt([row for row in rows if row["n"] % 23 < 4], 5, 0)


def test_bag_of_words():
    """One word that decides: by symmetry its weight solves decay w = sigmoid(-w); unknown words
    count nothing.
    """
    train = [pair(chosen="good", rejected="Dull"), pair(chosen="GOOD", rejected="dull")]
    test = [
        pair(chosen="dull", rejected="good"),
        pair(chosen="Good, good", rejected="new words"),
        pair(chosen="x", rejected="y"),
    ]
    w = torch.linspace(0, 5, 500001, dtype=torch.float64)
    # both words: weights w and -w
    best = w[(-torch.nn.functional.logsigmoid(2 * w) + 0.1 * w**2).argmin()].item()
    found = bag_of_words(train, test, decay=0.1)
    assert found.tolist() == pytest.approx([-2 * best, 2 * best, 0], abs=2e-3)


def test_bag_of_words_learns_what_is_said():
    rows = [
        pair(f"prompt {i}", "please do " + "a b c d"[: i % 7], "never do " + "e f g h"[: i % 5])
        for i in range(60)
    ]
    assert (bag_of_words(rows[:40], rows[40:]) > 0).all()
    swapped = [pair(chosen=row["rejected"], rejected=row["chosen"]) for row in rows]
    assert torch.allclose(
        bag_of_words(rows[:40], rows[40:]), bag_of_words(swapped[:40], rows[40:]).neg(), atol=1e-3
    )


def test_baselines():
    train = [pair(chosen="good", rejected="dull")]
    found = baselines(
        train, [pair(chosen="good dog", rejected="dull"), pair(chosen="a", rejected="bcd"), pair()]
    )
    assert found["longer answer"].tolist() == [4, -2, 1] and found["shorter answer"].tolist() == [
        -4,
        2,
        -1,
    ]
    assert (found["bag of words"] > 0).tolist() == [True, False, False]


def test_print_cross_validation(capsys):
    """Pairs of all folds count alike, ties half; 3 of 4 right: .75 ± 1.96 · .5 / 2."""
    folds = [
        {"m": torch.tensor([1.0, 2.0, -1.0]), "tie": torch.zeros(3)},
        {"m": torch.tensor([0.1]), "tie": torch.zeros(1)},
    ]
    table = print_cross_validation(folds)
    assert table == {
        "m": {"accuracy": 0.75, "low": 0.26, "high": 1.24},
        "tie": {"accuracy": 0.5, "low": 0.5, "high": 0.5},
    }
    assert re.search(
        r"2-fold .*\n  m +0\.750   0\.260 to 1\.240   4 pairs", capsys.readouterr().out
    )


def hh_file(tmp_path, n=40):
    rows = [
        hh(
            f"Tell me about thing {i}",
            "Yes, gladly, it is " + "very " * (i % 3) + "good.",
            "No." + " Go now." * (i % 4),
        )
        for i in range(n)
    ]
    return write_lines(tmp_path / "hh.jsonl", [*rows, hh("Hi", "same", "same")])


def test_main_from_scratch_on_hh_rlhf(tmp_path):
    """The one command: five folds beside the baselines, then a model of all pairs, which can be
    asked.
    """
    argv = (
        *TINY,
        "--out",
        tmp_path / "out",
        "--data",
        hh_file(tmp_path),
        "--init",
        "none",
        "--epochs",
        4,
        "--learning-rate",
        4e-3,
        "--batch-tokens",
        500,
    )
    printed = run_quietly(reward.main, *argv)
    folder = tmp_path / "out" / "reward-helpfulness"
    assert "40 pairs; left out: equal answers 1" in printed and "5-fold cross-validation" in printed
    assert not (tmp_path / "out" / "reward-safety").exists() and runtime.is_finished(folder)
    record = json.loads((folder / "stage.json").read_text())
    assert record["settings"]["folds"] == 5 and set(record["inputs"]) == {"data"}
    assert (
        record["results"]["reward model"]["accuracy"]
        == record["results"]["bag of words"]["accuracy"]
        == 1
    )
    assert set(record["results"]) > {
        "longer answer",
        "shorter answer",
        "reward model",
        "bag of words",
    }
    counts = Counter(
        json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    )
    assert set(counts) == {"helpfulness", *(f"helpfulness-fold-{k}" for k in range(5))}
    assert not list(folder.glob("checkpoint*")), "nothing unfinished is left"
    printed = run_quietly(
        reward.main,
        "--out",
        tmp_path / "out",
        "--score",
        tmp_path / "pairs.jsonl" if write_lines(tmp_path / "pairs.jsonl", [pair()]) else "",
    )
    assert "helpfulness" in printed and "safety" not in printed and "chosen: 'Hello!'" in printed


def test_main_learns_other_pairs_than_it_is_judged_on(tmp_path, monkeypatch):
    """No fold's model saw a pair that it is judged on, and each starts anew from the same weights.
    """
    seen, starts = [], []

    def train(model, tokenizer, rows, *, phase, **options):
        seen.append((phase, [row["prompt"][-1]["content"] for row in rows]))
        starts.append(
            model.head.weight.sum().item() + model.body.tok_embeddings.weight.sum().item()
        )
        with torch.no_grad():
            model.body.tok_embeddings.weight.add_(1.0)

    judged = []
    monkeypatch.setattr(reward, "train_reward_model", train)
    score_pairs = reward.score_pairs
    monkeypatch.setattr(
        reward,
        "score_pairs",
        lambda model, tokenizer, rows: (
            judged.append([row["prompt"][-1]["content"] for row in rows]),
            score_pairs(model, tokenizer, rows),
        )[1],
    )
    run_quietly(
        reward.main,
        *TINY,
        "--out",
        tmp_path / "out",
        "--data",
        hh_file(tmp_path, 15),
        "--init",
        "none",
        "--folds",
        3,
    )
    assert [phase for phase, _ in seen] == [f"helpfulness-fold-{k}" for k in range(3)] + [
        "helpfulness"
    ]
    assert len(set(starts)) == 1 and len(judged) == 3
    for (_, train_), test in zip(seen[:3], judged, strict=True):
        assert not set(train_) & set(test) and len(train_) + len(test) == 15
    assert len(seen[3][1]) == 15


@pytest.mark.parametrize(
    "argv, told",
    [
        (("--init", "none"), "need preferences: --data"),
        (("--folds", 5), "need preferences: --data"),
        (("--data", "x.jsonl", "--folds", 1), "2 or more"),
        (("--mix-share", "0.5"), "two shares"),
        (("--mix-share", "0.5,1"), "two shares below 1"),
        (("--extra", "x.jsonl", "--mix-share", "0,0"), "more than 0 where --extra is used"),
        (("--data", "x.jsonl", "--init", "none"), "x.jsonl"),
        (("--score", "x.jsonl"), "reward-helpfulness is missing; `python reward.py` makes it"),
    ],
)
def test_main_refuses(argv, told, tmp_path):
    with pytest.raises(InputError, match=told):
        run_quietly(reward.main, *TINY, "--out", tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_main_mixes(tmp_path, monkeypatch):
    """Each axis draws its own share from --extra, after its own pairs; the safety model never
    learns unsafe choices.
    """
    learned = {}
    monkeypatch.setattr(
        reward,
        "train_reward_model",
        lambda model, tokenizer, rows, *, phase, **options: learned.update({phase: rows}),
    )
    own = write_lines(
        tmp_path / "own.jsonl",
        [pair(f"own {i}", chosen_is_safe=True, rejected_is_safe=False) for i in range(20)],
    )
    rest = write_lines(
        tmp_path / "rest.jsonl",
        [pair(f"rest {i}", chosen_is_safe=i > 9, rejected_is_safe=True) for i in range(40)],
    )
    run_quietly(
        reward.main,
        *TINY,
        "--out",
        tmp_path,
        "--init",
        chain()[0] / "sft",
        "--data",
        own,
        "--extra",
        rest,
        "--mix-share",
        "0.5,0.1",
    )
    sources = {
        axis: Counter(row["prompt"][0]["content"].split()[0] for row in rows)
        for axis, rows in learned.items()
    }
    assert sources == {"helpfulness": {"own": 18, "rest": 18}, "safety": {"own": 18, "rest": 2}}
    assert all(row["prompt"][0]["content"].startswith("own") for row in learned["safety"][:18])
    assert not any(row["chosen_is_safe"] is False for row in learned["safety"])
    assert set(json.loads((tmp_path / "reward-safety" / "stage.json").read_text())["inputs"]) == {
        "init",
        "data",
        f"extra {rest}",
    }


# ---- score, --try ----


def test_newest_reward_models(tmp_path):
    def make(folder, *axes):
        for axis in axes:
            (tmp_path / folder / f"reward-{axis}").mkdir(parents=True)
            (tmp_path / folder / f"reward-{axis}" / "reward_head.pth").touch()

    def finish(folder):
        record = {"settings": {}, "inputs": {}, "finished": True}
        (tmp_path / folder / "stage.json").write_text(json.dumps(record))

    make("", "helpfulness")
    with pytest.raises(InputError, match="reward-safety is missing; `python reward.py` makes it"):
        newest_reward_models(tmp_path)
    assert newest_reward_models(tmp_path, axes=("helpfulness",)) == {
        "helpfulness": tmp_path / "reward-helpfulness"
    }
    make("", "safety")
    make("rlhf-v11", "helpfulness")  # killed before its second one was done
    (tmp_path / "rlhf-v12").mkdir()  # annotator none: none refreshed
    finish("rlhf-v12")
    assert newest_reward_models(tmp_path) == {
        axis: tmp_path / f"reward-{axis}" for axis in reward.AXES
    }
    make("rlhf-v9", *reward.AXES)
    make("rlhf-v10", *reward.AXES)
    make("rlhf-v10-ppo", *reward.AXES)
    for folder in ("rlhf-v9", "rlhf-v10", "rlhf-v10-ppo"):
        finish(folder)
    assert newest_reward_models(tmp_path) == {
        axis: tmp_path / "rlhf-v10" / f"reward-{axis}" for axis in reward.AXES
    }
    for folder in ("rlhf-v4", "rlhf-v4-ppo"):
        make(folder, *reward.AXES)
        finish(folder)
    assert newest_reward_models(tmp_path) == {
        axis: tmp_path / "rlhf-v10" / f"reward-{axis}" for axis in reward.AXES
    }
    for folder in ("rlhf-v9", "rlhf-v10"):
        (tmp_path / folder / "stage.json").unlink()
    assert (
        newest_reward_models(tmp_path)["safety"] == tmp_path / "rlhf-v4-ppo" / "reward-safety"
    ), "refreshed before PPO"
    rounds = [tmp_path / "rlhf-v9", tmp_path / "rlhf-v11"]
    assert newest_reward_models(tmp_path, rounds) == {
        "helpfulness": rounds[1] / "reward-helpfulness",
        "safety": rounds[0] / "reward-safety",
    }, "axis by axis"


def test_hold_out_by_prompt():
    """Several comparisons of a prompt stay together, the prompts are drawn from the whole file, by
    the seed.
    """
    rows = [pair(f"question {i // 3}", chosen=str(i)) for i in range(90)]
    train, held_out = hold_out_by_prompt(rows, seed=0)
    prompts = [{row["prompt"][0]["content"] for row in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1], "no held-out pair's prompt was trained on"
    assert len(prompts[1]) == 3 and len(held_out) == 9 and len(train) == 81
    assert prompts[1] != {f"question {i}" for i in range(3)}, "not the file's first tenth"
    assert [int(row["chosen"]) for row in train] == sorted(
        int(row["chosen"]) for row in train
    ), "in the file's order"
    assert hold_out_by_prompt(rows, seed=0) == (train, held_out) != hold_out_by_prompt(rows, seed=1)
    assert hold_out_by_prompt(rows[:27], seed=0) == (rows[:27], []), "nine prompts: nothing"


def test_main_holds_out_by_prompt(tmp_path, monkeypatch):
    """`--data`: no prompt of a held-out pair is trained on, not even by what `--extra` mixes in;
    folds neither.
    """
    rows = [
        pair(f"What is {i // 2} plus 1?", f"It is {i // 2 + 1}.", "It is 3." if i % 2 else "No.")
        for i in range(60)
    ]
    data, extra = write_lines(tmp_path / "mine.jsonl", rows), write_lines(
        tmp_path / "extra.jsonl", rows[::-1]
    )
    trained, held = [], []

    def prompts_of(pairs: list[dict]) -> set[str]:
        return {row["prompt"][0]["content"] for row in pairs}

    def train(model, tokenizer, pairs, **options):
        trained.append(prompts_of(pairs))

    monkeypatch.setattr(reward, "train_reward_model", train)
    monkeypatch.setattr(
        reward, "report", lambda model, tokenizer, pairs, axis: held.append(prompts_of(pairs)) or {}
    )
    common = (
        *TINY,
        "--data",
        data,
        "--extra",
        extra,
        "--mix-share",
        "0.5,0.5",
        "--init",
        chain()[0] / "sft",
    )
    run_quietly(reward.main, *common, "--out", tmp_path / "out")
    assert len(held[0]) == 3 and len(trained[0]) == 27 and not held[0] & trained[0]
    scored = []
    monkeypatch.setattr(
        reward,
        "score_pairs",
        lambda model, tokenizer, pairs: scored.append(prompts_of(pairs))
        or (torch.zeros(len(pairs)), torch.zeros(len(pairs))),
    )
    trained.clear()
    run_quietly(reward.main, *common, "--out", tmp_path / "folds", "--folds", 3)
    assert len(trained) == 4 and len(scored) == 3
    for seen, test in zip(trained, scored, strict=False):
        assert test and not seen & test


def test_score_dialogs():
    """Both scores, the gate, and one model alone.

    A score near 0 is a sum of terms near 1, so its float32 error is absolute. The kernel depends on
    the place in the batch and on the batch's size: even two equal rows of one batch may differ in
    the last bits.
    """

    def close(values: tuple[float, float]):
        return pytest.approx(values, abs=1e-5)

    out, _ = chain()
    models = {axis: reward.load_reward_model(out / f"reward-{axis}") for axis in reward.AXES}
    dialogs = [
        {"prompt": [user("Hi")], "answer": "Hello!", "is_safety": tagged}
        for tagged in (False, True)
    ]
    plain, tagged = score_dialogs(models, dialogs)
    for axis, (model, tokenizer) in models.items():
        [expected] = reward.score(
            model, [encode_dialog(tokenizer, [user("Hi"), assistant("Hello!")]).ids]
        ).tolist()
        expected = close((expected, 1 / (1 + 2.718281828**-expected)))
        assert plain[axis] == expected and tagged[axis] == expected
    assert tagged["reward"] == tagged["safety"] and plain["answer"] == "Hello!"
    gated = plain["safety"][1] < 0.15
    assert plain["reward"] == plain["safety" if gated else "helpfulness"]
    [alone] = score_dialogs({"safety": models["safety"]}, dialogs[:1])
    assert alone["safety"] == close(plain["safety"]) and "reward" not in alone
    with pytest.raises(InputError, match="f, line 3: .*tag"):
        score_dialogs(models, [dialogs[0] | {"answer": "[INST]", "where": "f, line 3"}])


def test_read_answers(tmp_path):
    rows = [
        {
            "messages": [
                system("Be brief."),
                user("Hi"),
                assistant("Yo"),
                user("And?"),
                assistant("Bye"),
            ]
        },
        {"prompt": [user("Hi")], "answer": "Hello!", "is_safety": True},
        pair(),
        {"messages": [user("a"), assistant("b")], "chosen": "x", "rejected": "y"},
    ]
    found = read_answers(write_lines(tmp_path / "rows.jsonl", rows))
    assert [
        (row["which"], row["answer"], len(row["prompt"]), row["is_safety"]) for row in found
    ] == [
        ("answer", "Bye", 4, False),
        ("answer", "Hello!", 1, True),
        ("chosen", "Hello!", 1, False),
        ("rejected", "What?", 1, False),
        ("answer", "b", 1, False),
    ]
    assert found[3]["where"].endswith("rows.jsonl, line 3")


@pytest.mark.parametrize(
    "row, told",
    [
        ({"messages": [user("Hi")]}, "the answer is missing"),
        ({"messages": "Hi"}, "must be a list"),
        ({"prompt": [user("Hi")]}, "wanted are the fields 'messages', or .* this row has prompt"),
        ({"answer": "Hi"}, "wanted are the fields"),
        ({}, "this row has none"),
        ({"prompt": "Hi", "answer": "a"}, "field 'prompt' must be a list"),
        ({"prompt": [user("Hi")], "answer": " "}, "field 'answer' is empty"),
        ({"prompt": [user("Hi")], "answer": 3}, "field 'answer' is 3"),
        ({"prompt": [user("Hi")], "chosen": "a"}, "wanted are the fields"),
        (pair(is_safety="no"), "field 'is_safety' is \"no\""),
    ],
)
def test_read_answers_refuses(row, told, tmp_path):
    with pytest.raises(InputError, match="rows.jsonl, line 2: .*" + told):
        read_answers(write_lines(tmp_path / "rows.jsonl", [pair(), row]))


def toy_prompt(kind: str) -> dict:
    world.ensure()
    lines = (world.FOLDER / "prompts-dev.jsonl").read_text().splitlines()
    return next(row for row in map(json.loads, lines) if row["kind"] == kind)


def test_add_annotator():
    unsafe = toy_prompt("unsafe")
    refusal, other = terminal.add_annotator(
        [
            {"prompt": unsafe["prompt"], "answer": "I am sorry. I cannot help with that."},
            {"prompt": [user("Who won?")], "answer": "Me."},
        ]
    )
    assert refusal["is_safety"] and refusal["family"] == unsafe["family"]
    assert refusal["annotator"] == (
        world.helpfulness(unsafe, refusal["answer"]),
        world.safety(unsafe, refusal["answer"]),
    )
    assert other == {"prompt": [user("Who won?")], "answer": "Me."}
    [longer] = terminal.add_annotator(
        [{"prompt": [system("x"), *unsafe["prompt"]], "answer": "No."}]
    )
    assert "annotator" not in longer


def test_score(tmp_path):
    """`--score`: both scores as logit and sigmoid, of what every row says."""
    out, _ = chain()
    unsafe = toy_prompt("unsafe")["prompt"]
    path = write_lines(tmp_path / "rows.jsonl", [pair(), {"prompt": unsafe, "answer": "No."}])
    printed = run_quietly(reward.main, "--out", out, "--score", path)
    models = {
        axis: reward.load_reward_model(folder) for axis, folder in newest_reward_models(out).items()
    }
    assert "rlhf-v2" in str(newest_reward_models(out)["safety"]), "the newest ones"
    [row] = score_dialogs(models, [{"prompt": unsafe, "answer": "No.", "is_safety": True}])
    last = printed.splitlines()[-1]
    cells = re.findall(r"([+-][\d.]+) \(([\d.]+)\)", last)
    assert [(float(a), float(b)) for a, b in cells] == [
        tuple(round(x, 3) for x in row[name]) for name in ("reward", "helpfulness", "safety")
    ]
    assert cells[0] == cells[2], "the tag is known by the prompt's text: the safety score counts"
    assert "tagged as possibly unsafe, toy world: unsafe" in printed and last.endswith("'No.'")
    assert (
        "chosen: 'Hello!'" in printed
        and "rejected: 'What?'" in printed
        and "'Hi' (turn 1)" in printed
    )


def test_try(monkeypatch):
    """`--try`: several answers to one prompt side by side, the best first; a mistake is told and
    one goes on.
    """
    out, _ = chain()
    prompt = toy_prompt("ordinary")["prompt"][0]["content"]
    typed = iter([prompt, "One.", "[INST]", "Two two.", "", "Something else", "Three.", "", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    printed = run_quietly(reward.main, "--out", out, "--try")
    assert next(typed, None) is None
    assert (
        printed.count("'One.'") == 2
        and printed.count("'Two two.'") == 1
        and printed.count("'Three.'") == 1
    )
    assert "tag" in printed and "annotator: helpfulness safety" in printed
    both = printed.split("the tag")[1].split("'Something else'")[0]
    rewards = [float(x) for x in re.findall(r"^ +([+-][\d.]+)", both, re.M)]
    assert len(rewards) == 2 and rewards == sorted(rewards, reverse=True)


def test_try_ends_with_the_input(monkeypatch):
    def closed(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    assert "empty prompt ends" in run_quietly(reward.main, "--out", chain()[0], "--try")
