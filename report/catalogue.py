"""The experiments with their pictures, and what has not been run."""

import ast
from pathlib import Path
from typing import NamedTuple

from report.blocks import Block, Figure, Section, Table
from report.models import PIPELINE, command

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NO_SCRIPTS = ("__init__", "__main__", "all", "publish")  # of the files there


class Script(NamedTuple):
    """An experiment: the first line of its docstring, and its files in `experiments/results`."""

    title: str
    results: list[Path]


def scripts() -> dict[str, Script]:
    """{name: script} of all experiments; a result belongs to the script whose name it begins."""
    results = []
    if EXPERIMENTS.is_dir():
        results = sorted((EXPERIMENTS / "results").glob("*"))
    table = {}
    for path in sorted(EXPERIMENTS.glob("*.py")):
        if path.stem in NO_SCRIPTS:
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
        first_paragraph = docstring.split("\n\n")[0] if docstring else path.stem
        title = " ".join(first_paragraph.split())
        belonging = [file for file in results if _belongs(file.stem, path.stem)]
        table[path.stem] = Script(title, belonging)
    return table


def _belongs(result: str, script: str) -> bool:
    """Whether a result is a script's, by their names.

    >>> _belongs("table08", "table08_accuracy_by_rating"), _belongs("seeds-tiny", "seeds")
    (True, True)
    """
    if result == script or script.startswith(result + "_"):
        return True
    return result.startswith((script + "-", script + "_"))


def experiments_section(metrics: dict, out: Path) -> Section:
    """Every experiment that has results."""
    blocks: list[Block] = []
    for name, script in scripts().items():
        pictures = [file for file in script.results if file.suffix == ".png"]
        numbers = []
        for file in script.results:
            if file.suffix == ".json":
                numbers.append(f"`experiments/results/{file.name}`")
        source = f"{script.title} `experiments/{name}.py`; numbers"
        for file in pictures:
            blocks.append(Figure(f"{source}: {', '.join(numbers)}.", file=file))
        if script.results and not pictures:
            blocks.append(f"{source}, without a picture: {', '.join(numbers)}.")
    if not blocks:
        return Section("Experiments", [])
    introduction = (
        "Each experiment asks one question with larger or repeated runs; these results come with"
        " the repository and are not of this run."
    )
    return Section("Experiments", [introduction, *blocks])


def missing_section(metrics: dict, out: Path) -> Section:
    """The stages and experiments without results, each with its command."""
    title = "What has not been run"
    rows = []
    for name in PIPELINE:
        if name not in metrics["stages"] and not _judges(name, metrics):
            rows.append([name, f"`{command(name, out)}`"])
    for name, script in scripts().items():
        if not script.results:
            rows.append([f"experiments/{name}", f"`python -m experiments.{name}`"])
    if not rows:
        return Section(title, ["Everything was run."])
    introduction = "Nothing is wrong with these; they are waiting for you."
    caption = (
        "Each with the command that makes it. `rlhf-v5-no-ppo`, `rlhf-v5-ppo` and `second` are"
        " controls, which the pipeline can do without."
    )
    return Section(title, [introduction, Table(caption, ["", "command"], rows)])


def _judges(name: str, metrics: dict) -> bool:
    """Whether the second reward models are there: their folders lie deeper than the stages'."""
    return name == "second" and "second reward models" in metrics["judges"]
