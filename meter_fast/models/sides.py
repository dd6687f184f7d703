"""How the tokens of one side of the fusion lie in memory, and attention between sides. Knows tensors, no modules.

A padded side is x [P,T,D]. A packed side, which only text can be, is x [N,D]: the tokens of all texts, no padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meter_fast.kernels.cross_attention.op import cross_attention
from meter_fast.kernels.cross_attention.reference import attention
from meter_fast.kernels.segments import Segments
from meter_fast.kernels.varlen_attention import varlen_attention
from meter_fast.models.packing import Packing


@dataclass(frozen=True)
class Side:
    """mask: bool [P,1,1,T], True on tokens, of a padded side (None: all are); packing: of a packed side.

    segments: the sequences among the rows of x, flattened if it is padded.
    """

    segments: Segments
    is_text: bool
    mask: Tensor | None = None
    packing: Packing | None = None

    @staticmethod
    def images(x: Tensor) -> "Side":
        """x [P,V,D]: every token exists."""
        return Side(Segments.padded(x.shape[0], x.shape[1], x.device), is_text=False)

    @staticmethod
    def padded_text(mask: Tensor) -> "Side":
        """mask bool [P,L], True on tokens, which stand before the padding."""
        segments = Segments.padded(*mask.shape, mask.device, mask.sum(1))
        return Side(segments, is_text=True, mask=mask[:, None, None, :])

    @staticmethod
    def packed_text(packing: Packing) -> "Side":
        return Side(packing.segments, is_text=True, packing=packing)

    @staticmethod
    def merged(mask: Tensor, images: int) -> "Side":
        """Pictures of `images` tokens, each followed by its text: mask bool [P,L], True on the texts' tokens."""
        segments = Segments.padded(mask.shape[0], images + mask.shape[1], mask.device, images + mask.sum(1))
        return Side(segments, is_text=False, mask=F.pad(mask, (images, 0), value=True)[:, None, None, :])

    def first(self, x: Tensor) -> tuple[Tensor, "Side"]:
        """The first token of every sequence [P,1,D], and the side that these are."""
        own = x[:, :1] if self.packing is None else x.index_select(0, self.segments.starts)[:, None]
        return own, self.only_first()

    def only_first(self) -> "Side":
        return Side(Segments.padded(len(self.segments), 1, self.segments.starts.device), self.is_text)

    def padded(self, x: Tensor) -> Tensor:
        """[P,T,D], whichever way x lies."""
        return x if self.packing is None else self.packing.unpack(x)

    def lying(self, padded: Tensor) -> Tensor:
        """The inverse of `padded`."""
        return padded if self.packing is None else self.packing.pack(padded)


def attend_within(query: Tensor, key: Tensor, value: Tensor, own: Side, other: Side, heads: int, dropout: float):
    """Attention of the tokens of `own`, all of a side or their first ones, to those of `other`, the same side.

    query, key, value [..., D] as the sides lie -> [..., D] as `own` lies.
    """
    if other.packing is None:
        return _attend_padded(query, key, value, other.mask, heads, dropout)
    split = [_rows(x, heads) for x in (query, key, value)]
    return varlen_attention(*split, own.segments, other.segments, dropout).view(query.shape)


def attend_across(
    query: Tensor, key: Tensor, value: Tensor, own: Side, other: Side, heads: int, dropout: float, kernel: str
) -> Tensor:
    """Attention of the tokens of `own` to those of `other`, one of which is text and the other images.

    query, key, value [..., D] as the sides lie -> [..., D] as `own` lies. kernel: "reference" or "triton".
    """
    if kernel == "triton":
        split = [_rows(x, heads) for x in (query, key, value)]
        short = "query" if own.is_text else "key"
        return cross_attention(*split, own.segments, other.segments, short, dropout).view(query.shape)
    key, value = other.padded(key), other.padded(value)
    mask = other.mask
    if other.packing is not None:
        mask = torch.arange(key.shape[1], device=key.device) < other.segments.lengths[:, None]
        mask = mask[:, None, None, :]
    return own.lying(_attend_padded(own.padded(query), key, value, mask, heads, dropout))


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int, dropout: float):
    split = [split_heads(x, heads) for x in (query, key, value)]
    return attention(*split, mask, dropout).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[P,T,D] -> [P,H,T,K]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rows(x: Tensor, heads: int) -> Tensor:
    """[P,T,D] or [N,D] -> [P*T,H,K] or [N,H,K]; no copy where x is cut from a packed projection."""
    return (x.flatten(0, 1) if x.dim() == 3 else x).unflatten(-1, (heads, -1))
