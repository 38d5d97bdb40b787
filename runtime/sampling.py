"""Sampling many answers: batches planned beforehand, written one by one, so that a killed run goes
on where it was.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from data import InputError, Tokenizer, batches_by_length, encode_prompt, has_tag
from model import Transformer, generate
from runtime.checkpoint import append_rows, resume_rows
from runtime.stage import fingerprint
from runtime.weights import load_model


def encode_prompts(tokenizer: Tokenizer, prompts: list[dict], max_seq_len: int) -> list[list[int]]:
    """Prompts as ids. InputError naming file and line for a tag in its content, or one that leaves
    no room to answer.
    """
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encode_prompt(tokenizer, prompt["prompt"]))
            if len(encoded[-1]) >= max_seq_len:
                raise InputError(
                    f"the prompt has {len(encoded[-1])} tokens, the model's context only"
                    f" {max_seq_len}"
                )
        except InputError as error:
            raise InputError(f"{prompt.get('where', 'prompt')}: {error}") from None
    return encoded


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[dict],
    *,
    key: tuple,
    samples: int = 1,
    temperature: float | list[float] = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 96,
    batch_rows: int = 160,
    path: Path | None = None,
    desc: str = "sample",
    finish: Callable[[list[dict]], object] | None = None,
) -> list[dict]:
    """Sample answers to each prompt ({"prompt": messages, ...}); all samples of a prompt share its
    prefill.

    Args:
        key: what the randomness is keyed by, such as (seed, "rlhf-v1"); prompt and sample number
            are added to it.
        temperature: one, or one for each of a prompt's samples.
        path: JSONL to which each batch is written when it is done. What is there already is not
            sampled again, a batch that a kill left unfinished is redone whole.
        finish: called with the rows of each batch before they are written, to add fields to them,
            such as scores.

    Returns:
        rows {"index", "sample", "answer", "answer_ids", "logprob", "temperature", "finish_reason",
        "has_tag"}, by prompt and sample. `logprob` is the answer's summed log-probability under the
        model itself, in nats.
    """
    temperatures = temperature if isinstance(temperature, list) else [temperature] * samples
    key = tuple(part if isinstance(part, int) else zlib.crc32(str(part).encode()) for part in key)
    encoded = encode_prompts(tokenizer, prompts, model.args.max_seq_len)
    lengths = [len(ids) for ids in encoded]
    per_batch = max(1, batch_rows // samples)
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    plan = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    rows = resume_rows(path, [len(batch) * samples for batch in plan]) if path else []
    planned, there = [(i, k) for batch in plan for i in batch for k in range(samples)], [
        row_number(row) for row in rows
    ]
    # cut by hand, or two runs wrote at once
    if there != planned[: len(there)] and sorted(there) != sorted(planned):
        path.unlink()
        rows = []
    done = len(rows)
    for batch in tqdm(plan, desc=desc, mininterval=1, disable=None, leave=False):
        if done >= len(batch) * samples:
            done -= len(batch) * samples
            continue
        fresh = {}
        for value in dict.fromkeys(temperatures):  # one call of generate per temperature
            wanted = [(i, k) for i in batch for k in range(samples) if temperatures[k] == value]
            found = generate(
                model,
                [encoded[i] for i, _ in wanted],
                [(*key, i, k) for i, k in wanted],
                max_new_tokens,
                value,
                top_p,
                eos_id=tokenizer.eos_id,
            )
            for (i, k), answer in zip(wanted, found, strict=True):
                text = tokenizer.decode(answer.ids).strip()
                fresh[i, k] = {
                    "index": i,
                    "sample": k,
                    "answer": text,
                    "answer_ids": answer.ids,
                    "logprob": sum(answer.logprobs),
                    "temperature": value,
                    "finish_reason": answer.finish_reason,
                    "has_tag": has_tag(text),
                }
        fresh = [fresh[i, k] for i in batch for k in range(samples)]
        if finish:
            finish(fresh)
        if path:
            append_rows(path, fresh)
        rows += fresh
    return sorted(rows, key=lambda row: (row["index"], row["sample"]))


def row_number(row: dict) -> tuple[int, int]:
    """The prompt and the sample that a row answers; (-1, -1) where it does not say so."""
    return row.get("index", -1), row.get("sample", -1)


def unusable(row: dict) -> str:
    """Why a sampled answer is no example to learn from; empty where it is one. The same rule
    wherever answers are chosen.

    >>> unusable({"answer": "Yes.", "finish_reason": "length", "has_tag": False})  # it has no EOS
    'cut at the length limit'
    """
    if row["finish_reason"] != "eos":
        return "cut at the length limit"
    return "holds a tag or nothing" if row["has_tag"] or not row["answer"] else ""


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
    return hashlib.sha256(
        json.dumps([fingerprint(folder), *settings], sort_keys=True).encode()
    ).hexdigest()[:16]


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
    prompts: list[dict],
    path: Path,
    *,
    system: str = "",
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[dict]:
    """Answers of the model in `folder`, kept in `path` and sampled once per model, prompts and
    settings; by prompt and sample.

    system: a system prompt for all. Each row also has "made_by" and the "tokenizer" of its ids.
    """
    if system:
        prompts = [
            prompt | {"prompt": [{"role": "system", "content": system}, *prompt["prompt"]]}
            for prompt in prompts
        ]
    mark = made_by(
        folder, [prompt["prompt"] for prompt in prompts], samples, temperature, max_new_tokens, seed
    )
    rows = kept_rows(path, mark)
    if sorted(map(row_number, rows)) != [
        (i, k) for i in range(len(prompts)) for k in range(samples)
    ]:
        model, tokenizer = load_model(folder, device)
        rows = sample_answers(
            model,
            tokenizer,
            prompts,
            key=(seed, "evaluation"),
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            path=path,
            desc=path.stem,
            finish=lambda batch: [
                row.update(made_by=mark, tokenizer=tokenizer.fingerprint) for row in batch
            ],
        )
    return sorted(rows, key=lambda row: (row["index"], row["sample"]))
