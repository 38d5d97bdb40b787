"""Preferences and reward models (paper §3.2.1, §3.2.2).

The paper: an annotator writes a prompt, sees two answers from different models and temperatures, chooses one and says how
much better it is. Two reward models, helpfulness and safety, start from the chat model, its next-token head replaced by a
scalar one, and learn by the ranking loss with a margin that depends on the rating (equation 2), one epoch.
Ours: the annotator is a program or you (`data/annotators.py`). The auxiliary safety loss, for which the paper prints no
formula, is cross-entropy on "is this answer safe"; it fixes the zero of the safety score, which ranking leaves free.

    python reward.py                       both reward models, from out/sft
    python reward.py --axis safety         one of them
"""

import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError, Tokenizer, encode_prompt, pad, plan_steps, read_preferences, read_prompts, toy, write_jsonl
from data.annotators import ANNOTATORS, check_annotator
from data.jsonl import RATINGS
from model import Transformer
from runtime import (
    check_positive,
    choose_device,
    choose_dtype,
    finish_stage,
    in_batches,
    load_checkpoint,
    load_model,
    open_stage,
    optimise,
    parse_settings,
    require,
    run,
    sample_answers,
    save_checkpoint,
    save_model,
    set_seed,
    set_threads,
)

AXES = ("helpfulness", "safety")
MARGINS = {  # m(rating) of equation 2: Table 27
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # reads OUT/sft, writes OUT/reward-helpfulness and OUT/reward-safety
    axis: Literal["both", "helpfulness", "safety"] = "both"  # helpfulness, safety, or both
    init: str = ""  # the model to start from, which also answers the prompts; empty: OUT/sft
    data: str = ""  # JSONL of preferences to train on; empty: sample pairs and annotate them
    prompts: str = "toy"  # JSONL of prompts to collect preferences on
    annotator: Literal["toy", "human"] = "toy"  # toy or human
    helpfulness_pairs: int = 4800  # our choice
    safety_pairs: int = 2000  # our choice; three in four on prompts tagged unsafe or borderline
    temperatures: tuple[float, ...] = (0.8, 1.1)  # of the two answers (paper: varied)
    margin: Literal["none", "small", "large"] = "small"  # Table 27; the paper does not say which one
    auxiliary_weight: float = 1.0  # weight of the auxiliary safety loss (paper A.3.4 prints no formula); safety model only
    epochs: int = 1  # paper: one, since more over-fit
    batch_tokens: int = 1200  # tokens a step (paper: 512 pairs)
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 5e-4  # paper: 1e-5, 5e-6 for 70B; ours suits a small model
    weight_decay: float = 0.1  # paper
    seed: int = 0  # of heads, sampling, annotators' noise and order
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete what is in the two folders


PAPER = dict(batch_tokens=1024 * 1024, micro_tokens=8192, learning_rate=1e-5)
PRESETS = {
    "tiny": dict(helpfulness_pairs=200, safety_pairs=120), "toy": {}, "small": dict(learning_rate=2e-4, batch_tokens=8192),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-70b": PAPER | dict(learning_rate=5e-6),
}


class RewardModel(nn.Module):
    """A transformer whose next-token head gives way to a scalar one, read at the answer's last token (§3.2.2).

    `shift` is subtracted from the helpfulness score, whose zero ranking leaves free: the mean score of the answers in the
    first 500 training pairs.
    """

    def __init__(self, body: Transformer):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.args.dim, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(body.args.dim + 1) ** -0.5)  # scores start near 0 ± 1
        self.register_buffer("shift", torch.zeros(()))
        if not body.args.tie_word_embeddings:
            body.output.requires_grad_(False)  # not used

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (batch, seq) padded on the right, lengths (batch) -> scores (batch), float32: a logit, any real number."""
        features = self.body.features(tokens)  # (batch, seq, dim)
        last = features[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (batch, dim)
        return self.head(last).squeeze(-1).float() - self.shift  # (batch)


def ranking_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(r(x, y_c) - r(x, y_r) - m(rating)), equation 2; with margins 0, equation 1.

    Args:
        chosen, rejected, margins: (pairs,) each. Other shapes raise ValueError: (pairs, 1) would broadcast silently.

    Returns:
        (pairs,) losses in nats.

    >>> ranking_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]))  # log 2
    tensor([0.6931])
    """
    if not chosen.ndim == 1 or not chosen.shape == rejected.shape == margins.shape:
        raise ValueError(f"three equal shapes (pairs,) are wanted: {chosen.shape}, {rejected.shape}, {margins.shape}")
    return -F.logsigmoid(chosen - rejected - margins)


def safety_loss(scores: Tensor, is_safe: Tensor) -> Tensor:
    """Auxiliary safety loss: binary cross-entropy between sigmoid(score) and "this answer is safe".

    Our choice: the paper (A.3.4) adds such a loss and prints no formula. It makes sigmoid(score) the probability that the
    answer is safe, so that 0.15 and 0.5 mean something.

    Args:
        scores: (answers,) logits. is_safe: (answers,) bool.

    Returns:
        (answers,) losses in nats.

    >>> safety_loss(torch.tensor([0.0, 2.0]), torch.tensor([True, False]))  # log 2, log(1 + e^2)
    tensor([0.6931, 2.1269])
    """
    return F.binary_cross_entropy_with_logits(scores, is_safe.float(), reduction="none")


def combine_rewards(safety: Tensor, helpfulness: Tensor, is_safety: Tensor, threshold: float = 0.15) -> Tensor:
    """R_c of §3.2.3, as a logit: the safety score where the prompt is tagged or the answer looks unsafe, else helpfulness.

    Args:
        safety, helpfulness: (n,) scores as the reward models give them, logits (the paper's R are their sigmoids).
        is_safety: (n,) bool, prompts tagged as possibly unsafe.
        threshold: a probability; the paper's 0.15.

    Returns:
        (n,) logits of R_c.

    >>> combine_rewards(torch.tensor([2., 2., -3.]), torch.tensor([1., 1., 1.]), torch.tensor([False, True, False]))
    tensor([ 1.,  2., -3.])
    """
    return torch.where(is_safety | (safety.sigmoid() < threshold), safety, helpfulness)


def encode_answer(tokenizer: Tokenizer, prompt: list[dict], answer: str, answer_ids: list[int] | None = None) -> list[int]:
    """Prompt and answer as ids; the ids that were sampled where they are known, else the text's, with EOS."""
    from data import encode_dialog

    if answer_ids is not None:
        return encode_prompt(tokenizer, prompt) + list(answer_ids)
    return encode_dialog(tokenizer, [*prompt, {"role": "assistant", "content": answer}]).ids


def score(model: RewardModel, sequences: list[list[int]]) -> Tensor:
    """Scores (n,) of sequences of ids (prompt and answer), batched by length; the same as one by one."""
    device = model.head.weight.device

    def forward(batch: list[list[int]]) -> Tensor:
        return model(pad(batch).to(device), torch.tensor([len(ids) for ids in batch], device=device))

    model.eval()
    return in_batches(forward, sequences)


def collect_preferences(policies: list[Transformer], tokenizer: Tokenizer, prompts: list[dict], axis: str, *, annotator: str,
                        temperatures: tuple[float, ...], key: tuple, folder: Path) -> list[dict]:
    """Two answers to each prompt, from two models (or one) at two temperatures, compared by the annotator (§3.2.1).

    Left out: pairs of equal answers, answers that hold a tag of the chat format, and, as in the paper, pairs whose chosen
    answer is unsafe and the other safe.

    Returns:
        rows of the preference format (`data.read_preferences`) with the sampled ids.
    """
    sides = []
    for side, temperature in enumerate(temperatures[:2]):
        sides.append(sample_answers(policies[side % len(policies)], tokenizer, prompts, key=(*key, axis, side),
                                    temperature=temperature, path=folder / f"answers-{key[-1]}-{axis}-{side}.jsonl",
                                    desc=f"answers for {axis}"))
    usable = [i for i, (a, b) in enumerate(zip(*sides, strict=True))
              if a["answer"] != b["answer"] and all(x["answer"] and not x["has_tag"] for x in (a, b))]
    comparisons = [{k: v for k, v in prompts[i].items() if k != "where"} | {"answers": tuple(s[i]["answer"] for s in sides)}
                   for i in usable]
    rows = []
    annotations = ANNOTATORS[annotator](comparisons, axis, " ".join(map(str, key)))
    for i, comparison, found in zip(usable, comparisons, annotations, strict=True):
        chosen, rejected = sides[found["chosen"]][i], sides[1 - found["chosen"]][i]
        row = {name: value for name, value in comparison.items() if name != "answers"}
        row |= {"chosen": chosen["answer"], "rejected": rejected["answer"], "rating": found["rating"],
                "chosen_ids": chosen["answer_ids"], "rejected_ids": rejected["answer_ids"],
                "temperatures": [temperatures[found["chosen"]], temperatures[1 - found["chosen"]]], "version": str(key[-1]),
                "tokenizer": tokenizer.fingerprint, "axis": axis}
        if found["safe"] is not None:
            row |= {"chosen_is_safe": found["safe"][found["chosen"]], "rejected_is_safe": found["safe"][1 - found["chosen"]]}
            if axis == "safety" and row["rejected_is_safe"] and not row["chosen_is_safe"]:
                continue
        rows.append(row)
    return rows


def encode_pairs(tokenizer: Tokenizer, rows: list[dict], max_seq_len: int) -> list[tuple[list[int], list[int]]]:
    """(chosen ids, rejected ids) of each preference row.

    Raises:
        InputError: tags in content or a dialog longer than the context; names file and line.
    """
    pairs = []
    for row in rows:
        same = row.get("tokenizer") == tokenizer.fingerprint
        try:
            pair = tuple(encode_answer(tokenizer, row["prompt"], row[side], row.get(f"{side}_ids") if same else None)
                         for side in ("chosen", "rejected"))
        except InputError as error:
            raise InputError(f"{row.get('where', 'pair')}: {error}") from None
        if max(map(len, pair)) > max_seq_len:
            raise InputError(f"{row.get('where', 'pair')}: the dialog has {max(map(len, pair))} tokens, the model's context "
                             f"only {max_seq_len}")
        pairs.append(pair)
    return pairs


def train_reward_model(model: RewardModel, tokenizer: Tokenizer, rows: list[dict], *, margin: str, auxiliary_weight: float,
                       epochs: int, batch_tokens: int, micro_tokens: int, learning_rate: float, weight_decay: float,
                       folder: Path, phase: str, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """One epoch of equation 2, chosen and rejected in one forward; plus the auxiliary safety loss where rows have labels."""
    pairs, device = encode_pairs(tokenizer, rows, model.body.args.max_seq_len), model.head.weight.device
    plan = plan_steps([2 * max(map(len, pair)) for pair in pairs], batch_tokens, epochs, seed, micro_tokens)

    def batch_loss(picked: list[int]) -> tuple[Tensor, int, dict]:
        sequences = [pairs[i][side] for side in (0, 1) for i in picked]  # all chosen, then all rejected
        lengths = torch.tensor([len(ids) for ids in sequences], device=device)  # (2 x pairs)
        scores = model(pad(sequences).to(device), lengths)  # (2 x pairs)
        chosen, rejected = scores.chunk(2)  # (pairs) each
        margins = torch.tensor([MARGINS[margin].get(rows[i].get("rating"), 0.0) for i in picked], device=device)  # (pairs)
        loss = ranking_loss(chosen, rejected, margins).sum()
        labels = [rows[i].get(f"{side}_is_safe") for side in ("chosen", "rejected") for i in picked]  # (2 x pairs)
        known = [i for i, label in enumerate(labels) if label is not None]
        if auxiliary_weight and known:
            is_safe = torch.tensor([labels[i] for i in known], device=device)
            loss = loss + auxiliary_weight * safety_loss(scores[known], is_safe).sum() / 2  # a pair counts once
        return loss, len(picked), {"accuracy": (chosen > rejected).sum()}

    optimise(model, plan, batch_loss, learning_rate=learning_rate, folder=folder, phase=phase, weight_decay=weight_decay,
             warmup_fraction=0.03, warmup_steps=5, dtype=dtype)


def accuracy_by_rating(chosen: Tensor, rejected: Tensor, ratings: list[str | None]) -> dict[str, float]:
    """Share of pairs whose chosen answer has the higher score (ties half), per rating and on average (Table 8).

    >>> accuracy_by_rating(torch.tensor([1., 0.]), torch.tensor([0., 1.]), ["better", "better"])
    {'better': 0.5, 'average': 0.5}
    """
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()  # (pairs)
    table = {}
    for rating in RATINGS:
        picked = [i for i, found in enumerate(ratings) if found == rating]
        if picked:
            table[rating] = round(right[picked].mean().item(), 4)
    return table | {"average": round(right.mean().item(), 4)}


def score_pairs(model: RewardModel, tokenizer: Tokenizer, rows: list[dict]) -> tuple[Tensor, Tensor]:
    """Scores (pairs,) of the chosen and of the rejected answers."""
    pairs = encode_pairs(tokenizer, rows, model.body.args.max_seq_len)
    return score(model, [chosen for chosen, _ in pairs]), score(model, [rejected for _, rejected in pairs])


def save_reward_model(folder: Path, model: RewardModel, tokenizer: Tokenizer) -> None:
    """A Llama 2 checkpoint and `reward_head.pth`."""
    save_model(folder, model.body, tokenizer)
    save_checkpoint(folder / "reward_head.pth", {"head": model.head.weight.detach().cpu(), "shift": model.shift.cpu()})


def load_reward_model(folder: Path, device: str | torch.device = "cpu") -> tuple[RewardModel, Tokenizer]:
    """What `save_reward_model` wrote."""
    body, tokenizer = load_model(folder, device)
    model, state = RewardModel(body), load_checkpoint(Path(folder) / "reward_head.pth")
    model.head.weight.data.copy_(state["head"])
    model.shift.copy_(state["shift"])
    return model.to(device).eval(), tokenizer


def pick_prompts(prompts: list[dict], axis: str, count: int, seed: int) -> list[dict]:
    """Prompts for a collection, our choice of shares: safety takes three in four that are unsafe or borderline (the paper's
    are adversarial, §3.2.1), helpfulness one in ten that is unsafe."""
    rng, share = random.Random(f"{seed} {axis}"), {"safety": 0.75, "helpfulness": 0.1}[axis]
    risky = [p for p in prompts if p["is_safety"] or (axis == "safety" and p.get("kind") == "borderline")]
    others = [p for p in prompts if not p["is_safety"] and not (axis == "safety" and p.get("kind") == "borderline")]
    n_risky = min(len(risky), round(share * count))
    picked = rng.sample(risky, n_risky) + rng.sample(others, min(len(others), count - n_risky))
    rng.shuffle(picked)
    return picked


def report(model: RewardModel, tokenizer: Tokenizer, rows: list[dict], axis: str, which: str = "held-out") -> dict:
    """Accuracy by rating on pairs that training did not see, beside the annotator's own without its noise."""
    table = {"reward model": accuracy_by_rating(*score_pairs(model, tokenizer, rows), [row.get("rating") for row in rows])}
    if all(row.get("family") in toy.FAMILIES for row in rows):
        rule = {"helpfulness": toy.helpfulness, "safety": toy.safety}[axis]
        own = (torch.tensor([rule(row, row[side]) for row in rows]) for side in ("chosen", "rejected"))
        table["annotator"] = accuracy_by_rating(*own, [row.get("rating") for row in rows])
    print(f"\n{axis}: accuracy on {len(rows)} {which} pairs")
    print(" " * 16 + "".join(f"{rating.replace('_better', ''):>15}" for rating in (*RATINGS, "average")))
    for name, found in table.items():
        print(f"{name:<16}" + "".join(f"{found.get(rating, float('nan')):>15.3f}" for rating in (*RATINGS, "average")))
    return table


def main(argv: list[str] | None = None) -> None:
    # 1. settings, the model to start from, prompts
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    check_positive(s, "helpfulness_pairs", "safety_pairs", "temperatures", "epochs", "batch_tokens", "micro_tokens",
                   "learning_rate")
    if len(s.temperatures) != 2:
        raise InputError(f"--temperatures {s.temperatures}: two are wanted, one for each answer of a pair")
    set_threads(s.threads)
    set_seed(s.seed)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    init = Path(s.init) if s.init else require(s.out / "sft", "python sft.py")
    if s.prompts == "toy":
        toy.ensure()
    train_file, dev_file = ((toy.FOLDER / f"prompts-{split}.jsonl" for split in ("train", "dev")) if s.prompts == "toy"
                            else (Path(s.prompts), None))
    settings = {k: v for k, v in asdict(s).items() if k not in ("out", "fresh", "threads", "device", "axis")}
    inputs = {"init": init} | ({"data": Path(s.data)} if s.data else {"prompts": train_file})
    for axis in AXES if s.axis == "both" else (s.axis,):
        folder, started, cpu = s.out / f"reward-{axis}", time.time(), time.process_time()
        if not open_stage(folder, settings | {"axis": axis}, inputs, s.fresh):
            continue
        policy, tokenizer = load_model(init, device)

        # 2. preferences: sample two answers to each prompt, compare them
        if s.data:
            rows = read_preferences(s.data)
            held_out, rows = rows[: len(rows) // 10], rows[len(rows) // 10:]
            write_jsonl(folder / "pairs.jsonl", ({k: v for k, v in row.items() if k != "where"} for row in rows))
        else:
            options = dict(annotator=s.annotator, temperatures=s.temperatures, folder=folder)
            all_prompts = read_prompts(train_file)
            check_annotator(s.annotator, all_prompts)
            prompts = pick_prompts(all_prompts, axis, getattr(s, f"{axis}_pairs"), s.seed)
            rows = collect_preferences([policy], tokenizer, prompts, axis, key=(s.seed, "sft"), **options)
            write_jsonl(folder / "pairs.jsonl", rows)
            held_out = []
            if dev_file:
                dev = pick_prompts(read_prompts(dev_file), axis, 10**6, s.seed)
                held_out = collect_preferences([policy], tokenizer, dev, axis, key=(s.seed, "dev"), **options)

        if not rows:
            raise InputError(f"{folder}: no pair of different answers to learn from; more pairs, or other --temperatures")

        # 3. train: the policy's body, a new head
        set_seed(s.seed)
        model = RewardModel(policy).to(device)
        train_reward_model(model, tokenizer, rows, margin=s.margin, auxiliary_weight=s.auxiliary_weight * (axis == "safety"),
                           epochs=s.epochs, batch_tokens=s.batch_tokens, micro_tokens=s.micro_tokens,
                           learning_rate=s.learning_rate, weight_decay=s.weight_decay, folder=folder, phase=axis,
                           seed=s.seed, dtype=dtype)

        # 4. fix the zero of helpfulness: the mean score of answers to training prompts
        if axis == "helpfulness":
            answers = [ids for pair in encode_pairs(tokenizer, rows[:500], model.body.args.max_seq_len) for ids in pair]
            model.shift += score(model, answers).mean().to(device)
        results = report(model, tokenizer, held_out, axis) if held_out else {}
        save_reward_model(folder, model, tokenizer)
        finish_stage(folder, results | {"seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu})
        print(f"wrote {folder} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    run(main)
