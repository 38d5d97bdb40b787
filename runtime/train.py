"""The optimiser, its schedule, and the log of numbers."""

import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from data.errors import InputError
from runtime.checkpoint import atomic_write, load_checkpoint, plain_json, resume_rows, save_checkpoint


def adamw(model, learning_rate, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5):
    """AdamW with Meta's β1, β2 and ε (§2.2); decay on matrices only.

    The paper gives a weight decay of 0.1 and does not say on what. Our choice: parameters of two dimensions and more,
    embeddings included. The rest are RMSNorm weights, which start at 1: pulling them to 0 makes the model no simpler,
    since the next matrix undoes the scale.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
              {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def cosine_lr(step, total_steps, peak, warmup_steps, final_fraction=0.1):
    """The learning rate of `step` (0 … total_steps - 1), §2.2: a straight warm-up, then a cosine.

    peak / warmup_steps at step 0, peak at step warmup_steps - 1, final_fraction * peak at the last step and after it.

    >>> [round(cosine_lr(step, total_steps=7, peak=1.0, warmup_steps=2), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


class Metrics:
    """A log `metrics.jsonl`: each call appends one line {"phase", "step", numbers…} and writes it out at once.

    Opening it drops a last line that a kill cut short.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        resume_rows(self.path)

    def log(self, phase, step, **numbers):
        """Append a row. Floats keep six significant digits; NaN and infinity are written as null (JSON has neither)."""
        row = {"phase": phase, "step": step, **plain_json(numbers, digits=6)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rewind(self, phase, step=0):
        """Drop the rows of this phase from `step` on: they are about to be made again."""
        rows = [row for row in resume_rows(self.path) if row["phase"] != phase or row["step"] < step]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def optimise(model, plan, batch_loss, *, learning_rate, folder, phase, weight_decay=0.1, warmup_fraction=0.03,
             warmup_steps=0, grad_clip=1.0, dtype=torch.float32, save_every=500, watch=None):
    """The one training loop: AdamW, warm-up and cosine, accumulation, clipping, log, bar, resume.

    plan: the steps from `data.plan_steps`, known beforehand, so that a resumed run takes the very same ones.
    batch_loss(rows) -> (loss summed over what it counts, count, {name: sum}): called for each micro-batch. A step's
        gradient is the sum over its micro-batches divided by their total count, never a mean of means.
    watch(step): called at the start, at each fifth of the way and at the end.
    A killed run goes on from `folder/checkpoint-PHASE.pth`, bit for bit.
    """
    optimizer = adamw(model, learning_rate, weight_decay)
    metrics, checkpoint, first = Metrics(Path(folder) / "metrics.jsonl"), Path(folder) / f"checkpoint-{phase}.pth", 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, device=next(model.parameters()).device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    metrics.rewind(phase, first)
    warmup_steps = max(warmup_steps, round(warmup_fraction * len(plan)))
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    device, smooth = weights[0].device, None
    model.train()
    bar = tqdm(range(first, len(plan)), initial=first, total=len(plan), desc=phase, mininterval=1, disable=None)
    for step in bar:
        if watch and step % max(1, len(plan) // 5) == 0:
            watch(step)
        lr = cosine_lr(step, len(plan), learning_rate, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        total, count, sums = 0.0, 0, {}
        for rows in plan[step]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, counted, extra = batch_loss(rows)
            loss.backward()
            total, count = total + loss.item(), count + counted
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in extra.items()}
        torch._foreach_div_([weight.grad for weight in weights if weight.grad is not None], count)
        norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip)
        optimizer.step()
        if not math.isfinite(total):
            raise InputError(f"the loss of step {step} of {phase} is {total}: lower --learning-rate")
        smooth = total / count if smooth is None else 0.98 * smooth + 0.02 * total / count
        metrics.log(phase, step, loss=total / count, lr=lr, grad_norm=norm.item(), count=count,
                    **{name: value / count for name, value in sums.items()})
        bar.set_postfix_str(f"loss {smooth:.3f}, lr {lr:.1e}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == len(plan):
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                         "step": step + 1})
    if watch:
        watch(len(plan))
    model.eval()
