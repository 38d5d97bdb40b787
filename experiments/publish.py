"""docs/results.md, made from experiments/results: no number in it is typed by hand.

python -m experiments.publish
"""

import argparse
import html
import re
from pathlib import Path

import eval as measures
from data import world
from experiments import reference, seeds
from experiments.shared import results
from experiments.shared.index import CHAPTERS, Experiment
from experiments.shared.over_seeds import plus_minus
from report import Figure, Section, Table
from report.blocks import Block
from runtime import atomic_write, run

DOCS = Path(__file__).parent.parent / "docs" / "results.md"
PICTURES = "../experiments/results"  # as seen from docs/

INTRODUCTION = f"""\
# Results

This page is made by `python -m experiments.publish` from `experiments/results`. No number is typed
by hand. It follows the order of the paper. Each section opens with its answer and ends with the
command that makes it again.

What the words mean:

- **Annotator**: the program that stands in for people. It knows the toy world
  (`python -m data.world --rules`) and judges the answers here.
- **Helpfulness, safety**: its scores, from 0 to 1, of answers to harmless prompts and to unsafe
  ones. Half of helpfulness is for what an answer says, half for how: an opener, an extra sentence,
  a closer.
- **Content**: that first half alone, on harmless prompts, from 0 to 1. **Right**: the share of
  answers whose content has full credit.
- **SFT**: the model after supervised fine-tuning, on written demonstrations. **V1** to **V4**
  follow it, each after one more round of RLHF (reinforcement learning from human feedback): a round
  keeps the sampled answers that reward models score highest, and trains on them. **V4-PPO** is V4
  after PPO (§3.2.3), **V5** is V4-PPO after one more round.
- **Win rate**: the share of prompts to which the first model's answer scores higher than the
  second's. Ties, scores within {world.TIE:g}, count half.
- **Temperature**: how freely answers are sampled. 1 is the model as it is, 0.4 is cool, and greedy
  always takes the likeliest token. Cool and greedy answers show what a model knows.
- **Seed**: one whole training with its own random numbers. What is claimed of training is claimed
  over seeds: a mean ± half of its 95 % interval over seeds (Student's t), or the mean with both
  ends in brackets. An interval can go beyond 0 and 1.
- **Corrected**: where several numbers are read side by side, each interval is widened so that all
  hold together (Bonferroni). With three seeds, little is then **significant**, that is, little lies
  wholly on one side of "no difference".
- **Test prompts** were used for no choice, **dev prompts** were.

The digits are one machine's. Seed, threads, torch and the kind of processor decide the last bits
of a sum, and training amplifies them: take a seed as a draw, and compare means. *Does RLHF make
answers better?* and the reference runs are of one machine, all other sections were made earlier on
another, by the same code. So SFT's numbers differ a little between them.
"""


# ---- the first section ----


def opening() -> Section:
    """What RLHF does here: content minus SFT's, in the default chain and in the whole pipeline."""
    chain = results.published("seeds")
    pipeline = results.published("reference")
    gaps = {}  # {(row, temperature): a difference per seed}
    for name, values in _chain_gaps(chain).items():
        version, _, temperature = name.partition(", ")
        version = version.removeprefix("rlhf-").upper()
        gaps[f"{version}, default chain", temperature] = values
    for name, values in reference.differences(pipeline).items():
        version, _, temperature = name.partition(", ")
        if version in ("V4", "V4-PPO", "V5"):
            gaps[f"{version}, whole pipeline", temperature] = values
    rows = []
    for version in dict.fromkeys(version for version, _ in gaps):
        cells = []
        for temperature in reference.TEMPERATURES:
            cells.append(plus_minus(measures.interval(gaps[version, temperature])))
        rows.append([version, *cells])
    table = Table(
        "Content minus SFT's on the same test prompts: a minus means that the version knows less.",
        ["", *reference.TEMPERATURES],
        rows,
        f"Means over {len(chain)} seeds that no choice was made on, ± half of the 95 % interval"
        " over seeds, each alone. The whole pipeline has Ghost Attention's dialogs in V4.",
    )
    why = (
        "Helpfulness pays for manner as well as for truth, and the first reward model sees manner"
        " only. At temperature 1 the loss is hidden: both models make random mistakes there, and"
        " the later one fewer, since RLHF also sharpens. Cool and greedy answers show it. So"
        " content stands beside every measure of helpfulness where it was taken."
    )
    return Section("In short", [seeds.headline(chain), table, why])


def _chain_gaps(chain: dict) -> dict[str, list[float]]:
    return seeds.claims(chain, list(chain))["Content, difference from SFT"]


# ---- the page ----


def page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, as_markdown(opening(), level=2)]
    for chapter in CHAPTERS:
        parts.append(f"## {chapter.title}\n\n{_text(chapter.text)}\n")
        parts += [_section(experiment) for experiment in chapter.experiments]
    return "\n".join(parts)


def _section(experiment: Experiment) -> str:
    """An experiment's section, and how to make it again."""
    made = experiment.load().section(results.published(experiment.result))
    source = (
        f"Made by `{experiment.command}`; numbers:"
        f" [{experiment.result}.json]({PICTURES}/{experiment.result}.json)."
    )
    return f"{as_markdown(made, level=3)}\n{source}\n"


def as_markdown(section: Section, level: int) -> str:
    """A section under a heading of this level."""
    parts = [f"{'#' * level} {_text(section.title)}\n"]
    parts += [_block(block) for block in section.blocks]
    return "\n".join(parts)


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"{_text(block)}\n"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return f"![{_text(block.caption)}]({PICTURES}/{block.file.name})\n"
    raise TypeError(f"no Markdown for {type(block).__name__}")


def _table(table: Table) -> str:
    lines = [f"{_text(table.caption)}\n", _row(table.columns), "|---" * len(table.columns) + "|"]
    lines += [_row(cells) for cells in table.rows]
    if table.small_print:
        lines.append(f"\n{_text(table.small_print)}")
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    escaped = [_text(cell).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _text(text: str) -> str:
    """Text that Markdown shows as it stands; `code` and *emphasis* stay marked.

    >>> _text("a < b, `c < d`")
    'a &lt; b, `c < d`'
    """
    parts = re.split(r"(`[^`]*`)", text)
    shown = []
    for part in parts:
        shown.append(part if part.startswith("`") else html.escape(part, quote=False))
    return "".join(shown)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    DOCS.parent.mkdir(exist_ok=True)
    with atomic_write(DOCS) as file:
        file.write(page().encode())
    print(f"wrote {DOCS}; its words do not follow the numbers: where these are new, read it once")


if __name__ == "__main__":
    run(main)
