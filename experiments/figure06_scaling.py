"""Do reward models get better with more pairs and more parameters (Fig. 6)?

    python -m experiments.figure06_scaling --seeds 1,2,3 --sizes 32x2,96x3,160x4

after experiments.seeds.

All sizes learn from the same pairs, answers of the toy SFT model, and are judged on the same fresh
pairs of test prompts. More pairs than prompts are fresh answers to the same prompts. A size is
DIMxLAYERS; the default toy model's SFT is OUT/SEED/sft, other sizes are fine-tuned first, on the
same demonstrations with the same settings, and kept in OUT/SEED/sft-DIMxLAYERS (on one thread
160x4 takes about three times as long as the toy size). A reward model takes some 15 s for 4,800
pairs at the toy size. Keeps OUT/results/figure06-SEED.json: accuracy by rating, intervals over
items.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import eval as measures
import model as llama
from data import InputError, read_sft, world
from experiments.shared import results
from experiments.shared.over_seeds import over_seeds, percent, percent_table
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.reward_models import accuracy, fresh_pairs, score_lists, train
from experiments.shared.settings import ExperimentSettings
from report import Figure, Section
from runtime import (
    finish_stage,
    load_model,
    open_stage,
    parse_settings,
    run,
    save_model,
    set_seed,
    set_threads,
)
from sft import Settings as SFTSettings
from sft import encode_dialogs, finetune


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    sizes: tuple[str, ...] = ("32x2", "96x3")  # DIMxLAYERS
    pairs: tuple[int, ...] = (300, 1200, 4800, 9600)  # numbers of training pairs
    repeats: int = 4  # test pairs per prompt
    max_rows: int = 0  # demonstrations for the sizes that are fine-tuned here; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,2}", size):
                raise InputError(f"--sizes {size}: a size is DIMxLAYERS, such as 96x3")


def sft_of_size(root: Path, seed: int, size: str, max_rows: int) -> Path:
    """The folder of an SFT model of this size; made as `sft.py --seed SEED` does where it is not
    there yet.
    """
    dim, n_layers = map(int, size.split("x"))
    toy = llama.PRESETS["toy"]
    home = root / str(seed)
    if (dim, n_layers) == (toy.dim, toy.n_layers):
        return home / "sft"

    folder = home / f"sft-{size}"
    data = world.ensure() / "sft.jsonl"
    started = open_stage(folder, {"seed": seed, "max_rows": max_rows}, {"data": data})
    if not started:
        return folder
    settings = SFTSettings()
    _, tokenizer = load_model(home / "sft")
    args = replace(toy, dim=dim, n_layers=n_layers, vocab_size=tokenizer.vocab_size)
    model = llama.Transformer(args)
    model.init_weights(seed)
    set_seed(seed)
    demonstrations = read_sft(data)[: max_rows or None]
    finetune(
        model,
        encode_dialogs(tokenizer, demonstrations, model.args.max_seq_len),
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        seed=seed,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_fraction=settings.warmup_fraction,
        folder=folder,
        phase="sft",
    )
    save_model(folder, model, tokenizer)
    finish_stage(folder, {}, started)
    return folder


def measure(settings: Settings, seed: int) -> dict:
    """One seed: {size: {number of pairs: accuracy by rating}}."""
    tests = fresh_pairs(settings.out, seed, "helpfulness", settings.repeats)
    pairs = []
    passes = 0
    while len(pairs) < max(settings.pairs):  # each pass is one pair for each prompt
        passes += 1
        pairs = fresh_pairs(settings.out, seed, "helpfulness", passes, "train")
    table = {}
    for size in settings.sizes:
        init = sft_of_size(settings.out, seed, size, settings.max_rows)
        table[size] = {}
        for count in settings.pairs:
            model, tokenizer = train(settings.out, seed, "helpfulness", pairs[:count], init)
            table[size][str(count)] = accuracy(score_lists(model, tokenizer, tests), tests)
    return table


# ---- over seeds ----


def tables(result: dict) -> dict[str, dict[str, dict[str, measures.Interval]]]:
    """{size: {number of pairs: accuracy by rating, over seeds}}."""
    first = next(iter(result.values()))
    table = {}
    for size, by_count in first.items():
        table[size] = {}
        for count in by_count:
            table[size][count] = over_seeds([one[size][count] for one in result.values()])
    return table


def section(result: dict) -> Section:
    """Accuracy by size and number of pairs."""
    rows = {}
    for size, by_count in tables(result).items():
        for count, row in by_count.items():
            rows[f"{size}, {int(count):,} pairs"] = row
    curves = []
    for size, by_count in tables(result).items():
        first, *_, last = (row["average"] for row in by_count.values())
        curves.append(f"{percent(first)} to {percent(last)} % at size {size}")
    counts = list(by_count)
    return Section(
        "Do reward models get better with more pairs and more parameters? (Fig. 6)",
        [
            (
                f"Yes: from {int(counts[0]):,} to {int(counts[-1]):,} pairs accuracy goes from"
                f" {' and from '.join(curves)}; it rises with the pairs and a little with the size."
            ),
            percent_table(
                "Accuracy of the helpfulness model in percent, by rating.",
                rows,
                "A size is dimension x layers; 96x3 is the toy model's. ± is half of the 95 %"
                f" interval over {len(result)} seeds, each alone.",
            ),
            Figure(
                "Accuracy by pairs and size: no plateau is in sight.",
                file=results.RESULTS / "figure06.png",
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """Mean over seeds with its interval, all pairs and the significantly better ones."""
    figure, panels = draw_panels(2)
    titles = {"average": "all pairs", "significantly_better": "significantly better"}
    for panel, (rating, title) in zip(panels, titles.items(), strict=True):
        for size, by_count in tables(result).items():
            x = list(map(int, by_count))
            intervals = [row[rating] for row in by_count.values()]
            panel.plot(x, [100 * one.mean for one in intervals], marker="o", label=size)
            low = [100 * one.low for one in intervals]
            high = [100 * one.high for one in intervals]
            panel.fill_between(x, low, high, alpha=0.15)
        panel.set(xscale="log", xlabel="pairs to learn from", ylabel="accuracy, %", title=title)
        panel.set_xticks(x, list(by_count), minor=False)
        panel.minorticks_off()
        panel.legend(title="dim x layers")
        panel.grid(alpha=0.3)
    save_picture(figure, file)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)

    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("figure06", settings, measure_seed)
    results.finish("figure06", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
