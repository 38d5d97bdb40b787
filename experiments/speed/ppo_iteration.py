"""How fast is an iteration of PPO, beside TRL's PPOTrainer?

    python -m experiments.speed.ppo_iteration

Size S over the toy world's words, float32: answers of exactly so many tokens to the toy world's
prompts, their rewards, the value of each token, then one gradient step on each of two mini-batches.
Both have a policy, its reference and a value network; ours asks two reward models, TRL one. What
stands before the first iteration and behind the last does not count. TRL's
PPOTrainer lies in `trl.experimental` in the release that is pinned here.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data import Prompt, Tokenizer, encode_prompt, world
from experiments.speed import peers
from experiments.speed.measuring import Case, Settings, Time, main, time_steps
from experiments.speed.sizes import Size, flops
from model import Transformer
from ppo import Critic, ppo_step, rollout
from ppo import Settings as PPOSettings
from rejection_sampling import RewardModels
from reward import RewardModel, save_reward_model
from sft import adamw

KIND = "PPO iteration"


def cases(settings: Settings) -> Iterator[Case]:
    size = settings.small.with_words()
    batch = settings.few(64)
    yield case(size, batch, new=settings.few(64), iterations=settings.few(3))


def case(size: Size, batch: int, new: int, iterations: int) -> Case:
    """Iterations of `batch` answers with `new` tokens each."""
    tokenizer = Tokenizer(world.TOKENIZER)
    tokenizer.eos_id = -1  # an id that no token has: every answer gets its full length
    prompts = world.prompts("train", {"ordinary": batch}, 0)
    encoded = [encode_prompt(tokenizer, prompt.messages) for prompt in prompts]
    policy = size.model()
    skipped = peers.missing("transformers", "trl", "datasets")
    theirs = None if skipped else their_run(policy, encoded, new, iterations)
    return Case(
        kind=KIND,
        name=f"{size.name}, {batch} answers of {new} tokens",
        unit="answers",
        amount=iterations * batch,
        ours=our_run(policy, tokenizer, prompts, new, iterations),
        theirs=theirs,
        peer="TRL PPOTrainer",
        skipped=skipped,
        target=1.7,
        most_repeats=4,
        flops=iterations * operations(size, [len(ids) + new for ids in encoded], new),
    )


def operations(size: Size, lengths: list[int], new: int) -> float:
    """Least operations of our iteration: ten forward passes (a backward pass is two), of which the
    policy samples and learns, the reference reads.
    """
    outputs = new * len(lengths)
    body = flops(size.args, lengths, 0)
    head = flops(size.args, [], outputs)
    sample = body + head
    read = 2 * body + body + (body + head)  # reward models, value network, reference
    learn = 3 * (body + head) + 3 * body  # policy, value network
    return sample + read + learn


def our_run(
    policy: Transformer, tokenizer: Tokenizer, prompts: list[Prompt], new: int, iterations: int
) -> Callable[[], Time]:
    """`ppo.rollout`, then `ppo.ppo_step` on each mini-batch."""
    reference = copy_of(policy).requires_grad_(False)
    critic = Critic(copy_of(policy))
    reward_models = make_reward_models(policy)
    reward_models.tokenizer = tokenizer
    half = len(prompts) // 2
    settings = PPOSettings(batch=len(prompts), mini_batch=half, max_new_tokens=new)
    optimizers = {"policy": adamw(policy, 1e-5), "critic": adamw(critic, 1e-5)}

    def train() -> None:
        for i in range(iterations):
            key = (0, "speed", i)
            batch = rollout(policy, reference, critic, reward_models, prompts, key, settings)
            for start in (0, half):
                picked = list(range(start, start + half))
                ppo_step(policy, critic, optimizers, batch, picked, settings)

    return lambda: time_steps(train, updates=2 * len(optimizers))


def copy_of(model: Transformer) -> Transformer:
    """Another model with the same weights."""
    copy = Transformer(model.args)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def make_reward_models(body: Transformer) -> RewardModels:
    """Two of them, by way of the files that they are read from."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folders = {}
        for axis in ("helpfulness", "safety"):
            folders[axis] = Path(folder) / axis
            model = RewardModel(copy_of(body))
            save_reward_model(folders[axis], model, Tokenizer(world.TOKENIZER))
        return RewardModels(folders, torch.device("cpu"))


def their_run(
    policy: Transformer, encoded: list[list[int]], new: int, iterations: int
) -> Callable[[], Time]:
    """`PPOTrainer.train`: the same prompts in each iteration."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    head = torch.zeros(1, policy.args.dim)
    pad_id = policy.args.vocab_size  # no token that could be sampled
    folder = tempfile.TemporaryDirectory()
    batch = len(encoded)
    settings = peers.trainer_settings(
        Path(folder.name),
        batch,  # all at once: a mini-batch is then one micro-batch
        total_episodes=iterations * batch,
        num_mini_batches=2,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=batch,
        response_length=new,
        temperature=1.0,
        stop_token=None,
        num_sample_generations=0,
        gamma=1.0,
        lam=0.95,
        cliprange=0.2,
        kl_coef=0.03,
        eval_strategy="no",
    )
    dataset = datasets.Dataset.from_dict({"input_ids": encoded})
    trainer = PPOTrainer(
        args=PPOConfig(**settings),
        processing_class=peers.tokenizer(policy.args.vocab_size, pad_id),
        model=peers.llama(policy),
        ref_model=peers.llama(policy),
        reward_model=peers.scorer(policy, head),
        value_model=peers.scorer(policy, head),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    peers.silence(trainer)
    trainer.accelerator.print = lambda *_: None

    def run() -> Time:
        assert folder.name  # lives as long as the trainer
        return time_steps(trainer.train, updates=2)

    return run


if __name__ == "__main__":
    main(cases, __doc__)
