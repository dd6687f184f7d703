"""What a model says of pictures. `Predictor` is for users; what works on encoded pictures serves scores and reports.

predictor   a user's calls: answer, match, rank, fill, entails, compare, caption
opening     model, tokenizer, transform and answers of a path, put together
pictures    a picture in any form -> pixels
engine      batches of requests -> scores, each picture encoded once
encoded     fills, matches, captions and attention of encoded pictures
requests    the shell's input: pictures, folders and tables -> rows
command     rows -> results, with progress, and the file of them
"""

from meter_fast.predict.encoded import (
    MATCH,
    MAX_TEXT_LENGTH,
    MaskedCaption,
    caption,
    cls_of,
    fill,
    flat_places,
    hidden_logits,
    hide_word,
    match,
    pad,
    place_of,
    word_attention,
)

__all__ = [
    "MATCH",
    "MAX_TEXT_LENGTH",
    "MaskedCaption",
    "caption",
    "cls_of",
    "fill",
    "flat_places",
    "hidden_logits",
    "hide_word",
    "match",
    "pad",
    "place_of",
    "word_attention",
]
