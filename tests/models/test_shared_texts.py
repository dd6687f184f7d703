"""Texts that stand in several pairs go once through projection and first self-attention: the same outputs and
gradients, less work."""

from dataclasses import replace

import pytest
import torch
from golden_cases import relative
from torch import Tensor

from meter_fast.models.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.meter import Meter, Need, Part

LENGTHS = (5, 1, 8)
PICTURES = torch.tensor([0, 0, 1, 1, 1, 2, 0])
TEXTS = torch.tensor([0, 2, 1, 1, 0, 2, 1])
NEEDS = (Need.CLS, Need.ALL, Need.TEXT)


def build(fusion: str, layers: int, packed: bool, form: str = "auto") -> Meter:
    torch.manual_seed(1)
    decoder = DecoderConfig(layers=1 if fusion == "decoder" else 0, max_positions=16)
    model = Meter(
        ModelConfig(
            vision=VisionConfig(width=48, layers=1, heads=2, patch_size=8, image_size=24),
            text=TextConfig("roberta", 32, 2, 2, 64, vocab_size=50, max_positions=16, dropout=0.0, pad_id=1),
            fusion=FusionConfig("co_attention" if fusion == "decoder" else fusion, 32, layers, heads=2, dropout=0.0),
            decoder=decoder,
            init_std=0.2,
        )
    ).double()
    model.kernels = replace(model.kernels, text="packed" if packed else "padded")
    for part in model.modules():
        if hasattr(part, "form") and form != "auto":
            part.form = form
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=generator).masked_fill(~mask, 1)
    return ids, mask, torch.randn(3, 3, 24, 24, generator=generator, dtype=torch.float64)


def run(model: Meter, shared: bool, parts: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What is read of all pairs in `parts` parts of different needs, and all gradients."""
    ids, mask, images = inputs()
    image, text = model.encode_image(images), model.encode_text(ids, mask)
    wanted = []
    for number, (pictures, texts) in enumerate(zip(PICTURES.tensor_split(parts), TEXTS.tensor_split(parts))):
        need = NEEDS[number % len(NEEDS)]
        wanted.append(Part(need, len(pictures), pictures, texts if shared else None))
    if not shared:
        text, mask = text[TEXTS], mask[TEXTS]
    fused = model.fuse_parts(text, image, mask, tuple(wanted))
    each = mask[TEXTS] if shared else mask
    values = []
    for one, own in zip(fused, each.tensor_split(parts)):
        values += [x for x in (one.cls, one.image, None if one.text is None else one.text[own]) if x is not None]
    sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in values).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [value.detach() for value in values], gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention", "decoder"])
def test_equals_pairs_with_texts_of_their_own(fusion: str, layers: int, parts: int, packed: bool) -> None:
    found, ours = run(build(fusion, layers, packed), True, parts)
    plain, theirs = run(build(fusion, layers, packed), False, parts)
    assert len(found) == len(plain) > 0 and ours.keys() == theirs.keys()
    assert all(relative(one, other) < 1e-12 for one, other in zip(found, plain))
    for name, gradient in theirs.items():
        if not name.endswith(("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias")):
            assert relative(ours[name], gradient) < 1e-9, name


@pytest.mark.parametrize("form", ["direct", "absorbed"])
def test_both_forms_of_cross_attention(form: str) -> None:
    found, _ = run(build("co_attention", 2, False, form), True, 1)
    plain, _ = run(build("co_attention", 2, False, "direct"), False, 1)
    assert all(relative(one, other) < 1e-12 for one, other in zip(found, plain))


@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
def test_work_is_saved(fusion: str) -> None:
    model, seen = build(fusion, 2, False), {}

    def count(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _m, given: seen.setdefault(name, []).append(tuple(given[0].shape[:2])))

    count("text projection", model.fusion.text_projection)
    count("image projection", model.fusion.image_projection)
    if fusion == "co_attention":
        count("text self-attention", model.fusion.layers[0].text.self_attention)
        count("image self-attention", model.fusion.layers[0].image.self_attention)
    run(model, True, 1)
    tokens = model.config.vision.tokens
    assert seen == {name: [(3, tokens if "image" in name else max(LENGTHS))] for name in seen} and len(seen) > 1


def test_some_parts_with_texts_and_some_without_are_refused() -> None:
    model = build("co_attention", 2, False)
    ids, mask, images = inputs()
    parts = (Part(Need.CLS, 2, None, TEXTS[:2]), Part(Need.CLS, 1))
    with pytest.raises(ValueError, match="either all parts tell"):
        model.fuse_parts(model.encode_text(ids, mask), model.encode_image(images), mask, parts)
