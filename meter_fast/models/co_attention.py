"""Co-attention fusion: text and image streams that read each other in every layer. Knows no encoders, no heads.

Shape letters: P pairs, T distinct texts, L text tokens, N distinct pictures, V image tokens, H heads, K head size,
D fusion width. Source: METER, section 3.2 (co-attention, figure 2b) and `modules/meter_module.py`; post-norm as in
BERT.

Three exact savings live here. The last layer computes only rows that the caller reads (`Need`). Several readers of
the same pictures go through the layers together (`Part`). What depends on the picture alone or on the text alone
(projection, token type, and the first layer's self-attention) is computed once for each, before both are spread over
pairs.
"""

from torch import Tensor, nn

from meter_fast.kernels.cross_attention.absorbed import absorbed_cross_attention, absorbed_pays
from meter_fast.kernels.cross_attention.reference import attention_weights
from meter_fast.kernels.launch import arch_of
from meter_fast.models.blocks import FeedForward, PackedLinear, Projection, ResidualNorm, SelfAttention
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
from meter_fast.models.sides import Side, attend_across, split_heads


class CrossAttention(nn.Module):
    """LayerNorm(x + W_o attention(x, other))."""

    def __init__(self, config: FusionConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.width, self.heads, self.dropout = config.width, config.heads, config.dropout
        self.kernel, self.form = kernels.cross_attention, kernels.cross_attention_form
        self.query = nn.Linear(config.width, config.width)
        self.key_value = PackedLinear(config.width, 2 * config.width)
        self.out = Projection(config.width, config.width, kernels.residual_norm)
        self.norm = ResidualNorm(config, kernels.residual_norm)

    def forward(self, x: Tensor, other: Tensor, own: Side, side: Side, record: list[Tensor] | None = None) -> Tensor:
        """x [..., D] as `own` lies, other [..., D] as `side` lies -> as `own` lies; attention weights [P,H,T,U] are
        added to `record` (padded sides only)."""
        dropout = self.dropout if self.training else 0.0
        if record is None and self._absorbs(own, side, x):
            return self.norm(*self._absorbed(x, other, own, side, dropout), x)
        key, value = self.key_value(other).split(self.width, -1)
        if record is not None:
            query = split_heads(self.query(x), self.heads)
            record.append(attention_weights(query, split_heads(key, self.heads), side.mask))
        return self.read(x, key, value, own, side)

    def read(self, x: Tensor, key: Tensor, value: Tensor, own: Side, side: Side) -> Tensor:
        """The direct form, of known keys and values: x [..., D] as `own` lies, key and value as `side` lies."""
        dropout = self.dropout if self.training else 0.0
        read = attend_across(self.query(x), key, value, own, side, self.heads, dropout, self.kernel)
        return self.norm(*self.out(read), x)

    def _absorbs(self, own: Side, side: Side, x: Tensor) -> bool:
        if self.form != "auto":
            return self.form == "absorbed"
        text, image = (own, side) if own.is_text else (side, own)
        arch = arch_of(x) if x.is_cuda else None
        return absorbed_pays(text.segments.longest, image.segments.longest, self.heads, self.width, arch)

    def _absorbed(self, x: Tensor, other: Tensor, own: Side, side: Side, dropout: float) -> tuple[Tensor, Tensor]:
        """(W_o attention, its bias), as `own` lies."""
        text = own if own.is_text else side
        weights = [p for linear in (self.query, self.key_value) for p in (linear.weight, linear.bias)]
        read = absorbed_cross_attention(
            own.padded(x),
            side.padded(other),
            text.segments.lengths,
            *weights,
            self.out.weight,
            None if self.out.apart else self.out.bias,
            self.heads,
            "query" if own.is_text else "key",
            dropout,
        )
        return own.lying(read), self.out.bias if self.out.apart else None


class Stream(nn.Module):
    """One side of a fusion layer: self-attention, cross-attention, feed-forward."""

    def __init__(self, config: FusionConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, kernels)
        self.cross_attention = CrossAttention(config, kernels)
        self.feed_forward = FeedForward(config, kernels)

    def forward(
        self,
        own: Tensor,
        other: Tensor,
        own_side: Side,
        other_side: Side,
        first: bool = False,
        attended: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """own and other [..., D] as their sides lie -> as `own` lies, or [P,1,D] with `first`. `attended`: the
        self-attention's result, if it is known already."""
        if attended is None:
            attended = self.self_attention(own, own_side, *(own_side.first(own) if first else ()))
        if first:
            own_side = own_side.only_first()
        return self.feed_forward(self.cross_attention(attended, other, own_side, other_side, record))


class CoAttentionLayer(nn.Module):
    """A pair of streams; both read the other side's *input* of the layer.

    image_mean: the image's cls is the mean of its tokens, so it needs all of them.
    """

    def __init__(self, config: FusionConfig, kernels: KernelsConfig, image_mean: bool = False) -> None:
        super().__init__()
        self.image_mean = image_mean
        self.text = Stream(config, kernels)
        self.image = Stream(config, kernels)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_side: Side,
        image_side: Side,
        need: Need = Need.ALL,
        attended: tuple[Tensor | None, Tensor | None] = (None, None),
        record: list[Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """text [P,L,D] or [N,D], image [P,V,D] -> (text, image), cut down to the rows needed. attended: what the
        self-attention gives of text and image, if it is known already."""
        first = need is Need.CLS
        new_text = None
        if need is not Need.IMAGE or record is not None:  # a record is of what the text reads
            new_text = self.text(text, image, text_side, image_side, first, attended[0], record)
        if need is Need.TEXT:
            return new_text, None
        return new_text, self.image(image, text, image_side, text_side, first and not self.image_mean, attended[1])


class CoAttention(Fusion):
    """Pairs of streams that read each other."""

    takes_packed = True

    def __init__(
        self,
        config: FusionConfig,
        text_width: int,
        image_width: int,
        kernels: KernelsConfig,
        image_mean: bool = False,
        pooled: bool = True,
    ) -> None:
        super().__init__(config, text_width, image_width, kernels, image_mean, CoAttentionLayer, pooled)

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
        packings: one per part, of its pairs' texts, to work on packed texts."""
        sizes, masks = [part.pairs for part in parts], spread_texts(text_mask, parts)
        if packings is None:
            sides = [Side.padded_text(mask) for mask in masks.split(sizes)]
            whole = sides[0] if len(sides) == 1 else Side.padded_text(masks)
            distinct = whole if masks is text_mask else Side.padded_text(text_mask)
        else:
            sides = [Side.packed_text(packing) for packing in packings]
            whole = sides[0] if len(sides) == 1 else Side.packed_text(Packing.join(packings))
            distinct = whole if masks is text_mask else Side.packed_text(Packing.of(text_mask))
        text, image = self._project(distinct.lying(text), image, parts)
        record: list[Tensor] | None = [] if with_attention else None
        text, text_attended = self._spread_texts(text, distinct, whole, parts)
        image, image_attended = self._spread_images(image, parts)
        attended, image_side = (text_attended, image_attended), Side.images(image)
        for layer in self.layers[:-1]:
            text, image = self._run(layer, text, image, whole, image_side, Need.ALL, attended, record)
            attended = (None, None)
        texts = text.split(sizes if packings is None else [len(packing.rows) for packing in packings])
        rows = zip(parts, texts, image.split(sizes), sides, split_record(record, sizes), strict=True)
        return tuple(self._last_layer(part.need, *row) for part, *row in rows)

    def _spread_texts(
        self, text: Tensor, distinct: Side, whole: Side, parts: tuple[Part, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """text as `distinct` lies -> for each pair, as `whole` lies, the text and what the first layer's self-attention
        gives; None for that where no text is spread, or where the first layer is the last one."""
        if distinct is whole:
            return text, None
        found = [text]
        if len(self.layers) > 1:
            found.append(self.layers[0].text.self_attention(text, distinct))
        each = [whole.lying(spread_texts(distinct.padded(x), parts)) for x in found]
        return each[0], each[1] if len(each) > 1 else None

    def _spread_images(self, image: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, Tensor | None]:
        """The same of image [N,V,D], each picture once -> [P,V,D]; where parts differ in type it is [P,V,D] already."""
        if differ_in_type(parts) or (len(parts) == 1 and parts[0].images is None):
            return image, None
        attended = None
        if len(self.layers) > 1:
            attended = spread(self.layers[0].image.self_attention(image, Side.images(image)), parts)
        return spread(image, parts), attended

    def _last_layer(self, need: Need, text: Tensor, image: Tensor, side: Side, record: list[Tensor] | None) -> Fused:
        text, new_image = self._run(self.layers[-1], text, image, side, Side.images(image), need, (None, None), record)
        if need is Need.IMAGE:
            return Fused(None, new_image, None, record)
        if need is not Need.CLS:
            text = side.padded(text)
        if need is Need.TEXT:
            return Fused(text, None, None, record)
        if need is Need.BOTH:
            return Fused(text, new_image, None, record)
        cls = self._pool(text, new_image)
        return Fused(None, None, cls, record) if need is Need.CLS else Fused(text, new_image, cls, record)
