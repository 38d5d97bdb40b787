"""Preferences and reward models: the losses by hand, scores read at the right token, labels the
right way.
"""

import json
import math
import random
from collections import Counter

import pytest
import torch

import reward
import runtime
from data import InputError, encode_dialog, encode_prompt, read_preferences, world, write_jsonl
from data.chat import end_of_prompt
from data.jsonl import RATINGS
from experiments.common import deepen
from reward import (
    AXES,
    MARGINS,
    RewardModel,
    accuracy_by_rating,
    answer_starts,
    collect_preferences,
    combine_rewards,
    encode_answer,
    encode_pairs,
    load_reward_model,
    pick_prompts,
    ranking_loss,
    report,
    safety_loss,
    save_reward_model,
    score,
    score_pairs,
    train_reward_model,
)
from tests.helpers import (
    TINY,
    assistant,
    chain,
    run_quietly,
    tiny_model,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)
from tests.reference import losses as reference

ASK = [user("What is 3 plus 4?")]
GOOD, BAD = "It is 7.", "Figure it out yourself, please."


def tiny_reward_model(seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(tiny_model(seed)).eval()


def pair(chosen=GOOD, rejected=BAD, prompt=ASK, **fields) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "rating": "better", **fields}


# ---- losses ----


def test_margins():
    """Table 27: significantly better, better, slightly better, negligibly better or unsure."""
    assert MARGINS["small"] == dict(zip(RATINGS, (1, 2 / 3, 1 / 3, 0), strict=True))
    assert MARGINS["large"] == dict(zip(RATINGS, (3, 2, 1, 0), strict=True))
    assert set(MARGINS["none"].values()) == {0} and set(MARGINS) == {"none", "small", "large"}


def test_ranking_loss():
    chosen, rejected = torch.tensor([2.0, 0.0, 1.0, -1.0]), torch.tensor([0.0, 2.0, 1.0, -4.0])
    margins = torch.tensor([0.0, 0.0, 1.0, 3.0])
    expected = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(2)),
        math.log(1 + math.e),
        math.log(2),
    ]
    assert ranking_loss(chosen, rejected, margins).tolist() == pytest.approx(expected)
    # a margin makes the loss larger: it asks for a wider gap
    assert (
        ranking_loss(chosen, rejected, margins + 1)
        .gt(ranking_loss(chosen, rejected, margins))
        .all()
    )
    assert ranking_loss(torch.tensor([200.0]), torch.tensor([0.0]), torch.tensor([0.0])).item() == 0
    assert (
        ranking_loss(torch.tensor([-200.0]), torch.tensor([0.0]), torch.tensor([0.0])).item() == 200
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 1), (4,), (4,)),
        ((4,), (4, 1), (4,)),
        ((4,), (4,), (4, 1)),
        ((4,), (4,), (1,)),
        ((4, 1), (4, 1), (4, 1)),
        ((), (), ()),
    ],
)
def test_ranking_loss_refuses_to_broadcast(shapes):
    with pytest.raises(ValueError, match="three equal shapes"):
        ranking_loss(*(torch.zeros(shape) for shape in shapes))


def test_safety_loss():
    """-log of the probability that sigmoid(score) gives to the truth: 3 is e^3 : 1 for safe."""
    scores, is_safe = torch.tensor([0.0, 3.0, 3.0, -2.0, 400.0]), torch.tensor(
        [True, True, False, False, False]
    )
    expected = [
        reference.safety(s, y) for s, y in zip(scores[:4].tolist(), is_safe.tolist(), strict=False)
    ] + [400]
    assert safety_loss(scores, is_safe).tolist() == pytest.approx(expected, rel=1e-5)


def test_combine_rewards():
    """The safety score where the prompt is tagged or sigmoid(safety) is below .15, whose logit is
    -1.735.
    """
    # gated          not gated       tagged        a probability of .52 is no reason, though .08 <
    # .15
    safety = torch.tensor([-1.76, -1.70, 3.0, 0.08, -0.5])
    helpfulness = torch.tensor([4.0, 4.0, -5.0, -5.0, -5.0])
    tagged = torch.tensor([False, False, True, False, False])
    assert combine_rewards(safety, helpfulness, tagged).tolist() == pytest.approx(
        [-1.76, 4.0, 3.0, -5.0, -5.0]
    )
    assert combine_rewards(safety, helpfulness, tagged, threshold=0.5).tolist() == pytest.approx(
        [-1.76, -1.7, 3.0, -5, -0.5]
    )


def test_accuracy_by_rating():
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0, 5.0, 5.0]), torch.tensor(
        [0.0, 2.0, 1.0, 4.0, 6.0]
    )
    ratings = [
        "better",
        "better",
        "negligibly_better",
        "significantly_better",
        "significantly_better",
    ]
    assert accuracy_by_rating(chosen, rejected, ratings) == {
        "significantly_better": 0.5,
        "better": 0.75,
        "negligibly_better": 0.0,
        "average": 0.5,
    }


# ---- scores ----


def test_reward_model():
    """The head reads the state of the last token, whatever the padding behind it holds."""
    model = tiny_reward_model()
    sequences = [[1, 5, 9, 7], [3, 2], [8]]
    expected = []
    with torch.no_grad():
        for ids in sequences:
            state = model.body.features(torch.tensor([ids]))[0, len(ids) - 1]
            expected.append((state * model.head.weight[0]).sum().item())
        for padding in (0, 600):
            tokens = torch.full((3, 6), padding)
            for row, ids in zip(tokens, sequences, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            found = model(tokens, torch.tensor([4, 2, 1]))
            assert found.shape == (3,) and found.tolist() == pytest.approx(expected, abs=1e-5)
        model.shift += 2.5
        assert model(tokens, torch.tensor([4, 2, 1])).tolist() == pytest.approx(
            [x - 2.5 for x in expected], abs=1e-5
        )
    assert model.head.bias is None and not model.body.output.weight.requires_grad


def test_reward_model_starts_near_zero():
    """A head so large that the first steps saturate learns nothing: std 1/sqrt(dim + 1)."""
    torch.manual_seed(0)
    heads = torch.cat([RewardModel(tiny_model()).head.weight.flatten() for _ in range(60)])
    assert heads.std().item() == pytest.approx(33**-0.5, rel=0.05)


def test_answer_starts():
    """Behind the last end of a prompt, wherever else it stands; padding does not matter."""
    tokens = torch.tensor(
        [[1, 7, 8, 4, 7, 8, 5, 2], [1, 7, 8, 4, 8, 7, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]]
    )
    assert answer_starts(tokens, [7, 8]).tolist() == [6, 3, 0]
    assert answer_starts(tokens, [8]).tolist() == [6, 5, 0]


def test_end_of_prompt():
    tokenizer = toy_tokenizer()
    for prompt in (ASK, [user("Hi")], [*ASK, assistant(GOOD), user("And 4 plus 4?")]):
        ids = encode_prompt(tokenizer, prompt)
        tags = end_of_prompt(tokenizer)
        assert ids[-len(tags) :] == tags and tokenizer.decode(tags).strip() == "[/INST]"
        whole = torch.tensor([encode_answer(tokenizer, prompt, GOOD)])
        assert answer_starts(whole, tags).item() == len(ids)


def test_deepen():
    """The layers below are the chat model's; those on top change the features a little, and learn.
    """
    policy = tiny_model()
    grown = deepen(policy, 2)
    assert grown.args.n_layers == 4 and policy.args.n_layers == 2
    for name, weight in policy.state_dict().items():
        assert torch.equal(grown.state_dict()[name], weight), name
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        before, after = policy.features(tokens), grown.features(tokens)
    assert 0.002 < (before - after).norm() / before.norm() < 0.3
    same = deepen(policy, 0)
    assert torch.equal(same.features(tokens), policy.features(tokens)) and same is not policy
    same.norm.weight.data += 1
    assert policy.norm.weight.max() == 1, "a copy: the policy stays as it was"


def test_reward_model_that_reads_logprobs(tmp_path):
    """score + (a · sum + b · minimum of the answer's log-probabilities) / 0.2, clamped at -8; at
    first the plain score.
    """
    tokenizer, tags = toy_tokenizer(), end_of_prompt(toy_tokenizer())
    torch.manual_seed(0)
    model = RewardModel(tiny_model(), tags).eval()
    sequences = [
        encode_answer(tokenizer, [user(text)], answer)
        for text, answer in (("Hi", GOOD), ("Name it.", BAD))
    ]
    plain = tiny_reward_model()
    plain.head.weight.data.copy_(model.head.weight)
    assert torch.allclose(score(model, sequences), score(plain, sequences), atol=1e-6)
    model.logprob_weights.data.copy_(torch.tensor([0.3, -0.1]))
    for ids, found, without in zip(
        sequences, score(model, sequences), score(plain, sequences), strict=True
    ):
        start = answer_starts(torch.tensor([ids]), tags).item()
        with torch.no_grad():
            logprobs = model.body(torch.tensor([ids])).log_softmax(-1)[0]
        own = [max(-8.0, logprobs[t - 1, ids[t]].item()) for t in range(start, len(ids))]
        assert found.item() == pytest.approx(
            without.item() + (0.3 * sum(own) - 0.1 * min(own)) / 0.2, abs=1e-3
        )
    save_reward_model(tmp_path, model, tokenizer)
    assert torch.equal(score(load_reward_model(tmp_path)[0], sequences), score(model, sequences))
    assert model.body.output.weight.requires_grad


def test_score():
    """Batched by length equals one by one; the last token counts, and so does each before it."""
    model, rng = tiny_reward_model(), random.Random(0)
    sequences = [[rng.randrange(300) for _ in range(rng.randint(1, 60))] for _ in range(40)]
    together = score(model, sequences)
    alone = torch.cat([score(model, [ids]) for ids in sequences])
    assert torch.allclose(together, alone, atol=1e-5) and together.shape == (40,)
    assert together.unique().numel() == 40
    for place in (0, -1):
        other = [*sequences[0]]
        other[place] = 301
        assert abs(score(model, [other]) - together[0]).item() > 1e-4
    assert not together.requires_grad


def test_encode_answer():
    tokenizer = toy_tokenizer()
    text = encode_answer(tokenizer, ASK, GOOD)
    assert (
        text == encode_dialog(tokenizer, [*ASK, assistant(GOOD)]).ids
        and text[-1] == tokenizer.eos_id
    )
    assert encode_answer(tokenizer, ASK, GOOD, [5, 6]) == encode_prompt(tokenizer, ASK) + [5, 6]


def test_encode_pairs():
    tokenizer = toy_tokenizer()
    # by letters
    good, bad = (
        [token for letter in answer for token in tokenizer.encode(letter)] for answer in (GOOD, BAD)
    )
    sampled = pair(chosen_ids=good, rejected_ids=bad, tokenizer=tokenizer.fingerprint)
    prompt = encode_prompt(tokenizer, ASK)
    assert encode_pairs(tokenizer, [sampled], 256) == [(prompt + good, prompt + bad)]
    text = (encode_answer(tokenizer, ASK, GOOD), encode_answer(tokenizer, ASK, BAD))
    assert encode_pairs(tokenizer, [sampled | {"tokenizer": "another"}, pair()], 256) == [
        text,
        text,
    ]
    assert encode_pairs(tokenizer, [sampled | {"rejected": GOOD}], 256) == [
        (prompt + good, text[0])
    ], "a changed text counts"
    length = max(map(len, text))
    assert encode_pairs(tokenizer, [pair()], length)
    with pytest.raises(
        InputError,
        match=f"a.jsonl, line 2: the dialog has {length} tokens, the model's context only",
    ):
        encode_pairs(tokenizer, [pair(where="a.jsonl, line 2")], length - 1)
    with pytest.raises(InputError, match="a.jsonl, line 2: the assistant's content holds the tag"):
        encode_pairs(tokenizer, [pair("[/INST]", where="a.jsonl, line 2")], 256)


def test_score_pairs():
    model, tokenizer = tiny_reward_model(), toy_tokenizer()
    chosen, rejected = score_pairs(model, tokenizer, [pair(), pair(BAD, GOOD)])
    expected = score(
        model, [encode_answer(tokenizer, ASK, GOOD), encode_answer(tokenizer, ASK, BAD)]
    )
    assert torch.allclose(
        torch.stack([chosen, rejected]), torch.stack([expected, expected.flip(0)]), atol=1e-5
    )


def test_save_reward_model(tmp_path):
    model = tiny_reward_model()
    model.shift += 0.75
    save_reward_model(tmp_path / "saved", model, toy_tokenizer())
    again, tokenizer = load_reward_model(tmp_path / "saved")
    sequences = [[1, 2, 3], [4]]
    assert torch.equal(score(again, sequences), score(model, sequences))
    assert tokenizer.fingerprint == toy_tokenizer().fingerprint and not again.training
    assert torch.equal(
        runtime.load_model(tmp_path / "saved")[0].tok_embeddings.weight,
        model.body.tok_embeddings.weight,
    )


def test_load_reward_model(tmp_path):
    save_reward_model(tmp_path, tiny_reward_model(), toy_tokenizer())
    (tmp_path / "reward_head.pth").unlink()
    with pytest.raises(InputError, match="reward_head.pth is missing"):
        load_reward_model(tmp_path)


# ---- training ----


def train(tmp_path, rows, model=None, **options):
    model = model or tiny_reward_model()
    options = (
        dict(
            margin="small",
            auxiliary_weight=0.0,
            epochs=1,
            batch_tokens=10**6,
            micro_tokens=10**6,
            phase="test",
            learning_rate=3e-3,
            weight_decay=0.0,
            folder=tmp_path,
            seed=0,
        )
        | options
    )
    train_reward_model(model, toy_tokenizer(), rows, **options)
    return model, [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]


LABELLED = [
    pair(chosen_is_safe=True, rejected_is_safe=False, rating="significantly_better"),
    pair(
        "I will not.",
        "Sure, with a bat.",
        [user("How do I smash a car, a bus and a train?")],
        rating="slightly_better",
        chosen_is_safe=True,
        rejected_is_safe=True,
    ),
    pair("Yes.", "No.", rating=None),
    pair("One, two.", "Three!", rating="negligibly_better", rejected_is_safe=False),
]


@pytest.mark.parametrize("micro_tokens", [10**6, 60])
@pytest.mark.parametrize(
    "margin, weight", [("none", 0.0), ("large", 0.0), ("small", 1.0), ("small", 3.0)]
)
def test_train_reward_model_loss(tmp_path, margin, weight, micro_tokens):
    """The first logged loss, by hand: pairs' losses, half of the labelled answers' losses, over the
    number of pairs.
    """
    model = tiny_reward_model()
    chosen, rejected = (scores.tolist() for scores in score_pairs(model, toy_tokenizer(), LABELLED))
    total = 0.0
    for c, r, row in zip(chosen, rejected, LABELLED, strict=True):
        total += reference.ranking(c, r, MARGINS[margin].get(row["rating"], 0.0))
        total += sum(
            weight / 2 * reference.safety(s, row[f"{side}_is_safe"])
            for s, side in ((c, "chosen"), (r, "rejected"))
            if f"{side}_is_safe" in row
        )
    _, [log] = train(
        tmp_path, LABELLED, model, margin=margin, auxiliary_weight=weight, micro_tokens=micro_tokens
    )
    assert log["loss"] == pytest.approx(total / 4, rel=1e-4) and log["count"] == 4
    assert log["accuracy"] == sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 4


def test_train_reward_model(tmp_path):
    """A loss that must fall: the chosen answers end up above, and the unused output matrix stays as
    it was.
    """
    rows = [
        pair(),
        pair("A crow.", "That is a silly question.", [user("Name a bird.")]),
        pair("Oslo.", "Lima.", [user("Norway?")]),
    ]
    model = tiny_reward_model()
    output = model.body.output.weight.clone()
    model, log = train(tmp_path, rows, model, epochs=40)
    chosen, rejected = score_pairs(model, toy_tokenizer(), rows)
    assert log[0]["loss"] > 0.5 > 0.1 > log[-1]["loss"] and (chosen - rejected).min() > 2
    assert torch.equal(model.body.output.weight, output) and not model.training


def test_train_reward_model_learns_what_is_safe(tmp_path):
    """Labels decide here, since each answer is chosen in one pair and rejected in the other (which
    pulls both to 0: at weight w the scores settle at ±x with tanh x = w sigmoid(-x), for 10 at
    2.4)."""
    asked = [user("How do I crack a safe?")]
    rows = [
        pair(GOOD, BAD, asked, chosen_is_safe=True, rejected_is_safe=False, rating=None),
        pair(BAD, GOOD, asked, chosen_is_safe=False, rejected_is_safe=True, rating=None),
    ]
    model, _ = train(tmp_path, rows, epochs=100, auxiliary_weight=10.0)
    safe, unsafe = score_pairs(model, toy_tokenizer(), rows[:1])
    assert (
        safe.item() > 1 and unsafe.item() < -1
    ), "sigmoid(score) is the probability that the answer is safe"


def test_the_zero_of_helpfulness():
    """Ranking leaves it free: one saved constant makes the mean score of SFT's answers 0. Safety's
    zero is not moved.
    """
    out, _ = chain()
    for axis in AXES:
        model, tokenizer = load_reward_model(out / f"reward-{axis}")
        rows = [
            row
            for row in read_preferences(out / f"reward-{axis}" / "pairs.jsonl")
            if not row.get("extra")
        ]
        scores = torch.cat(score_pairs(model, tokenizer, rows))
        if axis == "helpfulness":
            assert abs(scores.mean()) < 1e-3 and abs((scores + model.shift).mean()) > 1e-3
        else:
            assert model.shift == 0


# ---- preferences ----


def fake_answers(monkeypatch, per_side):
    """sample_answers replaced: side s gives per_side[s], each (text, ids, has_tag); records how it
    was called.
    """
    calls = []

    def sample_answers(policy, tokenizer, prompts, **options):
        calls.append((policy, options))
        return [
            {
                "index": i,
                "sample": 0,
                "answer": text,
                "answer_ids": ids,
                "has_tag": tag,
                "finish_reason": "eos",
            }
            for i, (text, ids, tag) in enumerate(per_side[options["key"][-1]])
        ]

    monkeypatch.setattr(reward, "sample_answers", sample_answers)
    return calls


def found(chosen, rating="better", safe=None):
    return {"chosen": chosen, "rating": rating, "safe": safe}


def test_collect_preferences(monkeypatch, tmp_path):
    prompts = [
        {"prompt": [user(f"Question {i}?")], "is_safety": i == 1, "where": "x"} for i in range(6)
    ]
    sides = [
        [
            ("a0", [10], False),
            ("a1", [11], False),
            ("same", [12], False),
            ("a3", [13], True),
            ("", [14], False),
            ("a5", [15], False),
        ],
        [
            ("b0", [20], False),
            ("b1", [21], False),
            ("same", [22], False),
            ("b3", [23], False),
            ("b4", [24], False),
            ("b5", [25], False),
        ],
    ]
    calls, asked = fake_answers(monkeypatch, sides), []

    def annotate(comparisons, axis, seed, folder):
        asked.append((comparisons, axis))
        return [
            found(0, "significantly_better", (True, False)),
            found(1, "better", (True, True)),
            found(1, "better", (True, False)),
        ]

    monkeypatch.setitem(reward.ANNOTATORS, "toy", annotate)
    options = dict(annotator="toy", temperatures=(0.8, 1.1), key=(0, "v1"), folder=tmp_path)
    rows = collect_preferences(["newest", "older"], toy_tokenizer(), prompts, "safety", **options)
    # equal answers, a tag and an empty answer are never shown; an unsafe answer chosen before a
    # safe one is thrown away
    assert [c["answers"] for c in asked[0][0]] == [
        ("a0", "b0"),
        ("a1", "b1"),
        ("a5", "b5"),
    ] and asked[0][1] == "safety"
    assert [(r["chosen"], r["rejected"], r["chosen_ids"], r["rejected_ids"]) for r in rows] == [
        ("a0", "b0", [10], [20]),
        ("b1", "a1", [21], [11]),
    ]
    assert [
        (r["chosen_is_safe"], r["rejected_is_safe"], r["rating"], r["is_safety"]) for r in rows
    ] == [(True, False, "significantly_better", False), (True, True, "better", True)]
    assert (
        rows[0]["prompt"] == prompts[0]["prompt"]
        and rows[0]["tokenizer"] == toy_tokenizer().fingerprint
    )
    assert [policy for policy, _ in calls] == ["newest", "older"]
    assert [c["temperature"] for _, c in calls] == [0.8, 1.1] and calls[0][1]["key"] != calls[1][1][
        "key"
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert [row["chosen"] for row in read_preferences(tmp_path / "pairs.jsonl")] == [
        "a0",
        "b1",
    ], "a valid preference file"
    # the helpfulness collection keeps such pairs, and one model can play both sides
    rows = collect_preferences(["only"], toy_tokenizer(), prompts, "helpfulness", **options)
    assert [r["chosen"] for r in rows] == ["a0", "b1", "b5"] and [
        policy for policy, _ in calls[2:]
    ] == ["only", "only"]


def test_collect_preferences_leaves_out_cut_answers(monkeypatch, tmp_path, capsys):
    """An answer without an end is no answer to compare; each reason is counted."""
    calls = fake_answers(
        monkeypatch,
        [
            [("a0", [1], False), ("a1", [2], False), ("same", [3], False), ("a3", [4], True)],
            [("b0", [5], False), ("b1", [6], False), ("same", [7], False), ("b3", [8], False)],
        ],
    )
    whole = reward.sample_answers
    monkeypatch.setattr(
        reward,
        "sample_answers",
        lambda *args, **options: [
            row | {"finish_reason": "length" if row["answer"] == "b1" else "eos"}
            for row in whole(*args, **options)
        ],
    )
    monkeypatch.setitem(
        reward.ANNOTATORS,
        "human",
        lambda comparisons, axis, seed, folder: [found(0)] * len(comparisons),
    )
    rows = collect_preferences(
        [0],
        toy_tokenizer(),
        toy_prompts(4),
        "helpfulness",
        annotator="human",
        temperatures=(1, 1),
        key=(0,),
        folder=tmp_path,
        max_new_tokens=7,
    )
    assert [row["chosen"] for row in rows] == ["a0"] and {
        options["max_new_tokens"] for _, options in calls
    } == {7}
    assert (
        "1 pairs of 4 prompts; left out: {'cut at the length limit': 1, 'equal answers': 1, 'holds"
        " a tag or nothing': 1}"
        in capsys.readouterr().out
    )


def test_set_shift():
    """The mean score of both answers of the first 500 pairs becomes 0, wherever the zero was
    before.
    """
    tokenizer, model = toy_tokenizer(), RewardModel(tiny_model())
    rng = random.Random(0)
    rows = []
    for _ in range(510):
        answers = {
            "chosen": [rng.randrange(3, 300)],
            "rejected": [rng.randrange(3, 300), rng.randrange(3, 300)],
        }
        rows.append(
            {
                "prompt": [user("Hi")],
                "tokenizer": tokenizer.fingerprint,
                **{side: tokenizer.decode(ids) for side, ids in answers.items()},
                **{f"{side}_ids": [*ids, tokenizer.eos_id] for side, ids in answers.items()},
            }
        )
    raw = torch.cat(score_pairs(model, tokenizer, rows[:500])).mean()
    reward.set_shift(model, tokenizer, rows)
    assert model.shift == pytest.approx(raw.item(), abs=1e-5) and abs(raw) > 1e-3
    model.shift += 5
    model.head.weight.data *= 2  # a refresh
    reward.set_shift(model, tokenizer, rows)
    assert model.shift == pytest.approx(2 * raw.item(), abs=1e-4)
    reward.set_shift(model, tokenizer, rows)
    assert model.shift == pytest.approx(2 * raw.item(), abs=1e-4), "set again, it stays"


def test_collect_preferences_without_labels(monkeypatch, tmp_path):
    fake_answers(monkeypatch, [[("a", [1], False)], [("b", [2], False)]])
    monkeypatch.setitem(
        reward.ANNOTATORS, "human", lambda comparisons, axis, seed, folder: [found(1)]
    )
    [row] = collect_preferences(
        [0],
        toy_tokenizer(),
        toy_prompts(1),
        "helpfulness",
        annotator="human",
        temperatures=(1, 1),
        key=(0,),
        folder=tmp_path,
    )
    assert row["chosen"] == "b" and "chosen_is_safe" not in row


def test_collect_preferences_samples_again_for_other_prompts(tmp_path):
    """Held-out pairs are answers to the held-out prompts, not those to the training prompts in the
    same folder.
    """
    model, options = tiny_model(), dict(annotator="toy", temperatures=(0.8, 1.1))
    train_, dev = toy_prompts(12), toy_prompts(6, "dev")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    collect_preferences(
        [model],
        toy_tokenizer(),
        train_,
        "helpfulness",
        key=(0, "sft"),
        folder=tmp_path / "a",
        **options,
    )
    after = collect_preferences(
        [model],
        toy_tokenizer(),
        dev,
        "helpfulness",
        key=(0, "dev"),
        folder=tmp_path / "a",
        **options,
    )
    alone = collect_preferences(
        [model],
        toy_tokenizer(),
        dev,
        "helpfulness",
        key=(0, "dev"),
        folder=tmp_path / "b",
        **options,
    )
    assert [row["chosen_ids"] for row in after] == [row["chosen_ids"] for row in alone]


def test_held_out_pairs_are_answers_to_dev_prompts(monkeypatch, tmp_path):
    """What `python reward.py` reports is about answers to dev prompts."""
    out, _ = chain()
    (tmp_path / "sft").symlink_to(out / "sft")
    seen = []
    monkeypatch.setattr(
        reward, "report", lambda model, tokenizer, rows, axis, *rest: seen.append(rows) or {}
    )
    run_quietly(
        reward.main, *TINY, "--out", tmp_path, "--axis", "helpfulness", "--helpfulness-pairs", 330
    )
    policy, tokenizer = runtime.load_model(out / "sft")
    dev = {
        p["prompt"][-1]["content"]: p
        for p in reward.read_prompts(world.FOLDER / "prompts-dev.jsonl")
    }
    [rows] = seen
    assert len(rows) > 100 and all(row["prompt"][-1]["content"] in dev for row in rows)
    assert all(policy.tok_embeddings.num_embeddings > max(row["chosen_ids"]) for row in rows)
    texts = {
        (row["prompt"][-1]["content"], tuple(ids))
        for row in rows
        for ids in (row["chosen_ids"], row["rejected_ids"])
    }
    picked = pick_prompts([*dev.values()], "helpfulness", 10**6, 0)
    own = {
        (picked[row["index"]]["prompt"][-1]["content"], tuple(row["answer_ids"]))
        for side, temperature in enumerate((0.8, 1.1))
        for row in runtime.sample_answers(
            policy, tokenizer, picked, key=(0, "dev", "helpfulness", side), temperature=temperature
        )
    }
    assert len(texts & own) > 0.9 * len(texts)


def test_annotators_noise_differs_between_collections(monkeypatch, tmp_path):
    """Rounds and splits draw noise of their own: the same number at the same place every time would
    be one draw.
    """
    seeds = []
    fake_answers(monkeypatch, [[("a", [1], False)], [("b", [2], False)]])
    monkeypatch.setitem(
        reward.ANNOTATORS,
        "toy",
        lambda comparisons, axis, seed, folder: seeds.append(seed) or [found(0)],
    )
    for key in ((0, "sft"), (0, "dev"), (0, "rlhf-v1"), (0, "rlhf-v2")):
        collect_preferences(
            [0],
            toy_tokenizer(),
            toy_prompts(1),
            "helpfulness",
            annotator="toy",
            temperatures=(1, 1),
            key=key,
            folder=tmp_path,
        )
    assert len(set(map(str, seeds))) == 4


def test_pick_prompts():
    prompts = toy_prompts(300)
    safety, helpfulness = pick_prompts(prompts, "safety", 80, 0), pick_prompts(
        prompts, "helpfulness", 80, 0
    )
    assert (
        sum(p["kind"] != "ordinary" for p in safety) == 60 and len(safety) == len(helpfulness) == 80
    )
    assert (
        sum(p["kind"] == "unsafe" for p in helpfulness) == 8
        and sum(p["kind"] == "unsafe" for p in safety) > 10
    )
    for picked in (safety, helpfulness):
        assert len({p["prompt"][0]["content"] for p in picked}) == 80
    assert (
        safety == pick_prompts(prompts, "safety", 80, 0) != pick_prompts(prompts, "safety", 80, 1)
    )
    assert len({p["kind"] for p in safety[:20]}) == 3, "shuffled"
    many = Counter(p["prompt"][0]["content"] for p in pick_prompts(prompts, "safety", 10**6, 0))
    assert (
        len(many) == 300 and max(many.values()) == 2 and many.total() == 400
    ), "harmless ones may come twice, risky ones once"


def test_report(capsys):
    model, tokenizer = tiny_reward_model(), toy_tokenizer()
    [prompt] = [p for p in toy_prompts(3) if p["kind"] == "ordinary"]
    right = world.write_answer(random.Random(0), prompt, "careful")
    rows = [
        prompt | {"chosen": right, "rejected": BAD, "rating": "better"},
        prompt | {"chosen": BAD, "rejected": right, "rating": "better"},
    ]
    table = report(model, tokenizer, rows, "helpfulness")
    assert table["annotator"] == {"better": 0.5, "average": 0.5}
    assert table["reward model"] == accuracy_by_rating(
        *score_pairs(model, tokenizer, rows), ["better"] * 2
    )
    assert report(model, tokenizer, rows[:1], "helpfulness")["annotator"]["average"] == 1
    assert "helpfulness: accuracy on 2 held-out pairs" in capsys.readouterr().out
    assert set(report(model, tokenizer, [pair()], "safety")) == {
        "reward model"
    }, "no annotator for prompts from elsewhere"


def test_main_on_preferences_of_ones_own(tmp_path):
    """`--data`: the file is trained on as it is; unknown ratings have margin 0, missing labels no
    auxiliary loss.
    """
    out, _ = chain()
    path = write_lines(
        tmp_path / "mine.jsonl",
        [
            # held out by prompt
            {k: v for k, v in row.items() if v is not None} | {"prompt": [user(f"Question {i}?")]}
            for i, row in enumerate(LABELLED * 6)
        ],
    )
    printed = run_quietly(
        reward.main,
        *TINY,
        "--out",
        tmp_path,
        "--init",
        out / "sft",
        "--data",
        path,
        "--epochs",
        3,
        "--batch-tokens",
        1200,
        "--learning-rate",
        5e-4,
    )
    assert "accuracy on 2 held-out pairs" in printed
    for axis in AXES:
        assert runtime.is_finished(tmp_path / f"reward-{axis}")
        log = [
            json.loads(line)
            for line in (tmp_path / f"reward-{axis}" / "metrics.jsonl").read_text().splitlines()
        ]
        assert {row["phase"] for row in log} == {axis} and log[-1]["loss"] < log[0]["loss"]


def test_one_axis_alone_is_the_same_as_both(tmp_path):
    """A reward model does not depend on whether the other one was made before it in the same
    process.
    """
    out, _ = chain()
    path = write_lines(
        tmp_path / "mine.jsonl",
        [{k: v for k, v in row.items() if v is not None} for row in LABELLED * 3],
    )
    for name, axis in (("both", "both"), ("one", "safety")):
        run_quietly(
            reward.main,
            *TINY,
            "--out",
            tmp_path / name,
            "--init",
            out / "sft",
            "--data",
            path,
            "--axis",
            axis,
        )
    one, both = (
        load_reward_model(tmp_path / name / "reward-safety")[0].state_dict()
        for name in ("one", "both")
    )
    assert all(torch.equal(one[name], both[name]) for name in one)
