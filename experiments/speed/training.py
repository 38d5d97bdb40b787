"""How fast is a training step, beside the plainest loop around transformers' Llama?

    python -m experiments.speed.training

Equal tensors: full rows, every token is a target. Ours is `sft.optimise` as every stage runs it,
with its schedule, checks and log; theirs are forward, backward, clipping and AdamW, no more. Both
start from lists of ids. bfloat16 is autocast in both: the weights stay float32.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from data import EncodedDialog
from experiments.speed import peers
from experiments.speed.measuring import Case, Settings, Time, main, time_steps
from experiments.speed.sizes import Size, flops
from model import Transformer
from sft import adamw, answer_loss, optimise

KIND = "Training step, equal tensors"
TARGETS = {"S, float32": 1.2, "M, float32": 1.15, "S, bfloat16": 1.15, "M, bfloat16": 1.05}
# (rows, tokens of a row, steps); where the processor does not know bfloat16, it is slow
WORK = {
    "S, float32": (16, 128, 10),
    "M, float32": (4, 256, 3),
    "S, bfloat16": (4, 128, 2),
    "M, bfloat16": (1, 64, 2),
}
LEAST = (2, 8, 2)


def cases(settings: Settings) -> Iterator[Case]:
    for size in settings.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            yield case(size, dtype)


def case(size: Size, dtype: torch.dtype) -> Case:
    """One size at one precision."""
    name = f"{size.name}, {str(dtype).removeprefix('torch.')}"
    rng = random.Random(0)
    count, length, steps = WORK.get(name, LEAST)
    rows = []
    for _ in range(count):
        rows.append([rng.randrange(3, size.args.vocab_size) for _ in range(length)])
    model = size.model()
    skipped = peers.missing("transformers")
    theirs = None
    if not skipped:
        their_model = peers.llama(model).train()
        optimizer = adamw(their_model, 1e-4)

        def theirs() -> Time:
            return time_steps(lambda: their_loop(their_model, optimizer, rows, steps, dtype))

    return Case(
        kind=KIND,
        name=name,
        unit="tokens",
        amount=count * length * steps,
        ours=lambda: our_loop(model, rows, steps, dtype),
        theirs=theirs,
        peer="transformers",
        skipped=skipped,
        target=TARGETS.get(name),
        flops=3 * steps * flops(size.args, [length] * count, count * (length - 1)),
        dtype=dtype,
        most_repeats=5 if size.name == "S" and dtype == torch.float32 else 3,
    )


def our_loop(model: Transformer, rows: list[list[int]], steps: int, dtype: torch.dtype) -> Time:
    """Steps of `sft.optimise`."""
    dialogs = [EncodedDialog(ids, [True] * len(ids), [0] * len(ids)) for ids in rows]
    plan = [[list(range(len(rows)))]] * steps

    def batch_loss(picked: list[int]):
        return *answer_loss(model, [dialogs[i] for i in picked]), {}

    with tempfile.TemporaryDirectory() as folder:
        return time_steps(
            lambda: optimise(
                model,
                plan,
                batch_loss,
                learning_rate=1e-4,
                folder=Path(folder),
                phase="speed",
                dtype=dtype,
            )
        )


def their_loop(model, optimizer, rows: list[list[int]], steps: int, dtype: torch.dtype) -> None:
    """Steps of a loop by hand."""
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    for _ in range(steps):
        tokens = torch.tensor(rows)
        optimizer.zero_grad()
        with autocast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()


if __name__ == "__main__":
    main(cases, __doc__)
