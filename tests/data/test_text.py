"""Captions to ids: faults, truncation, special tokens as text, padding."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import train_tokenizer

CAPTIONS = ["A small red cube on a table.", "two dogs", "a red cube left of two dogs on a large table"]

ODD_BUT_GOOD = {
    "10 000 words": "dogs " * 10_000,
    "one word of 100 000 letters": "x" * 100_000,
    "NUL inside": "a red\0 cube",
    "right to left": "כלב אדום קטן‏ وكلب",
    "emoji": "a dog 🐶 with 👩‍👩‍👧 and 🏳️‍🌈",
    "combining marks": "cafe\u0301 " + "e" + "\u0301" * 500,
    "full width": "ａ ｒｅｄ ｃｕｂｅ",
    "control characters": "a\x07red\x1bcube\u200b",
    "line breaks": "\n\ta red\r\ncube\n",
    "special tokens as words": "[MASK] <mask> </s> [SEP] a cube [PAD] <pad>",
    "Chinese": "一只红色的狗",
    "bytes": "a café".encode(),
}

BAD = {
    "empty": ("", "empty caption"),
    "blanks": (" \t\n\u3000", "empty caption"),
    "nothing visible": ("\0\x07\u200b\ufeff\u200f", "empty caption"),
    "no bytes": (b"", "empty caption"),
    "lone surrogate": ("a red \ud83d cube", "not UTF-8"),
    "escaped bytes": (b"caf\xe9".decode("utf-8", "surrogateescape"), "not UTF-8"),
    "Latin-1 bytes": (b"caf\xe9", "not UTF-8"),
    "cut in a character": ("a café".encode()[:-1], "not UTF-8"),
}


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS * 3, tmp_path_factory.mktemp("tokenizer"), request.param, vocab_size=400)


@pytest.mark.parametrize("name", ODD_BUT_GOOD)
@pytest.mark.scenario(23, "emoji, right-to-left, 10,000 words and other odd captions")
def test_odd_captions_are_tokenised(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(tokenizer)
    text = check_caption(ODD_BUT_GOOD[name])
    (ids,) = pipeline.encode([text])
    assert 3 <= len(ids) <= 50
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert max(ids) < len(tokenizer)
    pipeline.mask(ids, np.random.default_rng(0))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.scenario(23, "empty, NUL, not UTF-8: skipped with the cause")
def test_bad_captions_name_their_cause(name: str) -> None:
    text, cause = BAD[name]
    with pytest.raises(BadCaption) as caught:
        check_caption(text)
    assert caught.value.cause == cause
    assert caught.value.detail


def test_good_captions_are_left_as_they_are() -> None:
    for text in (*CAPTIONS, "🐶", "a red\0 cube", "."):
        assert check_caption(text) == text
    assert check_caption("café".encode()) == "café"


def test_ids_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert TextPipeline(tokenizer).encode(CAPTIONS) == tokenizer(CAPTIONS).input_ids


def test_long_captions_are_cut_as_the_tokenizer_would(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(CAPTIONS * 20), "dogs " * 10_000, CAPTIONS[0]]
    for length in (3, 10, 50):
        expected = tokenizer(texts, max_length=length, truncation=True).input_ids
        assert TextPipeline(tokenizer, max_length=length).encode(texts) == expected


def test_special_tokens_in_a_caption_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    specials = tokenizer.all_special_tokens
    (ids,) = TextPipeline(tokenizer).encode([" a ".join(specials)])
    inside = set(ids[1:-1]) - {tokenizer.unk_token_id}
    assert not inside & set(tokenizer.all_special_ids)


def test_pipeline_and_tokenizer_do_not_disturb_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    """Both would set truncation and special tokens on the same object, each for itself."""
    text = f"a {tokenizer.mask_token} cube " * 20
    before = tokenizer(text).input_ids
    pipeline = TextPipeline(tokenizer, max_length=7)
    expected = pipeline.encode([text])
    assert tokenizer(text).input_ids == before
    assert tokenizer.mask_token_id in before
    assert len(before) > 7
    assert pipeline.encode([text]) == expected
    assert len(expected[0]) == 7


def test_padding_reaches_the_longest_of_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(tokenizer)
    texts = pipeline.encode(CAPTIONS)
    ids, mask = pipeline.pad([texts[0], np.array(texts[1]), texts[2]])
    assert ids.shape == mask.shape == (3, max(map(len, texts)))
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert mask.sum(dim=1).tolist() == [len(text) for text in texts]
    for row, text in enumerate(texts):
        assert ids[row, mask[row]].tolist() == text
    assert set(ids[~mask].tolist()) == {tokenizer.pad_token_id}
    assert tokenizer.pad_token_id == {"[PAD]": 0, "<pad>": 1}[tokenizer.pad_token]


def test_threads_may_share_a_pipeline(tokenizer: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(tokenizer, max_length=8)
    batches = [[f"{CAPTIONS[index % 3]} {index}" for index in range(start, start + 5)] for start in range(40)]
    alone = [pipeline.encode(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pipeline.encode, batches)) == alone


COUNTS_THREADS = """
import os, sys
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer
pipeline = TextPipeline(load_tokenizer(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
pipeline.encode(["a red cube left of two dogs"] * 64)
print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the threads that Linux tells of")
def test_tokenising_starts_no_threads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each process and each loader thread would wait for those of all."""
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", COUNTS_THREADS, str(tmp_path)]
    before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    assert before == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "words"}, "objectives.masking='words': choose one of token, whole_word_published, whole_word"),
        ({"probability": 1.5}, "objectives.mlm_probability=1.5"),
        ({"max_length": 2}, "data.max_text_length=2"),
    ],
)
def test_settings_are_checked(options: dict, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=message):
        TextPipeline(tokenizer, **options)
