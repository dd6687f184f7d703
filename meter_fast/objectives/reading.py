"""What an objective asks of the encoders and the fusion, and how the fusion answers. Knows tensors and the model, no
batch and no objective."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meter_fast.models.meter import Fused, Meter, Part
from meter_fast.models.packing import Packing


@dataclass(frozen=True)
class Reading:
    """One objective's texts and what it reads of them.

    ids [P,L] int64, mask [P,L] bool (True: a token, before all padding); part: the texts' pictures, and the rows that
    are read after the last layer. rows [N] int64: the tokens as rows of a [P*L] view, ascending, if they are known.
    also: further parts that read the same texts (the second pictures of NLVR2); all of them need cls.
    """

    ids: Tensor
    mask: Tensor
    part: Part
    rows: Tensor | None = None
    also: tuple[Part, ...] = ()


def fuse_readings(
    model: Meter,
    text: Tensor,
    image: Tensor,
    mask: Tensor,
    readings: Sequence[Reading],
    packings: Sequence[Packing] | None = None,
) -> list[Fused]:
    """One `Fused` for each reading; of one with several parts, their cls side by side.

    text [P,L,D_text] and mask [P,L]: the encoded texts of all readings, one after the other, each once however many
    parts read it; image [N,V,D_vision]. packings: one for each reading's rows of `mask`, if known.
    """
    times = [1 + len(reading.also) for reading in readings]
    if max(times) > 1:
        sizes = [reading.part.pairs for reading in readings]
        text, mask = (
            torch.cat([rows for rows, n in zip(whole.split(sizes), times, strict=True) for _ in range(n)])
            for whole in (text, mask)
        )
        packings = packings and [packing for packing, n in zip(packings, times, strict=True) for _ in range(n)]
    parts = tuple(part for reading in readings for part in (reading.part, *reading.also))
    fused = iter(model.fuse_parts(text, image, mask, parts, packings=packings and tuple(packings)))
    found = []
    for n in times:
        own = [next(fused) for _ in range(n)]
        found.append(own[0] if n == 1 else replace(own[0], cls=torch.cat([one.cls for one in own], dim=-1)))
    return found
