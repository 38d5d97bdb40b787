"""The report in the terminal: text, tables and answers; pictures are for the page.

Bold titles and wrapped lines are for people. Where the output goes into a pipe or a file, it is
plain text, a paragraph a line. What could steer the terminal is written out (`printable`).
"""

import os
import shutil
import sys
import textwrap

from data import printable
from report.blocks import Section, Shown, Table


def print_tables(sections: list[Section]) -> None:
    """Print all that is no picture."""
    for section in sections:
        print("\n" + _bold(f"=== {printable(section.title)}"))
        for block in section.blocks:
            if isinstance(block, str):
                print("\n" + _wrapped(block))
            elif isinstance(block, Shown):
                _print_shown(block)
            elif isinstance(block, Table):
                _print_table(block)


def _print_shown(shown: Shown) -> None:
    print(f"\n> {printable(shown.prompt)}")
    names = max(len(answer.name) for answer in shown.answers)
    verdicts = max(len(answer.verdict) for answer in shown.answers)
    for answer in shown.answers:
        line = f"  {answer.name:<{names}}  "
        if verdicts:
            line += f"{answer.verdict:<{verdicts}}  "
        print(printable(line + answer.text, one_line=True))


def _print_table(table: Table) -> None:
    print("\n" + _wrapped(table.caption))
    if table.small_print:
        print(_wrapped(table.small_print))
    lines = []
    for cells in (table.columns, *table.rows):
        lines.append([printable(cell, one_line=True) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        line = "  ".join(padded).rstrip()
        if table.wrap:
            indent = sum(widths[:-1]) + 2 * len(widths[:-1])  # below the last column
            line = _wrapped(line, indent)
        print(line)


def _is_terminal() -> bool:
    """Whether somebody looks at it."""
    return sys.stdout.isatty()


def _bold(text: str) -> str:
    if not _is_terminal() or "NO_COLOR" in os.environ:
        return text
    return f"\033[1m{text}\033[0m"


def _wrapped(text: str, indent: int = 0) -> str:
    """Lines as wide as the terminal, 100 columns at most; later lines are indented."""
    text = printable(text)
    if not _is_terminal():
        return text
    width = min(100, shutil.get_terminal_size().columns)
    width = max(width, indent + 20)
    lines = []
    for line in text.split("\n"):
        lines.append(textwrap.fill(line, width, subsequent_indent=" " * indent))
    return "\n".join(lines)
