"""Merged attention against torch's own transformer layers over text and picture in one sequence, float64; its kernels,
compilation and attention weights."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import PLAIN
from meter_fast.models.config import FusionConfig, KernelsConfig, ModelConfig, TextConfig, VisionConfig, base
from meter_fast.models.fusion import Fused, Need, Part
from meter_fast.models.merged_attention import MergedAttention, MergedLayer
from meter_fast.models.meter import Meter
from meter_fast.models.sides import Side
from meter_fast.training.engine import compile_blocks

LENGTHS = (5, 1, 7, 3)
WIDTH, HEADS, IMAGES = 32, 4, 10
PARTS = (
    Part(Need.CLS, 4, torch.tensor([1, 1, 0, 4])),
    Part(Need.TEXT, 4),
    Part(Need.ALL, 4, torch.tensor([3, 2, 2, 0])),
)


def small_fusion(layers: int, dropout: float = 0.0) -> MergedAttention:
    """24 wide texts, 40 wide pictures, float64; weights large enough for every path to matter."""
    torch.manual_seed(1)
    config = FusionConfig("merged_attention", WIDTH, layers, HEADS, dropout, token_types=3)
    fusion = MergedAttention(config, 24, 40, PLAIN).double()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return fusion


def small_inputs(parts: int = 1, pictures: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).repeat(parts, 1)
    text = torch.randn(*mask.shape, 24, dtype=torch.float64, requires_grad=True)
    return text, torch.randn(pictures, IMAGES, 40, dtype=torch.float64, requires_grad=True), mask


def plain(
    fusion: MergedAttention, text: Tensor, image: Tensor, mask: Tensor, image_type: int = 1
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(text, image, cls, weights of each layer [P,H,T,T]) by torch's layers, which borrow the weights."""
    types = fusion.token_types.weight
    x = torch.cat([fusion.text_projection(text) + types[0], fusion.image_projection(image) + types[image_type]], 1)
    hidden = torch.cat([~mask, torch.zeros(image.shape[:2], dtype=torch.bool)], 1)
    weights = []
    for layer in fusion.layers:
        own, feed = layer.self_attention, layer.feed_forward
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", 1e-12, batch_first=True)
        block.self_attn.in_proj_weight, block.self_attn.in_proj_bias = (
            own.query_key_value.weight,
            own.query_key_value.bias,
        )
        for place, module in (("linear1", feed.up), ("linear2", feed.down), ("norm1", own.norm), ("norm2", feed.norm)):
            getattr(block, place).weight, getattr(block, place).bias = module.weight, module.bias
        block.self_attn.out_proj.weight, block.self_attn.out_proj.bias = own.out.weight, own.out.bias
        read = block.self_attn(x, x, x, key_padding_mask=hidden, average_attn_weights=False)
        weights.append(read[1])
        x = block(x, src_key_padding_mask=hidden)
    text, image = x.split([mask.shape[1], image.shape[1]], 1)
    poolers = (fusion.text_pooler.dense, text), (fusion.image_pooler.dense, image)
    return text, image, torch.cat([dense(side[:, 0]).tanh() for dense, side in poolers], 1), weights


def score(fused: Fused, mask: Tensor) -> Tensor:
    """A number that depends on every value read."""
    values = [value for value in (fused.image, fused.cls) if value is not None]
    values += [fused.text[mask]] if fused.text is not None else []
    return sum((torch.linspace(-1, 2, value.numel(), dtype=value.dtype) * value.flatten()).sum() for value in values)


def cut(values: tuple[Tensor, Tensor, Tensor], need: Need) -> Fused:
    text, image, cls = values
    return {
        Need.ALL: Fused(text, image, cls),
        Need.TEXT: Fused(text, None, None),
        Need.IMAGE: Fused(None, image, None),
        Need.BOTH: Fused(text, image, None),
        Need.CLS: Fused(None, None, cls),
    }[need]


def gradients(loss: Tensor, fusion: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    named = {**dict(fusion.named_parameters()), "text": inputs[0], "image": inputs[1]}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: value for name, value in zip(named, found, strict=True) if value is not None}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item()
        assert error <= 1e-11 * max(1.0, value.abs().max().item()), f"{name}: {error}"


@pytest.mark.parametrize("need", list(Need))
@pytest.mark.parametrize("layers", [1, 3])
def test_equals_torchs_layers(layers: int, need: Need) -> None:
    fusion, (text, image, mask) = small_fusion(layers), small_inputs()
    found = fusion(text, image, mask, (Part(need, 4, image_type=2),))[0]
    expected = cut(plain(fusion, text, image, mask, 2)[:3], need)
    for name in ("text", "image", "cls"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            where = mask if name == "text" else slice(None)
            assert (ours - theirs)[where].abs().max() < 1e-11, name
    inputs = text, image
    check(gradients(score(found, mask), fusion, inputs), gradients(score(expected, mask), fusion, inputs))


@pytest.mark.parametrize("layers", [1, 2])
def test_parts_equal_separate_passes(layers: int) -> None:
    """Three readers of five pictures, each with its own need, against a whole pass each."""
    fusion, (text, image, mask) = small_fusion(layers), small_inputs(len(PARTS), pictures=5)
    together = fusion(text, image, mask, PARTS)
    found = sum(score(fused, mask[:4]) for fused in together)
    expected = 0
    for part, own in zip(PARTS, text.split(4), strict=True):
        pictures = image[:4] if part.images is None else image[part.images]
        expected = expected + score(cut(plain(fusion, own, pictures, mask[:4])[:3], part.need), mask[:4])
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    inputs = text, image
    check(gradients(found, fusion, inputs), gradients(expected, fusion, inputs))


def test_padding_changes_nothing() -> None:
    """What stands on padding, and how much of it there is."""
    fusion, (text, image, mask) = small_fusion(3), small_inputs()
    part = (Part(Need.ALL, 4),)
    expected = fusion(text, image, mask, part)[0]
    wider = nn.functional.pad(torch.where(mask[..., None], text, 1e3), (0, 0, 0, 3), value=-1e3)
    found = fusion(wider, image, nn.functional.pad(mask, (0, 3)), part)[0]
    assert (found.text[:, : mask.shape[1]] - expected.text)[mask].abs().max() < 1e-12
    assert (found.image - expected.image).abs().max() < 1e-12
    assert (found.cls - expected.cls).abs().max() < 1e-12


def test_attention_weights_are_those_from_text_to_picture() -> None:
    fusion, (text, image, mask) = small_fusion(3), small_inputs(2)
    parts = (Part(Need.TEXT, 4), Part(Need.CLS, 4, torch.tensor([3, 2, 1, 0])))
    found = fusion(text, image, mask, parts, with_attention=True)
    pictures = torch.cat([image, image.flip(0)])
    length = mask.shape[1]
    expected = [layer[:, :, :length, length:] for layer in plain(fusion, text, pictures, mask)[3]]
    assert len(found[0].attention) == len(found[1].attention) == 3
    for layer, whole in enumerate(expected):
        assert (found[0].attention[layer] - whole[:4]).abs().max() < 1e-12
        rows = 1 if layer == 2 else length
        assert found[1].attention[layer].shape == (4, HEADS, rows, IMAGES)
        assert (found[1].attention[layer] - whole[4:, :, :rows]).abs().max() < 1e-12
    assert torch.equal(found[0].text, fusion(text, image, mask, parts)[0].text)


def test_work_is_saved() -> None:
    """Pictures are projected once each; of the last layer only rows that are read are computed."""
    fusion, (text, image, mask) = small_fusion(2), small_inputs(len(PARTS), pictures=5)
    seen: dict[str, list[tuple[int, ...]]] = {"projection": [], "queries": [], "rows": []}

    def count(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _m, inputs: seen[name].append(tuple(inputs[0].shape[:-1])))

    last = fusion.layers[1]
    count("projection", fusion.image_projection)
    count("queries", last.self_attention.out)
    count("rows", last.feed_forward)
    fusion(text, image, mask, PARTS)
    read = [(4, 2), (4, max(LENGTHS)), (4, max(LENGTHS) + IMAGES)]
    assert seen == {"projection": [(5, IMAGES)], "queries": read, "rows": read}


def test_dropout_acts_in_training_only() -> None:
    fusion, (text, image, mask) = small_fusion(2, dropout=0.3), small_inputs()
    part = (Part(Need.CLS, 4),)
    first, second = (fusion(text, image, mask, part)[0].cls for _ in range(2))
    assert not torch.allclose(first, second)
    fusion.eval()
    expected = plain(fusion, text, image, mask)[2]
    assert (fusion(text, image, mask, part)[0].cls - expected).abs().max() < 1e-11


def test_checkpointing_changes_nothing() -> None:
    fusion, (text, image, mask) = small_fusion(3, dropout=0.2), small_inputs(len(PARTS), pictures=5)
    runs: list[int] = []
    fusion.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    results = []
    for on in (False, True):
        fusion.activation_checkpointing = on
        torch.manual_seed(5)
        loss = sum(score(fused, mask[:4]) for fused in fusion(text, image, mask, PARTS))
        results.append((loss.item(), gradients(loss, fusion, (text, image))))
    assert len(runs) == 3, "with checkpointing the layer runs again in backward"
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


# --------------------------------------------------------------------------------------------------- the whole model


def small_config(layers: int = 2) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(width=48, layers=1, heads=2, patch_size=8, image_size=24, position_std=0.5),
        text=TextConfig("roberta", 32, 2, 2, 64, vocab_size=50, max_positions=16, dropout=0.0, pad_id=1),
        fusion=FusionConfig("merged_attention", 64, layers, 2, 0.0),
        init_std=0.2,
    )


def step(kernels: KernelsConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that a pre-training step computes, and its gradients."""
    torch.manual_seed(1)
    model = Meter(small_config(), kernels=kernels).to(dtype)
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=generator).masked_fill(~mask, 1)
    images = torch.randn(3, 3, 24, 24, generator=generator, dtype=dtype, requires_grad=True)
    parts = (Part(Need.TEXT, 4, torch.tensor([0, 1, 2, 0])), Part(Need.CLS, 4, torch.tensor([1, 1, 0, 2])))
    twice = torch.cat([mask, mask])
    text = model.encode_text(torch.cat([ids, ids]), twice)
    read, matched = model.fuse_parts(text, model.encode_image(images), twice, parts)
    rows = torch.tensor([0, 4, 7, 15, 19, 21])
    loss, _ = model.mlm_head(read.text.flatten(0, 1)[rows], torch.tensor([0, 49, 7, 8, 9, 10]))
    (loss + model.itm_head(matched.cls).square().sum()).backward()
    values = {"text": read.text[mask], "cls": matched.cls, "loss": loss, "images": images.grad}
    return values | {name: p.grad for name, p in model.named_parameters()}


TRITON = ({"residual_norm": "triton"}, {"gelu": "triton"}, {"residual_norm": "triton", "gelu": "triton"})


@pytest.mark.parametrize("chosen", [*TRITON, dict.fromkeys(("residual_norm", "gelu", "mlm_loss"), "triton")], ids=str)
@pytest.mark.parametrize("text", ["padded", "packed"])
def test_kernels_equal_plain(chosen: dict[str, str], text: str) -> None:
    found = step(dataclasses.replace(PLAIN, text=text, **chosen), torch.float32)
    for name, value in step(PLAIN, torch.float32).items():
        error = (found[name] - value).abs().max()
        assert error <= 2e-5 * max(1.0, value.abs().max()), f"{name}: {error}"


def test_packed_texts_equal_padded_ones() -> None:
    found = step(dataclasses.replace(PLAIN, text="packed"), torch.float64)
    for name, value in step(PLAIN, torch.float64).items():
        assert (found[name] - value).abs().max() <= 1e-11 * max(1.0, value.abs().max()), name


def test_kernels_of_cross_attention_are_refused() -> None:
    chosen = Meter(small_config()).kernels
    assert (chosen.cross_attention, chosen.cross_attention_form) == ("reference", "direct")
    for setting in ({"cross_attention": "triton"}, {"cross_attention_form": "absorbed"}):
        with pytest.raises(
            ValueError, match=r"kernels.cross_attention.*merged_attention has no cross-attention; use auto"
        ):
            Meter(small_config(), kernels=KernelsConfig(**setting))


@pytest.mark.parametrize("triton", [{}, TRITON[2]], ids=str)
def test_layer_compiles_whole(triton: dict[str, str]) -> None:
    """No graph break, forward and backward, dropout on; the values are those of the layer as it is."""
    kernels = dataclasses.replace(PLAIN, **triton)
    layer = MergedLayer(FusionConfig("merged_attention", 64, 1, 2, 0.1), kernels)
    side = Side.merged(torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None], IMAGES)
    x = torch.randn(4, IMAGES + max(LENGTHS), 64, requires_grad=True)
    for need in Need:
        for training in (False, True):
            layer.train(training)
            found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, side, IMAGES, need)
            found.sum().backward()
            if not training:
                assert torch.allclose(found, layer(x, side, IMAGES, need), atol=1e-5)
        torch.compiler.reset()  # a run asks for few of them, and the compiler keeps eight forms at most


def test_blocks_to_compile_are_found() -> None:
    model = Meter(small_config(layers=3))
    compile_blocks(model)
    assert [layer._compiled_call_impl is not None for layer in model.fusion.layers] == [True] * 3


def test_parameters_of_the_base_model() -> None:
    """Twelve layers, as the paper takes them, and the depth that has co-attention's number of parameters."""
    counts = []
    for fusion in (FusionConfig(), *(FusionConfig("merged_attention", layers=n) for n in (12, 16))):
        with torch.device("meta"):
            model = Meter(dataclasses.replace(base(), fusion=fusion))
        counts.append([sum(p.numel() for p in part.parameters()) for part in (model.fusion.layers, model)])
    assert counts == [[113_421_312, 357_899_099], [85_054_464, 329_532_251], [113_405_952, 357_883_739]]


def test_form_of_attention_that_is_shown() -> None:
    assert Meter(small_config()).attention_backends("cpu", bf16=False) == {
        "vision": "plain", "text": "plain", "fusion": "plain"
    }  # fmt: skip
    assert Meter(small_config()).attention_backends("cpu", bf16=False, text_length=60)["fusion"] == "fused"
