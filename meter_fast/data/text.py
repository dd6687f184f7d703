"""Captions to token ids: checked, tokenised, masked, padded to the batch's longest.

Knows one tokenizer and one way of masking; knows no files, no pictures and no order. Safe to use from several threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from meter_fast.data import masking as masks
from meter_fast.data.batch import TextToText
from meter_fast.data.spans import Denoiser

# More characters than this for each token that is kept are not looked at: a caption of 10 000 words costs what 1600
# characters cost.
CHARACTERS_PER_TOKEN = 32


class TextPipeline:
    """Tokenise, mask and pad the captions of one run.

    max_length: longest text in tokens, special tokens included (METER: 50 for pre-training). masking: "token",
    "whole_word_published", "whole_word" or "content_word" (see masking.py). probability: share of these that are
    hidden. denoiser: hides spans for objectives that write text; None where there are none.
    Raises ValueError for an unknown masking, a probability outside 0..1 or a max_length below 3.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int = 50,
        masking: str = "token",
        probability: float = 0.15,
        denoiser: Denoiser | None = None,
    ) -> None:
        if masking not in masks.KINDS:
            raise ValueError(f"objectives.masking={masking!r}: choose one of {', '.join(masks.KINDS)}")
        if not 0 <= probability <= 1:
            raise ValueError(f"objectives.mlm_probability={probability}: give a number from 0 to 1")
        if max_length < 3:
            raise ValueError(
                f"data.max_text_length={max_length}: a text has a first token, a last one and one between; "
                "give at least 3"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.masking = masking
        self.probability = probability
        self.denoiser = denoiser
        self.pad_id: int = tokenizer.pad_token_id
        self.vocabulary = masks.read_vocabulary(tokenizer)
        # A copy of our own: truncation and special tokens are settings of the object, which other users of the
        # tokenizer must not see.
        self._encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._encoder.no_padding()
        self._encoder.enable_truncation(max_length)
        self._encoder.encode_special_tokens = True  # "[MASK]" or "</s>" in a caption is text, not a token

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Checked captions -> token ids with the special tokens, at most max_length each, not padded."""
        limit = CHARACTERS_PER_TOKEN * self.max_length
        # One by one: encode_batch hands texts to a pool of threads of its own, as many as there are cores.
        return [self._encoder.encode(text[:limit]).ids for text in texts]

    def cuts(self, text: str) -> bool:
        """Whether `encode` leaves out the end of a checked caption."""
        beyond = len(text) > CHARACTERS_PER_TOKEN * self.max_length
        return beyond or bool(self._encoder.encode(text).overflowing)

    def mask(self, ids: Sequence[int], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hide tokens of one text: ids [n] -> (masked ids [n], positions [m], labels [m] = ids[positions]), all int64.

        A pure function of ids and the generator's state; m may be 0.
        """
        array = np.asarray(ids, dtype=np.int64)
        if self.masking == "token":
            positions = masks.choose_tokens(array, self.vocabulary, self.probability, generator)
        elif self.masking == "whole_word":
            positions = masks.choose_whole_words(array, self.vocabulary, self.probability, generator)
        elif self.masking == "content_word":
            positions = masks.choose_content_words(array, self.vocabulary, self.probability, generator)
        else:
            positions = masks.choose_whole_words_published(
                array, self.vocabulary, self.probability, self.max_length, generator
            )
        return masks.hide(array, positions, self.vocabulary, generator), positions, array[positions]

    def denoise(self, ids: Sequence[Sequence[int]], chances: Iterable[np.random.Generator]) -> dict[str, TextToText]:
        """By the objective that writes text, what is read and written for each of B texts; chances: one for each."""
        if self.denoiser is None:
            return {}
        return {name: self._text_to_text(texts) for name, texts in self.denoiser.hide(ids, chances).items()}

    def _text_to_text(self, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> TextToText:
        ids, mask = self.pad([read for read, _ in texts])
        targets, real = self.pad([written for _, written in texts])
        rows = [part.flatten().nonzero().flatten() for part in (mask, real)]
        return TextToText(ids, mask, rows[0], targets, real.sum(1), rows[1])

    def pad(self, ids: Sequence[Sequence[int] | np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts -> (ids [B,L] int64, filled up with the tokenizer's padding id; mask [B,L] bool, True on text).

        L = the batch's longest.
        """
        lengths = np.array([len(text) for text in ids])
        real = np.arange(lengths.max()) < lengths[:, None]
        padded = np.full(real.shape, self.pad_id, dtype=np.int64)
        padded[real] = np.concatenate(ids)
        return torch.from_numpy(padded), torch.from_numpy(real)
