"""Preference pairs from files: our own format and Anthropic's HH-RLHF; mixes, what is held out, and
a baseline that counts words.

Our own format is read strictly: a line that is wrong is an error. HH-RLHF (Bai et al. 2022,
github.com/anthropics/hh-rlhf) is read as it is, one {"chosen": "\\n\\nHuman: ...\\n\\nAssistant:
...", "rejected": ...} a line: pairs that cannot be used are left out and counted.
"""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import encode_dialog, has_tag
from data.errors import InputError
from data.jsonl import check_messages, need, read_jsonl, read_preferences
from data.records import Message, Pair, Prompt
from data.tokenizer import Tokenizer

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
SPEAKERS = ((HUMAN, "user"), (ASSISTANT, "assistant"))  # in turn, with their roles

# ---- HH-RLHF ----


def is_hh_rlhf(row: dict) -> bool:
    """Whether a line of a file is of HH-RLHF's kind: two whole dialogs as text and no prompt beside
    them.
    """
    if "prompt" in row:
        return False
    for side in ("chosen", "rejected"):
        dialog = row.get(side)
        if isinstance(dialog, str) and HUMAN in dialog:
            return True
    return False


def parse_hh_rlhf(chosen: str, rejected: str) -> tuple[Pair | None, str]:
    """Two dialogs of HH-RLHF as (pair, ""), or as (None, why they cannot be used).

    The prompt is what stands before the last "Assistant:" of each, which must be the same.

    >>> greeting = "\\n\\nHuman: Hi\\n\\nAssistant:"
    >>> pair, reason = parse_hh_rlhf(greeting + " Hello!", greeting + " What?")
    >>> pair.chosen
    'Hello!'
    """
    prompt, _, better = chosen.rpartition(ASSISTANT)
    other_prompt, _, worse = rejected.rpartition(ASSISTANT)
    if prompt != other_prompt:
        return None, "different prompts"
    messages = _split_turns(prompt)
    if not messages or HUMAN in better + worse:
        return None, "turns do not alternate"

    better = better.strip()
    worse = worse.strip()
    contents = [better, worse]
    contents += [message["content"] for message in messages]
    if not all(contents):
        return None, "an empty turn"
    if any(map(has_tag, contents)):
        return None, "a tag of the chat format"
    if better == worse:
        return None, "equal answers"
    return Pair(Prompt(messages), better, worse), ""


def _split_turns(prompt: str) -> list[Message]:
    """The messages of a prompt as HH-RLHF writes it; none where they do not alternate, from a human
    to a human.
    """
    before, *pieces = re.split(f"({HUMAN}|{ASSISTANT})", prompt)  # name, text, name, text, ...
    names = pieces[::2]
    texts = pieces[1::2]
    ends_with_human = len(names) % 2 == 1
    if before.strip() or not ends_with_human:
        return []
    messages = []
    for i, (name, text) in enumerate(zip(names, texts, strict=True)):
        wanted, role = SPEAKERS[i % 2]
        if name != wanted:
            return []
        messages.append({"role": role, "content": text.strip()})
    return messages


def drop_oldest_turns(tokenizer: Tokenizer, pair: Pair, max_tokens: int) -> Pair | None:
    """The pair without its oldest turns (a user message and its answer each), so many that both
    dialogs fit; None where the last turn alone is too long.
    """
    messages = pair.prompt.messages
    first = len(messages) - 1  # the first message that is kept
    tokens = max(
        _length(tokenizer, [messages[-1], {"role": "assistant", "content": answer}])
        for answer in (pair.chosen, pair.rejected)
    )
    if tokens > max_tokens:
        return None
    while first > 0:  # a turn's tokens do not depend on the others: see data/chat.py
        tokens += _length(tokenizer, messages[first - 2 : first])
        if tokens > max_tokens:
            break
        first -= 2
    return replace(pair, prompt=replace(pair.prompt, messages=messages[first:]))


def _length(tokenizer: Tokenizer, dialog: list[Message]) -> int:
    """Its tokens."""
    return len(encode_dialog(tokenizer, dialog).ids)


# ---- files ----


def split_files(files: str) -> list[str]:
    """The names in a comma-separated list of files.

    >>> split_files("a.jsonl, b.jsonl,")
    ['a.jsonl', 'b.jsonl']
    """
    return [name.strip() for name in files.split(",") if name.strip()]


def read_pairs(files: str, axis: str, tokenizer: Tokenizer, max_tokens: int) -> list[Pair]:
    """Read preference files, comma-separated, each of either format, which its first line shows,
    for one reward model.

    Prints how many pairs were left out or shortened, by reason. For the safety model those are left
    out, too, whose chosen answer is unsafe and the other one safe (`drop_unsafe_choices`).

    Args:
        max_tokens: HH-RLHF dialogs longer than this lose their oldest turns. Our own pairs stay as
            they are.

    Raises:
        InputError: a file that cannot be read, a line of our own format that is wrong, or a file
            without one usable pair.
    """
    pairs = []
    for path in split_files(files):
        _, first_row = next(read_jsonl(path))
        if is_hh_rlhf(first_row):
            pairs_of_file, counts = _read_hh_rlhf(path, tokenizer, max_tokens)
        else:
            pairs_of_file = read_preferences(path)
            counts = Counter()
        if axis == "safety":
            kept = drop_unsafe_choices(pairs_of_file)
            counts["left out: chosen unsafe, the other safe"] = len(pairs_of_file) - len(kept)
            pairs_of_file = kept
        counts = +counts  # without zeros
        reasons = "".join(f"; {reason} {count}" for reason, count in sorted(counts.items()))
        print(f"{path}: {len(pairs_of_file)} pairs{reasons}")
        if not pairs_of_file:
            raise InputError(f"{path}: no pair can be used ({dict(counts)})")
        pairs += pairs_of_file
    return pairs


def _read_hh_rlhf(
    path: str, tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[Pair], Counter[str]]:
    """The pairs of an HH-RLHF file that can be used, and how many were left out or shortened, by
    reason.
    """
    pairs = []
    counts = Counter()
    for where, row in read_jsonl(path):
        chosen = need(where, row, "chosen", str)
        rejected = need(where, row, "rejected", str)
        pair, reason = parse_hh_rlhf(chosen, rejected)
        if pair is None:
            counts[f"left out: {reason}"] += 1
            continue
        short = drop_oldest_turns(tokenizer, pair, max_tokens)
        if short is None:
            counts["left out: the last turn is too long"] += 1
            continue
        if len(short.prompt.messages) < len(pair.prompt.messages):
            counts["shortened: oldest turns dropped"] += 1
        pairs.append(replace(short, prompt=replace(short.prompt, where=where)))
    return pairs, counts


def has_safety_labels(path: str) -> bool:
    """Whether any pair of a preference file says of an answer whether it is safe."""
    for _, row in read_jsonl(path):
        for side in ("chosen", "rejected"):
            if row.get(f"{side}_is_safe") is not None:
                return True
    return False


# ---- bins and mixes ----


def drop_unsafe_choices(pairs: list[Pair]) -> list[Pair]:
    """The pairs but for those whose chosen answer is labelled unsafe and the other one safe (paper
    §3.2.1).

    The other three bins of the paper stay: chosen safe and the other unsafe, both safe, both
    unsafe; so do unlabelled pairs.
    """
    kept = []
    for pair in pairs:
        if pair.chosen_is_safe is False and pair.rejected_is_safe:
            continue
        kept.append(pair)
    return kept


def mix_pairs(pairs: list[Pair], rest: list[Pair], share: float, seed: int) -> list[Pair]:
    """A reward model's pairs, and drawn from the rest so many that they are this share of all
    (fewer: all there are). Those are marked as extra.

    >>> pair = Pair(Prompt([{"role": "user", "content": "Hi"}]), "Hello!", "What?")
    >>> mixed = mix_pairs([pair] * 9, [pair] * 5, share=0.1, seed=0)
    >>> len(mixed), mixed[8].extra, mixed[9].extra  # 9 and 1
    (10, False, True)
    """
    wanted = round(share / (1 - share) * len(pairs))
    drawn = random.Random(f"mix {seed}").sample(rest, min(len(rest), wanted))
    return pairs + [replace(pair, extra=True) for pair in drawn]


# ---- held out by prompt ----


def _prompt_as_text(pair: Pair) -> str:
    """What tells prompts apart: the same prompt where the messages are the same."""
    return json.dumps(pair.prompt.messages)


def hold_out_by_prompt(
    pairs: list[Pair], seed: int, share: float = 0.1
) -> tuple[list[Pair], list[Pair]]:
    """(pairs to learn from, pairs held out): all pairs of a tenth of the prompts, drawn at random,
    are held out.

    A prompt's pairs stay together, since files often hold several comparisons of one prompt, and a
    held-out pair whose prompt was trained on tells little. With fewer than ten prompts nothing is
    held out. The order of the pairs is kept.

    >>> prompts = [Prompt([{"role": "user", "content": str(i)}]) for i in range(10)]
    >>> pairs = [Pair(prompt, "Yes.", "No.") for prompt in prompts + prompts]
    >>> train, held_out = hold_out_by_prompt(pairs, seed=0)
    >>> len(train), len(held_out)
    (18, 2)
    """
    prompts = sorted(set(map(_prompt_as_text, pairs)))
    count = int(share * len(prompts))
    held_prompts = set(random.Random(f"held out {seed}").sample(prompts, count))
    train = [pair for pair in pairs if _prompt_as_text(pair) not in held_prompts]
    held_out = [pair for pair in pairs if _prompt_as_text(pair) in held_prompts]
    return train, held_out


def without_prompts_of(pairs: list[Pair], held_out: list[Pair]) -> list[Pair]:
    """The pairs whose prompt is no held-out pair's, so that nothing mixed into the training gives
    it away.

    >>> pairs = [Pair(Prompt([{"role": "user", "content": q}]), "Yes.", "No.") for q in "ab"]
    >>> without_prompts_of(pairs, held_out=pairs[:1]) == pairs[1:]
    True
    """
    held_prompts = set(map(_prompt_as_text, held_out))
    return [pair for pair in pairs if _prompt_as_text(pair) not in held_prompts]


def folds_by_prompt(
    pairs: list[Pair], folds: int, seed: int
) -> list[tuple[list[Pair], list[Pair]]]:
    """Cross-validation's (training pairs, pairs left out) of each fold, of like size; a prompt's
    pairs stay together.

    Raises:
        InputError: fewer prompts than folds.
    """
    prompts = sorted(set(map(_prompt_as_text, pairs)))
    if len(prompts) < folds:
        raise InputError(f"--folds {folds}: the pairs have only {len(prompts)} different prompts")
    if folds < 1:
        return []
    random.Random(f"folds {seed}").shuffle(prompts)
    fold_of = {prompt: i % folds for i, prompt in enumerate(prompts)}
    fold_of_pairs = [fold_of[_prompt_as_text(pair)] for pair in pairs]
    splits = []
    for number in range(folds):
        train = []
        left_out = []
        for pair, fold in zip(pairs, fold_of_pairs, strict=True):
            if fold == number:
                left_out.append(pair)
            else:
                train.append(pair)
        splits.append((train, left_out))
    return splits


# ---- baselines ----


def bag_of_words(train: list[Pair], test: list[Pair], decay: float = 0.02) -> Tensor:
    """A baseline that sees no order: score(chosen) - score(rejected) of the test pairs, (pairs,).

    Logistic regression on the difference of word counts, learned on the training pairs. A score is
    the sum of its words' weights w: minimise mean -log sigmoid(difference) + decay / 2 |w|². Words
    that training does not have count nothing.
    """
    vocabulary = set()
    for pair in train:
        vocabulary.update(_words(pair.chosen), _words(pair.rejected))
    number_of = {word: number for number, word in enumerate(sorted(vocabulary))}
    train_words = _signed_words(train, number_of)
    test_words = _signed_words(test, number_of)
    weights = torch.zeros(len(number_of), 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        differences = _score_differences(train_words, weights)
        total = -F.logsigmoid(differences).mean() + decay / 2 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return _score_differences(test_words, weights.detach())


def _words(text: str) -> list[str]:
    """Its words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _signed_words(pairs: list[Pair], number_of: dict[str, int]) -> list[tuple[Tensor, Tensor]]:
    """Of each pair the numbers of its known words and their signs, (words,) each: +1 for a word of
    the chosen answer, -1 for one of the rejected.
    """
    signed = []
    for pair in pairs:
        numbers = []
        signs = []
        for answer, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
            known = [number_of[word] for word in _words(answer) if word in number_of]
            numbers += known
            signs += [sign] * len(known)
        signed.append((torch.tensor(numbers, dtype=torch.long), torch.tensor(signs)))
    return signed


def _score_differences(signed_words: list[tuple[Tensor, Tensor]], weights: Tensor) -> Tensor:
    """score(chosen) - score(rejected), (pairs,), under the words' weights, (vocabulary, 1)."""
    lengths = [len(numbers) for numbers, _ in signed_words]
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)  # (pairs)
    numbers = torch.cat([numbers for numbers, _ in signed_words])  # (words of all pairs)
    signs = torch.cat([signs for _, signs in signed_words])  # (words of all pairs)
    sums = F.embedding_bag(numbers, weights, starts, mode="sum", per_sample_weights=signs)
    return sums.squeeze(1)


def baselines(train: list[Pair], test: list[Pair]) -> dict[str, Tensor]:
    """Simple rivals of a reward model: {name: score(chosen) - score(rejected) of the test pairs,
    (pairs,)}. Lengths count in characters.
    """
    lengths = [float(len(pair.chosen) - len(pair.rejected)) for pair in test]
    longer = torch.tensor(lengths)  # (pairs)
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
        mean = right.mean().item()
        half = 1.96 * right.std().item() / len(right) ** 0.5
        low = mean - half
        high = mean + half
        table[name] = {"accuracy": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
        print(f"  {name:<16}{mean:>8.3f}   {low:.3f} to {high:.3f}   {len(right)} pairs")
    return table


# ---- answers to be scored ----


@dataclass(frozen=True)
class GivenAnswer:
    """An answer that a file holds or a person typed, to be scored."""

    prompt: Prompt
    text: str
    which: str = "answer"  # or "chosen" or "rejected", where a pair holds it


def read_answers(path: str) -> list[GivenAnswer]:
    """Read answers to be scored; pairs give two.

    Lines are {"messages": a dialog that ends with an answer}, {"prompt": messages, "answer"}, or
    preferences {"prompt", "chosen", "rejected"}; each may have "is_safety".

    Raises:
        InputError: any other line, or one that is wrong.
    """
    answers = []
    for where, row in read_jsonl(path):
        if "messages" in row:
            dialog = check_messages(where, "messages", row["messages"], "assistant")
            row = row | {"prompt": dialog[:-1], "answer": dialog[-1]["content"]}
        names = ["answer"] if "answer" in row else ["chosen", "rejected"]
        if not {"prompt", *names} <= set(row):
            raise InputError(
                f"{where}: wanted are the fields 'messages', or 'prompt' and 'answer', or 'prompt',"
                f" 'chosen' and 'rejected'; this row has {', '.join(row)[:80] or 'none'}"
            )
        messages = check_messages(where, "prompt", row["prompt"], "user")
        is_safety = need(where, row, "is_safety", bool, False)
        prompt = Prompt(messages, is_safety, where=where)
        for name in names:
            text = need(where, row, name, str)
            if not text.strip():
                raise InputError(f"{where}: field '{name}' is empty")
            answers.append(GivenAnswer(prompt, text, name))
    return answers
