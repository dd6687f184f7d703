"""Results of rows -> a table, lines for people, and what is said in the end. Knows columns, no models."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from meter_fast.training.monitor import duration, rate

ERROR = "error"
SHOWN = 3  # failures and notes told in the end
RESULTS = {  # columns of the results
    "answer": ("answer", "score", "answers"),
    "match": ("probability",),
    "rank": ("score", "text_rank", "image_rank"),
    "fill": ("filled", "fills"),
    "entails": ("label", "contradiction", "neutral", "entailment"),
    "compare": ("probability",),
    "caption": ("caption",),
}
Result = dict[str, object]


def table_of(results: Sequence[Result], task: str, suffix: str) -> str:
    """The text of a .csv or .jsonl file. Columns: those of the input, of the task, and "error"; lists are JSON in a
    CSV cell, and what a row does not have is empty there, null in JSONL."""
    own = dict.fromkeys(name for result in results for name in result if name not in (*RESULTS[task], ERROR))
    columns = [*own, *RESULTS[task], ERROR]
    if suffix == ".jsonl":
        rows = ({name: result.get(name) for name in columns} for result in results)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(result.get(name, "")) for name in columns] for result in results)
    return out.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def line_of(task: str, result: Result) -> str:
    """One row for people: what was asked, a tab, what the model says."""
    asked = [str(result[name]) for name in ("image", "image_a", "image_b", "text", "line") if name in result]
    return "\t".join([*asked, f"error: {result[ERROR]}" if result[ERROR] else _said(task, result)])


def _said(task: str, result: Result) -> str:
    if task == "answer":
        return _scored(result["answers"])
    if task == "fill":
        return f"{result['filled']}  " + "; ".join(_scored(mask) for mask in result["fills"])
    if task == "rank":
        return f"{result['score']:.4f}  text {result['text_rank']}, picture {result['image_rank']}"
    if task == "entails":
        return f"{result['label']}  " + ", ".join(f"{name} {result[name]:.4f}" for name in RESULTS[task][1:])
    return result["caption"] if task == "caption" else f"{result['probability']:.4f}"


def _scored(scored: Sequence[Sequence]) -> str:
    return ", ".join(f"{word} {score:.4f}" for word, score in scored)


def in_order_of_rank(results: Sequence[Result]) -> list[Result]:
    """The texts of each picture, best first; pictures in the order in which they came, failures behind."""
    place = {name: n for n, name in enumerate(dict.fromkeys(str(result.get("image")) for result in results))}
    last = len(results) + 1
    return sorted(results, key=lambda result: (place[str(result.get("image"))], result.get("text_rank", last)))


def summary(
    seconds: float, results: Sequence[Result], causes: Counter[str], notes: Sequence[str], others: int, out: Path | None
) -> list[str]:
    """Lines for the end: how many rows, how fast, what failed and why. notes: warnings; others: files of a folder that
    are no pictures."""
    count, failed = len(results), causes.total()
    lines = [f"{_count(count, 'row')} in {duration(seconds)}, {rate(count / max(seconds, 1e-9))} rows/s"]
    if failed:
        why = ", ".join(f"{cause} {number:,}" for cause, number in causes.most_common())
        lines.append(f"{failed:,} of them failed: {why}")
        errors = [result[ERROR] for result in results if result[ERROR]]
        lines += [f"  {error}" for error in errors[:SHOWN]] + _more(len(errors))
    if notes:
        lines += [
            f"{_count(len(notes), 'text')} not read to the end:",
            *(f"  {note}" for note in notes[:SHOWN]),
            *_more(len(notes)),
        ]
    if others:
        lines.append(f"{others:,} other files of the folder are no pictures by their names and were left out")
    return lines if out is None else [*lines, f"written to {out}"]


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _more(count: int) -> list[str]:
    return [f"  and {count - SHOWN:,} more"] if count > SHOWN else []
