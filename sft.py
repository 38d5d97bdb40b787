"""Supervised fine-tuning (paper §3.1).

The paper: cross-entropy on the answers alone (zero loss on the tokens of prompts), EOS included, 2 epochs at learning
rate 2e-5, cosine schedule, weight decay 0.1, batches of 64 sequences of 4096 tokens.
Ours: the same loss. There is no pre-trained base in the toy world: training starts from random weights, on one pass over
fresh demonstrations, with a learning rate and small batches that suit a small model. Deleted: packing. The paper
concatenates rows to fill a sequence; we put rows of like length into a batch, which wastes as little and needs no mask.

    python sft.py                                               the toy model, from random weights
    python sft.py --preset llama-2-7b --init DIR --data MY.jsonl
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import model as llama
from data import Tokenizer, batches_by_length, encode_dialog, encode_prompt, pad, plan_steps, read_sft, toy
from data.chat import Dialog, sampled_ids
from data.errors import InputError
from runtime import (
    check_positive,
    choose_device,
    choose_dtype,
    finish_stage,
    kept_settings,
    load_model,
    open_stage,
    optimise,
    parse_settings,
    run,
    save_model,
    set_seed,
    set_threads,
)


@dataclass
class Settings:
    preset: str = "toy"  # sizes and hyper-parameters; see below
    out: Path = Path("out")  # results go to OUT/sft
    init: str = "none"  # folder of the model to start from; none: random weights of the preset's size
    data: str = "toy"  # JSONL of {"messages": [...]}, or toy: the toy world's demonstrations
    dev_data: str = "toy"  # JSONL for the held-out loss; none: leave it out
    safety_share: float = 1.0  # share of the rows tagged is_safety that are kept (paper §4.2.3 varies it)
    epochs: int = 1  # paper: 2; the toy world has fresh rows instead
    batch_tokens: int = 350  # tokens a step (paper: 64 x 4096); our choice: at equal tokens small batches learn most
    micro_tokens: int = 16384  # tokens a forward pass; a larger step is accumulated
    learning_rate: float = 1.25e-3  # paper: 2e-5, from a pre-trained base; ours starts from nothing
    weight_decay: float = 0.1  # paper
    warmup_fraction: float = 0.03  # our choice; the paper does not say
    max_rows: int = 0  # use only so many rows; 0: all
    seed: int = 0  # of the weights and of the order of rows
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # float32 or bfloat16 for the products; weights are trained in float32
    threads: int = 0  # CPU threads; 0: torch decides
    fresh: bool = False  # start over: delete what is in OUT/sft


PAPER = dict(epochs=2, batch_tokens=64 * 4096, micro_tokens=4096, learning_rate=2e-5, data="", dev_data="none")
PRESETS = {
    "tiny": dict(max_rows=2000),
    "toy": {},
    "small": dict(batch_tokens=4096, learning_rate=1e-3),
    "llama-2-7b": PAPER, "llama-2-13b": PAPER, "llama-2-70b": PAPER,
}


def sft_loss(logits: Tensor, tokens: Tensor, loss_mask: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of the next token, over the tokens of answers only (paper §3.1).

    Args:
        logits: (batch, seq, vocab), float; position t predicts token t + 1.
        tokens: (batch, seq) ids; padding may hold anything.
        loss_mask: (batch, seq) bool, true on the tokens that are trained on (answers, EOS included).

    Returns:
        (the sum in nats, the number of tokens it sums over); the caller divides, after adding up a whole step.

    Raises:
        InputError: no token is trained on; a mean over nothing would be NaN.

    >>> logits = torch.zeros(1, 3, 4)  # equal logits: log 4 = 1.386 nats for each of the two answer tokens
    >>> loss, count = sft_loss(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]]))
    >>> round(loss.item(), 3), count
    (2.773, 2)
    """
    targets, counts = tokens[:, 1:], loss_mask[:, 1:]  # (batch, seq - 1): token t + 1 is the target of position t
    count = int(counts.sum())
    if count == 0:
        raise InputError("no token of the batch is trained on: its answers are all masked or empty")
    return F.cross_entropy(logits[:, :-1][counts].float(), targets[counts], reduction="sum"), count


def encode_rows(tokenizer: Tokenizer, rows: list[dict], max_seq_len: int) -> list[Dialog]:
    """Encode SFT rows; answers that a model with this tokenizer sampled are taken as the ids that it sampled (`sampled_ids`).

    Raises:
        InputError: a tag of the chat format inside content, or a dialog longer than the context; names file and line.
    """
    dialogs = []
    for row in rows:
        where = row.get("where", "row")
        ids = sampled_ids(tokenizer, row, "answer_ids", row["messages"][-1]["content"])
        if ids and (tokenizer.bos_id in ids or tokenizer.eos_id in ids[:-1]):
            ids = None  # nothing should learn to write a control token, but for EOS at the end
        try:
            dialog = encode_dialog(tokenizer, row["messages"], row.get("train_on", "all"), ids)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if len(dialog.ids) > max_seq_len:
            raise InputError(f"{where}: the dialog has {len(dialog.ids)} tokens, the model's context only {max_seq_len}")
        dialogs.append(dialog)
    return dialogs


def answer_loss(model: llama.Transformer, dialogs: list[Dialog]) -> tuple[Tensor, int]:
    """`sft_loss` of some dialogs under the model, padded to one batch."""
    device = model.tok_embeddings.weight.device
    tokens = pad([dialog.ids for dialog in dialogs]).to(device)  # (batch, seq)
    loss_mask = pad([dialog.loss_mask for dialog in dialogs], False).to(device)  # (batch, seq)
    return sft_loss(model(tokens), tokens, loss_mask)


@torch.inference_mode()
def held_out_loss(model: llama.Transformer, dialogs: list[Dialog]) -> float:
    """Mean cross-entropy per answer token, in nats."""
    losses = [answer_loss(model, [dialogs[i] for i in rows])
              for rows in batches_by_length([len(dialog.ids) for dialog in dialogs], 8192)]
    return sum(loss.item() for loss, _ in losses) / sum(count for _, count in losses)


def finetune(model: llama.Transformer, dialogs: list[Dialog], *, epochs: int, batch_tokens: int, learning_rate: float,
             folder: Path, phase: str, seed: int, micro_tokens: int = 16384, **options) -> None:
    """Fine-tune the model in place on dialogs: SFT, rejection sampling (§3.2.3) and Ghost Attention (§3.3) alike.

    `options` go to `runtime.optimise`, which logs to `folder`, and goes on after a kill.
    """
    plan = plan_steps([len(dialog.ids) for dialog in dialogs], batch_tokens, epochs, seed, micro_tokens)

    def batch_loss(rows: list[int]) -> tuple[Tensor, int, dict]:
        return *answer_loss(model, [dialogs[row] for row in rows]), {}

    optimise(model, plan, batch_loss, learning_rate=learning_rate, folder=folder, phase=phase, **options)


def show_answers(model: llama.Transformer, tokenizer: Tokenizer, prompts: list[list[dict]], title: str) -> None:
    """Print the model's greedy answers to a few prompts, so that a reader sees it change."""
    found = llama.generate(model, [encode_prompt(tokenizer, prompt) for prompt in prompts], [(0, i) for i in range(len(prompts))],
                           64, 0.0, eos_id=tokenizer.eos_id)
    print(f"\n--- {title}")
    for prompt, answer in zip(prompts, found, strict=True):
        print(f"  {prompt[-1]['content']:<42} {tokenizer.decode(answer.ids).strip()!r}")
    model.train()


def main(argv: list[str] | None = None) -> None:
    # 1. settings, data, model
    s = parse_settings(Settings, __doc__, PRESETS, argv)
    folder = s.out / "sft"
    check_positive(s, "epochs", "batch_tokens", "micro_tokens", "learning_rate", or_zero=("weight_decay", "max_rows"))
    if not 0 <= s.safety_share <= 1:
        raise InputError(f"wanted: --safety-share from 0 to 1 (is {s.safety_share})")
    set_threads(s.threads)
    set_seed(s.seed)
    device = choose_device(s.device)
    dtype = choose_dtype(s.dtype, device)
    if s.data == "toy" or s.dev_data == "toy":
        toy.ensure()
    data = toy.FOLDER / "sft.jsonl" if s.data == "toy" else Path(s.data)
    dev_data = toy.FOLDER / "sft-dev.jsonl" if s.dev_data == "toy" else None if s.dev_data == "none" else Path(s.dev_data)
    inputs = {"data": data} | ({} if s.init == "none" else {"init": Path(s.init)})
    if not s.data or (s.preset.startswith("llama-2") and s.init == "none"):
        raise InputError(f"--preset {s.preset} needs demonstrations and a model: --data FILE.jsonl --init FOLDER")
    rows = read_sft(data)
    if s.init == "none":
        tokenizer = Tokenizer(toy.TOKENIZER)
        model = llama.Transformer(replace(llama.PRESETS[s.preset], vocab_size=tokenizer.vocab_size))
        model.init_weights(s.seed)
    else:
        model, tokenizer = load_model(s.init)
    model.to(device)
    rows = [row for i, row in enumerate(rows) if not row.get("is_safety") or (i * 0.618034) % 1 < s.safety_share]
    dialogs = encode_rows(tokenizer, rows[: s.max_rows or None], model.args.max_seq_len)
    dev = encode_rows(tokenizer, read_sft(dev_data), model.args.max_seq_len) if dev_data else []
    started = open_stage(folder, kept_settings(s), inputs, s.fresh)
    if not started:
        return
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(dialogs):,} dialogs, "
          f"{sum(len(d.ids) for d in dialogs):,} tokens, on {device} in {dtype}")

    # 2. train, showing now and then what the model answers
    shown = [row["messages"][:-1] for row in rows if len(row["messages"]) == 2][:5]
    finetune(model, dialogs, epochs=s.epochs, batch_tokens=s.batch_tokens, micro_tokens=s.micro_tokens,
             learning_rate=s.learning_rate, weight_decay=s.weight_decay,
             warmup_fraction=s.warmup_fraction, folder=folder,
             phase="sft", seed=s.seed, dtype=dtype,
             watch=lambda step: show_answers(model, tokenizer, shown, f"after {step} steps"))

    # 3. save, report
    save_model(folder, model, tokenizer)
    results = {"dev_loss": held_out_loss(model, dev)} if dev else {}
    if dev:
        print(f"\nheld-out loss {results['dev_loss']:.3f} nats per answer token")
    finish_stage(folder, results, started)
    print(f"chat: python model.py {folder}")


if __name__ == "__main__":
    run(main)
