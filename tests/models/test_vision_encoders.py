"""The vision encoders of the paper: sizes by name, tokens, pooling, resolutions, files of weights, refusals."""

import dataclasses
import typing
from pathlib import Path

import pytest
import timm
import torch
from golden_cases import TOLERANCE, relative
from safetensors.torch import save_file
from torch import Tensor, nn

from meter_fast.config import ConfigError, from_dict, to_dict
from meter_fast.interop import original_name
from meter_fast.models.config import CLASS_TOKENS, FusionConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.meter import Meter, Need, Part
from meter_fast.models.vision import build_vision
from meter_fast.models.vision_presets import VISION_PRESETS, VisionChoice
from meter_fast.models.weights import WeightsReport, load_vision_weights
from meter_fast.recipes import resolve

TINY = {
    "clip_vit": VisionConfig("clip_vit", 32, 2, 2, 16, 64),
    "vit": VisionConfig("vit", 32, 2, 2, 16, 64),
    "deit_distilled": VisionConfig("deit_distilled", 32, 2, 2, 16, 64),
    "cait": VisionConfig("cait", 32, 2, 2, 16, 64),
    "volo": VisionConfig("volo", 64, 9, 2, 16, 64),
    "beit": VisionConfig("beit", 32, 2, 2, 16, 64),
    "swin": VisionConfig("swin", 64, 8, 8, 32, 64),
}
"""Each kind narrow and shallow: the same classes as at full size."""


def other_size(config: VisionConfig) -> VisionConfig:
    return dataclasses.replace(config, image_size=3 * config.patch_size)


def stirred(module: nn.Module) -> nn.Module:
    """Random weights that leave no branch near zero (layer scales and biases start there)."""
    torch.manual_seed(5)
    for name, parameter in module.named_parameters():
        if name.endswith("running_var"):
            nn.init.uniform_(parameter, 0.5, 2)
        elif parameter.requires_grad:
            nn.init.normal_(parameter, 1 if "norm" in name and name.endswith("weight") else 0, 0.1)
    return module.eval()


def meter(vision: VisionConfig) -> Meter:
    text = TextConfig("bert", 16, 1, 2, 32, vocab_size=30, max_positions=12, token_types=2, dropout=0.0, pad_id=0)
    torch.manual_seed(2)
    return stirred(Meter(ModelConfig(vision, text, FusionConfig(width=24, layers=2, heads=2, dropout=0.0))).double())


def test_every_kind_is_tried() -> None:
    assert set(TINY) == set(CLASS_TOKENS)
    assert {preset.config.name for preset in VISION_PRESETS.values()} == set(CLASS_TOKENS)


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_presets_at_native_size(name: str) -> None:
    """Built without memory: parameters as stated, tokens as configured."""
    preset = VISION_PRESETS[name]
    with torch.device("meta"):
        vision = build_vision(preset.config).eval()
        tokens = vision(torch.empty(2, 3, preset.config.image_size, preset.config.image_size))
    assert tokens.shape == (2, preset.config.tokens, preset.config.width)
    assert str(preset.config.image_size) == name.rsplit("_", 1)[1]
    assert sum(parameter.numel() for parameter in vision.parameters() if parameter.requires_grad) == preset.parameters


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_presets_from_224_to_576(name: str) -> None:
    """Forward and backward at full width, without memory, at the smallest, a middle and the largest size allowed."""
    native = VISION_PRESETS[name].config
    for pixels in (224, 384, 576):
        size = pixels // native.patch_size * native.patch_size
        config = dataclasses.replace(native, image_size=size)
        with torch.device("meta"):
            vision = build_vision(config)
            tokens = vision(torch.empty(1, 3, size, size))
        assert tokens.shape == (1, config.tokens, config.width)
        tokens.sum().backward()
        assert all(parameter.grad is not None for parameter in vision.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_presets_have_the_tensors_of_the_timm_model_that_they_name(name: str) -> None:
    """Every tensor of timm's own model, of the same shape, apart from what loading leaves out."""
    config, transform = VISION_PRESETS[name].config, VISION_PRESETS[name].transform
    library, tag = config.weights.split(".")
    pretrained = timm.get_pretrained_cfg(config.weights)
    assert pretrained is not None and pretrained.tag == tag
    assert pretrained.input_size[-1] == config.image_size
    assert {"clip": 0.4815, "imagenet": 0.485, "vit": 0.5}[transform] == round(pretrained.mean[0], 4)
    with torch.device("meta"):
        theirs = timm.create_model(library, num_classes=0)
        ours = build_vision(config)
    shapes = {name.removeprefix("encoder."): value.shape for name, value in ours.state_dict().items()}
    expected = {
        name.replace("fc_norm.", "norm."): value.shape
        for name, value in theirs.state_dict().items()
        if not name.endswith("num_batches_tracked") and not name.startswith(f"blocks.{config.layers}.")
    }
    assert shapes == expected


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("resized", [False, True], ids=["64 px", "another size"])
def test_forward_and_backward(kind: str, resized: bool) -> None:
    """Tokens as configured, a gradient for every parameter; activation checkpointing changes neither."""
    config = other_size(TINY[kind]) if resized else TINY[kind]
    vision = stirred(build_vision(config)).double().train()
    images = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64)
    weight = torch.randn(2, config.tokens, config.width, dtype=torch.float64)
    gradients = []
    for on in (False, True):
        vision.set_grad_checkpointing(on)
        vision.zero_grad()
        tokens = vision(images)
        assert tokens.shape == (2, config.grid**2 + CLASS_TOKENS[kind], config.width)
        (tokens * weight).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in vision.named_parameters() if p.requires_grad})
    assert all(value.any() for value in gradients[0].values())
    assert all(torch.allclose(value, gradients[1][name]) for name, value in gradients[0].items())


@pytest.mark.parametrize("kind", TINY)
def test_parameters_in_bfloat16_beside_wider_buffers(kind: str) -> None:
    """As engines cast: tokens and gradients in bf16, near those in float32."""
    vision = stirred(build_vision(TINY[kind]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = vision(images)
    for parameter in vision.parameters():
        parameter.data = parameter.data.bfloat16()
    tokens = vision(images.bfloat16())
    assert tokens.dtype == torch.bfloat16
    assert relative(tokens.detach(), expected) < 5e-2
    tokens.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in vision.parameters() if p.requires_grad)


def of_timm(config: VisionConfig) -> nn.Module:
    """The model that timm builds with its own defaults, in our sizes."""
    if config.name == "volo":
        return timm.models.volo.VOLO(
            (2, 2, 4, 1), 64, num_classes=0, embed_dims=(32, 64, 64, 64), num_heads=(1, 2, 2, 2)
        )
    common = {"img_size": 64, "num_classes": 0}
    if config.name == "swin":
        stages = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "window_size": 2}
        return timm.create_model("swin_base_patch4_window7_224", **common, **stages)
    common |= {"embed_dim": config.width, "depth": config.layers, "num_heads": config.heads}
    if config.name == "beit":
        return timm.create_model("beit_base_patch16_224", **common, global_pool="token")
    names = {"vit": "vit_base_patch16_384", "deit_distilled": "deit_base_distilled_patch16_384", "cait": "cait_m36_384"}
    return timm.create_model(names[config.name], **common)


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "clip_vit"])
def test_tokens_are_those_of_timm(kind: str) -> None:
    """The tokens that timm's own classifier would read, with the same weights. (CLIP: golden numbers.)"""
    config = TINY[kind]
    vision, theirs = stirred(build_vision(config)), of_timm(config)
    values = {name.removeprefix("encoder."): value for name, value in vision.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(values, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens, expected = vision(images), theirs.eval()(images)
    read = {"deit_distilled": tokens[:, :2].mean(1), "swin": tokens.mean(1)}.get(kind, tokens[:, 0])
    assert relative(read, expected) < TOLERANCE


@pytest.mark.parametrize("kind", TINY)
def test_cls_alone_equals_cls_of_the_whole_pass(kind: str) -> None:
    """What the last layer leaves out is not read: outputs and gradients, with the mean of the image's tokens too."""
    model, ids = meter(TINY[kind]), torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask, images = ids > 0, torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def run(need: Need) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        text, image = model.encode_text(ids, mask), model.encode_image(images)
        part = Part(need, 2, torch.tensor([1, 0]))
        cls = model.fuse_parts(text, image, mask, (part,))[0].cls
        (cls * torch.linspace(-1, 1, cls.numel()).view_as(cls)).sum().backward()
        return cls.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone, gradients = run(Need.CLS)
    gradients = {name: value.clone() for name, value in gradients.items()}
    whole, expected = run(Need.ALL)
    assert torch.allclose(alone, whole, atol=1e-12)
    assert set(gradients) == set(expected)
    assert all(torch.allclose(gradients[name], value, atol=1e-10) for name, value in expected.items())


def test_mean_of_the_image_is_pooled_without_class_token() -> None:
    model, ids = meter(TINY["swin"]), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        image = model.encode_image(torch.randn(1, 3, 64, 64, dtype=torch.float64))
        fused = model.fuse(model.encode_text(ids, ids > 0), image, ids > 0)
        expected = model.fusion.image_pooler(fused.image.mean(1))
    assert torch.equal(fused.cls[:, 24:], expected)


def test_drop_path_acts_in_training_only() -> None:
    for kind, tiny in TINY.items():
        torch.manual_seed(0)
        vision = stirred(build_vision(dataclasses.replace(tiny, drop_path=0.5)))
        images = torch.randn(4, 3, 64, 64)
        with torch.no_grad():
            still = vision(images)
            assert torch.equal(still, vision(images)), kind
            assert not torch.allclose(still, vision.train()(images)), kind


def test_published_swin_drops_from_nothing_to_a_tenth() -> None:
    with torch.device("meta"):
        blocks = [
            block
            for stage in build_vision(VISION_PRESETS["swin_b_384"].config).encoder.layers
            for block in stage.blocks
        ]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)])
    assert {block.window_size for block in blocks} == {(12, 12)}
    assert [any(block.shift_size) for block in blocks] == [i % 2 == 1 for i in range(22)] + [False, False]


# ----------------------------------------------------------------------------------------------------- files of weights


def load(config: VisionConfig, path: Path) -> tuple[nn.Module, WeightsReport]:
    config = dataclasses.replace(config, weights=str(path))
    vision = build_vision(config).eval()
    return vision, load_vision_weights(vision, config)


def timm_file(kind: str, path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """A file with timm's names, classifier and all, and the model that it is of."""
    vision = stirred(build_vision(TINY[kind]))
    tensors = {name.removeprefix("encoder."): value.clone() for name, value in vision.state_dict().items()}
    width = TINY[kind].width
    tensors |= {"head.weight": torch.ones(10, width), "head.bias": torch.ones(10)}
    if kind == "swin":
        tensors = {name.replace("head.", "head.fc."): value for name, value in tensors.items()}
    if kind == "deit_distilled":
        tensors["head_dist.weight"] = torch.ones(10, width)
    if kind == "volo":
        tensors |= {"aux_head.weight": torch.ones(10, width), "patch_embed.conv.1.num_batches_tracked": torch.tensor(3)}
    if kind == "beit":
        tensors = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value
                   for name, value in tensors.items()}  # fmt: skip
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save({"model": tensors}, path)
    return vision, tensors


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "clip_vit"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_files_of_timm(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{ending}"
    expected, tensors = timm_file(kind, path)
    vision, report = load(TINY[kind], path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(vision(images), expected(images))
    assert report.matched == len(vision.state_dict())
    assert "other tensors of the file left out: " in str(report)
    assert "head." in str(report)
    assert report.resized == ()
    assert ("fc_norm" in str(report)) == (kind == "beit")
    resized, report = load(other_size(TINY[kind]), path)
    assert any("position tables resized from" in note for note in report.resized)
    with torch.no_grad():
        assert resized(torch.randn(1, 3, *[3 * TINY[kind].patch_size] * 2)).isfinite().all()
    tables = [name for name in tensors if name.endswith(("pos_embed", "bias_table"))]
    assert tables and all(resized.state_dict()[f"encoder.{name}"].shape != tensors[name].shape for name in tables)


def test_swin_file_of_its_authors(tmp_path: Path) -> None:
    """Patch merging at the end of a stage, and buffers of the resolution."""
    expected, tensors = timm_file("swin", tmp_path / "timm.pth")
    theirs = {original_name(f"vision.encoder.{name}").removeprefix("vit_model."): value
              for name, value in tensors.items()}  # fmt: skip
    assert "layers.0.downsample.reduction.weight" in theirs and "layers.3.downsample.norm.bias" not in theirs
    theirs["layers.0.blocks.1.attn_mask"] = torch.ones(4, 4, 4)
    theirs["layers.0.blocks.1.attn.relative_position_index"] = torch.ones(4, 4)
    torch.save({"model": theirs}, tmp_path / "authors.pth")
    vision, report = load(TINY["swin"], tmp_path / "authors.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(vision(images), expected(images))
    assert "4 other tensors of the file left out" in str(report)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    timm_file("vit", path)
    with pytest.raises(ValueError, match=r"vit.safetensors does not fit.*encoder.dist_token"):
        load(TINY["deit_distilled"], path)
    with pytest.raises(ValueError, match=r"no place: encoder.blocks.1"):
        load(dataclasses.replace(TINY["vit"], layers=1), path)
    with pytest.raises(ValueError, match=r"shapes differ: encoder.cls_token is \(1, 1, 32\) in the file"):
        load(dataclasses.replace(TINY["vit"], width=64), path)
    timm_file("swin", path)
    with pytest.raises(ValueError, match=r"tensors are missing"):
        load(TINY["vit"], path)


# ------------------------------------------------------------------------------------------------- by name, refused


def test_every_preset_can_be_chosen() -> None:
    assert typing.get_args(VisionChoice) == ("default", *VISION_PRESETS)


def test_a_name_on_the_command_line_sets_the_encoder() -> None:
    config = resolve(["pretrain", "model.vision.image_size=288", "vision=swin_b_384", "model.vision.weights=none"])
    preset = VISION_PRESETS["swin_b_384"].config
    assert config.model.vision == dataclasses.replace(preset, image_size=288, weights=None)
    assert config.data.transform == "imagenet"
    assert from_dict(type(config), to_dict(config)) == config
    assert resolve(["pretrain", "vision=vit_b16_384"]).data.transform == "vit"
    assert resolve(["pretrain", "data.transform=clip", "vision=vit_b16_384"]).data.transform == "clip"
    with pytest.raises(ConfigError, match=r"vision=swin_b_385: one of default, clip_b32_224, .*swin_l_384"):
        resolve(["pretrain", "vision=swin_b_385"])
    with pytest.raises(ConfigError, match=r"model.vision.image_size=300 .*patch_size=32: use 288 or 320"):
        resolve(["pretrain", "vision=swin_b_384", "model.vision.image_size=300"])
    with pytest.raises(ConfigError, match=r"model.vision.layers=11 does not suit .*volo"):
        resolve(["pretrain", "model.vision.name=volo"])


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_tiny_run(name: str) -> None:
    """The kind of encoder in miniature, on the grid of the drawn scenes."""
    config = resolve(["pretrain", "size=tiny", f"vision={name}"])
    vision = config.model.vision
    assert (vision.name, vision.grid, vision.weights) == (VISION_PRESETS[name].config.name, 3, None)
    assert build_vision(vision)(torch.zeros(1, 3, 96, 96)).shape == (1, vision.tokens, 128)


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_resolutions(name: str) -> None:
    """Every multiple of the token's side from 224 to 576 px; the rest is refused with the nearest sizes."""
    config = VISION_PRESETS[name].config
    for size in range(224, 577):
        below = size // config.patch_size * config.patch_size
        if size == below:
            assert dataclasses.replace(config, image_size=size).grid == size // config.patch_size
        else:
            with pytest.raises(ValueError, match=f"use {below} or {below + config.patch_size}$"):
                dataclasses.replace(config, image_size=size)


def test_pictures_of_another_size_are_refused_by_the_encoder() -> None:
    for kind, config in TINY.items():
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            build_vision(config)(torch.randn(1, 3, 96, 96))
        assert kind == config.name
