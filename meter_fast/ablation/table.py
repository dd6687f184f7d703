"""The table of an ablation, from the files that its stages left: table.json for programs, table.md and table.png for
people, with the paper's figures beside ours.

Knows plans, run directories and scores. Knows nothing of how stages are run.
"""

import json
from typing import Any

from meter_fast.ablation.plan import Plan
from meter_fast.ablation.plot import draw
from meter_fast.ablation.records import facts_of, pipe_table, runs_text, scores_of, status_of
from meter_fast.ablation.rows import PlannedRow
from meter_fast.recipes.paper_tables import RETRIEVAL, VQA
from meter_fast.training.monitor import replace_text

NOT_REREAD = "†"
SOURCE = "Dou et al. 2022, An Empirical Study of Training End-to-End Vision-and-Language Transformers, arXiv 2111.02387"


def write_table(plan: Plan) -> dict[str, Any]:
    """Write table.json, table.md and table.png into the plan's folder; returns what table.json holds."""
    result = collect(plan)
    replace_text(plan.folder / "table.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    replace_text(plan.folder / "table.md", markdown(result))
    draw(result, plan.folder / "table.png")
    return result


# ---------------------------------------------------------------------------------------------------------- collecting


def collect(plan: Plan) -> dict[str, Any]:
    """Everything that is known of the rows so far. Figures and scores are in per cent."""
    rows = [_row(plan, planned) for planned in plan.rows]
    ours = [name for name in plan.table.metrics if any(name in row["ours"] for row in rows)]
    return {
        "table": plan.table.name,
        "title": plan.table.title,
        "number": plan.table.number,
        "source": SOURCE,
        "size": plan.size,
        "metrics": list(plan.table.metrics),
        "metrics_of_ours": ours,
        "rows": rows,
    }


def _row(plan: Plan, planned: PlannedRow) -> dict[str, Any]:
    found = scores_of(planned)
    status, message = status_of(planned)
    row = plan.row(planned.name)
    retrieval = found.get("retrieval")
    ours, chance = {}, {}
    if retrieval is not None:
        ours = {name: 100 * retrieval["retrieval"][key] for name, key in RETRIEVAL.items()}
        chance = {name: 100 * retrieval["chance"][key] for name, key in RETRIEVAL.items()}
    if "vqa_score" in found:
        ours = {VQA: 100 * found["vqa_score"]["vqa"]["all"]["score"], **ours}
    return {
        "name": row.name,
        "label": row.label,
        "status": status,
        "message": message,
        "ours": ours,
        "chance": chance,
        "paper": dict(row.paper),
        "reread": dict(row.checked),
        "scores": found,
        "stages": {stage.name: facts_of(stage) for stage in planned.stages},
    }


# ------------------------------------------------------------------------------------------------------------- wording


def markdown(result: dict[str, Any]) -> str:
    """table.md."""
    parts = [
        f"# {result['title']}",
        f"{result['number'][:1].upper()}{result['number'][1:]} of {SOURCE}. Ours: size {result['size']}. Per cent.",
        _main(result),
        _notes(result),
        _recalls(result),
        _answers(result),
        runs_text(result["rows"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _main(result: dict[str, Any]) -> str:
    head = ["row"]
    for name in result["metrics"]:
        head += [f"{name}, paper", f"{name}, ours"] if name in result["metrics_of_ours"] else [f"{name}, paper"]
    return pipe_table(head, [_cells(result, row) for row in result["rows"]])


def _cells(result: dict[str, Any], row: dict[str, Any]) -> list[str]:
    cells = [row["label"] + (f" ({row['status']})" if row["status"] != "done" else "")]
    for name in result["metrics"]:
        paper = f"{row['paper'][name]:.2f}" if name in row["paper"] else "-"
        cells.append(paper + (NOT_REREAD if name in row["paper"] and name not in row["reread"] else ""))
        if name in result["metrics_of_ours"]:
            cells.append(f"{row['ours'][name]:.2f}" if name in row["ours"] else "-")
    return cells


def _notes(result: dict[str, Any]) -> str:
    rows = result["rows"]
    notes = []
    if any(set(row["paper"]) - set(row["reread"]) for row in rows):
        notes.append(f"{NOT_REREAD} quoted from the paper without having been re-read.")
    notes += [f"Re-read in: {source}." for source in sorted({text for row in rows for text in row["reread"].values()})]
    if any(name not in result["metrics_of_ours"] for name in result["metrics"]):
        notes.append("Columns without ours are not run here.")
    if result["size"] == "tiny":
        notes.append(
            "Ours are of models of two million parameters on drawn scenes after short runs: how the rows compare is "
            "what there is to read, not their level."
        )
    notes += [f"**{row['label']}** failed in {row['message']}" for row in rows if row["status"] == "failed"]
    return "\n".join(f"- {note}" for note in notes)


def _recalls(result: dict[str, Any]) -> str:
    """All recalls of ours."""
    rows = [(row["label"], row["scores"]["retrieval"]) for row in result["rows"] if "retrieval" in row["scores"]]
    if not rows:
        return ""
    names = list(rows[0][1]["retrieval"])
    first = rows[0][1]
    body = [
        [label + what, *(f"{100 * part[name]:.2f}" for name in names)]
        for label, scores in rows
        for what, part in (
            ("", scores["retrieval"]),
            (", equal captions counted", scores["equal_captions"]["retrieval"]),
        )
    ]
    body += [
        ["chance", *(f"{100 * first['chance'][name]:.2f}" for name in names)],
        ["chance, equal captions counted", *(f"{100 * first['equal_captions']['chance'][name]:.2f}" for name in names)],
    ]
    text = (
        f"Zero-shot retrieval of ours, split {first['split']}: {first['pictures']:,} pictures, {first['captions']:,} "
        f"captions, {first['different_captions']:,} of them different."
    )
    return f"{text}\n\n" + pipe_table(["row", *(name.replace("_r", "@").upper() for name in names)], body)


def _answers(result: dict[str, Any]) -> str:
    """Answers to questions by kind, and what is left of them with other pictures."""
    rows = [(row["label"], row["scores"]["vqa_score"]) for row in result["rows"] if "vqa_score" in row["scores"]]
    if not rows:
        return ""
    kinds = list(dict.fromkeys(kind for _, scores in rows for kind in scores["vqa"]))
    body = [
        [label + what, *(_share(scores["vqa"].get(kind, {}).get(key)) for kind in kinds)]
        for label, scores in rows
        for what, key in (("", "score"), (", with other pictures", "exchanged"))
    ]
    first = rows[0][1]
    text = f"Questions answered, ours, {first['split']}: {first['pairs']:,} questions."
    return f"{text}\n\n" + pipe_table(["row", *kinds], body)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
