"""Co-attention fusion: text and image streams that read each other in every layer. Knows no encoders, no heads.

Shape letters: P pairs, L text tokens, N distinct pictures, V image tokens, H heads, K head size, D fusion width.
Source: METER, section 3.2 (co-attention, figure 2b) and `modules/meter_module.py`; post-norm as in BERT.

Three exact savings live here. The last layer computes only rows that the caller reads (`Need`). Several readers of
the same pictures go through the layers together (`Part`). What depends on the picture alone (projection, token type,
and the first layer's self-attention on the image side) is computed once per picture, before pictures are spread over
pairs.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meter_fast.kernels.cross_attention.reference import attention, attention_weights
from meter_fast.models.config import FusionConfig
from meter_fast.models.heads import LAYER_NORM_EPS, Pooler


class Need(Enum):
    """Rows that a caller reads after the last layer."""

    ALL = "all"  # every text row, every image row, cls
    TEXT = "text"  # every text row
    CLS = "cls"  # cls only: the first row of each side, pooled


@dataclass(frozen=True)
class Part:
    """One reader: `pairs` consecutive texts, the pictures that go with them, and the rows it needs.

    images [pairs] int64: index of each text's picture; None: text i goes with picture i.
    """

    need: Need
    pairs: int
    images: Tensor | None = None


@dataclass(frozen=True)
class Fused:
    """text [P,L,D], image [P,V,D], cls [P,2D] (text half first); None where `Need` did not ask.

    attention: per layer the weights from text to image [P,H,L,V] float32, when asked for.
    """

    text: Tensor | None
    image: Tensor | None
    cls: Tensor | None
    attention: list[Tensor] | None = None


class PackedLinear(nn.Linear):
    """Several projections of one input kept in one matrix, so that one multiplication does them all."""

    def forward(self, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
        """x [..., D] -> outputs begin..end of all outputs."""
        if begin == 0 and end is None:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[begin:end], self.bias[begin:end])


class SelfAttention(nn.Module):
    """LayerNorm(x + W_o attention(x, x)), for all tokens or for the first `rows` only."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.width, self.heads, self.dropout = (config.width, config.heads, config.dropout)
        self.query_key_value = PackedLinear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None = None) -> Tensor:
        """x [P,T,D], mask bool [P,1,1,T] or None -> [P,rows or T,D]."""
        own = x if rows is None else x[:, :rows]
        if rows is None:
            query, key, value = _split_heads(self.query_key_value(x), 3, self.heads)
        else:
            (query,) = _split_heads(self.query_key_value(own, 0, self.width), 1, self.heads)
            key, value = _split_heads(self.query_key_value(x, self.width), 2, self.heads)
        read = attention(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.norm(own + F.dropout(self.out(_join_heads(read)), self.dropout, self.training))


class CrossAttention(nn.Module):
    """LayerNorm(x + W_o attention(x, other))."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key_value = PackedLinear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(
        self, x: Tensor, other: Tensor, other_mask: Tensor | None, record: list[Tensor] | None = None
    ) -> Tensor:
        """x [P,T,D], other [P,U,D], other_mask bool [P,1,1,U] or None -> [P,T,D]; weights [P,H,T,U] are added to
        `record`."""
        (query,) = _split_heads(self.query(x), 1, self.heads)
        key, value = _split_heads(self.key_value(other), 2, self.heads)
        if record is not None:
            record.append(attention_weights(query, key, other_mask))
        read = attention(query, key, value, other_mask, self.dropout if self.training else 0.0)
        return self.norm(x + F.dropout(self.out(_join_heads(read)), self.dropout, self.training))


class FeedForward(nn.Module):
    """LayerNorm(x + W_2 gelu(W_1 x)), 4 x wide."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))


class Stream(nn.Module):
    """One side of a fusion layer: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        own: Tensor,
        other: Tensor,
        own_mask: Tensor | None,
        other_mask: Tensor | None,
        rows: int | None = None,
        attended: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """own [P,T,D], other [P,U,D] -> [P,rows or T,D]. `attended`: the self-attention's result, if it is known
        already."""
        if attended is None:
            attended = self.self_attention(own, own_mask, rows)
        return self.feed_forward(self.cross_attention(attended, other, other_mask, record))


class CoAttentionLayer(nn.Module):
    """A pair of streams; both read the other side's *input* of the layer."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.text = Stream(config)
        self.image = Stream(config)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor,
        need: Need = Need.ALL,
        image_attended: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """text [P,L,D], image [P,V,D], text_mask bool [P,1,1,L] -> (text, image), cut down to the rows needed."""
        rows = 1 if need is Need.CLS else None
        new_text = self.text(text, image, text_mask, None, rows, record=record)
        if need is Need.TEXT:
            return new_text, None
        return new_text, self.image(image, text, None, text_mask, rows, image_attended)


class CoAttention(nn.Module):
    """Projections, token types, fusion layers and poolers."""

    def __init__(self, config: FusionConfig, text_width: int, image_width: int) -> None:
        super().__init__()
        self.text_projection = nn.Linear(text_width, config.width)
        self.image_projection = nn.Linear(image_width, config.width)
        self.token_types = nn.Embedding(config.token_types, config.width)
        self.layers = nn.ModuleList(CoAttentionLayer(config) for _ in range(config.layers))
        self.text_pooler = Pooler(config.width)
        self.image_pooler = Pooler(config.width)
        self.activation_checkpointing = False

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor,
        parts: tuple[Part, ...],
        image_type: int = 1,
        with_attention: bool = False,
    ) -> tuple[Fused, ...]:
        """One `Fused` per part. text [P,L,E] holds the parts' texts one after the other, image [N,V,E'] each picture
        once."""
        mask = text_mask[:, None, None, :]
        types = self.token_types(
            torch.arange(0, image_type + 1, image_type, device=text.device)
        )  # rows 0 and image_type
        text = self.text_projection(text) + types[0]
        image = self.image_projection(image) + types[1]
        record: list[Tensor] | None = [] if with_attention else None
        text, image = self._layers_before_last(text, image, mask, parts, record)
        sizes = [part.pairs for part in parts]
        rows = zip(parts, text.split(sizes), image.split(sizes), mask.split(sizes), strict=True)
        weights = _split_record(record, sizes)
        return tuple(self._last_layer(part.need, *row, record=w) for (part, *row), w in zip(rows, weights, strict=True))

    def _layers_before_last(
        self, text: Tensor, image: Tensor, mask: Tensor, parts: tuple[Part, ...], record: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        first_attended = None
        if any(part.images is not None for part in parts) or len(parts) > 1:
            if len(self.layers) > 1:
                first_attended = _spread(self.layers[0].image.self_attention(image, None), parts)
            image = _spread(image, parts)
        for layer in self.layers[:-1]:
            text, image = self._run(layer, text, image, mask, Need.ALL, first_attended, record)
            first_attended = None
        return text, image

    def _last_layer(self, need: Need, text: Tensor, image: Tensor, mask: Tensor, record: list[Tensor] | None) -> Fused:
        text, new_image = self._run(self.layers[-1], text, image, mask, need, None, record)
        if need is Need.TEXT:
            return Fused(text, None, None, record)
        cls = torch.cat([self.text_pooler(text[:, 0]), self.image_pooler(new_image[:, 0])], dim=-1)
        return Fused(None, None, cls, record) if need is Need.CLS else Fused(text, new_image, cls, record)

    def _run(self, layer: CoAttentionLayer, *inputs: object) -> tuple[Tensor, Tensor | None]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def _split_heads(packed: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """[P,T,count*D] -> count tensors [P,H,T,K]."""
    pairs, tokens, width = packed.shape
    return packed.view(pairs, tokens, count, heads, width // (count * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _join_heads(x: Tensor) -> Tensor:
    """[P,H,T,K] -> [P,T,D]."""
    return x.transpose(1, 2).flatten(2)


def _spread(image: Tensor, parts: tuple[Part, ...]) -> Tensor:
    """[N,V,D], one row per picture -> [P,V,D], one row per pair.

    Part by part, not with one long index: backward then adds few values per row, in an order that does not change.
    """
    return torch.cat([image[: p.pairs] if p.images is None else image.index_select(0, p.images) for p in parts])


def _split_record(record: list[Tensor] | None, sizes: list[int]) -> list[list[Tensor] | None]:
    if record is None:
        return [None] * len(sizes)
    by_layer = [weights.split(sizes) for weights in record]
    return [[weights[i] for weights in by_layer] for i in range(len(sizes))]
