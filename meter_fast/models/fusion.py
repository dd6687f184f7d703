"""What both fusions share: what a caller asks for and gets, and the module around the layers. Knows no layers.

Shape letters: P pairs, T distinct texts, L text tokens, N distinct pictures, V image tokens, H heads, D fusion width.
Source: METER, section 3.2 and `modules/meter_module.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meter_fast.models.config import FusionConfig, KernelsConfig
from meter_fast.models.heads import Pooler


class Need(Enum):
    """Rows that a caller reads after the last layer."""

    ALL = "all"  # every text row, every image row, cls
    TEXT = "text"  # every text row
    IMAGE = "image"  # every image row, class tokens included
    BOTH = "both"  # every text row and every image row, no cls
    CLS = "cls"  # cls only: the first row of each side (of the image, the mean where it has no class token), pooled


@dataclass(frozen=True)
class Part:
    """One reader: its pairs of a text and a picture, and the rows it needs.

    images [pairs] int64: index of each pair's picture; None: pair i is of picture i.
    texts [pairs] int64: index of each pair's text; None: the texts of the parts stand one after the other, one for each
    pair. Either all parts tell it or none does.
    image_type: row of the token types added to the pictures (2: the second picture of NLVR2).
    """

    need: Need
    pairs: int
    images: Tensor | None = None
    texts: Tensor | None = None
    image_type: int = 1


@dataclass(frozen=True)
class Fused:
    """text [P,L,D], image [P,V,D], cls [P,2D] (text half first) or [P,D] (of a decoder); None where `Need` did not ask.

    attention: per layer the weights from text to image [P,H,L,V] float32, when asked for.
    """

    text: Tensor | None
    image: Tensor | None
    cls: Tensor | None
    attention: list[Tensor] | None = None


class Fusion(nn.Module):
    """Projections, token types, `config.layers` layers of the class given, poolers unless `pooled` is False.

    image_mean: images come without class token, and their pooler reads the mean of their tokens.
    """

    def __init__(
        self,
        config: FusionConfig,
        text_width: int,
        image_width: int,
        kernels: KernelsConfig,
        image_mean: bool,
        layer: Callable[[FusionConfig, KernelsConfig, bool], nn.Module],
        pooled: bool = True,
    ) -> None:
        super().__init__()
        self.image_mean = image_mean
        self.text_projection = nn.Linear(text_width, config.width)
        self.image_projection = nn.Linear(image_width, config.width)
        self.token_types = nn.Embedding(config.token_types, config.width)
        self.layers = nn.ModuleList(layer(config, kernels, image_mean) for _ in range(config.layers))
        self.text_pooler = Pooler(config.width) if pooled else None
        self.image_pooler = Pooler(config.width) if pooled else None
        self.activation_checkpointing = False

    def _project(self, text: Tensor, image: Tensor, parts: tuple[Part, ...]) -> tuple[Tensor, Tensor]:
        """Both sides in the fusion's width, with their token types: the text, and each picture once [N,V,D] or, where
        the parts differ in type, once for each pair [P,V,D]."""
        kinds = [part.image_type for part in parts]
        types = self.token_types(torch.arange(max(kinds) + 1, device=text.device))
        text, image = self.text_projection(text) + types[0], self.image_projection(image)
        if not differ_in_type(parts):
            return text, image + types[kinds[0]]
        own = spread(image, parts).split([part.pairs for part in parts])
        return text, torch.cat([rows + types[kind] for rows, kind in zip(own, kinds, strict=True)])

    def _run(self, layer: nn.Module, *inputs: object) -> Any:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _pool(self, text: Tensor, image: Tensor) -> Tensor:
        """text [P,L,D], image [P,V,D] -> cls [P,2D]: of the first token of each, or of the mean of the image's."""
        own = image.mean(1) if self.image_mean else image[:, 0]
        return torch.cat([self.text_pooler(text[:, 0]), self.image_pooler(own)], dim=-1)


def differ_in_type(parts: tuple[Part, ...]) -> bool:
    """Whether the parts add different token types to their pictures."""
    return len({part.image_type for part in parts}) > 1


def fit_token_types(table: Tensor, rows: int) -> Tensor:
    """A table of token types [R,D] -> [rows,D]: what it lacks are copies of its last row, as published (METER
    `modules/meter_module.py`: NLVR2's second picture starts as the first); what is beyond is left out."""
    lacking = max(0, rows - len(table))
    return torch.cat([table[:rows], table[-1:].expand(lacking, -1)])


def refit(name: str, before: int, after: int) -> str:
    """What `fit_token_types` did to a table of `before` rows, in words."""
    if before < after:
        return f"resized: {name} from {before} to {after} rows, new ones start as row {before - 1}"
    return f"resized: {name} from {before} to {after} rows, row {', '.join(map(str, range(after, before)))} left out"


def spread(image: Tensor, parts: tuple[Part, ...]) -> Tensor:
    """[N,V,D], one row per picture -> [P,V,D], one row per pair.

    Part by part, not with one long index: backward then adds few values per row, in an order that does not change.
    """
    return torch.cat([image[: p.pairs] if p.images is None else image.index_select(0, p.images) for p in parts])


def spread_texts(text: Tensor, parts: tuple[Part, ...]) -> Tensor:
    """[T,...], one row per text -> [P,...], one row per pair."""
    if all(part.texts is None for part in parts):
        return text
    return torch.cat([text.index_select(0, part.texts) for part in parts])


def split_record(record: list[Tensor] | None, sizes: list[int]) -> list[list[Tensor] | None]:
    if record is None:
        return [None] * len(sizes)
    by_layer = [weights.split(sizes) for weights in record]
    return [[weights[i] for weights in by_layer] for i in range(len(sizes))]
