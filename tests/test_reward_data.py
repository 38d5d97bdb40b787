"""Preferences from files, mixes, cross-validation and its baselines, and the scores that a student
asks for.
"""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

import reward
import runtime
from data import InputError, Pair, Prompt, encode_dialog, read_preferences
from data.annotators import NotAnnotated
from data.preferences import (
    GivenAnswer,
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
    without_prompts_of,
)
from play import scores
from reward import score_dialogs
from runtime import newest_reward_models
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


def pair(text: str = "Hi", chosen: str = "Hello!", rejected: str = "What?", **fields) -> Pair:
    return Pair(Prompt([user(text)]), chosen, rejected, **fields)


def row(text: str = "Hi", chosen: str = "Hello!", rejected: str = "What?", **fields) -> dict:
    """A pair as a line of a file holds it."""
    return {"prompt": [user(text)], "chosen": chosen, "rejected": rejected, **fields}


def question(pair: Pair) -> str:
    return pair.prompt.question


def numbers(pairs: list[Pair]) -> list[int]:
    """Of pairs whose chosen answer is a number."""
    return [int(pair.chosen) for pair in pairs]


def hh(prompt: str, chosen: str, rejected: str) -> dict:
    """A line of an HH-RLHF file."""
    return {
        side: f"\n\nHuman: {prompt}\n\nAssistant: {answer}"
        for side, answer in (("chosen", chosen), ("rejected", rejected))
    }


# ---- HH-RLHF ----


def test_parse_hh_rlhf():
    """The prompt is all before the last "Assistant:"; blank lines inside a turn belong to it."""
    messages = [user("Hi there"), assistant("Hello!"), user("How do I bake\n\nbread?")]
    parsed = Pair(Prompt(messages), "Mix flour.\n\n1. Knead it.", "No idea.")
    assert parse_hh_rlhf(CHOSEN, REJECTED) == (parsed, "")


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
    assert not is_hh_rlhf(row())
    assert not is_hh_rlhf(row(chosen=CHOSEN))
    assert not is_hh_rlhf({"chosen": "a", "rejected": "b"})


def test_drop_oldest_turns():
    """Whole turns go, the oldest first, and only as many as must."""
    messages = []
    for k in range(4):
        messages += [user(f"question {k} " * 5), assistant(f"answer {k}")]
    messages.append(user("last"))
    whole = Pair(Prompt(messages), "short", "a longer answer " * 3)

    def length(prompt, answer):
        return len(encode_dialog(toy_tokenizer(), [*prompt, assistant(answer)]).ids)

    for dropped in range(5):
        kept = messages[2 * dropped :]
        longest = max(length(kept, whole.chosen), length(kept, whole.rejected))
        short = drop_oldest_turns(toy_tokenizer(), whole, longest)
        assert short == replace(whole, prompt=Prompt(kept))
    assert drop_oldest_turns(toy_tokenizer(), whole, longest - 1) is None
    assert length(kept, whole.chosen) <= longest - 1, "the longer of the two answers decides"


def test_drop_oldest_turns_encodes_a_turn_once(monkeypatch):
    """A dialog of thousands of turns takes no longer than its text is long."""
    turns = [user("a"), assistant("b")] * 3000
    encoded = []

    def count(tokenizer, dialog):
        encoded.append(len(dialog))
        return encode_dialog(tokenizer, dialog)

    monkeypatch.setattr("data.preferences.encode_dialog", count)
    long = Pair(Prompt([*turns, user("c")]), "d", "e")
    assert len(drop_oldest_turns(toy_tokenizer(), long, 100).prompt.messages) < 100
    assert sum(encoded) < 100


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
    ours = write_lines(tmp_path / "ours.jsonl", [row("Hey " * 200, rating="better")])
    first, short, own = read_pairs(f"{packed},{ours}", "helpfulness", toy_tokenizer(), 100)
    assert first == Pair(Prompt([user("Hi")], where=f"{packed}, line 1"), "Hello!", "What?")
    assert short.chosen == "yes" and short.where == f"{packed}, line 4"
    assert question(short) == "question number 29 is this" and 1 < len(short.prompt.messages) < 59
    assert own.chosen == "Hello!"
    assert own == read_preferences(ours)[0], "our own pairs are never shortened"
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
        ([row(), hh("Hi", "a", "b")], "line 2: field 'prompt' is missing"),
        ([row(rating="great")], "line 1: field 'rating' is 'great'"),
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
        parsed, reason = parse_hh_rlhf(line["chosen"], line["rejected"])
        reasons[reason] += 1
        if parsed:
            kept += 1
            for side, answer in (("chosen", parsed.chosen), ("rejected", parsed.rejected)):
                names = {"user": "Human", "assistant": "Assistant"}
                text = "".join(
                    f"{names[m['role']]}: {m['content']} "
                    for m in [*parsed.prompt.messages, assistant(answer)]
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
    pairs = [
        pair(chosen=str(n), chosen_is_safe=chosen, rejected_is_safe=rejected)
        for n, (chosen, rejected) in enumerate(labels)
    ]
    assert numbers(drop_unsafe_choices(pairs)) == [0, 1, 2, 4, 5, 6]


def test_read_pairs_leaves_out_unsafe_choices(tmp_path, capsys):
    """For the safety model only: such pairs are what helpfulness looks like."""
    rows = [
        row(chosen_is_safe=False, rejected_is_safe=True),
        row(chosen_is_safe=True, rejected_is_safe=False),
    ]
    path = str(write_lines(tmp_path / "pairs.jsonl", rows))
    assert len(read_pairs(path, "helpfulness", toy_tokenizer(), 100)) == 2
    [kept] = read_pairs(path, "safety", toy_tokenizer(), 100)
    assert kept.chosen_is_safe
    assert "left out: chosen unsafe, the other safe 1" in capsys.readouterr().out


def test_has_safety_labels(tmp_path):
    assert has_safety_labels(write_lines(tmp_path / "a", [row(), row(rejected_is_safe=False)]))
    assert not has_safety_labels(write_lines(tmp_path / "b", [row(chosen_is_safe=None), row()]))


@pytest.mark.parametrize("share, taken", [(0.0, 0), (0.1, 10), (0.5, 90), (0.9, 200)])
def test_mix_pairs(share, taken):
    own = [pair(f"own {i}") for i in range(90)]
    rest = [pair(f"rest {i}") for i in range(200)]
    mixed = mix_pairs(own, rest, share, seed=3)
    drawn = mixed[90:]
    assert mixed[:90] == own and len(set(map(question, drawn))) == len(drawn) == taken
    assert all(one.extra and replace(one, extra=False) in rest for one in drawn)
    assert share == 0.9 or taken / len(mixed) == share
    assert mixed == mix_pairs(own, rest, share, 3)
    assert not taken or mixed != mix_pairs(own, rest, share, 4)
    assert len(own) == 90 and mix_pairs(own, [], share, 0) == own


# ---- cross-validation ----


def test_folds_by_prompt():
    pairs = [pair(f"prompt {i % 23}", chosen=str(i)) for i in range(60)]
    folds = folds_by_prompt(pairs, 5, 0)
    tested = [one for _, test in folds for one in test]
    assert len(folds) == 5 and sorted(numbers(tested)) == list(range(60))
    for train, test in folds:
        assert sorted(numbers(train + test)) == list(range(60))
        assert not set(map(question, train)) & set(map(question, test))
        assert 4 * 2 <= len(test) <= 5 * 3
    assert folds == folds_by_prompt(pairs, 5, 0) != folds_by_prompt(pairs, 5, 1)
    assert folds_by_prompt(pairs, 0, 0) == []
    few = [one for i, one in enumerate(pairs) if i % 23 < 4]
    with pytest.raises(InputError, match="--folds 5: the pairs have only 4 different prompts"):
        folds_by_prompt(few, 5, 0)


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
    differences = bag_of_words(train, test, decay=0.1)
    assert differences.tolist() == pytest.approx([-2 * best, 2 * best, 0], abs=2e-3)


def test_bag_of_words_learns_what_is_said():
    pairs = [
        pair(f"prompt {i}", "please do " + "a b c d"[: i % 7], "never do " + "e f g h"[: i % 5])
        for i in range(60)
    ]
    train, test = pairs[:40], pairs[40:]
    differences = bag_of_words(train, test)
    assert (differences > 0).all()
    swapped = [pair(chosen=one.rejected, rejected=one.chosen) for one in train]
    assert torch.allclose(differences, bag_of_words(swapped, test).neg(), atol=1e-3)


def test_baselines():
    train = [pair(chosen="good", rejected="dull")]
    test = [pair(chosen="good dog", rejected="dull"), pair(chosen="a", rejected="bcd"), pair()]
    rivals = baselines(train, test)
    assert rivals["longer answer"].tolist() == [4, -2, 1]
    assert rivals["shorter answer"].tolist() == [-4, 2, -1]
    assert (rivals["bag of words"] > 0).tolist() == [True, False, False]


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
    pairs = write_lines(tmp_path / "pairs.jsonl", [row()])
    printed = run_quietly(scores.main, "score", pairs, "--out", tmp_path / "out")
    assert "helpfulness" in printed and "safety" not in printed and "chosen: 'Hello!'" in printed


def test_main_learns_other_pairs_than_it_is_judged_on(tmp_path, monkeypatch):
    """No fold's model saw a pair that it is judged on, and each starts anew from the same weights.
    """
    seen, starts = [], []

    def train(model, tokenizer, pairs, *, phase, **options):
        seen.append((phase, list(map(question, pairs))))
        starts.append(
            model.head.weight.sum().item() + model.body.tok_embeddings.weight.sum().item()
        )
        with torch.no_grad():
            model.body.tok_embeddings.weight.add_(1.0)

    judged = []
    score_pairs = reward.score_pairs

    def judge(model, tokenizer, pairs):
        judged.append(list(map(question, pairs)))
        return score_pairs(model, tokenizer, pairs)

    monkeypatch.setattr(reward, "train_reward_model", train)
    monkeypatch.setattr(reward, "score_pairs", judge)
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
        (("--init", "none"), "--init none: .*--data"),
        (("--folds", 5), "--folds 5: .*--data"),
        (("--data", "x.jsonl", "--folds", 1), "--folds 1: 2 or more"),
        (("--data", "x.jsonl", "--folds", -2), "--folds -2: "),
        (("--mix-share", "0.5"), "--mix-share 0.5: two shares"),
        (("--mix-share", "0.5,1"), "--mix-share 0.5,1.0: two shares"),
        (("--extra", "x.jsonl", "--mix-share", "0,0"), "--extra x.jsonl: .*more than 0"),
        (("--extra", "", "--mix-share", "0.5,0.1"), "--mix-share 0.5,0.1: no pairs .*--extra"),
        (("--extra", " , ", "--mix-share", "0.5,0.1"), "--mix-share 0.5,0.1: no pairs .*--extra"),
        (("--data", "x.jsonl", "--mix-share", "0,0.1"), "--mix-share 0.0,0.1: no pairs .*--extra"),
        (("--prompts", "x.jsonl", "--mix-share", "0,0.1"), "--mix-share 0.0,0.1: no pairs"),
        (("--data", "x.jsonl", "--init", "none"), "x.jsonl"),
        (("--data", "x", "--init", "none", "--preset", "llama-2-7b"), "weights of llama-2-7b"),
        (("--auxiliary-weight", "-1"), "--auxiliary-weight -1.0: "),
        (("--auxiliary-weight", "1e300"), "--auxiliary-weight 1e.300: "),
        (("--learning-rate", "1e300"), "--learning-rate 1e.300: "),
        (("--learning-rate", "0"), "--learning-rate 0.0: "),
        (("--max-tokens", "-1"), "--max-tokens -1: "),
        (("--max-tokens", 10**12), "--max-tokens 1"),
        (("--helpfulness-pairs", 10**12), "--helpfulness-pairs 1"),
        (("--safety-pairs", 10**15), "--safety-pairs 1"),
        (("--max-new-tokens", 10**12), "--max-new-tokens 1"),
        (("--batch-tokens", 10**12), "--batch-tokens 1"),
        (("--micro-tokens", 0), "--micro-tokens 0"),
        (("--epochs", 10**9), "--epochs 1000000000: "),
        (("--weight-decay", "-0.1"), "--weight-decay -0.1: "),
        (("--temperatures", "0.8,1e-9"), "--temperatures 0.8,1e-09: "),
        (("--temperatures", "0.8,1e9"), "--temperatures 0.8,1000000000.0: "),
        (("--temperatures", "0.8"), "two are wanted"),
    ],
)
def test_main_refuses(argv, told, tmp_path):
    with pytest.raises(InputError, match=told):
        run_quietly(reward.main, *TINY, "--out", tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_presets():
    """Each fits without more files; none records a share of pairs that it does not mix in."""
    for name, values in reward.PRESETS.items():
        settings = reward.Settings(**{"preset": name, **values})
        assert not any(settings.mix_share), name


@pytest.mark.parametrize("prompts", ["FOLDER", "missing.jsonl", "tagged.jsonl"])
def test_main_reads_prompts_before_the_folder_is_begun(prompts, tmp_path, monkeypatch):
    """Also before anything is hashed: a folder like /usr takes minutes."""
    start = chain()[0] / "sft"
    monkeypatch.setattr("runtime.stage.fingerprint", lambda path: pytest.fail(f"hashed {path}"))
    write_lines(tmp_path / "tagged.jsonl", [{"prompt": [user("[INST]")], "is_safety": False}])
    path = tmp_path if prompts == "FOLDER" else tmp_path / prompts
    argv = ("--init", start, "--prompts", path, "--annotator", "file", "--out", tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(str(path))):
        run_quietly(reward.main, *TINY, *argv)
    assert not (tmp_path / "out").exists()


def test_main_writes_both_files_to_annotate(tmp_path):
    """A person labels both axes at once; what is filled in is trained on, the other one waits."""
    argv = ["--init", chain()[0] / "sft", "--annotator", "file", "--out", tmp_path]
    argv += ["--helpfulness-pairs", 8, "--safety-pairs", 8]
    with pytest.raises(NotAnnotated, match="to_annotate-helpfulness.*to_annotate-safety"):
        run_quietly(reward.main, *TINY, *argv)
    for axis in reward.AXES:
        assert (tmp_path / f"reward-{axis}" / f"to_annotate-{axis}.jsonl").is_file()
    path = tmp_path / "reward-helpfulness" / "to_annotate-helpfulness.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [line | {"better": "a", "rating": "better"} for line in rows])
    with pytest.raises(NotAnnotated) as waiting:
        run_quietly(reward.main, *TINY, *argv)
    assert "to_annotate-helpfulness" not in str(waiting.value)
    assert runtime.is_finished(tmp_path / "reward-helpfulness")
    assert not (tmp_path / "reward-safety" / "pairs.jsonl").exists()


def test_main_leaves_out_too_long(tmp_path, monkeypatch):
    """--too-long skip: pairs of --data and --extra, and prompts; each time it is told how many."""
    trained = []

    def train(model, tokenizer, pairs, **options):
        trained.append(sorted(map(question, pairs)))

    monkeypatch.setattr(reward, "train_reward_model", train)
    long = "many words " * 1500
    data = write_lines(tmp_path / "a.jsonl", [row("a"), row(long), row("c", long)])
    extra = write_lines(tmp_path / "b.jsonl", [row("b"), row("d", "x", long), row("e", long, "x")])
    argv = ["--init", chain()[0] / "sft", "--out", tmp_path / "out", "--axis", "helpfulness"]
    files = ["--data", data, "--extra", extra, "--mix-share", "0.5,0"]
    with pytest.raises(InputError, match="a.jsonl, line 2: the dialog has .* tokens"):
        run_quietly(reward.main, *TINY, *argv, *files)
    assert not (tmp_path / "out").exists()
    printed = run_quietly(reward.main, *TINY, *argv, *files, "--too-long", "skip")
    assert trained == [["a", "b"]] and printed.count("2 of 3 rows are left out") == 2
    assert "1 of 2 pairs are from --extra" in printed

    record = {"prompt": [user(long)], "is_safety": False}
    prompts = write_lines(tmp_path / "p.jsonl", [record, record | {"prompt": [user("Hi")]}])
    argv += ["--prompts", prompts, "--annotator", "file", "--out", tmp_path / "two"]
    with pytest.raises(InputError, match="p.jsonl, line 1: the prompt has .* tokens"):
        run_quietly(reward.main, *TINY, *argv)
    asked = []
    monkeypatch.setattr(
        reward, "collect_preferences", lambda *args, **options: asked.append(args[2]) or []
    )
    with pytest.raises(InputError, match="no pair of different answers"):
        run_quietly(reward.main, *TINY, *argv, "--too-long", "skip")
    assert [prompt.question for prompt in asked[0]] == ["Hi", "Hi"], "harmless ones may come twice"


def test_main_refuses_extra_pairs_alone(tmp_path):
    """The zero is the mean score of pairs that are not extra: of none it would be NaN."""
    data = write_lines(tmp_path / "a.jsonl", [row(extra=True)] * 3)
    argv = ["--init", chain()[0] / "sft", "--out", tmp_path / "out", "--data", data]
    with pytest.raises(InputError, match="a.jsonl: each pair is marked as 'extra'"):
        run_quietly(reward.main, *TINY, *argv)
    assert not (tmp_path / "out").exists()


def test_main_mixes(tmp_path, monkeypatch):
    """Each axis draws its own share from --extra, after its own pairs; the safety model never
    learns unsafe choices.
    """
    learned = {}

    def train(model, tokenizer, pairs, *, phase, **options):
        learned[phase] = pairs

    monkeypatch.setattr(reward, "train_reward_model", train)
    own = write_lines(
        tmp_path / "own.jsonl",
        [row(f"own {i}", chosen_is_safe=True, rejected_is_safe=False) for i in range(20)],
    )
    rest = write_lines(
        tmp_path / "rest.jsonl",
        [row(f"rest {i}", chosen_is_safe=i > 9, rejected_is_safe=True) for i in range(40)],
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
        axis: Counter(question(one).split()[0] for one in pairs) for axis, pairs in learned.items()
    }
    assert sources == {"helpfulness": {"own": 18, "rest": 18}, "safety": {"own": 18, "rest": 2}}
    assert all(question(one).startswith("own") for one in learned["safety"][:18])
    assert not any(one.chosen_is_safe is False for one in learned["safety"])
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
    pairs = [pair(f"question {i // 3}", chosen=str(i)) for i in range(90)]
    train, held_out = hold_out_by_prompt(pairs, seed=0)
    held_prompts = set(map(question, held_out))
    assert not held_prompts & set(map(question, train)), "no held-out prompt was trained on"
    assert len(held_prompts) == 3 and len(held_out) == 9 and len(train) == 81
    assert held_prompts != {f"question {i}" for i in range(3)}, "not the file's first tenth"
    assert numbers(train) == sorted(numbers(train)), "in the file's order"
    assert hold_out_by_prompt(pairs, seed=0) == (train, held_out)
    assert hold_out_by_prompt(pairs, seed=1) != (train, held_out)
    assert hold_out_by_prompt(pairs[:27], seed=0) == (pairs[:27], []), "nine prompts: nothing"


def test_without_prompts_of():
    pairs = [pair(f"question {i % 3}", chosen=str(i)) for i in range(9)]
    assert numbers(without_prompts_of(pairs, [pair("question 1")])) == [0, 2, 3, 5, 6, 8]
    assert without_prompts_of(pairs, []) == pairs


def test_main_holds_out_by_prompt(tmp_path, monkeypatch):
    """`--data`: no prompt of a held-out pair is trained on, not even by what `--extra` mixes in;
    folds neither.
    """
    start = chain()[0] / "sft"  # made before parts of it are replaced
    rows = [
        row(f"What is {i // 2} plus 1?", f"It is {i // 2 + 1}.", "It is 99." if i % 2 else "No.")
        for i in range(60)
    ]
    data = write_lines(tmp_path / "mine.jsonl", rows)
    extra = write_lines(tmp_path / "extra.jsonl", rows[::-1])
    trained, held, scored = [], [], []

    def train(model, tokenizer, pairs, **options):
        trained.append(set(map(question, pairs)))

    def report(model, tokenizer, pairs, axis):
        held.append(set(map(question, pairs)))
        return {}

    def score_pairs(model, tokenizer, pairs):
        scored.append(set(map(question, pairs)))
        return torch.zeros(len(pairs)), torch.zeros(len(pairs))

    monkeypatch.setattr(reward, "train_reward_model", train)
    monkeypatch.setattr(reward, "report_accuracy", report)
    common = (*TINY, "--data", data, "--extra", extra, "--mix-share", "0.5,0.5", "--init", start)
    run_quietly(reward.main, *common, "--out", tmp_path / "out")
    assert len(held[0]) == 3 and len(trained[0]) == 27 and not held[0] & trained[0]
    monkeypatch.setattr(reward, "score_pairs", score_pairs)
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
    prompts = [Prompt([user("Hi")], is_safety=is_safety) for is_safety in (False, True)]
    plain, tagged = score_dialogs(models, [(prompt, "Hello!") for prompt in prompts])
    for axis, (model, tokenizer) in models.items():
        [expected] = reward.score(
            model, [encode_dialog(tokenizer, [user("Hi"), assistant("Hello!")]).ids]
        ).tolist()
        expected = close((expected, 1 / (1 + 2.718281828**-expected)))
        assert plain[axis] == expected and tagged[axis] == expected
    assert tagged["reward"] == tagged["safety"]
    gated = plain["safety"][1] < 0.15
    assert plain["reward"] == plain["safety" if gated else "helpfulness"]
    [alone] = score_dialogs({"safety": models["safety"]}, [(prompts[0], "Hello!")])
    assert alone["safety"] == close(plain["safety"]) and "reward" not in alone
    with pytest.raises(InputError, match="f, line 3"):
        score_dialogs(models, [(Prompt([user("Hi")], where="f, line 3"), "[INST]")])


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
        row(),
        {"messages": [user("a"), assistant("b")], "chosen": "x", "rejected": "y"},
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)

    def prompt(line: int, messages: list[dict], is_safety: bool = False) -> Prompt:
        return Prompt(messages, is_safety, where=f"{path}, line {line}")

    assert read_answers(path) == [
        GivenAnswer(prompt(1, rows[0]["messages"][:-1]), "Bye"),
        GivenAnswer(prompt(2, [user("Hi")], is_safety=True), "Hello!"),
        GivenAnswer(prompt(3, [user("Hi")]), "Hello!", "chosen"),
        GivenAnswer(prompt(3, [user("Hi")]), "What?", "rejected"),
        GivenAnswer(prompt(4, [user("a")]), "b"),
    ]


@pytest.mark.parametrize(
    "wrong, told",
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
        (row(is_safety="no"), "field 'is_safety' is \"no\""),
    ],
)
def test_read_answers_refuses(wrong, told, tmp_path):
    with pytest.raises(InputError, match="rows.jsonl, line 2: .*" + told):
        read_answers(write_lines(tmp_path / "rows.jsonl", [row(), wrong]))
