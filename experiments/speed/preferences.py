"""How fast does a reward model learn from pairs, beside TRL's RewardTrainer?

    python -m experiments.speed.preferences

Size S over the toy world's words, in float32, one epoch, equal numbers of pairs a step on average.
Equal tensors: all answers have the same length. Ragged pairs: written pairs of the toy world, from
rows of ids to the last update; TRL pads the pairs of a step as they come, we put like lengths
together. What stands before the first step and behind the last does not count.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data import Pair, Tokenizer, encode_prompt, world
from experiments.speed import peers
from experiments.speed.measuring import Case, Settings, Time, main, time_steps
from experiments.speed.sizes import Size, flops
from reward import RewardModel, encode_pairs, train_reward_model

KIND = "Reward model on pairs"


def cases(settings: Settings) -> Iterator[Case]:
    tokenizer = Tokenizer(world.TOKENIZER)
    size = settings.small.with_words()
    per_step = settings.few(16)
    steps = settings.few(8)

    pairs = equal_pairs(tokenizer, per_step * steps, 128)
    name = f"{size.name}, equal tensors"
    yield case(size, tokenizer, pairs, per_step, name, target=1.3)

    pairs = world.written_pairs("train", per_step * settings.few(24))
    name = f"{size.name}, ragged pairs, end to end"
    yield case(size, tokenizer, pairs, per_step, name, target=1.5)


def equal_pairs(tokenizer: Tokenizer, count: int, length: int) -> list[Pair]:
    """Pairs whose prompts and answers have `length` tokens together."""
    rng = random.Random(0)
    [prompt] = world.prompts("train", {"ordinary": 1}, 0)
    room = length - len(encode_prompt(tokenizer, prompt.messages))

    def answer() -> list[int]:
        return [rng.randrange(3, tokenizer.vocab_size) for _ in range(room - 1)]

    pairs = []
    for _ in range(count):
        pair = Pair(
            prompt,
            "chosen",
            "rejected",
            chosen_ids=[*answer(), tokenizer.eos_id],
            rejected_ids=[*answer(), tokenizer.eos_id],
            tokenizer=tokenizer.fingerprint,
        )
        pairs.append(pair)
    return pairs


def case(
    size: Size, tokenizer: Tokenizer, pairs: list[Pair], per_step: int, name: str, target: float
) -> Case:
    """One epoch over the pairs."""
    encoded = encode_pairs(tokenizer, pairs, size.args.max_seq_len)
    padded = sum(2 * max(len(chosen), len(rejected)) for chosen, rejected in encoded)
    batch_tokens = round(padded / len(pairs) * per_step)
    torch.manual_seed(0)
    model = RewardModel(size.model())
    lengths = []
    for both in encoded:
        lengths += [len(ids) for ids in both]

    def ours() -> Time:
        with tempfile.TemporaryDirectory() as folder:
            return time_steps(
                lambda: train_reward_model(
                    model,
                    tokenizer,
                    pairs,
                    margin="none",
                    auxiliary_weight=0.0,
                    epochs=1,
                    batch_tokens=batch_tokens,
                    micro_tokens=16384,
                    learning_rate=1e-4,
                    weight_decay=0.1,
                    folder=Path(folder),
                    phase="speed",
                    seed=0,
                )
            )

    skipped = peers.missing("transformers", "trl", "datasets")
    theirs = None if skipped else their_run(model, encoded, per_step)
    return Case(
        kind=KIND,
        name=name,
        unit="pairs",
        amount=len(pairs),
        ours=ours,
        theirs=theirs,
        peer="TRL RewardTrainer",
        skipped=skipped,
        target=target,
        flops=3 * flops(size.args, lengths, 0),
    )


def their_run(
    model: RewardModel, encoded: list[tuple[list[int], list[int]]], per_step: int
) -> Callable[[], Time]:
    """The same epoch by TRL; a new trainer each time, made before the clock starts."""
    import datasets
    from trl import RewardConfig, RewardTrainer

    scorer = peers.scorer(model.body, model.head.weight.detach())
    tokenizer = peers.tokenizer(model.body.args.vocab_size, pad_id=0)
    columns = {
        "chosen_ids": [chosen for chosen, _ in encoded],
        "rejected_ids": [rejected for _, rejected in encoded],
    }
    dataset = datasets.Dataset.from_dict(columns)

    def run() -> Time:
        with tempfile.TemporaryDirectory() as folder:
            settings = peers.trainer_settings(Path(folder), per_step, max_length=None)
            trainer = RewardTrainer(
                model=scorer,
                args=RewardConfig(**settings),
                train_dataset=dataset,
                processing_class=tokenizer,
            )
            return time_steps(peers.silence(trainer).train)

    return run


if __name__ == "__main__":
    main(cases, __doc__)
