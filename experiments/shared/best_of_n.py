"""Many answers of a model, and what the best of N of them gives."""

import math
import random
from pathlib import Path

import torch
from torch import Tensor

import eval as measures
from data import Prompt, read_prompts, world
from rejection_sampling import RewardModels
from reward import AXES
from runtime import is_finished, load_model, newest_reward_models, require, sample_answers

# ---- models, prompts, answers ----


def versions(root: Path) -> list[str]:
    """The finished models of a root, oldest first."""
    require(root / "sft", f"python sft.py --out {root}")
    return [name for name in measures.VERSIONS if is_finished(root / name)]


def reward_models_of(root: Path, names: list[str]) -> RewardModels:
    """The newest reward models among those of these rounds (none: the first ones)."""
    folders = newest_reward_models(root, [root / name for name in names])
    return RewardModels(folders, torch.device("cpu"))


def has_reward_models(folder: Path) -> bool:
    """Whether a round trained reward models of its own."""
    return all((folder / f"reward-{axis}").is_dir() for axis in AXES)


def draw_prompts(count: int) -> list[Prompt]:
    """So many of the test prompts, the same for every seed."""
    prompts = read_prompts(world.ensure() / "prompts-test.jsonl")
    return random.Random(0).sample(prompts, min(count, len(prompts)))


def sampled_scores(
    folder: Path,
    prompts: list[Prompt],
    judges: dict[str, RewardModels],
    *,
    samples: int,
    seed: int,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Many answers of a model, and what each pair of reward models and the annotator give them.

    Answers that are cut or hold a tag count like any other.

    Returns:
        {name of the judges: rewards R_c, logits, and "annotator": safety on unsafe prompts, else
        helpfulness}, each (prompts, samples).
    """
    model, tokenizer = load_model(folder)
    answers = sample_answers(
        model, tokenizer, prompts, key=(seed, "many"), samples=samples, temperature=temperature
    )
    scores = {}
    for name, reward_models in judges.items():
        scores[name] = reward_models.scores(prompts, answers)["reward"]
    scores["annotator"] = torch.tensor(annotator_scores(prompts, answers))
    return {name: values.view(len(prompts), samples) for name, values in scores.items()}


def annotator_scores(prompts: list[Prompt], answers: list) -> list[float]:
    """The annotator's score of each answer on its prompt's axis."""
    scores = []
    for judgement in measures.judge(prompts, answers):
        scores.append(measures.score_of(prompts[judgement.index], judgement))
    return scores


# ---- order statistics ----


def sizes_up_to(samples: int) -> list[int]:
    """N = 1, 2, 4, ... up to the number of samples."""
    return [2**i for i in range(samples.bit_length()) if 2**i <= samples]


def order_weights(total: int, n: int, k: int) -> list[float]:
    """For each of `total` sorted values the chance to be the k-th smallest of n that are drawn
    without replacement.

    The sum of weight times value is then the unbiased estimate, from all samples at once, of what
    the k-th of n gives.

    >>> order_weights(4, 2, 2)  # the larger of two of four: 0, 1, 2 and 3 of the 6 pairs
    [0.0, 0.16666666666666666, 0.3333333333333333, 0.5]
    """
    draws = math.comb(total, n)
    weights = []
    for i in range(total):
        with_it = math.comb(i, k - 1) * math.comb(total - 1 - i, n - k)
        weights.append(with_it / draws)
    return weights


def best_of_n(rewards: Tensor, scores: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """What best of N gives on average, from all samples.

    Args:
        rewards, scores: (prompts, samples). sizes: the values of N.

    Returns:
        "maximum" and "median" of the rewards of N answers, and "pick", the score of the answer with
        the highest reward: (sizes, prompts) each.
    """
    total = rewards.shape[1]
    order = rewards.argsort(1)  # (prompts, samples)
    rewards = rewards.gather(1, order)
    scores = scores.gather(1, order)
    largest = _weights(total, sizes, sizes)  # (sizes, samples)
    lower = _weights(total, sizes, [(n + 1) // 2 for n in sizes])  # of the lower median
    upper = _weights(total, sizes, [n // 2 + 1 for n in sizes])
    return {
        "maximum": largest @ rewards.T,
        "median": (lower + upper) / 2 @ rewards.T,
        "pick": largest @ scores.T,
    }


def _weights(total: int, sizes: list[int], ranks: list[int]) -> Tensor:
    """`order_weights` of each size and its rank: (sizes, total)."""
    rows = [order_weights(total, n, k) for n, k in zip(sizes, ranks, strict=True)]
    return torch.tensor(rows)


def intervals_of_rows(values: Tensor, prompts: list[Prompt]) -> list[measures.Interval]:
    """Values (sizes, prompts) -> for each size the mean over prompts, its interval clustered by
    item.
    """
    clusters = [measures.cluster(prompt) for prompt in prompts]
    return [measures.interval(row, clusters) for row in values.tolist()]
