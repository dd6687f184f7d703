"""Line charts as SVG text. Knows numbers and pixels; nothing of runs or scores.

Colours and fonts come from the page's style sheet (`report.style`), so charts follow a light or a dark page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30
MOST_POINTS = 300  # of a line; longer ones are averaged in as many bins


@dataclass(frozen=True)
class Series:
    """A named line. `tone` 1..6 picks its colour; `dots` draws points joined by a thin line instead of a curve."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    tone: int
    dots: bool = False


def per_cent(value: float) -> str:
    return f"{100 * value:.0f} %"


def short(value: float) -> str:
    """1234567 -> 1.2M, 1500 -> 1.5k, 0.25 -> 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from low to high, about `wanted` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def binned(xs: Sequence[float], ys: Sequence[float | None], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """The points that have a finite y; when there are more than `most`, averages of neighbours."""
    points = [(float(x), float(y)) for x, y in zip(xs, ys) if y is not None and math.isfinite(y)]
    if len(points) <= most:
        return points
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    bins = [points[a:b] for a, b in pairwise(edges)]
    return [tuple(sum(column) / len(part) for column in zip(*part)) for part in bins]


def smoothed(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Centred running mean over `span` points to either side, fewer at the ends."""
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(span, i, len(points) - 1 - i)
        near = points[i - reach : i + reach + 1]
        result.append((x, sum(y for _, y in near) / len(near)))
    return result


def line_chart(
    series: Sequence[Series], y_label: Callable[[float], str] = short, y_range: tuple[float, float] | None = None
) -> str:
    """An SVG of the series over the step. Curves are drawn faint as recorded and bold as a running mean."""
    drawn = [(s, binned(s.xs, s.ys)) for s in series]
    drawn = [(s, points) for s, points in drawn if points]
    if not drawn:
        return '<p class="quiet">nothing recorded</p>'
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_low, x_high = min(0.0, min(xs)), max(xs) or 1.0
    low, high = y_range or (min(0.0, min(ys)), max(ys) * 1.05 or 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return across, down

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart">']
    for y in ticks(low, high):
        _, down = at(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{y_label(y)}</text>')
    for x in ticks(x_low, x_high):
        across, _ = at(x, low)
        parts.append(f'<text class="tick" x="{across:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{short(x)}</text>')
    for s, points in drawn:
        parts.append(_dots(s, points, at) if s.dots else _curve(s, points, at))
    return "".join(parts) + "</svg>" + legend([s for s, _ in drawn])


def _path(points: Sequence[tuple[float, float]], at: Callable) -> str:
    return "M" + " L".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)


def _curve(s: Series, points: list[tuple[float, float]], at: Callable) -> str:
    mean = smoothed(points, max(1, len(points) // 50))
    return "".join(
        f'<path class="{kind} tone{s.tone}" d="{_path(line, at)}"/>' for kind, line in (("raw", points), ("mean", mean))
    )


def _dots(s: Series, points: list[tuple[float, float]], at: Callable) -> str:
    dots = "".join('<circle class="dot tone{}" cx="{:.1f}" cy="{:.1f}" r="4"/>'.format(s.tone, *at(*p)) for p in points)
    return f'<path class="joined tone{s.tone}" d="{_path(points, at)}"/>' + dots


def legend(series: Sequence[Series]) -> str:
    items = "".join(
        f'<li><i class="{"spot" if s.dots else "swatch"} tone{s.tone}"></i>{escape(s.name)}</li>' for s in series
    )
    return f'<ul class="legend">{items}</ul>'
