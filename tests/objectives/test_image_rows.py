"""`Need.IMAGE`: only the image rows of the last fusion layer, against the whole layer; and that work is saved."""

import pytest
import torch
from cell_cases import random_meter, with_heads
from golden_cases import relative
from small_case import small_batch
from torch import Tensor

from benchmarks.plain import PLAIN
from meter_fast.models.config import FUSIONS, KernelsConfig
from meter_fast.models.meter import Meter, Need, Part

NOISE = ("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias")
FORMS = {
    "plain": PLAIN,
    "absorbed": KernelsConfig("reference", "absorbed", "padded", "reference", "reference", "reference"),
    "packed": KernelsConfig("reference", "direct", "packed", "reference", "reference", "reference"),
}


def image_rows(model: Meter, need: Need) -> tuple[Tensor, dict[str, Tensor]]:
    """Image rows and the gradients of a weighted sum of them."""
    batch = small_batch().to("cpu", torch.float64)
    text, image = model.encode_text(batch.text_ids, batch.text_mask), model.encode_image(batch.images)
    fused = model.fuse(text, image, batch.text_mask, need=need)
    value = fused.image
    (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum().backward()
    if need is Need.IMAGE:
        assert fused.text is None and fused.cls is None
    return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fusion_layers", [1, 2])
@pytest.mark.parametrize(
    ("fusion", "form"), [*(("co_attention", form) for form in FORMS), ("merged_attention", "plain")]
)
def test_equal_those_of_the_whole_layer(fusion: str, form: str, fusion_layers: int) -> None:
    config = with_heads(fusion, fusion_layers=fusion_layers).config
    whole, expected = image_rows(random_meter(config, kernels=form_of(fusion, "plain")).double(), Need.ALL)
    cut, found = image_rows(random_meter(config, kernels=form_of(fusion, form)).double(), Need.IMAGE)
    assert relative(cut, whole) < 1e-12
    assert {n for n in expected if expected[n].any()} <= set(found) | {n for n in expected if n.endswith(NOISE)}
    for name, value in found.items():
        if not name.endswith(NOISE):
            assert relative(value, expected[name]) < 1e-9, name


def form_of(fusion: str, form: str) -> KernelsConfig:
    return KernelsConfig(text="padded") if fusion == "merged_attention" else FORMS[form]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_as_one_of_several_parts(fusion: str) -> None:
    model, batch = with_heads(fusion).double(), small_batch("dataset").to("cpu", torch.float64)
    mask, count = batch.text_mask, len(batch)
    image = model.encode_image(torch.cat([batch.images, batch.false_images]))
    text, other = model.encode_text(batch.text_ids, mask), model.encode_text(batch.masked_ids, mask)
    parts = (Part(Need.IMAGE, count, batch.itm_images), Part(Need.TEXT, count))
    together = model.fuse_parts(torch.cat([text, other]), image, torch.cat([mask] * 2), parts)
    assert relative(together[0].image, model.fuse(text, image[batch.itm_images], mask).image) < 1e-12
    assert relative(together[1].text, model.fuse(other, image[:count], mask).text) < 1e-12


@pytest.mark.parametrize("fusion", FUSIONS)
def test_work_is_saved(fusion: str) -> None:
    """Of the last layer only the picture's tokens are computed."""
    model, batch, seen = with_heads(fusion), small_batch(), []
    last = model.fusion.layers[-1]
    parts = (last.text.feed_forward, last.image.feed_forward) if fusion == "co_attention" else (last.feed_forward,)
    for part in parts:
        part.register_forward_pre_hook(lambda _m, inputs: seen.append(tuple(inputs[0].shape[:-1])))
    text, image = model.encode_text(batch.text_ids, batch.text_mask), model.encode_image(batch.images)
    model.fuse(text, image, batch.text_mask, need=Need.IMAGE)
    assert seen == [(len(batch), model.config.vision.tokens)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_attention_is_recorded_all_the_same(fusion: str) -> None:
    model, batch = with_heads(fusion).eval(), small_batch()
    text, image = model.encode_text(batch.text_ids, batch.text_mask), model.encode_image(batch.images)
    whole, cut = (
        model.fuse(text, image, batch.text_mask, need=need, attention=True) for need in (Need.ALL, Need.IMAGE)
    )
    assert len(whole.attention) == len(cut.attention) == 2
    for one, other in zip(whole.attention, cut.attention, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert relative(cut.image, whole.image) < 1e-6
