"""Pictures and Markdown tables of what the benchmarks have written.

    python -m benchmarks.plots [--out benchmarks/results]

Reads the CSV files under `benchmarks/results`; of each case the newest run on each device counts. Ratios are made of
the rows of one run alone (`record.runs` tells runs apart). Writes tables.md, step_time.png (how many times fewer FLOPs,
less time and less memory each training step takes than the plain form) and scaling.png (how cost grows along each
axis). A file that is not there is left out, and said. Knows results; runs no benchmark.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Run, runs

PLAIN = "plain"
COMPARED = ("step_time", "pretrain_step", "retrieval", "latency")  # files with a plain side
SHOWN = {"flops_per_sample": "FLOPs", "time_per_step": "time", "peak_memory": "peak memory"}
COLOURS = ("#8b95a5", "#2563c9", "#d9661f", "#1d9a6c", "#9a4bc4")
LOWER_IS_BETTER = ("ms", "B", "FLOP")
SCALES = {"ms": (1.0, "ms"), "B": (1e6, "MB"), "FLOP": (1e9, "GFLOP"), "FLOP/s": (1e12, "TFLOP/s")}
EXPONENT = "exponent"


def newest(found: Sequence[Run]) -> list[Run]:
    """The last run of each case on each device, in the order of their cases."""
    kept: dict[tuple[str, str, str], Run] = {}
    for run in found:
        kept[run.machine, run.device, run.case] = run
    return list(kept.values())


def ratios(run: Run) -> dict[str, dict[str, float]]:
    """Of each side but the plain one, how many times less than that it takes of each metric; both of one run."""
    plain = run.values.get(PLAIN, {})
    return {
        variant: {
            metric: plain[metric] / value
            for metric, value in values.items()
            if run.units[metric] in LOWER_IS_BETTER and metric in plain and value
        }
        for variant, values in run.values.items()
        if variant != PLAIN
    }


def number(value: float, unit: str) -> str:
    """123456789 B -> 123 MB."""
    scale, name = SCALES.get(unit, (1.0, "" if unit == "1" else unit))
    return f"{value / scale:,.4g} {name}".strip() if value / scale < 1e4 else f"{value / scale:,.0f} {name}".strip()


def table(found: Sequence[Run]) -> str:
    """A Markdown table: a line for each side of each run, each number with how many times less than plain it is."""
    metrics = list(dict.fromkeys(metric for run in found for values in run.values.values() for metric in values))
    lines = ["| case | side | " + " | ".join(name.replace("_", " ") for name in metrics) + " | where |"]
    lines.append("|---|---|" + "---:|" * len(metrics) + "---|")
    for run in found:
        less = ratios(run)
        for variant, values in run.values.items():
            cells = [
                (number(values[m], run.units[m]) if m in values else "")
                + (f" (**{less[variant][m]:.2f} x**)" if m in less.get(variant, {}) else "")
                for m in metrics
            ]
            where = f"{run.machine}, {run.device}, {run.date}, `{run.commit}`"
            lines.append(f"| {run.case} | {variant} | " + " | ".join(cells) + f" | {where} |")
    return "\n".join(lines) + "\n"


def timed(found: Sequence[Run]) -> list[tuple[str, dict[str, float]]]:
    """Each side of ours that was timed, the latest first: what and where it is, in words, and how many times less than
    the plain form it takes."""
    return [
        (f"{run.case.split(' text ')[0]}, {variant}\n{run.machine}, {run.device}, {run.date}, {run.commit}", less)
        for run in sorted(found, key=lambda run: run.date, reverse=True)
        for variant, less in ratios(run).items()
        if "time_per_step" in less and not variant.startswith(PLAIN)
    ]


def draw_steps(found: Sequence[Run], path: Path) -> None:
    """A group of bars for each of `timed`."""
    from matplotlib.figure import Figure

    bars = timed(found)
    figure = Figure(figsize=(9, 0.9 + 0.62 * len(bars)), dpi=120, layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(SHOWN)
    for shift, (metric, said) in enumerate(SHOWN.items()):
        places = [place + (shift - 1) * height for place, (_, less) in enumerate(bars) if metric in less]
        values = [less[metric] for _, less in bars if metric in less]
        if not values:
            continue
        drawn = axis.barh(places, values, height, color=COLOURS[1 + shift], label=f"{said}, times less")
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=7)
    axis.axvline(1, color=COLOURS[0], linewidth=1)
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_title("A training step against the published procedure, same pairs", fontsize=10)
    _finish(axis)
    figure.savefig(path)


def draw_scaling(found: Sequence[Run], path: Path) -> None:
    """A panel for each axis: each metric relative to its first point, and its exponent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(found), 3.8), dpi=120, layout="constrained")
    for axis, run in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        points = {float(place): values for place, values in run.values.items() if place != EXPONENT}
        slopes = run.values.get(EXPONENT, {})
        for colour, metric in zip(COLOURS, next(iter(points.values()))):
            first = next(iter(points.values()))[metric]
            said = f"{metric.replace('_', ' ')}: {slopes[f'exponent_of_{metric}']:.2f}"
            axis.plot(list(points), [one[metric] / first for one in points.values()], "o-", color=colour, label=said)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(list(points), [f"{place:g}" for place in points])
        axis.set_title(run.case, fontsize=9)
        _finish(axis)
    figure.suptitle("Cost of a step, and exponents", fontsize=10)
    figure.savefig(path)


def _finish(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.grid(color="#e3e7ee")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, help="folder to write to; that of the CSV files by default")
    arguments = parser.parse_args()
    out = arguments.out or arguments.results
    out.mkdir(parents=True, exist_ok=True)
    text = []
    for name in (*COMPARED, "scaling"):
        path = arguments.results / f"{name}.csv"
        if not path.is_file():
            print(f"no {path}: left out")
            continue
        found = newest(runs(path))
        text.append(f"## {name}\n\n{table(found)}")
        if name in ("step_time", "scaling"):
            (draw_steps if name == "step_time" else draw_scaling)(found, out / f"{name}.png")
            print(f"written: {out / name}.png")
    (out / "tables.md").write_text("\n".join(text))
    print(f"written: {out / 'tables.md'}")


if __name__ == "__main__":
    main()
