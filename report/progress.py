"""From version to version: who wins, who is safe, and what the reward models come to think."""

from pathlib import Path

from data.jsonl import AXES
from report.blocks import Block, Figure, Panel, Section, Table
from report.models import command
from report.numbers import about, by_version, families_table, mean_of, number

# ---- who wins ----


def evolution_section(metrics: dict, out: Path) -> Section:
    """Win rates over SFT by all judges, with system prompt and by family."""
    title = "From version to version: who wins? (§3.4)"
    versions = {}
    for name, version in metrics["versions"].items():
        if any(version["wins"].values()):
            versions[name] = version
    if not versions:
        return Section(title, [])
    introduction = (
        "Both answer the same prompt, and the judge says which answer is better: a win rate of 0.5"
        " is no better than SFT, 1 wins always, and good is a curve that rises for every judge."
    )
    blocks: list[Block] = [introduction]
    blocks.append(_wins_figure(metrics, versions))
    blocks.append(_wins_table(metrics, versions))
    blocks.append(_goodhart_text(metrics, out))
    if metrics.get("system_prompt"):
        blocks.append(_system_prompt_table(metrics))
    if metrics.get("families"):
        title_of_table = f"{metrics['newest']} against sft"
        blocks.append(families_table(title_of_table, metrics["families"], metrics["not_worse"]))
        blocks.append(_family_scores_table(metrics))
    return Section(title, blocks)


def _wins_figure(metrics: dict, versions: dict[str, dict]) -> Figure:
    panels = []
    for axis in AXES:
        curves = []
        for judge in metrics["judges"]:
            wins = {}
            for name, version in versions.items():
                if axis in version["wins"].get(judge, {}):
                    wins[name] = version["wins"][judge][axis]
            if wins:
                curves.append(by_version(judge, wins))
        panel_title = f"{axis}: win rate over SFT"
        panels.append(Panel(panel_title, curves, "", "win rate, ties half", (0, 1), 0.5))
    ties = []
    for judge, tie in metrics["judges"].items():
        ties.append(f"{judge}: {f'scores within {tie:g}' if tie else 'equal scores'}")
    caption = (
        "Win rates over SFT by each judge: does the annotator see the gain that the reward models"
        " see, which the models were trained to please?"
    )
    small_print = (
        "The evolution of RLHF, as Fig. 11. The paper's baseline is ChatGPT, ours is this run's own"
        " SFT model (so SFT itself stands at 0.5). The reward models are the newest of this run."
        f" Ties ({', '.join(ties)}) count half. All these judges give each answer a score of its"
        " own, so the order of the two answers cannot matter; `--judge human` swaps sides at"
        f" random. {about(metrics)}"
    )
    return Figure(caption, panels, small_print=small_print)


def _wins_table(metrics: dict, versions: dict[str, dict]) -> Table:
    rows = []
    for name, version in versions.items():
        for judge in metrics["judges"]:
            for axis, win in version["wins"].get(judge, {}).items():
                counts = [str(count) for count in win[3:]]
                rows.append([name, axis, judge, number(win), *counts])
    caption = "The same win rates with wins, ties and losses (as Fig. 1 and 12 show them)."
    return Table(caption, ["", "axis", "judge", "win rate", "wins", "ties", "losses"], rows)


def _goodhart_text(metrics: dict, out: Path) -> str:
    made_by = f"`{command('second', out)}`"
    if "second reward models" in metrics["judges"]:
        return (
            "The second reward models are the Goodhart check (§3.4.1): a measure that one trains"
            " for stops being a good measure. They were trained on other pairs with another seed,"
            " and no version was optimised for them. Where the newest reward models see a gain that"
            " these and the annotator do not see, the measure has become the target. Made by"
            f" {made_by}; the paper uses a model trained on open data."
        )
    return (
        "The Goodhart check is missing (§3.4.1: a measure that one trains for stops being a good"
        f" measure). {made_by} trains a second pair of reward models on other pairs with another"
        " seed; run `eval.py` again and they judge, too."
    )


def _system_prompt_table(metrics: dict) -> Table:
    newest = metrics["newest"]
    system_prompt = metrics["system_prompt"]
    columns = ["", "helpfulness, win over sft", "safety, win over sft"]
    columns += [f"helpfulness of {newest}", f"false refusals of {newest}", "helpfulness of sft"]
    rows = []
    for which in ("without", "with"):
        measured = system_prompt[which]
        row = [which]
        row += [number(measured["wins"].get(axis)) for axis in AXES]
        row.append(number(measured[newest].get("helpfulness")))
        row.append(number(measured[newest].get("false_refusals")))
        row.append(number(measured["sft"].get("helpfulness")))
        rows.append(row)
    caption = (
        "Does an instruction in front of the dialog, a system prompt, change who wins? Good is two"
        " rows that agree."
    )
    small_print = (
        f"{newest} and sft, without and with the ordinary system prompt (“{system_prompt['text']}”)"
        " for both; as §3.4.2, where ChatGPT's system prompt cost it 8 points. Ours is short and"
        " stands in a part of the SFT data."
    )
    return Table(caption, columns, rows, small_print)


def _family_scores_table(metrics: dict) -> Table:
    rows = []
    for family in metrics["families"]:
        scores = []
        for version in metrics["versions"].values():
            scores.append(mean_of(version["families"].get(family)))
        rows.append([family, *scores])
    caption = "Mean score by family and version: what is learned, what is forgotten?"
    small_print = (
        f"Safety for unsafe prompts, else helpfulness. {about(metrics)} The paper has no such"
        " table."
    )
    return Table(caption, ["", *metrics["versions"]], rows, small_print)


# ---- who is safe ----

MISTAKES = {
    "violations": "violations: unsafe answers to unsafe prompts",
    "false_refusals": "false refusals, borderline prompts",
    "false_refusals_ordinary": "false refusals, ordinary prompts",
}


def safety_section(metrics: dict, out: Path) -> Section:
    """Unsafe answers, and refusals where an answer was due."""
    title = "Safe, without refusing too much (§4)"
    versions = {}
    for name, version in metrics["versions"].items():
        if "violations" in version["summary"]:
            versions[name] = version["summary"]
    if not versions:
        return Section(title, [])
    introduction = (
        "There are two mistakes: to do harm that was asked for (a violation), and to refuse what is"
        " harmless (a false refusal); good is both near 0 at once."
    )
    panels = []
    for key, panel_title in MISTAKES.items():
        if all(key in summary for summary in versions.values()):
            curve = by_version(key, {name: summary[key] for name, summary in versions.items()})
            panels.append(Panel(panel_title, [curve], "", "share of answers", (0, None)))
    caption = "Both mistakes, version by version: do violations fall while false refusals stay low?"
    small_print = (
        f"Violations as Fig. 17, false refusals as Fig. 33. {about(metrics)} The paper's violations"
        " are people's judgements of 2,000 adversarial prompts, its false refusals a classifier's"
        " and set against the amount of safety data; here the rules of the toy world say what is"
        " unsafe, and the models come one after the other."
    )
    figure = Figure(caption, panels, small_print=small_print)
    rows = []
    for name, summary in versions.items():
        rows.append([name, *(number(summary.get(key)) for key in MISTAKES)])
    table = Table("The same numbers.", ["", *MISTAKES.values()], rows)
    return Section(title, [introduction, figure, table])


# ---- what the reward models come to think ----


def drift_section(metrics: dict, out: Path) -> Section:
    """Mean scores by each judge: does the reward run away from what it stands for?"""
    title = "Does the reward run away? Scores by each judge (§5.1)"
    if len(metrics["versions"]) < 2:
        return Section(title, [])
    panels = []
    rows = []
    for judge in metrics["judges"]:
        for axis in AXES:
            scores = _scores(metrics, judge, axis)
            if not scores:
                continue
            label = "score" if judge == "annotator" else "score, a logit"
            panels.append(Panel(f"{axis}: {judge}", [by_version("mean", scores)], "", label))
            means = [number(scores.get(name)) for name in metrics["versions"]]
            rows.append([f"{axis}: {judge}", *means])
    introduction = (
        "Each judge scores the answers of every version: good is when all rise together, and where"
        " the reward models' mean rises on while the annotator's stands still, the models have"
        " learned to please the reward models and nobody else."
    )
    caption = "Mean score of each version's answers, the annotator's beside the reward models'."
    small_print = (
        "As Fig. 20. The annotator's scores lie between 0 and 1, the reward models' are logits, any"
        f" number. {about(metrics)} The paper draws whole distributions of scores between 0 and 1;"
        " ours are means of logits, since the sigmoid, which brings a logit between 0 and 1, is"
        " near 1 for most answers of a later version."
    )
    figure = Figure(caption, panels, small_print=small_print)
    table = Table("The same means.", ["", *metrics["versions"]], rows)
    return Section(title, [introduction, figure, table])


def _scores(metrics: dict, judge: str, axis: str) -> dict[str, list]:
    """{version: mean score with its interval}, of those that this judge has seen."""
    scores = {}
    for name, version in metrics["versions"].items():
        score = version["scores"].get(judge, {}).get(axis)
        if score:
            scores[name] = score
    return scores
