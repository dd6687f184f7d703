"""What a model says of pictures. `Predictor` is for users; what works on encoded pictures serves scores and reports.

predictor   a user's calls: answer, match, rank, fill, entails, compare, caption
opening     model, tokenizer, transform and answers of a path, put together
pictures    a picture in any form -> pixels
texts       a text -> token ids
engine      requests -> scores, each picture encoded once
encoded     fills, matches, captions and attention of encoded pictures
command     the shell: `rows` in, `results` out, `progress` meanwhile
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
