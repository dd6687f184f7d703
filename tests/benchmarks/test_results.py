"""Rows written and read: which belong to one run, what is compared, and the pictures and tables made of them."""

import csv
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plots, record
from benchmarks.plots import draw_scaling, draw_steps, newest, number, ratios, table
from benchmarks.record import COLUMNS, RESULTS, Run, runs


def row(case: str, variant: str, metric: str, value: float, unit: str = "ms") -> dict:
    return dict(case=case, variant=variant, metric=metric, value=value, unit=unit)


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    both = [row("x", "plain", "time", 4.0), row("x", "fast", "time", 2.0)]
    path = record.append("some", [*both, row("y", "plain", "time", 1.0)])
    record.append("some", [{**one, "value": 10 * one["value"]} for one in both])
    first, other, again = runs(path)
    assert (first.case, other.case, again.case) == ("x", "y", "x") and first.benchmark == "some"
    assert first.values == {"plain": {"time": 4.0}, "fast": {"time": 2.0}} and first.units == {"time": "ms"}
    assert again.values == {"plain": {"time": 40.0}, "fast": {"time": 20.0}}
    assert newest([first, other, again]) == [again, other]


def test_a_commit_with_new_results_is_still_that_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    results, program = tmp_path / "benchmarks/results/some.csv", tmp_path / "benchmarks/some.py"
    results.parent.mkdir(parents=True)
    for path in (results, program):
        path.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "m")
    name = git("rev-parse", "--short", "HEAD").strip()
    results.write_text("2\n")
    assert record.commit(tmp_path) == name
    program.write_text("2\n")
    assert record.commit(tmp_path) == name + "+"


def test_other_commits_and_devices_are_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for commit, device, variant in (("a", "cpu", "plain"), ("b", "cpu", "fast"), ("b", "gpu", "fast")):
            writer.writerow(["2026-01-01", commit, "m", device, "some", "x", variant, "time", 1.0, "ms"])
    assert [(run.commit, run.device, list(run.values)) for run in runs(path)] == [
        ("a", "cpu", ["plain"]), ("b", "cpu", ["fast"]), ("b", "gpu", ["fast"]),
    ]  # fmt: skip
    assert all(not less for run in runs(path) for less in ratios(run).values())  # nothing to compare with


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("case,kernel\nx,y\n")
    with pytest.raises(ValueError, match=r"other\.csv: columns"):
        runs(path)


@pytest.mark.parametrize("name", ["step_time", "pretrain_step", "latency", "retrieval", "vqa_step"])
def test_kept_results_are_read(name: str) -> None:
    found = runs(RESULTS / f"{name}.csv")
    assert found and all(run.benchmark == name and run.values for run in found)


STEP = Run("2026-01-01", "abc", "machine", "device", "step_time", "pretrain_288 base batch 4 bf16 zero 2 text 13",
           {"plain": {"flops_per_sample": 650e9, "time_per_step": 90.0, "peak_memory": 4e9, "mfu": 0.3},
            "eager": {"flops_per_sample": 325e9, "time_per_step": 30.0, "peak_memory": 1e9, "mfu": 0.45},
            "matrix product": {"flop_rate": 5e13}},
           {"flops_per_sample": "FLOP", "time_per_step": "ms", "peak_memory": "B", "mfu": "1", "flop_rate": "FLOP/s"},
           )  # fmt: skip


def test_ratios_are_of_what_is_better_when_lower() -> None:
    assert ratios(STEP)["eager"] == {"flops_per_sample": 2.0, "time_per_step": 3.0, "peak_memory": 4.0}
    assert ratios(STEP)["matrix product"] == {}


def test_what_was_timed_of_ours_is_drawn() -> None:
    counted = Run("2026-01-02", "abc", "machine", "device", "step_time", "vqa", {
        side: {"flops_per_sample": 1.0} for side in ("plain", "eager")}, STEP.units)  # fmt: skip
    later = replace(STEP, date="2026-01-03", commit="def")
    later = replace(later, values={**STEP.values, "plain_kept": STEP.values["plain"]})
    drawn = plots.timed([STEP, counted, later])
    assert [name.splitlines()[1] for name, _ in drawn] == [
        "machine, device, 2026-01-03, def", "machine, device, 2026-01-01, abc",
    ]  # fmt: skip
    assert all(less["time_per_step"] == 3.0 for _, less in drawn)


def test_table() -> None:
    head, rule, plain, eager, ceiling = table([STEP]).splitlines()
    assert head.startswith("| case | side | flops per sample | time per step |") and rule.count("|") == head.count("|")
    assert "| 650 GFLOP | 90 ms | 4,000 MB | 0.3 |" in plain
    assert "| 325 GFLOP (**2.00 x**) | 30 ms (**3.00 x**) | 1,000 MB (**4.00 x**) | 0.45 |" in eager
    assert "50 TFLOP/s" in ceiling and "x**" not in ceiling


@pytest.mark.parametrize(("value", "unit", "shown"), [(12345678, "B", "12.35 MB"), (0.5, "1", "0.5"),
                                                      (123456.7, "ms", "123,457 ms"), (3, "1/s", "3 1/s")])  # fmt: skip
def test_numbers(value: float, unit: str, shown: str) -> None:
    assert number(value, unit) == shown


def test_pictures(tmp_path: Path) -> None:
    points = {str(n): {"flops_per_step": n * 1e9, "time_per_step": 5.0} for n in (2, 4, 8)}
    scaling = Run("2026-01-01", "abc", "machine", "device", "scaling", "batch tiny fp32",
                  points | {"exponent": {f"exponent_of_{name}": 1.0 for name in points["2"]}})  # fmt: skip
    draw_steps([STEP], tmp_path / "steps.png")
    draw_scaling([scaling, scaling], tmp_path / "scaling.png")
    for name in ("steps.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Only what is there is drawn, and what is not is said."""
    (tmp_path / "latency.csv").write_bytes((RESULTS / "latency.csv").read_bytes())
    monkeypatch.setattr("sys.argv", ["plots", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    plots.main()
    said = capsys.readouterr().out
    assert "scaling.csv: left out" in said and "latency.csv: left out" not in said
    assert (tmp_path / "out" / "tables.md").read_text().startswith("## latency\n\n| case | side | p50 |")
