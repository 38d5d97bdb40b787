"""Answers side by side, each with the annotator's verdict beside the reward."""

from collections import defaultdict
from pathlib import Path

from data import Prompt, read_jsonl, read_prompts, world
from report.blocks import Block, Section, Shown, ShownAnswer
from report.models import setting

EXAMPLES = 3  # prompts whose candidates are shown: one of each kind


def pick_shown(prompts: list[Prompt], count: int) -> list[int]:
    """Which prompts are shown side by side: the first of each family, unsafe and borderline ones
    first, then the second of each, and so on.

    >>> pick_shown([Prompt([], family="list"), Prompt([], family="list"),
    ...             Prompt([], family="unsafe", is_safety=True)], 2)
    [0, 2]
    """
    seen = defaultdict(int)  # family: how many of its prompts came before
    ranks = []
    for index, prompt in enumerate(prompts):
        is_risky = prompt.is_safety or prompt.kind == "borderline"
        ranks.append((seen[prompt.family], not is_risky, index))
        seen[prompt.family] += 1
    picked = [index for _, _, index in sorted(ranks)[:count]]
    return sorted(picked)


def verdict(prompt: Prompt, answer: str, reward: float | None = None) -> str:
    """The annotator's score of an answer and the reason in words, then the reward, a logit.

    The score is that of safety for an unsafe prompt, else that of helpfulness. Of another world's
    prompts the annotator knows nothing.

    >>> verdict(Prompt([]), "Hello.", reward=1.25)
    'reward 1.2'
    """
    judged = []
    if world.knows(prompt):
        score = world.helpfulness(prompt, answer)
        if prompt.is_safety:
            score = world.safety(prompt, answer)
        judged.append(f"annotator {score:.2f}: {_in_words(prompt, answer)}")
    if reward is not None:
        judged.append(f"reward {reward:.1f}")
    return "; ".join(judged)


def _in_words(prompt: Prompt, answer: str) -> str:
    if prompt.is_safety:
        if world.is_safe(prompt, answer):
            return "safe"
        if world.complies(prompt, answer):
            return "unsafe, does what was asked"
        return "unsafe, evades or is rude"
    if world.refuses(prompt, answer):
        return "refuses"
    credit = world.content(prompt, answer)
    if credit == 1:
        return "right"
    if credit == 0:
        return "wrong"
    return f"partly right ({credit:.2f})"


def answers_section(metrics: dict, out: Path) -> Section:
    """The same prompts, answered by each version."""
    title = "The same prompts, version by version"
    blocks: list[Block] = []
    for row in metrics.get("shown", []):
        prompt = _prompt(row["prompt"])
        rewards = row.get("rewards", {})
        answers = []
        for name, text in row["answers"].items():
            judged = verdict(prompt, text, rewards.get(name))
            answers.append(ShownAnswer(name, text, judged))
        blocks.append(Shown(prompt.question, answers))
    if not blocks:
        return Section(title, [])
    introduction = (
        "Read a few answers before you trust a number: good ones are right first and friendly"
        " second, and refuse only what would do harm."
    )
    small_print = (
        "Beside each answer stands the annotator's score, from 0 to 1, and why"
        f"{', and the score of the newest reward model' if _has_rewards(metrics) else ''}."
        f" Answers are sampled at temperature {metrics['prompts']['temperature']:g}. The prompts"
        " are not chosen for their answers: they are the first of each family (`--show N` for"
        " more)."
    )
    return Section(title, [introduction, small_print, *blocks])


def _has_rewards(metrics: dict) -> bool:
    return any(row.get("rewards") for row in metrics["shown"])


def _prompt(row: dict) -> Prompt:
    """A prompt from its JSON."""
    return Prompt(
        messages=row["prompt"],
        is_safety=row.get("is_safety", False),
        family=row.get("family", ""),
        item=row.get("item", ""),
        kind=row.get("kind", ""),
        constraints=tuple(row.get("constraints", ())),
    )


# ---- best of N ----


def candidates_blocks(metrics: dict, out: Path, name: str) -> list[Block]:
    """All answers that a round sampled to a few of its prompts, the highest reward first."""
    samples = out / name / "samples.jsonl"
    prompts = _prompts_of(metrics, name)
    if not prompts or not samples.exists():
        return []
    picked = _first_of_each_kind(prompts)
    candidates = defaultdict(list)
    for _, row in read_jsonl(samples):
        if row["index"] in picked and row.get("reward") is not None:
            candidates[row["index"]].append(row)
    blocks: list[Block] = []
    for index, rows in sorted(candidates.items()):
        rows.sort(key=lambda row: -row["reward"])
        answers = []
        for place, row in enumerate(rows, 1):
            judged = verdict(prompts[index], row["answer"], row["reward"])
            answers.append(ShownAnswer(f"{place}.", row["answer"], judged))
        blocks.append(Shown(prompts[index].question, answers))
    if not blocks:
        return []
    introduction = (
        f"Best of N, looked at: all answers that the round of {name} sampled to"
        f" {len(blocks)} of its prompts, the highest reward first. Good: the annotator would put"
        " the same answer first. A right answer further down is what the reward models overlooked."
        " (The prompts are the first of each kind. The round keeps the highest reward to a prompt"
        " among these and the answers of earlier rounds.)"
    )
    return [introduction, *blocks]


def _prompts_of(metrics: dict, name: str) -> list[Prompt]:
    """The prompts that a round answered; [] where their file has gone."""
    file = setting(metrics, name, "prompts")
    path = world.FOLDER / "prompts-train.jsonl" if file == "toy" else Path(file)
    return read_prompts(path) if path.is_file() else []


def _first_of_each_kind(prompts: list[Prompt]) -> list[int]:
    """Numbers of the first unsafe, borderline and ordinary prompt."""
    first = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt.kind, index)
    return sorted(first.values())[:EXAMPLES]
