"""Scores on disk: what is done stays done, and belongs to one model and one split."""

from pathlib import Path

import pytest
import torch

from meter_fast.score_table import ScoreTable


def fresh(folder: Path, whose: dict[str, str] | None = None) -> ScoreTable:
    ScoreTable.prepare(folder, 7, 3, {"model": "a", **(whose or {})})
    return ScoreTable(folder, 7, 3, 3)


def test_blocks_are_done_one_by_one(tmp_path: Path) -> None:
    table = fresh(tmp_path / "scores")
    assert len(table) == 3 and table.left() == [0, 1, 2] and table.rows(2) == [6]
    table.write(1, torch.arange(9.0).view(3, 3), [None, "truncated", None])
    again = fresh(tmp_path / "scores")  # another process, or a later one
    assert again.left() == [0, 2]
    assert again.scores()[3:6].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    again.write(0, torch.ones(3, 3), [None] * 3)
    again.write(2, torch.full((1, 3), torch.nan), ["truncated"])
    assert table.left() == [] and table.skipped() == {"truncated": 2}
    assert table.scores()[0].tolist() == [1, 1, 1] and table.scores()[6].isnan().all()
    assert (tmp_path / "scores" / "scores.f32").stat().st_size == 4 * 7 * 3


@pytest.mark.parametrize(
    ("whose", "said"), [({"model": "b"}, r"\(model differ\)"), ({"more": "x"}, r"\(more differ\)")]
)
def test_scores_of_something_else_are_refused(tmp_path: Path, whose: dict[str, str], said: str) -> None:
    fresh(tmp_path)
    with pytest.raises(ValueError, match=said):
        fresh(tmp_path, whose)


def test_records_without_a_description_are_refused(tmp_path: Path) -> None:
    fresh(tmp_path).write(0, torch.ones(3, 3), [None] * 3)
    (tmp_path / "scores.json").unlink()
    with pytest.raises(ValueError, match=r"records of scores without scores\.json"):
        fresh(tmp_path)
