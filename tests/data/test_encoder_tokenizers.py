"""Tokenizers of ELECTRA, ALBERT and both DeBERTas, made by their own classes: special tokens and words."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import pre_tokenizers
from transformers import AlbertTokenizer, AutoTokenizer, DebertaTokenizer, DebertaV2Tokenizer, ElectraTokenizer

from meter_fast.data import masking
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ALBERT = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
DEBERTA = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
PIECES = ["▁the", "▁red", "▁cu", "be", ".", "▁"]


def save(kind: str, folder: Path) -> None:
    """Ids as published: DeBERTa's mask token comes last."""
    if kind == "electra":
        words = [*BERT, "the", "red", "cu", "##be", "."]
        tokenizer = ElectraTokenizer({word: index for index, word in enumerate(words)})
    elif kind == "albert":
        tokenizer = AlbertTokenizer([(piece, -float(index)) for index, piece in enumerate(ALBERT + PIECES)])
    elif kind == "deberta":
        merges = [("t", "h"), ("th", "e"), ("Ġ", "re"), ("r", "e"), ("Ġre", "d"), ("Ġ", "c"), ("Ġc", "u"), ("b", "e")]
        joined = [a + b for a, b in merges]
        tokens = dict.fromkeys([*DEBERTA, *sorted(pre_tokenizers.ByteLevel.alphabet()), *joined, "[MASK]"])
        tokenizer = DebertaTokenizer({token: index for index, token in enumerate(tokens)}, merges)
    else:
        pieces = [(piece, 0.0 if piece in DEBERTA else -float(n)) for n, piece in enumerate(DEBERTA + PIECES)]
        tokenizer = DebertaV2Tokenizer([*pieces, ("[MASK]", 0.0)], unk_id=3)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "pad", "cls", "sep"), [("electra", 0, 2, 3), ("albert", 0, 2, 3), ("deberta", 0, 1, 2), ("v3", 0, 1, 2)]
)
def test_special_tokens_and_words(kind: str, pad: int, cls: int, sep: int, tmp_path: Path) -> None:
    save(kind, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id) == (pad, cls, sep)
    assert tokenizer.mask_token_id == (len(tokenizer) - 1 if kind in ("deberta", "v3") else 4)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(str(tmp_path)).get_vocab()
    (row,) = TextPipeline(tokenizer).encode(["the red cube."])
    assert (row[0], row[-1]) == (cls, sep) and tokenizer.unk_token_id not in row
    words = masking.word_numbers(np.array(row), masking.read_vocabulary(tokenizer))
    assert tokenizer.convert_ids_to_tokens(row[4:5]) in ([t] for t in ("##be", "be"))
    assert words.tolist() == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("form", ["bare", "with config.json"])
def test_sentencepiece_file_as_deberta_v3_is_published(form: str, tmp_path: Path) -> None:
    """The ids are those of the library that the file is of, between the first and the last token; the mask comes
    after them."""
    made = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle is further left than the blue square"] * 50), model_writer=made,
        vocab_size=25, pad_id=0, bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]",
        eos_piece="[SEP]", unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spm.model").write_bytes(made.getvalue())
    if form != "bare":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    tokenizer, theirs = load_tokenizer(tmp_path), SentencePieceProcessor(model_proto=made.getvalue())
    assert tokenizer.mask_token_id == len(tokenizer) - 1 == 25
    for text in ("the red square", "further  left, or RED", "zebra"):
        assert tokenizer(text)["input_ids"] == [1, *theirs.encode(text), 2]
