"""What the objectives of masked image modelling share: pictures with hidden cells, each with its whole caption, and the
image rows of the hidden cells. Knows a batch, a model's sizes, and no loss.

Source: METER, section 3.3. Hidden cells are set to zero, the mean of normalised pixels, before the vision encoder: that
works for every encoder, those with convolutions and windows too. (The paper leaves open what stands in their place.)
Exact saving: the last fusion layer computes only the image side. Shape letters: B pairs, G cells along one side of a
picture, P pixels along one side of a cell, M hidden cells, D fusion width.
"""

import torch
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.reading import Reading


def pictures(batch: PretrainBatch) -> Tensor:
    """[B,3,G*P,G*P]: the captions' pictures with hidden cells."""
    side = batch.images.shape[-1] // batch.cell_mask.shape[-1]
    hidden = batch.cell_mask.repeat_interleave(side, 1).repeat_interleave(side, 2)
    return batch.images.masked_fill(hidden[:, None], 0)


def reading(batch: PretrainBatch, first: int) -> Reading:
    """The whole captions with these pictures, of which `first` is the row of the first; every image row."""
    own = torch.arange(first, first + len(batch), device=batch.images.device)
    return Reading(batch.text_ids, batch.text_mask, Part(Need.IMAGE, len(batch), own), batch.text_rows)


def count(batch: PretrainBatch) -> int:
    """Hidden cells M. Raises ValueError for a batch made without them."""
    if batch.cell_rows is None:
        raise ValueError("the batch has no hidden cells: give its loader a CellMasking")
    return batch.cell_rows.numel()


def hidden_rows(model: Meter, fused: Fused, batch: PretrainBatch) -> Tensor:
    """[M,D]: the fusion's rows of the hidden cells; class tokens, which come first, are left out."""
    rows = fused.image[:, model.config.vision.class_tokens :]
    return rows.flatten(0, 1).index_select(0, batch.cell_rows)


def cells_of(images: Tensor, grid: int) -> Tensor:
    """Pictures [B,3,G*P,G*P] -> the pixels of each cell [B*G*G,3*P*P], in the order of the tokens."""
    cut = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # [B,3,G,P,G,P]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
