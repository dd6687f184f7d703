"""Scores of pairs are those of one pass each, for every kind of model and either head; work is shared; bfloat16."""

import dataclasses

import pytest
import torch
from decoder_cases import decoder_config, decoder_model
from golden_cases import TOLERANCE, relative
from torch import Tensor

from meter_fast.models.config import DecoderConfig
from meter_fast.models.meter import Meter, Need
from meter_fast.score_retrieval import check_head, encode_texts, match_scores, pairs_at_once, rank

KINDS = ("co_attention", "merged_attention", "decoder")


def build(kind: str, ranked: bool, packed: bool = False) -> Meter:
    fusion = "co_attention" if kind == "decoder" else kind
    config = dataclasses.replace(decoder_config(fusion), rank_head=ranked)
    if kind != "decoder":
        config = dataclasses.replace(config, decoder=DecoderConfig())
    model = decoder_model(config=config).eval()
    model.kernels = dataclasses.replace(model.kernels, text="packed" if packed else "padded")
    return model


def captions() -> list[list[int]]:
    chance = torch.Generator().manual_seed(0)
    lengths = (4, 7, 4, 5, 7, 7, 4, 3)
    return [torch.randint(4, 50, (length,), generator=chance).tolist() for length in lengths]


def pictures() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def plain_loop(model: Meter) -> Tensor:
    """Every pair by itself, through the whole model."""
    scores = torch.empty(3, len(captions()))
    for i, picture in enumerate(pictures()):
        for t, caption in enumerate(captions()):
            ids = torch.tensor([caption])
            mask = torch.ones_like(ids, dtype=torch.bool)
            text, image = model.encode_text(ids, mask), model.encode_image(picture[None])
            scores[i, t] = rank(model, model.fuse(text, image, mask, need=Need.ALL).cls)[0]
    return scores


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_scores_are_those_of_one_pass_for_each_pair(kind: str, packed: bool, ranked: bool) -> None:
    model = build(kind, ranked, packed)
    plain = plain_loop(model)
    image = model.encode_image(pictures())
    for at_once in (1, 4, None):
        assert (
            relative(match_scores(model, image, encode_texts(model, captions(), at_once), at_once), plain) < TOLERANCE
        )


@torch.inference_mode()
def test_groups_have_one_length_and_everything_is_done_once() -> None:
    model, seen = build("co_attention", True), {}
    texts = encode_texts(model, captions())
    assert sorted(len(part.columns) for part in texts) == [1, 1, 3, 3]
    assert all(bool(part.mask.all()) for part in texts)
    assert sorted(column for part in texts for column in part.columns.tolist()) == list(range(8))

    def count(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(
            lambda _m, given: seen.update({name: seen.get(name, 0) + given[0].shape[0] * given[0].shape[1]})
        )

    first, last = model.fusion.layers
    tokens = model.config.vision.tokens
    count("image", first.image.self_attention)
    count("text", first.text.self_attention)
    count("last image", last.image.feed_forward)
    count("last text", last.text.feed_forward)
    told: list[int] = []
    match_scores(model, model.encode_image(pictures()), texts, progress=told.append)
    assert seen == {
        "image": 4 * 3 * tokens,  # once for each group of texts
        "text": sum(map(len, captions())),
        "last image": 24,
        "last text": 24,
    }
    assert sum(told) == 24


def test_pairs_at_once_are_fewer_with_large_pictures() -> None:
    model = build("co_attention", True)
    assert pairs_at_once(model) == 256
    vision = dataclasses.replace(model.config.vision, image_size=8 * 48)
    model.config = dataclasses.replace(model.config, vision=vision)
    assert pairs_at_once(model) == (1 << 17) // (48**2 + 1)


@pytest.mark.parametrize("ranked", [True, False])
@torch.inference_mode()
def test_bfloat16_scores_are_close_and_float32(ranked: bool) -> None:
    model = build("co_attention", ranked)
    expected = match_scores(model, model.encode_image(pictures()), encode_texts(model, captions()))
    model.bfloat16()
    model.itm_head.float()
    scores = match_scores(model, model.encode_image(pictures().bfloat16()), encode_texts(model, captions()))
    assert scores.dtype == torch.float32 and relative(scores, expected) < 0.1
    assert (scores != scores.bfloat16()).any()


def test_a_model_without_a_head_is_refused() -> None:
    model = build("co_attention", False)
    model.itm_head = None
    with pytest.raises(ValueError, match="both of which this model lacks"):
        check_head(model)
