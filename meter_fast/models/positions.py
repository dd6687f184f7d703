"""Position tables of vision transformers at another resolution. Knows tables, nothing of models or files.

Source: METER `modules/clip_model.py` (adapt_position_encoding), `modules/swin_helpers.py`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_TABLE = "relative_position_bias_table"


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
    return torch.cat([table[:1], _resample(table[1:], grid)])


def is_position_table(name: str) -> bool:
    """Whether a tensor of this name, ours or timm's, changes its shape with the resolution."""
    return name.endswith(("pos_embed", BIAS_TABLE))


def fit_positions(table: Tensor, shape: Sequence[int], grid: int, what: str) -> Tensor:
    """A position table of another resolution brought to `shape`, that of a model with a grid of `grid` tokens.

    table: [1,R,D], rows of class tokens first; [1,g,g,D] (VOLO); or [R,H], biases of relative positions, each head's a
    picture of (2 g - 1)^2, rows of the class token last (BEiT). Resampled as above (Swin's as published), in float32;
    returned as it is where the shapes agree. Raises ValueError, naming `what`, if it is no such table.
    """
    if tuple(table.shape) == tuple(shape):
        return table
    biases, kept = len(shape) == 2, 0
    side = 2 * grid - 1 if biases else grid
    rows = table.float().flatten(0, -2)
    if len(shape) < 4:
        kept = shape[-2] - side * side
    before = math.isqrt(max(len(rows) - kept, 0))
    if table.dim() != len(shape) or table.shape[-1] != shape[-1] or before < 1 or before**2 + kept != len(rows):
        raise ValueError(
            f"{what} is {tuple(table.shape)}, which is no table of the model's kind, {tuple(shape)}, for another grid"
        )
    if biases:
        resized = torch.cat([_resample(rows[: before**2], side), rows[before**2 :]])
    else:
        resized = torch.cat([rows[:kept], _resample(rows[kept:], side)])
    return resized.view(*shape)


def _resample(rows: Tensor, side: int) -> Tensor:
    """[n*n,D] -> [side*side,D] float32."""
    before = math.isqrt(len(rows))
    image = rows.view(before, before, -1).permute(2, 0, 1)[None]
    return F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
