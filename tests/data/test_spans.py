"""Span denoising of captions: how much is hidden, that nothing is lost, keyed chances, sentinels in tokenizers."""

from itertools import pairwise

import numpy as np
import pytest
from making import backend, caption, picture, sources_of
from making import loader_of as plain_loader_of

from meter_fast.data.loader import PretrainLoader
from meter_fast.data.order import SampleOrder
from meter_fast.data.spans import (
    CAPTION,
    SPANS,
    Denoiser,
    add_sentinels,
    choose_spans,
    longest_target,
    open_denoiser,
    read_sentinels,
    sentinel,
    sentinels_for,
    spans_of,
)
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer

CAPTIONS = [caption(number) for number in range(200)]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request, tmp_path_factory):
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("spans"), request.param, 600, sentinels=8)


def whole(read: np.ndarray, written: np.ndarray, sentinels: list[int], end: int) -> list[int]:
    """The text again: each sentinel replaced by what follows it in the target."""
    assert written[-1] == end
    parts: dict[int, list[int]] = {}
    for token in written[:-1].tolist():
        if token in sentinels:
            assert token not in parts
            parts[token] = []
            current = parts[token]
        else:
            current.append(token)
    assert list(parts) == sentinels[: len(parts)]  # in order, none left out
    return [token for mark in read.tolist() for token in parts.get(mark, [mark])]


@pytest.mark.parametrize(("probability", "mean"), [(0.15, 3.0), (0.3, 2.0), (0.5, 1.0)])
def test_nothing_is_lost(tokenizer, probability: float, mean: float) -> None:
    hide = Denoiser(tokenizer, (SPANS, CAPTION), probability, mean)
    sentinels, chance, changed = read_sentinels(tokenizer), np.random.default_rng(0), 0
    for ids in TextPipeline(tokenizer, 16).encode(CAPTIONS):
        read, written = hide.denoising(ids, chance)
        assert whole(read, written, sentinels, ids[-1]) == ids
        assert read.dtype == written.dtype == np.int64
        hidden, spans = spans_of(len(ids) - 2, probability, mean)
        assert len(read) == len(ids) - hidden + spans and len(written) == hidden + spans + 1
        changed += read.tolist() != ids
        read, written = hide.captioning(ids)
        assert read.tolist() == [ids[0], sentinels[0], ids[-1]]
        assert written.tolist() == [sentinels[0], *ids[1:]]
    assert changed == len(CAPTIONS)


def test_shares_and_lengths() -> None:
    """15 % in spans of 3 on average; every place is hidden as often, but for the borders of so few spans."""
    chance, tokens, times = np.random.default_rng(1), 100, 4000
    hidden, lengths = np.zeros(tokens), []
    for _ in range(times):
        spans = choose_spans(tokens, 0.15, 3.0, chance)
        assert all(before[1] < after[0] for before, after in pairwise(spans))
        for begin, end in spans:
            hidden[begin:end] += 1
            lengths.append(end - begin)
    assert hidden.sum() / times == 15
    assert np.mean(lengths) == pytest.approx(3.0)
    assert max(lengths) > 6 and min(lengths) == 1
    assert hidden[5:-5].min() / times > 0.12 and hidden[5:-5].max() / times < 0.18
    assert hidden[0] > 0 and hidden[-1] > 0


def test_every_arrangement_is_equally_probable() -> None:
    """Two spans of one token each among five: six places, each as often."""
    chance = np.random.default_rng(2)
    drawn = [tuple(choose_spans(5, 0.4, 1.0, chance)) for _ in range(3000)]
    kinds = sorted(set(drawn))
    assert len(kinds) == 6 and all(drawn.count(kind) == pytest.approx(500, abs=100) for kind in kinds)


@pytest.mark.parametrize("tokens", range(1, 60))
def test_any_length(tokens: int) -> None:
    chance = np.random.default_rng(tokens)
    for probability, mean in ((0.15, 3.0), (0.9, 1.0), (0.01, 5.0)):
        hidden, count = spans_of(tokens, probability, mean)
        spans = choose_spans(tokens, probability, mean, chance)
        assert len(spans) == count <= sentinels_for([SPANS], 60, probability, mean)
        assert sum(end - begin for begin, end in spans) == hidden >= 1
        assert spans[0][0] >= 0 and spans[-1][1] <= tokens
        assert hidden + count + 1 <= longest_target([SPANS], 62, probability, mean)


def test_a_text_without_words(tokenizer) -> None:
    ids = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    hide = Denoiser(tokenizer, (SPANS,))
    read, written = hide.denoising(ids, np.random.default_rng(0))
    assert read.tolist() == ids and written.tolist() == ids[1:]


def loader(tokenizer, sources, names=(SPANS, CAPTION), **options) -> PretrainLoader:
    order = SampleOrder(sources.sizes, 3, 8, image_ids=sources.image_ids)
    text = TextPipeline(tokenizer, 16, denoiser=open_denoiser(tokenizer, names, 0.3, 2.0))
    return PretrainLoader(sources, order, text, backend(), seed=3, workers=0, **options)


def rows(batches, name: str) -> list[tuple]:
    """By sample, what is read and written, free of padding."""
    found = []
    for batch in batches:
        texts = getattr(batch, name)
        real = texts.targets.flatten()[texts.rows].split(texts.lengths.tolist())
        read = texts.ids.flatten()[texts.text_rows].split(texts.mask.sum(1).tolist())
        pairs = zip(batch.sample_ids.tolist(), read, real, strict=True)
        found += [(sample, ids.tolist(), target.tolist()) for sample, ids, target in pairs]
    return found


@pytest.mark.parametrize("name", [SPANS, CAPTION])
def test_does_not_depend_on_the_division(tokenizer, tmp_path, name: str) -> None:
    sources = sources_of(tmp_path, [picture(n) for n in range(12)], [[caption(n)] for n in range(12)])
    at_once = [rows(step, name) for step in loader(tokenizer, sources, micro_batch=8).steps(0, 4)]
    halves = [loader(tokenizer, sources, micro_batch=2, rank=rank, world=2).steps(0, 4) for rank in (0, 1)]
    parted = [[row for a in (0, 1) for part in step for row in rows([part[a]], name)] for step in zip(*halves)]
    assert parted == at_once
    assert rows(next(loader(tokenizer, sources, micro_batch=8).steps(2, 3)), name) == at_once[2]
    seen = {}
    for step in at_once:
        for sample, read, _ in step:
            seen.setdefault(sample, set()).add(tuple(read))
    assert (max(map(len, seen.values())) > 1) == (name == SPANS)  # hidden anew each time, a caption never


def test_only_what_is_asked_for(tokenizer, tmp_path) -> None:
    sources = sources_of(tmp_path, [picture(n) for n in range(12)], [[caption(n)] for n in range(12)])
    (batch,) = next(loader(tokenizer, sources, names=("mlm", "itm"), micro_batch=8).steps(0, 1))
    assert batch.span_denoising is None and batch.caption is None
    (batch,) = next(loader(tokenizer, sources, names=("itm", CAPTION), micro_batch=8).steps(0, 1))
    assert batch.span_denoising is None and batch.caption is not None
    assert batch.to("cpu").caption.ids.equal(batch.caption.ids)
    (plain,) = next(plain_loader_of(sources, tokenizer, global_batch=8).steps(0, 1))
    assert plain.masked_ids.equal(batch.masked_ids)  # other chances than those of masking


def test_sentinels_of_a_tokenizer(tmp_path) -> None:
    plain = train_tokenizer(CAPTIONS, tmp_path / "plain", "bert", 600)
    words = plain.get_vocab()
    with pytest.raises(ValueError, match=r"no token <extra_id_0>.*span_denoising or caption"):
        read_sentinels(plain)
    add_sentinels(plain, 3)
    assert read_sentinels(plain) == [len(words), len(words) + 1, len(words) + 2]
    add_sentinels(plain, 2)
    assert len(plain) == len(words) + 3
    plain.save_pretrained(tmp_path / "grown")
    again = load_tokenizer(tmp_path / "grown")
    trained = train_tokenizer(CAPTIONS, tmp_path / "trained", "bert", 600, sentinels=3)
    assert again.get_vocab() == plain.get_vocab() == trained.get_vocab()
    assert {token: again.get_vocab()[token] for token in words} == words
    ids = [words["red"], read_sentinels(again)[1]]
    assert again.decode(ids, skip_special_tokens=True) == "red"
    inside = TextPipeline(again, 16).encode([f"a {sentinel(0)} circle"])[0]
    assert not set(inside) & set(read_sentinels(again))  # text in a caption is text


def test_needed_sentinels_and_targets() -> None:
    assert sentinels_for(("mlm", "itm"), 50, 0.15, 3.0) == 0 == longest_target(("mlm", "itm"), 50, 0.15, 3.0)
    assert sentinels_for((CAPTION,), 50, 0.15, 3.0) == 1 and longest_target((CAPTION,), 50, 0.15, 3.0) == 50
    assert sentinels_for((SPANS,), 512, 0.15, 3.0) == 26
    assert longest_target((SPANS,), 50, 0.15, 3.0) == 7 + 2 + 1


def test_what_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"objectives.span_probability=1.0"):
        Denoiser(tokenizer, (SPANS,), 1.0)
    with pytest.raises(ValueError, match=r"objectives.span_length=0.5"):
        Denoiser(tokenizer, (SPANS,), 0.15, 0.5)
    ids = [tokenizer.cls_token_id, *[9] * 40, tokenizer.sep_token_id]
    with pytest.raises(ValueError, match=r"20 spans of a text of 40 tokens, and the tokenizer has 8"):
        Denoiser(tokenizer, (SPANS,), 0.5, 1.0).denoising(ids, np.random.default_rng(0))
    assert open_denoiser(tokenizer, ("mlm", "itm"), 0.15, 3.0) is None
