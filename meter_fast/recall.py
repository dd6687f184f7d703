"""Recall from a table of scores, however they came about. Knows tables of numbers, no models and no files.

Source: METER, section 4.2 (zero-shot retrieval) and the published recall loop (`modules/objectives.py`). Image
retrieval (IR) asks of each caption whether its picture is among the k best pictures; text retrieval (TR) asks of each
picture whether any of its captions is among the k best captions. Captions repeat between pictures: in drawn scenes
often, as these can state few things, in photographs rarely. As published, only the caption's own picture counts as
right even if another one has the same words, so that less than 1 can be reached; "equal_captions" counts every picture
that has these words. Other pictures of which a caption is true, in other words, count as wrong in both.

Tables may be memory-mapped: they are read a few hundred rows or columns at a time. Shape letters: N pictures, T
captions, U different captions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEPTHS = (1, 5, 10)
AT_ONCE = 256  # queries


def recalls(
    scores: Tensor, belongs: Tensor, depths: Sequence[int] = DEPTHS, which: Tensor | None = None
) -> dict[str, float]:
    """scores [N,T] float32 of pictures against captions, belongs [N,T] bool -> {"ir_r1", ..., "tr_r10"}, shares of 1.

    which [T] int64: the column of scores [N,U] that holds each caption's; None: its own. Of equal scores the lower
    index ranks first, so that the result depends on nothing but the two tables.
    """
    which = torch.arange(scores.shape[1]) if which is None else which
    of_captions = ((scores[:, columns].T, own) for columns, own in _parts(which, belongs.T))
    of_pictures = (
        (scores[rows][:, which], own) for rows, own in _parts(torch.arange(len(scores)), belongs)
    )  # rows are copied first: a map is read in one piece
    return {
        f"{name}_r{k}": share
        for name, queries in (("ir", of_captions), ("tr", of_pictures))
        for k, share in zip(depths, _found(queries, depths), strict=True)
    }


def _parts(places: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(places.split(AT_ONCE), right.split(AT_ONCE), strict=True)


def _found(queries: Iterator[tuple[Tensor, Tensor]], depths: Sequence[int]) -> list[float]:
    """Parts of (scores [Q,C], right [Q,C]): the share of all Q rows that have a right one among the best 1, 5, ... of
    their columns."""
    hits, count = torch.zeros(len(depths), dtype=torch.int64), 0
    for part, right in queries:
        best = part.sort(dim=1, descending=True, stable=True).indices[:, : max(depths)]
        found = right.gather(1, best)
        hits += torch.tensor([found[:, :k].any(1).sum() for k in depths])
        count += len(part)
    return (hits.double() / count).tolist()


def chance(belongs: Tensor, depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """What `recalls` gives on average for a random order: belongs [N,T] bool -> the same keys."""
    levels = {}
    for name, right in (("ir", belongs.T), ("tr", belongs)):
        count, total = right.sum(1).double(), right.shape[1]
        for k in depths:
            missed = torch.ones_like(count)
            for drawn in range(min(k, total)):
                missed *= ((total - count - drawn) / (total - drawn)).clamp_min(0)
            levels[f"{name}_r{k}"] = (1 - missed).mean().item()
    return levels


@dataclass(frozen=True)
class Retrieval:
    """scores [N,U] float32 of N readable pictures against U different captions; owner [T] int64: the picture of each
    caption of the split; which [T] int64: the one of the U that it is."""

    scores: Tensor
    owner: Tensor
    which: Tensor

    @staticmethod
    def of(scores: Tensor, readable: Sequence[int], captions: Sequence[Sequence[str]]) -> "Retrieval":
        """scores [M,U] of M pictures, of which `readable` are, against the different ones of all their captions, in
        their order: without those that only unreadable pictures have."""
        column = {text: number for number, text in enumerate(dict.fromkeys(t for texts in captions for t in texts))}
        kept = [captions[row] for row in readable]
        used = sorted({column[text] for texts in kept for text in texts})
        place = {number: i for i, number in enumerate(used)}
        owner = torch.tensor([row for row, texts in enumerate(kept) for _ in texts])
        which = torch.tensor([place[column[text]] for texts in kept for text in texts])
        if len(readable) < len(scores):
            scores = scores[torch.tensor(readable)][:, used]
        return Retrieval(scores, owner, which)

    def result(self) -> dict:
        """As published, every caption a column of its own, and counting equal captions as one."""
        pictures, distinct = self.scores.shape
        own = torch.zeros(pictures, len(self.owner), dtype=torch.bool)
        own[self.owner, torch.arange(len(self.owner))] = True
        same = torch.zeros(pictures, distinct, dtype=torch.bool)
        same[self.owner, self.which] = True
        return {
            "retrieval": recalls(self.scores, own, which=self.which),
            "chance": chance(own),
            "equal_captions": {"retrieval": recalls(self.scores, same), "chance": chance(same)},
            "pictures": pictures,
            "captions": len(self.owner),
            "different_captions": distinct,
        }
