"""Texts that a decoder writes: greedy equals a plain loop without cache, beam search equals brute force, and what a
batch, a limit and an end token do."""

import dataclasses
import itertools

import pytest
import torch
from decoder_cases import END, decoder_batch, decoder_config, decoder_model, texts_of
from torch import Tensor

from meter_fast.models.config import FUSIONS
from meter_fast.models.generation import Written, write
from meter_fast.models.meter import Meter, Need

LENGTHS = [5, 3, 6, 2]
FEW = 5  # words of the vocabulary that brute force goes through, <end> among them


def model_of(words: int = 50, fusion: str = "co_attention", end: float = 0.0) -> Meter:
    """Weights of a size that makes what is written depend on picture, text and every token before."""
    config = decoder_config(fusion)
    text = dataclasses.replace(config.text, vocab_size=words)
    model = decoder_model(dtype=torch.float64, config=dataclasses.replace(config, text=text, init_std=0.1)).eval()
    with torch.no_grad():
        model.lm_head.decoder.weight.mul_(2)
        model.lm_head.decoder.bias[END] += end
    return model


def sides(model: Meter, only: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    texts, images = texts_of(LENGTHS, LENGTHS), decoder_batch(torch.float64).images
    ids, mask = texts.ids % model.config.text.vocab_size, texts.mask
    if only is not None:
        ids, mask, images = ids[only], mask[only], images[only]
        ids, mask = ids[:, : mask.sum(1).max()], mask[:, : mask.sum(1).max()]
    fused = model.fuse(model.encode_text(ids, mask), model.encode_image(images), mask, need=Need.BOTH)
    return fused.text, fused.image, mask


@torch.no_grad()
def log_probabilities(model: Meter, ids: Tensor, pair: int, of: tuple) -> Tensor:
    """Of each token of texts ids [N,T], all written of one pair, computed at once and without cache: [N,T,S]."""
    text, image, mask = (part[pair : pair + 1].expand(len(ids), *part.shape[1:]) for part in of)
    return model.lm_head(model.decoder(model.decoder.inputs(ids), text, image, mask)).log_softmax(-1)


@torch.no_grad()
def plain_greedy(model: Meter, pair: int, of: tuple, limit: int) -> tuple[list[int], float]:
    """Best token after best token."""
    ids, total = [], 0.0
    while len(ids) < limit:
        best = log_probabilities(model, torch.tensor([[*ids, 0]]), pair, of)[0, -1].max(0)
        total += best.values.item()
        ids.append(int(best.indices))
        if ids[-1] == END:
            return ids[:-1], total / len(ids)
    return ids, total / limit


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_beam_is_greedy(fusion: str) -> None:
    model = model_of(fusion=fusion)
    of = sides(model)
    found = write(model, *of, END, 10)
    for pair in range(4):
        ids, score = plain_greedy(model, pair, of, 10)
        assert found.ids[pair] == ids
        assert found.score[pair] == pytest.approx(score, abs=1e-5)
    assert len({tuple(ids) for ids in found.ids}) == 4 and any(len(set(ids)) > 2 for ids in found.ids)


@torch.no_grad()
def brute_force(model: Meter, pair: int, of: tuple, limit: int, penalty: float) -> tuple[list[int], float]:
    """The best of all texts: those that end, and those of `limit` tokens without an end."""
    texts = torch.tensor(list(itertools.product(range(FEW), repeat=limit)))
    each = log_probabilities(model, texts, pair, of).gather(2, texts[..., None])[..., 0]
    found = []
    for ids, scores in zip(texts.tolist(), each, strict=True):
        length = ids.index(END) + 1 if END in ids else limit
        found.append((scores[:length].sum().item() / length**penalty, ids[:length]))
    score, ids = max(found)
    return [word for word in ids if word != END], score


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_enough_beams_are_brute_force(penalty: float) -> None:
    model = model_of(FEW)
    of = sides(model)
    found = write(model, *of, END, 4, beams=5 * 4**2, length_penalty=penalty)
    for pair in range(4):
        ids, score = brute_force(model, pair, of, 4, penalty)
        assert found.ids[pair] == ids
        assert found.score[pair] == pytest.approx(score, abs=1e-5)


def test_beams_find_better_texts_than_one() -> None:
    """Sums of log-probabilities never fall short of greedy's by much, and are above it somewhere."""
    model = model_of()
    of = sides(model)
    scores = [write(model, *of, END, 8, beams=beams).score for beams in (1, 4, 16)]
    assert sum(scores[2]) >= sum(scores[1]) > sum(scores[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_its_pairs(beams: int) -> None:
    """Pairs of unequal texts that end at different times do not touch each other."""
    model = model_of(end=3.0)
    together = write(model, *sides(model), END, 9, beams)
    assert len({len(ids) for ids in together.ids}) > 1
    for pair in range(4):
        alone = write(model, *sides(model, [pair]), END, 9, beams)
        assert alone.ids == [together.ids[pair]]
        assert alone.score == pytest.approx([together.score[pair]], abs=1e-5)
    assert write(model, *sides(model), END, 9, beams) == together


def test_end_and_limit() -> None:
    model = model_of()
    of = sides(model)
    for limit in (1, 2, 5):
        assert all(len(ids) <= limit and END not in ids for ids in write(model, *of, END, limit, 2).ids)
    with torch.no_grad():
        model.lm_head.decoder.bias[END] = 1e4
    assert write(model, *of, END, 5, 2) == Written([[]] * 4, pytest.approx([0.0] * 4, abs=1e-6))
    with torch.no_grad():
        model.lm_head.decoder.bias[END] = -1e4
    found = write(model, *of, END, 5)
    assert [len(ids) for ids in found.ids] == [5] * 4
    assert [ids[:3] for ids in found.ids] == write(model, *of, END, 3).ids


def test_bfloat16() -> None:
    model = model_of().bfloat16()
    texts = texts_of(LENGTHS, LENGTHS)
    image = model.encode_image(decoder_batch(torch.bfloat16).images)
    fused = model.fuse(model.encode_text(texts.ids, texts.mask), image, texts.mask, need=Need.BOTH)
    assert len(write(model, fused.text, fused.image, texts.mask, END, 6, beams=2).ids) == 4


def test_what_is_refused() -> None:
    model = model_of()
    of = sides(model)
    for length in (0, 13):
        with pytest.raises(ValueError, match=rf"max_length={length}: 1 to 12"):
            write(model, *of, END, length)
    with pytest.raises(ValueError, match=r"beams=0"):
        write(model, *of, END, 4, beams=0)
    with pytest.raises(ValueError, match=r"length_penalty=-1"):
        write(model, *of, END, 4, length_penalty=-1)
