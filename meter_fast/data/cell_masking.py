"""Which cells of a picture masked image modelling hides. Knows the grid of cells; knows no files, texts or models.

A cell is what one token of the vision encoder stands for: a square of the picture, G x G of them. Source: METER,
section 3.3 (15 % of the patches are masked). Shape letters: B pairs, M hidden cells, S pixels of a side.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CellMasking:
    """Hides equally many cells in each picture, so that each batch costs the same.

    grid: G, cells along one side. probability: share of the cells that is hidden, rounded to whole ones: one or more,
    and never all. tokenize: normalised pictures [B,3,S,S] -> a code of each cell [B,G,G] int64 on their device, or None
    where codes are not asked for. Raises ValueError for a grid below 2 or a probability outside 0..1.
    """

    grid: int
    probability: float = 0.15
    tokenize: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise ValueError(
                f"a picture of {self.grid} x {self.grid} cells has none to hide beside others: use a "
                "model.vision.image_size of twice model.vision.patch_size or more"
            )
        if not 0 < self.probability < 1:
            raise ValueError(f"objectives.mim_probability={self.probability}: give a number between 0 and 1")

    @property
    def hidden(self) -> int:
        """Hidden cells of each picture."""
        cells = self.grid**2
        return min(max(1, round(self.probability * cells)), cells - 1)

    def fields(self, images: Tensor, chances: Iterable[np.random.Generator]) -> dict[str, Tensor]:
        """cell_mask, cell_rows and cell_codes of a batch (see PretrainBatch). images [B,3,S,S], whole; chances: one
        generator a picture, each used before the next is asked for."""
        cells = self.grid**2
        chosen = np.stack([np.sort(chance.permutation(cells)[: self.hidden]) for chance in chances])
        rows = torch.from_numpy((chosen + cells * np.arange(len(chosen))[:, None]).ravel())
        mask = torch.zeros(len(chosen) * cells, dtype=torch.bool)
        mask[rows] = True
        fields = {"cell_mask": mask.view(-1, self.grid, self.grid), "cell_rows": rows}
        if self.tokenize is not None:
            fields["cell_codes"] = self.tokenize(images).flatten()[rows.to(images.device)]
        return fields
