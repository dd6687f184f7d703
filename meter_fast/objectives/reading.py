"""What an objective asks of the encoders and the fusion. Knows tensors, no batch and no objective."""

from dataclasses import dataclass

from torch import Tensor

from meter_fast.models.meter import Part


@dataclass(frozen=True)
class Reading:
    """One objective's texts and what it reads of them.

    ids [P,L] int64, mask [P,L] bool (True: a token, before all padding); part: the texts' pictures, and the rows that
    are read after the last layer. rows [N] int64: the tokens as rows of a [P*L] view, ascending, if they are known.
    """

    ids: Tensor
    mask: Tensor
    part: Part
    rows: Tensor | None = None
