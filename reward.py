"""Preferences and reward models (paper §3.2.1, §3.2.2).

The paper: an annotator writes a prompt, sees two answers from different models and temperatures, chooses one and says how
much better it is. Two reward models, helpfulness and safety, start from the chat model, its next-token head replaced by a
scalar one, and learn by the ranking loss with a margin that depends on the rating (equation 2), one epoch.
Ours: the annotator is a program or you (`data/annotators.py`). The auxiliary safety loss, for which the paper prints no
formula, is cross-entropy on "is this answer safe"; it fixes the zero of the safety score, which ranking leaves free.

    python reward.py                       both reward models, from out/sft
    python reward.py --axis safety         one of them
    python reward.py --score FILE.jsonl    both scores of any dialogs; --try: of what you type
    python reward.py --data hh-rlhf.jsonl.gz --init none --out out/hh    a small one from scratch on real preferences
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError, Tokenizer, encode_dialog, encode_prompt, pad, plan_steps, preferences, read_prompts, toy, write_jsonl
from data.annotators import ANNOTATORS, check_annotator
from data.chat import end_of_prompt, sampled_ids
from data.jsonl import AXES, RATINGS
from model import PRESETS as SIZES
from model import Transformer, token_logprobs
from runtime import (
    check_positive,
    choose_device,
    choose_dtype,
    finish_stage,
    in_batches,
    kept_settings,
    load_checkpoint,
    load_model,
    newest_reward_models,
    open_stage,
    parse_settings,
    require,
    run,
    sample_answers,
    save_checkpoint,
    save_model,
    set_seed,
    set_threads,
    terminal,
    unusable,
)
from sft import optimise

MARGINS = {  # m(rating) of equation 2: Table 27
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # reads OUT/sft, writes OUT/reward-helpfulness and OUT/reward-safety
    axis: Literal["both", "helpfulness", "safety"] = "both"  # or one of them; --data without safety labels: helpfulness
    init: str = ""  # the model to start from, which also answers the prompts; empty: OUT/sft; none: random weights
    data: str = ""  # JSONL of preferences to train on, ours or HH-RLHF; empty: sample pairs and annotate them
    extra: str = "toy"  # "the rest": more such files, comma-separated; toy: pairs that people wrote, alike in style
    mix_share: tuple[float, ...] = (0.0, 0.0)  # of pairs from --extra, for helpfulness and safety (paper: 0.5, 0.1); see README
    max_tokens: int = 0  # longest dialog of HH-RLHF, longer ones lose their oldest turns; 0: the model's context
    folds: int = 0  # cross-validate on --data in so many folds, beside simple baselines, then train on all; --init none: 5
    prompts: str = "toy"  # JSONL of prompts to collect preferences on
    annotator: Literal["toy", "human", "file"] = "toy"  # toy, human, or file: pairs are written out for you to label
    helpfulness_pairs: int = 4800  # our choice; a prompt may come twice, with other answers
    safety_pairs: int = 4000  # our choice; three in four on prompts tagged unsafe or borderline
    temperatures: tuple[float, ...] = (0.8, 1.1)  # of the two answers (paper: varied)
    max_new_tokens: int = 96  # longest answer that is sampled
    margin: Literal["none", "small", "large"] = "small"  # Table 27; the paper does not say which one
    head: Literal["last", "logprobs"] = "last"  # paper: a scalar head (on the last state); logprobs: see RewardModel
    auxiliary_weight: float = 1.0  # weight of the auxiliary safety loss (paper A.3.4 prints no formula); safety model only
    epochs: int = 1  # paper: one, since more over-fit
    batch_tokens: int = 500  # tokens a step (paper: 512 pairs); small steps, as in sft.py
    micro_tokens: int = 16384  # tokens a forward pass
    learning_rate: float = 8e-4  # paper: 1e-5, 5e-6 for 70B; ours suits a small model
    weight_decay: float = 0.1  # paper
    seed: int = 0  # of heads, sampling, annotators' noise and order
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete what is in the two folders
    score: str = ""  # JSONL of dialogs, of prompts with answers, or of pairs: print their scores and train nothing
    try_: bool = False  # score prompts and answers that you type, and train nothing


PAPER = dict(batch_tokens=1024 * 1024, micro_tokens=8192, learning_rate=1e-5, max_new_tokens=1024,
             mix_share=(0.5, 0.1), extra="")
PRESETS = {
    "tiny": dict(helpfulness_pairs=200, safety_pairs=120), "toy": {}, "small": dict(learning_rate=2e-4, batch_tokens=8192),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-70b": PAPER | dict(learning_rate=5e-6),
}
FROM_SCRATCH = dict(folds=5, max_tokens=256, batch_tokens=4000, learning_rate=2e-3)  # on top, with --init none


class RewardModel(nn.Module):
    """A transformer whose next-token head gives way to a scalar one, read at the answer's last token (§3.2.2).

    `shift` is subtracted from the helpfulness score, whose zero ranking leaves free: the mean score of the answers in the
    first 500 pairs of its own.

    Not the paper's, off by default: with `end_of_prompt` (see there) the next-token head stays beside the scalar one, and
    the score adds two weighted numbers, the sum and the minimum of the answer's log-probabilities under the body. A small
    body knows which answer is right, but its last state does not tell (`experiments/reward_sees_content.py`).
    """

    def __init__(self, body: Transformer, end_of_prompt: list[int] | None = None):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.args.dim, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(body.args.dim + 1) ** -0.5)  # scores start near 0 ± 1
        self.register_buffer("shift", torch.zeros(()))
        self.end_of_prompt, self.logprob_weights = end_of_prompt, None
        if end_of_prompt:
            self.logprob_weights = nn.Parameter(torch.zeros(2))  # of the sum and of the minimum, both divided by 0.2
        elif not body.args.tie_word_embeddings:
            body.output.requires_grad_(False)  # not used

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (batch, seq) padded on the right, lengths (batch) -> scores (batch), float32: a logit, any real number."""
        features = self.body.features(tokens)  # (batch, seq, dim)
        last = features[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (batch, dim)
        scores = self.head(last).squeeze(-1).float() - self.shift  # (batch)
        if self.logprob_weights is not None:
            logprobs = token_logprobs(self.body.output(features[:, :-1]), tokens[:, 1:])  # (batch, seq - 1)
            positions = torch.arange(1, tokens.shape[1], device=tokens.device)  # (seq - 1) of the tokens they belong to
            answer = (positions >= answer_starts(tokens, self.end_of_prompt)[:, None]) & (positions < lengths[:, None])
            logprobs = logprobs.clamp(min=-8) * answer  # (batch, seq - 1) one wild token is not worse than wrong
            sums = torch.stack([logprobs.sum(1), logprobs.amin(1)], 1)  # (batch, 2) in nats
            scores = scores + sums @ self.logprob_weights / 0.2
        return scores


def answer_starts(tokens: Tensor, end_of_prompt: list[int]) -> Tensor:
    """Where each row's last answer begins: behind the last `[/INST]`. tokens (batch, seq) -> positions (batch), 0 if none.

    >>> answer_starts(torch.tensor([[1, 7, 8, 4, 7, 8, 5]]), [7, 8])
    tensor([6])
    """
    ends = torch.tensor(end_of_prompt, device=tokens.device)  # (n)
    found = (tokens.unfold(1, len(ends), 1) == ends).all(-1)  # (batch, seq - n + 1)
    return (found * torch.arange(len(ends), len(ends) + found.shape[1], device=tokens.device)).amax(1)  # (batch)


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
                        temperatures: tuple[float, ...], key: tuple, folder: Path, max_new_tokens: int = 96) -> list[dict]:
    """Two answers to each prompt, from two models (or one) at two temperatures, compared by the annotator (§3.2.1).

    Left out and counted: pairs of equal answers, answers that are cut at the length limit or hold a tag of the chat format,
    and, as in the paper, pairs whose chosen answer is unsafe and the other safe.

    Returns:
        rows of the preference format (`data.read_preferences`) with the sampled ids.
    """
    sides = []
    for side, temperature in enumerate(temperatures[:2]):
        sides.append(sample_answers(policies[side % len(policies)], tokenizer, prompts, key=(*key, axis, side),
                                    temperature=temperature, path=folder / f"answers-{key[-1]}-{axis}-{side}.jsonl",
                                    desc=f"answers for {axis}", max_new_tokens=max_new_tokens))
    reasons = [unusable(a) or unusable(b) or ("equal answers" if a["answer"] == b["answer"] else "")
               for a, b in zip(*sides, strict=True)]
    usable = [i for i, reason in enumerate(reasons) if not reason]
    comparisons = [{k: v for k, v in prompts[i].items() if k != "where"} | {"answers": tuple(s[i]["answer"] for s in sides)}
                   for i in usable]
    rows = []
    annotations = ANNOTATORS[annotator](comparisons, axis, " ".join(map(str, key)), folder)
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
                reasons.append("chosen unsafe, the other safe")
                continue
        rows.append(row)
    print(f"{axis}: {len(rows)} pairs of {len(prompts)} prompts; left out: {dict(Counter(filter(None, reasons))) or 'none'}")
    return rows


def encode_pairs(tokenizer: Tokenizer, rows: list[dict], max_seq_len: int) -> list[tuple[list[int], list[int]]]:
    """(chosen ids, rejected ids) of each preference row.

    Raises:
        InputError: tags in content or a dialog longer than the context; names file and line.
    """
    pairs = []
    for row in rows:
        try:
            pair = tuple(encode_answer(tokenizer, row["prompt"], row[side], sampled_ids(tokenizer, row, f"{side}_ids", row[side]))
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


def set_shift(model: RewardModel, tokenizer: Tokenizer, rows: list[dict]) -> None:
    """Fix the zero of helpfulness, which ranking leaves free: both answers of the first 500 own pairs score 0 on average.

    The pairs are those of the first reward model, answers of SFT, each time the model is refreshed, too: then the gate's
    other side, R_h, stands where it stood.
    """
    own = [row for row in rows if not row.get("extra")][:500]
    pairs = encode_pairs(tokenizer, own, model.body.args.max_seq_len)
    model.shift += score(model, [ids for pair in pairs for ids in pair]).mean().to(model.shift)


def save_reward_model(folder: Path, model: RewardModel, tokenizer: Tokenizer) -> None:
    """A Llama 2 checkpoint and `reward_head.pth`."""
    save_model(folder, model.body, tokenizer)
    state = {"head": model.head.weight.detach().cpu(), "shift": model.shift.cpu(), "end_of_prompt": model.end_of_prompt}
    if model.logprob_weights is not None:
        state["logprob_weights"] = model.logprob_weights.detach().cpu()
    save_checkpoint(folder / "reward_head.pth", state)


def load_reward_model(folder: Path, device: str | torch.device = "cpu") -> tuple[RewardModel, Tokenizer]:
    """What `save_reward_model` wrote."""
    body, tokenizer = load_model(folder, device)
    state = load_checkpoint(Path(folder) / "reward_head.pth")
    model = RewardModel(body, state["end_of_prompt"])
    model.head.weight.data.copy_(state["head"])
    if model.logprob_weights is not None:
        model.logprob_weights.data.copy_(state["logprob_weights"])
    model.shift.copy_(state["shift"])
    return model.to(device).eval(), tokenizer


def score_dialogs(models: dict[str, tuple[RewardModel, Tokenizer]], dialogs: list[dict]) -> list[dict]:
    """Dialogs {"prompt", "answer", "is_safety"?} with each model's score as (logit, sigmoid), and, where there are both
    models, the combined "reward"."""
    scores = {axis: score_pairs(*model, [d | {"chosen": d["answer"], "rejected": d["answer"]} for d in dialogs])[0]
              for axis, model in models.items()}  # (dialogs) each
    if len(scores) == 2:
        is_safety = torch.tensor([bool(d.get("is_safety")) for d in dialogs])
        scores["reward"] = combine_rewards(scores["safety"], scores["helpfulness"], is_safety)
    return [d | {name: (found[i].item(), found[i].sigmoid().item()) for name, found in scores.items()}
            for i, d in enumerate(dialogs)]


def pick_prompts(prompts: list[dict], axis: str, count: int, seed: int) -> list[dict]:
    """Prompts for a collection, our choice of shares: safety takes three in four that are unsafe or borderline (the paper's
    are adversarial, §3.2.1), helpfulness one in ten that is unsafe. Too few harmless ones: each may come twice."""
    rng, share = random.Random(f"{seed} {axis}"), {"safety": 0.75, "helpfulness": 0.1}[axis]
    risky = [p for p in prompts if p["is_safety"] or (axis == "safety" and p.get("kind") == "borderline")]
    others = [p for p in prompts if not p["is_safety"] and not (axis == "safety" and p.get("kind") == "borderline")]
    n_risky = min(len(risky), round(share * count))
    n_others = min(2 * len(others), count - n_risky)
    picked = rng.sample(risky, n_risky) + rng.sample(2 * others if n_others > len(others) else others, n_others)
    rng.shuffle(picked)
    return picked


def report(model: RewardModel, tokenizer: Tokenizer, rows: list[dict], axis: str, which: str = "held-out") -> dict:
    """Accuracy by rating on pairs that training did not see, beside the annotator's own without its noise."""
    table = {"reward model": accuracy_by_rating(*score_pairs(model, tokenizer, rows), [row.get("rating") for row in rows])}
    if all(map(toy.knows, rows)):
        rule = {"helpfulness": toy.helpfulness, "safety": toy.safety}[axis]
        own = (torch.tensor([rule(row, row[side]) for row in rows]) for side in ("chosen", "rejected"))
        table["annotator"] = accuracy_by_rating(*own, [row.get("rating") for row in rows])
    terminal.print_accuracies(f"{axis}: accuracy on {len(rows)} {which} pairs", table)
    return table


def main(argv: list[str] | None = None) -> None:
    # 1. settings, the model to start from, prompts
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    if s.init == "none":
        s = parse_settings(Settings, __doc__, {name: preset | FROM_SCRATCH for name, preset in PRESETS.items()}, argv)
    check_positive(s, "helpfulness_pairs", "safety_pairs", "temperatures", "max_new_tokens", "epochs", "batch_tokens",
                   "micro_tokens", "learning_rate", or_zero=("weight_decay",))
    if len(s.temperatures) != 2:
        raise InputError(f"--temperatures {s.temperatures}: two are wanted, one for each answer of a pair")
    unused = s.extra not in ("", "toy") and not any(s.mix_share)
    if len(s.mix_share) != 2 or not all(0 <= share < 1 for share in s.mix_share) or unused:
        raise InputError(f"--mix-share {s.mix_share}: two shares below 1 are wanted, more than 0 where --extra is used")
    if (s.init == "none" or s.folds) and not s.data or s.folds == 1 or (s.init == "none" and s.preset.startswith("llama-2")):
        raise InputError("--init none (with a small preset) and --folds (2 or more) need preferences: --data FILE.jsonl")
    set_threads(s.threads)
    set_seed(s.seed)
    device = choose_device(s.device)
    if s.score or s.try_:
        there = tuple(axis for axis in AXES if (s.out / f"reward-{axis}").is_dir()) or AXES  # one alone, as of --data, will do
        models = {axis: load_reward_model(path, device) for axis, path in newest_reward_models(s.out, axes=there).items()}
        if s.score:
            terminal.print_scores(score_dialogs(models, terminal.add_annotator(preferences.read_answers(s.score))))
        return terminal.try_answers(lambda dialogs: score_dialogs(models, dialogs)) if s.try_ else None
    dtype = choose_dtype(s.dtype, device)
    init = Path(s.init) if s.init else require(s.out / "sft", "python sft.py")
    if s.prompts == "toy":
        toy.ensure()
    train_file, dev_file = ((toy.FOLDER / f"prompts-{split}.jsonl" for split in ("train", "dev")) if s.prompts == "toy"
                            else (Path(s.prompts), None))
    settings = kept_settings(s, "axis", "score", "try_")
    inputs = ({} if s.init == "none" else {"init": init}) | ({"data": Path(s.data)} if s.data else {"prompts": train_file})
    extra = s.extra if any(s.mix_share) else ""  # files that nothing is drawn from are no inputs
    if extra == "toy":
        extra = "" if s.data or s.prompts != "toy" else str(toy.FOLDER / "pairs-written.jsonl")
    inputs |= {f"extra {path}": Path(path) for path in extra.split(",") if path}
    axes = AXES if s.axis == "both" else (s.axis,)
    if s.data and s.axis == "both" and not preferences.has_safety_labels(s.data):
        axes = ("helpfulness",)
        print(f"{s.data} labels nothing safe or unsafe: one model, {s.out}/reward-helpfulness; --axis safety names it so")
    for axis in axes:
        folder = s.out / f"reward-{axis}"
        started = open_stage(folder, settings | {"axis": axis}, inputs, s.fresh)
        if not started:
            continue
        if s.init == "none":
            tokenizer = Tokenizer(toy.TOKENIZER)
            policy = Transformer(replace(SIZES[s.preset], vocab_size=tokenizer.vocab_size))
            policy.init_weights(s.seed)
        else:
            policy, tokenizer = load_model(init, device)
        longest = min(s.max_tokens or policy.args.max_seq_len, policy.args.max_seq_len)

        # 2. preferences: sample two answers to each prompt, compare them
        if s.data:
            rows, held_out = preferences.read_pairs(s.data, axis, tokenizer, longest), []
            if not s.folds:
                rows, held_out = preferences.hold_out_by_prompt(rows, s.seed)
        else:
            options = dict(annotator=s.annotator, temperatures=s.temperatures, folder=folder, max_new_tokens=s.max_new_tokens)
            all_prompts = read_prompts(train_file)
            check_annotator(s.annotator, all_prompts)
            prompts = pick_prompts(all_prompts, axis, getattr(s, f"{axis}_pairs"), s.seed)
            rows = collect_preferences([policy], tokenizer, prompts, axis, key=(s.seed, "sft"), **options)
            held_out = []
            if dev_file and s.annotator == "toy":  # people label what is learned from, and nothing else
                dev = pick_prompts(read_prompts(dev_file), axis, 10**6, s.seed)
                held_out = collect_preferences([policy], tokenizer, dev, axis, key=(s.seed, "dev"), **options)

        if not rows:
            raise InputError(f"{folder}: no pair of different answers to learn from; more pairs, or other --temperatures")

        # 3. train: the policy's body, a new head, own pairs and a share of the rest; in --folds folds, then on all pairs
        share = s.mix_share[AXES.index(axis)]
        rest = preferences.read_pairs(extra, axis, tokenizer, longest) if share else []
        rest = preferences.without_prompts_of(rest, held_out)
        pairs = preferences.mix_pairs(rows, rest, share, s.seed)
        write_jsonl(folder / "pairs.jsonl", ({k: v for k, v in row.items() if k != "where"} for row in pairs))
        differences = []  # of the folds' test pairs
        for fold, (train, test) in enumerate([*preferences.folds_by_prompt(rows, s.folds, s.seed), (rows, [])]):
            set_seed(s.seed)
            tags = end_of_prompt(tokenizer) if s.head == "logprobs" else None
            body = Transformer(policy.args)  # a copy: each fold starts from the policy
            body.load_state_dict(policy.state_dict())
            model = RewardModel(body, tags).to(device)
            unseen = preferences.without_prompts_of(rest, test)
            train_reward_model(model, tokenizer, preferences.mix_pairs(train, unseen, share, s.seed), margin=s.margin,
                               auxiliary_weight=s.auxiliary_weight * (axis == "safety"), epochs=s.epochs,
                               batch_tokens=s.batch_tokens, micro_tokens=s.micro_tokens, learning_rate=s.learning_rate,
                               weight_decay=s.weight_decay, folder=folder, phase=f"{axis}-fold-{fold}" if test else axis,
                               seed=s.seed, dtype=dtype)
            if test:
                chosen, rejected = score_pairs(model, tokenizer, test)
                differences.append({"reward model": chosen - rejected} | preferences.baselines(train, test))
        results = preferences.print_cross_validation(differences) if differences else {}

        # 4. fix the zero of helpfulness: the mean score of answers to training prompts
        if axis == "helpfulness":
            set_shift(model, tokenizer, rows)
        results |= report(model, tokenizer, held_out, axis) if held_out else {}
        save_reward_model(folder, model, tokenizer)
        finish_stage(folder, results, started)


if __name__ == "__main__":
    run(main)
