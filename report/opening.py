"""What a reader sees first: what the models are, the numbers of each, and is this run healthy?"""

from pathlib import Path
from typing import NamedTuple

from data.jsonl import AXES
from report.blocks import Block, Curve, Figure, Panel, Section, Table
from report.models import describe
from report.numbers import about, mean_of, number


class Column(NamedTuple):
    """A column of the summary in plain words. good: what a good value is."""

    meaning: str
    good: str


COLUMNS = {
    "helpfulness": Column(
        "Score from 0 to 1 of answers to harmless prompts. Half of it is for being right, half for"
        " manner: a whole sentence, a friendly start and end, one more fact.",
        good="high",
    ),
    "content": Column(
        "Credit from 0 to 1 for what an answer to a harmless prompt says, whatever its manner.",
        good="high, and rising with helpfulness",
    ),
    "right": Column(
        "Share of answers to harmless prompts whose content has full credit.",
        good="high",
    ),
    "safety": Column(
        "Score from 0 to 1 of answers to unsafe prompts, which ask for something harmful. Highest"
        " is a polite refusal that says why and offers something else.",
        good="high",
    ),
    "violations": Column(
        "Share of answers to unsafe prompts that are unsafe.",
        good="near 0",
    ),
    "complies": Column(
        "Share of answers to unsafe prompts that do what was asked. The other violations evade the"
        " question or refuse rudely.",
        good="near 0",
    ),
    "false_refusals": Column(
        "Share of refusals among answers to borderline prompts, which sound dangerous and are"
        " harmless.",
        good="near 0",
    ),
    "tokens": Column(
        "Mean length of an answer; a token is a word or a piece of one.",
        good="no longer than it must be",
    ),
}
WIN_RATE = Column(
    "Win rate: the share of prompts to which this model's answer scores higher than SFT's; a tie"
    " counts half. Helpfulness is compared on harmless prompts, safety on unsafe ones. Brackets are"
    " a 95 % confidence interval: with other questions of the same kinds the number could have been"
    " anywhere in it. Two wordings of one question count as one; near 1 an interval can exceed it.",
    good="above 0.5, the bracket too",
)


def summary_section(metrics: dict, out: Path) -> Section:
    """The opening, then one row a model."""
    blocks: list[Block] = [opening(metrics), _models_table(metrics, out)]
    blocks += [_summary_table(metrics, out), _columns_table(metrics)]
    if metrics.get("content"):
        blocks.append(_content_table(metrics))
    blocks.append(health_text(metrics))
    return Section("Summary", blocks)


def opening(metrics: dict) -> str:
    """Three sentences: what the models are, who judges, what to look at first."""
    models = (
        "Each row below is one chat model: SFT learned from written demonstrations, and V1, V2 and"
        " so on come from it by RLHF (reinforcement learning from human feedback): each is trained"
        " on sampled answers that reward models liked best."
    )
    if next(iter(metrics["judges"])) != "annotator":
        judge = (
            "They are judged by the newest reward models, networks that learned from examples which"
            " of two answers is better and can be fooled, and not by the annotator, a program that"
            " stands in for people and knows the toy world's prompts only."
        )
        look = "Look first at the answers themselves, further down."
        return f"{models}\n\n{judge}\n\n{look}"
    judge = (
        "They are judged by the annotator, a program that knows this toy world's right answers and"
        " stands in for people, while the reward models are networks that learned the annotator's"
        " taste from examples and can be fooled."
    )
    look = (
        "Look first at content (is the answer right?) beside helpfulness (is it right and nice?):"
        " where helpfulness rises while content falls, answers became nicer and less right."
    )
    return f"{models}\n\n{judge}\n\n{look}"


def _models_table(metrics: dict, out: Path) -> Table:
    rows = [[name, describe(name, metrics, out)] for name in metrics["versions"]]
    caption = f"The models, by their folders in `{out}`, in the order of the paper."
    return Table(caption, ["", "what it is"], rows, wrap=True)


def _means(metrics: dict) -> list[str]:
    """The columns that some model has a number for."""
    known = []
    for key in COLUMNS:
        if any(key in version["summary"] for version in metrics["versions"].values()):
            known.append(key)
    return known


def _summary_table(metrics: dict, out: Path) -> Table:
    judge = next(iter(metrics["judges"]))
    means = _means(metrics)
    columns = [""] + [key.replace("_", " ") for key in means]
    columns += [f"{axis}, win over sft" for axis in AXES]
    rows = []
    for name, version in metrics["versions"].items():
        row = [name]
        for key in means:
            row.append(mean_of(version["summary"].get(key), 1 if key == "tokens" else 3))
        wins = version["wins"].get(judge, {})
        row += [number(wins.get(axis)) for axis in AXES]
        rows.append(row)
    caption = (
        f"Every model of `{out}`, judged by the {judge}: from row to row, do answers become"
        " better, and do they stay right? The next table says what each column is."
    )
    small_print = (
        f"{about(metrics)} These are the numbers behind the paper's Fig. 11, 17 and 33, drawn"
        " further down."
    )
    return Table(caption, columns, rows, small_print)


def _columns_table(metrics: dict) -> Table:
    """What each column of the summary is; other judges give scores of another kind."""
    is_annotator = next(iter(metrics["judges"])) == "annotator"
    rows = []
    for key in _means(metrics):
        meaning, good = COLUMNS[key]
        if key in AXES and not is_annotator:
            asked = "unsafe" if key == "safety" else "other"
            meaning = (
                f"Mean score of answers to {asked} prompts, a logit: any number, 0 is neutral."
            )
        rows.append([key.replace("_", " "), f"{meaning} Good: {good}."])
    meaning, good = WIN_RATE
    rows.append(["win over sft", f"{meaning} Good: {good}."])
    caption = "The columns in plain words."
    small_print = "In the paper people judge (§3.4 and §4), here a program or a model does."
    return Table(caption, ["", "what it is"], rows, small_print, wrap=True)


def _content_table(metrics: dict) -> Table:
    """Is what the versions say still right? Content beside helpfulness, at each temperature."""
    columns = [""]
    for temperature in metrics["content"]:
        columns += [f"content (right), {temperature}", "against sft", f"helpfulness, {temperature}"]
    rows = []
    for version in metrics["versions"]:
        row = [version]
        for table in metrics["content"].values():
            row += _content_cells(table.get(version))
        rows.append(row)
    caption = (
        "Right before nice: is what the answers say still right? Good is a content that does not"
        " fall behind SFT's while helpfulness rises."
    )
    small_print = (
        "In brackets behind content stands the share of answers that are wholly right. Against sft:"
        " the difference of content from SFT's on the same prompts, with its interval. Temperature"
        " says how freely an answer is sampled: 1 is the model as it is, 0.4 is cool, and greedy"
        " always takes the likeliest token. Cool and greedy answers show what a model knows."
        f" {about(metrics)} The paper has no such table."
    )
    return Table(caption, columns, rows, small_print)


def _content_cells(means: dict | None) -> list[str]:
    if not means:
        return ["", "", ""]
    content = f"{mean_of(means['content'])} ({mean_of(means['right'])})"
    return [content, number(means.get("difference")), mean_of(means["helpfulness"])]


# ---- is this run healthy? ----


def health_text(metrics: dict) -> str:
    """The verdict on the run: how many of its numbers lie where the reference runs say."""
    health = metrics.get("health")
    if not health:
        return (
            "This run is not compared with reference runs: they are of the toy world's test prompts"
            " and of the default pipeline (`python -m experiments.reference`)."
        )
    outside = []
    far_outside = []
    for name, (_, _, is_inside, is_far) in health.items():
        if not is_inside:
            outside.append(name)
        if is_far:
            far_outside.append(name)
    is_healthy = len(outside) <= metrics["allowed_outside"] and not far_outside
    text = (
        f"This run {'looks' if is_healthy else 'does NOT look'} healthy:"
        f" {len(health) - len(outside)} of {len(health)} numbers lie inside the 95 % prediction"
        f" interval of {len(metrics['reference_seeds'])} reference runs; up to"
        f" {metrics['allowed_outside']} outside can be chance."
    )
    if outside:
        text += f" Outside: {'; '.join(outside)}"
        if far_outside:
            text += f"; far outside: {'; '.join(far_outside)}"
        text += "."
    missing = len(metrics["numbers"]) - len(health)
    if missing:
        text += (
            f" {missing} numbers have no reference: the reference runs are of the whole default"
            " pipeline."
        )
    return text


HEALTH_PANELS = ("helpfulness", "helpfulness, win over sft", "safety", "safety, win over sft")


def health_section(metrics: dict, out: Path) -> Section:
    """This run beside the reference runs."""
    title = "Is this run healthy?"
    if not metrics.get("health"):
        return Section(title, [])
    introduction = (
        "Reference runs are whole runs of the same commands with other random numbers (seeds): a"
        " healthy run lies between them, so good is a dot inside its band."
    )
    panels = []
    for what in HEALTH_PANELS:
        panel = _health_panel(metrics["health"], what)
        if panel:
            panels.append(panel)
    rows = []
    for name, (value, expected, is_inside, is_far) in metrics["health"].items():
        place = "inside"
        if not is_inside:
            place = "FAR OUTSIDE" if is_far else "OUTSIDE"
        rows.append([name, number(value), number(expected), place])
    small_print = (
        "The band is a prediction interval: where one more healthy run lies with 95 %, mean ± t s"
        f" √(1 + 1/n) over {len(metrics['reference_seeds'])} whole runs with the default settings"
        f" (seeds {', '.join(metrics['reference_seeds'])}; `python -m experiments.reference`). The"
        " paper has no such figure."
    )
    caption = "This run in the band of the reference runs."
    figure = Figure(caption, panels, small_print=small_print)
    columns = ["", "this run", "reference", ""]
    caption = "The same numbers, and those of the stages."
    table = Table(caption, columns, rows, health_text(metrics))
    return Section(title, [introduction, figure, table])


def _health_panel(health: dict, what: str) -> Panel | None:
    """One of the numbers, version by version; None where no version has it."""
    versions = []
    values = []
    means, lows, highs = [], [], []
    for name, (value, expected, *_) in health.items():
        version, _, rest = name.partition(": ")
        if rest == what:
            versions.append(version.replace(" (with GAtt)", ""))
            values.append(value)
            means.append(expected[0])
            lows.append(expected[1])
            highs.append(expected[2])
    if not versions:
        return None
    band = Curve("reference runs", versions, means, lows, highs, "--")
    run = Curve("this run", versions, values, style="o")
    return Panel(what, [band, run], ylim=(0, 1))
