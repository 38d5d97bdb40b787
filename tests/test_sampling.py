"""Sampling many answers, and numbers for many sequences in batches."""

import json
from dataclasses import replace

import pytest
import torch

import runtime
from data import Answer, InputError, Prompt, encode_prompt
from model import Generation, generate
from runtime import encode_prompts, in_batches, sample_answers, unusable
from runtime.sampling import place, row_number
from tests.helpers import system, tiny_model, toy_prompts, toy_tokenizer, user

PROMPTS = [
    Prompt([user(text)])
    for text in ("Hi", "What is 3 plus 4?", "Name two birds.", "Hi", "Is 12 or 9 bigger?")
]


def sample(prompts=PROMPTS, **options):
    options = dict(key=(0, "v1"), samples=3, max_new_tokens=9) | options
    return sample_answers(tiny_model(), toy_tokenizer(), prompts, **options)


def ids_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


def test_sample_answers():
    answers = sample()
    assert list(map(place, answers)) == [(i, k) for i in range(5) for k in range(3)]
    for answer in answers:
        assert answer.text == toy_tokenizer().decode(answer.ids).strip()
        ended = answer.ids[-1] == toy_tokenizer().eos_id
        assert answer.finish_reason == ("eos" if ended else "length")
        assert answer.temperature == 1.0 and answer.has_tag is False and 0 < len(answer.ids) <= 9
    different = {tuple(answer.ids) for answer in answers}
    assert (
        len(different) == 15
    ), "every sample of every prompt, equal prompts too, has random numbers of its own"
    assert ids_of(answers) != ids_of(sample(key=(1, "v1")))
    assert ids_of(answers) != ids_of(sample(key=(0, "v2")))


def test_sample_answers_keys_do_not_depend_on_the_batch():
    """A row's random numbers are those of its key; the products of other batches differ in the last
    bits only.
    """
    twins = {place(answer): answer for answer in sample()}
    for options in (dict(batch_rows=1), dict(batch_rows=6), dict(samples=2)):
        for answer in sample(**options):
            twin = twins[place(answer)]
            assert answer.ids == twin.ids
            assert answer.logprob == pytest.approx(twin.logprob, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_sample_answers_logprob_is_the_models_own(temperature):
    """Summed log-probability at temperature 1, whatever it was sampled at, over the answer's ids
    with EOS.
    """
    model = tiny_model()
    for answer in sample(temperature=temperature, samples=1):
        prompt = encode_prompt(toy_tokenizer(), PROMPTS[answer.index].messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer.ids]))[0].log_softmax(-1)
        own = sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer.ids))
        assert answer.logprob == pytest.approx(own, abs=1e-3)


def test_sample_answers_at_several_temperatures():
    answers = sample(temperature=[0.0, 1.0, 0.0])
    assert [answer.temperature for answer in answers[:3]] == [0.0, 1.0, 0.0]
    for greedy, drawn, again in zip(answers[0::3], answers[1::3], answers[2::3], strict=True):
        assert greedy.ids == again.ids != drawn.ids
    assert ids_of(answers[1::3]) == ids_of(sample()[1::3])


def test_sample_answers_counts_tags(monkeypatch):
    tokenizer = toy_tokenizer()
    ids = [*tokenizer.encode(" see [INST] here"), tokenizer.eos_id]
    monkeypatch.setattr(
        runtime.sampling,
        "generate",
        lambda model, prompts, *args, **options: [
            Generation(ids, [-1.0] * len(ids), "eos") for _ in prompts
        ],
    )
    answer = sample()[0]
    assert answer.has_tag is True
    assert answer.text == "see [INST] here" and answer.logprob == -len(ids)


def test_sample_answers_goes_on_where_it_was(tmp_path, monkeypatch):
    """What is in the file is not sampled again; a batch that was cut is redone whole."""
    path, options = tmp_path / "answers.jsonl", dict(batch_rows=6)
    answers = sample(path=path, **options)
    written = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(written, key=row_number) == [answer.to_json() for answer in answers]
    whole, calls, generate = path.read_bytes(), [], runtime.sampling.generate
    monkeypatch.setattr(
        runtime.sampling,
        "generate",
        lambda model, prompts, *a, **k: calls.append(len(prompts))
        or generate(model, prompts, *a, **k),
    )
    for kept, expected in [(15, []), (14, [3]), (12, [3]), (11, [6, 3]), (0, [6, 6, 3])]:
        calls.clear()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:kept]) + (lines[kept][:20] if kept < 15 else b""))
        assert sample(path=path, **options) == answers and calls == expected
        assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    # cut by hand; two runs wrote at once
    for damaged in (sorted(lines)[:12], lines[:6] * 2, [*lines, *lines], lines[1:]):
        path.write_bytes(b"".join(damaged))
        assert sample(path=path, **options) == answers and path.read_bytes() == whole
    path.write_bytes(b"".join(reversed(lines)))
    calls.clear()
    assert (
        sample(path=path, **options) == answers and not calls
    ), "complete, in another order: as a round leaves it"


def test_row_number():
    assert row_number({"index": 3, "sample": 1, "answer": ""}) == (3, 1) and row_number({}) == (
        -1,
        -1,
    )


def test_sample_answers_shares_the_prefill(monkeypatch):
    """K answers from one reading of the prompt have the log-probabilities of K separate readings,
    to 1e-5 a token.
    """
    model, tokenizer = tiny_model(), toy_tokenizer()
    prompt = encode_prompt(tokenizer, PROMPTS[1].messages)
    keys, read, features = [(0, k) for k in range(6)], [], model.features
    monkeypatch.setattr(
        model,
        "features",
        lambda tokens, *rest, **options: read.append(tuple(tokens.shape))
        or features(tokens, *rest, **options),
    )
    shared = generate(model, [prompt] * 6, keys, 9, 1.0, eos_id=tokenizer.eos_id)
    assert read[0] == (1, len(prompt)), "the prompt is read once"
    for key, one in zip(keys, shared, strict=True):
        [alone] = generate(model, [prompt], [key], 9, 1.0, eos_id=tokenizer.eos_id)
        assert alone.ids == one.ids and alone.logprobs == pytest.approx(one.logprobs, abs=1e-5)


def test_sample_answers_wastes_nothing(monkeypatch):
    """Batches hold prompts of like length, and rows that have ended leave the batch."""
    model, batches, read = tiny_model(), [], []
    inner, features = runtime.sampling.generate, model.features
    monkeypatch.setattr(
        runtime.sampling,
        "generate",
        lambda model, prompts, *rest, **options: batches.append([len(prompt) for prompt in prompts])
        or inner(model, prompts, *rest, **options),
    )
    monkeypatch.setattr(
        model,
        "features",
        lambda tokens, *rest, **options: read.append(tuple(tokens.shape))
        or features(tokens, *rest, **options),
    )
    prompts = [Prompt([user("Hi " * n)]) for n in (9, 1, 6, 3, 8, 2)]
    sample_answers(
        model, toy_tokenizer(), prompts, key=(0, "v"), samples=2, max_new_tokens=3, batch_rows=4
    )
    assert [length for batch in batches for length in batch] == sorted(
        length for batch in batches for length in batch
    )
    assert [len(batch) for batch in batches] == [4, 4, 4]
    bonus = torch.zeros(toy_tokenizer().vocab_size).index_fill(
        0, torch.tensor(toy_tokenizer().eos_id), 6.0
    )
    # one token in five ends the answer
    model.output.register_forward_hook(lambda module, given, logits: logits + bonus)
    read.clear()
    answers = sample_answers(
        model, toy_tokenizer(), prompts, key=(0, "v"), samples=50, max_new_tokens=60, batch_rows=400
    )
    lengths = [len(answer.ids) for answer in answers]
    decoded = sum(size for size, width in read if width == 1)
    assert sum(lengths) - len(answers) <= decoded < 0.7 * len(answers) * max(lengths)


def test_sample_answers_finishes_each_batch(tmp_path):
    """`finish` sees a batch's answers before they are written; answers that are there already are
    not finished again.
    """
    path, seen = tmp_path / "answers.jsonl", []

    def finish(batch):
        seen.append(len(batch))
        return [replace(answer, reward=answer.index * 10 + answer.sample) for answer in batch]

    answers = sample(path=path, finish=finish, batch_rows=6)
    assert seen == [6, 6, 3] and [answer.reward for answer in answers] == [
        10 * i + k for i in range(5) for k in range(3)
    ]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:8]))
    assert sample(path=path, finish=finish, batch_rows=6) == answers and seen == [6, 6, 3, 6, 3]


def test_unusable():
    good = Answer(0, 0, "Yes.", [5, 2], -1.0, 1.0, "eos", has_tag=False)
    assert unusable(good) == ""
    assert unusable(replace(good, finish_reason="length")) == "cut at the length limit"
    assert unusable(replace(good, has_tag=True)) == "holds a tag or nothing"
    assert unusable(replace(good, text="")) == "holds a tag or nothing"


def test_sample_answers_refuses_tags():
    with pytest.raises(InputError, match="a.jsonl, line 7: the user's content holds the tag"):
        sample([Prompt([user("[INST]")], where="a.jsonl, line 7")])


def test_sample_answers_refuses_a_prompt_longer_than_the_context():
    with pytest.raises(InputError, match="a.jsonl, line 7: .*tokens"):
        sample([PROMPTS[0], Prompt([user("far too long " * 100)], where="a.jsonl, line 7")])


def test_sample_answers_keeps_system_prompts():
    prompts = [Prompt([system("Be brief."), *prompt.messages]) for prompt in toy_prompts(3)]
    assert [answer.index for answer in sample(prompts, samples=1)] == [0, 1, 2]


def test_in_batches():
    sequences = [[5] * n for n in (3, 9, 1, 7, 2)]
    seen = []

    def forward(batch):
        seen.append(len(batch))
        return torch.tensor([sum(ids) for ids in batch])

    assert in_batches(forward, sequences, batch_tokens=8).tolist() == [15, 45, 5, 35, 10]
    assert len(seen) > 2, "several batches, results in the order given"
    assert in_batches(forward, []).tolist() == []


def test_encode_prompts():
    prompts = toy_prompts(4)
    assert encode_prompts(toy_tokenizer(), prompts, 256) == [
        encode_prompt(toy_tokenizer(), prompt.messages) for prompt in prompts
    ]
    with pytest.raises(
        InputError, match="file, line 3: the prompt has [0-9]+ tokens, the model's context only 8"
    ):
        encode_prompts(toy_tokenizer(), [Prompt([user("a " * 9)], where="file, line 3")], 8)
    with pytest.raises(InputError, match="line 4: the user's content holds the tag"):
        encode_prompts(toy_tokenizer(), [Prompt([user("[INST]")], where="line 4")], 99)
