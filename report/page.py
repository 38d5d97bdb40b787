"""The page: sections of text, tables, figures and answers as one HTML file that needs no network.

Tables, figures and answers are blocks (`blocks.py`); `page.css` has the looks.
"""

import base64
import html
import re
from pathlib import Path

from data import printable
from report.blocks import Block, Figure, Panel, Section, Shown, Table
from report.figures import draw
from runtime.checkpoint import atomic_write

TITLE = "Llama 2-Chat from scratch: what this run made"
LONG = 30  # rows; a longer table opens on a click


def write_html(path: Path, sections: list[Section]) -> None:
    """The report as one file that needs nothing else."""
    text = page(sections)
    with atomic_write(path) as file:
        file.write(text.encode())


def page(sections: list[Section]) -> str:
    """The whole page."""
    style = (Path(__file__).parent / "page.css").read_text("utf-8")
    links = []
    bodies = []
    for number, section in enumerate(sections):
        title = _escaped(section.title)
        links.append(f'<a href="#s{number}">{title}</a>')
        bodies.append(f'<h2 id="s{number}">{title}</h2>')
        for block in section.blocks:
            bodies.append(_block(block))
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{style}</style>"
    )
    contents = f"<details><summary>Contents</summary><nav>{''.join(links)}</nav></details>"
    body = "\n".join([f"<h1>{TITLE}</h1>", contents, *bodies])
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{body}</main></body>'
        "</html>\n"
    )


# ---- blocks ----


def _escaped(text: str) -> str:
    """Text as HTML. What could turn its direction, or can stand in no file, is written out."""
    return html.escape(printable(text))


def marked_up(text: str) -> str:
    """Text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _escaped(text))


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{marked_up(block)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Shown):
        return _shown(block)
    return _figure(block)


def _table(table: Table) -> str:
    """The table in a box that scrolls sideways where the screen is too narrow."""
    head = "".join(f"<th>{_escaped(cell)}</th>" for cell in table.columns)
    lines = []
    for row in table.rows:
        cells = "".join(f"<td>{marked_up(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    kind = "sentences" if table.wrap else "numbers"
    box = (
        f'<div class="box" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    if len(lines) > LONG:
        box = f"<details><summary>Show all {len(lines)} rows</summary>{box}</details>"
    return f"<figure>{_caption(table)}{box}</figure>"


def _shown(shown: Shown) -> str:
    answers = []
    for answer in shown.answers:
        name = f"<b>{_escaped(answer.name)}</b>"
        verdict = f"<i>{_escaped(answer.verdict)}</i>" if answer.verdict else ""
        answers.append(f"<div>{name}{verdict}<p>{_escaped(answer.text)}</p></div>")
    return (
        f'<div class="shown"><h3>{_escaped(shown.prompt)}</h3>'
        f'<div class="answers">{"".join(answers)}</div></div>'
    )


def _figure(figure: Figure) -> str:
    if figure.file:
        data = base64.b64encode(figure.file.read_bytes()).decode()
        name = _escaped(figure.file.stem)
        picture = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    else:
        drawn = "".join(f"<div>{_picture(panel)}</div>" for panel in figure.panels)
        picture = f'<div class="panels">{drawn}</div>'
    return f"<figure>{_caption(figure)}{picture}</figure>"


def _caption(block: Table | Figure) -> str:
    small_print = ""
    if block.small_print:
        small_print = f"<small>{marked_up(block.small_print)}</small>"
    return f"<figcaption>{marked_up(block.caption)}{small_print}</figcaption>"


def _picture(panel: Panel) -> str:
    """The panel as SVG, or how to get it where matplotlib is missing."""
    try:
        return draw(panel)
    except ImportError:
        title = _escaped(panel.title)
        return f"<p>{title}: `pip install matplotlib` and run eval.py again</p>"
