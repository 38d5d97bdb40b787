"""How a report is shown: sections of text, tables, figures and answers, in the terminal and as one
HTML file.

Figures are small SVG pictures, drawn by matplotlib where it is installed and put into the page,
which needs no network.
"""

import base64
import html
import io
import re
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoint import atomic_write


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
    """Pictures side by side (below one another on a phone), or a PNG file, with a caption."""

    caption: str
    panels: list[Panel] = []
    file: Path | None = None


class Table(NamedTuple):
    """Rows of text; the first column names the row. wrap: its cells hold sentences."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


class Shown(NamedTuple):
    """The answers of several models to one prompt."""

    prompt: str
    answers: dict[str, str]


class Section(NamedTuple):
    """A heading and, in order, text (str, `code` between backticks), tables, figures and answers.
    """

    title: str
    blocks: list


# ---- the terminal ----


def print_tables(found: list[Section]) -> None:
    """Text and tables, as far as they are not pictures."""
    for section in found:
        print(f"\n=== {section.title}")
        for block in section.blocks:
            if isinstance(block, str):
                print(f"\n{block}")
            elif isinstance(block, Shown):
                width = max(map(len, block.answers))
                print(
                    f"\n> {block.prompt}\n"
                    + "\n".join(
                        f"  {name:<{width}}  {text}" for name, text in block.answers.items()
                    )
                )
            elif isinstance(block, Table):
                rows = [block.columns, *block.rows]
                widths = [max(len(row[i]) for row in rows) for i in range(len(block.columns))]
                print(f"\n{block.caption}")
                for row in rows:
                    print(
                        "  ".join(
                            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
                        ).rstrip()
                    )


# ---- the page ----

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2563ab; }
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 0 1rem 4rem;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
nav { font-size: .9rem; display: flex; flex-wrap: wrap; gap: .2rem .9rem; }
a { color: var(--accent); }
figure { margin: 1.2rem 0; }
figcaption { font-size: .85rem; opacity: .85; margin-top: .4rem; max-width: 60rem; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 26rem));
  gap: .6rem;
}
.panels svg, figure img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure img { max-width: 56rem; }
.box {
  overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line);
  border-radius: 4px;
}
table {
  border-collapse: collapse; font-size: .85rem; white-space: nowrap;
  font-variant-numeric: tabular-nums;
}
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
th { background: var(--soft); }
td:first-child, th:first-child { position: sticky; left: 0; background: Canvas; }
.answers {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11.5rem), 1fr));
  gap: 0 1.2rem; margin: 0;
}
.shown {
  border: 1px solid var(--line); border-radius: 4px; padding: .5rem .8rem; margin: .7rem 0;
}
.shown h3 { font-size: 1rem; margin: 0 0 .3rem; }
.answers b { font-size: .75rem; opacity: .7; display: block; }
.answers p { margin: .15rem 0 .4rem; white-space: pre-line; }
code { background: var(--soft); padding: 0 .25em; font-size: .9em; }
"""


def marked_up(text: str) -> str:
    """Text as HTML, what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def draw(panel: Panel) -> str:
    """A panel as SVG. Ids are made from its content, so that two pictures in one page cannot take
    each other's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": repr(panel),
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure, axes = plt.subplots(figsize=(4.4, 3.1), layout="constrained")
        names = list(
            dict.fromkeys(x for curve in panel.curves for x in curve.x if isinstance(x, str))
        )
        for curve in panel.curves:
            x = [names.index(name) for name in curve.x] if names else curve.x
            [line] = axes.plot(
                x, curve.y, curve.style, label=curve.label, markersize=4, linewidth=1.5
            )
            bands = [row for row in zip(x, curve.low, curve.high, strict=False) if None not in row]
            if bands:
                axes.fill_between(
                    *zip(*bands, strict=True), alpha=0.18, color=line.get_color(), linewidth=0
                )
        if names:
            axes.set_xticks(
                range(len(names)),
                [
                    name.removeprefix("rlhf-").replace("-no", "\nno").replace("-ppo", "\nppo")
                    for name in names
                ],
                fontsize=8,
            )
        if panel.level is not None:
            axes.axhline(panel.level, color="grey", linestyle=":", linewidth=1)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, ylim=panel.ylim)
        if len(panel.curves) > 1:
            axes.legend(fontsize=7, framealpha=0.6)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = target.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    label = html.escape(panel.title, quote=True)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{label}">',
        svg,
        count=1,
        flags=re.S,
    )


def page(found: list[Section]) -> str:
    """The whole page."""
    try:
        import matplotlib  # noqa: F401

        picture = draw
    except ImportError:

        def picture(panel: Panel) -> str:
            return (
                f"<p>{html.escape(panel.title)}: `pip install matplotlib` and run eval.py again</p>"
            )

    parts = []
    for n, section in enumerate(found):
        parts.append(f'<h2 id="s{n}">{html.escape(section.title)}</h2>')
        for block in section.blocks:
            if isinstance(block, str):
                parts.append(f"<p>{marked_up(block)}</p>")
            elif isinstance(block, Shown):
                answers = "".join(
                    f"<div><b>{html.escape(name)}</b><p>{html.escape(text)}</p></div>"
                    for name, text in block.answers.items()
                )
                parts.append(
                    f'<div class="shown"><h3>{html.escape(block.prompt)}</h3><div'
                    f' class="answers">{answers}</div></div>'
                )
            elif isinstance(block, Table):
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.columns)
                body = "".join(
                    "<tr>" + "".join(f"<td>{marked_up(cell)}</td>" for cell in row) + "</tr>"
                    for row in block.rows
                )
                parts.append(
                    '<figure><div class="box"><table>'
                    f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
                    f"<figcaption>{marked_up(block.caption)}</figcaption></figure>"
                )
            elif block.file:
                data = base64.b64encode(block.file.read_bytes()).decode()
                parts.append(
                    f'<figure><img alt="{html.escape(block.file.stem)}"'
                    f' src="data:image/png;base64,{data}">'
                    f"<figcaption>{marked_up(block.caption)}</figcaption></figure>"
                )
            else:
                drawn = "".join(f"<div>{picture(panel)}</div>" for panel in block.panels)
                parts.append(
                    f'<figure><div class="panels">{drawn}</div>'
                    f"<figcaption>{marked_up(block.caption)}</figcaption></figure>"
                )
    contents = "".join(
        f'<a href="#s{n}">{html.escape(section.title)}</a>' for n, section in enumerate(found)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><title>Llama 2-Chat from scratch: a'
        f" run</title><style>{STYLE}</style></head><body><h1>Llama 2-Chat from scratch: what this"
        f" run made</h1><nav>{contents}</nav>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def write_html(path: Path, found: list[Section]) -> None:
    """The report as one file that needs nothing else."""
    text = page(found)
    with atomic_write(path) as file:
        file.write(text.encode())
