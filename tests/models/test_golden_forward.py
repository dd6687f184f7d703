"""Encoders, projections, fusion layers and poolers against the published code, block by block."""

import pytest
import torch
from golden_cases import TOLERANCE, GoldenCase, relative
from torch import Tensor, nn

from meter_fast.models.meter import Need


def record_outputs(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A dict that fills with the modules' outputs (the first, of several) when the model runs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module, _inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    return seen


def check_all(found: dict[str, Tensor], case: GoldenCase) -> None:
    errors = {name: relative(value, case.outputs[f"infer/{name}"]) for name, value in found.items()}
    assert errors and max(errors.values()) < TOLERANCE, errors


@torch.no_grad()
def test_vision_encoder_block_by_block(case: GoldenCase) -> None:
    vision = case.model.vision
    if case.model.config.vision.name == "swin":
        stages = vision.encoder.layers
        parts = {f"vit_stage.{i}": stage.downsample for i, stage in enumerate(stages[1:])}  # there the end of stage i
        parts[f"vit_stage.{len(stages) - 1}"] = stages[-1]
        expected = len(case.sizes["swin"]["depths"])
    else:
        parts = {f"vit_block.{i}": block for i, block in enumerate(vision.blocks)}
        expected = case.sizes["clip"]["layers"] - 1  # the published model has one block less than the CLIP file
    seen = record_outputs(parts)
    seen["vit"] = case.model.encode_image(case.inputs["image"])
    assert len(seen) == expected + 1
    check_all({name: value.flatten(1, -2) for name, value in seen.items()}, case)


@torch.no_grad()
def test_text_encoder_layer_by_layer(case: GoldenCase) -> None:
    text = case.model.text
    seen = record_outputs(
        {"text_embeddings": text.embeddings} | {f"text_layer.{i}": layer for i, layer in enumerate(text.encoder.layer)}
    )
    last = case.model.encode_text(case.inputs["text_ids"], case.inputs["text_masks"].bool())
    assert len(seen) == case.sizes["text"]["num_hidden_layers"] + 1
    assert torch.equal(last, seen[f"text_layer.{len(seen) - 2}"])
    check_all(seen, case)


@torch.no_grad()
def test_fusion_layer_by_layer(case: GoldenCase) -> None:
    fusion, mask = case.model.fusion, case.inputs["text_masks"].bool()
    seen = record_outputs(
        {
            "text_proj": fusion.text_projection,
            "image_proj": fusion.image_projection,
            "pooler_text": fusion.text_pooler,
            "pooler_image": fusion.image_pooler,
        }
    )
    for i, layer in enumerate(fusion.layers):

        def keep(_module, inputs, outputs, i=i):
            if i == 0:
                seen["fusion_in.text"], seen["fusion_in.image"] = inputs[:2]
            seen[f"cross_text.{i}"], seen[f"cross_image.{i}"] = outputs

        layer.register_forward_hook(keep)
    image = case.model.encode_image(case.inputs["image"])
    text = case.model.encode_text(case.inputs["text_ids"], mask)
    fused = case.model.fuse(text, image, mask)
    assert len(seen) == 6 + 2 * case.sizes["top"]
    check_all(seen | {"cls_feats": fused.cls}, case)
    assert torch.equal(fused.text, seen[f"cross_text.{case.sizes['top'] - 1}"])
    assert torch.equal(fused.image, seen[f"cross_image.{case.sizes['top'] - 1}"])


@torch.no_grad()
@pytest.mark.parametrize("need", list(Need))
def test_what_need_names_is_right_and_the_rest_absent(case: GoldenCase, need: Need) -> None:
    mask = case.inputs["text_masks"].bool()
    image = case.model.encode_image(case.inputs["image"])
    text = case.model.encode_text(case.inputs["text_ids"], mask)
    fused = case.model.fuse(text, image, mask, need=need)
    last = case.sizes["top"] - 1
    expected = {
        "text": f"infer/cross_text.{last}" if need in (Need.ALL, Need.TEXT, Need.BOTH) else None,
        "image": f"infer/cross_image.{last}" if need in (Need.ALL, Need.IMAGE, Need.BOTH) else None,
        "cls": "infer/cls_feats" if need in (Need.ALL, Need.CLS) else None,
    }
    for name, golden in expected.items():
        value = getattr(fused, name)
        assert (value is None) == (golden is None), name
        assert golden is None or relative(value, case.outputs[golden]) < TOLERANCE, name


@torch.no_grad()
def test_bfloat16_stays_near(case: GoldenCase) -> None:
    """Every golden weight is exact in bf16, so the model is the same one. Measured: 1e-2 to 2e-2."""
    model, mask = case.model.bfloat16(), case.inputs["text_masks"].bool()
    image = model.encode_image(case.inputs["image"].bfloat16())
    text = model.encode_text(case.inputs["text_ids"], mask)
    fused = model.fuse(text, image, mask)
    assert fused.cls.dtype == torch.bfloat16
    errors = [
        relative(image, case.outputs["infer/vit"]),
        relative(fused.cls, case.outputs["infer/cls_feats"]),
    ]
    assert max(errors) < 5e-2, errors


@torch.no_grad()
def test_attention_maps_belong_to_the_pass(case: GoldenCase) -> None:
    """Rows sum to 1, and the maps rebuild the last layer's cross-attention from its own values."""
    model, mask = case.model, case.inputs["text_masks"].bool()
    image = model.encode_image(case.inputs["image"])
    text = model.encode_text(case.inputs["text_ids"], mask)
    cross = model.fusion.layers[-1].text.cross_attention
    values, reads = [], []
    cross.key_value.register_forward_hook(lambda _m, _i, output: values.append(output))
    cross.out.register_forward_pre_hook(lambda _m, inputs: reads.append(inputs[0]))
    plain = model.fuse(text, image, mask, need=Need.TEXT)
    fused = model.fuse(text, image, mask, need=Need.TEXT, attention=True)
    pairs, tokens, heads = len(text), text.shape[1], case.sizes["heads"]
    assert plain.attention is None
    assert torch.equal(plain.text, fused.text)
    assert len(fused.attention) == case.sizes["top"]
    for weights in fused.attention:
        assert weights.shape == (pairs, heads, tokens, image.shape[1])
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    value = values[-1].chunk(2, dim=-1)[1].unflatten(-1, (heads, -1)).transpose(1, 2)
    assert relative((fused.attention[-1] @ value).transpose(1, 2).flatten(2), reads[-1]) < TOLERANCE
