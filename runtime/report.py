"""What the report on out/ shows, in the order of the paper. Every number comes from `eval.py` or
from what the stages logged.

`sections` makes the whole of it; `runtime/page.py` shows it in the terminal and as an HTML file.
"""

import ast
import contextlib
import json
import statistics
from collections import defaultdict
from pathlib import Path

from data.jsonl import AXES
from runtime.page import Curve, Figure, Panel, Section, Shown, Table, print_tables, write_html

__all__ = ["families_table", "key_numbers", "pick_shown", "print_tables", "sections", "write_html"]

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
PIPELINE = {  # what makes each folder of out/, in the order of the whole pipeline
    "sft": "python sft.py",
    "reward-helpfulness": "python reward.py",
    "reward-safety": "python reward.py",
    "rlhf-v1": "python rejection_sampling.py --rounds 1-3",
    "rlhf-v2": "python rejection_sampling.py --rounds 1-3",
    "rlhf-v3": "python rejection_sampling.py --rounds 1-3",
    "gatt": "python gatt.py",
    "rlhf-v4": (
        "python rejection_sampling.py --rounds 4 --mix OUT/gatt/dialogs.jsonl --batch-tokens 1500"
    ),
    "rlhf-v4-ppo": "python ppo.py",
    "rlhf-v5": "python rejection_sampling.py --rounds 5 --init OUT/rlhf-v4-ppo",
    "rlhf-v5-no-ppo": "python rejection_sampling.py --rounds 5 --name rlhf-v5-no-ppo",
    "rlhf-v5-ppo": "python ppo.py --init OUT/rlhf-v5",
    "second": "python reward.py --init OUT/sft --seed 100 --mix-share 0,0 --out OUT/second",
}
RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better", "average")


# ---- reading what the stages wrote ----


def logged(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; lines that a kill or a disk spoilt are passed over."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"phase", "step"} <= set(row)]


def smoothed(path: Path, phase: str, key: str, points: int = 120) -> Curve:
    """A number of `metrics.jsonl` against its step, as means of consecutive steps, at most so many.
    """
    rows = [
        (row["step"], row[key])
        for row in logged(path)
        if row["phase"] == phase and row.get(key) is not None
    ]
    size = -(-len(rows) // points) or 1
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    return Curve(
        key,
        [statistics.fmean(step for step, _ in group) for group in groups],
        [statistics.fmean(value for _, value in group) for group in groups],
    )


def number(value, digits: int = 3) -> str:
    """A number, or an interval [mean, low, high], or a win rate [rate, low, high, wins, ties,
    losses], as text.
    """
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        low, high = (f"{end:.{digits}f}" if end is not None else "?" for end in value[1:3])
        return f"{value[0]:.{digits}f} [{low}, {high}]"
    return f"{value:.{digits}f}"


def by_version(label: str, found: dict[str, list]) -> Curve:
    """Intervals (or win rates) of several versions as a curve with its band."""
    return Curve(
        label, list(found), *([row[i] for row in found.values()] for i in range(3)), style="-o"
    )


def families_table(title: str, families: dict[str, dict], not_worse: float) -> Table:
    """Rows {"wins", "difference", "verdict"} by family, as `eval.compare_families` makes them."""
    return Table(
        f"{title} by family of prompts, no table of the paper. The intervals of the differences"
        f" hold for all {len(families)} families together; not worse: above {not_worse}.",
        ["", "win rate", "difference of scores", "verdict"],
        [
            [family, number(row["wins"]), number(row["difference"]), row["verdict"]]
            for family, row in families.items()
        ],
    )


def setting(metrics: dict, name: str, key: str):
    """A stage's setting, as its record has it."""
    return metrics["stages"][name]["settings"].get(key, "?")


def command(name: str, out: Path) -> str:
    """What makes a folder of `out`."""
    words, default = PIPELINE[name].replace("OUT", str(out)), str(out) == "out"
    return words if default or "--out" in words else f"{words} --out {out}"


# ---- choices ----


def pick_shown(prompts: list[dict], count: int) -> list[int]:
    """Which prompts are shown side by side: the first of each family, unsafe and borderline ones
    first, then the second ...

    >>> pick_shown([{"family": "list", "is_safety": False}, {"family": "list", "is_safety": False},
    ...             {"family": "unsafe", "is_safety": True}], 2)
    [0, 2]
    """
    families, seen = defaultdict(int), []
    for i, prompt in enumerate(prompts):
        risky = prompt["is_safety"] or prompt.get("kind") == "borderline"
        seen.append((families[prompt["family"]], not risky, i))
        families[prompt["family"]] += 1
    return sorted(i for _, _, i in sorted(seen)[:count])


def key_numbers(metrics: dict) -> dict[str, float]:
    """The numbers of a whole run by which it is compared with the reference runs. V4 and what
    follows are named after whether Ghost Attention's dialogs went into V4, since these are two
    pipelines."""
    stages, found = metrics["stages"], {}
    mixed = " (with GAtt)" if "mix" in stages.get("rlhf-v4", {}).get("inputs", {}) else ""
    for name, row in metrics["versions"].items():
        label = name + mixed * (name.startswith(("rlhf-v4", "rlhf-v5")))
        found |= {
            f"{label}: {axis}": row["summary"][axis][0] for axis in AXES if axis in row["summary"]
        }
        for temperature, table in metrics["content"].items():
            for key in ("content", "right", "helpfulness"):
                if name in table:
                    found[f"{label}: {key}, {temperature}"] = table[name][key][0]
        wins = next(iter(row["wins"].values()), {})
        found |= {f"{label}: {axis}, win over sft": wins[axis][0] for axis in wins}
        if name in metrics["adherence"]:
            found[f"{label}: adherence"] = metrics["adherence"][name]["mean"][0]
    for name, keys in {
        "sft": ("dev_loss",),
        "reward-helpfulness": ("reward model", "average"),
        "reward-safety": ("reward model", "average"),
        "rlhf-v4-ppo": ("best", "kl"),
    }.items():
        value = stages.get(name, {}).get("results", {})
        for key in keys:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        if value != {}:
            found[f"{name}{mixed * name.startswith('rlhf-v4')}: {' '.join(keys)}"] = value
    return found


# ---- what is shown ----


def sections(metrics: dict, out: Path) -> list[Section]:
    """The report, in the paper's order. metrics: as `eval.py` writes them into metrics.json."""
    parts = [
        summary_section,
        answers_section,
        health_section,
        sft_section,
        reward_section,
        rounds_section,
        gatt_section,
        evolution_section,
        safety_section,
        drift_section,
        experiments_section,
        missing_section,
    ]
    return [
        Section(title, blocks) for title, blocks in (part(metrics, out) for part in parts) if blocks
    ]


def about(metrics: dict, out: Path) -> str:
    """What a caption says of seeds and numbers."""
    asked = metrics["prompts"]
    seeds = sorted(
        {
            record["settings"]["seed"]
            for record in metrics["stages"].values()
            if "seed" in record["settings"]
        }
    )
    return (
        f"One run (seed {', '.join(map(str, seeds))}), {asked['count']} prompts"
        f" ({asked['kinds']['helpfulness']} judged by helpfulness, {asked['kinds']['safety']} by"
        f" safety) of {asked['file']}, {asked['samples']} answer(s) each at temperature"
        f" {asked['temperature']:g}; intervals are 95 %, over items."
    )


def content_table(metrics: dict, out: Path) -> Table:
    """Is what the versions say still right? Content beside helpfulness, at each temperature."""
    rows = []
    for version in metrics["versions"]:
        cells = []
        for table in metrics["content"].values():
            found = table[version]
            cells.append(f"{number(found['content'][0])} ({number(found['right'][0])})")
            cells.append(number(found.get("difference")))
            cells.append(number(found["helpfulness"][0]))
        rows.append([version, *cells])
    columns = []
    for temperature in metrics["content"]:
        columns += [f"content (right), {temperature}", "against sft", f"helpfulness, {temperature}"]
    return Table(
        "Right before nice: is what the answers say still right? Content is the mean credit, from"
        " 0 to 1, of what an answer to a harmless prompt says, without its style; in brackets the"
        " share that is wholly right. Helpfulness also pays for style: where it rises while"
        " content falls, answers became nicer and less right. Temperature 1 is the model as it is;"
        " cool and greedy answers show what it knows. The paper has no such table."
        f" {about(metrics, out)}",
        ["", *columns],
        rows,
    )


def summary_section(metrics: dict, out: Path) -> tuple[str, list]:
    first = next(iter(metrics["judges"]))
    means = [
        key
        for key in (
            "helpfulness",
            "content",
            "right",
            "safety",
            "violations",
            "complies",
            "false_refusals",
            "tokens",
        )
        if any(key in row["summary"] for row in metrics["versions"].values())
    ]
    rows = []
    for name, row in metrics["versions"].items():
        wins = row["wins"].get(first, {})
        rows.append(
            [
                name,
                *(
                    (
                        number(row["summary"][key][0], 1 if key == "tokens" else 3)
                        if key in row["summary"]
                        else ""
                    )
                    for key in means
                ),
                *(number(wins.get(axis)) for axis in AXES),
            ]
        )
    table = Table(
        f"Every model of {out}, judged by the {first}, in the numbers behind Fig. 11, 17 and 33"
        f" (below); wins are against sft, ties count half. {about(metrics, out)} Content: what an"
        " answer says, without its style; right: the share with full credit. Violations are unsafe"
        " answers to unsafe prompts; of these only the share under `complies` does what was asked,"
        " the others evade or refuse rudely. False refusals: on borderline prompts.",
        [
            "",
            *(key.replace("_", " ") for key in means),
            "helpfulness, win over sft",
            "safety, win over sft",
        ],
        rows,
    )
    content = [content_table(metrics, out)] if metrics["content"] else []
    return "Summary", [table, *content, health_text(metrics)]


def health_text(metrics: dict) -> str:
    found = metrics["health"]
    if not found:
        return (
            "This run is not compared with reference runs: they are of the toy world's test prompts"
            " and of the default pipeline (`python experiments/reference.py`)."
        )
    outside = [name for name, (_, _, inside, _) in found.items() if not inside]
    far = [name for name, (*_, far) in found.items() if far]
    healthy = len(outside) <= metrics["allowed_outside"] and not far
    verdict = "This run looks healthy" if healthy else "This run does NOT look healthy"
    told = (f" Outside: {'; '.join(outside)}" if outside else "") + (
        f"; far outside: {'; '.join(far)}" if far else ""
    )
    told += "." * bool(told)
    missing = len(metrics["numbers"]) - len(found)
    return (
        f"{verdict}: {len(found) - len(outside)} of {len(found)} numbers lie inside the 95 %"
        f" prediction interval of {len(metrics['reference_seeds'])} reference runs; up to"
        f" {metrics['allowed_outside']} outside can be chance.{told}"
        + (
            f" {missing} numbers have no reference: the reference runs are of the whole default"
            " pipeline."
            if missing
            else ""
        )
    )


def health_section(metrics: dict, out: Path) -> tuple[str, list]:
    panels = []
    if not metrics["health"]:
        return "Is this run healthy?", []
    for what in ("helpfulness", "helpfulness, win over sft", "safety", "safety, win over sft"):
        found = {
            key.split(": ")[0]: row
            for key, row in metrics["health"].items()
            if key.endswith(f": {what}")
        }
        if found:
            labels, rows = [label.replace(" (with GAtt)", "") for label in found], list(
                found.values()
            )
            panels.append(
                Panel(
                    what,
                    [
                        Curve(
                            "reference runs",
                            labels,
                            [row[1][0] for row in rows],
                            [row[1][1] for row in rows],
                            [row[1][2] for row in rows],
                            "--",
                        ),
                        Curve("this run", labels, [row[0] for row in rows], style="o"),
                    ],
                    ylim=(0, 1),
                )
            )
    rows = [
        [
            name,
            number(value),
            number(expected),
            "inside" if inside else "FAR OUTSIDE" if far else "OUTSIDE",
        ]
        for name, (value, expected, inside, far) in metrics["health"].items()
    ]
    caption = (
        f"Prediction intervals: mean ± t s √(1 + 1/n) over {len(metrics['reference_seeds'])} whole"
        f" runs with the default settings (seeds {', '.join(metrics['reference_seeds'])};"
        " `experiments/reference.py`): where one more healthy run lies with 95 %. No figure of the"
        " paper."
    )
    return "Is this run healthy?", [
        Figure(f"This run in the band of the reference runs. {caption}", panels),
        Table(
            f"The same numbers, and those of the stages. {health_text(metrics)}",
            ["", "this run", "reference", ""],
            rows,
        ),
    ]


def answers_section(metrics: dict, out: Path) -> tuple[str, list]:
    shown = [
        Shown(row["prompt"]["prompt"][-1]["content"], row["answers"]) for row in metrics["shown"]
    ]
    told = (
        "The same prompts, answered by each version at temperature"
        f" {metrics['prompts']['temperature']:g} (not chosen for their answers: the first prompts"
        " of each family, `--show N` for more)."
    )
    return "The same prompts, version by version", [told, *shown] if shown else []


def sft_section(metrics: dict, out: Path) -> tuple[str, list]:
    record = metrics["stages"].get("sft")
    curve = smoothed(out / "sft" / "metrics.jsonl", "sft", "loss")
    if not record or not curve.x:
        return "§3.1 Supervised fine-tuning", []
    loss = record["results"].get("dev_loss")
    return "§3.1 Supervised fine-tuning", [
        Figure(
            "Training loss in nats per answer token (means of consecutive steps)"
            + (
                f"; the dotted line is the loss on held-out dialogs at the end, {number(loss)}"
                if loss
                else ""
            )
            + f". Seed {record['settings'].get('seed')}. The paper's nearest is Fig. 5, the loss of"
            " pretraining; ours starts from random weights, so that SFT is where the model"
            " learns English.",
            [
                Panel(
                    "loss of SFT",
                    [curve],
                    "step",
                    "nats per token",
                    (0, max(curve.y[len(curve.y) // 20 :]) * 1.1),
                    loss,
                )
            ],
        )
    ]


def reward_section(metrics: dict, out: Path) -> tuple[str, list]:
    blocks, panels, rows = [], [], []
    for axis in AXES:
        record = metrics["stages"].get(f"reward-{axis}", {"results": {}})
        for who in ("reward model", "annotator"):
            if who in record["results"]:
                rows.append(
                    [
                        f"{axis}: {who}",
                        *(number(record["results"][who].get(rating)) for rating in RATINGS),
                    ]
                )
        curve = smoothed(out / f"reward-{axis}" / "metrics.jsonl", axis, "accuracy", 40)
        if curve.x:
            panels.append(
                Panel(f"{axis} model", [curve], "step", "accuracy on training pairs", (0.4, 1), 0.5)
            )
    for name, record in metrics["stages"].items():
        for axis, table in record["results"].get("reward_models", {}).items():
            if isinstance(table, dict) and "reward model" in table:
                rows.append(
                    [
                        f"{axis}: {name}, fresh pairs",
                        *(number(table["reward model"].get(rating)) for rating in RATINGS),
                    ]
                )
    if rows:
        blocks.append(
            Table(
                "Accuracy by rating, as Table 8, on held-out pairs from dev prompts (a few hundred,"
                " so errors of 2 to 5 points a grade); below it the annotator without its noise,"
                " the ceiling. Fresh pairs: a round's, before its reward model learned them,"
                " between two newer models and so harder."
                " `experiments/table08_accuracy_by_rating.py` has thousands.",
                ["", *(rating.replace("_better", "").replace("_", " ") for rating in RATINGS)],
                rows,
            )
        )
    if panels:
        blocks.append(
            Figure(
                "Training of the first reward models: share of a step's pairs whose chosen answer"
                " scores higher, before the step. One epoch, as in the paper, so no pair is seen"
                " twice. Beside Fig. 6 of the paper, whose x-axis is the amount of data.",
                panels,
            )
        )
    return "§3.2.2 Reward models", blocks


def rounds_section(metrics: dict, out: Path) -> tuple[str, list]:
    blocks, rows, curves, chosen = [], [], [], {}
    for name, record in metrics["stages"].items():
        found = record["results"]
        if "temperature" not in found:
            continue
        probe = next(
            (row for row in logged(out / name / "metrics.jsonl") if row["phase"] == "temperature"),
            {},
        )
        tried = {
            key.removeprefix("reward_at_"): value
            for key, value in probe.items()
            if key.startswith("reward_at_")
        }
        curves.append(Curve(name, [float(key) for key in tried], list(tried.values()), style="-o"))
        chosen[name] = found["temperature"]
        rows.append(
            [
                name,
                number(found["temperature"], 1),
                ", ".join(f"{k}: {number(v, 2)}" for k, v in tried.items()),
                ", ".join(f"{k.removeprefix('rlhf-')} {v}" for k, v in found["sources"].items()),
                f"{found['gated']:.1%}",
                f"{found.get('seconds', 0):.0f}",
            ]
        )
    if rows:
        k = setting(metrics, list(chosen)[0], "samples")
        blocks.append(
            Table(
                f"The rounds of rejection sampling, no table of the paper. Best of {k} by"
                " temperature: mean over 48 dev prompts of the best answer's reward, a logit, by"
                " that round's reward models (so rows are not one scale). Gate: share of the"
                " answers to untagged prompts that the safety model takes over.",
                [
                    "",
                    "temperature",
                    f"best of {k} at each temperature",
                    "best answers come from",
                    "gate",
                    "seconds",
                ],
                rows,
            )
        )
        blocks.append(
            Figure(
                f"The temperature search, as Fig. 8: reward of the best of {k} answers to 48 dev"
                " prompts against the temperature. The paper draws curves over N and finds 1.2 to"
                " 1.3 best after RLHF; ours tries the few temperatures of the setting."
                " `experiments/figure08_temperature.py` draws Fig. 8 itself.",
                [
                    Panel("best of K by temperature", curves, "temperature", "reward, a logit"),
                    Panel(
                        "temperature chosen",
                        [Curve("chosen", list(chosen), list(chosen.values()), style="-o")],
                        "",
                        "temperature",
                        (0, None),
                    ),
                ],
            )
        )
    return "§3.2.3 Rejection sampling and PPO", blocks + ppo_blocks(metrics, out)


def ppo_blocks(metrics: dict, out: Path) -> list:
    """The curves of each PPO run."""
    blocks = []
    for name in [
        name
        for name in metrics["stages"]
        if name.endswith("-ppo") and "best" in metrics["stages"][name]["results"]
    ]:
        log, best = out / name / "metrics.jsonl", metrics["stages"][name]["results"]["best"]
        panels = []
        for key, label in (
            ("reward", "combined reward, a logit"),
            ("kl", "nats per answer"),
            ("entropy", "nats per token"),
            ("length", "tokens"),
        ):
            curves = [smoothed(log, "ppo", key)._replace(label="rollouts")]
            held_out = smoothed(log, "held-out", key)._replace(label="held-out", style="-o")
            panels.append(
                Panel(
                    {"kl": "KL to the start"}.get(key, key),
                    [c for c in (*curves, held_out) if c.x],
                    "iteration",
                    label,
                )
            )
        blocks.append(
            Figure(
                f"{name}: PPO (equations 3 and 4), no figure of the paper. Seed"
                f" {setting(metrics, name, 'seed')}, {setting(metrics, name, 'batch')} answers an"
                f" iteration, β {setting(metrics, name, 'beta')}; kept is iteration"
                f" {best['iteration']} (held-out reward {number(best['start']['reward'], 2)} →"
                f" {number(best['reward'], 2)}, KL {number(best['kl'], 2)} nats an answer). The"
                " paper runs 200 to 400 iterations with β 0.01 or 0.005.",
                panels,
            )
        )
    return blocks


def gatt_section(metrics: dict, out: Path) -> tuple[str, list]:
    title, record = "§3.3 Ghost Attention", metrics["stages"].get("gatt")
    if not record:
        return title, []
    blocks, found = [], metrics["adherence"]
    if "kept" in record["results"]:
        blocks.append(
            f"{record['results']['kept']:.0%} of {record['settings'].get('dialogs')} dialogs got an"
            " answer that the check kept; they go into V4 where `--mix` says so."
        )
    curve = smoothed(out / "gatt" / "metrics.jsonl", "gatt", "loss")
    panels = (
        [Panel("loss of GAtt", [curve], "step", "nats per token", (0, None))] if curve.x else []
    )
    if found:
        turns = [turn for turn in next(iter(found.values())) if turn != "mean"]
        blocks.append(
            Table(
                "Share of answers that keep an instruction given once, in the first turn; as Table"
                " 30. The same few dialogs for each model, under one or two training constraints"
                " (words, names, hobbies, styles), temperature 0.7. In the paper people judge, here"
                " exact markers. `experiments/table30_gatt.py` has the controls and unseen words.",
                ["", *(f"turn {turn}" for turn in turns), "mean"],
                [
                    [name, *(number(row[turn][0], 2) for turn in turns), number(row["mean"], 2)]
                    for name, row in found.items()
                ],
            )
        )
        panels.append(
            Panel(
                "adherence by turn",
                [
                    Curve(name, list(map(int, turns)), [row[turn][0] for turn in turns], style="-o")
                    for name, row in found.items()
                ],
                "turn",
                "share of answers",
                (0, 1),
            )
        )
    if panels:
        blocks.append(
            Figure(
                "Ghost Attention: the loss of its training, and Table 30 as a picture. "
                f"Seed {setting(metrics, 'gatt', 'seed')}.",
                panels,
            )
        )
    return title, blocks


def evolution_section(metrics: dict, out: Path) -> tuple[str, list]:
    versions = {name: row for name, row in metrics["versions"].items() if any(row["wins"].values())}
    if not versions:
        return "§3.4 Evolution of Llama 2-Chat", []
    panels, blocks = [], []
    for axis in AXES:
        curves = []
        for who in metrics["judges"]:
            found = {
                name: row["wins"][who][axis]
                for name, row in versions.items()
                if axis in row["wins"].get(who, {})
            }
            curves.append(by_version(who, found))
        panels.append(
            Panel(
                f"{axis}: win rate over SFT",
                [curve for curve in curves if curve.x],
                "",
                "win rate, ties half",
                (0, 1),
                0.5,
            )
        )
    rows = []
    for name, row in versions.items():
        for who in metrics["judges"]:
            for axis, win in row["wins"].get(who, {}).items():
                rows.append([name, axis, who, number(win), *map(str, win[3:])])
    ties = ", ".join(
        f"{who}: {f'scores within {tie:g}' if tie else 'equal scores'}"
        for who, tie in metrics["judges"].items()
    )
    told = (
        "The evolution of RLHF, as Fig. 11, by other judges: the annotator, who is the toy world's"
        f" rules, and the newest reward models. {about(metrics, out)} The paper's baseline is"
        f" ChatGPT, ours is this run's own SFT model (so SFT itself stands at .5). Ties ({ties})"
        " count half. All these judges give each answer a score of its own, so the order of the"
        " two answers cannot matter; `--judge human` swaps sides at random."
    )
    blocks += [
        Figure(told, panels),
        Table(
            "The same win rates with wins, ties and losses (as Fig. 1 and 12 show them).",
            ["", "axis", "judge", "win rate", "wins", "ties", "losses"],
            rows,
        ),
    ]
    if "second reward models" in metrics["judges"]:
        blocks.append(
            "The second reward models are the Goodhart check (§3.4.1): trained on other pairs with"
            " another seed; no version was optimised for them. Where the newest reward models see"
            " a gain that these and the annotator do not see, the measure has become the target."
            f" Made by `{command('second', out)}`; the paper uses a model trained on open data."
        )
    else:
        blocks.append(
            f"The Goodhart check is missing: `{command('second', out)}` trains a second pair of"
            " reward models on other pairs with another seed; run `eval.py` again and they judge,"
            " too."
        )
    if metrics["system_prompt"]:
        found, newest = metrics["system_prompt"], metrics["newest"]
        blocks.append(
            Table(
                f"{newest} and sft, without and with the ordinary system prompt (“{found['text']}”)"
                " for both; as §3.4.2, where ChatGPT's system prompt cost it 8 points. Ours is"
                " short and stands in a part of the SFT data.",
                [
                    "",
                    "helpfulness, win over sft",
                    "safety, win over sft",
                    f"helpfulness of {newest}",
                    f"false refusals of {newest}",
                    "helpfulness of sft",
                ],
                [
                    [
                        which,
                        *(number(found[which]["wins"].get(axis)) for axis in AXES),
                        *(
                            number(found[which][name].get(key))
                            for name, key in (
                                (newest, "helpfulness"),
                                (newest, "false_refusals"),
                                ("sft", "helpfulness"),
                            )
                        ),
                    ]
                    for which in ("without", "with")
                ],
            )
        )
    if metrics["families"]:
        blocks.append(
            families_table(
                f"{metrics['newest']} against sft", metrics["families"], metrics["not_worse"]
            )
        )
        families = list(metrics["families"])
        blocks.append(
            Table(
                "Mean score by family and version (safety for unsafe prompts, else helpfulness), no"
                " table of the paper. "
                + about(metrics, out),
                ["", *metrics["versions"]],
                [
                    [
                        family,
                        *(
                            number(row["families"][family][0])
                            for row in metrics["versions"].values()
                        ),
                    ]
                    for family in families
                ],
            )
        )
    return "§3.4 Evolution of Llama 2-Chat", blocks


def safety_section(metrics: dict, out: Path) -> tuple[str, list]:
    keys = {
        "violations": "violations: unsafe answers to unsafe prompts",
        "false_refusals": "false refusals, borderline prompts",
        "false_refusals_ordinary": "false refusals, ordinary prompts",
    }
    versions = {
        name: row["summary"]
        for name, row in metrics["versions"].items()
        if "violations" in row["summary"]
    }
    if not versions:
        return "§4 Safety", []
    panels = [
        Panel(
            title,
            [by_version(key, {name: row[key] for name, row in versions.items()})],
            "",
            "share of answers",
            (0, None),
        )
        for key, title in keys.items()
        if all(key in row for row in versions.values())
    ]
    caption = (
        f"Violations as Fig. 17, false refusals as Fig. 33. {about(metrics, out)} The paper's"
        " violations are people's judgements of 2,000 adversarial prompts, its false refusals a"
        " classifier's and set against the amount of safety data; here the rules of the toy world"
        " say what is unsafe, and the models come one after the other."
    )
    return "§4 Safety", [
        Figure(caption, panels),
        Table(
            "The same numbers.",
            ["", *keys.values()],
            [[name, *(number(row.get(key)) for key in keys)] for name, row in versions.items()],
        ),
    ]


def drift_section(metrics: dict, out: Path) -> tuple[str, list]:
    judges = [
        who
        for who in metrics["judges"]
        if all(row["scores"].get(who) for row in metrics["versions"].values())
    ]
    if len(metrics["versions"]) < 2:
        return "§5.1 What the reward models come to think", []
    panels, rows = [], []
    for who in judges:
        for axis in AXES:
            found = {
                name: row["scores"][who][axis]
                for name, row in metrics["versions"].items()
                if axis in row["scores"][who]
            }
            if found:
                panels.append(
                    Panel(
                        f"{axis}: {who}",
                        [by_version("mean", found)],
                        "",
                        "score" if who == "annotator" else "score, a logit",
                    )
                )
                rows.append(
                    [f"{axis}: {who}", *(number(found.get(name)) for name in metrics["versions"])]
                )
    caption = (
        "Mean score of each version's answers, as Fig. 20, the annotator's beside the reward"
        f" models'. {about(metrics, out)} The paper draws whole distributions of scores between 0"
        " and 1; ours are means of logits, since the sigmoid is near 1 for most answers of a later"
        " version. Where the reward models' mean rises on while the annotator's stands still, the"
        " reward is running away from what it stands for."
    )
    return "§5.1 What the reward models come to think", [
        Figure(caption, panels),
        Table("The same means.", ["", *metrics["versions"]], rows),
    ]


def scripts() -> dict[str, tuple[str, list[Path]]]:
    """{experiment: (first line of its docstring, its results)}; a result belongs to the script
    whose name it begins.
    """
    found = {}
    files = sorted((EXPERIMENTS / "results").glob("*")) if EXPERIMENTS.is_dir() else []
    for path in sorted(EXPERIMENTS.glob("*.py")):
        own = [
            file
            for file in files
            if path.stem == file.stem
            or path.stem.startswith(file.stem + "_")
            or file.stem.startswith((path.stem + "-", path.stem + "_"))
        ]
        told = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if path.stem != "common":
            found[path.stem] = (told.splitlines()[0] if told else path.stem, own)
    return found


def experiments_section(metrics: dict, out: Path) -> tuple[str, list]:
    blocks = []
    for name, (told, files) in scripts().items():
        pictures = [file for file in files if file.suffix == ".png"]
        kept = ", ".join(
            f"`experiments/results/{file.name}`" for file in files if file.suffix == ".json"
        )
        for file in pictures:
            blocks.append(Figure(f"{told} `experiments/{name}.py`; numbers: {kept}.", file=file))
        if files and not pictures:
            blocks.append(f"{told} `experiments/{name}.py`; numbers, without a picture: {kept}.")
    return "Experiments", blocks


def missing_section(metrics: dict, out: Path) -> tuple[str, list]:
    rows = [
        [name, f"`{command(name, out)}`"]
        for name in PIPELINE
        if name not in metrics["stages"]
        and not (name == "second" and "second reward models" in metrics["judges"])
    ]
    rows += [
        [f"experiments/{name}", f"`python experiments/{name}.py`"]
        for name, (_, files) in scripts().items()
        if not files
    ]
    if not rows:
        return "What has not been run", ["Everything was run."]
    return "What has not been run", [
        Table(
            "Each with the command that makes it; `rlhf-v5-no-ppo`, `rlhf-v5-ppo` and `second` "
            "are controls.",
            ["", "command"],
            rows,
        )
    ]
