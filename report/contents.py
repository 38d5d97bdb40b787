"""The report from top to bottom: first what to look at, then the story in the paper's order."""

from pathlib import Path

from report.answers import answers_section
from report.blocks import Section
from report.catalogue import experiments_section, missing_section
from report.opening import health_section, summary_section
from report.progress import drift_section, evolution_section, safety_section
from report.training import gatt_section, reward_section, rounds_section, sft_section

ORDER = (
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
)


def sections(metrics: dict, out: Path) -> list[Section]:
    """The whole report; a section without anything to show is left out.

    Args:
        metrics: as `eval.py` writes them into metrics.json.
        out: the folder that the models and their logs are in.
    """
    made = [make_section(metrics, out) for make_section in ORDER]
    return [section for section in made if section.blocks]
