"""Merged attention fusion: the tokens of picture and text in one sequence, read by plain transformer layers. Knows no
encoders, no heads.

Shape letters: P pairs, L text tokens, N distinct pictures, V image tokens, H heads, D fusion width.
Source: METER, section 3.2 (merged attention, figure 2a); post-norm as in BERT. The paper takes 12 of these layers
where co-attention has 6 pairs. At a width of 768 these are 85.1 M parameters instead of 113.4 M, and a model with
CLIP-B/16 and roberta-base has 329.5 M instead of 357.9 M; with 16 layers it has as many to 0.01 %.

Savings, all exact: the last layer computes only rows that the caller reads (`Need`), several readers of the same
pictures go through the layers together (`Part`), and each picture and each text is projected once. The picture stands
first in the sequence, so that padding comes last; attention does not depend on the order.
"""

import torch
from torch import Tensor, nn

from meter_fast.models.blocks import FeedForward, SelfAttention
from meter_fast.models.config import FusionConfig, KernelsConfig
from meter_fast.models.fusion import (
    Fused,
    Fusion,
    Need,
    Part,
    differ_in_type,
    split_record,
    spread,
    spread_texts,
)
from meter_fast.models.packing import Packing
from meter_fast.models.sides import Side


class MergedLayer(nn.Module):
    """Self-attention and feed-forward over picture and text at once.

    image_mean: the image's cls is the mean of its tokens, so it needs all of them.
    """

    def __init__(self, config: FusionConfig, kernels: KernelsConfig, image_mean: bool = False) -> None:
        super().__init__()
        self.image_mean = image_mean
        self.self_attention = SelfAttention(config, kernels)
        self.feed_forward = FeedForward(config, kernels)

    def forward(
        self, x: Tensor, side: Side, images: int, need: Need = Need.ALL, record: list[Tensor] | None = None
    ) -> Tensor:
        """x [P,V+L,D], of which the first `images` tokens are the picture's -> all of them, the picture's [P,V,D],
        the text's [P,L,D], or the rows that cls is made of: the picture's and the first of the text [P,2 or V+1,D].

        Attention weights from text to picture [P,H,L,V] are added to `record`; with Need.CLS those of the first text
        token.
        """
        own = None
        if need is Need.TEXT:
            own = x[:, images:]
        elif need is Need.IMAGE:
            own = x[:, :images]
        elif need is Need.CLS:
            own = torch.cat([x[:, : images if self.image_mean else 1], x[:, images : images + 1]], dim=1)
        if record is not None:
            text = x[:, images : images + 1] if need is Need.CLS else x[:, images:]
            record.append(self.self_attention.weights(x, side, text)[..., :images].contiguous())
        return self.feed_forward(self.self_attention(x, side, own))


class MergedAttention(Fusion):
    """One sequence for each pair. Always padded: a pair's few tokens of padding stand beside hundreds of a picture."""

    takes_packed = False

    def __init__(
        self,
        config: FusionConfig,
        text_width: int,
        image_width: int,
        kernels: KernelsConfig,
        image_mean: bool = False,
        pooled: bool = True,
    ) -> None:
        super().__init__(config, text_width, image_width, kernels, image_mean, MergedLayer, pooled)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_mask: Tensor,
        parts: tuple[Part, ...],
        with_attention: bool = False,
        packings: tuple[Packing, ...] | None = None,
    ) -> tuple[Fused, ...]:
        """One `Fused` per part. text [T,L,E] holds the texts that `Part` tells of, image [N,V,E'] each picture once.
        packings: not needed, `text_mask` says where the tokens are."""
        sizes = [part.pairs for part in parts]
        text, image = self._project(text, image, parts)
        images = image.shape[1]
        text_mask = spread_texts(text_mask, parts)
        image = image if differ_in_type(parts) else spread(image, parts)
        x = torch.cat([image, spread_texts(text, parts)], dim=1)
        side = Side.merged(text_mask, images)
        record: list[Tensor] | None = [] if with_attention else None
        for layer in self.layers[:-1]:
            x = self._run(layer, x, side, images, Need.ALL, record)
        sides = [side] if len(parts) == 1 else [Side.merged(mask, images) for mask in text_mask.split(sizes)]
        rows = zip(parts, x.split(sizes), sides, split_record(record, sizes), strict=True)
        return tuple(self._last_layer(part.need, images, *row) for part, *row in rows)

    def _last_layer(self, need: Need, images: int, x: Tensor, side: Side, record: list[Tensor] | None) -> Fused:
        x = self._run(self.layers[-1], x, side, images, need, record)
        if need is Need.TEXT:
            return Fused(x, None, None, record)
        if need is Need.IMAGE:
            return Fused(None, x, None, record)
        if need is Need.CLS and not self.image_mean:
            images = 1
        image, text = x.split([images, x.shape[1] - images], dim=1)
        if need is Need.BOTH:
            return Fused(text, image, None, record)
        cls = self._pool(text, image)
        return Fused(None, None, cls, record) if need is Need.CLS else Fused(text, image, cls, record)
