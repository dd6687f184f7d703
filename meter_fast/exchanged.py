"""Which other pictures of a batch texts are scored with: nothing but the language can help then, so what is left of a
score is what the texts alone give away. Knows indices only."""

import torch
from torch import Tensor


def other_pictures(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B,K] int64, the pictures that each text is about -> those of the next text, round the batch, that shares
    none of them [B,K], and whether there is one [B] bool; where there is not, the first say nothing."""
    places = torch.arange(len(rows), device=rows.device)
    shared = (rows[:, None, :, None] == rows[None, :, None, :]).flatten(2).any(2)
    onwards = (places - places[:, None]) % len(rows)
    distance, nearest = torch.where(shared, len(rows), onwards).min(1)
    return rows[nearest], distance < len(rows)
