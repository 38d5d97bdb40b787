"""How long is the instruction of turn 1 looked at (Fig. 10)? Maximum attention on its tokens,
before and after Ghost Attention.

    python -m experiments.figure10_attention --seeds 1,2,3      after gatt.py in OUT/SEED

SDPA returns no weights, so they are computed again from each layer's wq and wk. A number is the
largest share, over all heads and layers, of its attention that a position gives to the
instruction's tokens together, averaged over the positions that predict a turn's answer. Dialogs,
answers included, are the same for both models: the first model's own, with the instruction on every
turn left in the first message only. Keeps OUT/results/figure10-SEED.json (intervals over dialogs,
and the maps that the picture shows). The difference after - before is shown with intervals over
seeds, corrected for the turns that are shown.
"""

import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import eval as measures
from data import EncodedDialog, InputError, Prompt, Tokenizer, encode_dialog, world
from data.chat import encode_turn
from experiments.shared import results
from experiments.shared.over_seeds import claims_table, mean_curve, named
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.settings import ExperimentSettings
from gatt import instruct
from model import Attention, Step, Transformer, apply_rope
from report import Figure, Section, Table
from runtime import load_model, parse_settings, require, run, sample_answers, set_threads

SHOWN = (1, 2, 4, 6, 10, 20)  # turns in the table


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # fresh ones: seed 0 was used for tuning
    # each seed's models are in OUT/SEED, as in experiments.reference
    out: Path = Path("out/final")
    models: str = "rlhf-v3,gatt"  # before and after
    dialogs: int = 40  # per seed
    turns: int = 20  # of each dialog

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.models.split(","))) != 2 or "" in self.models.split(","):
            raise InputError(f"--models {self.models}: two names are wanted, such as rlhf-v3,gatt")


# ---- attention ----


def attention_weights(attention: Attention, x: Tensor, step: Step) -> Tensor:
    """The weights of one causal attention layer: x (batch, seq, dim) -> (batch, n_heads, seq, seq),
    each row summing to 1.
    """
    q = attention.wq(x).unflatten(-1, (-1, attention.head_dim))  # (batch, seq, n_heads, head_dim)
    k = attention.wk(x).unflatten(-1, (-1, attention.head_dim))  # (batch, seq, kv_heads, head_dim)
    q = apply_rope(q, step.rope)
    k = apply_rope(k, step.rope)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (batch, seq, n_heads, head_dim)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)  # (batch, n_heads, seq, seq)
    scores = scores / math.sqrt(attention.head_dim)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)  # (seq, seq)
    return scores.masked_fill(future, -math.inf).softmax(-1)


@torch.inference_mode()
def attention_to(model: Transformer, ids: list[int], columns: Tensor) -> Tensor:
    """Largest share of attention over heads and layers: ids, columns (groups, seq) 0 or 1 -> (seq,
    groups).

    Entry [t, g] is the maximum over heads and layers of what position t gives to all tokens of
    group g together.
    """
    of_layers = []  # (seq, groups) each

    def watch(attention: Attention, inputs: tuple) -> None:
        weights = attention_weights(attention, *inputs)[0]  # (n_heads, seq, seq)
        shares = torch.einsum("hqk,gk->hqg", weights, columns)  # (n_heads, seq, groups)
        of_layers.append(shares.amax(0))

    hooks = [layer.attention.register_forward_pre_hook(watch) for layer in model.layers]
    try:
        model.features(torch.tensor([ids]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(of_layers).amax(0)  # (seq, groups)


def by_turn(model: Transformer, dialog: EncodedDialog, instruction: range) -> Tensor:
    """Attention of each turn's answer to the instruction and to each turn: (turns, 1 + turns).

    instruction: where it stands in the ids. Turn 0 is without it.
    """
    turns = torch.tensor(dialog.turns)  # (seq)
    count = max(dialog.turns) + 1
    of_turns = [turns == turn for turn in range(count)]
    columns = torch.stack([torch.zeros(len(turns)), *of_turns]).float()  # (1 + turns, seq)
    columns[0, list(instruction)] = 1.0
    columns[1, list(instruction)] = 0.0
    predicts = torch.tensor([*dialog.loss_mask[1:], False])  # (seq) the next token is an answer's
    shares = attention_to(model, dialog.ids, columns)  # (seq, 1 + turns)
    means = [shares[predicts & of_turn].mean(0) for of_turn in of_turns]
    return torch.stack(means)


# ---- dialogs ----


def make_dialog(
    model: Transformer, tokenizer: Tokenizer, settings: Settings, seed: int, number: int
) -> tuple[EncodedDialog, range]:
    """A dialog under one unseen word, answered with the instruction and its question alone, and
    where the instruction stands.
    """
    rng = random.Random(f"figure 10 {seed} {number}")
    kind = rng.choice(["first word", "last word"])
    word = rng.choice(world.made_up_words("test"))
    instruction = world.constraint(kind, word)["long"]
    questions = []
    for _ in range(settings.turns):
        questions.append(measures.ask_about(rng, "test", None).messages)
    prompts = [Prompt(instruct(question, instruction)) for question in questions]
    answers = sample_answers(
        model, tokenizer, prompts, key=(seed, "figure 10", number), temperature=0.7
    )
    messages = []
    for question, answer in zip(questions, answers, strict=True):
        text = answer.text or "I am not sure about that."
        messages += [*question, {"role": "assistant", "content": text}]
    dialog = encode_dialog(tokenizer, instruct(messages, instruction, "first"))
    first = len(tokenizer.encode("[INST]", bos=True))
    end = len(encode_turn(tokenizer, instruction)[0]) - len(tokenizer.encode(" [/INST]"))
    return dialog, range(first, end)


def measure(settings: Settings, seed: int) -> dict:
    """{model: attention to the instruction by turn, and its whole map}."""
    root = settings.out / str(seed)
    models = {}
    for name in settings.models.split(","):
        models[name], tokenizer = load_model(require(root / name, "python gatt.py"))
    starter = next(iter(models.values()))
    dialogs = []
    for number in range(settings.dialogs):
        dialogs.append(make_dialog(starter, tokenizer, settings, seed, number))
    table = {}
    for name, model in models.items():
        maps = torch.stack([by_turn(model, *dialog) for dialog in dialogs])
        # maps: (dialogs, turns, 1 + turns); column 0 is the instruction's
        instruction = [measures.interval(column.tolist()) for column in maps[:, :, 0].T]
        table[name] = {"instruction": instruction, "map": maps.mean(0).tolist()}
    return table


def assemble(of_seeds: dict[str, dict], settings: Settings) -> dict:
    """What is published of the seeds: the numbers, without the maps."""
    names = settings.models.split(",")
    result = {}
    for name in names:
        result[name] = {seed: one[name]["instruction"] for seed, one in of_seeds.items()}
    return result | {"models": names, "dialogs": settings.dialogs}


# ---- over seeds ----


def claims(before: dict, after: dict, turns: int) -> dict[str, list[float]]:
    """{"turn": attention to the instruction after - before, one per seed}; each {seed: by turn}."""
    rows = {}
    for turn in SHOWN:
        if turn <= turns:
            pairs = [(before[seed][turn - 1], after[seed][turn - 1]) for seed in before]
            rows[f"turn {turn}"] = [second[0] - first[0] for first, second in pairs]
    return rows


def section(result: dict) -> Section:
    """Attention by turn before and after, and the difference."""
    before, after = result["models"]
    curves = {name: mean_curve(list(result[name].values())) for name in result["models"]}
    turns = len(curves[before])
    shown = [turn for turn in SHOWN if turn <= turns]
    cells = []
    for name, curve in curves.items():
        cells.append([named(name), *(f"{curve[turn - 1]:.2f}" for turn in shown)])
    last = shown[-1]
    return Section(
        "How long is the instruction of turn 1 looked at? (Fig. 10)",
        [
            (
                f"With Ghost Attention to the end: at turn {last} the best head's weight on the"
                f" instruction is {curves[after][last - 1]:.2f} after it and"
                f" {curves[before][last - 1]:.2f} before it."
            ),
            Table(
                "The largest share of attention, over all heads and layers, that an answer gives to"
                " the instruction of turn 1.",
                [""] + [f"turn {turn}" for turn in shown],
                cells,
                f"Means over {len(result[before])} seeds, {result['dialogs']} dialogs each, the"
                " same for both models.",
            ),
            claims_table(
                "After minus before, by turn.", claims(result[before], result[after], turns)
            ),
            Figure(
                "Attention to the instruction and to each turn, before and after Ghost Attention.",
                file=results.RESULTS / "figure10.png",
            ),
        ],
    )


def draw(of_seeds: dict[str, dict], file: Path) -> None:
    """The maps of both models, mean over seeds, and the curves on the instruction.

    of_seeds: {seed: what `measure` gives}.
    """
    figure, (*map_panels, curve_panel) = draw_panels(3, width=4)
    names = list(next(iter(of_seeds.values())))
    for panel, name in zip(map_panels, names, strict=False):
        maps = torch.tensor([one[name]["map"] for one in of_seeds.values()])
        # maps: (seeds, turns, 1 + turns)
        turns = maps.shape[1]
        panel.imshow(maps.mean(0), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        panel.set(title=name, xlabel="instruction, then turns 1, 2, …", ylabel="answer of turn")
        panel.set_yticks(range(0, turns, 3), range(1, turns + 1, 3))
    for name in names:
        means = mean_curve([one[name]["instruction"] for one in of_seeds.values()])
        curve_panel.plot(range(1, len(means) + 1), means, marker=".", label=name)
    curve_panel.set(title="on the instruction, best head", xlabel="turn", ylim=(0, 1))
    curve_panel.legend()
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    of_seeds = results.measure_seeds("figure10", settings, partial(measure, settings))
    result = assemble(of_seeds, settings)

    def draw_maps(_: dict, file: Path) -> None:
        draw(of_seeds, file)

    results.finish("figure10", result, settings, section, draw_maps)


if __name__ == "__main__":
    run(main)
