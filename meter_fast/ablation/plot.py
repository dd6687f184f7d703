"""table.png: for each metric the paper's figures and ours, row by row, each on a scale of its own. Knows the content of
table.json and matplotlib."""

from pathlib import Path
from typing import Any

PAPER, OURS = "#8b95a5", "#2563c9"
LEAST_SPAN = 2.0  # per cent that a panel shows at least, so that nothing looks like a difference where there is none


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture: a row of panels with the paper's figures, below it one with ours (those metrics that we run;
    without any of ours, the paper's alone)."""
    from matplotlib.figure import Figure

    ours = result["metrics_of_ours"]
    quoted = [name for name in result["metrics"] if any(name in row["paper"] for row in result["rows"])]
    shown = ours or quoted
    bands = [("paper", "paper", PAPER)] * bool(set(shown) & set(quoted)) + [("ours", "ours", OURS)] * bool(ours)
    if not shown or not bands:
        bands, shown = [("ours", "ours", OURS)], list(result["metrics"])
    height = 0.9 + 0.34 * len(result["rows"])
    figure = Figure(figsize=(2.2 + 3.0 * len(shown), 0.5 + height * len(bands)), dpi=120, layout="constrained")
    grid = figure.subplots(len(bands), len(shown), squeeze=False, sharey=True)
    for axes, (key, said, colour) in zip(grid, bands, strict=True):
        for axis, metric in zip(axes, shown, strict=True):
            _panel(axis, result["rows"], metric, key, colour)
            axis.set_title(f"{metric}, {said}{_chance(result, metric) if key == 'ours' else ''}", fontsize=10)
    figure.suptitle(result["title"].split(" (")[0], fontsize=12)
    figure.savefig(path)


def _chance(result: dict[str, Any], metric: str) -> str:
    levels = [row["chance"][metric] for row in result["rows"] if metric in row["chance"]]
    return f" (chance {levels[0]:.1f})" if levels else ""


def _panel(axis: Any, rows: list[dict[str, Any]], metric: str, key: str, colour: str) -> None:
    """One dot a row, in per cent, the first row on top; rows without the figure stay empty."""
    points = [(row[key][metric], place) for place, row in enumerate(rows) if metric in row[key]]
    values = [value for value, _ in points] or [50.0]
    middle, reach = (min(values) + max(values)) / 2, max(LEAST_SPAN, max(values) - min(values)) / 2
    axis.set_xlim(middle - 1.2 * reach, middle + 1.5 * reach)  # numbers stand on the right of their dots
    axis.scatter([value for value, _ in points], [place for _, place in points], color=colour, zorder=3)
    for value, place in points:
        axis.annotate(f"{value:.1f}", (value, place), xytext=(6, 3), textcoords="offset points", fontsize=7)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.ticklabel_format(axis="x", useOffset=False)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="#e3e7ee")
    axis.spines[["top", "right"]].set_visible(False)
