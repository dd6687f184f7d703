"""Carries a plan out: reads pictures, writes tables, tells how far it is, and goes on where it was stopped.

Knows plans, the reader and the writer, and the files beside the tables: NAME.manifest.json and NAME.SPLIT.missing.txt.
Knows nothing of any data set.

A table is finished when the manifest has its entry and a file of that size is there; it is then left as it is. The
entry is written before the table gets its name, so a file that the manifest does not know was written by someone else,
and is never written over.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa

import meter_fast
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.prepare.plan import MISSING, LeftOut, Part, Plan, PrepareError, Row, Table
from meter_fast.data.prepare.progress import Progress
from meter_fast.data.prepare.reading import Read, picture_reader
from meter_fast.data.prepare.writing import BATCH_BYTES, TableWriter, Written, sha256_of, write_text


def carry_out(
    plan: Plan,
    out: Path,
    *,
    workers: int = 1,
    max_missing: float = 0.01,
    option: str = "--max-missing",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    batch_bytes: int = BATCH_BYTES,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes all tables of a plan to the folder `out`, those that are finished excepted; returns the manifest.

    workers: processes that read pictures. max_missing: largest share, of the rows of a split, of pictures that are
    missing or cannot be used; option: its name in messages. batch_bytes: of pictures in memory before they are written.
    Raises PrepareError: too many missing, files of others in the way, tables of other annotations.
    """
    budgets = {split: _Budget(plan, split, max_missing, option) for split in plan.wanted}
    for budget in budgets.values():
        budget.check()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise PrepareError(f"{out} cannot be a folder, as a file is in its way: name another one") from None
    run = _Run(plan, out)
    run.check_files()
    todo = [table for table in plan.tables if not run.finished(table.name)]
    for table in plan.tables:
        if run.finished(table.name):
            budgets[table.split].unusable += len(run.tables[table.name]["left_out"])
            say(f"{table.name}: finished already, {run.tables[table.name]['rows']:,} rows")
    for name, text in plan.files.items():
        write_text(out / name, text)
    run.write_lists()
    progress = Progress(sum(table.count for table in todo), "rows", say)
    with picture_reader(workers, max_pixels) as read:
        for table in todo:
            writer = TableWriter(out / f"{table.name}.arrow", table.columns, batch_bytes)
            run.make(writer, table.digest(), lambda w, t=table: _copy(t, read, w, budgets[t.split], progress))
            say(f"{table.name}: {run.tables[table.name]['rows']:,} rows written")
    for part in plan.parts:
        if not run.finished(part.name):
            with pa.memory_map(str(out / f"{part.of}.arrow"), "r") as mapped:
                opened = pa.ipc.open_file(mapped)
                writer = TableWriter(out / f"{part.name}.arrow", opened.schema, batch_bytes)
                run.make(writer, run.tables[part.of]["sha256"], lambda w, o=opened, p=part: _cut(o, p, w))
            say(f"{part.name}: {run.tables[part.name]['rows']:,} rows written")
    run.write_lists()
    return run.write_manifest(complete=True)


class _Budget:
    """How many rows of a split there may be without usable pictures."""

    def __init__(self, plan: Plan, split: str, share: float, option: str):
        self.name = f"{plan.name}, split {split}" if split else plan.name
        self.wanted, self.share, self.option = plan.wanted[split], share, option
        self.missing = [one for one in plan.left_out.get(split, []) if one.cause == MISSING]
        self.unusable = 0
        self.causes: Counter[str] = Counter({MISSING: len(self.missing)} if self.missing else {})
        self.first = [one.name for one in self.missing[:3]]

    def check(self) -> None:
        """Raises PrepareError when too many are gone."""
        gone = len(self.missing) + self.unusable
        if self.wanted == 0:
            raise PrepareError(f"{self.name}: not one picture is named (or none has a text that can be used)")
        if gone < self.wanted and gone <= self.share * self.wanted:
            return
        told = ", ".join(f"{cause} {count:,}" for cause, count in self.causes.items())
        raise PrepareError(
            f"{self.name}: {gone:,} of {self.wanted:,} pictures cannot be used ({told}; first "
            f"{', '.join(self.first)}), more than {self.option} {self.share:g}. Get them, or give a larger share (but "
            "not all may be missing)"
        )

    def add(self, bad: LeftOut) -> None:
        """One more that cannot be used."""
        self.unusable += 1
        self.causes[bad.cause] += 1
        self.first = [*self.first, bad.name][:3]
        self.check()


class _Run:
    """The folder that is written, and what its manifest says."""

    def __init__(self, plan: Plan, out: Path):
        self.plan, self.out = plan, out
        self._manifest = out / f"{plan.name}.manifest.json"
        self._annotations = {path.name: sha256_of(path) for path in plan.annotations}
        found = self._read()
        self.tables: dict[str, dict] = found.get("tables", {})
        was = found.get("annotations", {})
        self._changed = sorted(name for name, now in self._annotations.items() if was.get(name, now) != now)
        self._earlier = found

    def _read(self) -> dict:
        if not self._manifest.exists():
            return {}
        try:
            found = json.loads(self._manifest.read_text(encoding="utf-8"))
            return found if isinstance(found.get("tables"), dict) else {}
        except (ValueError, AttributeError):
            raise PrepareError(f"{self._manifest} is damaged: remove it and the tables beside it") from None

    def finished(self, name: str) -> bool:
        """Whether the table is there as the manifest says."""
        file = self.out / f"{name}.arrow"
        return name in self.tables and file.is_file() and file.stat().st_size == self.tables[name]["size"]

    def check_files(self) -> None:
        """Raises PrepareError for tables in the way."""
        names = [table.name for table in [*self.plan.tables, *self.plan.parts]]
        there = [name for name in names if (self.out / f"{name}.arrow").exists()]
        if there and self._changed:
            raise PrepareError(f"{self.out}: its tables were written from another {', '.join(self._changed)}; "
                               f"give another folder, or remove {there[0]}.arrow and its like")  # fmt: skip
        if self._changed:
            self.tables, self._earlier = {}, {}
        for name, text in self.plan.files.items():
            path = self.out / name
            if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
                raise PrepareError(f"{path} is there with other content; move it away, or give another folder")
        foreign = [name for name in there if not self.finished(name)]
        if foreign:
            raise PrepareError(f"{self.out / foreign[0]}.arrow is there, but was not written by this command "
                               f"(or was changed since); move it away, or give another folder")  # fmt: skip
        rows = {table.name: table.digest() for table in self.plan.tables if table.name in there}
        for part in self.plan.parts:
            if part.name in there:
                rows[part.name] = self.tables[part.of]["sha256"] if part.of in there else None
        for name, digest in rows.items():
            if self.tables[name]["pictures"] != digest:
                raise PrepareError(f"{self.out / name}.arrow was written when other pictures were there: since then "
                                   f"some were added or removed. Remove it and its like to write them again, or give "
                                   f"another folder")  # fmt: skip

    def make(self, writer: TableWriter, pictures: str, fill: Callable[[TableWriter], list[LeftOut]]) -> None:
        """One table, from its first row to its name; nothing is left of it if it fails. pictures: which rows are in it,
        Table.digest, or for a stretch of another table the sha256 of that."""
        try:
            left_out = fill(writer)
            written: Written = writer.finish()
            lost = [asdict(one) for one in left_out]
            self.tables[writer.path.stem] = {**asdict(written), "pictures": pictures, "left_out": lost}
            self.write_manifest(complete=False)
            writer.publish()
        except BaseException:
            writer.abandon()
            raise

    def write_manifest(self, complete: bool) -> dict[str, Any]:
        """Puts what is known into NAME.manifest.json; splits that were written earlier stay in it."""
        counts = {split: _by_cause(lost) for split, lost in self.plan.left_out.items()}
        earlier = self._earlier
        manifest = {
            "name": self.plan.name,
            "complete": complete,
            "versions": {
                "meter_fast": meter_fast.__version__,
                "pyarrow": pa.__version__,
                "pillow": PIL.__version__,
                "python": platform.python_version(),
            },
            "annotations": {**earlier.get("annotations", {}), **self._annotations},
            "wanted": {**earlier.get("wanted", {}), **self.plan.wanted},
            "passed_over": {**earlier.get("passed_over", {}), **counts},
            "notes": {**earlier.get("notes", {}), **self.plan.notes},
            "tables": self.tables,
        }
        write_text(self._manifest, json.dumps(manifest, indent=1) + "\n")
        return manifest

    def write_lists(self) -> None:
        """NAME.SPLIT.missing.txt: cause, path and detail of all that is in no table, tab-separated."""
        for split in dict.fromkeys([*self.plan.wanted, *self.plan.left_out]):
            lost = [asdict(one) for one in self.plan.left_out.get(split, [])]
            for table in self.plan.tables:
                if table.split == split:
                    lost += self.tables.get(table.name, {}).get("left_out", [])
            path = self.out / ".".join(part for part in (self.plan.name, split, "missing.txt") if part)
            if lost or path.exists():
                write_text(path, "".join(f"{one['cause']}\t{one['name']}\t{one['detail']}\n" for one in lost))


def _by_cause(lost: list[LeftOut]) -> dict[str, dict]:
    """How many, and the first ones."""
    found: dict[str, dict] = {}
    for one in lost:
        entry = found.setdefault(one.cause, {"count": 0, "first": []})
        entry["count"] += 1
        if entry["count"] <= 3:
            entry["first"].append(f"{one.name} ({one.detail})" if one.detail else one.name)
    return found


def _copy(
    table: Table,
    read: Callable[[Iterator[Row]], Iterator[tuple[Row, Read]]],
    writer: TableWriter,
    budget: _Budget,
    progress: Progress,
) -> list[LeftOut]:
    """Writes the rows whose pictures can be used; returns why others cannot, one reason for each."""
    left_out = []
    for row, pictures in read(table.rows()):
        bad = next((one for one in pictures if isinstance(one, LeftOut)), None)
        if bad is None:
            writer.add({**row.values, **dict(zip(table.pictures, pictures, strict=True))})
        else:
            left_out.append(bad)
            budget.add(bad)
        progress.step(table.name, 1, sum(len(one) for one in pictures if isinstance(one, bytes)))
    return left_out


def _cut(opened: pa.ipc.RecordBatchFileReader, part: Part, writer: TableWriter) -> list[LeftOut]:
    """Writes a stretch of another table's rows."""
    counts = [opened.get_batch(number).num_rows for number in range(opened.num_record_batches)]
    border = max(0, sum(counts) - part.n)
    begin, end = (border, sum(counts)) if part.last else (0, border)
    first = 0
    for number, count in enumerate(counts):
        here = max(begin - first, 0), min(end - first, count)
        if here[0] < here[1]:
            writer.add_batch(opened.get_batch(number).slice(here[0], here[1] - here[0]))
        first += count
    return []


def left_out_lines(manifest: dict[str, Any]) -> Iterator[str]:
    """For people: how many are in no table, by split and cause, and what else was counted."""
    groups = {split or "all": causes for split, causes in manifest["passed_over"].items()}
    groups.update(
        {name: _by_cause([LeftOut(**one) for one in entry["left_out"]]) for name, entry in manifest["tables"].items()}
    )
    for where, causes in groups.items():
        for cause, found in causes.items():
            yield f"{where}: left out {found['count']:,} {cause}, first {', '.join(found['first'])}"
    for name, entry in manifest["tables"].items():
        if entry["repaired"]:
            yield f"{name}: {entry['repaired']:,} texts held half of a character, now a question mark"
    for name, count in manifest["notes"].items():
        yield f"{count:,} {name}"
