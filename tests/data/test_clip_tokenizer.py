"""CLIP's tokenizer in masked-language training: its own first and last token, an added mask token, whole words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from meter_fast.data import masking
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer

MERGES = ["c u", "cu b", "cub e</w>", "r e", "re d</w>", "b l", "o n</w>", "t h", "th e</w>"]


@pytest.fixture(params=["saved", "bare files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """In the layout of CLIP's vocabulary: 256 bytes, the same as ends of words, merges, first and last token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["".join(pair.split()) for pair in MERGES]
    tokens = [*alphabet, *(character + "</w>" for character in alphabet), *joined, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if request.param == "saved":
        CLIPTokenizer(vocabulary, [tuple(pair.split()) for pair in MERGES]).save_pretrained(tmp_path)
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return tmp_path


def test_special_tokens(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    size = 512 + len(MERGES) + 2
    assert len(tokenizer) == size + 1
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id) == (size - 2, size - 1, size)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (size - 2, size - 1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = tokenizer("The red Cube").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        "the</w>",
        "red</w>",
        "cube</w>",
        "<|endoftext|>",
    ]
    tokenizer.save_pretrained(tmp_path / "kept")
    again = load_tokenizer(tmp_path / "kept")
    assert again.get_vocab() == tokenizer.get_vocab() and again.mask_token_id == size
    assert again("The red Cube").input_ids == ids
    assert again.decode(ids, skip_special_tokens=True) == "the red cube"


def test_pipeline(folder: Path) -> None:
    """Padding is told by length, for its id is that of the last token; text that looks like a mask token is text."""
    tokenizer = load_tokenizer(folder)
    pipeline = TextPipeline(tokenizer, max_length=12)
    rows = pipeline.encode(["the red cube", "cube", "<|mask|>"])
    assert [row[0] for row in rows] == [tokenizer.cls_token_id] * 3
    assert [row[-1] for row in rows] == [tokenizer.sep_token_id] * 3
    assert tokenizer.mask_token_id not in rows[2]
    ids, mask = pipeline.pad(rows[:2])
    assert mask.sum(1).tolist() == [5, 3]
    assert ids[1, 3:].tolist() == [tokenizer.pad_token_id] * 2


def test_words(folder: Path) -> None:
    """A word ends with the token that is marked so."""
    tokenizer = load_tokenizer(folder)
    vocabulary = masking.read_vocabulary(tokenizer)
    assert vocabulary.size == len(tokenizer)
    ids = np.array(tokenizer("the blow on red-cube").input_ids)
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens[1:-1] == ["the</w>", "bl", "o", "w</w>", "on</w>", "red</w>", "-</w>", "cube</w>"]
    assert masking.word_numbers(ids, vocabulary).tolist() == [0, 1, 2, 2, 2, 3, 4, 5, 6, 7]
    assert vocabulary.function[ids].tolist() == [False, True, False, False, False, True, *[False] * 4]
    hidden = {tuple(masking.choose_whole_words(ids, vocabulary, 0.3, np.random.default_rng(n))) for n in range(200)}
    assert all(({2, 3, 4} <= set(chosen)) or not ({2, 3, 4} & set(chosen)) for chosen in hidden)
    assert {place for chosen in hidden for place in chosen} == set(range(1, 9))
    masked = masking.hide(ids, np.array([1, 5]), vocabulary, np.random.default_rng(0))
    assert masked.max() <= tokenizer.mask_token_id
