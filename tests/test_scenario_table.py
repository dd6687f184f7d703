"""The table of scenarios: rows of this run replace theirs, others stay, those of tests that are gone do not."""

import pytest

from tests import scenario_table
from tests.scenario_table import Row, Table, kept


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(scenario_table, "PAGE", tmp_path / "docs" / "reliability.md")
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_one():\n    ...\n\ndef test_two():\n    ...\n")
    return scenario_table.PAGE


def rows(*given: tuple[int, str, list[str]]) -> Table:
    table = Table()
    for number, name, outcomes in given:
        table.rows[number, name] = Row(number, f"shows {name}", name, 1.6, outcomes, ["3 % more"])
    return table


def test_rows_are_renewed_and_others_stay(page):
    rows(
        (8, "test_a.py::test_one", ["passed"] * 3), (9, "test_a.py::test_two", ["failed", "passed"])
    ).pytest_sessionfinish()
    first = page.read_text()
    assert "| 8 | shows test_a.py::test_one | pass, 3 cases | 2 s |" in first and "FAIL (1 of 2)" in first
    assert len(kept(first)) == 2
    rows((9, "test_a.py::test_two", ["passed"])).pytest_sessionfinish()
    second = page.read_text()
    assert "pass, 3 cases" in second and "FAIL" not in second and second.count("| 3 % more |") == 2
    assert "39 (faults of the gpu or of nccl)" in second


def test_rows_of_tests_that_are_gone_go(page):
    rows((8, "test_a.py::test_three", ["passed"]), (9, "test_b.py::test_one", ["skipped"])).pytest_sessionfinish()
    assert kept(page.read_text()) == {}
