"""Which tokens of a caption the masked-language objective hides, and what stands in their place.

Knows token ids and words of one vocabulary; draws from the generator it is given and from nothing else. One caption at
a time, in numpy, because at caption length numpy calls are cheaper than tensor operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # BERT, section 3.1; the rest keep their token
KINDS = ("token", "whole_word_published", "whole_word", "content_word")
# Words that the words around them give away; words of place and direction ("up", "left") are not among them.
_FUNCTION_WORDS = """
a an the this that these those it its they them their he she his her we you i there here
is are was were be been being am has have had do does did will would can could may might shall should
and or but if as than then so of to by for from with at on in into onto
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_LETTER, _DIGIT, _OTHER, _BEFORE, _AFTER, _SPACE = 0, 1, 2, -1, -2, -3


@dataclass(frozen=True)
class Vocabulary:
    """What masking knows of a tokenizer with S tokens; arrays of length S.

    special [S] bool: never hidden (also the unknown token: nothing could be learnt from it). Word borders: a token
    begins a word where `begins` [S] bool says so, or where the class of its first character, `first` [S] int8, differs
    from the class of the last character of the token before, `last` [S] int8 (a token that is only the space before a
    word goes with any). pieces [S] bool: "##" pieces; sentence [S] bool: [CLS] and [SEP]; function [S] bool: a function
    word by itself.
    """

    size: int
    mask_id: int
    special: np.ndarray
    begins: np.ndarray
    first: np.ndarray
    last: np.ndarray
    pieces: np.ndarray
    sentence: np.ndarray
    function: np.ndarray


def read_vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Tabulate a vocabulary. WordPiece marks what continues a word ("##"), byte-level BPE and SentencePiece what begins
    one, CLIP's BPE what ends one ("</w>")."""
    tokens = tokenizer.get_vocab()
    size = max(max(tokens.values()) + 1, len(tokenizer))
    special, begins, pieces, sentence, function = (np.zeros(size, bool) for _ in range(5))
    first, last = np.zeros(size, np.int8), np.zeros(size, np.int8)
    special[tokenizer.all_special_ids] = True
    marks_end = any(token.endswith("</w>") for token in tokens)
    marks_space = not marks_end and any(token.startswith(("Ġ", "▁")) for token in tokens)
    for token, index in tokens.items():
        pieces[index] = token.startswith("##") and not (marks_space or marks_end)
        sentence[index] = token in ("[CLS]", "[SEP]")
        function[index] = token.removesuffix("</w>").lstrip("Ġ▁").lower() in FUNCTION_WORDS
        if special[index]:
            begins[index], first[index], last[index] = True, _AFTER, _BEFORE
        elif marks_end:
            last[index] = _BEFORE if token.endswith("</w>") else _LETTER
        elif marks_space:
            begins[index] = token.startswith(("Ġ", "▁"))
            first[index] = _character_class(token[:1])
            last[index] = _SPACE if token in ("Ġ", "▁") else _character_class(token[-1:])
        else:
            begins[index] = not pieces[index]
    return Vocabulary(size, tokenizer.mask_token_id, special, begins, first, last, pieces, sentence, function)


def _character_class(character: str) -> int:
    """Byte-level BPE never joins letters, digits and signs into one word. Bytes beyond ASCII count as letters."""
    if character.isdigit() and character.isascii():
        return _DIGIT
    return _LETTER if character.isalpha() or not character.isascii() else _OTHER


def choose_tokens(
    ids: np.ndarray, vocabulary: Vocabulary, probability: float, generator: np.random.Generator
) -> np.ndarray:
    """Each token that is not special with `probability`, independently. ids [n] int64 -> positions [m], ascending."""
    return np.flatnonzero((generator.random(len(ids)) < probability) & ~vocabulary.special[ids])


def choose_whole_words(
    ids: np.ndarray, vocabulary: Vocabulary, probability: float, generator: np.random.Generator
) -> np.ndarray:
    """Each word with `probability`, independently, all its tokens together, so each token has that probability too.

    ids [n] int64 -> positions [m] int64, ascending. For WordPiece and byte-level BPE.
    """
    words = word_numbers(ids, vocabulary)
    return np.flatnonzero((generator.random(len(ids)) < probability)[words] & ~vocabulary.special[ids])


def choose_content_words(
    ids: np.ndarray, vocabulary: Vocabulary, probability: float, generator: np.random.Generator
) -> np.ndarray:
    """As `choose_whole_words`, but function words are left alone: what is hidden then depends more on the picture.

    Source: Bitton et al. 2021, "Data Efficient Masked Language Modeling for Vision and Language", content words.
    """
    words = word_numbers(ids, vocabulary)
    alone = np.bincount(words)[words] == 1
    chosen = (generator.random(len(ids)) < probability)[words]
    return np.flatnonzero(chosen & ~vocabulary.special[ids] & ~(alone & vocabulary.function[ids]))


def word_numbers(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The word of each token, counted from 0: ids [n] int64 -> [n] int64. A special token is a word of its own."""
    begins = vocabulary.begins[ids]
    before = vocabulary.last[ids[:-1]]
    begins[1:] |= (vocabulary.first[ids[1:]] != before) & (before != _SPACE)
    begins[:1] = True
    return np.cumsum(begins) - 1


def choose_whole_words_published(
    ids: np.ndarray, vocabulary: Vocabulary, probability: float, length: int, generator: np.random.Generator
) -> np.ndarray:
    """As METER's code masks whole words: DataCollatorForWholeWordMask of transformers 4.6 over padded texts.

    The text counts as padded to `length` tokens, and a padding token as a word. Words in random order are taken as long
    as they fit in round(probability * length) tokens, longer ones passed over; then special tokens are given up. So the
    number of hidden tokens varies and may be 0. In a vocabulary without "##", as RoBERTa's, each token is a word, <s>
    and </s> too. ids [n] int64, n <= length -> positions [m] int64, ascending.
    """
    starts = np.flatnonzero(~(vocabulary.pieces[ids] | vocabulary.sentence[ids])).tolist()
    real = len(starts)
    budget = max(1, round(length * probability))
    chosen: list[int] = []
    taken = 0
    for word in generator.permutation(real + length - len(ids)).tolist():
        if word >= real:
            taken += 1
        else:
            end = starts[word] + 1
            while end < len(ids) and vocabulary.pieces[ids[end]]:
                end += 1
            if taken + end - starts[word] > budget:
                continue
            taken += end - starts[word]
            chosen.extend(range(starts[word], end))
        if taken >= budget:
            break
    positions = np.sort(np.array(chosen, dtype=np.int64))
    return positions[~vocabulary.special[ids[positions]]]


def hide(ids: np.ndarray, positions: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator) -> np.ndarray:
    """A copy of ids [n] with the mask token (80 %), any token (10 %) or its own (10 %) at each of positions [m]."""
    masked = ids.copy()
    if len(positions):
        fate, other = generator.random((2, len(positions)))
        drawn = (other * vocabulary.size).astype(np.int64)
        kept = ids[positions]
        masked[positions] = np.where(
            fate < MASK_SHARE, vocabulary.mask_id, np.where(fate < MASK_SHARE + RANDOM_SHARE, drawn, kept)
        )
    return masked
