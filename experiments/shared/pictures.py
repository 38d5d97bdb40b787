"""Pictures of the experiments: panels side by side, and curves over seeds."""

from pathlib import Path

from experiments.shared.over_seeds import mean_curve


def draw_panels(count: int, width: float = 4.5, height: float = 3.4):
    """A figure and its `count` panels side by side, each so many inches wide and high."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * count, height)
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    return figure, list(panels[0])


def save_picture(figure, file: Path) -> None:
    """Write the figure as a PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def draw_curves(panel, x: list, curves: list[list], label: str, **style) -> None:
    """One curve of intervals for each seed, thin, and their mean, thick.

    With a single seed its interval over items stands instead of the thin curves.
    """
    if len(curves) == 1:
        low = [point[1] for point in curves[0]]
        high = [point[2] for point in curves[0]]
        panel.fill_between(x, low, high, alpha=0.15, color=style.get("color"))
    else:
        for curve in curves:
            means = [point[0] for point in curve]
            panel.plot(x, means, alpha=0.35, linewidth=0.8, **style)
    panel.plot(x, mean_curve(curves), linewidth=2, marker=".", label=label, **style)
