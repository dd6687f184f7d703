"""Micro-batches of statements about one or two pictures, each in one class. The rest is as for all texts about
pictures."""

from collections.abc import Sequence

import torch

from meter_fast.data.about_pictures import AboutPictures
from meter_fast.data.batch import StatementBatch
from meter_fast.data.samples import Chosen


class StatementAssembler(AboutPictures):
    """Makes micro-batches. sources: of statements (statement_tables.py)."""

    def batch(self, chosen: Sequence[Chosen], rows: torch.Tensor, shared: dict[str, torch.Tensor]) -> StatementBatch:
        """The batch of the statements."""
        labels = torch.tensor([one.sample.label for one in chosen])
        return StatementBatch(image_rows=rows, labels=labels, **shared)
