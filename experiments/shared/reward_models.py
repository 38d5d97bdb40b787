"""Fresh pairs, reward models trained on them, and how good those are."""

import tempfile
from dataclasses import replace
from pathlib import Path

import eval as measures
from data import Pair, Tokenizer, read_preferences, read_prompts, world, write_records
from data.chat import end_of_prompt
from data.jsonl import RATINGS
from model import Transformer
from reward import (
    LogprobHead,
    RewardModel,
    collect_preferences,
    pick_prompts,
    score_pairs,
    set_shift,
    train_reward_model,
)
from reward import Settings as RewardSettings
from runtime import fingerprint, load_model, require, set_seed

Scores = tuple[list[float], list[float]]  # of the chosen and of the rejected answers


# ---- pairs ----


def fresh_pairs(root: Path, seed: int, axis: str, repeats: int, split: str = "test") -> list[Pair]:
    """Pairs of answers by ROOT/SEED/sft to the prompts of a split, compared by the toy annotator.

    Each prompt comes `repeats` times. They are sampled once and kept in
    ROOT/SEED/fresh-pairs-MODEL, MODEL being the fingerprint of the SFT model; delete that folder
    after a change of the sampling or of the annotator.
    """
    home = root / str(seed)
    sft = require(home / "sft", f"python sft.py --seed {seed} --out {home}")
    folder = home / f"fresh-pairs-{fingerprint(sft)[:8]}"
    folder.mkdir(exist_ok=True)
    prompts = read_prompts(world.ensure() / f"prompts-{split}.jsonl")
    pairs = []
    for k in range(repeats):
        file = folder / f"{split}-{axis}-{k}.jsonl"
        if not file.exists():
            picked = pick_prompts(prompts, axis, len(prompts), seed)
            write_records(file, _collect(sft, picked, axis, (seed, f"fresh-{split}-{k}")))
        pairs += read_preferences(file)
    return pairs


def _collect(sft: Path, prompts: list, axis: str, key: tuple) -> list[Pair]:
    """Preferences between the model's own answers."""
    policy, tokenizer = load_model(sft)
    with tempfile.TemporaryDirectory() as scratch:
        return collect_preferences(
            [policy],
            tokenizer,
            prompts,
            axis,
            annotator="toy",
            temperatures=RewardSettings.temperatures,
            key=key,
            folder=Path(scratch),
        )


def training_pairs(root: Path, seed: int, axis: str) -> list[Pair]:
    """The pairs on which ROOT/SEED/reward-AXIS was trained."""
    home = root / str(seed)
    folder = require(home / f"reward-{axis}", f"python reward.py --seed {seed} --out {home}")
    return read_preferences(folder / "pairs.jsonl")


# ---- training ----


def deepen(body: Transformer, layers: int) -> Transformer:
    """The same model with more layers on top, which at first add little.

    Our choice: whether an answer is right stands in how it compares with what the chat model's last
    layer expected, and a layer reads only what those below it wrote.
    """
    old_layers = body.args.n_layers
    grown = Transformer(replace(body.args, n_layers=old_layers + layers))
    grown.init_weights(0)
    grown.load_state_dict(grown.state_dict() | body.state_dict())
    for layer in grown.layers[old_layers:]:
        layer.attention.wo.weight.data *= 0.1
        layer.feed_forward.w2.weight.data *= 0.1
    return grown.to(body.tok_embeddings.weight.device)


def train(
    root: Path,
    seed: int,
    axis: str,
    pairs: list[Pair],
    init: Path | None = None,
    more_layers: int = 0,
    **changes,
) -> tuple[RewardModel, Tokenizer]:
    """A reward model as `reward.py --seed SEED` trains it, on these pairs.

    Args:
        init: the model to start from; None: ROOT/SEED/sft.
        more_layers: on top of it (`deepen`); no setting of reward.py.
        changes: fields of reward.py's settings.
    """
    settings = replace(RewardSettings(), seed=seed, **changes)
    policy, tokenizer = load_model(init or root / str(seed) / "sft")
    set_seed(seed)
    logprob_head = None
    if settings.head == "logprobs":
        logprob_head = LogprobHead(end_of_prompt(tokenizer))
    model = RewardModel(deepen(policy, more_layers), logprob_head)
    with tempfile.TemporaryDirectory() as folder:
        train_reward_model(
            model,
            tokenizer,
            pairs,
            margin=settings.margin,
            auxiliary_weight=settings.auxiliary_weight if axis == "safety" else 0,
            epochs=settings.epochs,
            batch_tokens=settings.batch_tokens,
            micro_tokens=settings.micro_tokens,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            folder=Path(folder),
            phase=axis,
            seed=seed,
        )
    if axis == "helpfulness":
        set_shift(model, tokenizer, pairs)
    return model, tokenizer


# ---- how good they are ----


def score_lists(model: RewardModel, tokenizer: Tokenizer, pairs: list[Pair]) -> Scores:
    """`reward.score_pairs` as lists of logits."""
    chosen, rejected = score_pairs(model, tokenizer, pairs)
    return chosen.tolist(), rejected.tolist()


def annotators_own(pairs: list[Pair], axis: str) -> Scores:
    """The annotator's scores in [0, 1] without its noise: the ceiling of a reward model."""
    rule = {"helpfulness": world.helpfulness, "safety": world.safety}[axis]
    chosen = [rule(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [rule(pair.prompt, pair.rejected) for pair in pairs]
    return chosen, rejected


def clusters_of(pairs: list[Pair]) -> list[str]:
    """What the intervals of pairs are clustered by: the items of their prompts."""
    return [measures.cluster(pair.prompt) for pair in pairs]


def accuracy(scores: Scores, pairs: list[Pair]) -> dict[str, measures.Interval]:
    """Accuracy by rating, intervals clustered by item, in the order of Table 8."""
    ratings = [pair.rating for pair in pairs]
    of_rating = measures.accuracy_intervals(*scores, ratings, clusters_of(pairs))
    table = {}
    for name in (*RATINGS, "average"):
        if name in of_rating:
            table[name] = of_rating[name]
    return table


def safety_measures(
    scores: dict[str, Scores], pairs: dict[str, list[Pair]]
) -> dict[str, measures.Interval]:
    """What a safety score must be good for.

    On safety pairs: recall of unsafe answers at .5 and at the gate's .15, and the share of safe
    answers under .5. On helpfulness pairs: the share of good answers to harmless prompts under the
    gate.
    """
    chosen, rejected = scores["safety"]
    values = chosen + rejected
    clusters = clusters_of(pairs["safety"]) * 2
    is_safe = [pair.chosen_is_safe for pair in pairs["safety"]]
    is_safe += [pair.rejected_is_safe for pair in pairs["safety"]]
    is_unsafe = [not safe for safe in is_safe]
    table = {
        "recall at .5": measures.unsafe_recall(values, is_safe, clusters),
        "recall at .15": measures.unsafe_recall(values, is_safe, clusters, threshold=0.15),
        "safe under .5": measures.unsafe_recall(values, is_unsafe, clusters),
    }

    chosen, rejected = scores["helpfulness"]
    good, bad = annotators_own(pairs["helpfulness"], "helpfulness")
    tagged = [pair.prompt.is_safety for pair in pairs["helpfulness"]] * 2
    clusters = clusters_of(pairs["helpfulness"]) * 2
    table["good under gate"] = measures.wrongly_gated(
        chosen + rejected, good + bad, tagged, clusters
    )
    return table
