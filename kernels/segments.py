"""Where the sequences of a batch lie among rows: one description for padded and for packed tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """B sequences in a tensor [N, ...] of rows: sequence b is rows starts[b] .. starts[b] + lengths[b] - 1.

    starts, lengths: int32 [B] on the rows' device. longest: no sequence is longer; known on the host, so that choosing
    a kernel waits for no device. Rows that belong to no sequence are padding.
    """

    starts: Tensor
    lengths: Tensor
    longest: int

    def __len__(self) -> int:
        return self.starts.shape[0]

    @staticmethod
    def padded(batch: int, length: int, device: torch.device, lengths: Tensor | None = None) -> "Segments":
        """Of a tensor [batch, length, ...] with its first two dimensions flattened; lengths [batch], None: all full."""
        starts = torch.arange(batch, dtype=torch.int32, device=device) * length
        if lengths is None:
            lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        return Segments(starts, lengths.to(torch.int32), length)

    @staticmethod
    def packed(boundaries: Tensor, longest: int) -> "Segments":
        """Of rows without padding; boundaries int32 [batch + 1] begins with 0 and ends with the number of rows."""
        return Segments(boundaries[:-1], boundaries[1:] - boundaries[:-1], longest)
