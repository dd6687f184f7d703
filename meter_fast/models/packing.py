"""Texts without padding: which rows of a padded batch are tokens, there and back. Knows tensors, no modules.

Packing is exact: linear layers, norms and feed-forwards act on each token alone, and attention is told where each text
begins and ends. Shape letters: B pairs, L text tokens, N tokens of all texts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meter_fast.kernels.segments import Segments


@dataclass(frozen=True)
class Packing:
    """rows [N] int64: the tokens among the rows of a [B*L] view, ascending; segments: the texts among the N rows."""

    rows: Tensor
    segments: Segments
    length: int

    @staticmethod
    def of(mask: Tensor, rows: Tensor | None = None) -> "Packing":
        """Of texts with mask [B,L] bool, True on tokens, which stand before the padding.

        `rows`, if they are known already: finding them waits for the device. An empty text has no rows.
        """
        if rows is None:
            rows = mask.flatten().nonzero().flatten()
        boundaries = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return Packing(rows, Segments.packed(boundaries, mask.shape[1]), mask.shape[1])

    @staticmethod
    def join(packings: "tuple[Packing, ...]") -> "Packing":
        """Of the texts of several batches of one length, one after the other."""
        rows, starts, texts, tokens = [], [], 0, 0
        for packing in packings:
            rows.append(packing.rows + texts * packing.length)
            starts.append(packing.segments.starts + tokens)
            texts, tokens = texts + len(packing.segments), tokens + len(packing.rows)
        lengths = torch.cat([packing.segments.lengths for packing in packings])
        length = packings[0].length
        return Packing(torch.cat(rows), Segments(torch.cat(starts), lengths, length), length)

    def pack(self, x: Tensor) -> Tensor:
        """[B,L,...] -> [N,...]."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """[N,D] -> [B,L,D], zeros on padding."""
        padded = x.new_zeros(len(self.segments) * self.length, *x.shape[1:])
        return padded.index_copy(0, self.rows, x).unflatten(0, (len(self.segments), self.length))
