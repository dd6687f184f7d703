"""Position tables of vision transformers at another resolution. Knows tables, nothing of models or files.

Source: METER `modules/clip_model.py` (adapt_position_encoding).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_of(rows: int, what: str) -> int:
    """Side of the patch grid of a table with a class row. Raises ValueError, naming `what`, if it is no square."""
    side = round(max(rows - 1, 0) ** 0.5)
    if side < 1 or side * side != rows - 1:
        raise ValueError(f"{what} has {rows} rows, which is no class row and a square grid: another kind of model?")
    return side


def resize_positions(table: Tensor, grid: int, what: str = "position table") -> Tensor:
    """Table of another grid: [g*g+1, D] -> [grid*grid+1, D] float32.

    The class row is kept; the grid is resampled bicubically in float32, align_corners=False, without antialiasing, as
    published. The same grid gives the same values. Raises ValueError if the table is no class row and a square grid.
    """
    table = table.float()
    before = grid_of(table.shape[0], what)
    if before == grid:
        return table
    image = table[1:].view(before, before, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)[0]
    return torch.cat([table[:1], resized.flatten(1).T])
