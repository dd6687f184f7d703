"""Texts as people write them -> token ids, checked, with a warning where their end is not read. Knows a tokenizer."""

import re
import warnings
from collections.abc import Sequence

from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.text import TextPipeline

MASK = "<mask>"  # how a text says what is to be filled in, whatever the tokenizer calls it


class WrongText(ValueError):
    """A text that cannot be used. cause: for counting."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class TextCut(UserWarning):
    """The end of a text is not read."""


def check_text(text: object, what: str = "text") -> str:
    """The text without white space around it. what: "question" ... for the message. Raises WrongText."""
    if not isinstance(text, str):
        raise WrongText("no text", f"a {what} is a string, this is {type(text).__name__}: give a string")
    try:
        return check_caption(text).strip()
    except BadCaption as error:
        cause = "empty text" if error.cause == "empty caption" else error.cause
        raise WrongText(cause, f"a {what} is {text[:60]!r}: {cause}; give one in words") from error


def encode_texts(pipeline: TextPipeline, texts: Sequence[str], what: str) -> list[list[int]]:
    """Checked texts -> ids with the special tokens, at most pipeline.max_length; warns where the end is left out."""
    ids = pipeline.encode(texts) if texts else []
    for text, row in zip(texts, ids, strict=True):
        if len(row) == pipeline.max_length and pipeline.cuts(text):
            _warn(text, what, pipeline.max_length)
    return ids


def encode_masked(pipeline: TextPipeline, text: str) -> tuple[list[int], tuple[int, ...]]:
    """A checked text with masks -> ids, and places of the masks in them. Raises WrongText for a text without a mask, or
    with one beyond the tokens that are read."""
    tokenizer = pipeline.tokenizer
    wanted = re.split(rf"\s*{_mask(tokenizer)}", text)
    if len(wanted) == 1:
        raise WrongText("no mask", f"{text[:60]!r} has nothing to fill in: write {MASK} in place of a word")
    whole = tokenizer.mask_token.join(wanted)  # white space before a mask belongs to the word that it hides
    ids = tokenizer(whole, truncation=True, max_length=pipeline.max_length + 1)["input_ids"]
    if len(ids) > pipeline.max_length:
        ids = [*ids[: pipeline.max_length - 1], tokenizer.sep_token_id]
        _warn(text, "text", pipeline.max_length)
    places = tuple(place for place, token in enumerate(ids) if token == tokenizer.mask_token_id)
    if len(places) < len(wanted) - 1:
        raise WrongText(
            "mask cut off",
            f"{text[:60]!r} has a mask beyond the {pipeline.max_length} tokens that are read: shorten the text",
        )
    return ids, places


def filled(tokenizer, text: str, words: Sequence[str]) -> str:
    """The text with a word in place of each mask."""
    rest = iter(words)
    return re.sub(_mask(tokenizer), lambda _: next(rest), text)


def _mask(tokenizer) -> str:
    return rf"(?:{re.escape(MASK)}|{re.escape(tokenizer.mask_token)})"


def _warn(text: str, what: str, length: int) -> None:
    """stacklevel: the line that calls the predictor."""
    message = f"a {what} is longer than {length} tokens, what follows is not read: {text[:60]!r}..."
    warnings.warn(message, TextCut, stacklevel=5)
