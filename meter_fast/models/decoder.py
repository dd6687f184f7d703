"""The decoder of an encoder-decoder: layers that write a text, reading what the fusion made of picture and text. Knows
no encoders, no heads, no objective.

Shape letters: P pairs, T tokens written, L text tokens, V image tokens, D fusion width, S vocabulary, K texts written
for one pair at a time. Source: METER, section 3.2 (encoder-only versus encoder-decoder) and table 7: each layer has
causal self-attention, cross-attention to the picture, another to the text, and feed-forward. Post-norm as in the
fusion, of which it takes blocks, width, heads and dropout. Where the paper is silent: the picture is read first, and
the input has word and position tables of its own.

All tokens of a known text are computed at once (`forward`); a text that is being written, token by token (`step`),
with the keys and values of earlier tokens and of both sides kept. Both give the same numbers.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meter_fast.models.blocks import FeedForward, SelfAttention
from meter_fast.models.co_attention import CrossAttention
from meter_fast.models.config import DecoderConfig, FusionConfig, KernelsConfig
from meter_fast.models.heads import LAYER_NORM_EPS
from meter_fast.models.sides import Side, attend_within

MARKS = 2  # rows of the word table behind the vocabulary: the beginning of a text, and the class token


@dataclass
class LayerCache:
    """What one layer keeps: key and value of the tokens so far [P,K,t,D], of the image [P,V,D], of the text [P,L,D]."""

    own: tuple[Tensor, Tensor] | None
    image: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]


@dataclass
class Cache:
    """What `TextDecoder.step` keeps of the tokens before: by layer, and how many there are."""

    layers: list[LayerCache]
    image_side: Side
    text_side: Side
    length: int = 0

    def choose(self, texts: Tensor) -> None:
        """Go on with some of the texts, in place: texts [P,K] int64, for each pair which of its own."""
        for layer in self.layers:
            if layer.own is not None:
                index = texts[:, :, None, None]
                layer.own = tuple(kept.gather(1, index.expand(-1, -1, *kept.shape[2:])) for kept in layer.own)


class DecoderEmbeddings(nn.Module):
    """LayerNorm(word + position); the words are the vocabulary, the beginning and the class token."""

    def __init__(self, vocab_size: int, config: DecoderConfig, fusion: FusionConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size + MARKS, fusion.width)
        self.positions = nn.Embedding(config.max_positions, fusion.width)
        self.norm = nn.LayerNorm(fusion.width, eps=LAYER_NORM_EPS)
        self.dropout = fusion.dropout

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids [...] int64, places int64, broadcastable to it -> [...,D]."""
        return F.dropout(self.norm(self.words(ids) + self.positions(places)), self.dropout, self.training)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the picture, cross-attention to the text, feed-forward."""

    def __init__(self, config: FusionConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config, kernels)
        self.image_attention = CrossAttention(config, kernels)
        # The absorbed form reads every token of the other side, and texts have padding.
        self.text_attention = CrossAttention(config, replace(kernels, cross_attention_form="direct"))
        self.feed_forward = FeedForward(config, kernels)

    def forward(self, x: Tensor, own: Side, image: Tensor, image_side: Side, text: Tensor, text_side: Side) -> Tensor:
        """x [P,T,D], image [P,V,D], text [P,L,D] -> [P,T,D]; own: with the causal mask."""
        x = self.self_attention(x, own)
        x = self.image_attention(x, image, own, image_side)
        x = self.text_attention(x, text, own, text_side)
        return self.feed_forward(x)

    def begin(self, image: Tensor, text: Tensor) -> LayerCache:
        """Keys and values of both sides, before the first token."""
        sides = ((self.image_attention, image), (self.text_attention, text))
        return LayerCache(None, *(tuple(attention.key_value(x).chunk(2, -1)) for attention, x in sides))

    def step(self, x: Tensor, kept: LayerCache, own: Side, image_side: Side, text_side: Side) -> Tensor:
        """x [P,K,D], the next token of each text -> [P,K,D]; its key and value are added to `kept`.

        The K texts of a pair read it as K tokens of one text would, so its keys and values are there once.
        """
        attention = self.self_attention
        query, key, value = attention.query_key_value(x).unsqueeze(2).chunk(3, -1)
        if kept.own is not None:
            key, value = (torch.cat([old, new], dim=2) for old, new in zip(kept.own, (key, value), strict=True))
        kept.own = key, value
        rows = [part.flatten(0, 1) for part in (query, key, value)]
        side = Side.images(rows[1])  # every one of them may be read
        read = attend_within(*rows, side, side, attention.heads, 0.0).reshape(x.shape)
        x = attention.norm(*attention.out(read), x)
        x = self.image_attention.read(x, *kept.image, own, image_side)
        x = self.text_attention.read(x, *kept.text, own, text_side)
        return self.feed_forward(x)


class TextDecoder(nn.Module):
    """Embeddings and `config.layers` layers. Its rows go to a head over the vocabulary, the class token's to others.

    begin_id, class_id: the two tokens that are not of the vocabulary.
    """

    def __init__(self, vocab_size: int, config: DecoderConfig, fusion: FusionConfig, kernels: KernelsConfig) -> None:
        super().__init__()
        self.begin_id, self.class_id = vocab_size, vocab_size + 1
        self.max_positions = config.max_positions
        self.embeddings = DecoderEmbeddings(vocab_size, config, fusion)
        self.layers = nn.ModuleList(DecoderLayer(fusion, kernels) for _ in range(config.layers))
        self.activation_checkpointing = False

    def forward(
        self, ids: Tensor, text: Tensor, image: Tensor, text_mask: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """ids [P,T] int64, what was written before each row; text [P,L,D] and image [P,V,D], as the fusion leaves
        them; text_mask [P,L] bool -> [P,T,D], each row from the ids up to its own.

        lengths [P] int: tokens of each text, the rest being padding whose rows mean nothing; None: no padding. Raises
        ValueError if T exceeds the positions.
        """
        if ids.shape[1] > self.max_positions:
            raise ValueError(
                f"a text of {ids.shape[1]} tokens exceeds model.decoder.max_positions={self.max_positions}: raise "
                "that, or lower data.max_text_length"
            )
        own = _causal(ids, lengths)
        image_side, text_side = Side.images(image), Side.padded_text(text_mask)
        x = self.embeddings(ids, torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            inputs = (x, own, image, image_side, text, text_side)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        return x

    def classify(self, text: Tensor, image: Tensor, text_mask: Tensor) -> Tensor:
        """What the class token reads of text [P,L,D] and image [P,V,D]: [P,D]."""
        return self(torch.full_like(text_mask[:, :1], self.class_id, dtype=torch.int64), text, image, text_mask)[:, 0]

    def inputs(self, targets: Tensor) -> Tensor:
        """The ids that stand before each of targets [P,T] int64: the beginning, then all of them but the last."""
        return F.pad(targets[:, :-1], (1, 0), value=self.begin_id)

    def begin(self, text: Tensor, image: Tensor, text_mask: Tensor) -> Cache:
        """Before the first token of texts that read text [P,L,D] and image [P,V,D]."""
        layers = [layer.begin(image, text) for layer in self.layers]
        return Cache(layers, Side.images(image), Side.padded_text(text_mask))

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """The next row of each of K texts of each pair: ids [P,K] int64 -> [P,K,D]. `cache` is brought up to date.

        Without gradient and dropout. Raises ValueError beyond the positions.
        """
        if cache.length >= self.max_positions:
            raise ValueError(f"a text ends at model.decoder.max_positions={self.max_positions} tokens: write fewer")
        x = self.embeddings(ids, torch.tensor([[cache.length]], device=ids.device))
        own = _all_real(ids)
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            x = layer.step(x, kept, own, cache.image_side, cache.text_side)
        cache.length += 1
        return x


def _causal(ids: Tensor, lengths: Tensor | None) -> Side:
    """Padding comes last, so hiding what comes later hides it too."""
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    if lengths is None:
        return replace(_all_real(ids), mask=mask[None, None])
    real = torch.arange(length, device=ids.device) < lengths[:, None]
    return replace(Side.padded_text(real), mask=mask[None, None])


def _all_real(ids: Tensor) -> Side:
    return replace(Side.images(ids), is_text=True)
