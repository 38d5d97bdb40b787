"""How long the instruction of turn 1 is looked at (Fig. 10): maximum attention on its tokens,
before and after Ghost Attention.

    python experiments/figure10_attention.py --seeds 1,2,3      after gatt.py in OUT/SEED

SDPA returns no weights, so they are computed again from each layer's wq and wk. A number is the
largest share, over all heads and layers, of its attention that a position gives to the
instruction's tokens together, averaged over the positions that predict a turn's answer. Dialogs,
answers included, are the same for both models: the first model's own, with the instruction on every
turn left in the first message only. Writes experiments/results/figure10.json (intervals over
dialogs) and .png; the difference after - before is printed with intervals over seeds, corrected for
the turns that are shown.
"""

import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import encode_dialog, world
from data.chat import Dialog, encode_turn
from experiments.common import RESULTS, draw_panels, print_claims, save_result
from gatt import instruct
from model import Attention, Step, Transformer, apply_rope
from runtime import load_model, parse_settings, require, run, sample_answers, set_threads

SHOWN = (1, 2, 4, 6, 10, 20)  # turns that are printed


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # fresh ones: seed 0 was used for tuning
    # each seed's models are in OUT/SEED, as in experiments/reference.py
    out: Path = Path("out/final")
    models: str = "rlhf-v3,gatt"  # before and after
    dialogs: int = 40  # per seed
    turns: int = 20  # of each dialog


def attention_weights(attention: Attention, x: Tensor, step: Step) -> Tensor:
    """The weights of one causal attention layer: x (batch, seq, dim) -> (batch, n_heads, seq, seq),
    each row summing to 1.
    """
    # (batch, seq, n_heads, …)
    q = apply_rope(attention.wq(x).unflatten(-1, (-1, attention.head_dim)), step.cos, step.sin)
    # (batch, seq, kv_heads, …)
    k = apply_rope(attention.wk(x).unflatten(-1, (-1, attention.head_dim)), step.cos, step.sin)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (batch, seq, n_heads, head_dim)
    # (batch, n_heads, seq, seq)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(attention.head_dim)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)  # (seq, seq)
    return scores.masked_fill(future, -math.inf).softmax(-1)


@torch.inference_mode()
def attention_to(model: Transformer, ids: list[int], columns: Tensor) -> Tensor:
    """Largest share of attention over heads and layers: ids, columns (groups, seq) 0 or 1 -> (seq,
    groups).

    Entry [t, g] is the maximum over heads and layers of what position t gives to all tokens of
    group g together.
    """
    found, hooks = [], []
    for layer in model.layers:
        hooks.append(
            layer.attention.register_forward_pre_hook(
                lambda module, inputs: found.append(
                    # (seq, groups)
                    torch.einsum(
                        "hqk,gk->hqg", attention_weights(module, *inputs)[0], columns
                    ).amax(0)
                )
            )
        )
    try:
        model.features(torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).amax(0)  # (seq, groups)


def by_turn(model: Transformer, dialog: Dialog, instruction: range) -> Tensor:
    """Attention of each turn's answer to the instruction and to each turn: (turns, 1 + turns)."""
    turns = torch.tensor(dialog.turns)  # (seq)
    columns = torch.stack(
        [torch.zeros(len(turns)), *(turns == turn for turn in range(max(dialog.turns) + 1))]
    ).float()
    # turn 0 without the instruction
    columns[0, list(instruction)], columns[1, list(instruction)] = 1.0, 0.0
    # (seq) the next token belongs to an answer
    predicts = torch.tensor([*dialog.loss_mask[1:], False])
    found = attention_to(model, dialog.ids, columns)  # (seq, 1 + turns)
    return torch.stack(
        [found[predicts & (turns == turn)].mean(0) for turn in range(max(dialog.turns) + 1)]
    )


def make_dialog(
    model: Transformer, tokenizer, s: Settings, seed: int, number: int
) -> tuple[Dialog, range]:
    """A dialog under one unseen word, answered with the instruction and its question alone, and
    where the instruction stands.
    """
    rng = random.Random(f"figure 10 {seed} {number}")
    kind, word = rng.choice(["first word", "last word"]), rng.choice(world.made_up_words("test"))
    instruction = world.constraint(kind, word)["long"]
    questions = [measures.ask_about(rng, "test", None)["prompt"] for _ in range(s.turns)]
    rows = sample_answers(
        model,
        tokenizer,
        [{"prompt": instruct(question, instruction)} for question in questions],
        key=(seed, "figure 10", number),
        temperature=0.7,
    )
    messages = [
        m
        for question, row in zip(questions, rows, strict=True)
        for m in (
            *question,
            {"role": "assistant", "content": row["answer"] or "I am not sure about that."},
        )
    ]
    first = len(tokenizer.encode("[INST]", bos=True))
    end = len(encode_turn(tokenizer, instruction)[0]) - len(tokenizer.encode(" [/INST]"))
    return encode_dialog(tokenizer, instruct(messages, instruction, "first")), range(first, end)


def claims(before: dict, after: dict, turns: int) -> dict[str, list[float]]:
    """{"turn": attention to the instruction after - before, one per seed}; each {seed: by turn}."""
    rows = {}
    for turn in [turn for turn in SHOWN if turn <= turns]:
        pairs = [(before[seed][turn - 1], after[seed][turn - 1]) for seed in before]
        rows[f"turn {turn}"] = [second[0] - first[0] for first, second in pairs]
    return rows


def main() -> None:
    s = parse_settings(Settings, __doc__)
    set_threads(1)
    names, result, maps = s.models.split(","), {}, {}
    for seed in s.seeds:
        models = {
            name: load_model(require(s.out / str(seed) / name, "python gatt.py")) for name in names
        }
        starter, tokenizer = models[names[0]]
        dialogs = [make_dialog(starter, tokenizer, s, seed, number) for number in range(s.dialogs)]
        for name in names:
            # (dialogs, turns, 1 + turns)
            tables = torch.stack([by_turn(models[name][0], *dialog) for dialog in dialogs])
            maps[name] = maps.get(name, 0) + tables.mean(0) / len(s.seeds)  # (turns, 1 + turns)
            result.setdefault(name, {})[str(seed)] = [
                measures.interval(column.tolist()) for column in tables[:, :, 0].T
            ]
    save_result("figure10", result | {"models": names, "dialogs": s.dialogs}, s)
    figure, panels = draw_panels(3, width=4)
    for panel, name in zip(panels, names, strict=False):
        panel.imshow(maps[name], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        panel.set(title=name, xlabel="instruction, then turns 1, 2, …", ylabel="answer of turn")
        panel.set_yticks(range(0, s.turns, 3), range(1, s.turns + 1, 3))
    for name in names:
        means = [
            sum(row[t].mean for row in result[name].values()) / len(s.seeds) for t in range(s.turns)
        ]
        panels[2].plot(range(1, s.turns + 1), means, marker=".", label=name)
        print(
            f"{name:<10} attention to the instruction at turn",
            ", ".join(f"{t}: {means[t - 1]:.2f}" for t in SHOWN if t <= s.turns),
        )
    if len(names) == 2:
        rows = claims(result[names[0]], result[names[1]], s.turns)
        print_claims(f"{names[1]} - {names[0]}", rows)
    panels[2].set(title="on the instruction, best head", xlabel="turn", ylim=(0, 1))
    panels[2].legend()
    figure.savefig(RESULTS / "figure10.png", dpi=110)


if __name__ == "__main__":
    run(main)
