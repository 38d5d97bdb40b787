"""The figures of the page: small SVG pictures, drawn by matplotlib."""

import html
import io
import re

from data import printable
from report.blocks import Curve, Panel

LOOKS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,  # a name may hold a dollar
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(panel: Panel) -> str:
    """A panel as SVG.

    Its ids are made from its content, so that two pictures in one page cannot take each other's.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(LOOKS | {"svg.hashsalt": repr(panel)}):
        figure, axes = plt.subplots(figsize=(4.4, 3.1), layout="constrained")
        names = _names(panel)
        for curve in panel.curves:
            _draw_curve(axes, curve, names)
        if names:
            ticks = [_short(printable(name)) for name in names]
            axes.set_xticks(range(len(names)), ticks, fontsize=8)
        if panel.level is not None:
            axes.axhline(panel.level, color="grey", linestyle=":", linewidth=1)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, ylim=panel.ylim)
        if len(panel.curves) > 1:
            axes.legend(fontsize=7, framealpha=0.6)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return _embedded(target.getvalue(), panel.title)


def _names(panel: Panel) -> list[str]:
    """The names on the x-axis, in their order; none where x is a number."""
    names = []
    for curve in panel.curves:
        for x in curve.x:
            if isinstance(x, str) and x not in names:
                names.append(x)
    return names


def _draw_curve(axes, curve: Curve, names: list[str]) -> None:
    """A line, and a band where the curve has ends."""
    x = curve.x
    if names:
        x = [names.index(name) for name in curve.x]
    label = printable(curve.label)
    [line] = axes.plot(x, curve.y, curve.style, label=label, markersize=4, linewidth=1.5)
    points = zip(x, curve.low, curve.high, strict=False)
    known = [point for point in points if None not in point]
    if known:
        band = zip(*known, strict=True)  # x, low, high
        axes.fill_between(*band, alpha=0.18, color=line.get_color(), linewidth=0)


def _short(name: str) -> str:
    """A version's name as a tick: v4, or two lines for a longer one.

    >>> _short("rlhf-v4-ppo")
    'v4\\nppo'
    """
    return name.removeprefix("rlhf-").replace("-no", "\nno").replace("-ppo", "\nppo")


def _embedded(svg: str, title: str) -> str:
    """The picture as a part of a page: without a head of its own, as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    label = html.escape(title, quote=True)
    start = rf'<svg viewBox="\1" role="img" aria-label="{label}">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', start, svg, count=1, flags=re.S)
