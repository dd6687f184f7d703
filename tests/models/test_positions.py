"""Position tables at another resolution against the published code."""

import json

import pytest
import torch
from golden_cases import GOLDEN, TOLERANCE, relative
from safetensors.torch import load_file

from meter_fast.models.positions import resize_positions

TABLES = [row for row in json.loads((GOLDEN / "position_tables.json").read_text()) if row["name"].startswith("clip.")]


@pytest.mark.parametrize("row", TABLES, ids=lambda row: row["name"])
def test_published_tables(row: dict) -> None:
    tensors = load_file(GOLDEN / "position_tables.safetensors")
    before, after = tensors[f"{row['name']}.in"], tensors[f"{row['name']}.out"]
    found = resize_positions(before, row["after"] // row["patch_size"])
    assert relative(found, after) < TOLERANCE
    assert torch.equal(found[0], before[0]), "the class row is kept"
    assert row["before"] != row["after"] or torch.equal(found, before)


def test_half_precision_table_is_resampled_in_float32() -> None:
    table = torch.randn(50, 4).half()
    found = resize_positions(table, 9)
    assert found.dtype == torch.float32
    assert torch.equal(found, resize_positions(table.float(), 9))


@pytest.mark.parametrize("rows", [1, 3, 16, 51])
def test_not_a_square(rows: int) -> None:
    with pytest.raises(ValueError, match=f"swin table has {rows} rows"):
        resize_positions(torch.zeros(rows, 4), 5, "swin table")
