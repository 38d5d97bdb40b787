"""What a report is made of: sections of text, tables, figures and answers.

They say what is shown. `page.py` makes HTML of them and `terminal.py` plain text.
"""

from pathlib import Path
from typing import NamedTuple


class Curve(NamedTuple):
    """One line of a panel; low and high make a band around it. x: numbers or names."""

    label: str
    x: list
    y: list
    low: list = []
    high: list = []
    style: str = "-"


class Panel(NamedTuple):
    """One small picture. level: a dotted horizontal line."""

    title: str
    curves: list[Curve]
    x: str = ""
    y: str = ""
    ylim: tuple = (None, None)
    level: float | None = None


class Figure(NamedTuple):
    """Pictures side by side (below one another on a phone), or a PNG file, under a caption.

    The caption says what to see; the small print says of what, and where the paper differs.
    """

    caption: str
    panels: list[Panel] = []
    file: Path | None = None
    small_print: str = ""


class Table(NamedTuple):
    """Rows of text under a caption, as above. The first column names the row.

    wrap: its cells hold sentences.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    small_print: str = ""
    wrap: bool = False


class ShownAnswer(NamedTuple):
    """An answer under its name. verdict: what the judges make of it; "": nobody has judged."""

    name: str
    text: str
    verdict: str = ""


class Shown(NamedTuple):
    """Several answers to one prompt."""

    prompt: str
    answers: list[ShownAnswer]


Block = str | Table | Figure | Shown  # a str is a paragraph, with `code` between backticks


class Section(NamedTuple):
    """A heading and what stands below it, in order."""

    title: str
    blocks: list[Block]
