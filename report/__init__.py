"""What people look at: the tables in the terminal and the HTML page on the models in out/.

`eval.py` measures and hands its numbers over; nothing is measured here. The files:

    contents.py   the page from top to bottom
    opening.py    what a reader sees first: the models, the numbers of each, is this run healthy?
    training.py   what the stages logged while they trained
    progress.py   from version to version: wins, safety, scores
    catalogue.py  experiments, and what has not been run
    answers.py    answers side by side, each with its verdict
    models.py     the folders of out/: what each model is and what makes it
    numbers.py    reading logs, writing numbers as text
    blocks.py     what a page is made of: sections, tables, figures, answers
    page.py       all that as one HTML file; page.css has the looks, figures.py draws
    terminal.py   the same in the terminal
"""

from report.answers import answers_section, pick_shown
from report.blocks import Curve, Figure, Panel, Section, Shown, ShownAnswer, Table
from report.contents import sections
from report.models import PIPELINE, command
from report.numbers import families_table, key_numbers, number
from report.page import write_html
from report.terminal import print_tables

__all__ = [
    "PIPELINE",
    "Curve",
    "Figure",
    "Panel",
    "Section",
    "Shown",
    "ShownAnswer",
    "Table",
    "answers_section",
    "command",
    "families_table",
    "key_numbers",
    "number",
    "pick_shown",
    "print_tables",
    "sections",
    "write_html",
]
