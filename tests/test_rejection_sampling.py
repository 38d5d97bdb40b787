"""Rejection sampling: the best of all answers of all rounds, used as it was sampled."""

import itertools
import json
import random
import re
import shutil

import pytest
import torch

import rejection_sampling
import runtime
import sft
from data import (
    InputError,
    encode_dialog,
    encode_prompt,
    read_jsonl,
    read_preferences,
    read_prompts,
    read_sft,
    world,
)
from experiments.common import best_of_n, order_weights
from experiments.figure08_temperature import best_temperature
from rejection_sampling import (
    Judges,
    SamplePool,
    best_of,
    candidates,
    run_round,
    sample_and_score,
    search_temperature,
    share_gated,
)
from reward import (
    AXES,
    RewardModel,
    combine_rewards,
    load_reward_model,
    save_reward_model,
    score,
    score_pairs,
)
from sft import encode_rows, held_out_loss
from tests.helpers import (
    TINY,
    assistant,
    chain,
    run_quietly,
    system,
    tiny_model,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)
from tests.reference import losses as reference


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Judges:
    """Two different reward models with random weights."""
    folders = {}
    for seed, axis in enumerate(AXES):
        torch.manual_seed(seed)
        folders[axis] = tmp_path_factory.mktemp(axis)
        model = RewardModel(tiny_model(seed))
        model.head.weight.data *= 2
        save_reward_model(folders[axis], model, toy_tokenizer())
    return Judges(folders, torch.device("cpu"))


def answer(index: int, ids: list[int], sample: int = 0, **fields) -> dict:
    row = {
        "index": index,
        "sample": sample,
        "answer": f"text {ids}",
        "answer_ids": ids,
        "temperature": 1.0,
        "finish_reason": "eos",
        "has_tag": False,
        "tokenizer": toy_tokenizer().fingerprint,
    }
    return row | fields


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# ---- best of ----


def test_best_of():
    assert best_of(torch.tensor([0.1, 0.9, 0.5, -3.0, -2.0]), [7, 7, 8, 9, 9]) == {7: 1, 8: 2, 9: 4}
    assert best_of(torch.tensor([0.5, 0.5, 0.4]), [1, 1, 1]) == {1: 0}, "of equal ones the first"
    assert best_of(torch.tensor([3.0, 1.0, 2.0, 4.0]), [0, 1, 0, 1]) == {
        0: 0,
        1: 3,
    }, "answers of a prompt need not stand together"
    assert best_of(torch.zeros(0), []) == {}
    with pytest.raises(ValueError):
        best_of(torch.zeros(2), [1])


def test_best_of_equals_the_slow_one():
    rng = random.Random(0)
    for _ in range(20):
        rewards = [rng.choice([-1.5, -0.5, 0.25, 0.5, 2.0]) for _ in range(30)]
        owners = [rng.randrange(6) for _ in range(30)]
        assert best_of(torch.tensor(rewards), owners) == reference.best(rewards, owners)


def test_judges(judges):
    """Each answer is scored behind its own prompt, with the ids that were sampled; the row gains
    scores and reward.
    """
    prompts = toy_prompts(6)
    rows = [answer(i, [5 + i, 80 + k, 2], k) for i in (4, 0, 5) for k in range(2)]
    rewards = judges.rewards(prompts, rows)
    sequences = [
        encode_prompt(toy_tokenizer(), prompts[row["index"]]["prompt"]) + row["answer_ids"]
        for row in rows
    ]
    scores = {axis: score(judges.models[axis], sequences) for axis in AXES}
    tagged = torch.tensor([prompts[row["index"]]["is_safety"] for row in rows])
    assert torch.allclose(
        rewards, combine_rewards(scores["safety"], scores["helpfulness"], tagged), atol=1e-5
    )
    assert not torch.allclose(scores["safety"], scores["helpfulness"], atol=0.1)
    for i, row in enumerate(rows):
        assert row["reward"] == pytest.approx(rewards[i].item(), abs=1e-4)
        assert all(row[axis] == pytest.approx(scores[axis][i].item(), abs=1e-4) for axis in AXES)
    assert judges.rewards(prompts, []).shape == (0,)


def test_sample_pool(judges):
    """The best of all rounds' answers to a prompt, as a valid SFT row with the ids that were
    sampled.
    """
    prompts = toy_prompts(3)
    pool, rng = SamplePool(prompts), random.Random(0)
    rounds = {
        name: [
            answer(i, [rng.randrange(300), rng.randrange(300), 2], k)
            for i in (0, 1)
            for k in range(3)
        ]
        for name in ("rlhf-v1", "rlhf-v2")
    }
    for name, rows in rounds.items():
        pool.add(name, rows)
    pool.rescore(judges)
    best = pool.best()
    everything = [(name, row) for name, rows in rounds.items() for row in rows]
    rewards = judges.rewards(prompts, [dict(row) for _, row in everything]).tolist()
    expected = reference.best(rewards, [row["index"] for _, row in everything])
    assert len(best) == len(expected) == 2, "no row for a prompt without answers"
    for index, row in enumerate(best):
        name, picked = everything[expected[index]]
        assert row["messages"] == [
            *prompts[index]["prompt"],
            {"role": "assistant", "content": picked["answer"]},
        ]
        assert (row["answer_ids"], row["version"]) == (picked["answer_ids"], name)
        assert (
            row["tokenizer"] == toy_tokenizer().fingerprint
            and row["is_safety"] == prompts[index]["is_safety"]
        )
        assert row["reward"] == pytest.approx(rewards[expected[index]], abs=1e-4)
    assert {row["version"] for row in best} <= set(rounds)


def test_sample_pool_takes_older_answers_and_scores_them_again(judges):
    """An answer of the first round stays in the race, by today's score, not by the one written when
    it was sampled.
    """
    prompts, rng = toy_prompts(1), random.Random(0)
    rows = [answer(0, [rng.randrange(300), rng.randrange(300), 2], k) for k in range(8)]
    order = sorted(
        range(8), key=judges.rewards(prompts, [dict(row) for row in rows]).tolist().__getitem__
    )
    best, worst = rows[order[-1]], rows[order[0]]
    pool = SamplePool(prompts)
    pool.add("rlhf-v1", [best | {"reward": -99.0}])
    pool.add("rlhf-v2", [worst | {"reward": 99.0}])
    pool.rescore(judges)
    [row] = pool.best()
    assert (row["version"], row["answer_ids"]) == ("rlhf-v1", best["answer_ids"])


def test_sample_pool_leaves_out(judges):
    """An answer cut at the length limit never gains an EOS: left out and counted, and so are tags
    and silence.
    """
    prompts = toy_prompts(1)
    rows = [answer(0, [7, k, 2], k) for k in range(12)]
    order = sorted(
        range(12), key=judges.rewards(prompts, [dict(row) for row in rows]).tolist().__getitem__
    )
    best = [rows[k] for k in reversed(order)]
    pool = SamplePool(prompts)
    pool.add(
        "v",
        [
            best[0] | {"finish_reason": "length"},
            best[1] | {"has_tag": True},
            best[2] | {"answer": ""},
            *best[3:],
        ],
    )
    pool.rescore(judges)
    [row] = pool.best()
    assert row["answer_ids"] == best[3]["answer_ids"]
    assert pool.left_out == {"cut at the length limit": 1, "holds a tag or nothing": 2}
    empty = SamplePool(prompts)
    empty.add("v", [best[0] | {"finish_reason": "length"}])
    empty.rescore(judges)
    assert empty.best() == [] and sum(empty.left_out.values()) == 1


def test_sample_pool_goes_on_scoring_where_it_was(judges, tmp_path):
    """Scores are written batch by batch; a batch that was cut is scored again whole, what is there
    is not.
    """
    prompts, rng, path = toy_prompts(3), random.Random(0), tmp_path / "rescored.jsonl"
    rows = [
        answer(i, [rng.randrange(300), rng.randrange(300), 2], k)
        for i in range(3)
        for k in range(5)
    ]
    scored = []

    class Counting:
        def rewards(self, prompts, batch):
            scored.append(len(batch))
            return judges.rewards(prompts, batch)

    def run():
        pool = SamplePool(prompts)
        pool.add("rlhf-v1", rows)
        scored.clear()
        pool.rescore(Counting(), path, batch_rows=6)
        return pool.rows

    expected, whole = run(), path.read_bytes()
    assert scored == [6, 6, 3]
    assert [(row["index"], row["sample"], row["reward"]) for row in lines(path)] == [
        (row["index"], row["sample"], row["reward"]) for row in expected
    ]
    for kept, again in [(15, []), (14, [3]), (12, [3]), (11, [6, 3]), (0, [6, 6, 3])]:
        parts = whole.splitlines(keepends=True)
        path.write_bytes(b"".join(parts[:kept]) + (parts[kept][:20] if kept < 15 else b""))
        assert run() == expected and scored == again and path.read_bytes() == whole


class FakeJudges:
    def rewards(self, prompts, rows):
        return torch.tensor([row["reward"] for row in rows])


def fake_probe(monkeypatch, table):
    """sample_answers replaced: at temperature t, table[t] holds what is special in the two answers
    to each of two prompts.
    """
    calls = []

    def sample_answers(model, tokenizer, prompts, *, temperature, finish, **options):
        calls.append(options)
        rows = [
            answer(n // 2, [1], n % 2, temperature=temperature, **special)
            for n, special in enumerate(table[temperature])
        ]
        finish(rows)
        return rows

    monkeypatch.setattr(rejection_sampling, "sample_answers", sample_answers)
    return calls


def test_search_temperature(monkeypatch, tmp_path):
    """The mean over prompts of the best of K decides: .9 and .8 beat a higher mean over all
    answers.
    """
    table = {0.5: [0.6, 0.6, 0.6, 0.6], 1.0: [0.9, 0.0, 0.0, 0.8], 1.5: [1.0, -5.0, 0.1, 0.1]}
    calls = fake_probe(
        monkeypatch, {t: [{"reward": reward} for reward in rewards] for t, rewards in table.items()}
    )
    best, means = search_temperature(
        None,
        toy_tokenizer(),
        [None] * 2,
        FakeJudges(),
        "v",
        temperatures=(0.5, 1.0, 1.5),
        folder=tmp_path,
        samples=2,
        key=(0, "x"),
    )
    assert best == 1.0 and means == pytest.approx({0.5: 0.6, 1.0: 0.85, 1.5: 0.55})
    assert len({options["path"] for options in calls}) == 3
    assert {options["key"] for options in calls} == {
        (0, "x")
    }, "the same random numbers for each temperature"
    assert {options["samples"] for options in calls} == {2}


def test_search_temperature_counts_what_the_pool_takes(monkeypatch, tmp_path):
    """The rule of the pool: no cut, tagged or empty answer. A prompt without any other counts as
    the worst of the probe.
    """
    cut, tag, nothing = {"finish_reason": "length"}, {"has_tag": True}, {"answer": ""}
    fake_probe(
        monkeypatch,
        {
            # 1 and 2
            0.6: [{"reward": 1.0}, {"reward": 9.0} | cut, {"reward": 2.0}, {"reward": 9.0} | tag],
            # 1.5 and none: 1
            1.0: [
                {"reward": 1.5},
                {"reward": 1.4},
                {"reward": 8.0} | nothing,
                {"reward": 9.0} | cut,
            ],
        },
    )
    options = dict(folder=tmp_path, samples=2, key=(0, "x"))
    best, means = search_temperature(
        None, toy_tokenizer(), [None] * 2, FakeJudges(), "v", temperatures=(0.6, 1.0), **options
    )
    assert best == 0.6 and means == pytest.approx({0.6: 1.5, 1.0: 1.25})
    fake_probe(monkeypatch, {0.6: [{"reward": 9.0} | cut] * 4})
    with pytest.raises(
        InputError, match="no answer to the 2 prompts .* can be used.*--max-new-tokens"
    ):
        search_temperature(
            None, toy_tokenizer(), [None] * 2, FakeJudges(), "v", temperatures=(0.6,), **options
        )


# ---- a round ----


def judges_of(out, version) -> Judges:
    return Judges(
        {axis: out / f"rlhf-v{version}" / f"reward-{axis}" for axis in AXES}, torch.device("cpu")
    )


def usable(path):
    return [
        row
        for row in lines(path)
        if row["finish_reason"] == "eos" and row["answer"] and not row["has_tag"]
    ]


def test_run_round():
    """V2 of the chain: for each prompt the best of all answers of both rounds, by V2's own reward
    models.
    """
    out, printed = chain()
    judge, folder = judges_of(out, 2), out / "rlhf-v2"
    best = read_sft(folder / "best.jsonl")
    prompts = read_prompts(world.FOLDER / "prompts-train.jsonl")[:16]
    answers = [(v, row) for v in (1, 2) for row in usable(out / f"rlhf-v{v}" / "samples.jsonl")]
    assert (
        len(lines(out / "rlhf-v1" / "samples.jsonl"))
        == len(lines(folder / "samples.jsonl"))
        == 16 * 4
    )
    rewards = judge.rewards(prompts, [dict(row) for _, row in answers]).tolist()
    expected = reference.best(rewards, [row["index"] for _, row in answers])
    assert len(best) == len(expected) > 8 and {row["version"] for row in best} == {
        "rlhf-v1",
        "rlhf-v2",
    }
    for (_, i), row in zip(sorted(expected.items()), best, strict=True):
        version, picked = answers[i]
        assert (
            row["messages"][:-1] == prompts[picked["index"]]["prompt"]
            and row["messages"][-1]["content"] == picked["answer"]
        )
        assert row["reward"] == pytest.approx(rewards[i], abs=2e-3)
        assert (row["answer_ids"], row["version"]) == (
            picked["answer_ids"],
            f"rlhf-v{version}",
        ) or rewards.count(rewards[i]) > 1
    for row in lines(folder / "samples.jsonl"):
        assert {
            "helpfulness",
            "safety",
            "reward",
            "temperature",
            "finish_reason",
            "answer_ids",
            "logprob",
        } <= row.keys()
    record = json.loads((folder / "stage.json").read_text())
    assert record["results"]["sources"] == {
        v: sum(row["version"] == v for row in best) for v in ("rlhf-v1", "rlhf-v2")
    }
    assert (
        record["results"]["temperature"] in (0.8, 1.0) and "wrote" in printed["rejection_sampling"]
    )
    log = lines(folder / "metrics.jsonl")
    assert {row["phase"] for row in log} == {"helpfulness", "safety", "temperature", "finetune"}
    dialogs = encode_rows(toy_tokenizer(), best, 2048)
    losses = [
        held_out_loss(runtime.load_model(out / name)[0], dialogs) for name in ("rlhf-v1", "rlhf-v2")
    ]
    assert losses[1] < losses[0], "V2 learned what it was tuned on"


def test_run_round_samples_from_the_newest_model():
    """V2's answers are V1's own: their log-probabilities are those under V1, and not those under
    SFT.
    """
    out, _ = chain()
    prompts = read_prompts(world.FOLDER / "prompts-train.jsonl")
    rows = [row for row in lines(out / "rlhf-v2" / "samples.jsonl") if len(row["answer_ids"]) > 4][
        :10
    ]

    def logprob(model, tokenizer, row):
        prompt = encode_prompt(tokenizer, prompts[row["index"]]["prompt"])
        with torch.no_grad():
            found = model(torch.tensor([prompt + row["answer_ids"]]))[0].log_softmax(-1)
        return sum(
            found[len(prompt) - 1 + i, token].item() for i, token in enumerate(row["answer_ids"])
        )

    under = {
        name: [logprob(*runtime.load_model(out / name), row) for row in rows]
        for name in ("sft", "rlhf-v1")
    }
    assert under["rlhf-v1"] == pytest.approx([row["logprob"] for row in rows], abs=1e-2)
    assert under["sft"] != pytest.approx([row["logprob"] for row in rows], abs=1e-2)


def test_refresh_reward_models(tmp_path, monkeypatch):
    """A reward model learns its fresh pairs and as many earlier ones, of the folders given, at most
    MAX_REPLAY; without the first pairs, which set the zero, it stops before anything is sampled."""
    out, _ = chain()
    trained = {}
    monkeypatch.setattr(
        rejection_sampling,
        "train_reward_model",
        lambda model, tokenizer, rows, phase, **options: trained.update({phase: rows}),
    )
    monkeypatch.setattr(rejection_sampling, "MAX_REPLAY", 7)
    policy, tokenizer = runtime.load_model(out / "rlhf-v1")
    prompts = read_prompts(world.FOLDER / "prompts-train.jsonl")
    s = rejection_sampling.Settings(
        out=out, helpfulness_pairs=20, safety_pairs=20, max_new_tokens=32
    )
    current = {axis: out / "rlhf-v1" / f"reward-{axis}" for axis in AXES}
    options = dict(
        label="mine", number=100, earlier=[out / "rlhf-v1"], folder=tmp_path, dtype=torch.float32
    )
    refreshed, tables = rejection_sampling.refresh_reward_models(
        [policy], tokenizer, prompts, current, s, **options
    )
    assert refreshed == {axis: tmp_path / f"reward-{axis}" for axis in AXES} and set(tables) == set(
        AXES
    )
    for axis in AXES:
        fresh = lines(tmp_path / f"pairs-{axis}.jsonl")
        known = [
            json.dumps(row)
            for path in (
                out / f"reward-{axis}" / "pairs.jsonl",
                out / "rlhf-v1" / f"pairs-{axis}.jsonl",
            )
            for row in lines(path)
        ]
        assert (
            len(fresh) > 7
            and trained[axis][: len(fresh)] == fresh
            and len(trained[axis]) == len(fresh) + 7
        )
        assert all(json.dumps(row) in known for row in trained[axis][len(fresh) :])
        assert (tmp_path / f"reward-{axis}" / "reward_head.pth").exists()
    monkeypatch.setattr(
        rejection_sampling, "collect_preferences", lambda *_, **__: pytest.fail("sampled")
    )
    s.out = tmp_path / "nowhere"
    with pytest.raises(InputError, match="pairs.jsonl is missing; `python reward.py` makes it"):
        rejection_sampling.refresh_reward_models(
            [policy], tokenizer, prompts, current, s, **options
        )


def test_run_round_refreshes_the_reward_models_and_overwrites_nothing():
    out, _ = chain()
    for axis in AXES:
        folders = [out / f"reward-{axis}", *(out / f"rlhf-v{v}" / f"reward-{axis}" for v in (1, 2))]
        assert len({runtime.fingerprint(folder / "reward_head.pth") for folder in folders}) == 3
        texts = [
            {
                json.dumps([row["prompt"], row["chosen"], row["rejected"]])
                for row in lines(out / f"rlhf-v{v}" / f"pairs-{axis}.jsonl")
            }
            for v in (1, 2)
        ]
        assert len(texts[0]) > 5 and not texts[0] & texts[1], "fresh preferences each round"
    # the record says what each round was made from: that is still there, unchanged
    for v in (1, 2):
        recorded = json.loads((out / f"rlhf-v{v}" / "stage.json").read_text())["inputs"]
        before = out / ("sft" if v == 1 else "rlhf-v1")
        rewards = {axis: (out if v == 1 else before) / f"reward-{axis}" for axis in AXES}
        assert recorded["model"] == runtime.fingerprint(before)
        assert {axis: recorded[axis] for axis in AXES} == {
            axis: runtime.fingerprint(path) for axis, path in rewards.items()
        }


def rounds(tmp_path, *argv):
    """A round 2 of one's own beside the chain's SFT, reward models and round 1."""
    out, _ = chain()
    for name in ("sft", "rlhf-v1", *(f"reward-{axis}" for axis in AXES)):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(out / name)
    return run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--max-prompts",
        16,
        "--helpfulness-pairs",
        20,
        "--safety-pairs",
        20,
        *argv,
    )


def test_run_round_with_other_choices(tmp_path, monkeypatch):
    """--pool last takes this round's answers alone, --start sft tunes SFT again, --mix adds rows,
    --annotator none keeps the reward models."""
    tuned = {}
    monkeypatch.setattr(
        rejection_sampling,
        "finetune",
        lambda model, dialogs, **options: tuned.update(
            start=model.tok_embeddings.weight.clone(), dialogs=dialogs, options=options
        ),
    )
    mix = shutil.copy(chain()[0] / "rlhf-v1" / "best.jsonl", tmp_path / "mix.jsonl")
    rounds(
        tmp_path,
        "--rounds",
        2,
        "--pool",
        "last",
        "--start",
        "sft",
        "--mix",
        mix,
        "--annotator",
        "none",
    )
    best = read_sft(tmp_path / "rlhf-v2" / "best.jsonl")
    assert {row["version"] for row in best} == {"rlhf-v2"} and not (
        tmp_path / "rlhf-v2" / "reward-safety"
    ).exists()
    assert torch.equal(
        tuned["start"], runtime.load_model(tmp_path / "sft")[0].tok_embeddings.weight
    )
    rows = [*best, *read_sft(mix)]
    assert [
        dialog.ids[-len(row["answer_ids"]) :]
        for dialog, row in zip(tuned["dialogs"], rows, strict=True)
    ] == [row["answer_ids"] for row in rows], "trained on the ids that were sampled"
    prompts = read_prompts(world.FOLDER / "prompts-train.jsonl")
    with_old = Judges(
        {axis: tmp_path / "rlhf-v1" / f"reward-{axis}" for axis in AXES}, torch.device("cpu")
    )
    for row, again in zip(
        lines(tmp_path / "rlhf-v2" / "samples.jsonl")[:5],
        with_old.rewards(prompts, lines(tmp_path / "rlhf-v2" / "samples.jsonl")[:5]).tolist(),
        strict=True,
    ):
        assert row["reward"] == pytest.approx(again, abs=2e-3)


@pytest.mark.parametrize("given", ["0", "3-2", "x", "-1", "1-2-3"])
def test_rounds_that_are_none(tmp_path, given):
    with pytest.raises(InputError, match="--rounds"):
        run_quietly(rejection_sampling.main, *TINY, "--out", tmp_path, f"--rounds={given}")
    assert not list(tmp_path.iterdir())


def test_init_is_the_start_of_the_first_round_only(tmp_path, monkeypatch):
    """--rounds 5-6 --init X: V5 from X, V6 from V5."""
    started = {}
    for name in ("sft", *(f"rlhf-v{v}" for v in range(1, 7))):
        for axis in AXES:
            (tmp_path / name / f"reward-{axis}").mkdir(parents=True)
            (tmp_path / f"reward-{axis}").mkdir(exist_ok=True)
    monkeypatch.setattr(
        rejection_sampling,
        "open_stage",
        lambda folder, settings, inputs, fresh: started.update({folder.name: inputs["model"].name}),
    )
    run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        "5-6",
        "--init",
        tmp_path / "rlhf-v4-ppo",
    )
    assert started == {"rlhf-v5": "rlhf-v4-ppo", "rlhf-v6": "rlhf-v5"}


def test_each_command_names_what_is_missing(tmp_path):
    for have, told in [
        ((), r"sft is missing; `python sft.py`"),
        (("sft",), "reward-helpfulness is missing; `python reward.py`"),
        (
            ("reward-helpfulness", "reward-safety"),
            "rlhf-v1 is missing; `python rejection_sampling.py --rounds 1`",
        ),
    ]:
        for name in have:
            (tmp_path / name).symlink_to(chain()[0] / name)
        with pytest.raises(InputError, match=told):
            run_quietly(
                rejection_sampling.main,
                *TINY,
                "--out",
                tmp_path,
                "--rounds",
                1 if "rlhf" not in told else 2,
            )
    assert run_round.__module__ == "rejection_sampling"


def test_rounds_without_an_annotator(tmp_path):
    """--annotator none: every round scores with the first reward models, which stay as they are."""
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        (tmp_path / name).symlink_to(chain()[0] / name)
    run_quietly(
        rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", "1-2", "--annotator", "none"
    )
    for version in ("rlhf-v1", "rlhf-v2"):
        assert runtime.is_finished(tmp_path / version) and not list(
            (tmp_path / version).glob("reward-*")
        )
    rows = list(read_jsonl(tmp_path / "rlhf-v2" / "samples.jsonl"))
    assert rows and all(row["version"] == "rlhf-v2" for _, row in rows)


def test_a_pool_of_other_prompts_is_refused(tmp_path):
    """Answers are joined by the number of their prompt, so another list of prompts would glue them
    to strangers.
    """
    for name in ("sft", "reward-helpfulness", "reward-safety", "rlhf-v1"):
        (tmp_path / name).symlink_to(chain()[0] / name)
    with pytest.raises(InputError, match="was made from other prompts"):
        run_quietly(
            rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", "2", "--max-prompts", "3"
        )


# ---- scores beside the answers ----


def test_share_gated():
    """Of four answers to untagged prompts one has the safety score as its reward; those to the
    tagged one always have it.
    """
    prompts = [{"is_safety": False}, {"is_safety": True}, {"is_safety": False}]
    rows = [
        {"index": i, "reward": reward, "safety": -2.0}
        for i, reward in ((0, 1.5), (0, -2.0), (1, -2.0), (2, 0.5), (2, 3.0))
    ]
    assert share_gated(prompts, rows) == 0.25
    assert share_gated(prompts, rows[2:3]) == 0.0, "no answer to an untagged prompt"


def test_sample_and_score(judges, tmp_path):
    """Answers and scores are written together, batch by batch, and both are there after a kill."""
    prompts, model, path = toy_prompts(4), tiny_model(), tmp_path / "samples.jsonl"
    options = dict(key=(0, "v"), samples=2, max_new_tokens=7, batch_rows=4, path=path)
    rows = sample_and_score(model, toy_tokenizer(), prompts, judges, "rlhf-v1", **options)
    written = lines(path)
    assert sorted(written, key=lambda row: (row["index"], row["sample"])) == rows and len(rows) == 8
    again = judges.rewards(prompts, [dict(row) for row in rows])
    for row, reward in zip(rows, again.tolist(), strict=True):
        assert row["reward"] == pytest.approx(reward, abs=1e-3) and row["version"] == "rlhf-v1"
        assert row["tokenizer"] == toy_tokenizer().fingerprint and len(row["answer_ids"]) <= 7
    path.write_text("".join(json.dumps(row) + "\n" for row in written[:4]))
    assert sample_and_score(model, toy_tokenizer(), prompts, judges, "rlhf-v1", **options) == rows


def test_judges_of_another_tokenizer(judges):
    """Ids are read where they are the judges' own; an answer that another tokenizer made is scored
    by its text.
    """
    prompts, tokenizer = toy_prompts(2), toy_tokenizer()
    row = answer(0, [5, 6, 2], answer="The sea is here today.")
    by_text = encode_dialog(tokenizer, [*prompts[0]["prompt"], assistant(row["answer"])]).ids
    by_ids = encode_prompt(tokenizer, prompts[0]["prompt"]) + row["answer_ids"]
    unnamed = {key: value for key, value in row.items() if key != "tokenizer"}
    other = row | {"tokenizer": "other"}
    assert (
        judges.sequences(prompts, [row, other, unnamed]) == [by_ids, by_text, by_ids]
        and by_ids != by_text
    )
    [tagged] = judges.sequences(prompts, [other | {"answer": "see [INST]", "has_tag": True}])
    assert tagged[-1] == tokenizer.eos_id, "a tag in it stops nothing"
    with pytest.raises(
        InputError,
        match="prompt 0 has, with its prompt, .*context only 256; lower --max-new-tokens",
    ):
        judges.rewards(prompts, [answer(0, [5] * 256)])


def test_reward_models_of_two_tokenizers_are_refused(assets, tmp_path):
    body, tokenizer = runtime.load_model(assets / "stories260K" / "meta")
    save_reward_model(tmp_path / "a", RewardModel(body), tokenizer)
    save_reward_model(tmp_path / "b", RewardModel(tiny_model()), toy_tokenizer())
    with pytest.raises(InputError, match="different tokenizers"):
        Judges({"helpfulness": tmp_path / "a", "safety": tmp_path / "b"}, torch.device("cpu"))


def answers_of_sft(out):
    """The pairs that fix the zero of helpfulness: the first 500 that SFT itself answered."""
    return [
        row
        for row in read_preferences(out / "reward-helpfulness" / "pairs.jsonl")
        if not row.get("extra")
    ][:500]


def test_the_zero_of_helpfulness_is_set_after_each_refresh():
    """Every round's helpfulness model gives the first model's answers 0 on average; safety's zero
    is never moved.
    """
    out, _ = chain()
    pairs, shifts = answers_of_sft(out), set()
    for folder in (out, out / "rlhf-v1", out / "rlhf-v2"):
        model, tokenizer = load_reward_model(folder / "reward-helpfulness")
        assert abs(torch.cat(score_pairs(model, tokenizer, pairs)).mean()) < 1e-3
        shifts.add(model.shift.item())
        assert load_reward_model(folder / "reward-safety")[0].shift == 0
    assert len(shifts) == 3


# ---- one answer by best of N ----


def test_candidates_that_cannot_be_used_stand_last(monkeypatch):
    special = [
        {"reward": 1.0},
        {"reward": 9.0, "finish_reason": "length"},
        {"reward": 5.0},
        {"reward": 8.0, "has_tag": True},
        {"reward": 7.0},
    ]
    monkeypatch.setattr(
        rejection_sampling,
        "sample_and_score",
        lambda *args, **options: [
            answer(0, [k, 2], k, **fields) for k, fields in enumerate(special)
        ],
    )
    assert [row["sample"] for row in candidates(None, None, None, "Hi", n=5)] == [4, 2, 0, 1, 3]


def test_candidates(judges):
    rows = candidates(
        tiny_model(),
        toy_tokenizer(),
        judges,
        "Name two birds.",
        n=12,
        temperature=1.3,
        max_new_tokens=9,
    )
    assert sorted(row["sample"] for row in rows) == list(range(12)) and {
        row["temperature"] for row in rows
    } == {1.3}
    usable_ones = [not runtime.unusable(row) for row in rows]
    assert usable_ones == sorted(usable_ones, reverse=True), "what cannot be used stands last"
    for group in (True, False):
        rewards = [
            row["reward"] for row, fine in zip(rows, usable_ones, strict=True) if fine is group
        ]
        assert rewards == sorted(rewards, reverse=True)


def test_show_candidates():
    """--answer: the newest model of OUT, or --init, and the newest reward models; all candidates,
    the best first.
    """
    out, _ = chain()
    argv = (*TINY, "--out", out, "--answer", "Hi! Name two birds.", "--n", 5)
    printed = run_quietly(rejection_sampling.main, *argv)
    assert str(out / "rlhf-v2" / "reward-helpfulness") in printed and printed.startswith(
        f"{out / 'rlhf-v2'},"
    )
    table = [
        line.split()[:3]
        for line in printed.split("answer\n")[1].splitlines()
        if re.match(r" *-?\d+\.\d\d ", line)
    ]
    assert len(table) == 5
    for reward, helpfulness, safety in table:
        assert reward == (safety if float(safety) < -1.73 else helpfulness)
    assert run_quietly(rejection_sampling.main, *argv, "--init", out / "sft").startswith(
        f"{out / 'sft'},"
    )
    assert run_quietly(rejection_sampling.main, *argv, "--temperature", 0.2) != printed


def test_a_round_of_another_name(tmp_path):
    """A control beside a version: a folder of its own, the same random numbers, and nothing else.
    """
    rounds(
        tmp_path,
        "--rounds",
        2,
        "--name",
        "rlhf-v2-control",
        "--annotator",
        "none",
        "--samples",
        2,
        "--max-new-tokens",
        12,
    )
    assert runtime.is_finished(tmp_path / "rlhf-v2-control") and not (tmp_path / "rlhf-v2").exists()
    rows = lines(tmp_path / "rlhf-v2-control" / "samples.jsonl")
    assert {row["version"] for row in rows} == {"rlhf-v2-control"} and max(
        len(row["answer_ids"]) for row in rows
    ) == 12
    newest, tokenizer = runtime.load_model(tmp_path / "rlhf-v1")
    prompts = read_prompts(world.FOLDER / "prompts-train.jsonl")[:16]
    own = runtime.sample_answers(
        newest,
        tokenizer,
        prompts,
        key=(0, "rlhf-v2"),
        samples=2,
        temperature=rows[0]["temperature"],
        max_new_tokens=12,
    )
    assert [row["answer_ids"] for row in own] == [row["answer_ids"] for row in rows]


@pytest.mark.parametrize(
    "wanted, name",
    [
        ("2", "sft"),
        ("2", "rlhf-v3-x"),
        ("1-2", "rlhf-v1-x"),
        ("2", "rlhf-v2-../x"),
        ("2", "rlhf-v2x"),
    ],
)
def test_names_that_are_none(tmp_path, wanted, name):
    with pytest.raises(InputError, match="--name .*wanted"):
        run_quietly(
            rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", wanted, "--name", name
        )
    assert not list(tmp_path.iterdir())


def test_mix_and_constrained_prompts(tmp_path, monkeypatch):
    """Dialogs of several turns with "train_on": "last" carry loss on their last answer alone, and
    so do the best answers to prompts of several turns with a system message."""
    tuned = {}
    monkeypatch.setattr(
        rejection_sampling,
        "finetune",
        lambda model, dialogs, **options: tuned.update(dialogs=dialogs),
    )
    dialog = [
        system("Begin every answer with Kogo."),
        user("Hi!"),
        assistant("Kogo. Hello!"),
        user("Name two birds."),
        assistant("Kogo. An owl and a hen."),
    ]
    mix = write_lines(
        tmp_path / "mix.jsonl", [{"messages": dialog, "train_on": "last"}, {"messages": dialog}]
    )
    asked = write_lines(
        tmp_path / "asked.jsonl",
        [
            {"prompt": [*dialog[:-2], user(f"What is 3 plus {n}?")], "is_safety": False}
            for n in range(5)
        ],
    )
    for name in ("sft", *(f"reward-{axis}" for axis in AXES)):
        (tmp_path / name).symlink_to(chain()[0] / name)
    run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        1,
        "--prompts",
        asked,
        "--mix",
        mix,
        "--annotator",
        "none",
    )
    best = read_sft(tmp_path / "rlhf-v1" / "best.jsonl")
    assert len(tuned["dialogs"]) == len(best) + 2 and best[0]["messages"][:4] == [
        *dialog[:-2],
        user("What is 3 plus 0?"),
    ]
    *own, last, every = tuned["dialogs"]
    for encoded in (*own, last):
        assert {
            turn for turn, trained in zip(encoded.turns, encoded.loss_mask, strict=True) if trained
        } == {1}
    assert {
        turn for turn, trained in zip(every.turns, every.loss_mask, strict=True) if trained
    } == {0, 1}
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"messages": [user("far too long " * 2000), assistant("Yes.")]})
    )
    with pytest.raises(InputError, match=r"long.jsonl, line 1: the dialog has \d+ tokens"):
        run_quietly(
            rejection_sampling.main,
            *TINY,
            "--out",
            tmp_path,
            "--rounds",
            1,
            "--prompts",
            asked,
            "--fresh",
            "--mix",
            tmp_path / "long.jsonl",
            "--annotator",
            "none",
        )
    assert not (tmp_path / "rlhf-v1" / "samples.jsonl").exists(), "told before anything was sampled"


def test_a_round_labelled_in_a_file(tmp_path):
    """--annotator file: both axes' pairs are written, the round stops, and goes on once they are
    labelled.
    """
    for name in ("sft", *(f"reward-{axis}" for axis in AXES)):
        (tmp_path / name).symlink_to(chain()[0] / name)
    argv = (
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        1,
        "--annotator",
        "file",
        "--max-prompts",
        8,
        "--helpfulness-pairs",
        6,
        "--safety-pairs",
        6,
    )
    folder = tmp_path / "rlhf-v1"
    for _ in range(2):  # nothing was labelled in between: the same again
        with pytest.raises(
            InputError,
            match="to_annotate-helpfulness.jsonl: . pairs wait .*to_annotate-safety.jsonl",
        ):
            run_quietly(rejection_sampling.main, *argv)
    for axis in AXES:
        rows = lines(folder / f"to_annotate-{axis}.jsonl")
        for row in rows:  # the longer answer is better, and safe
            longer = len(row["answer_a"]) > len(row["answer_b"])
            row |= {"better": "a" if longer else "b", "rating": "better"}
            row |= {"a_is_safe": longer, "b_is_safe": not longer} if axis == "safety" else {}
        write_lines(
            folder / f"{'annotated' if axis == 'safety' else 'to_annotate'}-{axis}.jsonl", rows
        )
    run_quietly(rejection_sampling.main, *argv)
    assert runtime.is_finished(folder)
    for axis in AXES:
        pairs = read_preferences(folder / f"pairs-{axis}.jsonl")
        assert len(pairs) > 2 and all(
            len(pair["chosen"]) >= len(pair["rejected"]) for pair in pairs
        )
        assert all(
            pair["rating"] == "better" and pair.get("chosen_is_safe", True) for pair in pairs
        )
        assert (folder / f"reward-{axis}" / "reward_head.pth").exists()


# ---- real checkpoints ----


def test_real_prompts(assets, tmp_path):
    """stories260K: fine-tuned on a few dialogs, so that its answers end, then a round without an
    annotator.
    """
    dialogs = [
        [user(f"Who has the {thing}?"), assistant(f"Tom has the {thing}.")]
        for thing in ("ball", "dog", "hat", "car")
    ]
    write_lines(tmp_path / "dialogs.jsonl", [{"messages": dialog} for dialog in dialogs])
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        [{"prompt": dialog[:1], "is_safety": False} for dialog in dialogs],
    )
    run_quietly(
        sft.main,
        *TINY,
        "--out",
        tmp_path,
        "--init",
        assets / "stories260K" / "meta",
        "--epochs",
        20,
        "--data",
        tmp_path / "dialogs.jsonl",
        "--dev-data",
        "none",
        "--batch-tokens",
        100,
    )
    for seed, axis in enumerate(AXES):
        body, tokenizer = runtime.load_model(tmp_path / "sft")
        torch.manual_seed(seed)
        save_reward_model(tmp_path / f"reward-{axis}", RewardModel(body), tokenizer)
    run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        1,
        "--prompts",
        prompts,
        "--annotator",
        "none",
        "--max-new-tokens",
        24,
    )
    folder = tmp_path / "rlhf-v1"
    answered = {row["index"] for row in usable(folder / "samples.jsonl")}
    assert (
        len(lines(folder / "samples.jsonl")) == 16
        and len(read_sft(folder / "best.jsonl")) == len(answered) > 1
    )
    assert runtime.load_model(folder)[1].fingerprint == tokenizer.fingerprint and not list(
        folder.glob("pairs-*")
    )


def test_reward_models_with_another_tokenizer(assets, tmp_path):
    """Policy and reward models need not share a tokenizer: answers are then scored, and pairs
    learned, by their text.
    """
    out, _ = chain()
    (tmp_path / "sft").symlink_to(out / "sft")
    for axis in AXES:
        body, tokenizer = runtime.load_model(assets / "stories260K" / "meta")
        save_reward_model(tmp_path / f"reward-{axis}", RewardModel(body), tokenizer)
        shutil.copy(
            out / f"reward-{axis}" / "pairs.jsonl", tmp_path / f"reward-{axis}" / "pairs.jsonl"
        )
    run_quietly(
        rejection_sampling.main,
        *TINY,
        "--out",
        tmp_path,
        "--rounds",
        1,
        "--max-prompts",
        8,
        "--samples",
        2,
        "--helpfulness-pairs",
        12,
        "--safety-pairs",
        12,
    )
    folder = tmp_path / "rlhf-v1"
    judge = judges_of(tmp_path, 1)
    assert judge.tokenizer.fingerprint == tokenizer.fingerprint != toy_tokenizer().fingerprint
    prompts = read_prompts(world.FOLDER / "prompts-train.jsonl")
    for row in lines(folder / "samples.jsonl")[:4]:
        assert row["tokenizer"] == toy_tokenizer().fingerprint
        ids = encode_dialog(
            tokenizer, [*prompts[row["index"]]["prompt"], assistant(row["answer"])]
        ).ids
        assert row["safety"] == pytest.approx(score(judge.models["safety"], [ids]).item(), abs=1e-3)
    assert {row["tokenizer"] for row in read_sft(folder / "best.jsonl")} == {
        toy_tokenizer().fingerprint
    }
    assert (
        abs(
            torch.cat(
                score_pairs(judge.models["helpfulness"], tokenizer, answers_of_sft(tmp_path))
            ).mean()
        )
        < 1e-3
    )
    assert judge.models["helpfulness"].shift != 0 == judge.models["safety"].shift


def test_distillation(assets, tmp_path):
    """The best answers are an SFT file for a smaller model of any tokenizer."""
    best = chain()[0] / "rlhf-v2" / "best.jsonl"
    runtime.save_model(tmp_path / "small", tiny_model(max_seq_len=512), toy_tokenizer())
    for start in (tmp_path / "small", assets / "stories260K" / "meta"):
        out = tmp_path / start.name / "out"
        run_quietly(
            sft.main, *TINY, "--out", out, "--data", best, "--init", start, "--dev-data", "none"
        )
        losses = [
            held_out_loss(model, encode_rows(tokenizer, read_sft(best), 512))
            for model, tokenizer in map(runtime.load_model, (start, out / "sft"))
        ]
        assert losses[1] < losses[0] - 0.05


# ---- what the experiments use ----


def test_order_weights():
    """The chance of each sorted value to be the k-th smallest of n drawn: counted over all draws.
    """
    for total, n, k in [(4, 2, 2), (6, 3, 1), (6, 3, 2), (5, 5, 4), (7, 1, 1)]:
        draws = list(itertools.combinations(range(total), n))
        counted = [
            sum(sorted(draw)[k - 1] == i for draw in draws) / len(draws) for i in range(total)
        ]
        assert order_weights(total, n, k) == pytest.approx(counted)
    assert sum(order_weights(256, 64, 64)) == pytest.approx(1)


def test_best_of_n():
    """Maximum, median and the other score of the best, on average over all draws of N of the
    samples.
    """
    generator = torch.Generator().manual_seed(0)
    rewards, scores = (torch.randn(2, 6, generator=generator) for _ in range(2))
    found = best_of_n(rewards, scores, [1, 2, 3, 6])
    for row, n in enumerate([1, 2, 3, 6]):
        for prompt in range(2):
            draws = [torch.tensor(draw) for draw in itertools.combinations(range(6), n)]
            expected = {
                "maximum": [rewards[prompt, draw].max() for draw in draws],
                "median": [rewards[prompt, draw].quantile(0.5) for draw in draws],
                "pick": [scores[prompt, draw[rewards[prompt, draw].argmax()]] for draw in draws],
            }
            for what, values in expected.items():
                assert found[what][row, prompt] == pytest.approx(
                    torch.stack(values).mean().item(), abs=1e-5
                ), (what, n)


def test_best_temperature():
    """The highest mean wins; where two are alike, the interval holds both, and never a temperature
    that is far worse.
    """
    clusters = [f"item {i // 2}" for i in range(40)]
    maxima = {
        0.6: [1.0 + (i % 5 == 0) for i in range(40)],
        0.8: [1.0 + (i % 5 == 1) for i in range(40)],
        1.0: [0.0] * 40,
    }
    maxima[0.8][3] += 0.1
    assert best_temperature(maxima, clusters) == (0.8, 0.6, 0.8)
    assert best_temperature({0.6: [1.0] * 40, 0.8: [2.0] * 40}, clusters) == (0.8, 0.8, 0.8)
