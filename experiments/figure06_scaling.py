"""Accuracy of the helpfulness model against the number of pairs and the size of the model (Fig. 6).

    python experiments/figure06_scaling.py --seeds 1,2,3 --sizes 32x2,96x3,160x4

after experiments/seeds.py.

All sizes learn from the same pairs, answers of the toy SFT model, and are judged on the same fresh
pairs of test prompts. More pairs than prompts are fresh answers to the same prompts. A size is
DIMxLAYERS; the default toy model's SFT is ROOT/SEED/sft, other sizes are fine-tuned first, on the
same demonstrations with the same settings, and kept in ROOT/SEED/sft-DIMxLAYERS (on one thread
160x4 takes about three times as long as the toy size). A reward model takes some 15 s for 4,800
pairs at the toy size. Writes experiments/results/figure06.json (accuracy by rating, intervals over
items) and figure06.png.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as llama
from data import read_sft, world
from experiments.common import (
    RESULTS,
    accuracy,
    draw_panels,
    fresh_pairs,
    load_result,
    over_seeds,
    print_percent,
    save_result,
    score_lists,
    train,
)
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
from sft import encode_rows, finetune


@dataclass
class Settings:
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments/seeds.py
    sizes: tuple[str, ...] = ("32x2", "96x3", "160x4")  # DIMxLAYERS
    pairs: tuple[int, ...] = (300, 1200, 4800, 19200)  # numbers of training pairs
    repeats: int = 4  # test pairs per prompt
    max_rows: int = 0  # demonstrations for the sizes that are fine-tuned here; 0: all


def sft_of_size(root: Path, seed: int, size: str, max_rows: int) -> Path:
    """The folder of an SFT model of this size; made as `sft.py --seed SEED` does where it is not
    there yet.
    """
    dim, n_layers = map(int, size.split("x"))
    toy_args, s = llama.PRESETS["toy"], SFTSettings()
    if (dim, n_layers) == (toy_args.dim, toy_args.n_layers):
        return root / str(seed) / "sft"
    folder, data = root / str(seed) / f"sft-{size}", world.ensure() / "sft.jsonl"
    if started := open_stage(folder, {"seed": seed, "max_rows": max_rows}, {"data": data}):
        _, tokenizer = load_model(root / str(seed) / "sft")
        model = llama.Transformer(
            replace(toy_args, dim=dim, n_layers=n_layers, vocab_size=tokenizer.vocab_size)
        )
        model.init_weights(seed)
        set_seed(seed)
        dialogs = encode_rows(tokenizer, read_sft(data)[: max_rows or None], model.args.max_seq_len)
        finetune(
            model,
            dialogs,
            epochs=s.epochs,
            batch_tokens=s.batch_tokens,
            micro_tokens=s.micro_tokens,
            seed=seed,
            learning_rate=s.learning_rate,
            weight_decay=s.weight_decay,
            warmup_fraction=s.warmup_fraction,
            folder=folder,
            phase="sft",
        )
        save_model(folder, model, tokenizer)
        finish_stage(folder, {}, started)
    return folder


def draw(tables: dict[str, dict[str, dict]]) -> None:
    """experiments/results/figure06.png: mean over seeds with its interval, all pairs and the
    significantly better ones.
    """
    figure, panels = draw_panels(2)
    for panel, rating in zip(panels, ("average", "significantly_better"), strict=True):
        for size, by_count in tables.items():
            means = [row[rating] for row in by_count.values()]
            panel.plot(
                list(map(int, by_count)), [100 * one.mean for one in means], marker="o", label=size
            )
            panel.fill_between(
                list(map(int, by_count)),
                [100 * one.low for one in means],
                [100 * one.high for one in means],
                alpha=0.15,
            )
        panel.set(
            xscale="log",
            xlabel="pairs to learn from",
            ylabel="accuracy, %",
            title={"average": "all pairs"}.get(rating, "significantly better"),
        )
        panel.set_xticks(list(map(int, by_count)), list(by_count), minor=False)
        panel.minorticks_off()
        panel.legend(title="dim x layers")
        panel.grid(alpha=0.3)
    figure.savefig(RESULTS / "figure06.png", dpi=110)


def main() -> None:
    s = parse_settings(Settings, __doc__)
    result = load_result("figure06", s)
    set_threads(1)
    for seed in s.seeds:
        tests = fresh_pairs(s.out, seed, "helpfulness", s.repeats)
        rows, passes = [], 0
        while len(rows) < max(s.pairs):  # each pass is one pair for each prompt
            passes += 1
            rows = fresh_pairs(s.out, seed, "helpfulness", passes, "train")
        for size in s.sizes:
            init = sft_of_size(s.out, seed, size, s.max_rows)
            for count in s.pairs:
                trained = train(s.out, seed, "helpfulness", rows[:count], init)
                found = accuracy(score_lists(*trained, tests), tests)
                result.setdefault(str(seed), {}).setdefault(size, {})[str(count)] = found
                save_result("figure06", result, s)
    tables = {
        size: {
            str(count): over_seeds([result[str(seed)][size][str(count)] for seed in s.seeds])
            for count in s.pairs
        }
        for size in s.sizes
    }
    draw(tables)
    print_percent(
        f"Helpfulness accuracy, {len(s.seeds)} seeds",
        {
            f"{size}, {int(count):,} pairs": row
            for size, by_count in tables.items()
            for count, row in by_count.items()
        },
    )


if __name__ == "__main__":
    run(main)
