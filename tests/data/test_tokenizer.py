"""Opening tokenizers, with the errors that a user meets, and training one without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoTokenizer

from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
CAPTIONS = ["A small red cube on a table.", "Two dogs, one cat!", "the cube is left of two dogs and 3 cats"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bert")
    train_tokenizer(CAPTIONS * 3, out, "bert", 400)
    return out


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("roberta")
    train_tokenizer(CAPTIONS * 3, out, "roberta", 400)
    return out


def test_trained_wordpiece_knows_whole_words(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    assert tokenizer.tokenize("A SMALL red cube. Two cats!") == ["a", "small", "red", "cube", ".", "two", "cats", "!"]
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = tokenizer("red cube").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "red", "cube", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red cube"
    assert len(tokenizer) <= 400


def test_trained_byte_bpe_has_the_layout_of_roberta(roberta: Path) -> None:
    tokenizer = load_tokenizer(roberta)
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert (tokenizer.cls_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id) == (0, 1, 2)
    text = "a Red cube, 🐶 naïve\0"
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("a red cube") == ["a", "Ġred", "Ġcube"]


def test_vocabulary_size_is_a_limit(tmp_path: Path) -> None:
    many = [f"{word}ing {word}ed the {word}" for word in ("jump", "walk", "paint", "count", "stack", "climb")] * 4
    assert len(train_tokenizer(many, tmp_path / "bert", "bert", 80)) <= 80
    assert len(train_tokenizer(many, tmp_path / "roberta", "roberta", 280)) == 280


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_training_repeats_itself(kind: str, tmp_path: Path) -> None:
    """Words of equal counts, more than the vocabulary holds, in any order: ties must be broken alike."""
    captions = [f"{a}{b} {b}{c} {a}{c}{b}" for a in "abcdef" for b in "uvwxyz" for c in "klmno"]
    texts = set()
    for run, given in enumerate((captions, iter(captions), captions[::-1], captions)):
        train_tokenizer(given, tmp_path / str(run), kind, {"bert": 150, "roberta": 320}[kind])
        texts.add((tmp_path / str(run) / "tokenizer.json").read_text())
    assert len(texts) == 1


def test_words_beyond_the_vocabulary_are_put_together(tmp_path: Path) -> None:
    """The rarest word is left out: it is made of pieces. A character that was never seen makes its word unknown."""
    pairs = [first + second for first in "abcdefgh" for second in "abcdefgh"] * 2  # more than there is room for
    tokenizer = train_tokenizer(["cab"] * 3 + ["cab bad", *pairs], tmp_path, "bert", 64)
    assert len(tokenizer) == 64
    assert tokenizer.tokenize("cab bad") == ["cab", "ba", "##d"]
    assert tokenizer.tokenize("cab ca\N{SNOWMAN}") == ["cab", "[UNK]"]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_saved_folder_opens_with_the_library_alone(kind: str, bert: Path, roberta: Path) -> None:
    folder = {"bert": bert, "roberta": roberta}[kind]
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    plain = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert plain(CAPTIONS).input_ids == load_tokenizer(str(folder))(CAPTIONS).input_ids


def test_training_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'spm': choose 'bert' or 'roberta'"):
        train_tokenizer(CAPTIONS, tmp_path, "spm")
    with pytest.raises(ValueError, match="vocab_size 100 is too small for a roberta tokenizer: give at least 261"):
        train_tokenizer(CAPTIONS, tmp_path, "roberta", 100)
    for kind in ("bert", "roberta"):
        with pytest.raises(ValueError, match="no words in the captions"):
            train_tokenizer(["", " "], tmp_path / "never", kind)
    assert not (tmp_path / "never").exists()


def test_bare_vocabulary_files(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "vocab.txt", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    words = (GOLDEN / "vocab.txt").read_text().split()
    assert len(tokenizer) == len(words)
    assert tokenizer("caption").input_ids == [words.index(word) for word in ("[CLS]", "caption", "[SEP]")]
    shutil.copy(GOLDEN / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"both vocab.txt \(BERT\) and vocab.json \(RoBERTa\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    assert load_tokenizer(tmp_path)("ab").input_ids == [
        0,
        *(json.loads((GOLDEN / "vocab.json").read_text())[c] for c in "ab"),
        2,
    ]


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "BertTokenizer"}])
def test_an_empty_vocabulary_is_refused(settings: dict | None, tmp_path: Path) -> None:
    """transformers opens it without a word, and would make [UNK] of every word."""
    (tmp_path / "vocab.txt").write_text("")
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="empty vocabulary"):
        load_tokenizer(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer folder: it needs tokenizer.json.*it holds nothing"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no tokenizer folder.*it holds model.safetensors"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="is a file: give the folder"):
        load_tokenizer(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"data\.tokenizer is empty"):
        load_tokenizer("")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "Evil"}}', "\0\1"])
def test_damaged_files_name_the_folder(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}' could not be opened"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_mask_token_is_refused(bert: Path, tmp_path: Path) -> None:
    shutil.copy(bert / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}'
    )
    with pytest.raises(ValueError, match="has no cls_token, sep_token, mask_token"):
        load_tokenizer(tmp_path)


@pytest.mark.scenario(40, "code in a tokenizer's folder")
def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "vocab.txt", tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}})
    )
    with pytest.raises(ValueError, match="comes with code, which is never run"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_an_unknown_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing' could not be opened.*check the name, the network"):
        load_tokenizer("nobody/nothing")
