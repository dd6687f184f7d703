"""Position tables at another resolution against the published code."""

import json

import pytest
import torch
from golden_cases import GOLDEN, TOLERANCE, relative
from safetensors.torch import load_file

from meter_fast.models.positions import fit_positions, resize_positions

TABLES = [row for row in json.loads((GOLDEN / "position_tables.json").read_text()) if row["name"].startswith("clip.")]


@pytest.mark.parametrize("row", TABLES, ids=lambda row: row["name"])
def test_published_tables(row: dict) -> None:
    tensors = load_file(GOLDEN / "position_tables.safetensors")
    before, after = tensors[f"{row['name']}.in"], tensors[f"{row['name']}.out"]
    found = resize_positions(before, row["after"] // row["patch_size"])
    assert relative(found, after) < TOLERANCE
    assert torch.equal(found[0], before[0]), "the class row is kept"
    assert row["before"] != row["after"] or torch.equal(found, before)


SWIN = [row for row in json.loads((GOLDEN / "position_tables.json").read_text()) if row["name"].startswith("swin.")]


@pytest.mark.parametrize("row", SWIN, ids=lambda row: row["name"])
def test_published_bias_tables(row: dict) -> None:
    tensors = load_file(GOLDEN / "position_tables.safetensors")
    before, after = tensors[f"{row['name']}.in"], tensors[f"{row['name']}.out"]
    assert relative(fit_positions(before, after.shape, row["after"] // 32, "table"), after) < TOLERANCE
    assert fit_positions(before, before.shape, row["before"] // 32, "table") is before


@pytest.mark.parametrize(
    ("before", "after", "grid", "kept"),
    [
        ((1, 18, 4), (1, 27, 4), 5, slice(0, 2)),
        ((1, 4, 4, 6), (1, 5, 5, 6), 5, slice(0)),
        ((52, 2), (84, 2), 5, slice(-3, None)),
    ],
    ids=["two class tokens", "grid", "biases with three rows of the class token"],
)
def test_tables_of_other_kinds(before: tuple, after: tuple, grid: int, kept: slice) -> None:
    """Rows that are no picture are kept; a table that is constant stays so."""
    table = torch.full(before, 0.5)
    rows = table.view(-1, before[-1])[kept]
    rows += torch.randn_like(rows)
    found = fit_positions(table.half(), after, grid, "table")
    assert (found.shape, found.dtype) == (after, torch.float32)
    found = found.view(-1, after[-1])
    assert torch.equal(found[kept], table.half().float().view(-1, before[-1])[kept])
    rest = torch.ones(len(found), dtype=torch.bool)
    rest[kept] = False
    assert torch.allclose(found[rest], torch.tensor(0.5), atol=1e-6)


def test_tables_that_cannot_be_resized() -> None:
    for shape in ((1, 19, 4), (1, 18, 5), (18, 4), (1, 1, 4)):
        with pytest.raises(ValueError, match=r"my table is .* no table of the model's kind"):
            fit_positions(torch.zeros(shape), (1, 27, 4), 5, "my table")


def test_half_precision_table_is_resampled_in_float32() -> None:
    table = torch.randn(50, 4).half()
    found = resize_positions(table, 9)
    assert found.dtype == torch.float32
    assert torch.equal(found, resize_positions(table.float(), 9))


@pytest.mark.parametrize("rows", [1, 3, 16, 51])
def test_not_a_square(rows: int) -> None:
    with pytest.raises(ValueError, match=f"swin table has {rows} rows"):
        resize_positions(torch.zeros(rows, 4), 5, "swin table")
