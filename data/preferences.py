"""Preference pairs from files: our own format and Anthropic's HH-RLHF; mixes, what is held out, and
a baseline that counts words.

Our own format is read strictly: a row that is wrong is an error. HH-RLHF (Bai et al. 2022,
github.com/anthropics/hh-rlhf) is read as it is, one {"chosen": "\\n\\nHuman: ...\\n\\nAssistant:
...", "rejected": ...} a line: pairs that cannot be used are left out and counted.
"""

import json
import random
import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import encode_dialog, has_tag
from data.errors import InputError
from data.jsonl import check_messages, need, read_jsonl, read_preferences
from data.tokenizer import Tokenizer

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_hh_rlhf(row: dict) -> bool:
    """Whether a line of a file is of HH-RLHF's kind: two whole dialogs as text and no prompt beside
    them.
    """
    return "prompt" not in row and any(
        isinstance(row.get(side), str) and HUMAN in row[side] for side in ("chosen", "rejected")
    )


def parse_hh_rlhf(chosen: str, rejected: str) -> tuple[dict | None, str]:
    """A pair of HH-RLHF dialogs as ({"prompt", "chosen", "rejected"}, ""), or (None, why it cannot
    be used).

    The prompt is what stands before the last "Assistant:" of each, which must be the same.

    >>> greeting = "\\n\\nHuman: Hi\\n\\nAssistant:"
    >>> pair, reason = parse_hh_rlhf(greeting + " Hello!", greeting + " What?")
    >>> pair["chosen"]
    'Hello!'
    """
    prompt, _, better = chosen.rpartition(ASSISTANT)
    other, _, worse = rejected.rpartition(ASSISTANT)
    if prompt != other:
        return None, "different prompts"
    head, *parts = re.split(f"({HUMAN}|{ASSISTANT})", prompt)
    turns = [(HUMAN, "user"), (ASSISTANT, "assistant")]
    if (
        head.strip()
        or len(parts) % 4 != 2
        or HUMAN in better + worse
        or any(name != turns[i % 2][0] for i, name in enumerate(parts[::2]))
    ):
        return None, "turns do not alternate"
    messages = [
        {"role": turns[i % 2][1], "content": text.strip()} for i, text in enumerate(parts[1::2])
    ]
    better, worse = better.strip(), worse.strip()
    contents = [better, worse, *(message["content"] for message in messages)]
    reason = (
        "an empty turn"
        if not all(contents)
        else (
            "a tag of the chat format"
            if any(map(has_tag, contents))
            else "equal answers" if better == worse else ""
        )
    )
    return (
        (None, reason)
        if reason
        else ({"prompt": messages, "chosen": better, "rejected": worse}, "")
    )


def drop_oldest_turns(tokenizer: Tokenizer, row: dict, max_tokens: int) -> dict | None:
    """The pair without its oldest turns (a user message and its answer each), so many that both
    dialogs fit; None where the last turn alone is too long."""
    prompt = row["prompt"]
    while (
        max(
            len(
                encode_dialog(tokenizer, [*prompt, {"role": "assistant", "content": row[side]}]).ids
            )
            for side in ("chosen", "rejected")
        )
        > max_tokens
    ):
        if len(prompt) == 1:
            return None
        prompt = prompt[2:]
    return row | {"prompt": prompt}


def read_pairs(files: str, axis: str, tokenizer: Tokenizer, max_tokens: int) -> list[dict]:
    """Read preference files, comma-separated, each of either format, which its first line shows,
    for one reward model.

    Prints how many pairs were left out or shortened, by reason. For the safety model those are left
    out, too, whose chosen answer is unsafe and the other one safe (`drop_unsafe_choices`).

    Args:
        max_tokens: HH-RLHF dialogs longer than this lose their oldest turns. Our own rows stay as
            they are.

    Returns:
        rows as of `read_preferences`.

    Raises:
        InputError: a file that cannot be read, a row of our own format that is wrong, or a file
            without one usable pair.
    """
    found = []
    for path in filter(None, map(str.strip, files.split(","))):
        rows, counts = [], Counter()
        if is_hh_rlhf(next(read_jsonl(path))[1]):
            for where, row in read_jsonl(path):
                pair, reason = parse_hh_rlhf(
                    need(where, row, "chosen", str), need(where, row, "rejected", str)
                )
                short = drop_oldest_turns(tokenizer, pair, max_tokens) if pair else None
                if short:
                    rows.append(short | {"where": where})
                    counts["shortened: oldest turns dropped"] += len(short["prompt"]) < len(
                        pair["prompt"]
                    )
                else:
                    counts["left out: " + (reason or "the last turn is too long")] += 1
        else:
            rows = read_preferences(path)
        if axis == "safety":
            kept = drop_unsafe_choices(rows)
            counts["left out: chosen unsafe, the other safe"], rows = len(rows) - len(kept), kept
        print(
            f"{path}: {len(rows)}"
            f" pairs{''.join(f'; {reason} {count}' for reason, count in sorted((+counts).items()))}"
        )
        if not rows:
            raise InputError(f"{path}: no pair can be used ({dict(+counts)})")
        found += rows
    return found


def has_safety_labels(path: str) -> bool:
    """Whether any pair of a preference file says of an answer whether it is safe."""
    return any(
        row.get(f"{side}_is_safe") is not None
        for _, row in read_jsonl(path)
        for side in ("chosen", "rejected")
    )


def drop_unsafe_choices(rows: list[dict]) -> list[dict]:
    """The pairs but for those whose chosen answer is labelled unsafe and the other one safe (paper
    §3.2.1).

    The other three bins of the paper stay: chosen safe and the other unsafe, both safe, both
        unsafe; so do unlabelled pairs.
    """
    return [
        row
        for row in rows
        if not (row.get("chosen_is_safe") is False and row.get("rejected_is_safe"))
    ]


def mix_pairs(own: list[dict], rest: list[dict], share: float, seed: int) -> list[dict]:
    """A reward model's own pairs, and drawn from the rest so many that they are this share of all
    (fewer: all there are). Those are marked by "extra": true.

    >>> len(mix_pairs([{}] * 9, [{}] * 5, share=0.1, seed=0))  # 9 and 1
    10
    """
    wanted = round(share / (1 - share) * len(own))
    return own + [
        row | {"extra": True}
        for row in random.Random(f"mix {seed}").sample(rest, min(len(rest), wanted))
    ]


def hold_out_by_prompt(
    rows: list[dict], seed: int, share: float = 0.1
) -> tuple[list[dict], list[dict]]:
    """(pairs to learn from, pairs held out): all pairs of a tenth of the prompts, drawn at random,
    are held out.

    A prompt's pairs stay together, since files often hold several comparisons of one prompt, and a
    held-out pair whose prompt was trained on tells little. With fewer than ten prompts nothing is
    held out. The order of the rows is kept.

    >>> train, held_out = hold_out_by_prompt([{"prompt": i // 2} for i in range(20)], seed=0)
    >>> len(train), len(held_out)
    (18, 2)
    """
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    held = set(random.Random(f"held out {seed}").sample(prompts, int(share * len(prompts))))
    train = [row for row in rows if json.dumps(row["prompt"]) not in held]
    held_out = [row for row in rows if json.dumps(row["prompt"]) in held]
    return train, held_out


def without_prompts_of(rows: list[dict], held_out: list[dict]) -> list[dict]:
    """The pairs whose prompt is no held-out pair's, so that nothing mixed into the training gives
    it away.

    >>> without_prompts_of([{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "a"}])
    [{'prompt': 'b'}]
    """
    prompts = {json.dumps(row["prompt"]) for row in held_out}
    return [row for row in rows if json.dumps(row["prompt"]) not in prompts]


def folds_by_prompt(rows: list[dict], folds: int, seed: int) -> list[tuple[list[dict], list[dict]]]:
    """Cross-validation's (training pairs, pairs left out) of each fold, of like size; a prompt's
    pairs stay together.

    Raises:
        InputError: fewer prompts than folds.
    """
    prompts = sorted({json.dumps(row["prompt"]) for row in rows})
    if len(prompts) < folds:
        raise InputError(f"--folds {folds}: the pairs have only {len(prompts)} different prompts")
    random.Random(f"folds {seed}").shuffle(prompts)
    fold_of = {prompt: i % max(folds, 1) for i, prompt in enumerate(prompts)}
    numbers = [fold_of[json.dumps(row["prompt"])] for row in rows]
    return [
        (
            [row for row, number in zip(rows, numbers, strict=True) if number != k],
            [row for row, number in zip(rows, numbers, strict=True) if number == k],
        )
        for k in range(folds)
    ]


def bag_of_words(train: list[dict], test: list[dict], decay: float = 0.02) -> Tensor:
    """A baseline that sees no order: score(chosen) - score(rejected) of the test pairs, (pairs,).

    Logistic regression on the difference of word counts, learned on the training pairs. A score is
    the sum of its words'
    weights: minimise mean -log sigmoid(difference @ w) + decay / 2 |w|². Words that training does
        not have count nothing.
    """

    def words(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    known = {
        word: i
        for i, word in enumerate(
            sorted(
                {w for row in train for side in ("chosen", "rejected") for w in words(row[side])}
            )
        )
    }

    def count(rows: list[dict]) -> list[tuple[Tensor, Tensor]]:
        """Of each pair the numbers of its words, and +1 for a word of the chosen answer, -1 for one
        of the rejected.
        """
        cells = [
            [
                (known[word], sign)
                for side, sign in (("chosen", 1.0), ("rejected", -1.0))
                for word in words(row[side])
                if word in known
            ]
            for row in rows
        ]
        return [
            (
                torch.tensor([i for i, _ in cell], dtype=torch.long),
                torch.tensor([sign for _, sign in cell]),
            )
            for cell in cells
        ]

    def differences(counts: list[tuple[Tensor, Tensor]], w: Tensor) -> Tensor:
        """Difference of word counts @ w, (pairs,)."""
        starts = torch.tensor([0, *(len(ids) for ids, _ in counts[:-1])]).cumsum(0)  # (pairs)
        ids, signs = (torch.cat(column) for column in zip(*counts, strict=True))
        # (pairs)
        return F.embedding_bag(ids, w, starts, mode="sum", per_sample_weights=signs).squeeze(1)

    counts, w = count(train), torch.zeros(len(known), 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = -F.logsigmoid(differences(counts, w)).mean() + decay / 2 * w.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return differences(count(test), w.detach())


def baselines(train: list[dict], test: list[dict]) -> dict[str, Tensor]:
    """Simple rivals of a reward model: {name: score(chosen) - score(rejected) of the test pairs,
    (pairs,)}.
    """
    # (pairs), characters
    longer = torch.tensor([float(len(row["chosen"]) - len(row["rejected"])) for row in test])
    return {
        "longer answer": longer,
        "shorter answer": -longer,
        "bag of words": bag_of_words(train, test),
    }


def print_cross_validation(folds: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Accuracy (ties half) over the held-out pairs of all folds, each given as {name: score(chosen)
    - score(rejected)}.

    Returns:
        {name: {"accuracy", "low", "high"}}, the 95 % interval mean ± 1.96 standard errors over
        pairs. It tells how much other pairs could differ, not other training runs.
    """
    table = {}
    print(f"\n{len(folds)}-fold cross-validation: accuracy on the fold left out, 95 % interval")
    for name in folds[0]:
        differences = torch.cat([fold[name] for fold in folds])  # (pairs)
        right = (differences > 0).float() + 0.5 * (differences == 0).float()  # (pairs)
        mean, half = right.mean().item(), 1.96 * right.std().item() / len(right) ** 0.5
        table[name] = {
            "accuracy": round(mean, 4),
            "low": round(mean - half, 4),
            "high": round(mean + half, 4),
        }
        print(
            f"  {name:<16}{mean:>8.3f}   {mean - half:.3f} to {mean + half:.3f}   {len(right)}"
            " pairs"
        )
    return table


def read_answers(path: str) -> list[dict]:
    """Read dialogs to be scored, as {"where", "prompt", "answer", "is_safety"?, "which"}; pairs
    give two.

    Rows are {"messages": a dialog that ends with an answer}, {"prompt": messages, "answer"}, or
    preferences {"prompt", "chosen", "rejected"}.

    Raises:
        InputError: any other row, or one that is wrong.
    """
    found = []
    for where, row in read_jsonl(path):
        sides = ["answer"] if "answer" in row else ["chosen", "rejected"]
        if "messages" in row:
            messages = check_messages(where, "messages", row["messages"], "assistant")
            row = row | {"prompt": messages[:-1], "answer": messages[-1]["content"]}
            sides = ["answer"]
        elif "prompt" not in row or not set(sides) <= set(row):
            raise InputError(
                f"{where}: wanted are the fields 'messages', or 'prompt' and 'answer', or 'prompt',"
                f" 'chosen' and 'rejected'; this row has {', '.join(row) or 'none'}"
            )
        check_messages(where, "prompt", row["prompt"], "user")
        need(where, row, "is_safety", bool, False)
        for side in sides:
            if not need(where, row, side, str).strip():
                raise InputError(f"{where}: field '{side}' is empty")
            found.append(
                {
                    "where": where,
                    "prompt": row["prompt"],
                    "answer": row[side],
                    "which": side,
                    "is_safety": row.get("is_safety", False),
                }
            )
    return found
