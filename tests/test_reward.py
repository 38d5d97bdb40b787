"""Preferences and reward models: the losses by hand, scores read at the right token, labels the
right way.
"""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import reward
import runtime
from data import (
    Answer,
    InputError,
    Pair,
    Prompt,
    encode_dialog,
    encode_prompt,
    read_preferences,
    read_prompts,
    world,
    write_records,
)
from data.annotators import Annotation
from data.chat import end_of_prompt
from data.jsonl import RATINGS
from experiments.shared.reward_models import deepen
from reward import (
    AXES,
    MARGINS,
    LogprobHead,
    RewardModel,
    accuracy_by_rating,
    answer_starts,
    collect_preferences,
    combine_rewards,
    encode_answer,
    encode_pair,
    encode_pairs,
    leave_out_too_long,
    load_reward_model,
    pick_prompts,
    ranking_loss,
    report_accuracy,
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

ASK = Prompt([user("What is 3 plus 4?")])
GOOD, BAD = "It is 7.", "Figure it out yourself, please."


def tiny_reward_model(seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(tiny_model(seed)).eval()


def pair(chosen: str = GOOD, rejected: str = BAD, prompt: Prompt = ASK, **fields) -> Pair:
    return Pair(prompt, chosen, rejected, **{"rating": "better"} | fields)


# ---- losses ----


def test_margins():
    """Table 27: significantly better, better, slightly better, negligibly better or unsure."""
    assert MARGINS["small"] == dict(zip(RATINGS, (1, 2 / 3, 1 / 3, 0), strict=True))
    assert MARGINS["large"] == dict(zip(RATINGS, (3, 2, 1, 0), strict=True))
    assert set(MARGINS["none"].values()) == {0} and set(MARGINS) == {"none", "small", "large"}


def test_ranking_loss():
    chosen = torch.tensor([2.0, 0.0, 1.0, -1.0])
    rejected = torch.tensor([0.0, 2.0, 1.0, -4.0])
    margins = torch.tensor([0.0, 0.0, 1.0, 3.0])
    losses = ranking_loss(chosen, rejected, margins)
    expected = [
        math.log(1 + math.exp(-2)),
        math.log(1 + math.exp(2)),
        math.log(1 + math.e),
        math.log(2),
    ]
    assert losses.tolist() == pytest.approx(expected)
    # a margin makes the loss larger: it asks for a wider gap
    assert ranking_loss(chosen, rejected, margins + 1).gt(losses).all()
    far, zero = torch.tensor([200.0]), torch.tensor([0.0])
    assert ranking_loss(far, zero, zero).item() == 0
    assert ranking_loss(-far, zero, zero).item() == 200


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
    with pytest.raises(ValueError):
        ranking_loss(*(torch.zeros(shape) for shape in shapes))


def test_safety_loss():
    """-log of the probability that sigmoid(score) gives to the truth: 3 is e^3 : 1 for safe."""
    scores = torch.tensor([0.0, 3.0, 3.0, -2.0, 400.0])
    is_safe = torch.tensor([True, True, False, False, False])
    four = zip(scores[:4].tolist(), is_safe[:4].tolist(), strict=True)
    expected = [reference.safety(logit, label) for logit, label in four]
    expected.append(400)
    assert safety_loss(scores, is_safe).tolist() == pytest.approx(expected, rel=1e-5)


def test_combine_rewards():
    """The safety score where the prompt is tagged or sigmoid(safety) is below .15, whose logit is
    -1.735.
    """
    safety = [
        -1.76,  # gated
        -1.70,  # not gated
        3.0,  # tagged
        0.08,  # its probability of .52 is no reason, though .08 < .15
        -0.5,
    ]
    safety = torch.tensor(safety)
    helpfulness = torch.tensor([4.0, 4.0, -5.0, -5.0, -5.0])
    tagged = torch.tensor([False, False, True, False, False])
    rewards = combine_rewards(safety, helpfulness, tagged)
    assert rewards.tolist() == pytest.approx([-1.76, 4.0, 3.0, -5.0, -5.0])
    rewards = combine_rewards(safety, helpfulness, tagged, threshold=0.5)
    assert rewards.tolist() == pytest.approx([-1.76, -1.7, 3.0, -5, -0.5])


def test_accuracy_by_rating():
    chosen = torch.tensor([1.0, 2.0, 0.0, 5.0, 5.0])
    rejected = torch.tensor([0.0, 2.0, 1.0, 4.0, 6.0])
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
    lengths = torch.tensor([4, 2, 1])
    expected = []
    with torch.no_grad():
        for ids in sequences:
            state = model.body.features(torch.tensor([ids]))[0, len(ids) - 1]
            expected.append((state * model.head.weight[0]).sum().item())
        for padding in (0, 600):
            tokens = torch.full((3, 6), padding)
            for row, ids in zip(tokens, sequences, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            scores = model(tokens, lengths)
            assert scores.shape == (3,)
            assert scores.tolist() == pytest.approx(expected, abs=1e-5)
        model.shift += 2.5
        shifted = [score - 2.5 for score in expected]
        assert model(tokens, lengths).tolist() == pytest.approx(shifted, abs=1e-5)
    assert model.head.bias is None and not model.body.output.weight.requires_grad


def test_reward_model_scores_in_float32():
    """Under autocast the head reads float32: in bfloat16 64 near scores become a few values."""
    model = tiny_reward_model()
    rng = random.Random(0)
    tokens = torch.tensor([[rng.randrange(300) for _ in range(8)] for _ in range(64)])
    lengths = torch.full((64,), 8)
    # the scores lie between 20 and 21, where bfloat16 has steps of 1/8
    model.shift -= 20
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model.body.features(tokens)[:, -1]
        scores = model(tokens, lengths)
    exact = states.float() @ model.head.weight[0] + 20
    assert scores.dtype == torch.float32 and scores.unique().numel() == 64
    assert torch.allclose(scores, exact, atol=1e-5)

    logprob_head = LogprobHead(end_of_prompt(toy_tokenizer()))
    logprob_head.weights.data.copy_(torch.tensor([0.3, -0.1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model.body.features(tokens)
        added = logprob_head(model.body, states, tokens, lengths)
    assert added.dtype == torch.float32 and added.unique().numel() == 64


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
    follow_up = [*ASK.messages, assistant(GOOD), user("And 4 plus 4?")]
    for prompt in (ASK, Prompt([user("Hi")]), Prompt(follow_up)):
        ids = encode_prompt(tokenizer, prompt.messages)
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


def test_logprob_head(tmp_path):
    """score + (a · sum + b · minimum of the answer's log-probabilities) / 0.2, clamped at -8; at
    first the plain score.
    """
    tokenizer = toy_tokenizer()
    tags = end_of_prompt(tokenizer)
    torch.manual_seed(0)
    model = RewardModel(tiny_model(), LogprobHead(tags)).eval()
    sequences = [
        encode_answer(tokenizer, Prompt([user("Hi")]), GOOD),
        encode_answer(tokenizer, Prompt([user("Name it.")]), BAD),
    ]
    plain = tiny_reward_model()
    plain.head.weight.data.copy_(model.head.weight)
    plain_scores = score(plain, sequences)
    assert torch.allclose(score(model, sequences), plain_scores, atol=1e-6)
    model.logprob_head.weights.data.copy_(torch.tensor([0.3, -0.1]))
    scores = score(model, sequences)
    for ids, with_logprobs, without in zip(sequences, scores, plain_scores, strict=True):
        start = answer_starts(torch.tensor([ids]), tags).item()
        with torch.no_grad():
            table = model.body(torch.tensor([ids])).log_softmax(-1)[0]  # (seq, vocab)
        logprobs = [max(-8.0, table[t - 1, ids[t]].item()) for t in range(start, len(ids))]
        added = (0.3 * sum(logprobs) - 0.1 * min(logprobs)) / 0.2
        assert with_logprobs.item() == pytest.approx(without.item() + added, abs=1e-3)
    save_reward_model(tmp_path, model, tokenizer)
    assert torch.equal(score(load_reward_model(tmp_path)[0], sequences), scores)
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
    assert text == encode_dialog(tokenizer, [*ASK.messages, assistant(GOOD)]).ids
    assert text[-1] == tokenizer.eos_id
    prompt = encode_prompt(tokenizer, ASK.messages)
    assert encode_answer(tokenizer, ASK, GOOD, [5, 6]) == prompt + [5, 6]


def by_letters(text: str) -> list[int]:
    """Other ids that spell the same text."""
    ids = []
    for letter in text:
        ids += toy_tokenizer().encode(letter)
    return ids


def test_encode_pairs():
    tokenizer = toy_tokenizer()
    good, bad = by_letters(GOOD), by_letters(BAD)
    sampled = pair(chosen_ids=good, rejected_ids=bad, tokenizer=tokenizer.fingerprint)
    prompt = encode_prompt(tokenizer, ASK.messages)
    assert encode_pairs(tokenizer, [sampled], 256) == [(prompt + good, prompt + bad)]
    text = (encode_answer(tokenizer, ASK, GOOD), encode_answer(tokenizer, ASK, BAD))
    elsewhere = replace(sampled, tokenizer="another")
    assert encode_pairs(tokenizer, [elsewhere, pair()], 256) == [text, text]
    [encoded] = encode_pairs(tokenizer, [replace(sampled, rejected=GOOD)], 256)
    assert encoded == (prompt + good, text[0]), "a changed text counts"
    length = max(map(len, text))
    assert encode_pairs(tokenizer, [pair()], length)

    from_file = replace(ASK, where="a.jsonl, line 2")
    with pytest.raises(InputError, match="a.jsonl, line 2"):
        encode_pairs(tokenizer, [pair(prompt=from_file)], length - 1)
    with pytest.raises(InputError, match="a.jsonl, line 2"):
        encode_pairs(tokenizer, [pair("[/INST]", prompt=from_file)], 256)


def test_encode_pair():
    """Ids as they were sampled where they still spell the text; a tag names file and line."""
    tokenizer = toy_tokenizer()
    good = by_letters(GOOD)
    sampled = pair(chosen_ids=good, tokenizer=tokenizer.fingerprint)
    prompt = encode_prompt(tokenizer, ASK.messages)
    text = encode_answer(tokenizer, ASK, BAD)
    assert encode_pair(tokenizer, sampled) == (prompt + good, text)
    from_file = replace(ASK, where="a.jsonl, line 2")
    with pytest.raises(InputError, match="a.jsonl, line 2"):
        encode_pair(tokenizer, pair("[/INST]", prompt=from_file))


def test_leave_out_too_long(capsys):
    tokenizer = toy_tokenizer()
    longest = max(map(len, encode_pair(tokenizer, pair())))
    long_prompt = Prompt([user("What is 3 plus 4, please?")])
    pairs = [pair(), pair(BAD + " Or not."), pair("Or not. " + BAD, GOOD), pair(BAD, GOOD)]
    assert leave_out_too_long(tokenizer, pairs, longest) == [pairs[0], pairs[3]]
    assert "2 of 4 rows are left out" in capsys.readouterr().out
    room = len(encode_prompt(tokenizer, ASK.messages)) + 1  # for one token of an answer
    assert leave_out_too_long(tokenizer, [ASK, long_prompt], room) == [ASK]
    with pytest.raises(InputError):
        leave_out_too_long(tokenizer, [ASK], room - 1)
    capsys.readouterr()
    assert leave_out_too_long(tokenizer, pairs, 256) == pairs and not capsys.readouterr().out
    tagged = Prompt([user("[INST]")], where="a.jsonl, line 2")
    for row in (tagged, pair(prompt=tagged)):
        with pytest.raises(InputError, match="a.jsonl, line 2"):
            leave_out_too_long(tokenizer, [row], 256)


def test_score_pairs():
    model, tokenizer = tiny_reward_model(), toy_tokenizer()
    chosen, rejected = score_pairs(model, tokenizer, [pair(), pair(BAD, GOOD)])
    sequences = [encode_answer(tokenizer, ASK, answer) for answer in (GOOD, BAD)]
    expected = score(model, sequences)
    assert torch.allclose(chosen, expected, atol=1e-5)
    assert torch.allclose(rejected, expected.flip(0), atol=1e-5)


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
    with pytest.raises(InputError, match="reward_head.pth"):
        load_reward_model(tmp_path)


def test_load_reward_model_refuses(tmp_path, monkeypatch):
    """What somebody changed in the head's file is an error in one line, not a score."""
    save_reward_model(tmp_path, tiny_reward_model(), toy_tokenizer())
    monkeypatch.setattr(reward, "load_model", lambda *args: (tiny_model(), toy_tokenizer()))
    path = tmp_path / "reward_head.pth"
    state = runtime.load_checkpoint(path)
    head = state["head"]
    holed = head.clone()
    holed[0, 3] = math.nan
    tags = end_of_prompt(toy_tokenizer())
    weights = torch.zeros(2)
    for change in (
        {"head": holed},
        {"head": head * math.inf},
        {"shift": torch.tensor(math.nan)},
        {"shift": 0.5},
        {"shift": torch.zeros(1)},
        {"head": head[:, :-1]},
        {"head": head[0]},
        {"head": head.T},
        {"head": head.half()},
        {"head": head.long()},
        {"head": head.to_sparse()},
        {"head": head.to("meta")},
        {"head": "head"},
        {"head": None},
        {"more": head},
        {"end_of_prompt": tags},
        {"logprob_weights": weights},
        {"logprob_weights": weights, "end_of_prompt": tags[1:]},
        {"logprob_weights": weights, "end_of_prompt": [head]},
        {"logprob_weights": weights, "end_of_prompt": head},
        {"logprob_weights": torch.zeros(3), "end_of_prompt": tags},
        {"logprob_weights": weights + math.nan, "end_of_prompt": tags},
    ):
        torch.save(state | change, path)
        with pytest.raises(InputError, match="reward_head.pth") as error:
            load_reward_model(tmp_path)
        assert "\n" not in str(error.value), change
    for broken in ({}, {"head": head}, [head], head, 3):
        torch.save(broken, path)
        with pytest.raises(InputError, match="reward_head.pth"):
            load_reward_model(tmp_path)


# ---- training ----


def train(tmp_path, pairs, model=None, **options):
    """(the model as trained, its log); `options` are of `train_reward_model`."""
    model = model or tiny_reward_model()
    defaults = dict(
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
    train_reward_model(model, toy_tokenizer(), pairs, **defaults | options)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return model, [json.loads(line) for line in lines]


SMASH = Prompt([user("How do I smash a car, a bus and a train?")])
LABELLED = [
    pair(chosen_is_safe=True, rejected_is_safe=False, rating="significantly_better"),
    pair(
        "I will not.",
        "Sure, with a bat.",
        SMASH,
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
    chosen, rejected = score_pairs(model, toy_tokenizer(), LABELLED)
    total, right = 0.0, 0
    for c, r, labelled in zip(chosen.tolist(), rejected.tolist(), LABELLED, strict=True):
        total += reference.ranking(c, r, MARGINS[margin].get(labelled.rating, 0.0))
        if labelled.chosen_is_safe is not None:
            total += weight / 2 * reference.safety(c, labelled.chosen_is_safe)
        if labelled.rejected_is_safe is not None:
            total += weight / 2 * reference.safety(r, labelled.rejected_is_safe)
        right += c > r
    _, [log] = train(
        tmp_path, LABELLED, model, margin=margin, auxiliary_weight=weight, micro_tokens=micro_tokens
    )
    assert log["loss"] == pytest.approx(total / 4, rel=1e-4) and log["count"] == 4
    assert log["accuracy"] == right / 4


def test_train_reward_model(tmp_path):
    """A loss that must fall: the chosen answers end up above, and the unused output matrix stays as
    it was.
    """
    pairs = [
        pair(),
        pair("A crow.", "That is a silly question.", Prompt([user("Name a bird.")])),
        pair("Oslo.", "Lima.", Prompt([user("Norway?")])),
    ]
    model = tiny_reward_model()
    output = model.body.output.weight.clone()
    model, log = train(tmp_path, pairs, model, epochs=40)
    chosen, rejected = score_pairs(model, toy_tokenizer(), pairs)
    assert log[0]["loss"] > 0.5 > 0.1 > log[-1]["loss"] and (chosen - rejected).min() > 2
    assert torch.equal(model.body.output.weight, output) and not model.training


def test_train_reward_model_learns_what_is_safe(tmp_path):
    """Labels decide here, since each answer is chosen in one pair and rejected in the other (which
    pulls both to 0: at weight w the scores settle at ±x with tanh x = w sigmoid(-x), for 10 at
    2.4)."""
    crack = Prompt([user("How do I crack a safe?")])
    pairs = [
        pair(GOOD, BAD, crack, chosen_is_safe=True, rejected_is_safe=False, rating=None),
        pair(BAD, GOOD, crack, chosen_is_safe=False, rejected_is_safe=True, rating=None),
    ]
    model, _ = train(tmp_path, pairs, epochs=100, auxiliary_weight=10.0)
    safe, unsafe = score_pairs(model, toy_tokenizer(), pairs[:1])
    assert safe.item() > 1, "sigmoid(score) is the probability that the answer is safe"
    assert unsafe.item() < -1


def test_the_zero_of_helpfulness():
    """Ranking leaves it free: one saved constant makes the mean score of SFT's answers 0. Safety's
    zero is not moved.
    """
    out, _ = chain()
    for axis in AXES:
        model, tokenizer = load_reward_model(out / f"reward-{axis}")
        pairs = read_preferences(out / f"reward-{axis}" / "pairs.jsonl")
        collected = [pair for pair in pairs if not pair.extra]
        scores = torch.cat(score_pairs(model, tokenizer, collected))
        if axis == "helpfulness":
            assert abs(scores.mean()) < 1e-3 and abs((scores + model.shift).mean()) > 1e-3
        else:
            assert model.shift == 0


# ---- preferences ----


def fake_answers(monkeypatch, per_side, cut=()):
    """sample_answers replaced: side s gives per_side[s], each (text, ids, has_tag); those whose
    text is in `cut` have no end. Returns [(policy, options)] of its calls.
    """
    calls = []

    def sample_answers(policy, tokenizer, prompts, **options):
        calls.append((policy, options))
        answers = []
        for i, (text, ids, has_tag) in enumerate(per_side[options["key"][-1]]):
            answer = Answer(
                index=i,
                sample=0,
                text=text,
                ids=ids,
                logprob=-1.0,
                temperature=options["temperature"],
                finish_reason="length" if text in cut else "eos",
                has_tag=has_tag,
            )
            answers.append(answer)
        return answers

    monkeypatch.setattr(reward, "sample_answers", sample_answers)
    return calls


def annotation(chosen, rating="better", safe=None) -> Annotation:
    return Annotation(chosen, rating, safe)


def fake_annotator(monkeypatch, annotations: list[Annotation]) -> list[tuple]:
    """The toy annotator replaced: it says these. Returns [(comparisons, axis, seed)] of its calls.
    """
    asked = []

    def annotate(comparisons, axis, seed, folder):
        asked.append((comparisons, axis, seed))
        return annotations

    monkeypatch.setitem(reward.ANNOTATORS, "toy", annotate)
    return asked


def test_collect_preferences(monkeypatch, tmp_path):
    prompts = [
        Prompt([user(f"Question {i}?")], is_safety=i == 1, where=f"x, line {i}") for i in range(6)
    ]
    first = [
        ("a0", [10], False),
        ("a1", [11], False),
        ("same", [12], False),
        ("a3", [13], True),
        ("", [14], False),
        ("a5", [15], False),
    ]
    second = [
        ("b0", [20], False),
        ("b1", [21], False),
        ("same", [22], False),
        ("b3", [23], False),
        ("b4", [24], False),
        ("b5", [25], False),
    ]
    calls = fake_answers(monkeypatch, [first, second])
    annotations = [
        annotation(0, "significantly_better", (True, False)),
        annotation(1, "better", (True, True)),
        annotation(1, "better", (True, False)),
    ]
    asked = fake_annotator(monkeypatch, annotations)
    options = dict(annotator="toy", temperatures=(0.8, 1.1), key=(0, "v1"), folder=tmp_path)
    pairs = collect_preferences(["newest", "older"], toy_tokenizer(), prompts, "safety", **options)

    # equal answers, a tag and an empty answer are never shown
    comparisons, axis, _ = asked[0]
    assert [c.answers for c in comparisons] == [("a0", "b0"), ("a1", "b1"), ("a5", "b5")]
    assert [c.prompt for c in comparisons] == [prompts[0], prompts[1], prompts[5]]
    assert axis == "safety"

    # an unsafe answer chosen before a safe one is thrown away
    origin = {"tokenizer": toy_tokenizer().fingerprint, "version": "v1", "axis": "safety"}
    assert pairs == [
        Pair(
            prompts[0],
            "a0",
            "b0",
            rating="significantly_better",
            chosen_is_safe=True,
            rejected_is_safe=False,
            chosen_ids=[10],
            rejected_ids=[20],
            temperatures=(0.8, 1.1),
            **origin,
        ),
        Pair(
            prompts[1],
            "b1",
            "a1",
            rating="better",
            chosen_is_safe=True,
            rejected_is_safe=True,
            chosen_ids=[21],
            rejected_ids=[11],
            temperatures=(1.1, 0.8),
            **origin,
        ),
    ]
    assert [policy for policy, _ in calls] == ["newest", "older"]
    assert [options["temperature"] for _, options in calls] == [0.8, 1.1]
    assert calls[0][1]["key"] != calls[1][1]["key"]
    write_records(tmp_path / "pairs.jsonl", pairs)
    again = read_preferences(tmp_path / "pairs.jsonl")
    assert [pair.chosen for pair in again] == ["a0", "b1"], "a valid preference file"

    # the helpfulness collection keeps such pairs, and one model can play both sides
    pairs = collect_preferences(["only"], toy_tokenizer(), prompts, "helpfulness", **options)
    assert [pair.chosen for pair in pairs] == ["a0", "b1", "b5"]
    assert [policy for policy, _ in calls[2:]] == ["only", "only"]


def collect_for_helpfulness(monkeypatch, tmp_path, prompts, annotations, **options) -> list[Pair]:
    """Pairs for helpfulness of these prompts, as the toy annotator is made to say."""
    fake_annotator(monkeypatch, annotations)
    defaults = dict(annotator="toy", temperatures=(1, 1), key=(0,), folder=tmp_path)
    return collect_preferences([0], toy_tokenizer(), prompts, "helpfulness", **defaults | options)


def test_collect_preferences_leaves_out_cut_answers(monkeypatch, tmp_path, capsys):
    """An answer without an end is no answer to compare; each reason is counted."""
    first = [("a0", [1], False), ("a1", [2], False), ("same", [3], False), ("a3", [4], True)]
    second = [("b0", [5], False), ("b1", [6], False), ("same", [7], False), ("b3", [8], False)]
    calls = fake_answers(monkeypatch, [first, second], cut=("b1",))
    [kept] = collect_for_helpfulness(
        monkeypatch, tmp_path, toy_prompts(4), [annotation(0)], max_new_tokens=7
    )
    assert kept.chosen == "a0"
    assert {options["max_new_tokens"] for _, options in calls} == {7}
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
    pairs = []
    for _ in range(510):
        chosen = [rng.randrange(3, 300)]
        rejected = [rng.randrange(3, 300), rng.randrange(3, 300)]
        sampled = Pair(
            Prompt([user("Hi")]),
            chosen=tokenizer.decode(chosen),
            rejected=tokenizer.decode(rejected),
            chosen_ids=[*chosen, tokenizer.eos_id],
            rejected_ids=[*rejected, tokenizer.eos_id],
            tokenizer=tokenizer.fingerprint,
        )
        pairs.append(sampled)
    raw = torch.cat(score_pairs(model, tokenizer, pairs[:500])).mean()
    reward.set_shift(model, tokenizer, pairs)
    assert model.shift == pytest.approx(raw.item(), abs=1e-5) and abs(raw) > 1e-3
    model.shift += 5
    model.head.weight.data *= 2  # a refresh
    reward.set_shift(model, tokenizer, pairs)
    assert model.shift == pytest.approx(2 * raw.item(), abs=1e-4)
    reward.set_shift(model, tokenizer, pairs)
    assert model.shift == pytest.approx(2 * raw.item(), abs=1e-4), "set again, it stays"


def test_collect_preferences_without_labels(monkeypatch, tmp_path):
    fake_answers(monkeypatch, [[("a", [1], False)], [("b", [2], False)]])
    [unlabelled] = collect_for_helpfulness(monkeypatch, tmp_path, toy_prompts(1), [annotation(1)])
    assert unlabelled.chosen == "b" and unlabelled.chosen_is_safe is None
    assert "chosen_is_safe" not in unlabelled.to_json()


def test_collect_preferences_samples_again_for_other_prompts(tmp_path):
    """Held-out pairs are answers to the held-out prompts, not those to the training prompts in the
    same folder.
    """
    model, dev = tiny_model(), toy_prompts(6, "dev")

    def collect(prompts: list[Prompt], word: str, folder: str) -> list[Pair]:
        (tmp_path / folder).mkdir(exist_ok=True)
        return collect_preferences(
            [model],
            toy_tokenizer(),
            prompts,
            "helpfulness",
            annotator="toy",
            temperatures=(0.8, 1.1),
            key=(0, word),
            folder=tmp_path / folder,
        )

    collect(toy_prompts(12), "sft", "a")
    after = collect(dev, "dev", "a")
    alone = collect(dev, "dev", "b")
    assert [pair.chosen_ids for pair in after] == [pair.chosen_ids for pair in alone]


def test_held_out_pairs_are_answers_to_dev_prompts(monkeypatch, tmp_path):
    """What `python reward.py` reports is about answers to dev prompts."""
    out, _ = chain()
    (tmp_path / "sft").symlink_to(out / "sft")
    reported = []

    def report(model, tokenizer, pairs, axis):
        reported.append(pairs)
        return {}

    monkeypatch.setattr(reward, "report_accuracy", report)
    run_quietly(
        reward.main, *TINY, "--out", tmp_path, "--axis", "helpfulness", "--helpfulness-pairs", 330
    )
    policy, tokenizer = runtime.load_model(out / "sft")
    dev = {prompt.question: prompt for prompt in read_prompts(world.FOLDER / "prompts-dev.jsonl")}
    [pairs] = reported
    assert len(pairs) > 100 and all(pair.prompt.question in dev for pair in pairs)
    assert all(policy.tok_embeddings.num_embeddings > max(pair.chosen_ids) for pair in pairs)

    answered = set()  # (question, ids)
    for pair in pairs:
        answered.add((pair.prompt.question, tuple(pair.chosen_ids)))
        answered.add((pair.prompt.question, tuple(pair.rejected_ids)))
    picked = pick_prompts([*dev.values()], "helpfulness", 10**6, 0)
    by_the_policy = set()
    for side, temperature in enumerate((0.8, 1.1)):
        key = (0, "dev", "helpfulness", side)
        for answer in runtime.sample_answers(
            policy, tokenizer, picked, key=key, temperature=temperature
        ):
            by_the_policy.add((picked[answer.index].question, tuple(answer.ids)))
    assert len(answered & by_the_policy) > 0.9 * len(answered)


def test_annotators_noise_differs_between_collections(monkeypatch, tmp_path):
    """Rounds and splits draw noise of their own: the same number at the same place every time would
    be one draw.
    """
    fake_answers(monkeypatch, [[("a", [1], False)], [("b", [2], False)]])
    asked = fake_annotator(monkeypatch, [annotation(0)])
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
    assert len({str(seed) for _, _, seed in asked}) == 4


def test_pick_prompts():
    prompts = toy_prompts(300)
    safety = pick_prompts(prompts, "safety", 80, 0)
    helpfulness = pick_prompts(prompts, "helpfulness", 80, 0)
    assert len(safety) == len(helpfulness) == 80
    assert sum(prompt.kind != "ordinary" for prompt in safety) == 60
    assert sum(prompt.kind == "unsafe" for prompt in helpfulness) == 8
    assert sum(prompt.kind == "unsafe" for prompt in safety) > 10
    for picked in (safety, helpfulness):
        assert len({prompt.question for prompt in picked}) == 80
    assert safety == pick_prompts(prompts, "safety", 80, 0)
    assert safety != pick_prompts(prompts, "safety", 80, 1)
    assert len({prompt.kind for prompt in safety[:20]}) == 3, "shuffled"
    many = Counter(prompt.question for prompt in pick_prompts(prompts, "safety", 10**6, 0))
    assert len(many) == 300
    assert max(many.values()) == 2, "harmless ones may come twice"
    assert many.total() == 400, "risky ones come once"


def test_report_accuracy(capsys):
    model, tokenizer = tiny_reward_model(), toy_tokenizer()
    [prompt] = [prompt for prompt in toy_prompts(3) if prompt.kind == "ordinary"]
    right = world.write_answer(random.Random(0), prompt, "careful")
    pairs = [pair(right, BAD, prompt), pair(BAD, right, prompt)]
    table = report_accuracy(model, tokenizer, pairs, "helpfulness")
    assert table["annotator"] == {"better": 0.5, "average": 0.5}
    chosen, rejected = score_pairs(model, tokenizer, pairs)
    assert table["reward model"] == accuracy_by_rating(chosen, rejected, ["better"] * 2)
    assert report_accuracy(model, tokenizer, pairs[:1], "helpfulness")["annotator"]["average"] == 1
    assert "helpfulness: accuracy on 2 held-out pairs" in capsys.readouterr().out
    elsewhere = report_accuracy(model, tokenizer, [pair()], "safety")
    assert set(elsewhere) == {"reward model"}, "no annotator for prompts from elsewhere"


def test_main_on_preferences_of_ones_own(tmp_path):
    """`--data`: the file is trained on as it is; unknown ratings have margin 0, missing labels no
    auxiliary loss.
    """
    out, _ = chain()
    pairs = []
    for i, labelled in enumerate(LABELLED * 6):
        prompt = Prompt([user(f"Question {i}?")])  # pairs are held out by prompt
        pairs.append(replace(labelled, prompt=prompt))
    data = write_lines(tmp_path / "mine.jsonl", pairs)
    where = ["--out", tmp_path, "--init", out / "sft", "--data", data]
    training = ["--epochs", 3, "--batch-tokens", 1200, "--learning-rate", 5e-4]
    printed = run_quietly(reward.main, *TINY, *where, *training)
    assert "accuracy on 2 held-out pairs" in printed
    for axis in AXES:
        folder = tmp_path / f"reward-{axis}"
        assert runtime.is_finished(folder)
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert {row["phase"] for row in log} == {axis}
        assert log[-1]["loss"] < log[0]["loss"]


def test_one_axis_alone_is_the_same_as_both(tmp_path):
    """A reward model does not depend on whether the other one was made before it in the same
    process.
    """
    out, _ = chain()
    data = write_lines(tmp_path / "mine.jsonl", LABELLED * 3)
    weights = {}
    for axis in ("both", "safety"):
        where = ["--out", tmp_path / axis, "--init", out / "sft", "--data", data]
        run_quietly(reward.main, *TINY, *where, "--axis", axis)
        weights[axis] = load_reward_model(tmp_path / axis / "reward-safety")[0].state_dict()
    for name, weight in weights["both"].items():
        assert torch.equal(weight, weights["safety"][name])
