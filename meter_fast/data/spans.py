"""Span denoising: which runs of a caption's tokens are hidden, and the two texts that this makes, one to read and one
to write.

Source: METER, section 3.2 (T5-style denoising, 15 % of the tokens); Raffel et al. 2020, "Exploring the Limits of
Transfer Learning", section 3.1.4 and 3.3.4 (spans of 3 tokens on average). The text that is read has a sentinel,
<extra_id_0>, <extra_id_1>, ..., in place of each span; the one that is written has the sentinels, each before its span,
and the tokenizer's last token at the end. Where this differs from T5: spans may begin a caption and need not end it,
and captions are short, so that the number of hidden tokens, which is rounded, is at least 1.

Captioning is the same with everything hidden: the text that is read is one sentinel.

Knows token ids of one tokenizer; draws from the generator it is given. One caption at a time, in numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

SPANS, CAPTION = "span_denoising", "caption"
Texts = tuple[np.ndarray, np.ndarray]  # what is read and what is written, ids int64


def sentinel(number: int) -> str:
    """The token that stands for span `number` of a text, from 0."""
    return f"<extra_id_{number}>"


def spans_of(tokens: int, probability: float, mean_length: float) -> tuple[int, int]:
    """How many of so many tokens are hidden, and in how many spans: at least 1 and 1, with a token between two."""
    hidden = min(max(1, int(tokens * probability + 0.5)), max(1, tokens - 1))
    spans = max(1, int(hidden / mean_length + 0.5))
    return hidden, min(spans, hidden, tokens - hidden + 1)


def sentinels_for(names: Sequence[str], max_length: int, probability: float, mean_length: float) -> int:
    """Sentinels that these objectives need for texts of up to max_length tokens; 0 where none of them hides spans."""
    if SPANS not in names:
        return 1 if CAPTION in names else 0
    return max(spans_of(tokens, probability, mean_length)[1] for tokens in range(1, max_length + 1))


def longest_target(names: Sequence[str], max_length: int, probability: float, mean_length: float) -> int:
    """Tokens of the longest text that these objectives write for captions of up to max_length tokens, two of which are
    the first and the last; 0 where none of them writes."""
    longest = [max_length] if CAPTION in names else []
    if SPANS in names:
        sizes = (spans_of(tokens, probability, mean_length) for tokens in range(1, max(2, max_length - 1)))
        longest += [hidden + spans + 1 for hidden, spans in sizes]
    return max(longest, default=0)


def choose_spans(
    tokens: int, probability: float, mean_length: float, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """(begin, end) of the spans hidden among so many tokens, ascending; every arrangement is equally probable."""
    hidden, spans = spans_of(tokens, probability, mean_length)
    lengths = _parts(hidden, spans, generator)
    gaps = _parts(tokens - hidden + 2, spans + 1, generator)  # the first and the last may be empty: one too long each
    begins = np.cumsum(gaps[:-1]) - 1 + np.cumsum(lengths) - lengths
    return [(int(begin), int(begin + length)) for begin, length in zip(begins, lengths, strict=True)]


def _parts(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` numbers of 1 or more, int64 [parts]."""
    cuts = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


class Denoiser:
    """Hides spans of captions for the objectives named: "span_denoising", "caption" or both.

    probability: share of the tokens that span denoising hides; mean_length: of its spans, in tokens. Raises ValueError
    for a tokenizer without sentinels, and numbers out of their range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        names: Sequence[str],
        probability: float = 0.15,
        mean_length: float = 3.0,
    ) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"objectives.span_probability={probability}: give a number between 0 and 1")
        if mean_length < 1:
            raise ValueError(f"objectives.span_length={mean_length}: give 1 or more tokens")
        self.names, self.probability, self.mean_length = tuple(names), probability, mean_length
        self.first_id, self.last_id = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.sentinels = np.array(read_sentinels(tokenizer), np.int64)

    def hide(self, texts: Sequence[Sequence[int]], chances: Iterable[np.random.Generator]) -> dict[str, list[Texts]]:
        """texts: ids with the first and the last token; chances: a generator for each -> by objective, for each text
        what is read and what is written."""
        made: dict[str, list[Texts]] = {name: [] for name in self.names}
        for ids, chance in zip(texts, chances, strict=True):
            if SPANS in made:
                made[SPANS].append(self.denoising(ids, chance))
            if CAPTION in made:
                made[CAPTION].append(self.captioning(ids))
        return made

    def denoising(self, ids: Sequence[int], generator: np.random.Generator) -> Texts:
        """Random spans. A text without a token between the first and the last has none: its target is the end alone.

        Raises ValueError for more spans than sentinels.
        """
        head, content, tail = self._cut(ids)
        spans = choose_spans(len(content), self.probability, self.mean_length, generator) if len(content) else []
        if len(spans) > len(self.sentinels):
            raise ValueError(
                f"{len(spans)} spans of a text of {len(content)} tokens, and the tokenizer has {len(self.sentinels)} "
                "sentinels: shorten the texts, or raise objectives.span_length"
            )
        return self._texts(head, content, tail, spans)

    def captioning(self, ids: Sequence[int]) -> Texts:
        """Everything hidden as one span."""
        head, content, tail = self._cut(ids)
        return self._texts(head, content, tail, [(0, len(content))])

    def _cut(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        array = np.asarray(ids, dtype=np.int64)
        begin, end = int(array[0] == self.first_id), len(array) - int(array[-1] == self.last_id)
        return array[:begin], array[begin:end], array[end:]

    def _texts(self, head: np.ndarray, content: np.ndarray, tail: np.ndarray, spans: list[tuple[int, int]]) -> Texts:
        read, written, seen = [head], [], 0
        for number, (begin, end) in enumerate(spans):
            mark = self.sentinels[number : number + 1]
            read += [content[seen:begin], mark]
            written += [mark, content[begin:end]]
            seen = end
        return np.concatenate([*read, content[seen:], tail]), np.concatenate([*written, [self.last_id]])


def read_sentinels(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1>, ... as far as the tokenizer has them. Raises ValueError where it has none."""
    known, ids = tokenizer.get_vocab(), []
    while sentinel(len(ids)) in known:
        ids.append(known[sentinel(len(ids))])
    if not ids:
        raise ValueError(
            f"the tokenizer has no token {sentinel(0)}, which span denoising and captioning write: take the tokenizer "
            "of a model that was trained with objectives.names=span_denoising or caption"
        )
    return ids


def add_sentinels(tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    """Give the tokenizer <extra_id_0> .. <extra_id_(count - 1)>, in place; what it lacks comes behind all others."""
    known = tokenizer.get_vocab()
    lacking = [sentinel(number) for number in range(count) if sentinel(number) not in known]
    if lacking:
        tokenizer.add_tokens(lacking, special_tokens=True)


def open_denoiser(
    tokenizer: PreTrainedTokenizerFast, names: Sequence[str], probability: float, mean_length: float
) -> Denoiser | None:
    """For those of the objectives named that hide spans; None where there is none."""
    own = [name for name in names if name in (SPANS, CAPTION)]
    return Denoiser(tokenizer, own, probability, mean_length) if own else None
