"""Does obeying survive RLHF (§3.3)? Constrained dialogs in the rounds and among PPO's prompts.

    python -m experiments.constrained_prompts --seeds 1,2,3          after experiments.reference

The reward models know nothing of instructions that hold throughout; rounds 1 to 3 and 5 of the
default pipeline see single questions only, which wears obeying away. Each arm stands beside the
same version of the default pipeline:

    V3 by check      Before each of the rounds 1 to 3, 250 dialogs are drawn with an instruction in
                     every user message. Those whose last question is unsafe are dropped: refusals
                     would be learned from few. The newest policy answers the other last questions,
                     each alone, 8 times; of the answers that pass Ghost Attention's check the one
                     with the highest reward joins the fine-tuning set. Then Ghost Attention from
                     that V3.
    V4-PPO constrained, V5 constrained
                     From the default V4 and V4-PPO: some prompts are Ghost Attention's dialogs
                     (instruction in turn 1 only), sampled, judged and learned from like all others,
                     by reward alone: one in five for V5, one in twenty for PPO (at one in five an
                     iteration took several times as long). This V5 keeps the best of its own
                     answers only (--pool last), since earlier rounds answered other prompts; "V5
                     last" does so without such dialogs.
    V5 mix           V5 with Ghost Attention's dialogs in its fine-tuning set, as V4 has them.

A file of prompts also means that the temperature and PPO's early stop look at training prompts
instead of dev ones. Fresh preferences are collected on the whole file: 3 % of V5's, 5 % of PPO's
are constrained (the annotator passes over markers and wants the right name or hobby). Training is
resumable. Keeps OUT/results/constrained_prompts-SEED.json: for each model adherence by turn,
helpfulness and safety on test prompts, and win rates over the default pipeline's model. These are
shown with intervals over seeds, corrected for the number of arms and axes.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import eval as measures
import rejection_sampling
from data import Dialog, InputError, Prompt, read_prompts, read_sft, world, write_records
from experiments.shared import results
from experiments.shared.best_of_n import reward_models_of
from experiments.shared.over_seeds import claimed, claims_table, count_significant, mean_of
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from experiments.table30_gatt import ADHERENCE_COLUMNS, CONTROL_SETS, TURNS, adherence_row, sets
from gatt import GhostDialog, instruct, keep_answers, sampling_prompt
from report import Section, Table
from runtime import (
    fingerprint,
    is_finished,
    load_model,
    parse_settings,
    require,
    run,
    sample_answers,
    set_threads,
)

SINGLE = 700  # prompts of a round
CONSTRAINED = 175  # constrained ones beside them
PPO_CONSTRAINED = 316  # constrained ones beside PPO's 6,000
ORDINARY = ("sft", "reward-helpfulness", "reward-safety")
ROUNDS = ("rlhf-v1", "rlhf-v2", "rlhf-v3", "rlhf-v4")
BASELINES = {
    "V3 by check": "V3",
    "GAtt on V3 by check": "GAtt",
    "V4-PPO constrained": "V4-PPO",
    "V5 last": "V5",
    "V5 constrained": "V5 last",
    "V5 mix": "V5",
}


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # whose whole pipeline is in OUT/SEED
    out: Path = Path("out/final")  # as in experiments.reference; arms go to OUT/SEED-constrained
    dialogs: int = 64  # of each set, for adherence
    samples: int = 4  # answers per test prompt
    split: Literal["test", "dev", "train"] = "test"  # of questions and prompts
    at_once: int = 2  # seeds trained side by side
    train_rounds: bool = False  # make "V3 by check" of these seeds and stop: a part of the whole


def folders_of(settings: Settings, seed: int) -> tuple[Path, Path]:
    """A seed's default pipeline, and where its arms go."""
    return settings.out / str(seed), settings.out / f"{seed}-constrained"


# ---- constrained dialogs ----


def constrained_dialog(rng: random.Random, turns: int) -> GhostDialog:
    """A dialog of so many turns under an instruction, the last question open.

    The earlier answers are demonstrations that obey. A name or hobby that holds is asked for in
    half of the turns.
    """
    constraints = world.draw_constraints(rng)
    hidden = [one for one in constraints if one["kind"] in measures.PROBED]
    messages = []
    for turn in range(turns):
        probe = None
        if hidden and rng.random() < 0.5:
            probe = rng.choice(hidden)
        prompt = world.under(measures.ask_about(rng, "train", probe), constraints)
        messages += prompt.messages
        if turn < turns - 1:
            # other writers get names and hobbies wrong
            writer = "good" if prompt.family in world.PROBES else None
            answer = world.obey(world.write_answer(rng, prompt, writer), constraints)
            messages.append(world.assistant(answer))
    return GhostDialog(
        messages=messages,
        instruction=world.instruction(rng, constraints),
        constraints=constraints,
        is_safety=prompt.is_safety,
        prompt=prompt,
    )


def constrained_dialogs(count: int, key: str) -> list[GhostDialog]:
    """Dialogs of 1 to 20 turns, short ones more often."""
    rng = random.Random(f"constrained {key}")
    return [constrained_dialog(rng, 1 + int(20 * rng.random() ** 2)) for _ in range(count)]


def ghost_prompts(path: Path) -> list[Prompt]:
    """Ghost Attention's dialogs as prompts: the instruction in turn 1 only, the last question open.

    Raises:
        InputError: a dialog does not say what it asks for.
    """
    prompts = []
    for dialog in read_sft(path):
        for name in ("family", "item", "kind", "constraints"):
            if name not in dialog.about:
                raise InputError(
                    f"{dialog.where}: field '{name}' is missing, as an older gatt.py wrote it; run"
                    " it again"
                )
        prompts.append(
            Prompt(
                messages=dialog.messages[:-1],
                is_safety=dialog.is_safety,
                family=dialog.about["family"],
                item=dialog.about["item"],
                kind=dialog.about["kind"],
                constraints=tuple(dialog.about["constraints"]),
            )
        )
    return prompts


def write_prompts(root: Path, made: Path, seed: int) -> None:
    """MADE/v5.jsonl and ppo.jsonl: the world's training prompts and constrained ones.

    V5 samples answers to the first SINGLE + CONSTRAINED; the first SINGLE are those of the default
    pipeline.
    """
    ordinary = read_prompts(world.FOLDER / "prompts-train.jsonl")
    ghosts = ghost_prompts(root / "gatt" / "dialogs.jsonl")
    random.Random(seed).shuffle(ghosts)
    made.mkdir(parents=True, exist_ok=True)
    for_v5 = ordinary[:SINGLE] + ghosts[:CONSTRAINED] + ordinary[SINGLE:]
    write_records(made / "v5.jsonl", for_v5)
    write_records(made / "ppo.jsonl", ordinary + ghosts[:PPO_CONSTRAINED])


# ---- the arms ----


def train_rounds(folder: Path, seed: int, dialogs: int = 250) -> None:
    """ "V3 by check": before each round, the newest policy's answers to new dialogs, each to its
    last question alone.
    """
    names = ("sft", *ROUNDS[:3])
    for version in (1, 2, 3):
        mix = folder / f"mix-{version}.jsonl"
        if not is_finished(folder / f"rlhf-v{version}"):
            drawn = constrained_dialogs(dialogs, f"mix {seed} {version}")
            harmless = [dialog for dialog in drawn if not dialog.is_safety]
            newest = folder / names[version - 1]
            rounds = list(names[1:version])
            write_records(mix, obeying_answers(folder, newest, rounds, harmless, seed, version))
        arguments = ["--rounds", str(version), "--mix", str(mix), "--out", str(folder)]
        rejection_sampling.main([*arguments, "--seed", str(seed), "--threads", "1"])


def obeying_answers(
    folder: Path,
    newest: Path,
    rounds: list[str],
    dialogs: list[GhostDialog],
    seed: int,
    version: int,
) -> list[Dialog]:
    """The dialogs with the newest policy's best answer that passes the check, where there is one;
    the loss is on that answer.

    rounds: the rounds so far, whose newest reward models choose.
    """
    model, tokenizer = load_model(newest)
    prompts = [sampling_prompt(dialog, "question") for dialog in dialogs]
    answers = sample_answers(
        model, tokenizer, prompts, key=(seed, "constrained", version), samples=8, temperature=0.8
    )
    answers = [replace(answer, tokenizer=tokenizer.fingerprint) for answer in answers]
    reward_models = reward_models_of(folder, rounds)
    kept = keep_answers(dialogs, answers, "toy", reward_models, prompts)
    mixed = []
    for i, answer in kept.items():
        messages = instruct(dialogs[i].messages, dialogs[i].instruction)
        mixed.append(
            Dialog(
                messages=[*messages, world.assistant(answer.text)],
                train_on="last",
                answer_ids=answer.ids,
                tokenizer=answer.tokenizer,
            )
        )
    return mixed


def link(root: Path, folder: Path, *names: str) -> Path:
    """FOLDER with links to stages of ROOT."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).symlink_to((root / name).resolve())
    return folder


def commands(root: Path, made: Path, settings: Settings, seed: int) -> list[list[str]]:
    """What trains one seed's arms, in order."""
    by_check = link(root, made / "by-check", *ORDINARY)
    after = link(root, made / "after", *ORDINARY, *ROUNDS)
    v5 = link(root, made / "v5", *ORDINARY, *ROUNDS, "rlhf-v4-ppo")
    shared = ["--seed", str(seed), "--threads", "1", "--out"]
    itself = ["-m", "experiments.constrained_prompts", "--train-rounds", "--seeds", str(seed)]
    fifth = ["rejection_sampling.py", "--rounds", "5", "--init", str(v5 / "rlhf-v4-ppo")]
    fifth += [*shared, str(v5), "--name"]
    mix = ["--mix", str(root / "gatt" / "dialogs.jsonl"), "--batch-tokens", "1500"]
    prompts = ["--prompts", str(made / "v5.jsonl"), "--max-prompts", str(SINGLE + CONSTRAINED)]
    return [
        [*itself, "--out", str(settings.out)],
        ["gatt.py", *shared, str(by_check)],
        ["ppo.py", "--prompts", str(made / "ppo.jsonl"), *shared, str(after)],
        [*fifth, "rlhf-v5-mix", *mix],
        [*fifth, "rlhf-v5-last", "--pool", "last"],
        [*fifth, "rlhf-v5-constrained", "--pool", "last", *prompts],
    ]


def check_mix(root: Path) -> None:
    """InputError where the pipeline's V4 was made without Ghost Attention's dialogs."""
    dialogs = root / "gatt" / "dialogs.jsonl"
    inputs = json.loads((root / "rlhf-v4" / "stage.json").read_text("utf-8"))["inputs"]
    if inputs.get("mix") != fingerprint(dialogs):
        raise InputError(
            f"{root / 'rlhf-v4'} was made without {dialogs}; experiments.reference makes it with"
            " them"
        )


# ---- what is measured ----


def measured(root: Path, made: Path) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Name -> (folder, where the instruction stands when adherence is measured)."""
    both, first = ("first", "every"), ("first",)
    return {
        "SFT": (root / "sft", ("every",)),
        "V3": (root / "rlhf-v3", both),
        "GAtt": (root / "gatt", first),
        "V4": (root / "rlhf-v4", first),
        "V4-PPO": (root / "rlhf-v4-ppo", first),
        "V5": (root / "rlhf-v5", first),
        "V3 by check": (made / "by-check" / "rlhf-v3", both),
        "GAtt on V3 by check": (made / "by-check" / "gatt", first),
        "V4-PPO constrained": (made / "after" / "rlhf-v4-ppo", first),
        "V5 last": (made / "v5" / "rlhf-v5-last", first),
        "V5 constrained": (made / "v5" / "rlhf-v5-constrained", first),
        "V5 mix": (made / "v5" / "rlhf-v5-mix", first),
    }


def measure(settings: Settings, seed: int) -> dict:
    """Adherence, helpfulness and safety of every model, and win rates over that of the default
    pipeline.
    """
    root, made = folders_of(settings, seed)
    prompts = read_prompts(world.ensure() / f"prompts-{settings.split}.jsonl")
    table = {}
    judged = {}
    for name, (folder, controls) in measured(root, made).items():
        if not is_finished(folder):
            continue
        model, tokenizer = load_model(folder)
        judged[name] = measures.evaluate(
            model, tokenizer, prompts, seed=seed, samples=settings.samples
        )
        table[name] = {"summary": measures.summary(prompts, judged[name])}
        if name in BASELINES:
            baseline = judged[BASELINES[name]]
            table[name]["against default"] = measures.compare(prompts, judged[name], baseline)
        for group in CONTROL_SETS:
            for control in controls:
                rows = measures.adherence(
                    model,
                    tokenizer,
                    sets(settings.dialogs)[group],
                    instruct=control,
                    split=settings.split,
                    seed=seed,
                    measure=TURNS,
                )
                entry = measures.adherence_by_turn(rows)
                table[name][f"{group}, {control}"] = entry
                print(f"seed {seed} {name}, {group}, {control}: {entry['mean']}", flush=True)
    return table


# ---- over seeds ----


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"arm over its baseline, axis": win rates, one per seed}."""
    rows = {}
    for name, baseline in BASELINES.items():
        tables = [result[seed][name]["against default"] for seed in seeds if name in result[seed]]
        if tables:
            for axis in measures.AXES:
                rows[f"{name} over {baseline}, {axis}"] = [table[axis][0] for table in tables]
    return rows


def adherence_table(result: dict) -> Table:
    """Adherence of every model by set, mean over seeds by turn, and each seed's mean."""
    cells = []
    for name, entry in next(iter(result.values())).items():
        for key in entry:
            group, _, control = key.rpartition(", ")
            if group in CONTROL_SETS:
                tables = [one[name][key] for one in result.values() if name in one]
                title = f"{name}: {group}, {control} turn"
                cells.append(adherence_row(title, tables))
    caption = "The share of answers that obey, with the instruction in the first or in every turn."
    return Table(caption, ADHERENCE_COLUMNS, cells, "The sets are those of Table 30.")


def scores_table(result: dict) -> Table:
    """Helpfulness and safety of every model."""
    cells = []
    for name in next(iter(result.values())):
        line = [name]
        for axis in measures.AXES:
            scores = [one[name]["summary"][axis][0] for one in result.values() if name in one]
            line.append(str(measures.interval(scores)))
        cells.append(line)
    caption = "The annotator's scores at temperature 1."
    small_print = "Brackets are 95 % intervals over seeds, each alone."
    return Table(caption, ["", *measures.AXES], cells, small_print)


def section(result: dict) -> Section:
    """Adherence, scores and win rates of every arm."""

    def styles(name: str, control: str) -> float:
        """A model's adherence to styles, the mean over turns and seeds."""
        return mean_of([one[name][f"styles, {control}"]["mean"] for one in result.values()])

    rows = claims(result, list(result))
    corrected = claimed(rows)
    by_check = corrected["V3 by check over V3, helpfulness"].mean
    constrained = corrected["V5 constrained over V5 last, helpfulness"].mean
    mixed = corrected["V5 mix over V5, helpfulness"].mean
    return Section(
        "Does obeying survive RLHF?",
        [
            (
                "Not by itself, but dialogs that a check chose keep it alive: with the instruction"
                f" in every message V3 keeps a style in {styles('V3', 'every'):.2f} of its answers,"
                f" SFT in {styles('SFT', 'every'):.2f}, and V3 by check in"
                f" {styles('V3 by check', 'every'):.2f}; with it in the first message V5 does in"
                f" {styles('V5', 'first'):.2f} and V5 mix in {styles('V5 mix', 'first'):.2f}."
            ),
            (
                "*V3 by check* has dialogs under an instruction in each round's fine-tuning set,"
                " their last answers sampled by the newest policy and kept where Ghost Attention's"
                " check passes. *Constrained* versions have such dialogs among their prompts, one"
                " in twenty for PPO and one in five for V5, chosen by reward alone; *V5 last* is V5"
                " constrained without them. *V5 mix* has Ghost Attention's dialogs in its"
                " fine-tuning set, as V4 has them."
            ),
            adherence_table(result),
            claims_table(
                "Win rates over the same version of the default pipeline: above 0.5 the arm wins.",
                rows,
                f"Significant are {count_significant(corrected, level=0.5)}.",
            ),
            scores_table(result),
            (
                "The reward models know nothing of such instructions, so rounds on single"
                " questions wear obeying away: a part of the forgetting in Table 30 is not about"
                " memory. *V3 by check* stays near SFT, at little cost in helpfulness (it wins"
                f" {by_check:.3f} over V3). Given the instruction once it forgets it within a few"
                " turns just the same: it was never trained to keep one. Ghost Attention on top of"
                " it lasts no better than on the default V3. For PPO, which wears little away by"
                " itself, constrained prompts change nothing; V5 obeys no better for them and wins"
                f" {constrained:.3f} over V5 last. *V5 mix* keeps everything, names included, at"
                f" hardly any cost ({mixed:.3f} over V5). It also has more such dialogs and more"
                " steps than *V5 constrained*, and its answers were sampled with the instruction"
                " before each question: we did not separate these."
            ),
        ],
    )


def main() -> None:
    # 1. the arms
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    if settings.train_rounds:
        for seed in settings.seeds:
            _, made = folders_of(settings, seed)
            train_rounds(made / "by-check", seed)
        return
    jobs = {}
    for seed in results.missing_seeds("constrained_prompts", settings):
        root, made = folders_of(settings, seed)
        require(root / "rlhf-v5", "python -m experiments.reference")
        check_mix(root)
        write_prompts(root, made, seed)
        jobs[f"constrained-{seed}"] = commands(root, made, settings, seed)
    side_by_side(jobs, settings.out, settings.at_once)

    # 2. measure
    def measure_seed(seed: int) -> dict:
        return measure(settings, seed)

    of_seeds = results.measure_seeds("constrained_prompts", settings, measure_seed)

    # 3. over seeds
    results.finish("constrained_prompts", of_seeds, settings, section)


if __name__ == "__main__":
    run(main)
