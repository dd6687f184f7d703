"""Texts in groups by picture: all texts of a picture, or parts of equal size where these are many.

Knows how many texts each picture has; knows no files and nothing of order. A group takes the place of a sample in the
order of training, so that a step reads whole pictures.
"""

import numpy as np

from meter_fast.data.sources import Sources


class ByPicture:
    """Groups 0..len-1 of the samples of `sources`, in their order; each sample is in one group.

    at_most: samples of a group, 0 for all of a picture. A picture with more of them has several groups, of sizes that
    differ by one at most. sizes: groups of each source. Raises ValueError for at_most below 0.
    """

    def __init__(self, sources: Sources, at_most: int = 0):
        if at_most < 0:
            raise ValueError(f"data.questions_per_picture={at_most}: 0 (all) or more")
        firsts = np.flatnonzero(np.diff(sources.image_ids(np.arange(len(sources))), prepend=-1))
        counts = np.diff(firsts, append=len(sources))
        parts = -(-counts // at_most) if at_most else np.ones_like(counts)
        picture = np.repeat(np.arange(len(firsts)), parts)
        part = np.arange(len(picture)) - np.repeat(np.cumsum(parts) - parts, parts)
        starts = firsts[picture] + part * counts[picture] // parts[picture]
        self._first = np.append(starts, len(sources))
        self.sizes: list[int] = np.diff(np.searchsorted(starts, np.cumsum([0, *sources.sizes]))).tolist()

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def largest(self) -> int:
        """Samples of the largest group."""
        return int(np.diff(self._first).max())

    def samples(self, group: int) -> list[int]:
        """The samples of a group, ascending."""
        return list(range(int(self._first[group]), int(self._first[group + 1])))
