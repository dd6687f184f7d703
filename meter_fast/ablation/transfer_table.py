"""The table of what pre-training is worth, from the files that the stages left: table.json for programs, table.md and
table.png for people.

Knows transfer plans and scores. Knows nothing of how stages are run.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meter_fast.ablation.records import facts_of, pipe_table, runs_text, scores_of, status_of
from meter_fast.ablation.transfer import PRETRAINED, SCORE, SCRATCH, ZERO_SHOT, TransferPlan, TransferRow
from meter_fast.training.monitor import replace_text

SAID = {ZERO_SHOT: "zero-shot", SCRATCH: "from scratch", PRETRAINED: "pre-trained"}
COLOURS = {ZERO_SHOT: "#d98b1f", SCRATCH: "#8b95a5", PRETRAINED: "#2563c9"}
METRICS = {
    "VQAv2 score": ("vqa", "score"),
    "NLVR2 accuracy": ("nlvr2", "accuracy"),
    "SNLI-VE accuracy": ("snli_ve", "accuracy"),
    "TR@1": ("retrieval", "tr_r1"),
    "IR@1": ("retrieval", "ir_r1"),
}
"""Name of a figure -> (task, its key in the scores)."""


def write_transfer_table(plan: TransferPlan) -> dict[str, Any]:
    """Write table.json, table.md and table.png into the plan's folder; returns what table.json holds."""
    result = collect_transfer(plan)
    replace_text(plan.folder / "table.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    replace_text(plan.folder / "table.md", transfer_markdown(result))
    draw_transfer(result, plan.folder / "table.png")
    return result


def collect_transfer(plan: TransferPlan) -> dict[str, Any]:
    """Everything that is known of the rows so far. Figures are in per cent."""
    rows = [_row(row) for row in plan.rows]
    return {"size": plan.size, "init": plan.init, "summary": _summary(rows), "rows": rows}


def _row(row: TransferRow) -> dict[str, Any]:
    status, message = status_of(row)
    scores = scores_of(row).get(SCORE)
    figures = {name: _figure(scores, *place) for name, place in METRICS.items() if scores and place[0] == row.task}
    seed = "" if row.seed is None else f", seed {row.seed}"
    return {
        "name": row.name,
        "label": f"{row.task}, {SAID[row.start]}{seed}",
        "task": row.task,
        "start": row.start,
        "seed": row.seed,
        "status": status,
        "message": message,
        "figures": figures,
        "scores": scores,
        "stages": {stage.name: facts_of(stage) for stage in row.stages},
    }


def _figure(scores: dict[str, Any], task: str, key: str) -> dict[str, float]:
    """value, and where they are known chance and exchanged, the score with other pictures."""
    if task == "retrieval":
        return {"value": 100 * scores["retrieval"][key], "chance": 100 * scores["chance"][key]}
    found = scores[task]["all"]
    return {"value": 100 * found[key]} | {
        name: 100 * found[name] for name in ("chance", "exchanged") if found.get(name) is not None
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By metric: by start the mean, least, most and number of seeds; chance; exchanged of the pre-trained."""
    summary: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        found = [(row["start"], row["figures"][metric]) for row in rows if metric in row["figures"]]
        if not found:
            continue
        starts = {start: [figure["value"] for own, figure in found if own == start] for start in SAID}
        levels = [figure["chance"] for _, figure in found if "chance" in figure]
        others = [f["exchanged"] for start, f in found if start == PRETRAINED and "exchanged" in f]
        summary[metric] = {
            "starts": {start: _spread(values) for start, values in starts.items() if values},
            "chance": levels[0] if levels else None,
            "exchanged": _spread(others) if others else None,
        }
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values), "seeds": len(values)}


# ------------------------------------------------------------------------------------------------------------- wording


def transfer_markdown(result: dict[str, Any]) -> str:
    """table.md."""
    parts = [
        "# What pre-training is worth",
        f"Fine-tuned from {result['init']} and, on the same budget, from scratch. Size {result['size']}. Per cent, on "
        "held-out data; of several seeds the mean, and from the least to the most.",
        _main(result),
        _notes(result),
        _by_seed(result),
        runs_text(result["rows"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _main(result: dict[str, Any]) -> str:
    head = ["", "chance", *SAID.values(), "pre-trained, with other pictures"]
    body = [
        [
            metric,
            "-" if found["chance"] is None else f"{found['chance']:.1f}",
            *(_said(found["starts"].get(start)) for start in SAID),
            _said(found["exchanged"]),
        ]
        for metric, found in result["summary"].items()
    ]
    return pipe_table(head, body) if body else "No row is done yet."


def _said(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    more = f" ({spread['least']:.1f} to {spread['most']:.1f})" if spread["seeds"] > 1 else ""
    return f"{spread['mean']:.1f}{more}"


def _notes(result: dict[str, Any]) -> str:
    notes = [
        "With other pictures: the same model, asked about pictures that belong to other texts. What is left is what "
        "the texts alone tell."
    ]
    done = [row["scores"] for row in result["rows"] if row["scores"]]
    ranked = next((scores for scores in done if scores["task"] == "retrieval"), None)
    if ranked is not None:
        notes.append(
            f"Retrieval: {ranked['pictures']:,} pictures of split {ranked['split']}, {ranked['captions']:,} captions, "
            f"{ranked['different_captions']:,} of them different; only a caption's own picture counts."
        )
    for task in ("vqa", "nlvr2", "snli_ve"):
        scores = next((scores for scores in done if scores["task"] == task), None)
        if scores is not None:
            notes.append(f"{task}: {scores['pairs']:,} of {scores['split']}.")
    notes += [f"**{row['label']}** failed in {row['message']}" for row in result["rows"] if row["status"] == "failed"]
    missing = [row["label"] for row in result["rows"] if row["status"] == "not run"]
    notes += [f"Not run yet: {'; '.join(missing)}."] if missing else []
    return "\n".join(f"- {note}" for note in notes)


def _by_seed(result: dict[str, Any]) -> str:
    """Every row's own figures."""
    body = [
        [row["label"], metric, f"{figure['value']:.2f}", f"{figure['exchanged']:.2f}" if "exchanged" in figure else "-"]
        for row in result["rows"]
        for metric, figure in row["figures"].items()
    ]
    return pipe_table(["row", "figure", "value", "with other pictures"], body) if body else ""


# -------------------------------------------------------------------------------------------------------------- picture


def draw_transfer(result: dict[str, Any], path: Path) -> None:
    """A panel for each figure, a dot for each row, a line at chance."""
    from matplotlib.figure import Figure

    metrics = list(result["summary"]) or list(METRICS)
    figure = Figure(figsize=(2.6 * len(metrics), 3.2), dpi=120, layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for place, start in enumerate(SAID):
            values = [
                row["figures"][metric]["value"]
                for row in result["rows"]
                if row["start"] == start and metric in row["figures"]
            ]
            axis.scatter([place] * len(values), values, color=COLOURS[start], alpha=0.7, zorder=3)
        level = result["summary"].get(metric, {}).get("chance")
        if level is not None:
            axis.axhline(level, color="#b3261e", linewidth=1, linestyle="--", label="chance")
            axis.legend(fontsize=7, frameon=False)
        axis.set_xticks(range(len(SAID)), list(SAID.values()), fontsize=7)
        axis.set_xlim(-0.5, len(SAID) - 0.5)
        axis.set_ylim(0, 104)
        axis.set_title(metric, fontsize=10)
        axis.grid(axis="y", color="#e3e7ee")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Fine-tuning from the pre-trained model and from scratch, per cent", fontsize=11)
    figure.savefig(path)
