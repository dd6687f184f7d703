"""One micro-batch from the numbers of its samples: chosen (samples.py), tokenised, masked, paired for ITM, with false
texts for retrieval.

Knows one sample source, one text pipeline, one image back end. Knows nothing of steps, ranks or threads: a micro-batch
is a pure function of (seed, sample numbers, stream positions), so every division of a global batch gives the same
pairs, masks, labels and replacements.
"""

from collections.abc import Sequence

import numpy as np
import torch

from meter_fast.data.batch import PretrainBatch, RankedTexts, TextToText
from meter_fast.data.cell_masking import CellMasking
from meter_fast.data.false_texts import FalseTexts
from meter_fast.data.image_check import DEFAULT_MAX_PIXELS
from meter_fast.data.images import ImageBackend
from meter_fast.data.order import mix
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import Chosen, DecodeFailed, Prepared, SampleReader, Skip
from meter_fast.data.sources import Sources
from meter_fast.data.text import TextPipeline

NEGATIVES = ("batch", "dataset")
# What a random number is for: each purpose has its own stream (1 is REPLACE of samples.py, 5 orders held-out splits, 8
# draws the operations of randaugment.py).
_COIN, _FALSE_PICTURE, _MASK, _HIDE_CELLS, _SPANS = 2, 3, 4, 6, 7


class Assembler:
    """Makes micro-batches. Safe to use from several threads when the image back end is.

    negatives: "batch", the false picture of a pair (2i, 2i+1) is the partner's, or "dataset", it is drawn uniformly
    from all (picture, caption) items, as published (so once in a while it is the true picture).
    replace: put another sample in place of a bad one (training); False leaves it out (evaluation).
    cells: hide cells of the pictures, for masked image modelling. augment: what pictures undergo (training).
    false_texts: draws texts for retrieval.
    Raises ValueError for an unknown kind of negatives.
    """

    def __init__(
        self,
        sources: Sources,
        text: TextPipeline,
        images: ImageBackend,
        seed: int,
        negatives: str = "batch",
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        replace: bool = True,
        cells: CellMasking | None = None,
        augment: RandAugment | None = None,
        false_texts: FalseTexts | None = None,
    ):
        if negatives not in NEGATIVES:
            raise ValueError(f"objectives.itm_negatives={negatives!r}: choose one of {', '.join(NEGATIVES)}")
        self.sources, self.text, self.cells, self.false_texts = sources, text, cells, false_texts
        self.seed, self.negatives = seed, negatives
        self._reader = SampleReader(sources, images, seed, max_image_pixels, replace, augment)

    def micro_batch(self, samples: np.ndarray, positions: np.ndarray) -> Prepared:
        """samples [m] int64; positions [m] int64, ascending: their places in the endless stream, which key all chances.

        Raises BadDataError after BAD_IN_A_ROW unusable samples in a row.
        """
        while True:
            skips: list[Skip] = []
            chosen = self._choose(samples, skips)
            kept = [place for place, sample in enumerate(chosen) if sample is not None]
            if not kept:
                return Prepared(None, skips)
            chosen = [chosen[place] for place in kept]
            labels, partners = self._pairing(positions[kept])
            unmatched = self._without_match(positions[kept], labels)
            false = [self._false_picture(p, skips) for p in unmatched]
            try:
                images = self._reader.decode(chosen, positions[kept])
                false_images = self._reader.decode(false, unmatched) if false else None
            except DecodeFailed:
                continue
            fields = self._texts(chosen, positions[kept], skips)
            if self.cells is not None:
                chance = _PositionRandom(self.seed, _HIDE_CELLS)
                fields |= self.cells.fields(images, (chance.at(position) for position in positions[kept].tolist()))
            return Prepared(
                PretrainBatch(
                    images=images,
                    **fields,
                    itm_labels=torch.from_numpy(labels),
                    itm_images=torch.from_numpy(partners),
                    false_images=false_images,
                    sample_ids=torch.tensor([sample.index for sample in chosen]),
                ),
                skips,
            )

    # ------------------------------------------------------------------------------------ choosing and replacing

    def _choose(self, samples: np.ndarray, skips: list[Skip]) -> list[Chosen | None]:
        """Each sample, or what takes its place. Within a pair a replacement never shows the partner's picture."""
        pictures = self.sources.image_ids(samples).tolist()
        chosen: list[Chosen | None] = []
        for place, index in enumerate(samples.tolist()):
            partner = place ^ 1
            taken = None
            if partner < len(pictures) and self.negatives == "batch":
                taken = pictures[partner]
            sample = self._reader.usable(index, pictures[place], taken, skips)
            if sample is not None:
                pictures[place] = sample.picture
            chosen.append(sample)
        return chosen

    # ------------------------------------------------------------------------------------ image-text matching

    def _pairing(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ITM labels [n] and pictures [n], int64: of positions 2i and 2i+1 one matches, which one a coin says.

        With negatives="batch" a sample whose partner is not here (left out in evaluation) matches.
        """
        labels = (positions % 2 == (mix((self.seed, _COIN), positions // 2) & np.uint64(1)).astype(np.int64)).astype(
            np.int64
        )
        pictures = np.arange(len(positions))
        if self.negatives == "dataset":
            pictures[labels == 0] = len(positions) + np.arange(np.count_nonzero(labels == 0))
            return labels, pictures
        place = {position: number for number, position in enumerate(positions.tolist())}
        for number, position in enumerate(positions.tolist()):
            partner = place.get(position ^ 1)
            if partner is None:
                labels[number] = 1
            elif labels[number] == 0:
                pictures[number] = partner
        return labels, pictures

    def _without_match(self, positions: np.ndarray, labels: np.ndarray) -> list[int]:
        """Positions that need a picture from the data set."""
        return positions[labels == 0].tolist() if self.negatives == "dataset" else []

    def _false_picture(self, position: int, skips: list[Skip]) -> Chosen:
        """A picture drawn for one position; of a bad one, its replacement."""
        index = self._reader.draws(_FALSE_PICTURE, position)[0]
        picture = int(self.sources.image_ids(np.array([index]))[0])
        return self._reader.usable(index, picture, None, skips, captioned=False)

    # ------------------------------------------------------------------------------------ text

    def _texts(
        self, chosen: Sequence[Chosen], positions: np.ndarray, skips: list[Skip]
    ) -> dict[str, torch.Tensor | TextToText | RankedTexts]:
        """Token ids, mask, what MLM hides, what a decoder reads and writes, and false texts, of a micro-batch."""
        ids = self.text.encode([sample.text for sample in chosen])
        chance = _PositionRandom(self.seed, _MASK)
        hidden = [self.text.mask(text, chance.at(p)) for text, p in zip(ids, positions.tolist(), strict=True)]
        text_ids, text_mask = self.text.pad(ids)
        masked_ids, _ = self.text.pad([masked for masked, _, _ in hidden])
        length = text_ids.shape[1]
        rows = np.concatenate([places + number * length for number, (_, places, _) in enumerate(hidden)])
        labels = np.concatenate([labels for _, _, labels in hidden])
        return {
            "text_ids": text_ids,
            "text_mask": text_mask,
            "masked_ids": masked_ids,
            "masked_rows": torch.from_numpy(rows),
            "masked_labels": torch.from_numpy(labels),
            "text_rows": text_mask.flatten().nonzero().flatten(),
            **self.text.denoise(ids, map(_PositionRandom(self.seed, _SPANS).at, positions.tolist())),
            **({} if self.false_texts is None else {"ranked": self._ranked(ids, chosen, positions, skips)}),
        }

    def _ranked(
        self, ids: Sequence[Sequence[int]], chosen: Sequence[Chosen], positions: np.ndarray, skips: list[Skip]
    ) -> RankedTexts:
        """The captions' ids, and false ones for each picture."""
        assert self.false_texts is not None
        drawn = zip(chosen, positions.tolist(), strict=True)
        false = [text for own, position in drawn for text in self.false_texts.draw(own, position, skips)]
        padded, mask = self.text.pad([*ids, *self.text.encode(false)])
        return RankedTexts(padded, mask, mask.flatten().nonzero().flatten())


class _PositionRandom:
    """numpy's Philox, keyed by (seed, purpose) and counting from a stream position: one generator, set anew each time,
    which is ten times cheaper than making one."""

    def __init__(self, seed: int, purpose: int):
        self._bits = np.random.Philox(key=np.array([seed & (2**64 - 1), purpose], np.uint64))
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, position: int) -> np.random.Generator:
        """The generator for one position; valid until the next call."""
        self._start["state"]["counter"][:] = (0, 0, position, 0)
        self._bits.state = self._start
        return self._generator
