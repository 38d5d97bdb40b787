"""What each stage hands on to the next function. Recorders stand in for all that computes."""

import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gatt
import model as llama
import ppo
import rejection_sampling
import reward
import sft
from data import (
    Answer,
    Dialog,
    Pair,
    Prompt,
    plan_steps,
    read_jsonl,
    read_preferences,
    read_prompts,
    read_sft,
    world,
    write_records,
)
from data.chat import encode_dialog, encode_turn
from reward import AXES, RewardModel, pick_prompts
from tests.helpers import (
    TINY,
    assistant,
    run_quietly,
    tiny_model,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)


def words(settings: dict) -> list:
    """{"batch_tokens": 77} as the words of a command line: --batch-tokens 77."""
    found = []
    for name, value in settings.items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        found += ["--" + name.replace("_", "-"), shown]
    return found


def silent(*args, **options) -> dict:
    """Stands for what is not recorded; it found nothing."""
    return {}


def an_answer(index: int, sample: int, text: str, **changes) -> Answer:
    """An answer that ends, with the ids of its text."""
    ids = toy_tokenizer().encode(text, eos=True)
    answer = Answer(index, sample, text, ids, -1.0, 1.0, "eos", has_tag=False)
    return replace(answer, **changes)


def a_pair(name: str) -> Pair:
    """A preference that can be told by its prompt."""
    return Pair(Prompt([user(name)]), "Yes.", "No.", rating="better")


def names(pairs: list[Pair]) -> list[str]:
    """What `a_pair` was told, of each pair."""
    return [pair.prompt.question for pair in pairs]


@functools.cache
def pair_prompts() -> list[Prompt]:
    return read_prompts(world.ensure() / "prompts-train.jsonl")


@functools.cache
def dev_prompts() -> list[Prompt]:
    return read_prompts(world.ensure() / "prompts-dev.jsonl")


def made(folder: Path) -> Path:
    """A folder of a model, empty."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def with_reward_models(folder: Path, *axes: str) -> Path:
    """The folder with these reward models in it, empty."""
    for axis in axes:
        (made(folder / f"reward-{axis}") / "reward_head.pth").touch()
    return folder


def finished(folder: Path) -> Path:
    """The folder of a stage that ended."""
    record = {"settings": {}, "inputs": {}, "finished": True}
    (made(folder) / "stage.json").write_text(json.dumps(record))
    return folder


class Model:
    """Stands for the model in a folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.args = SimpleNamespace(max_seq_len=2048)
        self.tok_embeddings = torch.nn.Embedding(1, 1)


# -------------------------------------------------------------------------- rejection sampling


class Rounds:
    """rejection_sampling without what computes. Each list keeps the calls, in order.

    Round n's answers are the best ones to the prompts whose number leaves the rest n by 6.
    Those at temperature 0.75 are better than others.
    """

    def __init__(self, patch: pytest.MonkeyPatch, out: Path):
        self.out, self.collected, self.refreshed, self.trained = out, [], [], []
        self.shifted, self.reward_models, self.sampled = [], [], []
        self.scored, self.tuned = [], []
        stand_ins = {
            "load_model": lambda folder, device: (Model(folder), toy_tokenizer()),
            "load_reward_model": lambda folder, device: (Model(folder), toy_tokenizer()),
            "collect_preferences": self.collect,
            "report_accuracy": self.report,
            "train_reward_model": self.train,
            "set_shift": lambda model, tokenizer, pairs: self.shifted.append((model, pairs)),
            "save_reward_model": lambda folder, *rest: (made(folder) / "reward_head.pth").touch(),
            "save_model": silent,
            "RewardModels": self.load_reward_models,
            "sample_answers": self.sample,
            "finetune": self.tune,
            "show_answers": silent,
            "evaluate_on_dev": silent,
        }
        for name, stand_in in stand_ins.items():
            patch.setattr(rejection_sampling, name, stand_in)

    def short(self, folder: Path) -> str:
        """The folder as seen from OUT."""
        return Path(folder).relative_to(self.out).as_posix()

    def collect(self, policies, tokenizer, prompts, axis, **options):
        folders = [self.short(policy.folder) for policy in policies]
        self.collected.append(options | dict(policies=folders, prompts=prompts, axis=axis))
        return [a_pair(f"{options['key'][-1]} {axis} {i}") for i in range(FRESH[axis])]

    def report(self, model, tokenizer, pairs, axis, which):
        self.refreshed.append((self.short(model.folder), names(pairs)))
        return {}

    def train(self, model, tokenizer, pairs, **options):
        self.trained.append(options | dict(start=self.short(model.folder), names=names(pairs)))

    def load_reward_models(self, folders, device):
        loaded = {axis: self.short(folder) for axis, folder in folders.items()}
        self.reward_models.append(loaded)

        def score(prompts, answers):
            self.scored.append((loaded, {answer.version for answer in answers}))
            scored = []
            for answer in answers:
                is_of_its_round = answer.index % 6 == int(answer.version[-1])
                reward = is_of_its_round + (answer.temperature == 0.75) / 2
                scores = dict.fromkeys((*AXES, "reward"), reward)
                scored.append(replace(answer, **scores))
            return scored

        return SimpleNamespace(score=score)

    def sample(self, model, tokenizer, prompts, *, finish, path, desc="", **options):
        self.sampled.append(options | dict(model=self.short(model.folder), prompts=prompts))
        text = f"By {model.folder.name}."
        temperature = options["temperature"]
        answers = []
        for i in range(len(prompts)):
            for k in range(options["samples"]):
                answers.append(an_answer(i, k, text, temperature=temperature))
        return finish(answers)

    def tune(self, model, dialogs, **options):
        self.tuned.append(options | dict(start=self.short(model.folder), dialogs=dialogs))


FRESH = {"helpfulness": 6, "safety": 4}  # pairs of a collection
FIRST = {"helpfulness": 9, "safety": 8}  # pairs of reward.py
ROUND = {
    "samples": 2,
    "max_new_tokens": 33,
    "temperatures": (0.5, 0.75, 1.25),
    "pair_temperatures": (0.25, 1.5),
    "helpfulness_pairs": 11,
    "safety_pairs": 7,
    "margin": "large",
    "reward_learning_rate": 0.125,
    "reward_batch_tokens": 222,
    "epochs": 3,
    "batch_tokens": 333,
    "micro_tokens": 444,
    "learning_rate": 0.25,
    "weight_decay": 0.5,
    "seed": 4,
    "dtype": "bfloat16",
    "max_prompts": 12,
    "annotator": "file",
}
MIXED = [user("Hi"), assistant("Hello!")]  # of --mix, in round 4

# version: (the model that samples, the other one of a pair)
POLICIES = {
    1: ("start", "sft"),
    2: ("rlhf-v1", "sft"),
    3: ("rlhf-v2", "rlhf-v1"),
    4: ("rlhf-v3", "rlhf-v2"),
    5: ("rlhf-v4-ppo", "rlhf-v4"),
}
# version: where the reward model stood before, for helpfulness and for safety
REWARD_MODELS = {
    1: ("reward-helpfulness", "start/reward-safety"),  # start has none of helpfulness
    2: ("rlhf-v1/reward-helpfulness", "rlhf-v1/reward-safety"),
    3: ("rlhf-v2/reward-helpfulness", "rlhf-v2/reward-safety"),
    4: ("rlhf-v3/reward-helpfulness", "rlhf-v3/reward-safety"),
    5: ("rlhf-v4-ppo/reward-helpfulness", "rlhf-v4-ppo/reward-safety"),
}
# version: whose pairs are replayed, beside those of reward.py
EARLIER = {
    1: ["start"],
    2: ["rlhf-v1"],
    3: ["rlhf-v1", "rlhf-v2"],
    4: ["rlhf-v1", "rlhf-v2", "rlhf-v3"],
    5: ["rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4", "rlhf-v4-ppo"],
}
EACH = pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
BOTH = pytest.mark.parametrize("axis", AXES)


def collection(folder: str, axis: str) -> list[str]:
    """The names of the pairs that a folder holds."""
    count = FIRST[axis] if folder == "first" else FRESH[axis]
    return [f"{folder} {axis} {i}" for i in range(count)]


def write_pairs(path: Path, folder: str, axis: str) -> None:
    made(path.parent)
    write_records(path, [a_pair(name) for name in collection(folder, axis)])


@pytest.fixture(scope="module")
def rounds(tmp_path_factory) -> Rounds:
    """Rounds 1 to 3 from a folder of its own, round 4 with --mix, round 5 from V4-PPO."""
    out = tmp_path_factory.mktemp("rounds")
    made(out / "sft")
    for axis in AXES:
        made(out / f"reward-{axis}")
        write_pairs(out / f"reward-{axis}" / "pairs.jsonl", "first", axis)
        write_pairs(out / "start" / f"pairs-{axis}.jsonl", "start", axis)
        write_pairs(out / "rlhf-v4-ppo" / f"pairs-{axis}.jsonl", "rlhf-v4-ppo", axis)
    with_reward_models(out / "start", "safety")
    with_reward_models(out / "rlhf-v4-ppo", *AXES)
    mix = write_lines(out / "mix.jsonl", [Dialog(MIXED)])
    argv = [*TINY, "--out", out, *words(ROUND)]
    with pytest.MonkeyPatch.context() as patch:
        found = Rounds(patch, out)
        main = rejection_sampling.main
        run_quietly(main, *argv, "--rounds", "1-3", "--init", out / "start")
        run_quietly(main, *argv, "--rounds", 4, "--mix", mix)
        run_quietly(main, *argv, "--rounds", 5, "--init", out / "rlhf-v4-ppo")
    return found


def of_axis(calls: list, version: int, axis: str):
    """Of two calls a round: this round's, this axis'."""
    assert len(calls) == 10
    return calls[2 * (version - 1) + AXES.index(axis)]


def new_reward_models(version: int) -> dict[str, str]:
    """The reward models that a round made."""
    return {axis: f"rlhf-v{version}/reward-{axis}" for axis in AXES}


@EACH
@BOTH
def test_rounds_collect_preferences(rounds, version, axis):
    """From the newest model and the one before it, on prompts drawn anew each round."""
    count = ROUND[f"{axis}_pairs"]
    assert of_axis(rounds.collected, version, axis) == {
        "policies": list(POLICIES[version]),
        "prompts": pick_prompts(pair_prompts(), axis, count, 4000 + version),
        "axis": axis,
        "annotator": "file",
        "temperatures": (0.25, 1.5),
        "key": (4, f"rlhf-v{version}"),
        "folder": rounds.out / f"rlhf-v{version}",
        "max_new_tokens": 33,
    }


@EACH
@BOTH
def test_rounds_refresh_the_newest_reward_models(rounds, version, axis):
    """Each refresh goes on from the last one. It is measured on fresh pairs before."""
    before = REWARD_MODELS[version][AXES.index(axis)]
    fresh = collection(f"rlhf-v{version}", axis)
    assert of_axis(rounds.trained, version, axis)["start"] == before
    assert of_axis(rounds.refreshed, version, axis) == (before, fresh)
    kept = read_preferences(rounds.out / f"rlhf-v{version}" / f"pairs-{axis}.jsonl")
    assert names(kept) == fresh


@EACH
@BOTH
def test_rounds_replay(rounds, version, axis):
    """All fresh pairs, and as many earlier ones of all collections, drawn anew each round."""
    fresh = collection(f"rlhf-v{version}", axis)
    older = [name for folder in ("first", *EARLIER[version]) for name in collection(folder, axis)]
    drawn = random.Random(f"4 {version} {axis}").sample(older, len(fresh))
    assert of_axis(rounds.trained, version, axis)["names"] == fresh + drawn


def test_rounds_replay_no_more_than_there_is(monkeypatch, tmp_path):
    """Few earlier pairs: all of them, once."""
    found = Rounds(monkeypatch, tmp_path)
    first = {axis: made(tmp_path / f"reward-{axis}") for axis in AXES}
    for folder in first.values():
        write_records(folder / "pairs.jsonl", [a_pair("a"), a_pair("b")])
    rejection_sampling.refresh_reward_models(
        [Model(tmp_path / "sft")],
        toy_tokenizer(),
        pair_prompts(),
        first,
        rejection_sampling.Settings(out=tmp_path),
        label="rlhf-v1",
        number=1,
        earlier=[],
        folder=made(tmp_path / "rlhf-v1"),
        dtype=torch.float32,
    )
    assert len(found.trained) == 2
    for axis, given in zip(AXES, found.trained, strict=True):
        assert sorted(given["names"][FRESH[axis] :]) == ["a", "b"]


@EACH
@BOTH
def test_rounds_train_reward_models(rounds, version, axis):
    """Every setting arrives. Only safety has the auxiliary loss."""
    found = dict(of_axis(rounds.trained, version, axis))
    del found["names"], found["start"]
    assert found == {
        "margin": "large",
        "auxiliary_weight": 1.0 if axis == "safety" else 0.0,
        "epochs": 1,
        "batch_tokens": 222,
        "micro_tokens": 444,
        "learning_rate": 0.125,
        "weight_decay": 0.5,
        "folder": rounds.out / f"rlhf-v{version}",
        "phase": axis,
        "seed": 4 + version,
        "dtype": torch.bfloat16,
    }


@EACH
def test_rounds_set_the_zero_of_helpfulness(rounds, version):
    """By the very first pairs, each time."""
    assert len(rounds.shifted) == 5
    model, pairs = rounds.shifted[version - 1]
    assert rounds.short(model.folder) == REWARD_MODELS[version][0]
    assert names(pairs) == collection("first", "helpfulness")


@EACH
def test_rounds_judge_by_the_refreshed_models(rounds, version):
    assert len(rounds.reward_models) == 5
    assert rounds.reward_models[version - 1] == new_reward_models(version)


@EACH
def test_rounds_choose_the_temperature_on_dev_prompts(rounds, version):
    """Three temperatures, one after the other, with random numbers of their own."""
    assert len(rounds.sampled) == 20
    calls = rounds.sampled[4 * version - 4 : 4 * version - 1]
    expected = {
        "model": POLICIES[version][0],
        "prompts": dev_prompts()[:48],
        "key": (4, f"rlhf-v{version}", "temperature"),
        "samples": 2,
        "max_new_tokens": 33,
    }
    assert calls == [expected | {"temperature": t} for t in ROUND["temperatures"]]


@EACH
def test_rounds_sample(rounds, version):
    """From the newest model, on the first so many prompts, at the best temperature."""
    assert rounds.sampled[4 * version - 1] == {
        "model": POLICIES[version][0],
        "prompts": pair_prompts()[:12],
        "key": (4, f"rlhf-v{version}"),
        "samples": 2,
        "max_new_tokens": 33,
        "temperature": 0.75,
    }


@EACH
def test_rounds_pool(rounds, version):
    """Answers of all earlier rounds are scored again, by this round's reward models."""
    pool = {f"rlhf-v{v}" for v in range(1, version)}
    file = rounds.out / f"rlhf-v{version}" / "rescored.jsonl"
    rows = [row for _, row in read_jsonl(file)] if pool else []
    assert {row["version"] for row in rows} == pool
    assert len(rows) == 24 * len(pool)
    assert not pool or (new_reward_models(version), pool) in rounds.scored


@EACH
def test_rounds_keep_the_best_of_all(rounds, version):
    """The prompts that an earlier round answers best keep that answer."""
    best = read_sft(rounds.out / f"rlhf-v{version}" / "best.jsonl")
    assert len(best) == 12
    for i, dialog in enumerate(best):
        owner = i % 6 if 1 <= i % 6 <= version else 1
        assert dialog.about["version"] == f"rlhf-v{owner}"
        assert dialog.messages[-1] == assistant(f"By {POLICIES[owner][0]}.")


@EACH
def test_rounds_finetune(rounds, version):
    """The newest model, on the best answers and those of --mix, with every setting."""
    assert len(rounds.tuned) == 5
    found = dict(rounds.tuned[version - 1])
    tokenizer = toy_tokenizer()
    best = read_sft(rounds.out / f"rlhf-v{version}" / "best.jsonl")
    expected = sft.encode_dialogs(tokenizer, best, 2048)
    if version == 4:
        expected.append(encode_dialog(tokenizer, MIXED))
    assert len(best) == 12
    assert [dialog.ids for dialog in found.pop("dialogs")] == [dialog.ids for dialog in expected]
    assert found == {
        "start": POLICIES[version][0],
        "epochs": 3,
        "batch_tokens": 333,
        "micro_tokens": 444,
        "learning_rate": 0.25,
        "weight_decay": 0.5,
        "folder": rounds.out / f"rlhf-v{version}",
        "phase": "finetune",
        "seed": 4 + version,
        "dtype": torch.bfloat16,
    }


# ------------------------------------------------------------------------------ training loops


TRAINING = {
    "epochs": 3,
    "batch_tokens": 77,
    "micro_tokens": 33,
    "learning_rate": 0.5,
    "weight_decay": 0.25,
    "seed": 4,
}


@pytest.fixture
def optimised(monkeypatch) -> dict:
    """What the one training loop was given."""
    given = {}

    def optimise(model, plan, batch_loss, **options):
        given.update(options | dict(model=model, plan=plan))

    monkeypatch.setattr(sft, "optimise", optimise)
    monkeypatch.setattr(reward, "optimise", optimise)
    return given


def plan_of(lengths: list[int]) -> list:
    """As TRAINING would have it. Each of its settings changes the plan."""
    plan = {name: TRAINING[name] for name in ("batch_tokens", "epochs", "seed", "micro_tokens")}
    found = plan_steps(lengths, **plan)
    for name, other in {"batch_tokens": 55, "epochs": 1, "seed": 0, "micro_tokens": 16384}.items():
        assert plan_steps(lengths, **plan | {name: other}) != found
    return found


def test_finetune(optimised, tmp_path):
    """What is not of the plan goes to the training loop as it came."""
    tokenizer, model = toy_tokenizer(), tiny_model()
    dialogs = [encode_dialog(tokenizer, [user("Hi" * n), assistant("Yes.")]) for n in range(1, 20)]
    rest = {"warmup_fraction": 0.125, "dtype": torch.bfloat16, "watch": print}
    sft.finetune(model, dialogs, folder=tmp_path, phase="mine", **TRAINING, **rest)
    assert optimised == rest | {
        "model": model,
        "plan": plan_of([len(dialog.ids) for dialog in dialogs]),
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "folder": tmp_path,
        "phase": "mine",
    }


def test_train_reward_model(optimised, tmp_path):
    tokenizer, model = toy_tokenizer(), RewardModel(tiny_model())
    pairs = [a_pair("Hi" * n) for n in range(1, 20)]
    encoded = reward.encode_pairs(tokenizer, pairs, 256)
    rest = {"margin": "large", "auxiliary_weight": 1.0, "dtype": torch.bfloat16}
    where = {"folder": tmp_path, "phase": "mine"}
    reward.train_reward_model(model, tokenizer, pairs, **where, **TRAINING, **rest)
    assert optimised == where | {
        "model": model,
        "plan": plan_of([2 * max(map(len, both)) for both in encoded]),
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "warmup_fraction": 0.03,
        "warmup_steps": 5,
        "dtype": torch.bfloat16,
    }


def test_optimise_hands_its_settings_to_adamw(tmp_path, monkeypatch):
    """Learning rate and weight decay reach the optimiser's groups."""
    made_of, adamw = [], sft.adamw
    monkeypatch.setattr(sft, "adamw", lambda *args: made_of.append(args) or adamw(*args))
    model = torch.nn.Linear(2, 1)
    options = {"learning_rate": 0.5, "weight_decay": 0.25, "folder": tmp_path, "phase": "mine"}
    sft.optimise(model, [], None, **options)
    assert made_of == [(model, 0.5, 0.25)]


# ----------------------------------------------------------------------------------------- SFT


def tuned_by_sft(monkeypatch, out: Path, **settings) -> dict:
    """What sft.main gave to `finetune`."""
    given = {}

    def finetune(model, dialogs, **options):
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        given.update(options | dict(model=model, dialogs=dialogs, weights=weights))

    for name in ("show_answers", "save_model"):
        monkeypatch.setattr(sft, name, silent)
    monkeypatch.setattr(sft, "finetune", finetune)
    dialog = Dialog([user("Hi"), assistant("Hello!")])
    data = write_lines(out / "dialogs.jsonl", [dialog] * 5)
    files = ["--out", out, "--data", data, "--dev-data", "none"]
    run_quietly(sft.main, *TINY, *files, *words(settings))
    return given


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    """Of the preset "tiny" over the toy vocabulary."""
    size = llama.PRESETS["tiny"]
    model = llama.Transformer(replace(size, vocab_size=toy_tokenizer().vocab_size))
    model.init_weights(seed)
    return model.state_dict()


def equal(some: dict, others: dict) -> bool:
    return all(weight.equal(others[name]) for name, weight in some.items())


def test_sft_passes_its_settings_on(monkeypatch, tmp_path):
    settings = TRAINING | {"warmup_fraction": 0.125, "dtype": "bfloat16", "max_rows": 3}
    found = tuned_by_sft(monkeypatch, tmp_path, **settings)
    assert len(found.pop("dialogs")) == 3
    assert callable(found.pop("watch"))
    del found["model"], found["weights"]
    assert found == TRAINING | {
        "warmup_fraction": 0.125,
        "dtype": torch.bfloat16,
        "folder": tmp_path / "sft",
        "phase": "sft",
    }


def test_sft_draws_its_weights_by_the_seed(monkeypatch, tmp_path):
    found = tuned_by_sft(monkeypatch, tmp_path, seed=4)
    assert equal(found["weights"], random_weights(4))
    assert not equal(found["weights"], random_weights(0))


def test_sft_starts_from_init(monkeypatch, tmp_path):
    start = tiny_model(7)
    asked = []

    def load_model(folder):
        asked.append(folder)
        return start, toy_tokenizer()

    monkeypatch.setattr(sft, "load_model", load_model)
    found = tuned_by_sft(monkeypatch, tmp_path, init=made(tmp_path / "start"))
    assert asked == [str(tmp_path / "start")]
    assert found["model"] is start


# ------------------------------------------------------------------------------- reward models


REWARD = TRAINING | {
    "margin": "large",
    "auxiliary_weight": 0.75,
    "temperatures": (0.25, 1.5),
    "max_new_tokens": 33,
    "helpfulness_pairs": 11,
    "safety_pairs": 7,
    "dtype": "bfloat16",
}


class Rewards:
    """reward.py without what computes."""

    def __init__(self, monkeypatch, out: Path):
        self.collected, self.trained, self.shifted, self.out = [], [], [], out
        self.loaded = []
        for name in ("save_reward_model", "report_accuracy"):
            monkeypatch.setattr(reward, name, silent)
        monkeypatch.setattr(reward, "load_model", self.load)
        monkeypatch.setattr(reward, "collect_preferences", self.collect)
        monkeypatch.setattr(reward, "train_reward_model", self.train)
        monkeypatch.setattr(reward, "set_shift", self.set_shift)

    def load(self, folder, device):
        self.loaded.append(folder)
        return tiny_model(7), toy_tokenizer()

    def collect(self, policies, tokenizer, prompts, axis, **options):
        self.collected.append(options | dict(prompts=prompts, axis=axis, policies=len(policies)))
        for _ in axis:
            torch.rand(1)  # as if it had sampled, for one axis more than for the other
        return [a_pair(f"{options['key'][-1]} {axis} {i}") for i in range(FRESH[axis])]

    def train(self, model, tokenizer, pairs, **options):
        self.trained.append(options | dict(model=model, names=names(pairs)))

    def set_shift(self, model, tokenizer, pairs):
        self.shifted.append(names(pairs))

    def run(self, **settings) -> "Rewards":
        made(self.out)
        run_quietly(reward.main, *TINY, "--out", self.out, *words(settings))
        return self


def test_reward_passes_its_settings_on(monkeypatch, tmp_path):
    """To both trainings. Only safety has the auxiliary loss."""
    start = made(tmp_path / "start")
    found = Rewards(monkeypatch, tmp_path).run(init=start, **REWARD)
    assert found.loaded == [start, start]
    assert len(found.trained) == 2
    assert found.shifted == [found.trained[0]["names"]]
    for axis, given in zip(AXES, found.trained, strict=True):
        model = given.pop("model")
        assert equal(model.body.state_dict(), tiny_model(7).state_dict())
        assert model.logprob_head is None
        assert given == TRAINING | {
            "margin": "large",
            "auxiliary_weight": 0.75 if axis == "safety" else 0.0,
            "names": [f"sft {axis} {i}" for i in range(FRESH[axis])],
            "folder": tmp_path / f"reward-{axis}",
            "phase": axis,
            "dtype": torch.bfloat16,
        }


@pytest.mark.parametrize("annotator", ["toy", "file"])
def test_reward_collects(monkeypatch, tmp_path, annotator):
    """So many pairs for each axis, and, where it costs nothing, held-out ones."""
    start = made(tmp_path / "start")
    found = Rewards(monkeypatch, tmp_path).run(init=start, annotator=annotator, **REWARD)
    expected = []
    for axis in AXES:
        own = {
            "policies": 1,
            "prompts": pick_prompts(pair_prompts(), axis, REWARD[f"{axis}_pairs"], 4),
            "axis": axis,
            "annotator": annotator,
            "temperatures": (0.25, 1.5),
            "key": (4, "sft"),
            "folder": tmp_path / f"reward-{axis}",
            "max_new_tokens": 33,
        }
        held_out = {"prompts": pick_prompts(dev_prompts(), axis, 10**6, 4), "key": (4, "dev")}
        expected += [own, own | held_out] if annotator == "toy" else [own]
    assert found.collected == expected


def test_reward_passes_the_head_on(monkeypatch, tmp_path):
    found = Rewards(monkeypatch, tmp_path).run(init=made(tmp_path / "start"), head="logprobs")
    expected = reward.end_of_prompt(toy_tokenizer())
    heads = [given["model"].logprob_head for given in found.trained]
    assert [head and head.end_of_prompt for head in heads] == [expected] * 2


def test_reward_draws_its_heads_by_the_seed(monkeypatch, tmp_path):
    """Equal for both axes, whatever was sampled before. Another seed draws another one."""
    heads = []
    for seed in (4, 5):
        out = tmp_path / str(seed)
        found = Rewards(monkeypatch, out).run(init=made(tmp_path / "start"), seed=seed)
        one, two = [given["model"].head.weight for given in found.trained]
        assert one.equal(two)
        heads.append(one)
    assert not heads[0].equal(heads[1])


def test_reward_from_scratch_draws_its_weights_by_the_seed(monkeypatch, tmp_path):
    """--init none. Each fold starts from the very same weights."""
    file = write_lines(tmp_path / "pairs.jsonl", [a_pair(f"n {i}") for i in range(5)])
    found = Rewards(monkeypatch, tmp_path).run(init="none", data=file, folds=0, seed=4)
    [given] = found.trained
    assert equal(given["model"].body.state_dict(), random_weights(4))


def test_collect_preferences(monkeypatch, tmp_path):
    """Each side has a model, a temperature and random numbers of its own."""
    calls = []

    def sample_answers(model, tokenizer, prompts, **options):
        calls.append(options | dict(model=model, prompts=prompts))
        return [an_answer(0, 0, "Yes.", finish_reason="length")] * len(prompts)

    monkeypatch.setattr(reward, "sample_answers", sample_answers)
    prompts = toy_prompts(3)
    options = {
        "annotator": "toy",
        "temperatures": (0.25, 1.5),
        "key": (4, "v"),
        "folder": tmp_path,
        "max_new_tokens": 33,
    }
    for policies in (["new", "old"], ["new"]):
        reward.collect_preferences(policies, toy_tokenizer(), prompts, "safety", **options)
    expected = {"prompts": prompts, "max_new_tokens": 33, "desc": "answers for safety"}
    for call, model, side in zip(calls, ["new", "old", "new", "new"], [0, 1, 0, 1], strict=True):
        assert call == expected | {
            "model": model,
            "key": (4, "v", "safety", side),
            "temperature": (0.25, 1.5)[side],
            "path": tmp_path / f"answers-v-safety-{side}.jsonl",
        }


# ----------------------------------------------------------------------------- Ghost Attention


GATT = TRAINING | {
    "samples": 3,
    "max_new_tokens": 33,
    "temperature": 0.625,
    "dialogs": 6,
    "turns": 9,
    "replay": 5,
    "resampled": 0.5,
    "check": "reward",
    "dtype": "bfloat16",
}


@pytest.fixture
def ghosts(monkeypatch, tmp_path) -> SimpleNamespace:
    """gatt.main on three rounds' reward models, without what computes."""
    found = SimpleNamespace(loaded=[], reward_models=[], sampled=[], tuned=[])

    def load_model(folder, device):
        found.loaded.append(folder)
        return Model(folder), toy_tokenizer()

    def load_reward_models(folders, device):
        found.reward_models.append(folders)
        return SimpleNamespace(
            scores=lambda prompts, answers: {"reward": torch.zeros(len(answers))}
        )

    def sample_answers(model, tokenizer, prompts, *, samples=1, finish=list, **options):
        del options["desc"]
        given = dict(model=model.folder, samples=samples, count=len(prompts))
        found.sampled.append(options | given)
        answers = []
        for i, prompt in enumerate(prompts):
            _, ids = encode_turn(tokenizer, prompt.question, "Yes.")
            for k in range(samples):
                answers.append(Answer(i, k, "Yes.", ids, -1.0, 1.0, "eos", has_tag=False))
        return finish(answers)

    def finetune(model, dialogs, **options):
        found.tuned.append(options | dict(model=model.folder, count=len(dialogs)))

    measures = ("evaluate_on_dev", "adherence", "adherence_by_turn")
    for name in ("save_model", "show_answers", *measures):
        monkeypatch.setattr(gatt, name, silent)
    monkeypatch.setattr(gatt, "load_model", load_model)
    monkeypatch.setattr(gatt, "RewardModels", load_reward_models)
    monkeypatch.setattr(gatt, "sample_answers", sample_answers)
    monkeypatch.setattr(gatt, "finetune", finetune)
    for folder in ("rlhf-v2", "rlhf-v3", "rlhf-v4"):
        with_reward_models(finished(tmp_path / folder), *AXES)
    run_quietly(gatt.main, *TINY, "--out", tmp_path, *words(GATT))
    return found


def test_gatt_passes_its_settings_on(ghosts, tmp_path):
    """V3 answers, is judged by its own reward models, and is tuned."""
    start = tmp_path / "rlhf-v3"
    assert ghosts.loaded == [start]
    assert ghosts.reward_models == [{axis: start / f"reward-{axis}" for axis in AXES}]
    assert ghosts.tuned == [
        TRAINING | {
            "model": start,
            "count": 6 + 5,
            "folder": tmp_path / "gatt",
            "phase": "gatt",
            "dtype": torch.bfloat16,
        }
    ]


def test_gatt_samples(ghosts, tmp_path):
    """Ordinary answers, earlier ones, last ones, each with random numbers of their own."""
    expected = {"model": tmp_path / "rlhf-v3", "temperature": 0.625, "max_new_tokens": 33}
    earlier = ghosts.sampled[1]["count"]
    assert earlier > 0
    calls = [
        ("ordinary", {"key": (4, "gatt", "ordinary"), "samples": 1, "count": 50}),
        ("earlier", {"key": (4, "gatt", "earlier"), "samples": 1, "count": earlier}),
        ("last", {"key": (4, "gatt"), "samples": 3, "count": 6}),
    ]
    assert len(ghosts.sampled) == 3
    for found, (name, call) in zip(ghosts.sampled, calls, strict=True):
        path = tmp_path / "gatt" / f"answers-{name}.jsonl"
        assert found == expected | call | {"path": path}


# ----------------------------------------------------------------------------------------- PPO


PPO = {
    "annotator": "file",
    "helpfulness_pairs": 11,
    "safety_pairs": 7,
    "max_new_tokens": 33,
    "micro_tokens": 444,
    "learning_rate": 0.25,
    "value_learning_rate": 0.125,
    "weight_decay": 0.5,
    "seed": 4,
    "dtype": "bfloat16",
    "iterations": 2,
    "batch": 6,
    "mini_batch": 3,
    "value_warmup": 0,
    "max_prompts": 9,
    "evaluate_every": 2,
}


class Policies:
    """ppo.main without what computes, on V4 behind two finished rounds."""

    def __init__(self, monkeypatch, out: Path, **settings):
        self.out, self.refreshes, self.reward_models, self.adamw = out, [], [], []
        self.rollouts, self.looks, self.steps = [], [], []
        for name in ("rlhf-v1", "rlhf-v3", "rlhf-v4"):
            with_reward_models(finished(out / name), *AXES)
        with_reward_models(made(out / "rlhf-v2"), *AXES)  # begun, not finished
        self.fresh = {axis: out / "rlhf-v4-ppo" / f"reward-{axis}" for axis in AXES}
        stand_ins = {
            "load_model": self.load,
            "RewardModels": self.load_reward_models,
            "refresh_reward_models": self.refresh,
            "adamw": self.optimiser,
            "rollout": self.rollout,
            "held_out": self.held_out,
            "ppo_step": self.step,
            "describe": lambda batch, prompts: {"reward": 0.0, "kl": 0.0},
            "show_answers": silent,
            "save_model": silent,
            "evaluate_on_dev": silent,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(ppo, name, stand_in)
        run_quietly(ppo.main, *TINY, "--out", out, *words(PPO | settings))

    def load(self, folder, device):
        model = tiny_model()
        model.folder = Path(folder)
        return model, toy_tokenizer()

    def load_reward_models(self, folders, device):
        self.reward_models.append(dict(folders))
        models = {"helpfulness": RewardModel(tiny_model())}
        return SimpleNamespace(tokenizer=toy_tokenizer(), models=models)

    def refresh(self, policies, tokenizer, prompts, current, settings, **options):
        folders = [policy.folder for policy in policies]
        given = dict(policies=folders, prompts=prompts, current=current, settings=settings)
        self.refreshes.append(options | given)
        return self.fresh, {}

    def optimiser(self, model, learning_rate, weight_decay):
        self.adamw.append((model, learning_rate, weight_decay))
        return torch.optim.SGD(model.parameters(), lr=learning_rate)

    def rollout(self, policy, reference, critic, reward_models, prompts, key, settings, dtype):
        self.rollouts.append((policy.folder, reference.folder, critic, key, settings, dtype))
        answers = [an_answer(i, 0, "Yes.") for i in range(len(prompts))]
        return SimpleNamespace(answers=answers, scores=torch.zeros(len(prompts)))

    def held_out(self, policy, reference, reward_models, prompts, settings, start):
        self.looks.append(prompts)
        return {"reward": 0.0, "scored": 0.0, "spread": 1.0, "kl": 0.5, "length": 3.0}

    def step(self, policy, critic, optimizers, batch, picked, settings, dtype):
        self.steps.append((settings, dtype))
        return {"value_loss": 0.0, "policy_loss": 0.0}


@pytest.fixture
def policies(monkeypatch, tmp_path) -> Policies:
    return Policies(monkeypatch, tmp_path)


def test_ppo_refreshes(policies, tmp_path):
    """V4's own reward models, on its answers to training prompts, as before every round."""
    start = tmp_path / "rlhf-v4"
    [found] = policies.refreshes
    found_settings = found.pop("settings")
    assert found == {
        "policies": [start],
        "prompts": pair_prompts()[:9],
        "current": {axis: start / f"reward-{axis}" for axis in AXES},
        "label": "rlhf-v4-ppo",
        "number": 100,
        "earlier": [tmp_path / "rlhf-v1", tmp_path / "rlhf-v3", start],
        "folder": tmp_path / "rlhf-v4-ppo",
        "dtype": torch.bfloat16,
    }
    shared = {
        "out": tmp_path,
        "annotator": "file",
        "helpfulness_pairs": 11,
        "safety_pairs": 7,
        "max_new_tokens": 33,
        "micro_tokens": 444,
        "seed": 4,
    }
    preset = rejection_sampling.PRESETS["tiny"]
    assert found_settings == rejection_sampling.Settings(**preset | shared)


def test_ppo_judges_by_the_refreshed_models(policies):
    assert policies.reward_models[-1] == policies.fresh


@pytest.mark.parametrize(
    "value_init, folder", [("policy", "rlhf-v4"), ("reward", "rlhf-v4-ppo/reward-helpfulness")]
)
def test_ppo_passes_the_start_of_the_value_network_on(monkeypatch, tmp_path, value_init, folder):
    """The head of the reward model comes with its body. Beside the policy it starts at 0."""
    found = Policies(monkeypatch, tmp_path, value_init=value_init)
    critic = found.rollouts[0][2]
    assert critic.body.folder == tmp_path / folder
    assert (critic.head.weight != 0).any() == (value_init == "reward")


def test_ppo_passes_its_settings_on(policies, tmp_path):
    """To the optimisers, the rollouts and the steps."""
    start = tmp_path / "rlhf-v4"
    critic = policies.rollouts[0][2]
    assert [(rate, decay) for _, rate, decay in policies.adamw] == [(0.25, 0.5), (0.125, 0.5)]
    assert policies.adamw[1][0] is critic
    assert [found[:2] for found in policies.rollouts] == [(start, start)] * 2
    assert [found[3] for found in policies.rollouts] == [(4, "ppo", 0), (4, "ppo", 1)]
    assert policies.looks == [dev_prompts()] * 2
    expected = {name: value for name, value in PPO.items() if name != "dtype"}
    for settings, dtype in [found[4:] for found in policies.rollouts] + policies.steps:
        assert {name: getattr(settings, name) for name in expected} == expected
        assert dtype == torch.bfloat16


def test_held_out_passes_its_settings_on(monkeypatch):
    calls = []

    def sample_answers(model, tokenizer, prompts, **options):
        calls.append(options | dict(model=model, prompts=prompts))
        return [an_answer(i, 0, "Yes.") for i in range(len(prompts))]

    def scores(prompts, answers):
        return {name: torch.zeros(len(answers)) for name in (*AXES, "reward")}

    monkeypatch.setattr(ppo, "sample_answers", sample_answers)
    monkeypatch.setattr(ppo, "HELD_OUT_SAMPLES", 3)
    policy, prompts = tiny_model(1), toy_prompts(3)
    reward_models = SimpleNamespace(tokenizer=toy_tokenizer(), scores=scores)
    settings = ppo.Settings(seed=4, max_new_tokens=33)
    ppo.held_out(policy, tiny_model(2), reward_models, prompts, settings)
    assert calls == [
        {
            "model": policy,
            "prompts": prompts,
            "key": (4, "ppo held-out"),
            "samples": 3,
            "max_new_tokens": 33,
            "desc": "held-out",
        }
    ]
