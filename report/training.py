"""What the stages logged while they trained: SFT, reward models, rounds, PPO, Ghost Attention."""

from pathlib import Path

from data.jsonl import AXES
from report.answers import candidates_blocks
from report.blocks import Block, Curve, Figure, Panel, Section, Table
from report.models import setting
from report.numbers import logged, number, smoothed

RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better", "average")


# ---- SFT ----


def sft_section(metrics: dict, out: Path) -> Section:
    """The loss of supervised fine-tuning."""
    title = "Learning from demonstrations: supervised fine-tuning (§3.1)"
    record = metrics["stages"].get("sft")
    curve = smoothed(out / "sft" / "metrics.jsonl", "sft", "loss")
    if not record or not curve.x:
        return Section(title, [])
    introduction = (
        "SFT imitates written answers; its loss says how much the next token of such an answer"
        " still surprises it, and a good curve falls fast, then slowly, towards the dotted line."
    )
    loss = record["results"].get("dev_loss")
    held_out = ""
    if loss:
        held_out = f" The dotted line is the loss on held-out dialogs at the end, {number(loss)}."
    caption = "Training loss: how much does an answer token still surprise the model?"
    small_print = (
        "In nats per token (means of consecutive steps); at 0 each token would be certain."
        f"{held_out} Seed {record['settings'].get('seed')}. The paper's nearest is Fig. 5, the loss"
        " of pretraining; ours starts from random weights, so that SFT is where the model learns"
        " English."
    )
    settled = curve.y[len(curve.y) // 20 :]  # the first steps are far above the others
    panel = Panel("loss of SFT", [curve], "step", "nats per token", (0, max(settled) * 1.1), loss)
    figure = Figure(caption, [panel], small_print=small_print)
    return Section(title, [introduction, figure])


# ---- reward models ----


def reward_section(metrics: dict, out: Path) -> Section:
    """How often the reward models prefer the right answer, and how they learned to."""
    title = "Learning what people prefer: reward models (§3.2.2)"
    rows = _first_accuracies(metrics) + _fresh_accuracies(metrics)
    panels = _reward_panels(out)
    blocks: list[Block] = []
    if rows:
        blocks.append(_accuracy_table(rows))
    if panels:
        caption = (
            "Training of the first reward models: their accuracy on pairs that they have not seen."
        )
        small_print = (
            "Share of a step's pairs whose chosen answer scores higher, before the step. One epoch,"
            " as in the paper, so no pair is seen twice. Beside Fig. 6 of the paper, whose x-axis"
            " is the amount of data."
        )
        blocks.append(Figure(caption, panels, small_print=small_print))
    if not blocks:
        return Section(title, [])
    introduction = (
        "A reward model gives an answer a score; its accuracy is the share of pairs of answers in"
        " which the one that the annotator chose scores higher: 0.5 is guessing, and good is close"
        " to the annotator's own row."
    )
    return Section(title, [introduction, *blocks])


def _accuracy_table(rows: list[list[str]]) -> Table:
    columns = [""]
    for rating in RATINGS:
        columns.append(rating.replace("_better", "").replace("_", " "))
    caption = (
        "Accuracy by how much better the chosen answer was rated: large differences are easy to"
        " see, negligible ones hard."
    )
    small_print = (
        "As Table 8, on held-out pairs from dev prompts (a few hundred, so errors of 2 to 5 points"
        " a grade). The annotator chooses with some noise, as people do; its row is of its scores"
        " without the noise, about the best that a model can reach. Fresh pairs: a round's, before"
        " its reward model learned them, between two newer models and so harder."
        " `python -m experiments.table08_accuracy_by_rating` has thousands."
    )
    return Table(caption, columns, rows, small_print)


def _accuracies(name: str, accuracy: dict) -> list[str]:
    return [name, *(number(accuracy.get(rating)) for rating in RATINGS)]


def _first_accuracies(metrics: dict) -> list[list[str]]:
    """Rows of the first reward models, each above the annotator's."""
    rows = []
    for axis in AXES:
        results = metrics["stages"].get(f"reward-{axis}", {}).get("results", {})
        for who in ("reward model", "annotator"):
            if who in results:
                rows.append(_accuracies(f"{axis}: {who}", results[who]))
    return rows


def _fresh_accuracies(metrics: dict) -> list[list[str]]:
    """Rows of later reward models, on the pairs of the round before they learned them."""
    rows = []
    for name, record in metrics["stages"].items():
        for axis, table in record["results"].get("reward_models", {}).items():
            if isinstance(table, dict) and "reward model" in table:
                rows.append(_accuracies(f"{axis}: {name}, fresh pairs", table["reward model"]))
    return rows


def _reward_panels(out: Path) -> list[Panel]:
    panels = []
    for axis in AXES:
        curve = smoothed(out / f"reward-{axis}" / "metrics.jsonl", axis, "accuracy", 40)
        if curve.x:
            label = "accuracy on training pairs"
            panels.append(Panel(f"{axis} model", [curve], "step", label, (0.4, 1), 0.5))
    return panels


# ---- rejection sampling and PPO ----


def rounds_section(metrics: dict, out: Path) -> Section:
    """The rounds, the candidates of the last of them, and the curves of PPO."""
    title = "Chasing the reward: rejection sampling and PPO (§3.2.3)"
    rounds = []
    for name, record in metrics["stages"].items():
        if "temperature" in record["results"] and "sources" in record["results"]:
            rounds.append(name)
    blocks: list[Block] = []
    if rounds:
        samples = setting(metrics, rounds[0], "samples")
        tried = {name: _tried_temperatures(out / name) for name in rounds}
        blocks.append(_rounds_table(metrics, tried, samples))
        blocks.append(_temperature_figure(metrics, tried, samples))
        blocks += candidates_blocks(metrics, out, rounds[-1])
    blocks += ppo_blocks(metrics, out)
    if not blocks:
        return Section(title, [])
    introduction = (
        "Here the models learn from reward: rejection sampling trains on the best of several"
        " answers, PPO makes each answer likelier or less likely; a rising reward is good only"
        " while the annotator's scores and content rise with it."
    )
    return Section(title, [introduction, *blocks])


def _tried_temperatures(folder: Path) -> dict[float, float]:
    """{temperature: reward of the best of K answers}, as a round's search logged it."""
    prefix = "reward_at_"
    for row in logged(folder / "metrics.jsonl"):
        if row["phase"] == "temperature":
            found = {}
            for key, value in row.items():
                if key.startswith(prefix) and isinstance(value, (int, float)):
                    found[float(key.removeprefix(prefix))] = value
            return found
    return {}


def _rounds_table(metrics: dict, tried: dict[str, dict[float, float]], samples) -> Table:
    rows = []
    for name, rewards in tried.items():
        results = metrics["stages"][name]["results"]
        at_each = [f"{temperature}: {number(reward, 2)}" for temperature, reward in rewards.items()]
        sources = []
        for version, count in results["sources"].items():
            sources.append(f"{version.removeprefix('rlhf-')} {count}")
        rows.append(
            [
                name,
                number(results["temperature"], 1),
                ", ".join(at_each),
                ", ".join(sources),
                f"{results['gated']:.1%}",
                f"{results.get('seconds', 0):.0f}",
            ]
        )
    columns = ["", "temperature", f"best of {samples} at each temperature"]
    columns += ["best answers come from", "gate", "seconds"]
    caption = (
        f"The rounds of rejection sampling: each samples {samples} answers to a prompt and trains"
        " on the best. Good is a gate near 0 %."
    )
    small_print = (
        "The temperature is the one that gave the best rewards on 48 dev prompts. The reward is a"
        " logit (any"
        " number, higher is better) by that round's own reward models, so rows are not one scale."
        " Gate: for a prompt that is not tagged as possibly unsafe, the helpfulness model gives the"
        " reward, unless the safety model is surer than 85 % that the answer is unsafe, and takes"
        " over; shown is the share of such answers. The paper has no such table."
    )
    return Table(caption, columns, rows, small_print)


def _temperature_figure(metrics: dict, tried: dict[str, dict[float, float]], samples) -> Figure:
    curves = []
    chosen = {}
    for name, rewards in tried.items():
        curves.append(Curve(name, list(rewards), list(rewards.values()), style="-o"))
        chosen[name] = metrics["stages"][name]["results"]["temperature"]
    caption = (
        "The temperature search: how high is the best reward when answers are sampled more freely?"
    )
    small_print = (
        f"As Fig. 8: reward of the best of {samples} answers to 48 dev prompts. The paper draws"
        " curves over N and finds 1.2 to 1.3 best after RLHF; ours tries the few temperatures of"
        " the setting. `python -m experiments.figure08_temperature` draws Fig. 8 itself."
    )
    by_temperature = Panel("best of K by temperature", curves, "temperature", "reward, a logit")
    curve = Curve("chosen", list(chosen), list(chosen.values()), style="-o")
    choice = Panel("temperature chosen", [curve], "", "temperature", (0, None))
    return Figure(caption, [by_temperature, choice], small_print=small_print)


PPO_PANELS = {  # what PPO logs: (title, y-axis)
    "reward": ("reward", "combined reward, a logit"),
    "kl": ("KL to the start", "nats per answer"),
    "entropy": ("entropy", "nats per token"),
    "length": ("length", "tokens"),
}


def ppo_blocks(metrics: dict, out: Path) -> list[Block]:
    """The curves of each PPO run."""
    blocks: list[Block] = []
    for name, record in metrics["stages"].items():
        best = record["results"].get("best")
        if not name.endswith("-ppo") or not best:
            continue
        log = out / name / "metrics.jsonl"
        panels = [_ppo_panel(log, key) for key in PPO_PANELS]
        caption = (
            f"PPO, which made {name}: good is a reward that rises on held-out prompts, too, while"
            " KL stays small."
        )
        small_print = (
            "KL says how far the model has moved from where it started: a little is learning, a lot"
            " is usually a trick that the reward models fall for. Entropy is how much freedom its"
            " answers have left; near 0 they are all alike. Equations 3 and 4. Seed"
            f" {setting(metrics, name, 'seed')}, {setting(metrics, name, 'batch')} answers an"
            " iteration, β"
            f" {setting(metrics, name, 'beta')} (the price of KL). Iteration {best['iteration']} is"
            f" kept: held-out reward {number(best['start']['reward'], 2)} →"
            f" {number(best['reward'], 2)}, KL {number(best['kl'], 2)} nats an answer. The paper"
            " shows no such figure; it runs 200 to 400 iterations with β 0.01 or 0.005."
        )
        blocks.append(Figure(caption, panels, small_print=small_print))
    return blocks


def _ppo_panel(log: Path, key: str) -> Panel:
    title, label = PPO_PANELS[key]
    rollouts = smoothed(log, "ppo", key)._replace(label="rollouts")
    held_out = smoothed(log, "held-out", key)._replace(label="held-out", style="-o")
    curves = [curve for curve in (rollouts, held_out) if curve.x]
    return Panel(title, curves, "iteration", label)


# ---- Ghost Attention ----


def gatt_section(metrics: dict, out: Path) -> Section:
    """Does an instruction last? The loss of Ghost Attention, and adherence turn by turn."""
    title = "An instruction that lasts: Ghost Attention (§3.3)"
    record = metrics["stages"].get("gatt")
    if not record:
        return Section(title, [])
    introduction = (
        "Told once at the start to end each answer with a certain word, does the model still do so"
        " twenty turns later? Adherence, the share of answers that keep the instruction, should"
        " stay near 1 down the dialog."
    )
    blocks: list[Block] = [introduction]
    if "kept" in record["results"]:
        blocks.append(
            f"{record['results']['kept']:.0%} of {record['settings'].get('dialogs')} training"
            " dialogs got an answer that the check kept; they go into V4 where `--mix` says so."
        )
    panels = []
    curve = smoothed(out / "gatt" / "metrics.jsonl", "gatt", "loss")
    if curve.x:
        panels.append(Panel("loss of GAtt", [curve], "step", "nats per token", (0, None)))
    adherence = metrics.get("adherence")
    if adherence:
        blocks.append(_adherence_table(adherence))
        panels.append(_adherence_panel(adherence))
    if panels:
        caption = (
            "Ghost Attention: the loss of its training, and Table 30 as a picture."
            f" Seed {setting(metrics, 'gatt', 'seed')}."
        )
        blocks.append(Figure(caption, panels))
    return Section(title, blocks if len(blocks) > 1 else [])


def _turns(adherence: dict) -> list[str]:
    first = next(iter(adherence.values()))
    return [turn for turn in first if turn != "mean"]


def _adherence_table(adherence: dict) -> Table:
    turns = _turns(adherence)
    rows = []
    for name, by_turn in adherence.items():
        cells = [number(by_turn[turn][0], 2) for turn in turns]
        rows.append([name, *cells, number(by_turn["mean"], 2)])
    caption = (
        "Adherence by turn, where the instruction is given in the first turn only: does it last to"
        " the last column?"
    )
    small_print = (
        "As Table 30. The same few dialogs for each model, under one or two training constraints"
        " (words, names, hobbies, styles), temperature 0.7. In the paper people judge, here exact"
        " markers. `python -m experiments.table30_gatt` has the controls and unseen words."
    )
    columns = ["", *(f"turn {turn}" for turn in turns), "mean"]
    return Table(caption, columns, rows, small_print)


def _adherence_panel(adherence: dict) -> Panel:
    turns = _turns(adherence)
    curves = []
    for name, by_turn in adherence.items():
        shares = [by_turn[turn][0] for turn in turns]
        curves.append(Curve(name, [int(turn) for turn in turns], shares, style="-o"))
    return Panel("adherence by turn", curves, "turn", "share of answers", (0, 1))
