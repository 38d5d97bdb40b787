"""Is V4 more than SFT with sharper samples? The head-room, and the cheap rivals of rejection
sampling.

    python -m experiments.rivals --seeds 1,2,3        after experiments.seeds

For each seed, on the test prompts (V4 at temperature 1):

    head-room            the annotator's own best of 64 SFT answers, and its score
    SFT at its best T    the temperature with the highest score on dev prompts
    SFT on favourites    SFT trained on, for as many rows as V1 to V4 together, by the first reward
                         models' favourite demonstrations
    best of K from SFT   the first reward models' favourite of K answers

Keeps OUT/results/rivals-SEED.json (intervals over items). V4's win rates are shown with intervals
over seeds, corrected for the number of rivals and axes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import eval as measures
from data import Answer, Dialog, Prompt, Tokenizer, read_prompts, read_sft, world
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    count_significant,
    each_seed,
    in_seeds,
)
from experiments.shared.settings import ExperimentSettings
from model import Transformer
from rejection_sampling import RewardModels, best_of
from rejection_sampling import Settings as RoundSettings
from report import Section, Table
from reward import AXES
from runtime import (
    load_model,
    parse_settings,
    require,
    run,
    sample_answers,
    save_model,
    set_seed,
    set_threads,
)
from sft import encode_dialogs, finetune

HEAD_ROOM = 64  # answers of SFT that the annotator picks from

Judged = list[measures.Judgement]


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose models are in OUT/SEED
    out: Path = Path("out/seeds")  # as in experiments.seeds
    # tried for SFT on dev prompts; 0 is greedy
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    samples: int = 4  # answers per test prompt
    threads: int = 1  # CPU threads


# ---- the rivals ----


def score_of(prompts: list[Prompt], judgements: Judged) -> float:
    """One number for choosing: mean of helpfulness on harmless and safety on unsafe prompts."""
    means = measures.summary(prompts, judgements)
    return (means["helpfulness"].mean + means["safety"].mean) / 2


def best_of_many(
    sft: Transformer, tokenizer: Tokenizer, reward_models: RewardModels, seed: int
) -> dict[str, Judged]:
    """The head-room, and best of K by the first reward models, both from the same answers."""
    prompts = read_prompts(world.FOLDER / "prompts-test.jsonl")
    k = RoundSettings.samples
    many = sample_answers(sft, tokenizer, prompts, key=(seed, "head-room"), samples=HEAD_ROOM)
    judgements = measures.judge(prompts, many)
    owners = [answer.index for answer in many]
    scores = [measures.score_of(prompts[one.index], one) for one in judgements]
    ideal = best_of(torch.tensor(scores), owners)

    numbers = [i for i, answer in enumerate(many) if answer.sample < k]
    first_k = [many[i] for i in numbers]
    rewards = reward_models.scores(prompts, first_k)["reward"]
    picked = best_of(rewards, [answer.index for answer in first_k])
    return {
        f"head-room (annotator's best of {HEAD_ROOM})": [
            judgements[ideal[i]] for i in range(len(prompts))
        ],
        f"best of {k} from SFT": [judgements[numbers[picked[i]]] for i in range(len(prompts))],
    }


def dev_scores(
    sft: Transformer, tokenizer: Tokenizer, temperatures: tuple[float, ...], seed: int
) -> dict[float, float]:
    """SFT's score on dev prompts at each temperature."""
    prompts = read_prompts(world.FOLDER / "prompts-dev.jsonl")
    table = {}
    for temperature in temperatures:
        judgements = measures.evaluate(
            sft, tokenizer, prompts, seed=seed, samples=2, temperature=temperature
        )
        table[temperature] = score_of(prompts, judgements)
    return table


def favourite_demonstrations(reward_models: RewardModels, count: int) -> list[Dialog]:
    """The single-turn demonstrations with the highest reward, unsafe and other prompts in their own
    proportion.
    """
    dialogs = []
    for dialog in read_sft(world.FOLDER / "sft.jsonl"):
        if len(dialog.messages) == 2:
            dialogs.append(dialog)
    prompts = [Prompt(dialog.messages[:1], dialog.is_safety) for dialog in dialogs]
    answers = []
    for i, encoded in enumerate(encode_dialogs(reward_models.tokenizer, dialogs, 2048)):
        prompt_length = sum(not is_answer for is_answer in encoded.loss_mask)
        ids = encoded.ids[prompt_length:]
        answers.append(Answer(i, 0, dialogs[i].messages[1]["content"], ids, 0, 1, "eos", False))
    rewards = reward_models.scores(prompts, answers)["reward"].tolist()

    favourites = []
    for is_safety in (False, True):
        group = [i for i, dialog in enumerate(dialogs) if dialog.is_safety is is_safety]
        group.sort(key=lambda i: -rewards[i])
        share = round(count * len(group) / len(dialogs))
        favourites += [dialogs[i] for i in group[:share]]
    return favourites


def train_on_favourites(root: Path, reward_models: RewardModels, seed: int) -> Path:
    """ROOT/sft-favourites: SFT trained on by them, for as many rows as V1 to V4 together."""
    folder = root / "sft-favourites"
    if (folder / "consolidated.00.pth").exists():
        return folder
    rounds = RoundSettings()
    model, tokenizer = load_model(root / "sft")
    dialogs = favourite_demonstrations(reward_models, 4 * rounds.max_prompts)
    finetune(
        model,
        encode_dialogs(tokenizer, dialogs, model.args.max_seq_len),
        epochs=rounds.epochs,
        batch_tokens=rounds.batch_tokens,
        learning_rate=rounds.learning_rate,
        folder=folder,
        phase="favourites",
        seed=seed,
    )
    save_model(folder, model, tokenizer)
    return folder


def measure(root: Path, settings: Settings, seed: int) -> dict:
    """One seed: SFT's best temperature, and V4 against each rival."""
    prompts = read_prompts(world.ensure() / "prompts-test.jsonl")
    sft, tokenizer = load_model(root / "sft")
    folders = {axis: root / f"reward-{axis}" for axis in AXES}
    reward_models = RewardModels(folders, torch.device("cpu"))
    set_seed(seed)

    # 1. head-room, and best of K by the first reward models
    rivals = best_of_many(sft, tokenizer, reward_models, seed)

    # 2. SFT at its best temperature
    by_temperature = dev_scores(sft, tokenizer, settings.temperatures, seed)
    cool = max(by_temperature, key=by_temperature.get)
    rivals["SFT at its best T"] = measures.evaluate(
        sft, tokenizer, prompts, seed=seed + 1000, samples=settings.samples, temperature=cool
    )

    # 3. SFT trained on by the first reward models' favourite demonstrations
    folder = train_on_favourites(root, reward_models, seed)
    rivals["SFT on favourites"] = measures.evaluate(
        *load_model(folder), prompts, seed=seed, samples=settings.samples
    )

    # 4. V4 against each of them; a rival with one answer to a prompt meets V4's first
    model, tokenizer = load_model(require(root / "rlhf-v4", "python -m experiments.seeds"))
    v4 = measures.evaluate(model, tokenizer, prompts, seed=seed, samples=settings.samples)
    first = v4[:: settings.samples]
    table = {}
    for name, judgements in rivals.items():
        ours = v4 if len(judgements) == len(v4) else first
        wins = measures.compare(prompts, ours, judgements)
        table[name] = {"summary": measures.summary(prompts, judgements), "V4 wins": wins}
        print(f"seed {seed}: V4 against {name}:", *(f"{axis} {wins[axis]}" for axis in AXES))
    return {
        "best temperature of SFT": cool,
        "dev score by temperature": by_temperature,
        "rivals": table,
    }


# ---- over seeds ----


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"rival, axis": V4's win rates over it, one per seed}."""
    rows = {}
    for name in result[seeds[0]]["rivals"]:
        for axis in AXES:
            tables = [result[seed]["rivals"][name]["V4 wins"] for seed in seeds]
            rows[f"{name}, {axis}"] = [table[axis][0] for table in tables]
    return rows


def scores_table(result: dict) -> Table:
    """The rivals' own scores."""
    cells = []
    for name in next(iter(result.values()))["rivals"]:
        line = [name]
        for axis in AXES:
            of_seeds = [one["rivals"][name]["summary"][axis][0] for one in result.values()]
            line.append(f"{measures.interval(of_seeds).mean:.3f}")
        cells.append(line)
    caption = "The annotator's mean scores of the rivals."
    return Table(caption, ["", *AXES], cells)


def section(result: dict) -> Section:
    """V4 against each rival, and the rivals' own scores."""
    rows = claims(result, list(result))
    mean = {name: interval.mean for name, interval in claimed(rows).items()}
    cooled = "SFT at its best T, helpfulness"
    cool = [one["best temperature of SFT"] for one in result.values()]
    head_room = next(name for name in mean if name.startswith("head-room"))
    return Section(
        "Is V4 more than SFT with sharper samples?",
        [
            (
                f"By the annotator's score it is: V4 wins {mean[cooled]:.3f} of the helpfulness"
                " cases against SFT at its own best temperature"
                f" ({in_seeds(rows[cooled], lambda rate: rate > 0.5)} more than half); but against"
                f" the annotator's own best of {HEAD_ROOM} answers of SFT it wins"
                f" {mean[head_room]:.3f}, so there is room left."
            ),
            claims_table(
                "V4's win rates over cheap rivals, all made from SFT: above 0.5 V4 wins.",
                rows,
                f"With {len(result)} seeds {count_significant(claimed(rows), level=0.5)} differ"
                " significantly from 0.5.",
            ),
            scores_table(result),
            (
                "SFT's best temperature (T) was chosen on dev prompts, seed by seed:"
                f" {each_seed(cool, 1)} (0 is greedy: always the likeliest token). *SFT on"
                " favourites* is SFT trained on, for as many steps as the four rounds take, on the"
                " demonstrations that the first reward models like best. *Best of K* needs K"
                " answers for each one that it gives. All this is helpfulness and safety; content"
                " was not looked at here."
            ),
        ],
    )


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    set_threads(settings.threads)

    def measure_seed(seed: int) -> dict:
        return measure(settings.out / str(seed), settings, seed)

    of_seeds = results.measure_seeds("rivals", settings, measure_seed)
    results.finish("rivals", of_seeds, settings, section)


if __name__ == "__main__":
    run(main)
