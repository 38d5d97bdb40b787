"""Rejection sampling: the best of all answers of all rounds, used as it was sampled."""

import json
import random
import shutil

import pytest
import torch

import rejection_sampling
import runtime
from data import InputError, encode_prompt, read_jsonl, read_prompts, read_sft, toy
from rejection_sampling import Judges, SamplePool, best_of, run_round, search_temperature
from reward import AXES, RewardModel, combine_rewards, save_reward_model, score
from sft import encode_rows, held_out_loss
from tests.helpers import TINY, chain, run_quietly, tiny_model, toy_prompts, toy_tokenizer
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
    row = {"index": index, "sample": sample, "answer": f"text {ids}", "answer_ids": ids, "temperature": 1.0,
           "finish_reason": "eos", "has_tag": False}
    return row | fields


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# -------------------------------------------------------------------------------------------------------------- best of


def test_best_of():
    assert best_of(torch.tensor([.1, .9, .5, -3., -2.]), [7, 7, 8, 9, 9]) == {7: 1, 8: 2, 9: 4}
    assert best_of(torch.tensor([.5, .5, .4]), [1, 1, 1]) == {1: 0}, "of equal ones the first"
    assert best_of(torch.tensor([3.0, 1.0, 2.0, 4.0]), [0, 1, 0, 1]) == {0: 0, 1: 3}, (
        "answers of a prompt need not stand together"
    )
    assert best_of(torch.zeros(0), []) == {}
    with pytest.raises(ValueError):
        best_of(torch.zeros(2), [1])


def test_best_of_equals_the_slow_one():
    rng = random.Random(0)
    for _ in range(20):
        rewards = [rng.choice([-1.5, -.5, .25, .5, 2.]) for _ in range(30)]
        owners = [rng.randrange(6) for _ in range(30)]
        assert best_of(torch.tensor(rewards), owners) == reference.best(rewards, owners)


def test_judges(judges):
    """Each answer is scored behind its own prompt, with the ids that were sampled; the row gains scores and reward."""
    prompts = toy_prompts(6)
    rows = [answer(i, [5 + i, 80 + k, 2], k) for i in (4, 0, 5) for k in range(2)]
    rewards = judges.rewards(prompts, rows)
    sequences = [encode_prompt(toy_tokenizer(), prompts[row["index"]]["prompt"]) + row["answer_ids"] for row in rows]
    scores = {axis: score(judges.models[axis], sequences) for axis in AXES}
    tagged = torch.tensor([prompts[row["index"]]["is_safety"] for row in rows])
    assert torch.allclose(rewards, combine_rewards(scores["safety"], scores["helpfulness"], tagged), atol=1e-5)
    assert not torch.allclose(scores["safety"], scores["helpfulness"], atol=.1)
    for i, row in enumerate(rows):
        assert row["reward"] == pytest.approx(rewards[i].item(), abs=1e-4)
        assert all(row[axis] == pytest.approx(scores[axis][i].item(), abs=1e-4) for axis in AXES)
    assert judges.rewards(prompts, []).shape == (0,)


def test_sample_pool(judges):
    """The best of all rounds' answers to a prompt, as a valid SFT row with the ids that were sampled."""
    prompts = toy_prompts(3)
    pool, rng = SamplePool(prompts), random.Random(0)
    rounds = {name: [answer(i, [rng.randrange(300), rng.randrange(300), 2], k) for i in (0, 1) for k in range(3)]
              for name in ("rlhf-v1", "rlhf-v2")}
    for name, rows in rounds.items():
        pool.add(name, rows)
    best = pool.best(judges)
    everything = [(name, row) for name, rows in rounds.items() for row in rows]
    rewards = judges.rewards(prompts, [dict(row) for _, row in everything]).tolist()
    expected = reference.best(rewards, [row["index"] for _, row in everything])
    assert len(best) == len(expected) == 2, "no row for a prompt without answers"
    for index, row in enumerate(best):
        name, picked = everything[expected[index]]
        assert row["messages"] == [*prompts[index]["prompt"], {"role": "assistant", "content": picked["answer"]}]
        assert (row["answer_ids"], row["version"]) == (picked["answer_ids"], name)
        assert row["tokenizer"] == toy_tokenizer().fingerprint and row["is_safety"] == prompts[index]["is_safety"]
        assert row["reward"] == pytest.approx(rewards[expected[index]], abs=1e-4)
    assert {row["version"] for row in best} <= set(rounds)


def test_sample_pool_takes_older_answers_and_scores_them_again(judges):
    """An answer of the first round stays in the race, by today's score, not by the one written when it was sampled."""
    prompts, rng = toy_prompts(1), random.Random(0)
    rows = [answer(0, [rng.randrange(300), rng.randrange(300), 2], k) for k in range(8)]
    order = sorted(range(8), key=judges.rewards(prompts, [dict(row) for row in rows]).tolist().__getitem__)
    best, worst = rows[order[-1]], rows[order[0]]
    pool = SamplePool(prompts)
    pool.add("rlhf-v1", [best | {"reward": -99.0}])
    pool.add("rlhf-v2", [worst | {"reward": 99.0}])
    [row] = pool.best(judges)
    assert (row["version"], row["answer_ids"]) == ("rlhf-v1", best["answer_ids"])


def test_sample_pool_leaves_out(judges):
    """An answer cut at the length limit never gains an EOS: left out and counted, and so are tags and silence."""
    prompts = toy_prompts(1)
    rows = [answer(0, [7, k, 2], k) for k in range(12)]
    order = sorted(range(12), key=judges.rewards(prompts, [dict(row) for row in rows]).tolist().__getitem__)
    best = [rows[k] for k in reversed(order)]
    pool = SamplePool(prompts)
    pool.add(
        "v", [best[0] | {"finish_reason": "length"}, best[1] | {"has_tag": True}, best[2] | {"answer": ""}, *best[3:]]
    )
    [row] = pool.best(judges)
    assert row["answer_ids"] == best[3]["answer_ids"] and sorted(pool.left_out.values()) == [1, 2]
    empty = SamplePool(prompts)
    empty.add("v", [best[0] | {"finish_reason": "length"}])
    assert empty.best(judges) == [] and sum(empty.left_out.values()) == 1


def test_search_temperature(monkeypatch):
    """The mean over prompts of the best of K decides: .9 and .8 beat a higher mean over all answers."""
    table = {.5: [.6, .6, .6, .6], 1.0: [.9, 0., 0., .8], 1.5: [1.0, -5., .1, .1]}
    calls = []

    def sample_answers(model, tokenizer, prompts, **options):
        calls.append(options)
        return [answer(i, [1], k, temperature=options["temperature"]) for i in range(2) for k in range(2)]

    class FakeJudges:
        def rewards(self, prompts, rows):
            return torch.tensor(table[rows[0]["temperature"]])

    monkeypatch.setattr(rejection_sampling, "sample_answers", sample_answers)
    best, means = search_temperature(
        None, None, [None] * 2, FakeJudges(), temperatures=(0.5, 1.0, 1.5), samples=2, key=(0, "x")
    )
    assert best == 1.0 and means == pytest.approx({.5: .6, 1.0: .85, 1.5: .55})
    assert {options["key"] for options in calls} == {(0, "x")}, "the same random numbers for each temperature"
    assert {options["samples"] for options in calls} == {2}


# -------------------------------------------------------------------------------------------------------------- a round


def judges_of(out, version) -> Judges:
    return Judges({axis: out / f"rlhf-v{version}" / f"reward-{axis}" for axis in AXES}, torch.device("cpu"))


def usable(path):
    return [row for row in lines(path) if row["finish_reason"] == "eos" and row["answer"] and not row["has_tag"]]


def test_run_round():
    """V2 of the chain: for each prompt the best of all answers of both rounds, by V2's own reward models."""
    out, printed = chain()
    judge, folder = judges_of(out, 2), out / "rlhf-v2"
    best = read_sft(folder / "best.jsonl")
    prompts = read_prompts(toy.FOLDER / "prompts-train.jsonl")[:16]
    answers = [(v, row) for v in (1, 2) for row in usable(out / f"rlhf-v{v}" / "samples.jsonl")]
    assert len(lines(out / "rlhf-v1" / "samples.jsonl")) == len(lines(folder / "samples.jsonl")) == 16 * 4
    rewards = judge.rewards(prompts, [dict(row) for _, row in answers]).tolist()
    expected = reference.best(rewards, [row["index"] for _, row in answers])
    assert len(best) == len(expected) > 8 and {row["version"] for row in best} == {"rlhf-v1", "rlhf-v2"}
    for (_, i), row in zip(sorted(expected.items()), best, strict=True):
        version, picked = answers[i]
        assert (
            row["messages"][:-1] == prompts[picked["index"]]["prompt"]
            and row["messages"][-1]["content"] == picked["answer"]
        )
        assert row["reward"] == pytest.approx(rewards[i], abs=2e-3)
        assert (row["answer_ids"], row["version"]) == (picked["answer_ids"], f"rlhf-v{version}") or rewards.count(
            rewards[i]
        ) > 1
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
    assert record["results"]["sources"] == {v: sum(row["version"] == v for row in best) for v in ("rlhf-v1", "rlhf-v2")}
    assert record["results"]["temperature"] in (0.8, 1.0) and "wrote" in printed["rejection_sampling"]
    log = lines(folder / "metrics.jsonl")
    assert {row["phase"] for row in log} == {"helpfulness", "safety", "temperature", "finetune"}
    dialogs = encode_rows(toy_tokenizer(), best, 2048)
    losses = [held_out_loss(runtime.load_model(out / name)[0], dialogs) for name in ("rlhf-v1", "rlhf-v2")]
    assert losses[1] < losses[0], "V2 learned what it was tuned on"


def test_run_round_samples_from_the_newest_model():
    """V2's answers are V1's own: their log-probabilities are those under V1, and not those under SFT."""
    out, _ = chain()
    prompts = read_prompts(toy.FOLDER / "prompts-train.jsonl")
    rows = [row for row in lines(out / "rlhf-v2" / "samples.jsonl") if len(row["answer_ids"]) > 4][:10]

    def logprob(model, tokenizer, row):
        prompt = encode_prompt(tokenizer, prompts[row["index"]]["prompt"])
        with torch.no_grad():
            found = model(torch.tensor([prompt + row["answer_ids"]]))[0].log_softmax(-1)
        return sum(found[len(prompt) - 1 + i, token].item() for i, token in enumerate(row["answer_ids"]))

    under = {name: [logprob(*runtime.load_model(out / name), row) for row in rows] for name in ("sft", "rlhf-v1")}
    assert under["rlhf-v1"] == pytest.approx([row["logprob"] for row in rows], abs=1e-2)
    assert under["sft"] != pytest.approx([row["logprob"] for row in rows], abs=1e-2)


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
    for v in (1, 2):  # the record says what each round was made from: that is still there, unchanged
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
    """--pool last takes this round's answers alone, --start sft tunes SFT again, --mix adds rows, --annotator none
    keeps the reward models."""
    tuned = {}
    monkeypatch.setattr(rejection_sampling, "finetune", lambda model, dialogs, **options: tuned.update(
        start=model.tok_embeddings.weight.clone(), dialogs=dialogs, options=options))
    mix = shutil.copy(chain()[0] / "rlhf-v1" / "best.jsonl", tmp_path / "mix.jsonl")
    rounds(tmp_path, "--rounds", 2, "--pool", "last", "--start", "sft", "--mix", mix, "--annotator", "none")
    best = read_sft(tmp_path / "rlhf-v2" / "best.jsonl")
    assert {row["version"] for row in best} == {"rlhf-v2"} and not (tmp_path / "rlhf-v2" / "reward-safety").exists()
    assert torch.equal(tuned["start"], runtime.load_model(tmp_path / "sft")[0].tok_embeddings.weight)
    rows = [*best, *read_sft(mix)]
    assert [dialog.ids[-len(row["answer_ids"]):] for dialog, row in zip(tuned["dialogs"], rows, strict=True)] == [
        row["answer_ids"] for row in rows], "trained on the ids that were sampled"
    prompts = read_prompts(toy.FOLDER / "prompts-train.jsonl")
    with_old = Judges({axis: tmp_path / "rlhf-v1" / f"reward-{axis}" for axis in AXES}, torch.device("cpu"))
    for row, again in zip(lines(tmp_path / "rlhf-v2" / "samples.jsonl")[:5], with_old.rewards(
            prompts, lines(tmp_path / "rlhf-v2" / "samples.jsonl")[:5]).tolist(), strict=True):
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
    monkeypatch.setattr(rejection_sampling, "open_stage", lambda folder, settings, inputs, fresh: started.update(
        {folder.name: inputs["model"].name}))
    run_quietly(
        rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", "5-6", "--init", tmp_path / "rlhf-v4-ppo"
    )
    assert started == {"rlhf-v5": "rlhf-v4-ppo", "rlhf-v6": "rlhf-v5"}


def test_each_command_names_what_is_missing(tmp_path):
    for have, told in [
        ((), r"sft is missing; `python sft.py`"),
        (("sft",), "reward-helpfulness is missing; `python reward.py`"),
        (("reward-helpfulness", "reward-safety"), "rlhf-v1 is missing; `python rejection_sampling.py --rounds 1`"),
    ]:
        for name in have:
            (tmp_path / name).symlink_to(chain()[0] / name)
        with pytest.raises(InputError, match=told):
            run_quietly(rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", 1 if "rlhf" not in told else 2)
    assert run_round.__module__ == "rejection_sampling"


def test_rounds_without_an_annotator(tmp_path):
    """--annotator none: every round scores with the first reward models, which stay as they are."""
    for name in ("sft", "reward-helpfulness", "reward-safety"):
        (tmp_path / name).symlink_to(chain()[0] / name)
    run_quietly(rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", "1-2", "--annotator", "none")
    for version in ("rlhf-v1", "rlhf-v2"):
        assert runtime.is_finished(tmp_path / version) and not list((tmp_path / version).glob("reward-*"))
    rows = list(read_jsonl(tmp_path / "rlhf-v2" / "samples.jsonl"))
    assert rows and all(row["version"] == "rlhf-v2" for _, row in rows)


def test_a_pool_of_other_prompts_is_refused(tmp_path):
    """Answers are joined by the number of their prompt, so another list of prompts would glue them to strangers."""
    for name in ("sft", "reward-helpfulness", "reward-safety", "rlhf-v1"):
        (tmp_path / name).symlink_to(chain()[0] / name)
    with pytest.raises(InputError, match="was made from other prompts"):
        run_quietly(rejection_sampling.main, *TINY, "--out", tmp_path, "--rounds", "2", "--max-prompts", "3")
