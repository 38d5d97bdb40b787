"""How fast are answers sampled, beside transformers' `generate`?

    python -m experiments.speed.generation

Temperature 1, with and without top-p .9, no top-k, exactly so many new tokens: no EOS ends an
answer. Both keep a cache. Ours also returns the log-probability of each token, theirs does not. One
prompt with 64 answers is `num_return_sequences=64` in transformers. bfloat16: the weights are
bfloat16 in both.
"""

import random
from collections.abc import Iterator

import torch

from experiments.speed import peers
from experiments.speed.measuring import Case, Settings, Time, main, time_whole
from experiments.speed.sizes import Size, flops, weight_bytes
from model import Transformer, generate

KIND = "Generation"
NO_EOS = -1  # an id that no token has
TARGETS = {
    "S, float32, 64 prompts, top-p .9": 2.5,
    "M, float32, 64 prompts, top-p .9": 1.6,
    "M, bfloat16, 64 prompts, top-p .9": 2.0,
    "S, float32, 64 answers to one prompt": 3.5,
    "S, float32, batch 1": 2.5,
}


def cases(settings: Settings) -> Iterator[Case]:
    new = settings.few(96)
    many = settings.few(64)
    for size in settings.sizes:
        for top_p in (0.9, 1.0):
            yield case(size, torch.float32, prompts=many, length=32, new=new, top_p=top_p)
        if size.name != "S":
            # fewer tokens: where the processor does not know bfloat16, it is slow
            fewer = settings.few(16)
            yield case(size, torch.bfloat16, prompts=many, length=32, new=fewer, top_p=0.9)
    length = settings.few(256)
    yield case(settings.small, torch.float32, prompts=1, answers=many, length=length, new=new)
    for size in settings.sizes:
        yield case(size, torch.float32, prompts=1, length=32, new=new)


def case(
    size: Size,
    dtype: torch.dtype,
    *,
    prompts: int,
    length: int,
    new: int,
    answers: int = 1,
    top_p: float = 1.0,
) -> Case:
    """`new` tokens behind so many prompts of `length` tokens, `answers` to each."""
    what = f"{prompts} prompts"
    if answers > 1:
        what = f"{answers} answers to one prompt"
    elif prompts == 1:
        what = "batch 1"
    name = f"{size.name}, {str(dtype).removeprefix('torch.')}, {what}"
    if prompts > 1:
        name += f", top-p {top_p:g}".replace("0.", ".") if top_p < 1 else ", no top-p"

    model = size.model(dtype)
    rng = random.Random(0)
    ids = [[rng.randrange(3, size.args.vocab_size) for _ in range(length)] for _ in range(prompts)]
    skipped = peers.missing("transformers")
    theirs = None
    if not skipped:
        their_model = peers.llama(model)

        def theirs() -> Time:
            return time_whole(lambda: sample_theirs(their_model, ids, answers, new, top_p))

    most_repeats = 5
    if size.name == "M" and prompts > 1:
        most_repeats = 3 if dtype == torch.float32 else 2
    # one prompt is read once for all of its answers
    operations = flops(size.args, [length + new - 1] * prompts * answers, prompts * answers * new)
    operations -= flops(size.args, [length] * prompts * (answers - 1), 0)
    return Case(
        kind=KIND,
        name=name,
        unit="tokens",
        amount=prompts * answers * new,
        ours=lambda: time_whole(lambda: sample_ours(model, ids, answers, new, top_p)),
        theirs=theirs,
        peer="transformers",
        skipped=skipped,
        target=TARGETS.get(name),
        flops=operations,
        bytes_read=new * weight_bytes(size.args, dtype) if prompts * answers == 1 else 0.0,
        dtype=dtype,
        most_repeats=most_repeats,
    )


def sample_ours(
    model: Transformer, ids: list[list[int]], answers: int, new: int, top_p: float
) -> list[list[int]]:
    """The new ids of all answers."""
    prompts = [prompt for prompt in ids for _ in range(answers)]
    keys = [(0, row) for row in range(len(prompts))]
    generations = generate(model, prompts, keys, new, 1.0, top_p, eos_id=NO_EOS)
    return [generation.ids for generation in generations]


def sample_theirs(model, ids: list[list[int]], answers: int, new: int, top_p: float):
    """The new ids of all answers, (answers, new)."""
    tokens = torch.tensor(ids)
    with torch.inference_mode():
        sampled = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=top_p,
            num_return_sequences=answers,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
    return sampled[:, tokens.shape[1] :]


if __name__ == "__main__":
    main(cases, __doc__)
