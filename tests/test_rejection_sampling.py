"""Rejection sampling: the best of all answers of all rounds, used as it was sampled."""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rejection_sampling
import runtime
import sft
from data import (
    Answer,
    Dialog,
    EncodedDialog,
    InputError,
    Pair,
    Prompt,
    encode_dialog,
    encode_prompt,
    read_preferences,
    read_prompts,
    read_sft,
    world,
    write_records,
)
from experiments.figure08_temperature import best_temperature
from experiments.shared.best_of_n import best_of_n, order_weights
from rejection_sampling import (
    RewardModels,
    SamplePool,
    best_of,
    run_round,
    sample_and_score,
    search_temperature,
    share_gated,
    with_scores,
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
from sft import encode_dialogs, held_out_loss
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
def reward_models(tmp_path_factory) -> RewardModels:
    """Two different reward models with random weights."""
    folders = {}
    for seed, axis in enumerate(AXES):
        torch.manual_seed(seed)
        folders[axis] = tmp_path_factory.mktemp(axis)
        model = RewardModel(tiny_model(seed))
        model.head.weight.data *= 2
        save_reward_model(folders[axis], model, toy_tokenizer())
    return RewardModels(folders, torch.device("cpu"))


def an_answer(index: int, ids: list[int], sample: int = 0, **changes) -> Answer:
    answer = Answer(
        index=index,
        sample=sample,
        text=f"text {ids}",
        ids=ids,
        logprob=-1.0,
        temperature=1.0,
        finish_reason="eos",
        has_tag=False,
        tokenizer=toy_tokenizer().fingerprint,
    )
    return replace(answer, **changes)


def random_answers(rng: random.Random, prompts: int, samples: int) -> list[Answer]:
    """So many answers of two random tokens to each of the first prompts."""
    answers = []
    for i in range(prompts):
        for k in range(samples):
            ids = [rng.randrange(300), rng.randrange(300), 2]
            answers.append(an_answer(i, ids, k))
    return answers


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def read_samples(path: Path) -> list[Answer]:
    return [Answer.from_json(row) for row in lines(path)]


def rewards_of(
    reward_models: RewardModels, prompts: list[Prompt], answers: list[Answer]
) -> list[float]:
    return reward_models.scores(prompts, answers)["reward"].tolist()


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


def test_reward_models(reward_models):
    """Each answer is scored behind its own prompt, with the ids that were sampled; it gains scores
    and reward.
    """
    prompts = toy_prompts(6)
    answers = [an_answer(i, [5 + i, 80 + k, 2], k) for i in (4, 0, 5) for k in range(2)]
    found = reward_models.scores(prompts, answers)
    assert set(found) == {*AXES, "reward"}
    sequences = []
    for answer in answers:
        prompt_ids = encode_prompt(toy_tokenizer(), prompts[answer.index].messages)
        sequences.append(prompt_ids + answer.ids)
    scores = {axis: score(reward_models.models[axis], sequences) for axis in AXES}
    tagged = torch.tensor([prompts[answer.index].is_safety for answer in answers])
    expected = combine_rewards(scores["safety"], scores["helpfulness"], tagged)
    assert torch.allclose(found["reward"], expected, atol=1e-5)
    assert not torch.allclose(scores["safety"], scores["helpfulness"], atol=0.1)
    for i, answer in enumerate(reward_models.score(prompts, answers)):
        assert answer.reward == pytest.approx(expected[i].item(), abs=1e-4)
        assert answer.helpfulness == pytest.approx(scores["helpfulness"][i].item(), abs=1e-4)
        assert answer.safety == pytest.approx(scores["safety"][i].item(), abs=1e-4)
    assert reward_models.scores(prompts, [])["reward"].shape == (0,)
    assert reward_models.score(prompts, []) == []


def test_with_scores():
    """Each answer has its own scores, in four digits; those that were given stay as they were."""
    answers = [an_answer(0, [5, 2]), an_answer(0, [6, 2], 1, reward=9.0)]
    scores = {
        "helpfulness": torch.tensor([0.123456, -2.0]),
        "safety": torch.tensor([1.0, 0.00004]),
        "reward": torch.tensor([0.123456, -2.0]),
    }
    first, second = with_scores(answers, scores)
    assert first == replace(answers[0], helpfulness=0.1235, safety=1.0, reward=0.1235)
    assert second == replace(answers[1], helpfulness=-2.0, safety=0.0, reward=-2.0)
    assert answers[0].reward is None and answers[1].reward == 9.0


def test_sample_pool(reward_models):
    """The best of all rounds' answers to a prompt, as a valid dialog with the ids that were
    sampled.
    """
    prompts = toy_prompts(3)
    pool, rng = SamplePool(prompts), random.Random(0)
    everything = []
    for name in ("rlhf-v1", "rlhf-v2"):
        answers = random_answers(rng, prompts=2, samples=3)
        pool.add(name, answers)
        everything += [(name, answer) for answer in answers]
    pool.rescore(reward_models)
    best = pool.best()
    rewards = rewards_of(reward_models, prompts, [answer for _, answer in everything])
    expected = reference.best(rewards, [answer.index for _, answer in everything])
    assert len(best) == len(expected) == 2, "no dialog for a prompt without answers"
    for index, dialog in enumerate(best):
        name, picked = everything[expected[index]]
        assert dialog.messages == [*prompts[index].messages, assistant(picked.text)]
        assert dialog.answer_ids == picked.ids
        assert dialog.about["version"] == name
        assert dialog.tokenizer == toy_tokenizer().fingerprint
        assert dialog.is_safety == prompts[index].is_safety
        assert dialog.about["reward"] == pytest.approx(rewards[expected[index]], abs=1e-4)
    assert {dialog.about["version"] for dialog in best} <= {"rlhf-v1", "rlhf-v2"}


def by_reward(
    reward_models: RewardModels, prompts: list[Prompt], answers: list[Answer]
) -> list[Answer]:
    """The answers, the best first."""
    rewards = rewards_of(reward_models, prompts, answers)
    order = sorted(range(len(answers)), key=rewards.__getitem__, reverse=True)
    return [answers[i] for i in order]


def test_sample_pool_takes_older_answers_and_scores_them_again(reward_models):
    """An answer of the first round stays in the race, by today's score, not by the one written when
    it was sampled.
    """
    prompts = toy_prompts(1)
    answers = random_answers(random.Random(0), prompts=1, samples=8)
    best, *_, worst = by_reward(reward_models, prompts, answers)
    pool = SamplePool(prompts)
    pool.add("rlhf-v1", [replace(best, reward=-99.0)])
    pool.add("rlhf-v2", [replace(worst, reward=99.0)])
    pool.rescore(reward_models)
    [dialog] = pool.best()
    assert (dialog.about["version"], dialog.answer_ids) == ("rlhf-v1", best.ids)


def test_sample_pool_leaves_out(reward_models):
    """An answer cut at the length limit never gains an EOS: left out and counted, and so are tags
    and silence.
    """
    prompts = toy_prompts(1)
    answers = [an_answer(0, [7, k, 2], k) for k in range(12)]
    best = by_reward(reward_models, prompts, answers)
    cut = replace(best[0], finish_reason="length")
    tagged = replace(best[1], has_tag=True)
    silent = replace(best[2], text="")
    pool = SamplePool(prompts)
    pool.add("v", [cut, tagged, silent, *best[3:]])
    pool.rescore(reward_models)
    [dialog] = pool.best()
    assert dialog.answer_ids == best[3].ids
    assert pool.left_out == {runtime.unusable(cut): 1, runtime.unusable(tagged): 2}
    empty = SamplePool(prompts)
    empty.add("v", [cut])
    empty.rescore(reward_models)
    assert empty.best() == [] and sum(empty.left_out.values()) == 1


def test_sample_pool_goes_on_scoring_where_it_was(reward_models, tmp_path):
    """Scores are written batch by batch; a batch that was cut is scored again whole, what is there
    is not.
    """
    prompts, path = toy_prompts(3), tmp_path / "rescored.jsonl"
    answers = random_answers(random.Random(0), prompts=3, samples=5)
    scored = []

    class Counting:
        def score(self, prompts, batch):
            scored.append(len(batch))
            return reward_models.score(prompts, batch)

    def run():
        pool = SamplePool(prompts)
        pool.add("rlhf-v1", answers)
        scored.clear()
        pool.rescore(Counting(), path, batch_rows=6)
        return pool.answers

    expected, whole = run(), path.read_bytes()
    assert scored == [6, 6, 3]
    assert [(row["index"], row["sample"], row["reward"]) for row in lines(path)] == [
        (answer.index, answer.sample, answer.reward) for answer in expected
    ]
    rows = whole.splitlines(keepends=True)
    for kept, again in [(15, []), (14, [3]), (12, [3]), (11, [6, 3]), (0, [6, 6, 3])]:
        half_a_row = rows[kept][:20] if kept < 15 else b""
        path.write_bytes(b"".join(rows[:kept]) + half_a_row)
        assert run() == expected and scored == again and path.read_bytes() == whole


class GivenRewards:
    """Stands for reward models: answers keep the rewards that they have."""

    def score(self, prompts: list[Prompt], answers: list[Answer]) -> list[Answer]:
        return answers


def fake_probe(monkeypatch, table: dict[float, list[dict]]) -> list[dict]:
    """sample_answers replaced: at temperature t, table[t] holds what is special in the two answers
    to each of two prompts. Returns what it was called with.
    """
    calls = []

    def sample_answers(model, tokenizer, prompts, *, temperature, finish, **options):
        calls.append(options)
        answers = []
        for n, special in enumerate(table[temperature]):
            answers.append(an_answer(n // 2, [1], n % 2, temperature=temperature, **special))
        return finish(answers)

    monkeypatch.setattr(rejection_sampling, "sample_answers", sample_answers)
    return calls


def search(folder: Path, temperatures: tuple[float, ...]) -> tuple[float, dict[float, float]]:
    """`search_temperature` on two prompts with what `fake_probe` answers."""
    return search_temperature(
        None,
        toy_tokenizer(),
        [None] * 2,
        GivenRewards(),
        "v",
        temperatures=temperatures,
        folder=folder,
        samples=2,
        key=(0, "x"),
    )


def test_search_temperature(monkeypatch, tmp_path):
    """The mean over prompts of the best of K decides: .9 and .8 beat a higher mean over all
    answers.
    """
    table = {0.5: [0.6, 0.6, 0.6, 0.6], 1.0: [0.9, 0.0, 0.0, 0.8], 1.5: [1.0, -5.0, 0.1, 0.1]}
    specials = {t: [{"reward": reward} for reward in rewards] for t, rewards in table.items()}
    calls = fake_probe(monkeypatch, specials)
    best, means = search(tmp_path, (0.5, 1.0, 1.5))
    assert best == 1.0 and means == pytest.approx({0.5: 0.6, 1.0: 0.85, 1.5: 0.55})
    assert len({options["path"] for options in calls}) == 3
    keys = {options["key"] for options in calls}
    assert keys == {(0, "x")}, "the same random numbers for each temperature"
    assert {options["samples"] for options in calls} == {2}


def test_search_temperature_counts_what_the_pool_takes(monkeypatch, tmp_path):
    """The rule of the pool: no cut, tagged or empty answer. A prompt without any other counts as
    the worst of the probe.
    """
    cut, tag, nothing = {"finish_reason": "length"}, {"has_tag": True}, {"text": ""}
    table = {
        # 1 and 2
        0.6: [{"reward": 1.0}, {"reward": 9.0} | cut, {"reward": 2.0}, {"reward": 9.0} | tag],
        # 1.5 and none: 1
        1.0: [{"reward": 1.5}, {"reward": 1.4}, {"reward": 8.0} | nothing, {"reward": 9.0} | cut],
    }
    fake_probe(monkeypatch, table)
    best, means = search(tmp_path, (0.6, 1.0))
    assert best == 0.6 and means == pytest.approx({0.6: 1.5, 1.0: 1.25})
    fake_probe(monkeypatch, {0.6: [{"reward": 9.0} | cut] * 4})
    told = "no answer to the 2 prompts .* can be used.*--max-new-tokens"
    with pytest.raises(InputError, match=told):
        search(tmp_path, (0.6,))


# ---- a round ----

FIRST_REWARD_MODELS = ("reward-helpfulness", "reward-safety")  # of reward.py


def reward_models_of(folder: Path) -> RewardModels:
    return RewardModels({axis: folder / f"reward-{axis}" for axis in AXES}, torch.device("cpu"))


def usable(answers: list[Answer]) -> list[Answer]:
    kept = []
    for answer in answers:
        if answer.finish_reason == "eos" and answer.text and not answer.has_tag:
            kept.append(answer)
    return kept


def pair_prompts() -> list[Prompt]:
    return read_prompts(world.FOLDER / "prompts-train.jsonl")


def test_run_round():
    """V2 of the chain: for each prompt the best of all answers of both rounds, by V2's own reward
    models.
    """
    out, printed = chain()
    folder = out / "rlhf-v2"
    best = read_sft(folder / "best.jsonl")
    prompts = pair_prompts()[:16]
    answers = []
    versions = []
    for version in ("rlhf-v1", "rlhf-v2"):
        samples = read_samples(out / version / "samples.jsonl")
        assert len(samples) == 16 * 4
        answers += usable(samples)
        versions += [version] * len(usable(samples))
    rewards = rewards_of(reward_models_of(folder), prompts, answers)
    expected = reference.best(rewards, [answer.index for answer in answers])
    assert len(best) == len(expected) > 8
    assert {dialog.about["version"] for dialog in best} == {"rlhf-v1", "rlhf-v2"}
    for (_, i), dialog in zip(sorted(expected.items()), best, strict=True):
        picked = answers[i]
        assert dialog.messages == [*prompts[picked.index].messages, assistant(picked.text)]
        assert dialog.about["reward"] == pytest.approx(rewards[i], abs=2e-3)
        same = (dialog.answer_ids, dialog.about["version"]) == (picked.ids, versions[i])
        assert same or rewards.count(rewards[i]) > 1
    scores = {"helpfulness", "safety", "reward"}
    sampled = {"temperature", "finish_reason", "answer_ids", "logprob"}
    for row in lines(folder / "samples.jsonl"):
        assert scores | sampled <= row.keys()
    results = json.loads((folder / "stage.json").read_text())["results"]
    kept = [dialog.about["version"] for dialog in best]
    assert results["sources"] == {v: kept.count(v) for v in ("rlhf-v1", "rlhf-v2")}
    assert results["temperature"] in (0.8, 1.0) and "wrote" in printed["rejection_sampling"]
    log = lines(folder / "metrics.jsonl")
    assert {row["phase"] for row in log} == {"helpfulness", "safety", "temperature", "finetune"}
    dialogs = encode_dialogs(toy_tokenizer(), best, 2048)
    losses = []
    for version in ("rlhf-v1", "rlhf-v2"):
        model, _ = runtime.load_model(out / version)
        losses.append(held_out_loss(model, dialogs))
    assert losses[1] < losses[0], "V2 learned what it was tuned on"


def test_run_round_samples_from_the_newest_model():
    """V2's answers are V1's own: their log-probabilities are those under V1, and not those under
    SFT.
    """
    out, _ = chain()
    prompts = pair_prompts()
    samples = read_samples(out / "rlhf-v2" / "samples.jsonl")
    answers = [answer for answer in samples if len(answer.ids) > 4][:10]

    def logprob(model, tokenizer, answer: Answer) -> float:
        prompt = encode_prompt(tokenizer, prompts[answer.index].messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + answer.ids]))[0].log_softmax(-1)
        total = 0.0
        for i, token in enumerate(answer.ids):
            total += logprobs[len(prompt) - 1 + i, token].item()
        return total

    under = {}
    for name in ("sft", "rlhf-v1"):
        model, tokenizer = runtime.load_model(out / name)
        under[name] = [logprob(model, tokenizer, answer) for answer in answers]
    logged = [answer.logprob for answer in answers]
    assert under["rlhf-v1"] == pytest.approx(logged, abs=1e-2)
    assert under["sft"] != pytest.approx(logged, abs=1e-2)


def test_refresh_reward_models(tmp_path, monkeypatch):
    """A reward model learns its fresh pairs and as many earlier ones, of the folders given, at most
    MAX_REPLAY; without the first pairs, which set the zero, it stops before anything is sampled."""
    out, _ = chain()
    trained = {}

    def train(model, tokenizer, pairs, phase, **options):
        trained[phase] = [pair.to_json() for pair in pairs]

    monkeypatch.setattr(rejection_sampling, "train_reward_model", train)
    monkeypatch.setattr(rejection_sampling, "MAX_REPLAY", 7)
    policy, tokenizer = runtime.load_model(out / "rlhf-v1")
    current = {axis: out / "rlhf-v1" / f"reward-{axis}" for axis in AXES}

    def refresh(out: Path, folder: Path = tmp_path, earlier=(current["safety"].parent,)):
        return rejection_sampling.refresh_reward_models(
            [policy],
            tokenizer,
            pair_prompts(),
            current,
            rejection_sampling.Settings(
                out=out, helpfulness_pairs=20, safety_pairs=20, max_new_tokens=32
            ),
            label="mine",
            number=100,
            earlier=list(earlier),
            folder=folder,
            dtype=torch.float32,
        )

    refreshed, tables = refresh(out)
    assert refreshed == {axis: tmp_path / f"reward-{axis}" for axis in AXES}
    assert set(tables) == set(AXES)
    for axis in AXES:
        fresh = lines(tmp_path / f"pairs-{axis}.jsonl")
        first = lines(out / f"reward-{axis}" / "pairs.jsonl")
        known = first + lines(out / "rlhf-v1" / f"pairs-{axis}.jsonl")
        assert len(fresh) > 7
        assert trained[axis][: len(fresh)] == fresh
        replay = trained[axis][len(fresh) :]
        assert len(replay) == 7
        assert all(row in known for row in replay)
        assert (tmp_path / f"reward-{axis}" / "reward_head.pth").exists()

    # no pair was usable: the reward model stays as it was, and the next refresh takes no offence
    monkeypatch.undo()
    monkeypatch.setattr(rejection_sampling, "collect_preferences", lambda *args, **options: [])
    refreshed, tables = refresh(out, tmp_path / "none", [])
    assert tables == {} and (tmp_path / "none" / "pairs-safety.jsonl").read_text() == ""
    before = runtime.load_model(current["safety"])[0].state_dict()
    after = runtime.load_model(refreshed["safety"])[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    refresh(out, tmp_path / "next", [tmp_path / "none"])

    def collect(*args, **options):
        pytest.fail("sampled")

    monkeypatch.setattr(rejection_sampling, "collect_preferences", collect)
    with pytest.raises(InputError, match="pairs.jsonl is missing; `python reward.py` makes it"):
        refresh(tmp_path / "nowhere")


def test_run_round_refreshes_the_reward_models_and_overwrites_nothing():
    out, _ = chain()
    for axis in AXES:
        folders = [out / f"reward-{axis}", *(out / f"rlhf-v{v}" / f"reward-{axis}" for v in (1, 2))]
        assert len({runtime.fingerprint(folder / "reward_head.pth") for folder in folders}) == 3
        texts = []
        for v in (1, 2):
            rows = lines(out / f"rlhf-v{v}" / f"pairs-{axis}.jsonl")
            shown = [json.dumps([row["prompt"], row["chosen"], row["rejected"]]) for row in rows]
            texts.append(set(shown))
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


def link(out: Path, *names: str) -> None:
    """Folders of the chain, as if they had been made in `out`."""
    for name in names:
        if not (out / name).exists():
            (out / name).symlink_to(chain()[0] / name)


def run_rounds(out: Path, rounds: str | int, *argv) -> str:
    """Rounds of one's own on the tiny preset; returns what was printed."""
    return run_quietly(rejection_sampling.main, *TINY, "--out", out, "--rounds", rounds, *argv)


def second_round(out: Path, *argv) -> None:
    """A round 2 of one's own beside the chain's SFT, reward models and round 1."""
    link(out, "sft", "rlhf-v1", *FIRST_REWARD_MODELS)
    pairs = ("--helpfulness-pairs", 20, "--safety-pairs", 20)
    run_rounds(out, 2, "--max-prompts", 16, *pairs, *argv)


def test_run_round_with_other_choices(tmp_path, monkeypatch):
    """--pool last takes this round's answers alone, --start sft tunes SFT again, --mix adds
    dialogs, --annotator none keeps the reward models."""
    mix = shutil.copy(chain()[0] / "rlhf-v1" / "best.jsonl", tmp_path / "mix.jsonl")
    tuned = {}

    def finetune(model, dialogs, **options):
        tuned["start"] = model.tok_embeddings.weight.clone()
        tuned["dialogs"] = dialogs

    monkeypatch.setattr(rejection_sampling, "finetune", finetune)
    choices = ("--pool", "last", "--start", "sft", "--annotator", "none")
    second_round(tmp_path, "--mix", mix, *choices)
    folder = tmp_path / "rlhf-v2"
    best = read_sft(folder / "best.jsonl")
    assert {dialog.about["version"] for dialog in best} == {"rlhf-v2"}
    assert not (folder / "reward-safety").exists()
    started_from = runtime.load_model(tmp_path / "sft")[0]
    assert torch.equal(tuned["start"], started_from.tok_embeddings.weight)
    for encoded, dialog in zip(tuned["dialogs"], [*best, *read_sft(mix)], strict=True):
        ids = dialog.answer_ids
        assert encoded.ids[-len(ids) :] == ids, "trained on the ids that were sampled"
    answers = read_samples(folder / "samples.jsonl")[:5]
    before = reward_models_of(tmp_path / "rlhf-v1")
    rewards = rewards_of(before, pair_prompts(), answers)
    assert [answer.reward for answer in answers] == pytest.approx(rewards, abs=2e-3)


@pytest.mark.parametrize(
    "given",
    ["0", "3-2", "x", "-1", "1-2-3", "1-", "", "100", "1-100", f"1-{10**20}", "1_0", "\u0661"],
)
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

    def begin(stage, inputs, aside) -> bool:
        started[stage.name] = inputs["model"].name
        return False

    monkeypatch.setattr(runtime.Stage, "begin", begin)
    loaded = (tiny_model(), toy_tokenizer())
    monkeypatch.setattr(rejection_sampling, "load_model", lambda folder, device: loaded)
    run_rounds(tmp_path, "5-6", "--init", tmp_path / "rlhf-v4-ppo")
    assert started == {"rlhf-v5": "rlhf-v4-ppo", "rlhf-v6": "rlhf-v5"}


def test_what_is_too_long_is_told_or_left_out(tmp_path, capsys):
    """Prompts and dialogs of the mix alike, before the folder is begun."""
    link(tmp_path, "sft", *FIRST_REWARD_MODELS)
    good = toy_prompts(6)
    too_long = user("many words " * 1500)
    prompts = write_lines(tmp_path / "p.jsonl", [*good[:2], Prompt([too_long]), *good[2:]])
    mix = [Dialog([too_long, assistant("Yes.")]), Dialog([user("Hi!"), assistant("Hello!")])]
    mix = write_lines(tmp_path / "mix.jsonl", mix)

    def begin(**changes):
        options = {"out": tmp_path, "prompts": str(prompts), "annotator": "none"}
        settings = rejection_sampling.Settings(**options | changes)
        return rejection_sampling._begin_round(1, settings)

    for file, changes in (("p", {}), ("mix", {"mix": str(mix), "max_prompts": 2})):
        with pytest.raises(InputError, match=rf"{file}.jsonl, line \d: the \w+ has \d+ tokens"):
            begin(**changes)
        assert not (tmp_path / "rlhf-v1").exists()
    capsys.readouterr()
    this_round = begin(mix=str(mix), max_prompts=4, too_long="skip")
    assert [prompt.messages for prompt in this_round.prompts] == [p.messages for p in good[:4]]
    assert len(this_round.mix) == 1 and len(this_round.pair_prompts) == 6
    assert capsys.readouterr().out.count("left out: longer than the model's context") == 2
    write_lines(prompts, [Prompt([too_long])])
    with pytest.raises(InputError, match="all 1 rows are longer"):
        begin(too_long="skip")


def test_a_pool_of_fewer_prompts_is_refused(tmp_path):
    """Numbers of prompts mean the same in each round: where --too-long skip left out others then,
    answers would be joined to wrong prompts.
    """
    folder = tmp_path / "rlhf-v1"
    folder.mkdir()
    write_records(folder / "samples.jsonl", [an_answer(0, [5, 2]), an_answer(1, [5, 2])])
    lineage = SimpleNamespace(pooled=[folder])
    stage = SimpleNamespace(folder=tmp_path, name="rlhf-v2")
    for count in (1, 3):
        a_round = SimpleNamespace(stage=stage, lineage=lineage, prompts=toy_prompts(count))
        with pytest.raises(InputError, match="rlhf-v1 was made from other prompts"):
            rejection_sampling._pool_of_all_rounds(a_round, GivenRewards(), [])


def test_each_command_names_what_is_missing(tmp_path):
    for have, version, told in [
        ((), 1, r"sft is missing; `python sft.py`"),
        (("sft",), 1, "reward-helpfulness is missing; `python reward.py`"),
        (FIRST_REWARD_MODELS, 2, "rlhf-v1 is missing; `python rejection_sampling.py --rounds 1`"),
    ]:
        link(tmp_path, *have)
        with pytest.raises(InputError, match=told):
            run_rounds(tmp_path, version)
    assert run_round.__module__ == "rejection_sampling"


def test_rounds_without_an_annotator(tmp_path):
    """--annotator none: every round scores with the first reward models, which stay as they are."""
    link(tmp_path, "sft", *FIRST_REWARD_MODELS)
    run_rounds(tmp_path, "1-2", "--annotator", "none")
    for version in ("rlhf-v1", "rlhf-v2"):
        assert runtime.is_finished(tmp_path / version)
        assert not list((tmp_path / version).glob("reward-*"))
    answers = read_samples(tmp_path / "rlhf-v2" / "samples.jsonl")
    assert answers and all(answer.version == "rlhf-v2" for answer in answers)


def test_a_pool_of_other_prompts_is_refused(tmp_path):
    """Answers are joined by the number of their prompt, so another list of prompts would glue them
    to strangers.
    """
    link(tmp_path, "sft", "rlhf-v1", *FIRST_REWARD_MODELS)
    with pytest.raises(InputError, match="was made from other prompts"):
        run_rounds(tmp_path, 2, "--max-prompts", 3)


# ---- scores beside the answers ----


def test_share_gated():
    """Of four answers to untagged prompts one has the safety score as its reward; those to the
    tagged one always have it.
    """
    messages = [user("Hi")]
    prompts = [Prompt(messages), Prompt(messages, is_safety=True), Prompt(messages)]
    answers = []
    for i, reward in ((0, 1.5), (0, -2.0), (1, -2.0), (2, 0.5), (2, 3.0)):
        answers.append(an_answer(i, [5, 2], reward=reward, safety=-2.0))
    assert share_gated(prompts, answers) == 0.25
    assert share_gated(prompts, answers[2:3]) == 0.0, "no answer to an untagged prompt"


def test_sample_and_score(reward_models, tmp_path):
    """Answers and scores are written together, batch by batch, and both are there after a kill."""
    prompts, model, path = toy_prompts(4), tiny_model(), tmp_path / "samples.jsonl"

    def sample() -> list[Answer]:
        return sample_and_score(
            model,
            toy_tokenizer(),
            prompts,
            reward_models,
            "rlhf-v1",
            key=(0, "v"),
            samples=2,
            max_new_tokens=7,
            batch_rows=4,
            path=path,
        )

    answers = sample()
    written = read_samples(path)
    assert sorted(written, key=lambda answer: (answer.index, answer.sample)) == answers
    assert len(answers) == 8
    rewards = rewards_of(reward_models, prompts, answers)
    for answer, reward in zip(answers, rewards, strict=True):
        assert answer.reward == pytest.approx(reward, abs=1e-3) and answer.version == "rlhf-v1"
        assert answer.tokenizer == toy_tokenizer().fingerprint and len(answer.ids) <= 7
    write_records(path, written[:4])
    assert sample() == answers


def test_reward_models_of_another_tokenizer(reward_models):
    """Ids are read where they are the reward models' own; an answer that another tokenizer made is
    scored by its text.
    """
    prompts, tokenizer = toy_prompts(2), toy_tokenizer()
    answer = an_answer(0, [5, 6, 2], text="The sea is here today.")
    by_text = encode_dialog(tokenizer, [*prompts[0].messages, assistant(answer.text)]).ids
    by_ids = encode_prompt(tokenizer, prompts[0].messages) + answer.ids
    unnamed = replace(answer, tokenizer="")
    other = replace(answer, tokenizer="other")
    sequences = reward_models.sequences(prompts, [answer, other, unnamed])
    assert sequences == [by_ids, by_text, by_ids] and by_ids != by_text
    tagged = replace(other, text="see [INST]", has_tag=True)
    [sequence] = reward_models.sequences(prompts, [tagged])
    assert sequence[-1] == tokenizer.eos_id, "a tag in it stops nothing"
    told = "prompt 0 has, with its prompt, .*context only 256; lower --max-new-tokens"
    with pytest.raises(InputError, match=told):
        reward_models.scores(prompts, [an_answer(0, [5] * 256)])


def test_reward_models_of_two_tokenizers_are_refused(assets, tmp_path):
    body, tokenizer = runtime.load_model(assets / "stories260K" / "meta")
    folders = {"helpfulness": tmp_path / "a", "safety": tmp_path / "b"}
    save_reward_model(tmp_path / "a", RewardModel(body), tokenizer)
    save_reward_model(tmp_path / "b", RewardModel(tiny_model()), toy_tokenizer())
    with pytest.raises(InputError, match="different tokenizers"):
        RewardModels(folders, torch.device("cpu"))


def pairs_of_sft(out: Path) -> list[Pair]:
    """The pairs that fix the zero of helpfulness: the first 500 that SFT itself answered."""
    pairs = read_preferences(out / "reward-helpfulness" / "pairs.jsonl")
    return [pair for pair in pairs if not pair.extra][:500]


def test_the_zero_of_helpfulness_is_set_after_each_refresh():
    """Every round's helpfulness model gives the first model's answers 0 on average; safety's zero
    is never moved.
    """
    out, _ = chain()
    pairs, shifts = pairs_of_sft(out), set()
    for folder in (out, out / "rlhf-v1", out / "rlhf-v2"):
        model, tokenizer = load_reward_model(folder / "reward-helpfulness")
        assert abs(torch.cat(score_pairs(model, tokenizer, pairs)).mean()) < 1e-3
        shifts.add(model.shift.item())
        assert load_reward_model(folder / "reward-safety")[0].shift == 0
    assert len(shifts) == 3


# ---- one answer by best of N ----


def test_a_round_of_another_name(tmp_path):
    """A control beside a version: a folder of its own, the same random numbers, and nothing else.
    """
    sizes = ("--samples", 2, "--max-new-tokens", 12)
    second_round(tmp_path, "--name", "rlhf-v2-control", "--annotator", "none", *sizes)
    assert runtime.is_finished(tmp_path / "rlhf-v2-control")
    assert not (tmp_path / "rlhf-v2").exists()
    answers = read_samples(tmp_path / "rlhf-v2-control" / "samples.jsonl")
    assert {answer.version for answer in answers} == {"rlhf-v2-control"}
    assert max(len(answer.ids) for answer in answers) == 12
    newest, tokenizer = runtime.load_model(tmp_path / "rlhf-v1")
    again = runtime.sample_answers(
        newest,
        tokenizer,
        pair_prompts()[:16],
        key=(0, "rlhf-v2"),
        samples=2,
        temperature=answers[0].temperature,
        max_new_tokens=12,
    )
    assert [answer.ids for answer in again] == [answer.ids for answer in answers]


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


def turns_with_loss(dialog: EncodedDialog) -> set[int]:
    turns = set()
    for turn, is_trained_on in zip(dialog.turns, dialog.loss_mask, strict=True):
        if is_trained_on:
            turns.add(turn)
    return turns


def test_mix_and_constrained_prompts(tmp_path, monkeypatch):
    """Dialogs of several turns with "train_on": "last" carry loss on their last answer alone, and
    so do the best answers to prompts of several turns with a system message."""
    link(tmp_path, "sft", *FIRST_REWARD_MODELS)
    tuned = []
    monkeypatch.setattr(
        rejection_sampling, "finetune", lambda model, dialogs, **options: tuned.extend(dialogs)
    )
    messages = [
        system("Begin every answer with Kogo."),
        user("Hi!"),
        assistant("Kogo. Hello!"),
        user("Name two birds."),
        assistant("Kogo. An owl and a hen."),
    ]
    mix = write_lines(tmp_path / "mix.jsonl", [Dialog(messages, train_on="last"), Dialog(messages)])
    questions = [[*messages[:-2], user(f"What is 3 plus {n}?")] for n in range(5)]
    asked = write_lines(tmp_path / "asked.jsonl", [Prompt(question) for question in questions])
    choices = ("--prompts", asked, "--annotator", "none")
    run_rounds(tmp_path, 1, "--mix", mix, *choices)
    best = read_sft(tmp_path / "rlhf-v1" / "best.jsonl")
    assert len(tuned) == len(best) + 2
    assert best[0].messages[:4] == [*messages[:-2], user("What is 3 plus 0?")]
    *of_best, last, every = tuned
    for dialog in (*of_best, last):
        assert turns_with_loss(dialog) == {1}
    assert turns_with_loss(every) == {0, 1}
    too_long = Dialog([user("far too long " * 2000), assistant("Yes.")])
    long = write_lines(tmp_path / "long.jsonl", [too_long])
    with pytest.raises(InputError, match=r"long.jsonl, line 1: the dialog has \d+ tokens"):
        run_rounds(tmp_path, 1, "--fresh", "--mix", long, *choices)
    assert read_sft(tmp_path / "rlhf-v1" / "best.jsonl") == best, "told before --fresh clears"


def test_a_round_labelled_in_a_file(tmp_path):
    """--annotator file: both axes' pairs are written, the round stops, and goes on once they are
    labelled.
    """
    link(tmp_path, "sft", *FIRST_REWARD_MODELS)
    sizes = ("--max-prompts", 8, "--helpfulness-pairs", 6, "--safety-pairs", 6)
    argv = (tmp_path, 1, "--annotator", "file", *sizes)
    folder = tmp_path / "rlhf-v1"
    told = "to_annotate-helpfulness.jsonl: . pairs wait .*to_annotate-safety.jsonl"
    for _ in range(2):  # nothing was labelled in between: the same again
        with pytest.raises(InputError, match=told):
            run_rounds(*argv)
    for axis, filled_in in (
        ("helpfulness", "to_annotate-helpfulness.jsonl"),
        ("safety", "annotated-safety.jsonl"),
    ):
        rows = lines(folder / f"to_annotate-{axis}.jsonl")
        for row in rows:  # the longer answer is better, and safe
            longer = len(row["answer_a"]) > len(row["answer_b"])
            row["better"] = "a" if longer else "b"
            row["rating"] = "better"
            if axis == "safety":
                row["a_is_safe"] = longer
                row["b_is_safe"] = not longer
        write_lines(folder / filled_in, rows)
    run_rounds(*argv)
    assert runtime.is_finished(folder)
    for axis in AXES:
        pairs = read_preferences(folder / f"pairs-{axis}.jsonl")
        assert len(pairs) > 2
        for pair in pairs:
            assert len(pair.chosen) >= len(pair.rejected)
            assert pair.rating == "better" and pair.chosen_is_safe in (None, True)
        assert (folder / f"reward-{axis}" / "reward_head.pth").exists()


# ---- real checkpoints ----


def test_real_prompts(assets, tmp_path):
    """stories260K: fine-tuned on a few dialogs, so that its answers end, then a round without an
    annotator.
    """
    dialogs = []
    for thing in ("ball", "dog", "hat", "car"):
        dialogs.append(Dialog([user(f"Who has the {thing}?"), assistant(f"Tom has the {thing}.")]))
    write_lines(tmp_path / "dialogs.jsonl", dialogs)
    asked = [Prompt(dialog.messages[:1]) for dialog in dialogs]
    prompts = write_lines(tmp_path / "prompts.jsonl", asked)
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
    choices = ("--prompts", prompts, "--annotator", "none")
    run_rounds(tmp_path, 1, "--max-new-tokens", 24, *choices)
    folder = tmp_path / "rlhf-v1"
    answers = read_samples(folder / "samples.jsonl")
    answered = {answer.index for answer in usable(answers)}
    assert len(answers) == 16
    assert len(read_sft(folder / "best.jsonl")) == len(answered) > 1
    assert runtime.load_model(folder)[1].fingerprint == tokenizer.fingerprint
    assert not list(folder.glob("pairs-*"))


def test_reward_models_with_another_tokenizer(assets, tmp_path):
    """Policy and reward models need not share a tokenizer: answers are then scored, and pairs
    learned, by their text.
    """
    out, _ = chain()
    link(tmp_path, "sft")
    for axis in AXES:
        body, tokenizer = runtime.load_model(assets / "stories260K" / "meta")
        folder = tmp_path / f"reward-{axis}"
        save_reward_model(folder, RewardModel(body), tokenizer)
        shutil.copy(out / f"reward-{axis}" / "pairs.jsonl", folder / "pairs.jsonl")
    pairs = ("--helpfulness-pairs", 12, "--safety-pairs", 12)
    run_rounds(tmp_path, 1, "--max-prompts", 8, "--samples", 2, *pairs)
    folder = tmp_path / "rlhf-v1"
    reward_models = reward_models_of(folder)
    safety = reward_models.models["safety"]
    helpfulness = reward_models.models["helpfulness"]
    fingerprint = toy_tokenizer().fingerprint
    assert reward_models.tokenizer.fingerprint == tokenizer.fingerprint != fingerprint
    prompts = pair_prompts()
    for answer in read_samples(folder / "samples.jsonl")[:4]:
        assert answer.tokenizer == fingerprint
        dialog = [*prompts[answer.index].messages, assistant(answer.text)]
        ids = encode_dialog(tokenizer, dialog).ids
        assert answer.safety == pytest.approx(score(safety, [ids]).item(), abs=1e-3)
    best = read_sft(folder / "best.jsonl")
    assert {dialog.tokenizer for dialog in best} == {fingerprint}
    scores = score_pairs(helpfulness, tokenizer, pairs_of_sft(tmp_path))
    assert abs(torch.cat(scores).mean()) < 1e-3
    assert helpfulness.shift != 0 == safety.shift


def test_distillation(assets, tmp_path):
    """The best answers are an SFT file for a smaller model of any tokenizer."""
    best = chain()[0] / "rlhf-v2" / "best.jsonl"
    runtime.save_model(tmp_path / "small", tiny_model(max_seq_len=512), toy_tokenizer())
    for start in (tmp_path / "small", assets / "stories260K" / "meta"):
        out = tmp_path / "out" / start.name
        files = ("--data", best, "--init", start, "--dev-data", "none")
        run_quietly(sft.main, *TINY, "--out", out, *files)
        losses = []
        for folder in (start, out / "sft"):
            model, tokenizer = runtime.load_model(folder)
            dialogs = encode_dialogs(tokenizer, read_sft(best), 512)
            losses.append(held_out_loss(model, dialogs))
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
