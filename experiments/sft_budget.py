"""Is SFT as strong as its budget allows? The same training at twice the budget and at neighbouring
settings.

    python -m experiments.sft_budget --seed 0

One seed, a tuning one: the intervals are over items, of these very models. They say nothing of what
another seed would give, so that no setting is claimed to be better here. Keeps
OUT/results/sft_budget-SEED.json: held-out loss, annotator's scores on dev prompts at temperature 1,
CPU seconds, and the share of single questions under an instruction with words that training never
had whose answer keeps it: one word, two words.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import eval as measures
from data import read_prompts, world
from experiments.longer_sft import asked
from experiments.shared import results
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from experiments.table30_gatt import sets
from report import Section, Table, number
from runtime import load_model, parse_settings, run, set_threads
from sft import Settings as SFTSettings

GROUPS = ("unseen words", "two, unseen")


@dataclass
class Settings(ExperimentSettings):
    seed: int = 0  # a tuning seed
    out: Path = Path("out/sft-budget")  # one root per variant
    samples: int = 4  # answers per dev prompt
    dialogs: int = 200  # questions under an instruction
    at_once: int = 2  # variants side by side


def variants() -> dict[str, list[str]]:
    """Name -> options of sft.py; the first is the default."""
    default = SFTSettings()
    rate = default.learning_rate
    tokens = default.batch_tokens
    wanted = [
        (rate, tokens, 1),
        (rate, tokens, 2),
        (rate / 2, tokens, 1),
        (rate * 2, tokens, 1),
        (rate, tokens // 2, 1),
        (rate, tokens * 2, 1),
    ]
    table = {}
    for rate, tokens, epochs in wanted:
        name = f"learning rate {rate:g}, {tokens} tokens a step, {epochs} pass(es)"
        options = ["--learning-rate", str(rate), "--batch-tokens", str(tokens)]
        table[name] = [*options, "--epochs", str(epochs)]
    return table


def root_of(name: str, settings: Settings) -> Path:
    """Where a variant's model lies."""
    return settings.out / name.replace(" ", "-").replace(",", "")


def train(settings: Settings) -> None:
    """The variants, side by side."""
    jobs = {}
    for name, options in variants().items():
        root = root_of(name, settings)
        command = ["sft.py", "--seed", str(settings.seed), "--out", str(root), "--threads", "1"]
        jobs[root.name] = [[*command, *options]]
    side_by_side(jobs, settings.out, settings.at_once)


def measure(settings: Settings) -> dict:
    """{variant: its loss, cost, scores, and shares of answers that keep an instruction}."""
    prompts = read_prompts(world.ensure() / "prompts-dev.jsonl")
    constraints = sets(settings.dialogs)
    table = {}
    for name in variants():
        folder = root_of(name, settings) / "sft"
        model, tokenizer = load_model(folder)
        judgements = measures.evaluate(model, tokenizer, prompts, samples=settings.samples)
        record = json.loads((folder / "stage.json").read_text("utf-8"))["results"]
        entry = {"dev_loss": record["dev_loss"], "cpu_seconds": record["cpu_seconds"]}
        entry |= measures.summary(prompts, judgements)
        for group in GROUPS:
            entry[group] = asked(folder, constraints[group], "dev", settings.seed)["all"]
        table[name] = entry
    return table


def section(result: dict) -> Section:
    """Every variant in a row."""
    default, twice = list(result.values())[:2]
    rows = []
    for name, entry in result.items():
        row = [name, f"{entry['dev_loss']:.3f}"]
        for what in ("helpfulness", "safety", *GROUPS):
            row.append(number(entry[what]))
        rows.append([*row, f"{entry['cpu_seconds']:.0f}"])
    columns = [
        "",
        "held-out loss",
        "helpfulness",
        "safety",
        "one unseen word",
        "two",
        "CPU seconds",
    ]
    two_words = [entry["two, unseen"][0] for entry in result.values()]
    return Section(
        "Is SFT as strong as its budget allows?",
        [
            (
                "It is as strong as it gets at equal cost, as far as one seed can tell; twice the"
                f" passes give helpfulness {number(twice['helpfulness'])} instead of"
                f" {number(default['helpfulness'])}, for {twice['cpu_seconds']:.0f} instead of"
                f" {default['cpu_seconds']:.0f} CPU seconds."
            ),
            Table(
                "SFT at other settings, all else equal; the first row is the default.",
                columns,
                rows,
                "One tuning seed, dev prompts, temperature 1. Brackets are 95 % intervals over"
                " items of these very models: they say nothing of what another seed would give.",
            ),
            (
                "The columns of unseen words are what Ghost Attention will need: single questions"
                ' under instructions such as "Begin every answer with the word Kogo.", with words'
                " that training never had, one of them or two at once; the share of answers that"
                " keep to them. One word is copied under each setting here. (In an earlier trial"
                " some seeds never learned it at the highest learning rate, hence the default.)"
                " Whether two at once are kept apart is a matter of luck: it goes from"
                f" {min(two_words):.2f} to {max(two_words):.2f} between settings, and seeds of one"
                " setting differ, too (see the next section), so a low number there says nothing"
                " against a setting."
            ),
        ],
    )


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    result = results.load_seed("sft_budget", settings.seed, settings)
    if result is None:
        train(settings)
        result = measure(settings)
        results.save_seed("sft_budget", settings.seed, result, settings)
    results.finish("sft_budget", result, settings, section)


if __name__ == "__main__":
    run(main)
