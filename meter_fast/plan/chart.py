"""nodes.png: step time, samples a second and the share of communication on 1 to 256 nodes. Knows the content of the
plan and matplotlib."""

from pathlib import Path
from typing import Any

OURS, EVEN = "#2563c9", "#8b95a5"


def draw(plan: dict[str, Any], path: Path) -> None:
    """Write the picture. Numbers of nodes that the global batch does not divide over, or where nothing fits, stay
    empty."""
    from matplotlib.figure import Figure

    rows = [row for row in plan["nodes"] if row["micro_batch"]]
    places = {row["nodes"]: place for place, row in enumerate(plan["nodes"])}
    xs = [places[row["nodes"]] for row in rows]
    figure = Figure(figsize=(11, 3.4), dpi=120, layout="constrained")
    panels = (
        ("seconds a step", [row["step"] for row in rows]),
        ("samples a second", [row["samples_per_second"] for row in rows]),
        ("communication, per cent of a step", [100 * row["communication_share"] for row in rows]),
    )
    for axis, (title, ys) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot(xs, ys, "o-", color=OURS, markersize=4, label="expected")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(list(places.values()), [f"{nodes}" for nodes in places], fontsize=8)
        axis.set_xlabel(f"nodes of {plan['machine']['gpus_per_node']} GPUs", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(color="#e3e7ee")
        axis.spines[["top", "right"]].set_visible(False)
        if "communication" in title:
            axis.set_ylim(0, 100)
        elif rows:
            _even(axis, rows, xs, ys, title)
    engine = plan["engine"]
    figure.suptitle(
        f"{plan['command'][0]}, {plan['batch']['global']:,} samples a step, {plan['machine']['gpu']}, "
        f"ZeRO {engine['zero']}, at {100 * plan['assumed']['efficiency']:.0f} % of the peak",
        fontsize=11,
    )
    figure.savefig(path)


def _even(axis: Any, rows: list[dict[str, Any]], xs: list[int], ys: list[float], title: str) -> None:
    """What it would be if more nodes cost nothing."""
    gain = [row["nodes"] / rows[0]["nodes"] for row in rows]
    even = [ys[0] / g if title.startswith("seconds") else ys[0] * g for g in gain]
    axis.plot(xs, even, "--", color=EVEN, linewidth=1, label="in proportion to the nodes")
    axis.set_yscale("log")
    axis.legend(fontsize=7, frameon=False)
