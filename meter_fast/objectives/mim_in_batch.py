"""Masked image modelling with in-batch negatives: which of all cells of the batch's pictures stood in a hidden one?
Knows batch and model, no other objective.

Source: METER, section 3.3, equation 2. The candidates are all cells of all pictures, hidden or not, as the paper has
it; h and c are those of `MimInBatchHead`. Cells with the same pixels, such as plain backgrounds, cannot be told apart:
the loss stays that of the equation (of k equal ones it is log k at best), and an answer counts as right if it has the
wanted pixels. In training the candidates may be those of all processes (objectives.mim_negatives=all_ranks); held-out
scores take those of the batch, so they depend on its size.
Shape letters: B pairs, G cells along one side, M hidden cells, N candidates, D fusion width.
"""

import torch
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter
from meter_fast.objectives.candidates import choose, gather
from meter_fast.objectives.masked_pictures import cells_of, count, hidden_rows, pictures, reading

__all__ = ["HEAD", "count", "loss", "pictures", "reading"]

HEAD = "mim_in_batch_head"
ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)  # factors that spread bits
ROWS_AT_ONCE = 4096  # of whole numbers of 64 bits, made of the pixels


def loss(model: Meter, fused: Fused, batch: PretrainBatch, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the hidden cells / total, float32 scalar; cells answered rightly, int64 scalar."""
    cells = cells_of(batch.images, model.config.vision.grid)
    head = model.mim_in_batch_head
    said, candidates = head(hidden_rows(model, fused, batch), cells)
    marks, labels = fingerprints(cells), batch.cell_rows
    if head.all_ranks and head.training:
        candidates, first = gather(candidates)
        marks, _ = gather(marks)
        labels = labels + first
    summed, chosen = choose(said, candidates, labels)
    return summed / total, (marks[chosen] == marks[labels]).sum()


def fingerprints(cells: Tensor) -> Tensor:
    """A number for the exact values of each row: [N,C] floating -> [N] int64. Different rows share one by a chance of
    about 2**-64."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[cells.element_size()]
    factors = torch.arange(1, cells.shape[1] + 1, device=cells.device) * ODD[0]
    factors = (factors ^ (factors >> 29)) * ODD[1]
    factors = factors ^ (factors >> 32) | 1
    parts = (part.long() * ODD[0] for part in cells.contiguous().view(words).split(ROWS_AT_ONCE))
    return torch.cat([((part ^ (part >> 32)) * factors).sum(1) for part in parts])
