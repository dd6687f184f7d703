"""Every combination of forms and kernels of the fusion and the text encoder equals the plain model: outputs, gradients
of parameters and inputs."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.plain import PLAIN
from meter_fast.models.co_attention import CoAttentionLayer
from meter_fast.models.config import FusionConfig, KernelsConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.meter import Meter, Need, Part
from meter_fast.models.packing import Packing
from meter_fast.models.sides import Side

LENGTHS = (5, 1, 8, 3)
COMBINATIONS = [
    KernelsConfig(*choice, "triton", "triton", "triton")
    for choice in itertools.product(("reference", "triton"), ("direct", "absorbed", "auto"), ("padded", "packed"))
] + [dataclasses.replace(PLAIN, **{name: "triton"}) for name in ("residual_norm", "mlm_loss", "gelu")]
WITHOUT_TRITON = [
    KernelsConfig("reference", form, text, "reference", "reference", "reference")
    for form, text in itertools.product(("direct", "absorbed"), ("padded", "packed"))
]


def build(kernels: KernelsConfig, name: str = "roberta", dtype: torch.dtype = torch.float32) -> Meter:
    torch.manual_seed(1)
    config = ModelConfig(
        vision=VisionConfig(width=48, layers=1, heads=2, patch_size=8, image_size=24, position_std=0.5),
        text=TextConfig(name, 32, 2, 2, 64, vocab_size=50, max_positions=16, dropout=0.0, pad_id=1),
        fusion=FusionConfig(width=64, layers=2, heads=2, dropout=0.0),
        init_std=0.2,
    )
    model = Meter(config, kernels=kernels)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def texts(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=generator).masked_fill(~mask, 1)
    return ids, mask, torch.randn(3, 3, 24, 24, generator=generator, dtype=dtype)


def run(model: Meter) -> dict[str, Tensor]:
    """Everything that a pre-training step computes, and its gradients."""
    ids, mask, images = texts(next(model.parameters()).dtype)
    images.requires_grad_()
    parts = (Part(Need.TEXT, 4, torch.tensor([0, 1, 2, 0])), Part(Need.CLS, 4, torch.tensor([1, 1, 0, 2])))
    twice = torch.cat([mask, mask])
    text = model.encode_text(torch.cat([ids, ids.flip(0) * mask + ~mask]), twice)
    read, matched = model.fuse_parts(text, model.encode_image(images), twice, parts)
    rows = torch.tensor([0, 4, 8, 16, 23, 26])
    loss, correct = model.mlm_head(read.text.flatten(0, 1)[rows], torch.tensor([0, 49, 7, 8, 9, 10]))
    (loss + model.itm_head(matched.cls).square().sum()).backward()
    values = {"text": read.text[mask], "cls": matched.cls, "loss": loss, "correct": correct, "images": images.grad}
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["fusion.layers.1.image.self_attention"] or not missing, missing
    return values | {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * max(1.0, value.abs().max()), f"{name}: {error}"


@pytest.mark.parametrize("kernels", COMBINATIONS, ids=str)
def test_equals_plain(kernels: KernelsConfig):
    assert_equal(run(build(kernels)), run(build(PLAIN)), 2e-5)


@pytest.mark.parametrize("name", ["roberta", "bert"])
@pytest.mark.parametrize("kernels", WITHOUT_TRITON, ids=str)
def test_equals_plain_in_float64(kernels: KernelsConfig, name: str):
    plain = run(build(PLAIN, name, torch.float64))
    assert_equal(run(build(kernels, name, torch.float64)), plain, 1e-11)


def test_all_rows_and_known_packing():
    ids, mask, images = texts(torch.float64)
    results = []
    for kernels in (PLAIN, dataclasses.replace(PLAIN, text="packed")):
        model = build(kernels, dtype=torch.float64).eval()
        rows = mask.flatten().nonzero().flatten()
        packing = Packing.of(mask, rows)
        text = model.encode_text(ids, mask, packing)
        images4 = model.encode_image(images)[[0, 1, 2, 0]]
        results.append(model.fuse(text, images4, mask, need=Need.ALL))
    plain, packed = results
    assert (plain.text - packed.text)[mask].abs().max() < 1e-12
    assert (plain.image - packed.image).abs().max() < 1e-12
    assert (plain.cls - packed.cls).abs().max() < 1e-12
    assert packed.text[~mask].count_nonzero() == 0


def test_packing_there_and_back():
    mask = texts(torch.float32)[1]
    x = torch.randn(*mask.shape, 3) * mask[..., None]
    packing = Packing.of(mask)
    assert packing.pack(x).shape == (sum(LENGTHS), 3)
    assert torch.equal(packing.unpack(packing.pack(x)), x)
    twice = Packing.join((packing, packing))
    again = Packing.of(torch.cat([mask, mask]))
    assert torch.equal(twice.rows, again.rows)
    assert torch.equal(twice.segments.starts, again.segments.starts)
    assert torch.equal(twice.segments.lengths, again.segments.lengths)


def test_unfit_heads():
    config = ModelConfig(fusion=FusionConfig(width=96, heads=2))
    with pytest.raises(ValueError, match=r"kernels\.cross_attention=triton.*has 48"):
        Meter(config, kernels=KernelsConfig(cross_attention="triton"))


def layer_inputs(kernels: KernelsConfig, device: str) -> tuple:
    mask = torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    rows = torch.cat([torch.arange(n, device=device) + i * max(LENGTHS) for i, n in enumerate(LENGTHS)])
    side = Side.packed_text(Packing.of(mask, rows)) if kernels.text == "packed" else Side.padded_text(mask)
    text = torch.randn(*mask.shape, 64, device=device)
    image = torch.randn(len(LENGTHS), 10, 64, device=device, requires_grad=True)
    return side.lying(text).detach().requires_grad_(), image, side, Side.images(image)


FULLGRAPH = [
    PLAIN,
    KernelsConfig("triton", "direct", "packed", "triton", "triton", "triton"),
    KernelsConfig("triton", "absorbed", "padded", "triton", "triton", "triton"),
]


@pytest.mark.parametrize("kernels", FULLGRAPH, ids=str)
def test_layer_compiles_whole(kernels: KernelsConfig):
    """No graph break, forward and backward, dropout on; the values are those of the layer as it is."""
    layer = CoAttentionLayer(FusionConfig(width=64, layers=1, heads=2, dropout=0.1), kernels)
    inputs = layer_inputs(kernels, "cpu")
    for training in (False, True):
        layer.train(training)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        text, image = compiled(*inputs)
        (text.sum() + image.sum()).backward()
        if not training:
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip((text, image), layer(*inputs), strict=True))
    torch.compiler.reset()


@pytest.mark.slow
def test_layer_compiles_by_inductor():
    layer = CoAttentionLayer(FusionConfig(width=64, layers=1, heads=2, dropout=0.0), FULLGRAPH[1])
    inputs = layer_inputs(FULLGRAPH[1], "cpu")
    found = torch.compile(layer, fullgraph=True)(*inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, layer(*inputs), strict=True))


@pytest.mark.parametrize("kernels", FULLGRAPH, ids=str)
def test_layer_traces_for_a_gpu(kernels: KernelsConfig):
    """One graph from tensors that only say they are on a GPU. Forward: torch's autograd engine asks for the device."""
    with FakeTensorMode(), torch.device("cuda"):
        layer = CoAttentionLayer(FusionConfig(width=64, layers=1, heads=2, dropout=0.1), kernels)
        text, image, *sides = layer_inputs(kernels, "cuda")
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        found = compiled(text, image, *sides)
        for value, given in zip(found, (text, image), strict=True):
            assert (value.shape, value.dtype, value.device.type) == (given.shape, given.dtype, "cuda")
            assert value.requires_grad
    torch.compiler.reset()
