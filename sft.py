"""Supervised fine-tuning (paper §3.1).

The paper: cross-entropy on the answers alone (zero loss on the tokens of prompts), EOS included, 2
epochs at learning rate 2e-5, cosine schedule, weight decay 0.1, batches of 64 sequences of 4096
tokens.
Ours: the same loss. There is no pre-trained base in the toy world: training starts from random
weights, on one pass over fresh demonstrations, with a learning rate and small batches that suit a
small model. Deleted: packing. The paper concatenates rows to fill a sequence; we put rows of like
length into a batch, which wastes as little and needs no mask.

The training loop that every stage uses stands here, too: AdamW with Meta's β1 .9, β2 .95 and ε
1e-5, a cosine from the peak down to a tenth of it, gradients clipped at 1.0 (§2.2).

    python sft.py                                               the toy model, from random weights
    python sft.py --preset llama-2-7b --init DIR --data MY.jsonl
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import (
    Dialog,
    EncodedDialog,
    InputError,
    Tokenizer,
    batches_by_length,
    encode_dialog,
    encode_prompt,
    pad,
    plan_steps,
    read_sft,
    world,
)
from data.chat import sampled_ids
from model import PRESETS as SIZES
from model import Transformer, generate
from runtime import (
    Metrics,
    Stage,
    StageSettings,
    check_between,
    check_positive,
    load_model,
    parse_settings,
    restore_checkpoint,
    run,
    save_checkpoint,
    save_model,
)


@dataclass
class Settings(StageSettings):
    # folder of the model to start from; none: random weights of the preset's size
    init: str = "none"
    # JSONL of {"messages": [...]}, or toy: the toy world's demonstrations
    data: str = "toy"
    dev_data: str = "toy"  # JSONL for the held-out loss; none: leave it out
    # share of the dialogs tagged is_safety that are kept (paper §4.2.3 varies it)
    safety_share: float = 1.0
    epochs: int = 1  # paper: 2; the toy world has fresh dialogs instead
    # tokens a step (paper: 64 x 4096); our choice: at equal tokens small batches learn most
    batch_tokens: int = 350
    micro_tokens: int = 16384  # tokens a forward pass; a larger step is accumulated
    # paper: 2e-5, from a pre-trained base; ours starts from nothing
    learning_rate: float = 1.25e-3
    weight_decay: float = 0.1  # paper
    warmup_fraction: float = 0.03  # our choice; the paper does not say
    max_rows: int = 0  # use only so many dialogs; 0: all
    # a dialog longer than the model's context ends the run, or is left out and counted (skip)
    too_long: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        check_positive(
            self,
            "epochs",
            "batch_tokens",
            "micro_tokens",
            "learning_rate",
            or_zero=("weight_decay", "max_rows"),
        )
        check_between(self, 1, 1000, "epochs")
        check_between(self, 0, 1, "safety_share", "warmup_fraction")
        if not self.init or not self.dev_data:
            raise InputError("--init and --dev-data name a folder and a file; none: there is none")
        needs_model = self.preset.startswith("llama-2") and self.init == "none"
        if not self.data or needs_model:
            raise InputError(
                f"--preset {self.preset} needs demonstrations and a model: "
                "--data FILE.jsonl --init FOLDER"
            )


PAPER = {
    "epochs": 2,
    "batch_tokens": 64 * 4096,
    "micro_tokens": 4096,
    "learning_rate": 2e-5,
    "data": "",
    "dev_data": "none",
}
PRESETS = {
    "tiny": {"max_rows": 2000},
    "class": {"max_rows": 7000},
    "toy": {},
    "small": {"batch_tokens": 4096, "learning_rate": 1e-3},
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-2-34b": PAPER,
    "llama-2-70b": PAPER,
}


def sft_loss(
    features: Tensor, output: nn.Module, tokens: Tensor, loss_mask: Tensor
) -> tuple[Tensor, int]:
    """Summed cross-entropy of the next token, over the tokens of answers only (paper §3.1).

    Only where a token is trained on are logits made of features: the output matrix is the dearest
    of a small model. Elsewhere, as in padding, features and ids may be anything (NaN, an id outside
    of the vocabulary): they change neither the sum nor the gradient.

    Args:
        features: (batch, seq, dim), float; those of position t predict token t + 1.
        output: makes logits (..., vocab) of features (..., dim), such as a model's output matrix.
        tokens: (batch, seq) ids.
        loss_mask: (batch, seq) bool, true on the tokens that are trained on (answers, EOS
            included). The first token of a row has no prediction: it never counts.

    Returns:
        (the sum in nats, float32; the number of tokens it sums over). The caller divides, after
        adding up a whole step.

    Raises:
        InputError: no token is trained on; a mean over nothing would be NaN.

    >>> logits = torch.zeros(1, 3, 4)  # equal logits: log 4 = 1.386 nats a token
    >>> tokens, loss_mask = torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]])
    >>> loss, count = sft_loss(logits, nn.Identity(), tokens, loss_mask)  # features that are logits
    >>> round(loss.item(), 3), count
    (2.773, 2)
    """
    # (batch, seq - 1): token t + 1 is the target of position t
    targets, trained = tokens[:, 1:], loss_mask[:, 1:]
    count = int(trained.sum())
    if count == 0:
        raise InputError("no token of the batch is trained on: its answers are all masked or empty")
    picked = features[:, :-1][trained]  # (count, dim): prompts and padding drop out here
    logits = output(picked).float()  # (count, vocab)
    return F.cross_entropy(logits, targets[trained], reduction="sum"), count


# ------------------------------------------------------------------------------------------------
# The optimiser, its schedule and the training loop. Every stage trains with these, PPO but for the
# loop.


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
) -> torch.optim.AdamW:
    """AdamW with Meta's β1, β2 and ε (§2.2); decay on matrices only.

    The paper gives a weight decay of 0.1 and does not say on what. Our choice: parameters of two
    dimensions and more, embeddings included. The rest are RMSNorm weights, which start at 1:
    pulling them to 0 makes the model no simpler, since the next matrix undoes the scale.
    """
    matrices, vectors = [], []
    for weight in model.parameters():
        if not weight.requires_grad:
            continue
        if weight.ndim >= 2:
            matrices.append(weight)
        else:
            vectors.append(weight)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def cosine_lr(
    step: int, total_steps: int, peak: float, warmup_steps: int, final_fraction: float = 0.1
) -> float:
    """The learning rate of `step` (0 … total_steps - 1), §2.2: a straight warm-up, then a cosine.

    peak / warmup_steps at step 0, peak at step warmup_steps - 1 and at the next one, where the
    cosine begins; final_fraction * peak at the last step and after it. A cosine of one step is at
    its peak. A warm-up that is longer than the run is cut off.

    >>> [round(cosine_lr(step, total_steps=7, peak=1.0, warmup_steps=2), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


def optimise(
    model: nn.Module,
    plan: list[list[list[int]]],
    batch_loss: Callable[[list[int]], tuple[Tensor, int, dict[str, float]]],
    *,
    learning_rate: float,
    folder: Path,
    phase: str,
    weight_decay: float = 0.1,
    warmup_fraction: float = 0.03,
    warmup_steps: int = 0,
    grad_clip: float = 1.0,
    dtype: torch.dtype = torch.float32,
    save_every: int = 500,
    watch: Callable[[int], object] | None = None,
) -> None:
    """The one training loop: AdamW, warm-up and cosine, accumulation, clipping, log, bar, resume.

    Args:
        plan: the steps from `data.plan_steps`, each a list of micro-batches of row numbers. It is
            known beforehand, so that a resumed run takes the very same steps.
        batch_loss: rows of a micro-batch -> (loss summed over what it counts, count, {name: sum to
            log}). A step's gradient is the sum over its micro-batches divided by their total count,
            never a mean of means.
        warmup_fraction, warmup_steps: the longer of the two warm-ups counts.
        dtype: of the products; weights, gradients and the optimiser's state keep the model's own.
        watch: called with the step at the start, at each fifth of the way and at the end.

    A killed run goes on from `folder/checkpoint-PHASE.pth`, bit for bit.

    Raises:
        InputError: the loss of a step or its gradient is not finite, or the weights are not when
            they are saved (names "step N of PHASE"); the checkpoint is not one of this run.
    """
    optimizer = adamw(model, learning_rate, weight_decay)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    device = weights[0].device
    warmup_steps = max(warmup_steps, round(warmup_fraction * len(plan)))

    # go on where a killed run was
    checkpoint, first = Path(folder) / f"checkpoint-{phase}.pth", 0
    metrics = Metrics(Path(folder) / "metrics.jsonl")
    if checkpoint.exists():
        saved = {"model": model, "optimizer": optimizer}
        state = restore_checkpoint(checkpoint, saved, device, {"step": len(plan)})
        first = state["step"]
    metrics.rewind(phase, first)

    # `watch` at each fifth, but not in the last tenth: another look follows at the end
    looks = range(0, len(plan) - len(plan) // 10, max(1, len(plan) // 5))
    model.train()
    smooth = None  # the loss, averaged over some 50 steps, for the bar
    bar = tqdm(
        range(first, len(plan)),
        initial=first,
        total=len(plan),
        desc=phase,
        mininterval=1,
        disable=None,
    )
    for step in bar:
        if watch and step in looks:
            watch(step)

        # the learning rate of this step
        lr = cosine_lr(step, len(plan), learning_rate, warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # the gradient: summed over micro-batches, then divided by all that the step counts
        optimizer.zero_grad()
        total, count, sums = 0.0, 0, {}
        for rows in plan[step]:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, counted, extra = batch_loss(rows)
            loss.backward()
            total += loss.item()
            count += counted
            for name, value in extra.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        torch._foreach_div_([weight.grad for weight in weights if weight.grad is not None], count)

        # the update
        norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip)
        if not math.isfinite(total) or not norm.isfinite():
            raise InputError(
                f"the loss of step {step} of {phase} is {total}, its gradient's norm {norm}: "
                "lower --learning-rate"
            )
        optimizer.step()

        # log, and save now and then
        mean = total / count
        smooth = mean if smooth is None else 0.98 * smooth + 0.02 * mean
        means = {name: value / count for name, value in sums.items()}
        metrics.log(phase, step, loss=mean, lr=lr, grad_norm=norm.item(), count=count, **means)
        bar.set_postfix_str(f"loss {smooth:.3f}, lr {lr:.1e}", refresh=False)
        is_last = step + 1 == len(plan)
        if (step + 1) % save_every == 0 or is_last:
            if not all(weight.isfinite().all() for weight in weights):
                raise InputError(
                    f"step {step} of {phase} made weights that are no numbers: "
                    "lower --learning-rate"
                )
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            save_checkpoint(checkpoint, state)
    if watch:
        watch(len(plan))
    model.eval()


# ------------------------------------------------------------------------------------------------
# Fine-tuning: dialogs in, loss on their answers


def encode_dialogs(
    tokenizer: Tokenizer,
    dialogs: list[Dialog],
    max_seq_len: int,
    too_long: Literal["error", "skip"] = "error",
) -> list[EncodedDialog]:
    """Dialogs as ids with their loss masks.

    An answer that a model with this tokenizer sampled is taken as it was sampled (`sampled_ids`).

    Args:
        max_seq_len: the model's context, in tokens.
        too_long: what becomes of a longer dialog: an error, or it is left out (skip), and a line
            says how many were.

    Raises:
        InputError: a tag of the chat format inside content, or a dialog longer than the context
            (names file and line); no dialog is short enough.
    """
    encoded = []
    for dialog in dialogs:
        where = dialog.where or "row"
        answer = dialog.messages[-1]["content"]
        ids = sampled_ids(tokenizer, dialog.answer_ids, dialog.tokenizer, answer)
        try:
            one = encode_dialog(tokenizer, dialog.messages, dialog.train_on, ids)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        length = len(one.ids)
        if length <= max_seq_len:
            encoded.append(one)
        elif too_long == "error":
            raise InputError(
                f"{where}: the dialog has {length} tokens, the model's context only {max_seq_len}"
            )
    left_out = len(dialogs) - len(encoded)
    if left_out:
        reason = f"longer than the model's context of {max_seq_len} tokens"
        print(f"{left_out} of {len(dialogs)} dialogs are left out: {reason}")
        if not encoded:
            raise InputError(f"all {left_out} dialogs are {reason}")
    return encoded


def answer_loss(model: Transformer, dialogs: list[EncodedDialog]) -> tuple[Tensor, int]:
    """`sft_loss` of some dialogs under the model, padded to one batch."""
    device = model.tok_embeddings.weight.device
    tokens = pad([dialog.ids for dialog in dialogs]).to(device)  # (batch, seq)
    loss_mask = pad([dialog.loss_mask for dialog in dialogs], False).to(device)  # (batch, seq)
    return sft_loss(model.features(tokens), model.output, tokens, loss_mask)


@torch.inference_mode()
def held_out_loss(model: Transformer, dialogs: list[EncodedDialog]) -> float:
    """Mean cross-entropy per answer token, in nats."""
    lengths = [len(dialog.ids) for dialog in dialogs]
    total, count = 0, 0
    for rows in batches_by_length(lengths, 8192):
        loss, counted = answer_loss(model, [dialogs[i] for i in rows])
        total += loss.item()
        count += counted
    return total / count


def finetune(
    model: Transformer,
    dialogs: list[EncodedDialog],
    *,
    epochs: int,
    batch_tokens: int,
    learning_rate: float,
    folder: Path,
    phase: str,
    seed: int,
    micro_tokens: int = 16384,
    **options,
) -> None:
    """Fine-tune the model in place on dialogs: SFT, rejection sampling (§3.2.3) and Ghost Attention
    (§3.3) alike.

    `options` go to `optimise`, which logs to `folder`, and goes on after a kill.
    """
    lengths = [len(dialog.ids) for dialog in dialogs]
    plan = plan_steps(lengths, batch_tokens, epochs, seed, micro_tokens)

    def batch_loss(rows: list[int]) -> tuple[Tensor, int, dict]:
        return *answer_loss(model, [dialogs[row] for row in rows]), {}

    optimise(
        model,
        plan,
        batch_loss,
        learning_rate=learning_rate,
        folder=folder,
        phase=phase,
        **options,
    )


def show_answers(
    model: Transformer, tokenizer: Tokenizer, prompts: list[list[dict]], title: str
) -> None:
    """Print the model's greedy answers to a few prompts, so that a reader sees it change."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    keys = [(0, i) for i in range(len(prompts))]
    answers = generate(model, encoded, keys, 64, 0.0, eos_id=tokenizer.eos_id)
    print(f"\n--- {title}")
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"  {prompt[-1]['content']:<42} {tokenizer.decode(answer.ids).strip()!r}")
    model.train()


def _data_files(settings: Settings) -> tuple[Path, Path | None]:
    """The file of demonstrations, and that of the held-out loss (None: there is none)."""
    if "toy" in (settings.data, settings.dev_data):
        world.ensure()
    data = world.FOLDER / "sft.jsonl" if settings.data == "toy" else Path(settings.data)
    if settings.dev_data == "none":
        return data, None
    if settings.dev_data == "toy":
        return data, world.FOLDER / "sft-dev.jsonl"
    return data, Path(settings.dev_data)


def _keep_safety_share(dialogs: list[Dialog], share: float) -> list[Dialog]:
    """All dialogs but those tagged is_safety, of which this share is kept, spread evenly over the
    file.

    Whether dialog i is kept follows from i alone: a smaller share keeps some of what a larger one
    keeps. InputError where none is left.
    """
    kept = []
    for i, dialog in enumerate(dialogs):
        position = (i * 0.618034) % 1  # multiples of the golden ratio fill 0 to 1 evenly
        if not dialog.is_safety or position < share:
            kept.append(dialog)
    if not kept:
        raise InputError(f"--safety-share {share} leaves no dialog: all are tagged is_safety")
    return kept


def _start(settings: Settings) -> tuple[Transformer, Tokenizer]:
    """The model to start from: random weights in the toy world, a pre-trained one at full scale."""
    if settings.init != "none":
        return load_model(settings.init)
    tokenizer = Tokenizer(world.TOKENIZER)
    model = Transformer(replace(SIZES[settings.preset], vocab_size=tokenizer.vocab_size))
    model.init_weights(settings.seed)
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, PRESETS, argv)
    stage = Stage(settings, "sft")

    # 1. demonstrations, and the model to start from
    data_file, dev_file = _data_files(settings)
    demonstrations = _keep_safety_share(read_sft(data_file), settings.safety_share)
    model, tokenizer = _start(settings)
    model.to(stage.device)

    # 2. as ids, with a mask on what is trained
    context = model.args.max_seq_len
    used = demonstrations[: settings.max_rows or None]
    dialogs = encode_dialogs(tokenizer, used, context, settings.too_long)
    dev_dialogs = []
    if dev_file:
        dev_dialogs = encode_dialogs(tokenizer, read_sft(dev_file), context, settings.too_long)
    inputs = {"data": data_file}
    if settings.init != "none":
        inputs["init"] = Path(settings.init)
    if not stage.begin(inputs, aside=("too_long",)):
        return
    _print_sizes(model, dialogs, stage)

    # 3. train, showing now and then what the model answers
    questions = _single_questions(tokenizer, used, context)
    finetune(
        model,
        dialogs,
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_fraction=settings.warmup_fraction,
        folder=stage.folder,
        phase="sft",
        seed=settings.seed,
        dtype=stage.dtype,
        watch=lambda step: show_answers(model, tokenizer, questions, f"after {step} steps"),
    )

    # 4. save, measure
    save_model(stage.folder, model, tokenizer)
    results = {}
    if dev_dialogs:
        results["dev_loss"] = held_out_loss(model, dev_dialogs)
        loss = results["dev_loss"]
        print(f"\nheld-out loss {loss:.3f} nats per answer token, on {dev_file.name}")
    stage.finish(results)
    print(f"chat: python -m play chat {stage.folder}")


def _print_sizes(model: Transformer, dialogs: list[EncodedDialog], stage: Stage) -> None:
    parameters = sum(weight.numel() for weight in model.parameters())
    tokens = sum(len(dialog.ids) for dialog in dialogs)
    print(
        f"{parameters:,} parameters, {len(dialogs):,} dialogs, {tokens:,} tokens, "
        f"on {stage.device} in {stage.dtype}"
    )


def _single_questions(
    tokenizer: Tokenizer, dialogs: list[Dialog], max_seq_len: int
) -> list[list[dict]]:
    """The prompts of the first five dialogs that are one question and its answer, and that leave
    room for one.
    """
    questions = []
    for dialog in dialogs:
        prompt = dialog.messages[:-1]
        if len(questions) < 5 and len(prompt) == 1:
            if len(encode_prompt(tokenizer, prompt)) < max_seq_len:
                questions.append(prompt)
    return questions


if __name__ == "__main__":
    run(main)
