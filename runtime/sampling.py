"""Sampling many answers: batches planned beforehand, written one by one, so that a killed run goes
on where it was.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import Answer, InputError, Prompt, Tokenizer, batches_by_length, encode_prompt, has_tag
from model import Generation, Transformer, generate
from runtime.checkpoint import append_rows, resume_rows
from runtime.stage import fingerprint
from runtime.weights import load_model


def encode_prompts(
    tokenizer: Tokenizer, prompts: list[Prompt], max_seq_len: int
) -> list[list[int]]:
    """Prompts as ids.

    Raises:
        InputError: a tag in a prompt's content, or a prompt that leaves no room for an answer;
            names file and line.
    """
    encoded = []
    for prompt in prompts:
        try:
            ids = encode_prompt(tokenizer, prompt.messages)
            if len(ids) >= max_seq_len:
                raise InputError(
                    f"the prompt has {len(ids)} tokens, the model's context only {max_seq_len}"
                )
        except InputError as error:
            raise InputError(f"{prompt.where or 'prompt'}: {error}") from None
        encoded.append(ids)
    return encoded


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    *,
    key: tuple,
    samples: int = 1,
    temperature: float | list[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 96,
    batch_rows: int = 160,
    path: Path | None = None,
    desc: str = "sample",
    finish: Callable[[list[Answer]], list[Answer]] | None = None,
) -> list[Answer]:
    """Sample answers to each prompt; all samples of a prompt share its prefill.

    Args:
        key: what the randomness is keyed by, such as (seed, "rlhf-v1"). Prompt and sample number
            are added to it.
        temperature: one, or one for each of a prompt's samples.
        path: JSONL to which each batch is written when it is done. What is there already is not
            sampled again; a batch that a kill left unfinished is redone whole.
        finish: called with the answers of each batch before they are written: makes those with
            more known, such as scores.

    Returns:
        answers by prompt and sample.
    """
    temperatures = temperature if isinstance(temperature, list) else [temperature] * samples
    encoded = encode_prompts(tokenizer, prompts, model.args.max_seq_len)
    plan = _plan_batches(encoded, samples, batch_rows)
    answers = _resume(path, plan) if path else []
    done = len(answers)
    for batch in tqdm(plan, desc=desc, mininterval=1, disable=None, leave=False):
        if done >= len(batch):
            done -= len(batch)
            continue
        fresh = _sample_batch(
            model, tokenizer, encoded, batch, as_numbers(key), temperatures, top_p, max_new_tokens
        )
        if finish:
            fresh = finish(fresh)
        if path:
            append_rows(path, [answer.to_json() for answer in fresh])
        answers += fresh
    return sorted(answers, key=place)


def as_numbers(key: tuple) -> tuple[int, ...]:
    """The key of the randomness; a word counts as its checksum."""
    return tuple(part if isinstance(part, int) else zlib.crc32(str(part).encode()) for part in key)


def _plan_batches(
    encoded: list[list[int]], samples: int, batch_rows: int
) -> list[list[tuple[int, int]]]:
    """Batches of (prompt, sample): prompts of like length together, all samples of one in a batch.
    """
    per_batch = max(1, batch_rows // samples)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    plan = []
    for start in range(0, len(order), per_batch):
        batch = []
        for i in order[start : start + per_batch]:
            batch += [(i, k) for k in range(samples)]
        plan.append(batch)
    return plan


def _resume(path: Path, plan: list[list[tuple[int, int]]]) -> list[Answer]:
    """The answers of whole batches that a killed run has written."""
    rows = resume_rows(path, [len(batch) for batch in plan])
    planned = []
    for batch in plan:
        planned += batch
    written = [row_number(row) for row in rows]
    if written != planned[: len(written)] and sorted(written) != sorted(planned):
        path.unlink()  # it was cut by hand, or two runs wrote at once
        return []
    return [Answer.from_json(row, str(path)) for row in rows]


def _sample_batch(
    model: Transformer,
    tokenizer: Tokenizer,
    encoded: list[list[int]],
    batch: list[tuple[int, int]],
    key: tuple[int, ...],
    temperatures: list[float],
    top_p: float,
    max_new_tokens: int,
) -> list[Answer]:
    """The answers of one batch, in its order."""
    answers = {}
    for temperature in dict.fromkeys(temperatures):
        wanted = [(i, k) for i, k in batch if temperatures[k] == temperature]
        generations = sample_planned(
            model,
            tokenizer,
            [encoded[i] for i, _ in wanted],
            [(*key, i, k) for i, k in wanted],
            [list(range(len(wanted)))],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        for (i, k), generation in zip(wanted, generations, strict=True):
            answers[i, k] = as_answer(tokenizer, generation, i, k, temperature)
    return [answers[place] for place in batch]


def sample_planned(
    model: Transformer,
    tokenizer: Tokenizer,
    encoded: list[list[int]],
    keys: list[tuple[int, ...]],
    plan: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[Generation]:
    """The one sampler of rounds, evaluation and PPO: an answer to each encoded prompt.

    Args:
        encoded: prompts as ids. keys: of each one's random numbers.
        plan: batches of their numbers; every number is in one of them.

    Returns:
        generations in the order of the prompts, with log-probabilities token by token.
    """
    generations = {}
    for batch in plan:
        sampled = generate(
            model,
            [encoded[i] for i in batch],
            [keys[i] for i in batch],
            max_new_tokens,
            temperature,
            top_p,
            eos_id=tokenizer.eos_id,
        )
        generations.update(zip(batch, sampled, strict=True))
    return [generations[i] for i in range(len(encoded))]


def as_answer(
    tokenizer: Tokenizer, generation: Generation, index: int, sample: int, temperature: float
) -> Answer:
    """What was generated, as an answer to prompt `index`."""
    text = tokenizer.decode(generation.ids).strip()
    return Answer(
        index=index,
        sample=sample,
        text=text,
        ids=generation.ids,
        logprob=sum(generation.logprobs),
        temperature=temperature,
        finish_reason=generation.finish_reason,
        has_tag=has_tag(text),
    )


def place(answer: Answer) -> tuple[int, int]:
    """The prompt and the sample that an answer is."""
    return answer.index, answer.sample


def row_number(row: dict) -> tuple[int, int]:
    """`place` of a row from a file; (-1, -1) where it does not say so."""
    numbers = row.get("index"), row.get("sample")
    return numbers if all(type(number) is int for number in numbers) else (-1, -1)


def unusable(answer: Answer) -> str:
    """Why a sampled answer is no example to learn from; empty where it is one. The same rule
    wherever answers are chosen. One that was cut has no EOS, and never gains one.
    """
    if answer.finish_reason != "eos":
        return "cut at the length limit"
    return "holds a tag or nothing" if answer.has_tag or not answer.text else ""


@torch.inference_mode()
def in_batches(forward, sequences: list[list[int]], batch_tokens: int = 16384) -> torch.Tensor:
    """forward(list of sequences) -> (n,) numbers, called on batches of like length; results in the
    given order.
    """
    result = torch.zeros(len(sequences))
    for batch in batches_by_length([len(ids) for ids in sequences], batch_tokens):
        result[batch] = forward([sequences[i] for i in batch]).float().cpu()
    return result


# ---- kept answers ----


def made_by(folder: Path, *settings) -> str:
    """A mark of who made something and how: the model's fingerprint and the settings."""
    made = json.dumps([fingerprint(folder), *settings], sort_keys=True)
    return hashlib.sha256(made.encode()).hexdigest()[:16]


def kept_rows(path: Path, mark: str) -> list[dict]:
    """The rows of a JSONL file, if all of them bear this mark; else the file goes, since another
    model made it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = resume_rows(path)
    if any(row.get("made_by") != mark for row in rows):
        path.unlink()
        return []
    return rows


def cached_answers(
    folder: Path,
    prompts: list[Prompt],
    path: Path,
    *,
    system: str = "",
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Answer]:
    """Answers of the model in `folder`, kept in `path` and sampled once per model, prompts and
    settings; by prompt and sample. Each says who made it, and with which tokenizer.

    Args:
        system: a system prompt for all.
    """
    if system:
        prompts = [_under_system(prompt, system) for prompt in prompts]
    asked = [prompt.messages for prompt in prompts]
    mark = made_by(folder, asked, samples, temperature, max_new_tokens, seed)
    answers = [Answer.from_json(row, str(path)) for row in kept_rows(path, mark)]
    wanted = [(i, k) for i in range(len(prompts)) for k in range(samples)]
    if sorted(map(place, answers)) == wanted:
        return sorted(answers, key=place)

    model, tokenizer = load_model(folder, device)

    def sign(batch: list[Answer]) -> list[Answer]:
        signature = {"made_by": mark, "tokenizer": tokenizer.fingerprint}
        return [replace(answer, **signature) for answer in batch]

    return sample_answers(
        model,
        tokenizer,
        prompts,
        key=(seed, "evaluation"),
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        path=path,
        desc=path.stem,
        finish=sign,
    )


def _under_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system message in front."""
    message = {"role": "system", "content": system}
    return replace(prompt, messages=[message, *prompt.messages])
