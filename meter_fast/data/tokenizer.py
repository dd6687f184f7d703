"""Tokenizers: opened by name or folder with clear errors, or trained on captions for work without a network.

Knows the Hugging Face formats. Never runs code that comes with a tokenizer. Knows nothing of masking or padding.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizerFast,
    CLIPTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

from meter_fast.data.spans import sentinel

BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROBERTA_SPECIALS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}
# CLIP's tokenizer begins and ends a text with these, and has no token to hide others with.
CLIP_SENTENCE = ("<|startoftext|>", "<|endoftext|>")
CLIP_MASK = "<|mask|>"
# Each of these sets of files makes a tokenizer folder.
TOKENIZER_FILES = (
    ("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("spm.model",), ("spiece.model",),
)  # fmt: skip


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Open a fast tokenizer: a local folder (no network is used), or a hub name such as "roberta-base".

    CLIP's is given a mask token, behind its vocabulary. Raises ValueError naming the folder or name, what is wrong and
    what to do: no such folder, no tokenizer files in it, nothing under that name, an empty vocabulary, or no mask,
    padding or sentence tokens.
    """
    name = os.fspath(name_or_folder)
    folder = Path(name).expanduser()
    if not name:
        raise ValueError("data.tokenizer is empty: give a tokenizer folder or a hub name such as 'roberta-base'")
    if folder.is_dir():
        tokenizer = _open(str(folder), _class_of(folder), local=True)
    elif folder.exists():
        raise ValueError(f"tokenizer {name!r} is a file: give the folder that holds it")
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ValueError(
            f"tokenizer folder {name!r} does not exist: give an existing folder or a hub name such as 'roberta-base'"
        )
    else:
        tokenizer = _open(name, AutoTokenizer, local=False)
    _complete_clip(tokenizer)
    _check_tokenizer(tokenizer, name)
    return tokenizer


def _class_of(folder: Path) -> type:
    """The class that opens a folder: what its settings name, or for bare vocabulary files the model they belong to."""
    present = {entry.name for entry in folder.iterdir()}
    kinds = [set(files) <= present for files in TOKENIZER_FILES]
    if not any(kinds):
        wanted = ", or ".join(" + ".join(files) for files in TOKENIZER_FILES)
        held = ", ".join(sorted(present)[:8]) or "nothing"
        raise ValueError(f"{folder} is no tokenizer folder: it needs {wanted}; it holds {held}")
    if present & {"tokenizer.json", "tokenizer_config.json", "config.json"}:
        return AutoTokenizer
    if "spm.model" in present or "spiece.model" in present:
        return DebertaV2Tokenizer if "spm.model" in present else AlbertTokenizer
    if all(kinds[1:3]):
        raise ValueError(f"{folder} holds both vocab.txt (BERT) and vocab.json (RoBERTa): keep those of one tokenizer")
    if kinds[1] and CLIP_SENTENCE[0] in (folder / "vocab.json").read_text(encoding="utf-8"):
        return CLIPTokenizer
    return RobertaTokenizerFast if kinds[1] else BertTokenizerFast


def _complete_clip(tokenizer: PreTrainedTokenizerFast) -> None:
    """Name the first and the last token of CLIP's texts as those of BERT are, and add a mask token, in place.

    Other tokenizers are left as they are; so is one of CLIP that has been completed and saved.
    """
    if (tokenizer.bos_token, tokenizer.eos_token) != CLIP_SENTENCE:
        return
    given = {"cls_token": CLIP_SENTENCE[0], "sep_token": CLIP_SENTENCE[1], "mask_token": CLIP_MASK}
    tokenizer.add_special_tokens({name: token for name, token in given.items() if getattr(tokenizer, name) is None})


def _open(name: str, kind: type, local: bool) -> PreTrainedTokenizerFast:
    try:
        return kind.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # the parsers of tokenizers raise plain Exception
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(
                f"tokenizer {name!r} comes with code, which is never run: save it with a tokenizer.json"
            ) from error
        remedy = (
            "save it anew with save_pretrained"
            if local
            else "check the name, the network and HF_HOME, or give a folder"
        )
        raise ValueError(
            f"tokenizer {name!r} could not be opened ({type(error).__name__}: {reason[:300]}); {remedy}"
        ) from error


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Refuse what would train on nonsense: some vocabulary files are ignored by transformers without an error."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer {name!r} has no fast version: save it with a tokenizer.json")
    needed = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    missing = [key.removesuffix("_id") for key in needed if getattr(tokenizer, key) is None]
    if missing:
        raise ValueError(
            f"tokenizer {name!r} has no {', '.join(missing)}: masked-language training needs a BERT- or "
            "RoBERTa-like tokenizer"
        )
    ordinary = len(tokenizer) - len(set(tokenizer.all_special_ids))
    if ordinary < 1:
        raise ValueError(
            f"tokenizer {name!r} has an empty vocabulary ({len(tokenizer)} special tokens only): its vocabulary "
            "file was not read; save it with save_pretrained"
        )


def train_tokenizer(
    captions: Iterable[str],
    out: str | os.PathLike[str],
    kind: str = "bert",
    vocab_size: int = 8192,
    sentinels: int = 0,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on captions and save it as the folder `out`, which load_tokenizer opens without a network.

    kind: "bert" = lower-case WordPiece of whole words, [PAD] [UNK] [CLS] [SEP] [MASK] = 0..4. "roberta" = byte-level
    BPE, <s> <pad> </s> <unk> = 0..3, <mask> last. vocab_size: at most that many tokens; behind them come the
    sentinels of span denoising. The same captions give the same file. Raises ValueError for an unknown kind, no
    captions, or a vocab_size too small for the alphabet.
    """
    if kind not in ("bert", "roberta"):
        raise ValueError(f"tokenizer kind {kind!r}: choose 'bert' or 'roberta'")
    smallest = 64 if kind == "bert" else 261  # 256 bytes and 5 special tokens
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small for a {kind} tokenizer: give at least {smallest}")
    trained = _train_wordpiece(captions, vocab_size) if kind == "bert" else _train_byte_bpe(captions, vocab_size)
    trained.add_special_tokens([sentinel(number) for number in range(sentinels)])
    specials = BERT_SPECIALS if kind == "bert" else ROBERTA_SPECIALS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=512, **specials)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + sentinels + (256 if kind == "roberta" else 0):
        raise ValueError("no words in the captions: nothing to train a tokenizer on")
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    _name_the_class(Path(out) / "tokenizer_config.json")
    return load_tokenizer(out)


def _train_wordpiece(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Special tokens, characters, and the most frequent words. A rarer word is spelt in characters.

    The library's WordPieceTrainer gives another vocabulary each time it is run, so the vocabulary is put together here.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word for caption in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    specials = list(BERT_SPECIALS.values())
    alphabet = sorted(_most_frequent(characters)[: (vocab_size - len(specials)) // 4])  # twice each: half of the room
    tokens = dict.fromkeys(
        [*specials, *alphabet, *("##" + character for character in alphabet), *_most_frequent(words)]
    )
    vocabulary = {token: index for index, token in enumerate(list(tokens)[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _most_frequent(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda text: (-counts[text], text))


def _train_byte_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """RoBERTa's layout: the mask token comes after all merges, so it is added when they are known."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def _name_the_class(config: Path) -> None:
    """Write the class name that all supported versions of transformers know; version 5 writes a new one."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
