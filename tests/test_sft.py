"""Supervised fine-tuning: the loss counts answers only, training learns them, a killed run goes on
bit for bit.
"""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import sft
from data import Dialog, InputError, encode_dialog, encode_prompt
from data.chat import encode_turn
from model import generate
from sft import answer_loss, encode_dialogs, finetune, held_out_loss, sft_loss, show_answers
from tests.helpers import (
    TINY,
    Kill,
    Killer,
    assistant,
    run_quietly,
    tiny_model,
    toy_dialogs,
    toy_tokenizer,
    user,
)
from tests.reference import losses as reference

SHORT = [
    [user("What is 3 plus 4?"), assistant("It is 7.")],
    [user("Hi"), assistant("Hello, dear friend!")],
    [user("Name a bird."), assistant("An owl."), user("Another?"), assistant("A crow.")],
]


def dialogs_of(messages, train_on="all"):
    return [encode_dialog(toy_tokenizer(), one, train_on) for one in messages]


def test_sft_loss():
    """Worked by hand: position t predicts token t + 1, and only tokens of answers count."""
    logits = torch.zeros(1, 4, 3)
    logits[0, 1] = torch.tensor([0.0, math.log(2), 0.0])  # probabilities 1/4, 1/2, 1/4 for token 2
    logits[0, 2] = torch.tensor([0.0, 0.0, math.log(6)])  # 1/8, 1/8, 3/4 for token 3
    # wildly wrong
    logits[0, 0], logits[0, 3] = torch.tensor([50.0, -50.0, -50.0]), torch.tensor(
        [-50.0, 50.0, 50.0]
    )
    tokens, mask = torch.tensor([[0, 2, 1, 2]]), torch.tensor([[False, False, True, True]])
    loss, count = sft_loss(logits, nn.Identity(), tokens, mask)
    assert count == 2 and loss.item() == pytest.approx(math.log(2) + math.log(4 / 3))
    last = torch.tensor([[False, False, False, True]])
    loss, count = sft_loss(logits, nn.Identity(), tokens, last)
    assert count == 1 and loss.item() == pytest.approx(math.log(4 / 3))
    # what is not trained on may be anything, and takes part in nothing
    logits[0, 0], logits[0, 2:] = math.nan, math.inf
    logits.requires_grad_()
    tokens, mask = torch.tensor([[-7, 2, 99, 10**9]]), torch.tensor([[True, False, True, False]])
    tokens[0, 2] = 1
    loss, count = sft_loss(logits, nn.Identity(), tokens, mask)
    loss.backward()
    assert count == 1 and loss.item() == pytest.approx(math.log(2))
    assert logits.grad.flatten(1).tolist() == [
        pytest.approx([0, 0, 0, 1 / 4, -1 / 2, 1 / 4, 0, 0, 0, 0, 0, 0])
    ]


def test_sft_loss_equals_the_slow_one():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 7, 5), torch.randint(5, (3, 7))
    mask = torch.rand(3, 7) < 0.5
    loss, count = sft_loss(logits, nn.Identity(), tokens, mask)
    expected, number = reference.sft(logits.tolist(), tokens.tolist(), mask.tolist())
    assert count == number == int(mask[:, 1:].sum()) and loss.item() == pytest.approx(
        expected, rel=1e-5
    )


def test_sft_loss_gradient_reaches_only_predictions_of_answers():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[False, False, True, True, False], [False, True, False, False, False]])
    sft_loss(logits, nn.Identity(), torch.randint(4, (2, 5)), mask)[0].backward()
    assert (logits.grad.abs().sum(-1) > 0).tolist() == [
        [False, True, True, False, False],
        [True, False, False, False, False],
    ]


def test_sft_loss_of_nothing():
    """All labels masked: an error, not NaN and not a quiet 0.0."""
    for mask in (
        torch.zeros(2, 4, dtype=torch.bool),
        torch.tensor([[True, False, False, False]] * 2),
    ):
        with pytest.raises(InputError):
            sft_loss(
                torch.zeros(2, 4, 3), nn.Identity(), torch.zeros(2, 4, dtype=torch.long), mask
            )


def test_sft_loss_in_bfloat16_is_summed_in_float32():
    logits = torch.randn(1, 2000, 8).bfloat16()
    tokens, mask = torch.randint(8, (1, 2000)), torch.ones(1, 2000, dtype=torch.bool)
    loss, _ = sft_loss(logits, nn.Identity(), tokens, mask)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(
        sft_loss(logits.double(), nn.Identity(), tokens, mask)[0].item(), rel=1e-4
    )


def test_answer_loss():
    """A padded batch gives the sum of its rows, and padding and questions count for nothing."""
    model, dialogs = tiny_model(), dialogs_of(SHORT)
    with torch.no_grad():
        whole, count = answer_loss(model, dialogs)
        singles = [answer_loss(model, [dialog]) for dialog in dialogs]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in singles), rel=1e-5)
    assert count == sum(n for _, n in singles) == sum(sum(dialog.loss_mask) for dialog in dialogs)
    ids, mask, _ = dialogs[0]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
    own = -sum(logprobs[t - 1, ids[t]].item() for t in range(len(ids)) if mask[t])
    assert singles[0][0].item() == pytest.approx(own, rel=1e-5)
    assert ids[-1] == toy_tokenizer().eos_id and mask[-1], "EOS is in the loss"


def test_encode_dialogs():
    tokenizer = toy_tokenizer()
    sampled = [
        token for piece in (" It", " i", "s", " 7", ".") for token in tokenizer.encode(piece)
    ] + [tokenizer.eos_id]
    assert (
        sampled != encode_turn(tokenizer, *(message["content"] for message in SHORT[0]))[1]
    ), "else the text would do"
    row = Dialog(SHORT[0], answer_ids=sampled, tokenizer=tokenizer.fingerprint)
    [dialog] = encode_dialogs(tokenizer, [row], 256)
    assert (
        dialog.ids == encode_prompt(tokenizer, SHORT[0][:1]) + sampled
    ), "the ids that were sampled"
    changed = replace(row, messages=[*SHORT[0][:1], assistant("It is 8.")])
    assert encode_dialogs(tokenizer, [changed], 256) == dialogs_of(
        [changed.messages]
    ), "a text that was changed counts"
    for control, ids in [
        ("BOS", [*sampled[:2], tokenizer.bos_id, *sampled[2:]]),
        ("a second EOS", [tokenizer.eos_id, *sampled]),
    ]:
        [dialog] = encode_dialogs(tokenizer, [replace(row, answer_ids=ids)], 256)
        assert dialog == dialogs_of(SHORT[:1])[0], f"{control} among the ids: the text"
    [dialog] = encode_dialogs(tokenizer, [replace(row, tokenizer="another")], 256)
    assert dialog == dialogs_of(SHORT[:1])[0], "another tokenizer's ids mean nothing here: the text"
    [dialog] = encode_dialogs(tokenizer, [Dialog(SHORT[2], train_on="last")], 256)
    assert dialog == dialogs_of(SHORT[2:], "last")[0]
    length = len(dialog.ids)
    assert encode_dialogs(tokenizer, [Dialog(SHORT[2])], length)
    for messages, context in ((SHORT[2], length - 1), ([user("<<SYS>>"), assistant("a")], 99)):
        with pytest.raises(InputError, match="a.jsonl, line 3"):
            encode_dialogs(tokenizer, [Dialog(messages, where="a.jsonl, line 3")], context)


def test_encode_dialogs_leaves_out_what_is_too_long(capsys):
    """skip: the others are kept as they are, and a line counts what is left out; never all."""
    tokenizer = toy_tokenizer()
    dialogs = [Dialog(messages) for messages in (SHORT[2], SHORT[0], SHORT[2])]
    short = encode_dialogs(tokenizer, dialogs[1:2], 256)
    longest = len(short[0].ids)
    assert encode_dialogs(tokenizer, dialogs, longest, "skip") == short
    assert f"2 of 3 dialogs are left out: longer than the model's context of {longest}" in (
        capsys.readouterr().out
    )
    assert len(encode_dialogs(tokenizer, dialogs, 256, "skip")) == 3
    assert capsys.readouterr().out == "" and encode_dialogs(tokenizer, [], 256, "skip") == []
    with pytest.raises(InputError):
        encode_dialogs(tokenizer, dialogs, longest - 1, "skip")
    with pytest.raises(InputError):
        encode_dialogs(tokenizer, [Dialog([user("[INST]"), assistant("a")])], 256, "skip")


def test_main_leaves_out_what_is_too_long(tmp_path):
    """Nor does it ask the model a question that is too long to be answered, to show how it is
    doing.
    """
    long = [user("many words " * 1500), assistant("Yes.")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (*SHORT[:2], long)))
    where = [*TINY, "--out", tmp_path, "--data", path, "--dev-data", path]
    with pytest.raises(InputError, match="line 3: the dialog has"):
        run_quietly(sft.main, *where)
    printed = run_quietly(sft.main, *where, "--too-long", "skip")
    assert printed.count("1 of 3 dialogs are left out") == 2, "of both files"
    assert "2 dialogs, " in printed and "What is 3 plus 4?" in printed
    other = ["--out", tmp_path / "other", "--data", path, "--dev-data", "none", "--max-rows", 2]
    assert "2 dialogs, " in run_quietly(sft.main, *TINY, *other), "the third is not read"


def test_held_out_loss():
    """Nats per token: tokens count alike, however they are batched."""
    model = tiny_model()
    dialogs = dialogs_of([dialog.messages for dialog in toy_dialogs(300)])
    found = [answer_loss(model, [dialog]) for dialog in dialogs[:80]]
    mean = sum(loss.item() for loss, _ in found) / sum(count for _, count in found)
    assert held_out_loss(model, dialogs[:80]) == pytest.approx(mean, rel=1e-5)
    batches = []
    original = sft.batches_by_length
    try:
        sft.batches_by_length = (
            lambda lengths, tokens: batches.append(original(lengths, 300)) or batches[-1]
        )
        assert (
            held_out_loss(model, dialogs[:80]) == pytest.approx(mean, rel=1e-5)
            and len(batches[0]) > 5
        )
    finally:
        sft.batches_by_length = original


def train(folder, dialogs, model=None, **options):
    model = model or tiny_model()
    options = (
        dict(
            epochs=1,
            batch_tokens=100,
            learning_rate=1e-2,
            phase="test",
            seed=0,
            warmup_fraction=0.0,
        )
        | options
    )
    finetune(model, dialogs, folder=folder, **options)
    return model, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_finetune(tmp_path):
    """A loss that must fall: a tiny model learns three dialogs by heart, and stops after each
    answer.
    """
    dialogs = dialogs_of(SHORT)
    model, log = train(tmp_path, dialogs, epochs=60)
    assert (
        log[0]["loss"] > 5
        and log[-1]["loss"] < 0.05
        and [row["step"] for row in log] == [*range(len(log))]
    )
    for messages in SHORT:
        prompt = encode_prompt(toy_tokenizer(), messages[:-1])
        [answer] = generate(model, [prompt], [(0,)], 30, 0.0, eos_id=toy_tokenizer().eos_id)
        assert (
            toy_tokenizer().decode(answer.ids).strip() == messages[-1]["content"]
            and answer.finish_reason == "eos"
        )
    assert not model.training


def test_finetune_learns_answers_alone(tmp_path):
    """Questions are not learned: their loss stays where it was while the answers' goes to nothing.
    """
    dialogs = dialogs_of(SHORT)
    questions = [
        dialog._replace(loss_mask=[not mark for mark in dialog.loss_mask]) for dialog in dialogs
    ]
    before = held_out_loss(tiny_model(), questions)
    model, _ = train(tmp_path, dialogs, epochs=60)
    assert held_out_loss(model, dialogs) < 0.05 and held_out_loss(model, questions) > before - 1


def test_finetune_train_on_last(tmp_path):
    model, _ = train(tmp_path, dialogs_of(SHORT[2:], "last"), epochs=60)
    everything, last = dialogs_of(SHORT[2:])[0], dialogs_of(SHORT[2:], "last")[0]
    first = everything._replace(
        loss_mask=[a and not b for a, b in zip(everything.loss_mask, last.loss_mask, strict=True)]
    )
    assert held_out_loss(model, [last]) < 0.05 and held_out_loss(model, [first]) > 3


@pytest.mark.parametrize("micro_tokens", [16384, 60, 1])
def test_finetune_accumulates(tmp_path, micro_tokens):
    """However a step is cut into micro-batches, its gradient is that of the sum of losses over the
    number of tokens.
    """
    dialogs = dialogs_of(
        [
            *SHORT,
            [
                user("Go"),
                assistant("A far longer answer than all the others are, on and on, and on."),
            ],
        ]
    )
    model = tiny_model().train()
    losses = [answer_loss(model, [dialog]) for dialog in dialogs]
    count = sum(n for _, n in losses)
    (sum(loss for loss, _ in losses) / count).backward()
    norm = torch.cat([w.grad.flatten() for w in model.parameters()]).norm().item()
    _, [row] = train(tmp_path, dialogs, batch_tokens=10**6, micro_tokens=micro_tokens)
    assert row["loss"] == pytest.approx(sum(loss.item() for loss, _ in losses) / count, rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4) and row["count"] == count


def test_finetune_goes_on_after_a_kill(tmp_path, monkeypatch):
    """Killed at any step and run again: the same weights, bit for bit, and the same log."""
    monkeypatch.setitem(sft.optimise.__kwdefaults__, "save_every", 2)
    dialogs = dialogs_of([dialog.messages for dialog in toy_dialogs(14)])
    with monkeypatch.context() as patch:
        counter = Killer(patch)
        expected, log = train(tmp_path / "whole", dialogs)
    assert len(log) >= 5 and counter.kinds.count("step") == len(log)
    for at in range(1, counter.events + 1, 2):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch, pytest.raises(Kill):
            Killer(patch, at)
            train(folder, dialogs)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"phase": "te')
        model, again = train(folder, dialogs)
        assert again == log
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected.state_dict()[name]), (at, name)


def test_finetune_refuses_to_diverge(tmp_path):
    """It stops at the step itself, not when it saves; and weights that are no numbers are never
    saved.
    """
    with pytest.raises(InputError, match="step 1 of test"):
        train(tmp_path / "a", dialogs_of(SHORT), learning_rate=1e18, epochs=9, batch_tokens=10**6)
    with pytest.raises(InputError, match="step 0 of test"):
        train(tmp_path / "b", dialogs_of(SHORT), learning_rate=1e300, batch_tokens=10**6)
    assert not list(tmp_path.rglob("*.pth"))


def test_show_answers(capsys):
    model = tiny_model()
    show_answers(model, toy_tokenizer(), [messages[:-1] for messages in SHORT], "after 3 steps")
    lines = capsys.readouterr().out.strip().splitlines()
    assert (
        lines[0] == "--- after 3 steps"
        and [
            messages[-2]["content"] in line for messages, line in zip(SHORT, lines[1:], strict=True)
        ]
        == [True] * 3
    )
    prompt = encode_prompt(toy_tokenizer(), SHORT[0][:1])
    [answer] = generate(model, [prompt], [(0, 0)], 64, 0.0, eos_id=toy_tokenizer().eos_id)
    assert repr(toy_tokenizer().decode(answer.ids).strip()) in lines[1] and model.training


def test_safety_rows_can_be_taken_out_by_share(tmp_path, monkeypatch):
    """--safety-share keeps about that share of the rows tagged is_safety and every other row."""
    rng, kept = random.Random(0), {}
    rows = [{"messages": SHORT[0], "is_safety": rng.random() < 0.5} for _ in range(400)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sft, "finetune", lambda *args, **options: None)
    encode = sft.encode_dialogs
    monkeypatch.setattr(
        sft,
        "encode_dialogs",
        lambda tokenizer, rows, *rest: kept.update(rows=rows) or encode(tokenizer, rows, *rest),
    )
    for share in (0, 0.25, 1):
        sft.main(
            [
                "--preset",
                "tiny",
                "--out",
                str(tmp_path / str(share)),
                "--data",
                str(path),
                "--dev-data",
                "none",
                "--safety-share",
                str(share),
            ]
        )
        safe = sum(not row["is_safety"] for row in rows)
        assert sum(not dialog.is_safety for dialog in kept["rows"]) == safe
        assert len(kept["rows"]) - safe == pytest.approx(share * (400 - safe), abs=0.03 * 400)
    with pytest.raises(InputError, match="--safety-share 0.0 leaves no dialog"):
        sft._keep_safety_share([Dialog(SHORT[0], is_safety=True)] * 9, 0.0)


# the optimiser, its schedule and the training loop


def test_adamw():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.RMSNorm(2))
    model[0].bias.requires_grad_(False)
    optimizer = sft.adamw(model, learning_rate=0.1, weight_decay=0.5)
    before = [weight.detach().clone() for weight in (model[0].weight, model[1].weight)]
    for weight in (model[0].weight, model[1].weight):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # no gradient: only decay moves a weight, by lr * decay of itself
    torch.testing.assert_close(model[0].weight, before[0] * 0.95)
    assert model[1].weight.equal(before[1])
    model[1].weight.grad = torch.full((2,), 1e-3)
    fresh = sft.adamw(model, learning_rate=0.1)
    fresh.step()  # the first step is lr * g / (|g| + eps)
    torch.testing.assert_close(model[1].weight, before[1] - 0.1 * 1e-3 / (1e-3 + 1e-5))
    assert all(group["betas"] == (0.9, 0.95) for group in fresh.param_groups)


def test_cosine_lr():
    rates = [sft.cosine_lr(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == max(rates) == 2.0
    assert rates[99] == pytest.approx(0.2) == sft.cosine_lr(500, 100, 2.0, 10)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert sft.cosine_lr(0, 1, 2.0, 0) == 2.0 and sft.cosine_lr(2, 3, 2.0, 4) == 1.5


def test_optimise(tmp_path):
    data = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    plan = [[[0, 1, 2], [3]], [[4, 5]], [[6, 7, 8], [9, 10]], [[11]], [[0, 5]]]

    def train(folder, die_at=None, micro=lambda step: step):
        torch.manual_seed(1)
        model, seen = torch.nn.Linear(3, 1), []

        def batch_loss(rows):
            if len(seen) == die_at:
                raise Kill
            seen.append(rows)
            error = model(data[rows]).square().sum()
            return error, len(rows), {"double": 2 * error.item()}

        sft.optimise(
            model,
            [micro(step) for step in plan],
            batch_loss,
            learning_rate=0.1,
            folder=folder,
            phase="fit",
            grad_clip=1e9,
            save_every=2,
        )
        return (
            model.weight.detach(),
            len(seen),
            [json.loads(row) for row in open(folder / "metrics.jsonl")],
        )

    whole, calls, log = train(tmp_path / "whole")
    assert calls == 7 and [row["count"] for row in log] == [4, 2, 5, 1, 2]
    assert all(row["double"] == pytest.approx(2 * row["loss"], rel=1e-5) for row in log)
    # killed in any step: the same weights to the last bit, the same log
    for die_at in range(calls):
        with pytest.raises(Kill):
            train(tmp_path / f"cut{die_at}", die_at)
        weight, again, cut_log = train(tmp_path / f"cut{die_at}")
        assert weight.equal(whole) and cut_log == log and (again < calls) == (die_at >= 3)
    joined = train(tmp_path / "joined", micro=lambda step: [sum(step, [])])[0]
    # accumulation over ragged micro-batches is not a mean of means
    torch.testing.assert_close(joined, whole)
    data[3] = math.inf
    with pytest.raises(InputError, match="step 0 of fit"):
        train(tmp_path / "inf")
