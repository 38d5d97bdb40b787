"""What training is wired from: plan, warm-up, clipping, float32, learning rates, layouts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import gatt
import model as llama
import ppo
import sft
from data import Answer, Dialog
from data.batches import plan_steps
from model import ModelArgs, Transformer, generate
from ppo import Critic, Rollout, answer_logprobs, ppo_step
from reward import AXES, RewardModel, save_reward_model
from runtime import load_checkpoint, save_model
from runtime.weights import export_hf, hf_name, load_model, read_config, read_params
from sft import adamw, cosine_lr, optimise
from tests.helpers import (
    TINY,
    Kill,
    assistant,
    run_quietly,
    tiny_model,
    toy_prompts,
    toy_tokenizer,
    user,
    write_lines,
)


def gradient_norm(model) -> float:
    """Of all gradients of a network together."""
    found = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat(found).norm().item()


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """What would be left of it in bfloat16."""
    return tensor.bfloat16().float()


# ------------------------------------------------------------------------------------ the plan


def orders(epochs: int, seed: int, rows: int = 30) -> list[list[int]]:
    """The order of rows in each epoch; a step is one row here."""
    steps = plan_steps([1] * rows, batch_tokens=1, epochs=epochs, seed=seed)
    flat = [row for step in steps for batch in step for row in batch]
    return [flat[i : i + rows] for i in range(0, len(flat), rows)]


def test_plan_steps_shuffles_each_epoch_anew():
    """Each epoch takes each row once, in an order of its own, which the seed decides."""
    found = orders(3, seed=0)
    assert len(found) == 3
    assert all(sorted(order) == list(range(30)) for order in found)
    assert len(set(map(tuple, found))) == 3
    assert list(range(30)) not in found
    assert found == orders(3, seed=0)
    assert found[0] != orders(1, seed=1)[0]


def test_plan_steps_is_a_fair_sample():
    """Steps are not sorted by length. No row of an epoch is dropped."""
    lengths = list(range(1, 41))
    steps = plan_steps(lengths, batch_tokens=100, epochs=1, seed=0)
    tokens = [sum(lengths[row] for batch in step for row in batch) for step in steps]
    assert sorted(row for step in steps for batch in step for row in batch) == list(range(40))
    assert max(tokens) <= 100
    firsts = [step[0][0] for step in steps]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


# ------------------------------------------------------------------------------ the training loop


def line(weight: float = 1.0) -> torch.nn.Linear:
    """Three weights of this size."""
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    return model


def fit(folder, model, steps: int = 1, scale: float = 1.0, die_at: int = -1, **options):
    """Pull some sums to 0, four rows a step; returns the log's rows. Dies in call `die_at`."""
    data = torch.arange(1.0, 13.0).view(4, 3) / 12
    calls = []

    def batch_loss(rows):
        calls.append(rows)
        if len(calls) == die_at:
            raise Kill
        return scale * model(data[rows]).float().square().sum(), len(rows), {}

    options = dict(learning_rate=1e-3, weight_decay=0.0, phase="fit") | options
    optimise(model, [[[0, 1], [2, 3]]] * steps, batch_loss, folder=folder, **options)
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(warmup_fraction=0.25), 10),
        (dict(warmup_fraction=0.25, warmup_steps=5), 10),  # the fraction is more
        (dict(warmup_fraction=0.05, warmup_steps=5), 5),  # the fixed number is more
        (dict(warmup_fraction=0.0), 0),
        (dict(), 1),  # 3 % of 40
    ],
)
def test_optimise_warms_up_for_the_longer_of_the_two(tmp_path, options, expected):
    log = fit(tmp_path, line(), steps=40, **options)
    wanted = [cosine_lr(step, 40, 1e-3, expected) for step in range(40)]
    assert [row["lr"] for row in log] == pytest.approx(wanted, rel=1e-4)


def test_optimise_warms_up_once(tmp_path):
    """A run that was killed during the warm-up goes on with the very same learning rates."""
    options = dict(steps=20, warmup_fraction=0.5, save_every=1)
    with pytest.raises(Kill):
        fit(tmp_path, line(), die_at=11, **options)  # in step 5: two micro-batches a step
    log = fit(tmp_path, line(), **options)
    wanted = [cosine_lr(step, 20, 1e-3, 10) for step in range(20)]
    assert [row["lr"] for row in log] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scale, clipped", [(1000.0, True), (0.01, False)])
def test_optimise_clips(tmp_path, monkeypatch, scale, clipped):
    """AdamW sees a gradient of norm 1 at most, divided by the count. The log has its own norm."""
    model, seen, step = line(), [], torch.optim.AdamW.step

    def watched(*args, **options):
        seen.append(gradient_norm(model))
        return step(*args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    [row] = fit(tmp_path, model, scale=scale)
    assert (row["grad_norm"] > 1) == clipped
    assert seen == [pytest.approx(1.0 if clipped else row["grad_norm"], rel=1e-4)]


def test_optimise_trains_in_float32(tmp_path):
    """bfloat16 is for products. Weights keep steps of 1e-6, in the memory and on the disk."""
    model, seen = line(), []

    def watch(module, given, found):
        seen.append((module.weight.dtype, found.dtype))

    model.register_forward_hook(watch)
    fit(tmp_path, model, steps=3, learning_rate=1e-6, dtype=torch.bfloat16)
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert model.weight.dtype == torch.float32
    assert (model.weight < 1).all()
    assert (rounded(model.weight) == 1).all(), "bfloat16 could not hold it"
    state = load_checkpoint(tmp_path / "checkpoint-fit.pth")
    assert state["model"]["weight"].dtype == torch.float32
    assert state["model"]["weight"].equal(model.weight)
    assert state["optimizer"]["state"][0]["exp_avg"].dtype == torch.float32


# ----------------------------------------------------------------------------------------- SFT


STEP = 2.0**-20


def nudge(model) -> None:
    """A step that float32 holds exactly and bfloat16 not at all."""
    with torch.no_grad():
        model.norm.weight += STEP


def test_sft_main(tmp_path, monkeypatch):
    """Each setting reaches the training loop. Weights are float32 there and on the disk."""
    given = {}

    def finetune(model, dialogs, **options):
        given.update(options)
        given["dialogs"] = len(dialogs)
        given["weights"] = {weight.dtype for weight in model.parameters()}
        nudge(model)

    monkeypatch.setattr(sft, "finetune", finetune)
    dialog = Dialog([user("Hi"), assistant("Hello!")])
    data = write_lines(tmp_path / "dialogs.jsonl", [dialog] * 5)
    wanted = {
        "epochs": 3,
        "batch_tokens": 77,
        "micro_tokens": 66,
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "warmup_fraction": 0.125,
        "seed": 4,
    }
    options = [word for key, x in wanted.items() for word in ("--" + key.replace("_", "-"), x)]
    where = ["--out", tmp_path, "--data", data, "--dev-data", "none"]
    run_quietly(sft.main, *TINY, *where, "--dtype", "bfloat16", *options)
    assert {name: given[name] for name in wanted} == wanted
    assert given["dtype"] == torch.bfloat16
    assert given["folder"] == tmp_path / "sft"
    assert given["dialogs"] == 5
    assert given["weights"] == {torch.float32}
    state = load_checkpoint(tmp_path / "sft" / "consolidated.00.pth")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert (state["norm.weight"] > 1).all()


# ----------------------------------------------------------------------------- Ghost Attention


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_resample_earlier_takes_the_share(tmp_path, monkeypatch, share):
    """So many of the earlier answers are sampled again, not the others."""
    turn = [user("Name two birds."), assistant("Owl.")]
    messages = [*turn * 10, user("Spell cat.")]
    dialogs = [gatt.GhostDialog(messages, "Obey.", [{"long": "Obey."}])] * 60
    asked = []

    def sample_answers(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        cut = Answer(0, 0, "", [], 0.0, 1.0, finish_reason="length", has_tag=False)
        return [cut for _ in prompts]

    monkeypatch.setattr(gatt, "sample_answers", sample_answers)
    gatt.resample_earlier(None, toy_tokenizer(), dialogs, gatt.Settings(resampled=share), tmp_path)
    assert len(asked) / 600 == pytest.approx(share, abs=0.05)


# ------------------------------------------------------------------------------------ sampling


def test_generate_draws_in_float32(monkeypatch):
    """A model in bfloat16 draws from probabilities in float32: 8 bits would lose rare tokens."""
    model, seen, draw = tiny_model().bfloat16(), [], llama.sample_top_p

    def watched(probs, *rest):
        seen.append(probs.dtype)
        return draw(probs, *rest)

    monkeypatch.setattr(llama, "sample_top_p", watched)
    generate(model, [[1, 5, 6]], [(0,)], 4, 1.0, eos_id=-1)
    assert seen == [torch.float32] * 4


# ----------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize("name", ["policy", "critic"])
@pytest.mark.parametrize("size, clipped", [(1000.0, True), (1e-3, False)])
def test_ppo_step_clips(name, size, clipped):
    """Each network's gradient has norm 1 at most, whatever the other's is."""
    models = {"policy": tiny_model(3), "critic": Critic(tiny_model(5))}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (4, 10), generator=generator)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, 4:] = True
    old = answer_logprobs(models["policy"], tokens, mask).detach()
    numbers = size * torch.randn(4, 10, generator=generator) * mask
    batch = Rollout([], tokens, mask, old, old, old, old, numbers, numbers, numbers)
    optimizers = {key: adamw(model, 1e-3) for key, model in models.items()}
    policy, critic = models.values()
    found = ppo_step(policy, critic, optimizers, batch, [0, 1, 2, 3], ppo.Settings())
    assert (found["grad_norm"] > 1) == clipped
    norm = gradient_norm(models[name])
    assert norm == pytest.approx(1, rel=1e-3) if clipped else 0 < norm < 0.9


class Wires:
    """ppo.main with everything that computes taken out; it keeps what main passed on.

    A step adds STEP to the policy's norm and 1 to the value network's bias.
    It dies in step `die_at`.
    """

    def __init__(self, monkeypatch, die_at: int = -1):
        self.steps, self.looks, self.rollouts, self.die_at = [], [], [], die_at
        for name in ("rollout", "ppo_step", "held_out"):
            monkeypatch.setattr(ppo, name, getattr(self, name))
        monkeypatch.setattr(ppo, "describe", lambda batch, prompts: {"reward": 0.0, "kl": 0.0})
        monkeypatch.setattr(ppo, "show_answers", lambda *args: None)

    def rollout(self, policy, reference, critic, reward_models, prompts, key, settings, dtype):
        self.rollouts.append(SimpleNamespace(policy=policy, reference=reference, dtype=dtype))
        answer = Answer(0, 0, "Yes.", [5, 2], -1.0, 1.0, "eos", has_tag=False)
        answers = [answer] * len(prompts)
        return SimpleNamespace(answers=answers, scores=torch.zeros(len(prompts)))

    def ppo_step(self, policy, critic, used, batch, picked, settings, dtype):
        if len(self.steps) == self.die_at:
            raise Kill
        kinds = {weight.dtype for model in (policy, critic) for weight in model.parameters()}
        self.steps.append(
            SimpleNamespace(
                used=set(used),
                picked=list(picked),
                dtype=dtype,
                kinds=kinds,
                rates={name: x.param_groups[0]["lr"] for name, x in used.items()},
                decays={name: x.param_groups[0]["weight_decay"] for name, x in used.items()},
                owners={name: x.param_groups[0]["params"][0] for name, x in used.items()},
                first={"policy": next(policy.parameters()), "critic": next(critic.parameters())},
                bias=critic.head.bias.item(),
                moved=policy.norm.weight[0].item(),
            )
        )
        nudge(policy)
        critic.head.bias.data += 1
        return {"value_loss": 0.0, "policy_loss": 0.0}

    def held_out(self, policy, reference, reward_models, prompts, settings, start):
        self.looks.append((policy, reference, reference.norm.weight.clone()))
        reward = policy.norm.weight[0].item()  # each step makes it better
        return {"reward": reward, "spread": 1.0, "kl": 0.5, "length": 3.0}


@pytest.fixture
def ppo_argv(tmp_path, monkeypatch) -> list:
    """Argv of a PPO run on a random model and random reward models, saved each iteration."""
    monkeypatch.setattr(ppo, "SAVE_EVERY", 1)
    save_model(tmp_path / "start", tiny_model(1), toy_tokenizer())
    for axis in AXES:
        save_reward_model(tmp_path / f"reward-{axis}", RewardModel(tiny_model(2)), toy_tokenizer())
    prompts = write_lines(tmp_path / "prompts.jsonl", toy_prompts(20))
    where = ["--out", tmp_path, "--init", tmp_path / "start", "--prompts", prompts]
    once = ["--annotator", "none", "--value-init", "policy", "--patience", 9]
    sizes = ["--batch", 10, "--mini-batch", 4, "--max-new-tokens", 8]
    times = ["--iterations", 3, "--value-warmup", 1, "--evaluate-every", 1]
    return [*TINY, *where, *once, *sizes, *times]


def test_ppo_main_uses_each_answer_once(ppo_argv, monkeypatch):
    """10 answers in mini-batches of 4 are 4, 4 and 2: none is dropped. The order changes."""
    wires = Wires(monkeypatch)
    run_quietly(ppo.main, *ppo_argv)
    assert [len(step.picked) for step in wires.steps] == [4, 4, 2] * 3
    found = [sum((step.picked for step in wires.steps[i : i + 3]), []) for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(10)) for order in found)
    assert len(set(map(tuple, found))) == 3


def test_ppo_main_warms_the_value_network_up(ppo_argv, monkeypatch):
    """So many iterations alone, no more and no fewer; then both."""
    wires = Wires(monkeypatch)
    run_quietly(ppo.main, *ppo_argv)
    assert [step.used for step in wires.steps] == [{"critic"}] * 3 + [{"policy", "critic"}] * 6


def test_ppo_main_gives_each_network_its_own_optimiser(ppo_argv, monkeypatch):
    wires = Wires(monkeypatch)
    options = ["--learning-rate", 0.25, "--value-learning-rate", 0.5, "--weight-decay", 0.75]
    run_quietly(ppo.main, *ppo_argv, *options)
    last = wires.steps[-1]
    assert last.rates == {"policy": 0.25, "critic": 0.5}
    assert last.decays == {"policy": 0.75, "critic": 0.75}
    assert all(last.owners[name] is last.first[name] for name in ("policy", "critic"))


def test_ppo_main_measures_against_the_start(ppo_argv, monkeypatch):
    """The reference is another network than the policy, and stays as it was."""
    wires = Wires(monkeypatch)
    run_quietly(ppo.main, *ppo_argv)
    policy, reference, _ = wires.looks[0]
    assert policy is not reference
    assert len(wires.looks) == 4
    assert all(look[:2] == (policy, reference) for look in wires.looks)
    assert all((norm == 1).all() for _, _, norm in wires.looks)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert all(found.policy is policy for found in wires.rollouts)
    assert all(found.reference is reference for found in wires.rollouts)


def test_ppo_main_trains_in_float32(ppo_argv, monkeypatch, tmp_path):
    """bfloat16 is for products. Policy and value network stay float32, on the disk, too."""
    wires = Wires(monkeypatch)
    run_quietly(ppo.main, *ppo_argv, "--dtype", "bfloat16")
    assert all(step.kinds == {torch.float32} for step in wires.steps)
    assert all(found.dtype == torch.bfloat16 for found in wires.steps + wires.rollouts)
    state = load_checkpoint(tmp_path / "start-ppo" / "consolidated.00.pth")
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert (state["norm.weight"] == 1 + 9 * STEP).all()
    critic = load_checkpoint(tmp_path / "start-ppo" / "critic.pth")
    assert {weight.dtype for weight in critic.values()} == {torch.float32}


def test_ppo_main_goes_on_with_both_networks(ppo_argv, monkeypatch):
    """Killed in its second iteration: both go on as they were after the first."""
    with monkeypatch.context() as patch, pytest.raises(Kill):
        Wires(patch, die_at=4)
        run_quietly(ppo.main, *ppo_argv)
    wires = Wires(monkeypatch)
    run_quietly(ppo.main, *ppo_argv)
    assert [step.bias for step in wires.steps] == [3, 4, 5, 6, 7, 8]
    assert [step.moved for step in wires.steps] == [1 + n * STEP for n in range(3, 9)]


# ------------------------------------------------------------------------------------- layouts

SMALL = ModelArgs(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=1600, multiple_of=8)
ODD = replace(SMALL, head_dim=6, ffn_dim=40, norm_eps=3e-4, rope_theta=5e5, max_seq_len=77)


def random_model(args: ModelArgs) -> Transformer:
    model = Transformer(args)
    model.init_weights(0)
    return model


def test_hf_names():
    """Hugging Face's, by hand: which of the two norms and of the three matrices is which."""
    for ours, theirs in {
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "norm": "model.norm",
        "layers.7.attention_norm": "model.layers.7.input_layernorm",
        "layers.7.ffn_norm": "model.layers.7.post_attention_layernorm",
        "layers.7.attention.wq": "model.layers.7.self_attn.q_proj",
        "layers.7.attention.wk": "model.layers.7.self_attn.k_proj",
        "layers.7.attention.wv": "model.layers.7.self_attn.v_proj",
        "layers.7.attention.wo": "model.layers.7.self_attn.o_proj",
        "layers.7.feed_forward.w1": "model.layers.7.mlp.gate_proj",
        "layers.7.feed_forward.w2": "model.layers.7.mlp.down_proj",
        "layers.7.feed_forward.w3": "model.layers.7.mlp.up_proj",
    }.items():
        assert hf_name(f"{ours}.weight") == f"{theirs}.weight"


def test_export_hf_config(tmp_path):
    """Every number of the model stands in config.json: transformers has other defaults."""
    export_hf(tmp_path / "hf", random_model(ODD).bfloat16(), toy_tokenizer())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "vocab_size": 1600,
        "rms_norm_eps": 3e-4,
        "rope_theta": 5e5,
        "max_position_embeddings": 77,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": toy_tokenizer().bos_id,
        "eos_token_id": toy_tokenizer().eos_id,
    }
    assert read_config(tmp_path / "hf" / "config.json") == replace(ODD, multiple_of=256)
    sampling = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert sampling["bos_token_id"] == toy_tokenizer().bos_id
    assert sampling["eos_token_id"] == toy_tokenizer().eos_id
    tokens = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert tokens["model_max_length"] == 77


@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_a_vocabulary_larger_than_the_tokenizers(tmp_path, layout):
    """Padded embeddings are read whole."""
    model = random_model(SMALL)
    write = save_model if layout == "meta" else export_hf
    write(tmp_path / "model", model, toy_tokenizer())
    loaded, tokenizer = load_model(tmp_path / "model")
    assert tokenizer.vocab_size < loaded.args.vocab_size == 1600
    assert loaded.tok_embeddings.weight.equal(model.tok_embeddings.weight)
    assert loaded.output.weight.equal(model.output.weight)


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5},  # transformers 4
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},  # transformers 5
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_rope_theta_of_every_transformers(tmp_path, written):
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 1600,
        "intermediate_size": 40,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | written))
    assert read_config(tmp_path / "config.json").rope_theta == 5e5


def test_params_of_the_70b_model(tmp_path):
    """Meta's own file, and a θ as in Code Llama's."""
    params = {
        "dim": 8192,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
        "n_heads": 64,
        "n_kv_heads": 8,
        "n_layers": 80,
        "norm_eps": 1e-6,
        "vocab_size": -1,
        "rope_theta": 1e6,
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    args = read_params(tmp_path / "params.json", toy_tokenizer())
    assert args.kv_heads == 8
    assert args.hidden_size == 28672
    assert args.norm_eps == 1e-6
    assert args.rope_theta == 1e6
    assert args.vocab_size == toy_tokenizer().vocab_size


@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(tmp_path, layout, dtype):
    """As stored, in both layouts. Without a wish they become float32, which training needs."""
    model = random_model(SMALL).to(dtype)
    write = save_model if layout == "meta" else export_hf
    write(tmp_path / "model", model, toy_tokenizer())
    stored, _ = load_model(tmp_path / "model", dtype=None)
    loaded, _ = load_model(tmp_path / "model")
    for name, weight in model.named_parameters():
        assert stored.get_parameter(name).dtype == dtype
        assert loaded.get_parameter(name).dtype == torch.float32
        assert stored.get_parameter(name).equal(weight)
        assert loaded.get_parameter(name).equal(weight.float())
