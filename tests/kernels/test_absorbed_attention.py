"""Absorbed cross-attention against the plain layer in float64: outputs, every gradient, dropout, and torch's tools."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import relative
from interpreter_bf16 import install
from meter_fast.kernels.cross_attention import absorbed
from meter_fast.kernels.cross_attention.absorbed import absorbed_cross_attention, absorbed_pays
from meter_fast.kernels.dropout import STREAM_IMAGE_TO_TEXT, STREAM_TEXT_TO_IMAGE, keep_mask
from meter_fast.kernels.launch import Arch
from meter_fast.kernels.segmented_softmax import op
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

NAMES = ["x", "other", "query_weight", "query_bias", "key_value_weight", "key_value_bias", "out_weight", "out_bias"]
DIRECTION = pytest.mark.parametrize("text_is", ["query", "key"])
DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.1])
SEED = torch.tensor([2**40 + 17])


@pytest.fixture(autouse=True)
def bf16() -> None:
    install()


class Layer:
    """A layer's inputs and parameters, and what it makes of them."""

    def __init__(self, text_is: str, text: int, image: int = 21, heads: int = 2, width: int = 32) -> None:
        torch.manual_seed(text + image)
        self.text_is, self.heads = text_is, heads
        self.lengths = torch.tensor([text, 1, (text + 1) // 2], dtype=torch.int32)
        self.exists = torch.arange(text) < self.lengths[:, None]
        sides = [torch.randn(3, tokens, width) for tokens in (text, image)]
        shapes = [(width, width), (width,), (2 * width, width), (2 * width,), (width, width), (width,)]
        parameters = [torch.randn(shape) * (2 / width**0.5 if len(shape) == 2 else 0.5) for shape in shapes]
        self.leaves = [*(sides if text_is == "query" else sides[::-1]), *parameters]
        self.gradient = torch.randn(self.leaves[0].shape)
        if text_is == "query":
            self.gradient *= self.exists[..., None]

    def results(self, form, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
        out = form(*leaves[:2], self.lengths, *leaves[2:], self.heads, self.text_is, dropout, SEED)
        gradients = torch.autograd.grad(out, leaves, self.gradient.to(dtype))
        if self.text_is == "query":
            out = out * self.exists[..., None]
        return {"out": out, **dict(zip(NAMES, gradients, strict=True))}


def plain(
    x, other, lengths, query_weight, query_bias, key_value_weight, key_value_bias, out_weight, out_bias, *options
) -> Tensor:
    """The layer as METER has it; weights are dropped by the mask in plain form."""
    heads, text_is, dropout, seed = options
    pairs, _, width = x.shape

    def split(y: Tensor) -> Tensor:
        return y.view(pairs, -1, heads, width // heads).transpose(1, 2)

    query = split(F.linear(x, query_weight, query_bias))
    key, value = map(split, F.linear(other, key_value_weight, key_value_bias).chunk(2, dim=-1))
    scores = query @ key.transpose(2, 3) / (width // heads) ** 0.5
    text, image = (x, other) if text_is == "query" else (other, x)
    if text_is == "key":
        missing = torch.arange(text.shape[1]) >= lengths[:, None]
        scores = scores.masked_fill(missing[:, None, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        stream = STREAM_TEXT_TO_IMAGE if text_is == "query" else STREAM_IMAGE_TO_TEXT
        kept = keep_mask(seed, pairs * heads, image.shape[1], text.shape[1], stream, dropout)
        kept = kept.view(pairs, heads, image.shape[1], text.shape[1])
        weights = weights * (kept.transpose(2, 3) if text_is == "query" else kept) / (1 - dropout)
    return F.linear((weights @ value).transpose(1, 2).flatten(2), out_weight, out_bias)


def check(layer: Layer, dropout: float, dtype: torch.dtype, tolerance: float) -> None:
    golden = layer.results(plain, dropout, torch.float64)
    largest = max(x.norm() for x in golden.values())
    for name, x in layer.results(absorbed_cross_attention, dropout, dtype).items():
        # a softmax over one value: some gradients are zero but for the rounding of others
        scale = golden[name].norm().clamp_min(largest / 10)
        assert (x.double() - golden[name]).norm() < tolerance * scale, name


@DIRECTION
@DROPOUT
@pytest.mark.parametrize("text", [1, 8, 13, 16, 17, 32])
def test_equals_the_plain_layer(text_is: str, text: int, dropout: float) -> None:
    layer = Layer(text_is, text)
    check(layer, dropout, torch.float64, 1e-10)
    check(layer, dropout, torch.float32, 1e-5)


@DIRECTION
@DROPOUT
@pytest.mark.parametrize(("text", "image"), [(13, 21), (50, 7), (3, 1)])
def test_on_a_cpu_without_triton(
    text_is: str, text: int, image: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "is_interpreted", lambda: False)
    layer = Layer(text_is, text, image, heads=3, width=24)
    check(layer, dropout, torch.float64, 1e-10)
    check(layer, dropout, torch.float32, 1e-5)


@DROPOUT
def test_key_bias_has_no_gradient(dropout: float) -> None:
    gradient = Layer("query", 13).results(absorbed_cross_attention, dropout)["key_value_bias"]
    assert not gradient[:32].any()
    assert (gradient[32:] != 0).all()


@DIRECTION
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_the_plain_layer(
    text_is: str, dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "is_interpreted", lambda: kernel)
    layer = Layer(text_is, 13, image=60, heads=2, width=64)
    layer.leaves = [x.to(dtype).float() for x in layer.leaves]
    golden, usual = layer.results(plain, 0.0, torch.float64), layer.results(plain, 0.0, dtype)
    for name, x in layer.results(absorbed_cross_attention, 0.0, dtype).items():
        assert x.dtype == dtype
        assert relative(x, golden[name]) < 2 * relative(usual[name], golden[name]) + 1e-3, name


def test_text_that_is_not_there_gets_the_bias() -> None:
    layer = Layer("query", 9)
    x, other, *parameters = layer.leaves
    out = absorbed_cross_attention(x, other, layer.lengths, *parameters, 2, "query")
    assert torch.equal(out[~layer.exists], parameters[-1].expand_as(out)[~layer.exists])


@DIRECTION
def test_text_that_is_not_there_has_no_influence(text_is: str) -> None:
    layer = Layer(text_is, 9)
    before = layer.results(absorbed_cross_attention)
    side = 0 if text_is == "query" else 1
    layer.leaves[side] = torch.where(layer.exists[..., None], layer.leaves[side].detach(), 1e3)
    after = layer.results(absorbed_cross_attention)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert not after["x" if text_is == "query" else "other"][~layer.exists].any()


@DIRECTION
@DROPOUT
def test_padding_of_the_text_changes_nothing(text_is: str, dropout: float) -> None:
    """As it is padded on a GPU."""
    layer = Layer(text_is, 13)

    def padded(x: Tensor, other: Tensor, *rest) -> Tensor:
        if text_is == "key":
            return absorbed_cross_attention(x, F.pad(other, (0, 0, 0, 3)), *rest)
        return absorbed_cross_attention(F.pad(x, (0, 0, 0, 3)), other, *rest)[:, :13]

    golden = layer.results(absorbed_cross_attention, dropout)
    for name, x in layer.results(padded, dropout).items():
        assert relative(x, golden[name]) < 1e-5, name


@DIRECTION
def test_empty_text_and_one_image_token(text_is: str) -> None:
    layer = Layer(text_is, 5, image=1)
    layer.lengths[1] = 0
    layer.exists[1] = False
    for name, x in layer.results(absorbed_cross_attention, 0.1).items():
        assert torch.isfinite(x).all(), name


@DIRECTION
def test_strides_and_gradient_of_any_layout(text_is: str) -> None:
    layer = Layer(text_is, 7)
    golden = layer.results(absorbed_cross_attention)
    for i, x in enumerate(layer.leaves[:2]):
        memory = torch.zeros(x.shape[1] + 1, 3, x.shape[2] + 3)
        memory[1:, :, 3:] = x.transpose(0, 1)
        layer.leaves[i] = memory[1:, :, 3:].transpose(0, 1)
    layer.gradient = layer.gradient.transpose(1, 2).contiguous().transpose(1, 2)
    for name, x in layer.results(absorbed_cross_attention).items():
        assert relative(x, golden[name]) < 1e-5, name


@DIRECTION
@DROPOUT
def test_rules_of_operators(text_is: str, dropout: float) -> None:
    layer = Layer(text_is, 4, image=5, width=8)
    seed = SEED if dropout else None
    x, other, *weights = (leaf.requires_grad_() for leaf in layer.leaves)
    query_weight, query_bias, key_value_weight, key_value_bias, out_weight, _ = weights
    if text_is == "query":
        forward, backward = absorbed._text_reads_image, absorbed._text_reads_image_backward
        inputs = x, other, key_value_weight, key_value_bias
    else:
        forward, backward = absorbed._image_reads_text, absorbed._image_reads_text_backward
        inputs = torch.randn(3, 4, 16, requires_grad=True), x, query_weight, query_bias, out_weight
    torch.library.opcheck(forward, (*inputs, layer.lengths, seed, 2, dropout), rtol=1e-4, atol=1e-5)
    saved = [x.detach() for x in forward(*inputs, layer.lengths, seed, 2, dropout)]
    inputs = [x.detach() for x in inputs]
    saved = saved if text_is == "query" else saved[1:]
    torch.library.opcheck(backward, (layer.gradient, *inputs, seed, *saved, dropout))


@DIRECTION
def test_compiles_as_one_graph(text_is: str) -> None:
    layer = Layer(text_is, 8)
    compiled = torch.compile(absorbed_cross_attention, fullgraph=True, backend="aot_eager")
    golden = layer.results(absorbed_cross_attention, 0.1)
    for name, x in layer.results(compiled, 0.1).items():
        assert relative(x, golden[name]) < 1e-6, name


@DIRECTION
def test_autocast(text_is: str) -> None:
    layer = Layer(text_is, 13)
    golden = layer.results(plain, 0.0, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.requires_grad_() for x in layer.leaves]
        out = absorbed_cross_attention(*leaves[:2], layer.lengths, *leaves[2:], 2, text_is)
    assert out.dtype == torch.bfloat16
    out.backward(layer.gradient.bfloat16())
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative(leaf.grad, golden[name]) < 5e-2, name


@DIRECTION
def test_fake_cuda_tensors(text_is: str) -> None:
    with FakeTensorMode():
        sides = [torch.empty(4, n, 768, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (13, 325)]
        x, other = sides if text_is == "query" else sides[::-1]
        shapes = (768, 768), (768,), (1536, 768), (1536,), (768, 768), (768,)
        weights = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        lengths = torch.empty(4, dtype=torch.int32, device="cuda")
        out = absorbed_cross_attention(x, other, lengths, *weights, 12, text_is, 0.1)
        assert (out.shape, out.dtype, out.device.type) == (x.shape, torch.bfloat16, "cuda")


@DIRECTION
def test_activation_checkpointing_replays_the_mask(text_is: str) -> None:
    layer, gradients = Layer(text_is, 9), []
    x, other, *parameters = (leaf.requires_grad_() for leaf in layer.leaves)
    for form in (
        absorbed_cross_attention,
        lambda *arguments: checkpoint(absorbed_cross_attention, *arguments, use_reentrant=False),
    ):
        torch.manual_seed(3)
        out = form(x, other, layer.lengths, *parameters, 2, text_is, 0.5)
        torch.rand(7)  # the generator moves on before backward
        gradients.append(torch.autograd.grad(out.sin().sum(), [x, other, *parameters]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bad_input() -> None:
    layer = Layer("query", 6)
    good = [*layer.leaves[:2], layer.lengths, *layer.leaves[2:], 2, "query", 0.0]
    for place, wrong, message in [
        (0, layer.leaves[0][0], "x: shape"),
        (1, layer.leaves[1][:, :, :16], "other: shape"),
        (1, layer.leaves[1][:2], "other: shape"),
        (2, layer.lengths.long(), "text_lengths: torch.int64"),
        (3, layer.leaves[2][:16], "query_weight: shape"),
        (5, layer.leaves[4][:32], "key_value_weight: shape"),
        (7, layer.leaves[6][:, :16], "out_weight: shape"),
        (9, 3, "heads=3"),
        (10, "text", "text_is='text'"),
        (11, 1.0, "dropout=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            absorbed_cross_attention(*good[:place], wrong, *good[place + 1 :])


A100, H100 = Arch(80), Arch(90)


def test_where_it_pays() -> None:
    def base(text: int, arch: Arch | None, image: int = 325) -> bool:
        return absorbed_pays(text, image, 12, 768, arch)

    assert [base(text, A100) for text in (1, 13, 16, 32, 33, 50, 64)] == [True] * 4 + [False] * 3
    assert [base(text, H100) for text in (1, 13, 16, 17, 32)] == [True] * 3 + [False] * 2
    assert [base(text, None) for text in (1, 13, 26, 32, 50)] == [True] * 3 + [False] * 2
    assert not absorbed_pays(8, 65, 4, 128, None)
    assert not base(13, A100, image=1)  # one image row: folding costs more than projecting it
    assert not absorbed_pays(13, 325, 12, 128, A100)  # narrower than the folded rows are many
