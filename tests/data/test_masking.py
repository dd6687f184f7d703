"""Masking against the frequencies of METER's own collator, and against what each way of masking promises.

Seeds are fixed, so a bound of 4.5 standard errors is either kept for ever or broken by a change.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from meter_fast.data import masking
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
COLLATE = json.loads((GOLDEN / "collate.json").read_text())
TENSORS = load_file(GOLDEN / "collate.safetensors")
MASKINGS = {"token": "token", "wwm": "whole_word_published"}
BOUND = 4.5
CAPTIONS = [
    "Two red cubes stand left of a small green ball.",
    "it's a dog's life, isn't it? 42 cats2 and a cafe",
    "unbelievably photographic bookshelves",
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    """The tokenizers of the golden data, opened as folders.

    The merge "i on" of the byte-level one can never happen ("on" is no token), and fast tokenizers refuse it.
    """
    bert, roberta = (tmp_path_factory.mktemp(name) for name in ("bert", "roberta"))
    shutil.copy(GOLDEN / "tokenizers" / "vocab.txt", bert)
    shutil.copy(GOLDEN / "tokenizers" / "vocab.json", roberta)
    merges = (GOLDEN / "tokenizers" / "merges.txt").read_text(encoding="utf-8")
    (roberta / "merges.txt").write_text(merges.replace("i on\n", ""), encoding="utf-8")
    return {"bert": load_tokenizer(bert), "roberta": load_tokenizer(roberta)}


@pytest.fixture(scope="module", params=["bert", "roberta"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Tokenizers that split rare words into pieces, so that words of several tokens are there."""
    out = tmp_path_factory.mktemp("trained")
    fill = [f"{first}{second}" for first in "abcdefghi" for second in "klmnopqrstuvwxyz"]  # more than there is room for
    captions = CAPTIONS[:2] * 5 + CAPTIONS[2:] + fill * 2
    return train_tokenizer(captions, out, request.param, vocab_size={"bert": 140, "roberta": 300}[request.param])


def counts(pipeline: TextPipeline, ids: list[int], runs: int, seed: int = 0) -> dict[str, np.ndarray | int]:
    """How often each position is chosen, and what becomes of it."""
    chosen, mask, other, masked_per_run = np.zeros(len(ids), int), 0, 0, []
    generator = np.random.default_rng(seed)
    for _ in range(runs):
        masked, positions, labels = pipeline.mask(ids, generator)
        chosen[positions] += 1
        mask += int((masked[positions] == pipeline.vocabulary.mask_id).sum())
        other += int(((masked[positions] != labels) & (masked[positions] != pipeline.vocabulary.mask_id)).sum())
        masked_per_run.append(len(positions))
    return {"chosen": chosen, "mask": mask, "other": other, "per_run": np.array(masked_per_run)}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_texts_of_the_golden_data_get_the_published_ids(kind: str, published: dict) -> None:
    pipeline = TextPipeline(published[kind], max_length=COLLATE["max_length"])
    ids, mask = pipeline.pad(pipeline.encode(COLLATE["texts"]))
    expected = TENSORS[f"{kind}.token.text_ids"][:, : ids.shape[1]]
    assert torch.equal(ids, expected)
    assert torch.equal(mask, TENSORS[f"{kind}.token.text_masks"][:, : ids.shape[1]].bool())


@pytest.mark.parametrize("golden", MASKINGS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_frequencies_of_the_published_collator(kind: str, golden: str, published: dict) -> None:
    pipeline = TextPipeline(published[kind], COLLATE["max_length"], MASKINGS[golden])
    entry, ours = COLLATE[f"{kind}.{golden}"], 4000
    theirs, total, mask, other = entry["runs"], 0, 0, 0
    differences, variances = [], []
    for row, ids in enumerate(pipeline.encode(COLLATE["texts"])):
        rates = np.array(entry["chosen_rate_per_position"][row])
        found = counts(pipeline, ids, ours, seed=row)
        rate = found["chosen"] / ours
        assert not rates[len(ids) :].any()
        assert ((rate == 0) == (rates[: len(ids)] == 0)).all(), (row, rate, rates)
        variance = np.maximum(rate * (1 - rate), 1e-9) * (1 / theirs + 1 / ours)
        score = np.abs(rate - rates[: len(ids)]) / np.sqrt(variance)
        assert score[rate > 0].max() < BOUND, (row, rate, rates)
        differences.append((rate - rates[: len(ids)]).sum())
        variances.append(variance[rate > 0].sum())
        total += found["chosen"].sum()
        mask += found["mask"]
        other += found["other"]
    # Positions of one text hinder each other in whole-word masking: their sum varies less than this allows for.
    assert abs(sum(differences)) / np.sqrt(sum(variances)) < BOUND
    chosen_there = theirs * np.sum(entry["chosen_rate_per_position"])
    for share, ours_share in (("share_mask_token", mask / total), ("share_random", other / total)):
        error = np.sqrt(entry[share] * (1 - entry[share]) * (1 / chosen_there + 1 / total))
        assert abs(entry[share] - ours_share) < BOUND * error, share


@pytest.mark.parametrize("kind", masking.KINDS)
def test_shares_of_what_becomes_of_a_token(kind: str, trained: PreTrainedTokenizerFast) -> None:
    """80 % mask token, 10 % a token drawn from all S, special ones too, 10 % untouched: over tens of thousands."""
    pipeline = TextPipeline(trained, 50, kind, probability=0.5)
    (ids,) = pipeline.encode(CAPTIONS[:1])
    found = counts(pipeline, ids, 8000)
    total, size = found["chosen"].sum(), pipeline.vocabulary.size
    assert size == len(trained)
    for share, seen in ((0.8 + 0.1 / size, found["mask"]), (0.1 * (1 - 2 / size), found["other"])):
        assert abs(seen / total - share) < BOUND * np.sqrt(share * (1 - share) / total)


def test_random_tokens_come_from_the_whole_vocabulary(trained: PreTrainedTokenizerFast) -> None:
    vocabulary = masking.read_vocabulary(trained)
    ids, generator = np.full(400, 20), np.random.default_rng(0)
    drawn = np.concatenate(
        [masking.hide(ids, np.arange(400), vocabulary, generator) for _ in range(400)]
    )  # 160 000 tokens, of which a tenth is drawn
    seen = np.bincount(drawn, minlength=vocabulary.size)
    expected = 0.1 * len(drawn) / vocabulary.size
    rest = np.delete(seen, [20, vocabulary.mask_id])
    assert (np.abs(rest - expected) < 5 * np.sqrt(expected)).all()


def test_token_masking_chooses_each_token_alike(trained: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(trained, 50, "token")
    (ids,) = pipeline.encode(CAPTIONS[:1])
    rate = counts(pipeline, ids, 8000)["chosen"] / 8000
    assert rate[0] == rate[-1] == 0
    assert (np.abs(rate[1:-1] - 0.15) < BOUND * np.sqrt(0.15 * 0.85 / 8000)).all()


def test_whole_words_are_chosen_together_and_each_token_alike(trained: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(trained, 50, "whole_word")
    (ids,) = pipeline.encode(CAPTIONS[2:])
    words = np.array([-1 if word is None else word for word in trained(CAPTIONS[2]).word_ids()])
    assert max(np.bincount(words[words >= 0])) > 4  # a word of several tokens is there
    generator, chosen = np.random.default_rng(0), np.zeros(len(ids), int)
    for _ in range(8000):
        positions = set(pipeline.mask(ids, generator)[1].tolist())
        for word in range(words.max() + 1):
            parts = set(np.flatnonzero(words == word).tolist())
            assert parts <= positions or not parts & positions
        chosen[list(positions)] += 1
    assert chosen[0] == chosen[-1] == 0
    assert (np.abs(chosen[1:-1] / 8000 - 0.15) < BOUND * np.sqrt(0.15 * 0.85 / 8000)).all()


@pytest.mark.parametrize("text", [*CAPTIONS, "10x 3.5mm, U.S.A. (red) 'quoted' e-mail x_y 7 dogs", "A  double  space"])
def test_words_are_those_of_the_tokenizer(text: str, trained: PreTrainedTokenizerFast) -> None:
    """Borders from the ids alone are those that the tokenizer itself reports."""
    pipeline = TextPipeline(trained)
    (ids,) = pipeline.encode([text])
    ours = masking.word_numbers(np.array(ids), pipeline.vocabulary)
    theirs = trained(text).word_ids()[1:-1]
    if any(word is None for word in theirs):
        pytest.fail("special tokens inside the text")
    changes = [index for index in range(1, len(theirs)) if theirs[index] != theirs[index - 1]]
    assert (np.flatnonzero(np.diff(ours[1:-1])) + 1).tolist() == changes, trained.convert_ids_to_tokens(ids)


def test_published_whole_words_count_padding(published: dict) -> None:
    """At length 50, 8 of 48 words (BERT: without [CLS] and [SEP]) or of 50 (RoBERTa) are taken, padding among them."""
    for kind, rate in (("bert", 8 / 48), ("roberta", 8 / 50)):
        pipeline = TextPipeline(published[kind], 50, "whole_word_published")
        (ids,) = pipeline.encode(["a picture of a picture"])
        assert len(ids) < 10 or kind == "roberta"
        found = counts(pipeline, ids, 8000)
        assert found["chosen"][0] == found["chosen"][-1] == 0
        seen = found["chosen"][1:-1] / 8000
        assert (np.abs(seen - rate) < BOUND * np.sqrt(rate * (1 - rate) / 8000)).all(), (kind, seen)
        assert (found["per_run"] == 0).any()  # it may hide nothing


def test_published_whole_words_never_take_longer_ones_than_fit(published: dict) -> None:
    """At length 14 two tokens may be hidden, so a word of three pieces never is."""
    pipeline = TextPipeline(published["bert"], 14, "whole_word_published")
    (ids,) = pipeline.encode(["the statement"])
    assert published["bert"].convert_ids_to_tokens(ids) == ["[CLS]", "t", "##h", "##e", "statement", "[SEP]"]
    found = counts(pipeline, ids, 3000)
    assert found["per_run"].max() <= 2
    lengths = np.bincount(masking.word_numbers(np.array(ids), pipeline.vocabulary))
    long = np.repeat(lengths > 2, lengths)
    assert long.any()
    assert not found["chosen"][long].any()


def test_published_whole_words_pass_over_what_does_not_fit(published: dict) -> None:
    """A text without padding, of three words of three pieces and three of one: two of the short ones each time."""
    pipeline = TextPipeline(published["bert"], 14, "whole_word_published")
    (ids,) = pipeline.encode(["the the the a a a"])
    assert len(ids) == 14
    found = counts(pipeline, ids, 200)
    assert (found["per_run"] == 2).all()
    assert not found["chosen"][:10].any()


@pytest.mark.parametrize("kind", masking.KINDS)
def test_masking_depends_on_its_generator_alone(kind: str, trained: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(trained, 50, kind)
    (ids,) = pipeline.encode(CAPTIONS[:1])
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = pipeline.mask(ids, np.random.Generator(np.random.Philox(key=7)))
    again = pipeline.mask(np.array(ids), np.random.Generator(np.random.Philox(key=7)))
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    others = [pipeline.mask(ids, np.random.Generator(np.random.Philox(key=key)))[0] for key in range(30)]
    assert any(not np.array_equal(first[0], other) for other in others)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize("kind", masking.KINDS)
def test_masked_text_is_consistent(kind: str, trained: PreTrainedTokenizerFast) -> None:
    pipeline = TextPipeline(trained, 50, kind, probability=0.4)
    for ids in pipeline.encode(CAPTIONS):
        for seed in range(50):
            masked, positions, labels = pipeline.mask(ids, np.random.default_rng(seed))
            assert masked.dtype == positions.dtype == labels.dtype == np.int64
            assert len(masked) == len(ids)
            assert (np.diff(positions) > 0).all()
            assert labels.tolist() == [ids[position] for position in positions]
            untouched = np.delete(np.arange(len(ids)), positions)
            assert masked[untouched].tolist() == np.array(ids)[untouched].tolist()
            assert masked.max() < len(trained)


@pytest.mark.parametrize("kind", masking.KINDS)
def test_nothing_and_everything(kind: str, trained: PreTrainedTokenizerFast) -> None:
    (ids,) = TextPipeline(trained).encode(CAPTIONS[:1])
    if kind != "whole_word_published":  # which takes at least one word, as published
        masked, positions, labels = TextPipeline(trained, 50, kind, 0.0).mask(ids, np.random.default_rng(0))
        assert (masked.tolist(), len(positions), len(labels)) == (ids, 0, 0)
    positions = TextPipeline(trained, 50, kind, 1.0).mask(ids, np.random.default_rng(0))[1]
    if kind != "content_word":
        assert positions.tolist() == list(range(1, len(ids) - 1))
    empty = TextPipeline(trained, 50, kind).mask([ids[0], ids[-1]], np.random.default_rng(0))
    assert [len(part) for part in empty] == [2, 0, 0]


def test_unknown_tokens_are_never_hidden(published: dict) -> None:
    for kind in masking.KINDS:
        pipeline = TextPipeline(published["bert"], 14, kind, 1.0)
        (ids,) = pipeline.encode(["a \N{SNOWMAN} picture"])
        assert published["bert"].unk_token_id in ids
        assert counts(pipeline, ids, 200)["chosen"][ids.index(published["bert"].unk_token_id)] == 0


def test_content_words_leave_function_words_alone(trained: PreTrainedTokenizerFast) -> None:
    """Hidden are all words but those of the list, as the tokenizer itself divides the text into words."""
    for text in CAPTIONS:
        pipeline = TextPipeline(trained, 50, "content_word", 1.0)
        (ids,) = pipeline.encode([text])
        hidden = set(pipeline.mask(ids, np.random.default_rng(0))[1].tolist())
        encoding = trained(text)
        words = encoding.word_ids()
        for position, word in enumerate(words):
            if word is None:
                assert position not in hidden
                continue
            span = encoding.word_to_chars(word)
            spelled = text[span.start : span.end].strip().lower()
            whole = words.count(word) == 1  # a function word in pieces is not told from others
            assert (position in hidden) != (spelled in masking.FUNCTION_WORDS and whole), (text, spelled)
