"""Is SFT as strong as its budget allows? The same training at twice the budget and at neighbouring
settings.

    python experiments/sft_budget.py --seed 0

One seed, a tuning one: the intervals are over items, of these very models. They say nothing of what
another seed would give, so that no setting is claimed to be better here. Writes
experiments/results/sft_budget.json: held-out loss, annotator's scores on dev prompts at temperature
1, CPU seconds, and the share of single questions under an instruction with words that training
never had whose answer keeps it: one word, two words.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as measures
from data import read_prompts, world
from experiments.common import save_result, side_by_side
from experiments.longer_sft import asked
from experiments.table30_gatt import sets
from runtime import load_model, parse_settings, run, set_threads
from sft import Settings as SFTSettings

GROUPS = ("unseen words", "two, unseen")


@dataclass
class Settings:
    seed: int = 0  # a tuning seed
    out: Path = Path("out/sft-budget")  # one root per variant
    samples: int = 4  # answers per dev prompt
    dialogs: int = 200  # questions under an instruction
    at_once: int = 2  # variants side by side


def main() -> None:
    s, base = parse_settings(Settings, __doc__), SFTSettings()
    set_threads(1)
    lr, tokens = base.learning_rate, base.batch_tokens
    wanted = [
        (lr, tokens, 1),
        (lr, tokens, 2),
        (lr / 2, tokens, 1),
        (lr * 2, tokens, 1),
        (lr, tokens // 2, 1),
        (lr, tokens * 2, 1),
    ]
    variants = {
        f"learning rate {rate:g}, {batch} tokens a step, {epochs} pass(es)": [
            "--learning-rate",
            str(rate),
            "--batch-tokens",
            str(batch),
            "--epochs",
            str(epochs),
        ]
        for rate, batch, epochs in wanted
    }
    world.ensure()
    roots = {name: s.out / name.replace(" ", "-").replace(",", "") for name in variants}
    side_by_side(
        {
            root.name: [
                [
                    "sft.py",
                    "--seed",
                    str(s.seed),
                    "--out",
                    str(root),
                    "--threads",
                    "1",
                    *variants[name],
                ]
            ]
            for name, root in roots.items()
        },
        s.out,
        s.at_once,
    )
    prompts, constraints, result = (
        read_prompts(world.ensure() / "prompts-dev.jsonl"),
        sets(s.dialogs),
        {},
    )
    for name, root in roots.items():
        rows = measures.evaluate(*load_model(root / "sft"), prompts, samples=s.samples)
        record = json.loads((root / "sft" / "stage.json").read_text())["results"]
        result[name] = {
            "dev_loss": record["dev_loss"],
            "cpu_seconds": record["cpu_seconds"],
            **measures.summary(prompts, rows),
            **{
                group: asked(root / "sft", constraints[group], "dev", s.seed)["all"]
                for group in GROUPS
            },
        }
        print(
            f"{name:<60} held-out loss {record['dev_loss']:.3f}, {record['cpu_seconds']:.0f}"
            " CPU s,",
            ", ".join(f"{key} {result[name][key]}" for key in ("helpfulness", "safety", *GROUPS)),
            flush=True,
        )
    save_result("sft_budget", result, s)


if __name__ == "__main__":
    run(main)
