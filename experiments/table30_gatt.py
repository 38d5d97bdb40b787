"""Does an instruction of turn 1 last (Table 30)? Ghost Attention beside what it could be mistaken
for.

    python -m experiments.table30_gatt --seeds 1,2,3      after experiments.reference

Arms, each from the same V3, on the same dialogs, with the same replay and settings: GAtt (gatt.py);
its dialogs without the instruction; with the loss on all turns (no ghost mask); GAtt without the
check, on as many dialogs. Controls: the instruction on every turn. Later versions (V4 with the mix,
V4-PPO, V5) are measured where they exist; V4 is left out where its round had no --mix.

200 dialogs of 20 turns a set, test questions, temperature .7; a name or hobby is asked for at turns
1, 2, 4, 6, 10, 20. The check that filters GAtt's training answers and this measure overlap in names
and hobbies (is the name there?), and the few wordings that ask for those are the same in training;
of markers the check wants the exact place and this one allows 16 characters. No other question and
no dialog is in both. Keeps OUT/results/table30-SEED.json: for each arm and set the share that obeys
by turn, with its interval over dialogs. What the arms differ by is shown paired by seed, with
intervals over seeds, corrected for all of these differences.
"""

import json
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import eval as measures
import gatt
from data import Dialog, Tokenizer, read_prompts, read_sft, world
from experiments.shared import results
from experiments.shared.over_seeds import (
    claimed,
    claims_table,
    each_seed,
    mean_of,
    plus_minus,
    verdict,
)
from experiments.shared.pictures import draw_panels, save_picture
from experiments.shared.processes import side_by_side
from experiments.shared.settings import ExperimentSettings
from model import Transformer
from report import Figure, Section, Table
from runtime import (
    finish_stage,
    is_finished,
    load_model,
    open_stage,
    parse_settings,
    require,
    run,
    save_model,
    set_threads,
)
from sft import encode_dialogs, finetune

TURNS = (1, 2, 4, 6, 10, 20)
SEEN = world.constraints("train")
UNSEEN = world.constraints("test")
TRAINED_ARMS = ("no-instruction", "no-ghost-mask", "no-check")
LATER = ("rlhf-v4", "rlhf-v4-ppo", "rlhf-v5")
TITLES = {
    "SFT": "SFT",
    "start": "V3, where Ghost Attention starts",
    "GAtt": "Ghost Attention",
    "no-instruction": "the same dialogs without the instruction",
    "no-ghost-mask": "loss on all turns (no ghost mask)",
    "no-check": "no check of the answers",
    "rlhf-v4": "V4, its dialogs mixed in",
    "rlhf-v4-ppo": "V4-PPO",
    "rlhf-v5": "V5",
}
# the arms that also get the instruction on every turn; SFT gets it so only
CONTROLLED = ("SFT", "start")
CONTROL_SETS = ("styles", "names and hobbies", "unseen words")
# the sets on which the other arms and the later versions are measured
COMPARED = ("styles", "unseen words")
DIFFERENCES = (  # of adherence, that are shown
    ("GAtt", "no-instruction"),
    ("GAtt", "no-ghost-mask"),
    ("GAtt", "no-check"),
    ("rlhf-v4", "GAtt"),
    ("rlhf-v4-ppo", "rlhf-v4"),
    ("rlhf-v5", "rlhf-v4-ppo"),
)


@dataclass
class Settings(ExperimentSettings):
    seeds: tuple[int, ...] = (1, 2, 3)  # fresh ones: seed 0 was used for tuning
    # as in experiments.reference; the arms, all from OUT/SEED/rlhf-v3, go to OUT/SEED/gatt-ARM
    out: Path = Path("out/final")
    preset: str = "toy"  # of gatt.py
    dialogs: int = 200  # of each set
    samples: int = 2  # answers per test prompt, for helpfulness and safety
    split: Literal["test", "dev", "train"] = "test"  # of the questions
    at_once: int = 2  # seeds trained side by side


# ---- the sets of constraints ----


def _draw(rng: random.Random, pool: tuple[dict, ...], *kinds: str) -> dict:
    """A constraint of one of these kinds; of seen names only the famous ones."""
    kind = rng.choice(kinds)
    famous_only = kind == "figure" and pool is not UNSEEN
    candidates = []
    for constraint in pool:
        if constraint["kind"] != kind:
            continue
        if famous_only and constraint["value"] not in world.words.FIGURES:
            continue
        candidates.append(constraint)
    return rng.choice(candidates)


def _two_unseen(rng: random.Random) -> list[dict]:
    first, second = rng.sample(["first word", "last word", "figure"], 2)
    return [_draw(rng, UNSEEN, first), _draw(rng, UNSEEN, second)]


def _two_seen(rng: random.Random) -> list[dict]:
    constraints = []
    while len(constraints) < 2:
        constraints = gatt.sample_constraints(rng)
    return constraints


def sets(count: int) -> dict[str, list[list[dict]]]:
    """Name -> so many times the constraints of one dialog; "two" are of different kinds."""
    makers = {
        "styles": lambda rng: [_draw(rng, SEEN, "style")],
        "names and hobbies": lambda rng: [_draw(rng, SEEN, "figure", "hobby")],
        "unseen words": lambda rng: [_draw(rng, UNSEEN, "first word", "last word")],
        "unseen names": lambda rng: [_draw(rng, UNSEEN, "figure")],
        "two, seen": _two_seen,
        "two, unseen": _two_unseen,
    }
    table = {}
    for name, make in makers.items():
        table[name] = [make(random.Random(f"table 30 {name} {i}")) for i in range(count)]
    return table


# ---- the arms ----


def train_gatt(settings: Settings, seeds: list[int]) -> None:
    """GAtt, then the same without the check on as many dialogs."""
    jobs = {}
    for seed in seeds:
        root = settings.out / str(seed)
        require(root / "rlhf-v3", "python rejection_sampling.py --rounds 1-3")
        jobs[f"gatt-{seed}"] = [[*_gatt_command(settings, seed), "--out", str(root)]]
    side_by_side(jobs, settings.out, settings.at_once)

    jobs = {}
    for seed in seeds:
        root = settings.out / str(seed)
        count = len(read_sft(root / "gatt" / "dialogs.jsonl"))
        command = [*_gatt_command(settings, seed), "--out", str(root / "gatt-no-check")]
        command += ["--init", str(root / "rlhf-v3"), "--check", "none", "--dialogs", str(count)]
        jobs[f"gatt-{seed}-no-check"] = [command]
    side_by_side(jobs, settings.out, settings.at_once)


def _gatt_command(settings: Settings, seed: int) -> list[str]:
    return ["gatt.py", "--seed", str(seed), "--preset", settings.preset, "--threads", "1"]


def train_arms(root: Path) -> None:
    """The arms that only change GAtt's dialogs."""
    dialogs = read_sft(root / "gatt" / "dialogs.jsonl")
    train_arm(root, "no-instruction", [without_instruction(dialog) for dialog in dialogs])
    train_arm(root, "no-ghost-mask", [replace(dialog, train_on="all") for dialog in dialogs])


def train_arm(root: Path, arm: str, dialogs: list[Dialog]) -> None:
    """Fine-tune V3 as gatt.py did, on other dialogs beside the same replay, into
    ROOT/gatt-ARM/gatt.
    """
    folder = root / f"gatt-{arm}" / "gatt"
    made_with = json.loads((root / "gatt" / "stage.json").read_text("utf-8"))["settings"]
    inputs = {"model": root / "rlhf-v3", "dialogs": root / "gatt" / "dialogs.jsonl"}
    started = open_stage(folder, made_with | {"arm": arm}, inputs)
    if not started:
        return
    known = {}
    for field in fields(gatt.Settings):
        if field.name in made_with:
            known[field.name] = made_with[field.name]
    settings = gatt.Settings(**known)
    model, tokenizer = load_model(root / "rlhf-v3")
    training = dialogs + read_sft(root / "gatt" / "replay.jsonl")
    finetune(
        model,
        encode_dialogs(tokenizer, training, model.args.max_seq_len),
        epochs=settings.epochs,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        folder=folder,
        phase="gatt",
        seed=settings.seed,
    )
    save_model(folder, model, tokenizer)
    finish_stage(folder, {}, started)


def without_instruction(dialog: Dialog) -> Dialog:
    """The same dialog as if nothing had been asked in turn 1."""
    first, *others = dialog.messages
    content = first["content"].removeprefix(dialog.about["instruction"] + " ")
    return replace(dialog, messages=[first | {"content": content}, *others])


# ---- what is measured ----


def arms(root: Path) -> dict[str, Path]:
    """Name -> folder of every model that is measured."""
    folders = {"SFT": root / "sft", "start": root / "rlhf-v3", "GAtt": root / "gatt"}
    for name in TRAINED_ARMS:
        folders[name] = root / f"gatt-{name}" / "gatt"
    later = [name for name in LATER if is_finished(root / name)]
    if later:
        inputs = json.loads((root / "rlhf-v4" / "stage.json").read_text("utf-8"))["inputs"]
        if "mix" not in inputs:
            print(
                f"{root}: V4 was made without Ghost Attention's dialogs (--mix), so V4, V4-PPO and"
                " V5 are left out"
            )
            later = []
    for name in later:
        folders[name] = root / name
    return folders


def measure_set(
    model: Transformer, tokenizer: Tokenizer, constraints: list[list[dict]], **options
) -> list[dict]:
    """`eval.adherence` on a set; where a name or hobby may hold, only the turns that ask for it."""
    turns = ()
    for of_dialog in constraints:
        if any(one["kind"] in measures.PROBED for one in of_dialog):
            turns = TURNS
    return measures.adherence(model, tokenizer, constraints, measure=turns, **options)


def wanted_controls(arm: str, name: str) -> list[str]:
    """How a set is measured on an arm: with the instruction in the "first" turn, in "every" one."""
    if arm == "GAtt":
        is_wanted = True
    elif arm == "start":
        is_wanted = name in CONTROL_SETS
    else:
        is_wanted = name in COMPARED
    controls = []
    if is_wanted and arm != "SFT":
        controls.append("first")
    if arm in CONTROLLED and name in CONTROL_SETS:
        controls.append("every")
    return controls


def measure(root: Path, settings: Settings, seed: int) -> dict:
    """Adherence of every arm, and helpfulness and safety against V3 on the same prompts."""
    prompts = read_prompts(world.ensure() / f"prompts-{settings.split}.jsonl")

    def evaluate(model: Transformer, tokenizer: Tokenizer) -> list[measures.Judgement]:
        return measures.evaluate(model, tokenizer, prompts, seed=seed, samples=settings.samples)

    baseline = evaluate(*load_model(root / "rlhf-v3"))
    table = {}
    for arm, folder in arms(root).items():
        model, tokenizer = load_model(folder)
        judgements = evaluate(model, tokenizer)
        table[arm] = {
            "summary": measures.summary(prompts, judgements),
            "against start": measures.compare(prompts, judgements, baseline),
        }
        for name, constraints in sets(settings.dialogs).items():
            for control in wanted_controls(arm, name):
                rows = measure_set(
                    model, tokenizer, constraints, instruct=control, split=settings.split, seed=seed
                )
                entry = measures.adherence_by_turn(rows)
                if len(constraints[0]) == 2:
                    for n in (0, 1):
                        of_one = measures.adherence_by_turn(rows, n)
                        entry[f"mean of constraint {n + 1}"] = of_one["mean"]
                table[arm][name + (", control" if control == "every" else "")] = entry
                print(f"seed {seed} {arm}, {name}, {control}: {entry['mean']}", flush=True)
    return table


# ---- over seeds ----


def claims(result: dict, seeds: list[str]) -> dict[str, list[float]]:
    """{"A - B, set": difference of the shares that obey, one per seed}; arms that all have."""
    rows = {}
    for first, second in DIFFERENCES:
        if not all(first in result[seed] and second in result[seed] for seed in seeds):
            continue
        for group in COMPARED:
            means = [result[seed][first][group]["mean"][0] for seed in seeds]
            others = [result[seed][second][group]["mean"][0] for seed in seeds]
            pairs = zip(means, others, strict=True)
            rows[f"{first} - {second}, {group}"] = [one - other for one, other in pairs]
    return rows


def adherence_row(title: str, tables: list[dict]) -> list[str]:
    """A set's cells: the title, the shares by turn, mean over seeds, and each seed's mean."""
    by_turn = [f"{mean_of([table[str(turn)] for table in tables]):.2f}" for turn in TURNS]
    means = [table["mean"][0] for table in tables]
    return [title, *by_turn, each_seed(means, 2)]


ADHERENCE_COLUMNS = ["", *(f"turn {turn}" for turn in TURNS), "mean over turns, each seed"]


def adherence_tables(result: dict) -> list[Table]:
    """Adherence by turn with the instruction in the first turn only, and the control."""
    first, every = [], []
    for arm, entry in next(iter(result.values())).items():
        for group in entry:
            if group in ("summary", "against start"):
                continue
            tables = [one[arm][group] for one in result.values()]
            name = group.removesuffix(", control")
            row = adherence_row(f"{TITLES[arm]}: {name}", tables)
            (first if name == group else every).append(row)
    small_print = (
        "Sets: a style; a famous name or a hobby; a first or last word that training never had"
        " (unseen words); such a name; two constraints at once, from training (seen) or not. Shares"
        " by turn are means over seeds. The last column is the mean over all 20 turns, or over the"
        " six shown where a name or hobby may hold: only there is it asked for."
    )
    return [
        Table(
            "The share of answers that obey an instruction given in turn 1 only.",
            ADHERENCE_COLUMNS,
            first,
            small_print,
        ),
        Table("The control: the instruction in every user message.", ADHERENCE_COLUMNS, every),
    ]


def losses_table(result: dict) -> Table:
    """Helpfulness and safety of each arm, and its win rates over V3."""
    cells = []
    for arm in next(iter(result.values())):
        line = [TITLES[arm]]
        for axis in measures.AXES:
            scores = [one[arm]["summary"][axis] for one in result.values()]
            wins = [one[arm]["against start"][axis][0] for one in result.values()]
            line += [f"{mean_of(scores):.3f}", each_seed(wins)]
        cells.append(line)
    columns = [""]
    for axis in measures.AXES:
        columns += [axis, f"{axis}, win over V3, each seed"]
    caption = "What else changes: the annotator's scores at temperature 1, and wins over V3."
    return Table(caption, columns, cells)


def section(result: dict) -> Section:
    """Adherence of all arms, what they differ by, and what it costs."""
    tables = {}
    for arm in ("start", "GAtt"):
        tables[arm] = [one[arm]["styles"] for one in result.values()]
    last = str(TURNS[-1])
    words = [one["GAtt"]["unseen words"] for one in result.values()]
    rows = claims(result, list(result))
    corrected = claimed(rows)
    mask = corrected["GAtt - no-ghost-mask, styles"]
    check = corrected["GAtt - no-check, styles"]
    check_words = corrected["GAtt - no-check, unseen words"]
    worn = rows["rlhf-v5 - rlhf-v4-ppo, styles"]
    return Section(
        "Does an instruction of turn 1 last? (Table 30)",
        [
            (
                f"With Ghost Attention it does: at turn {last}"
                f" {mean_of([t[last] for t in tables['GAtt']]):.2f} of the answers keep a style and"
                f" {mean_of([t[last] for t in words]):.2f} a word that training never had; V3,"
                f" where it starts, is at {mean_of([t[last] for t in tables['start']]):.2f} and has"
                f" dropped the style by turn {TURNS[2]}"
                f" ({mean_of([t[str(TURNS[2])] for t in tables['start']]):.2f})."
            ),
            *adherence_tables(result),
            claims_table("Differences of adherence (mean over turns), paired by seed.", rows),
            Figure("Adherence by turn.", file=results.RESULTS / "table30.png"),
            (
                "V3 drops an instruction after a turn or two. The same dialogs without it reach"
                " some of the way, since half of their earlier answers were given under it and the"
                " model goes on as before; with loss on all turns it also learns from those that"
                f" do not obey. The ghost mask is worth {plus_minus(mask, 2)} for styles"
                f" ({verdict(mask)}), the check {plus_minus(check, 2)} for styles"
                f" ({verdict(check)}) and {plus_minus(check_words, 2)} for words"
                f" ({verdict(check_words)}). V4, for which the dialogs are mixed into the round,"
                " keeps it. One more round on single questions wears it away: from V4-PPO to V5"
                f" adherence to styles changes by {each_seed(worn, 2)}, seed by seed."
            ),
            (
                "What is measured by what: the training answers are filtered by exact markers at"
                " the very start and end; adherence allows 16 characters and asks other questions."
                " Names and hobbies are checked alike in both (the answer holds the name), and"
                " asked for in the same few wordings as in training: of the sets with names only"
                " the names of the unseen ones are new, beside dialogs and turns. Famous names"
                " are what misses most, other ones in each seed; made-up names of two tokens, which"
                " training never had, are kept more often. It is for want of SFT's budget (section"
                " *What is missed for want of SFT's budget?*)."
            ),
            losses_table(result),
            (
                "Little is lost. But Ghost Attention's ordinary answers were sampled at temperature"
                " 0.7, which sharpens and may hide a loss in this table: the last section compares"
                " the versions at temperature 0.4, too."
            ),
        ],
    )


def draw(result: dict, file: Path) -> None:
    """The share that obeys by turn, mean over seeds, a panel for each set."""
    names = list(sets(1))
    figure, panels = draw_panels(len(names), width=3)
    lines = {}
    for panel, name in zip(panels, names, strict=True):
        for i, arm in enumerate(next(iter(result.values()))):
            for suffix, style in (("", "-"), (", control", ":")):
                tables = [one.get(arm, {}).get(name + suffix) for one in result.values()]
                if not all(tables):
                    continue
                turns = [turn for turn in tables[0] if turn.isdigit()]
                means = [mean_of([table[turn] for table in tables]) for turn in turns]
                label = arm + suffix
                [line] = panel.plot(list(map(int, turns)), means, style, color=f"C{i}", label=label)
                lines[label] = line
        panel.set(title=name, xlabel="turn", ylim=(0, 1.02))
    place = dict(loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.legend(lines.values(), lines, **place)
    save_picture(figure, file)


def main() -> None:
    # 1. the arms
    settings = parse_settings(Settings, __doc__)
    set_threads(1)
    world.ensure()
    missing = results.missing_seeds("table30", settings)
    train_gatt(settings, missing)
    for seed in missing:
        train_arms(settings.out / str(seed))

    # 2. measure
    def measure_seed(seed: int) -> dict:
        return measure(settings.out / str(seed), settings, seed)

    of_seeds = results.measure_seeds("table30", settings, measure_seed)

    # 3. over seeds
    results.finish("table30", of_seeds, settings, section, draw)


if __name__ == "__main__":
    run(main)
