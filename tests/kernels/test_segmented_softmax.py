"""The segmented softmax: its kernel and its plain form against exponentials in float64, and torch's tools."""

import pytest
import torch
from golden_cases import relative
from interpreter_bf16 import install
from meter_fast.kernels.dropout import STREAM_IMAGE_TO_TEXT, STREAM_TEXT_TO_IMAGE, keep_mask
from meter_fast.kernels.segmented_softmax import kernel, op, reference
from meter_fast.kernels.segmented_softmax.op import segmented_softmax
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

SCALE = 0.3
DIRECTION = pytest.mark.parametrize("text_is", ["key", "query"])
DROPOUT = pytest.mark.parametrize("dropout", [0.0, 0.1])


@pytest.fixture(autouse=True)
def bf16() -> None:
    install()


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(op, "is_interpreted", lambda: request.param == "kernel")
    return request.param


FORMS = pytest.mark.parametrize("form", ["kernel", "plain"], indirect=True)


def inputs(
    image: int, text: int, heads: int = 3, dtype: torch.dtype = torch.float32, pairs: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """scores and bias (leaves), lengths: the full one, 1 and one between."""
    torch.manual_seed(image + text)
    scores = (4 * torch.randn(pairs, image, text, heads)).to(dtype).requires_grad_()
    bias = torch.randn(pairs, text, heads).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return scores, bias, torch.tensor([text, 1, (text + 1) // 2][:pairs], dtype=torch.int32)


def exponentials(
    scores: Tensor, lengths: Tensor, text_is: str, bias: Tensor, dropout: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """In float64, pair by pair and without anything that is not there."""
    pairs, image, text, heads = scores.shape
    out = torch.zeros(scores.shape, dtype=torch.float64)
    stream = STREAM_IMAGE_TO_TEXT if text_is == "key" else STREAM_TEXT_TO_IMAGE
    kept = keep_mask(seed, pairs * heads, image, text, stream, dropout) if dropout else None
    for b, length in enumerate(lengths.tolist()):
        for h in range(heads):
            x = (SCALE * (scores[b, :, :length, h].double() + bias[b, :length, h].double())).exp()
            x = x / x.sum(1 if text_is == "key" else 0, keepdim=True)
            if kept is not None:
                x = x * kept[b * heads + h, :, :length] / (1 - dropout)
            out[b, :, :length, h] = x
    return out


def results(form, scores: Tensor, bias: Tensor, *arguments) -> list[Tensor]:
    out = form(scores, bias, *arguments)
    weights = torch.arange(out.numel()).view_as(out).mul(0.7).sin()
    return [out, *torch.autograd.grad((out * weights).sum(), (scores, bias))]


def found(scores: Tensor, bias: Tensor, lengths: Tensor, text_is: str, *dropout) -> list[Tensor]:
    return results(lambda s, b: segmented_softmax(s, lengths, text_is, SCALE, b, *dropout), scores, bias)


def expected(scores: Tensor, bias: Tensor, lengths: Tensor, text_is: str, *dropout) -> list[Tensor]:
    leaves = [x.detach().double().requires_grad_() for x in (scores, bias)]
    return results(lambda s, b: exponentials(s, lengths, text_is, b, *dropout), *leaves)


def check(given: tuple[Tensor, ...], text_is: str, tolerance: float, *dropout) -> None:
    for name, x, golden in zip(
        ("out", "scores", "bias"), found(*given, text_is, *dropout), expected(*given, text_is, *dropout), strict=True
    ):
        if name == "bias" and text_is == "query":  # it moves all scores of a segment: zero but for rounding
            assert x.abs().max() < 10 * tolerance
        elif golden.abs().max() < 1e-9:  # a softmax over one value
            assert x.abs().max() < tolerance
        else:
            assert relative(x, golden) < tolerance, name


@DIRECTION
@FORMS
@DROPOUT
@pytest.mark.parametrize(("image", "text"), [(1, 1), (7, 8), (70, 13), (49, 16), (21, 17), (9, 33), (5, 50), (129, 4)])
def test_equals_exponentials(text_is: str, form: str, image: int, text: int, dropout: float) -> None:
    given = inputs(image, text)
    check(given, text_is, 1e-6, dropout, torch.tensor([77]))
    wide = tuple(x.detach().double().requires_grad_() for x in given[:2])
    check((*wide, given[2]), text_is, 1e-12, dropout, torch.tensor([77]))


@DIRECTION
@FORMS
@DROPOUT
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)], ids=["fp16", "bf16"])
def test_half_precision(text_is: str, form: str, dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    scores, bias, lengths = inputs(37, 13, heads=4, dtype=dtype)
    probabilities, *_ = found(scores, bias, lengths, text_is, dropout, torch.tensor([5]))
    assert probabilities.dtype == dtype
    check((scores, bias, lengths), text_is, tolerance, dropout, torch.tensor([5]))


@DIRECTION
@FORMS
def test_large_scores_without_bias(text_is: str, form: str) -> None:
    scores, bias, lengths = inputs(19, 9)
    scores = 1000 * scores.detach()
    top = torch.where(torch.arange(9)[:, None] < lengths[:, None, None, None], scores, -torch.inf)
    golden = exponentials(scores - top.amax((1, 2), keepdim=True), lengths, text_is, 0 * bias)
    out = segmented_softmax(scores, lengths, text_is, SCALE)
    known = golden.isfinite()  # the exponentials alone lose a segment that lies far below the top
    assert known.float().mean() > 0.05
    assert relative(out[known], golden[known]) < 1e-4
    assert torch.isfinite(out).all()


@DIRECTION
@FORMS
def test_empty_text_gives_zeros(text_is: str, form: str) -> None:
    scores, bias, _ = inputs(5, 6, pairs=2)
    out, *gradients = found(scores, bias, torch.tensor([0, 6], dtype=torch.int32), text_is, 0.1, torch.tensor([1]))
    for x in (out, *gradients):
        assert torch.isfinite(x).all()
        assert not x[0].any()
    assert out[1].any()


@DIRECTION
@FORMS
@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)], ids=str)
def test_nothing_to_do(text_is: str, form: str, shape: tuple[int, ...]) -> None:
    scores = torch.zeros(shape, requires_grad=True)
    lengths = torch.zeros(shape[0], dtype=torch.int32)
    out = segmented_softmax(scores, lengths, text_is, SCALE)
    out.sum().backward()
    assert out.shape == scores.grad.shape == shape


@DIRECTION
def test_missing_tokens_are_not_read(text_is: str) -> None:
    scores, bias, lengths = inputs(11, 9)
    out = segmented_softmax(scores, lengths, text_is, SCALE, bias)
    with torch.no_grad():
        for b, length in enumerate(lengths.tolist()):
            scores[b, :, length:] = float("nan")
    assert torch.equal(segmented_softmax(scores, lengths, text_is, SCALE, bias), out)


@DIRECTION
def test_strides_and_offset(text_is: str) -> None:
    scores, bias, lengths = inputs(11, 8)
    memory = torch.full((3, 8, 3, 25), float("nan"))
    view = memory[..., 1:23:2].permute(0, 3, 1, 2)
    view.copy_(scores.detach())
    check((view.requires_grad_(), bias, lengths), text_is, 1e-6)


@pytest.mark.parametrize(
    ("text_is", "rows", "tokens"), [("key", 16, 32), ("key", 256, 32), ("query", 256, 32), ("query", 64, 4)]
)
def test_no_number_depends_on_tiles(text_is: str, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(40, 21)
    before = found(*given, text_is, 0.3, torch.tensor([9]))
    monkeypatch.setattr(kernel, "config", lambda *arguments: {"M": rows, "N": tokens, "num_warps": 1})
    after = found(*given, text_is, 0.3, torch.tensor([9]))
    assert torch.equal(before[0] == 0, after[0] == 0)
    for x, y in zip(before[:2], after[:2], strict=True):
        assert relative(x, y) < 1e-6


@DIRECTION
def test_dropout_draws_a_new_mask_each_time(text_is: str) -> None:
    scores, _, lengths = inputs(40, 16)
    arguments = scores, lengths, text_is, SCALE, None, 0.5
    torch.manual_seed(0)
    first, second = segmented_softmax(*arguments), segmented_softmax(*arguments)
    torch.manual_seed(0)
    assert torch.equal(segmented_softmax(*arguments), first)
    assert not torch.equal(first, second)
    assert abs((first[0] > 0).float().mean() - 0.5) < 5 * 0.5 / first[0].numel() ** 0.5


@DIRECTION
def test_activation_checkpointing_replays_the_mask(text_is: str) -> None:
    scores, bias, lengths = inputs(10, 9)
    gradients = []
    for form in (segmented_softmax, lambda *x: checkpoint(segmented_softmax, *x, use_reentrant=False)):
        torch.manual_seed(3)
        out = form(scores, lengths, text_is, SCALE, bias, 0.5)
        torch.rand(7)  # the generator moves on before backward
        gradients.append(torch.autograd.grad(out.sin().sum(), scores)[0])
    assert torch.equal(*gradients)


@DIRECTION
@DROPOUT
def test_gradient_of_the_plain_form(text_is: str, dropout: float) -> None:
    scores, bias, lengths = inputs(4, 5, heads=2, dtype=torch.float64)
    seed = torch.tensor([4])

    def plain(scores: Tensor, bias: Tensor) -> Tensor:
        return reference.forward(scores, lengths, text_is, SCALE, bias, dropout, seed)[1]

    assert torch.autograd.gradcheck(plain, (scores, bias))


@DIRECTION
@DROPOUT
def test_rules_of_operators(text_is: str, dropout: float) -> None:
    scores, bias, lengths = inputs(5, 6)
    seed = torch.tensor([3]) if dropout else None
    torch.library.opcheck(op._segmented_softmax, (scores, lengths, bias, seed, text_is, SCALE, dropout))
    probabilities = op._segmented_softmax(scores, lengths, bias, seed, text_is, SCALE, dropout)[0].detach()
    arguments = probabilities, scores.detach(), seed, text_is, SCALE, dropout
    torch.library.opcheck(op._segmented_softmax_backward, arguments)


@DIRECTION
def test_compiles_as_one_graph(text_is: str) -> None:
    scores, bias, lengths = inputs(5, 6)
    seed = torch.tensor([3])
    compiled = torch.compile(segmented_softmax, fullgraph=True, backend="aot_eager")
    out = [
        results(lambda s, b, form=form: form(s, lengths, text_is, SCALE, b, 0.1, seed), scores, bias)
        for form in (compiled, segmented_softmax)
    ]
    assert all(torch.equal(x, golden) for x, golden in zip(*out, strict=True))


@DIRECTION
def test_fake_cuda_tensors(text_is: str) -> None:
    with FakeTensorMode():
        scores = torch.empty(4, 325, 16, 12, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        lengths = torch.empty(4, dtype=torch.int32, device="cuda")
        out = segmented_softmax(scores, lengths, text_is, SCALE, None, 0.1)
        assert (out.shape, out.dtype, out.device.type) == (scores.shape, torch.bfloat16, "cuda")


@DIRECTION
def test_autocast_leaves_it_alone(text_is: str) -> None:
    scores, bias, lengths = inputs(5, 6)
    golden = found(scores, bias, lengths, text_is)
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(found(scores, bias, lengths, text_is), golden, strict=True):
            assert torch.equal(x, y)


def test_bad_input() -> None:
    scores, bias, lengths = inputs(5, 6)
    for arguments, message in [
        ((scores[0], lengths, "key", SCALE), r"scores: .* \[B,V,T,H\]"),
        ((scores.long(), lengths, "key", SCALE), "scores: torch.int64"),
        ((scores, lengths.long(), "key", SCALE), r"text_lengths: torch.int64 .* int32 \[3\]"),
        ((scores, lengths[:2], "key", SCALE), "text_lengths: "),
        ((scores, lengths, "image", SCALE), "text_is='image'"),
        ((scores, lengths, "key", SCALE, bias[:, :2]), "bias: shape"),
        ((scores, lengths, "key", SCALE, bias, 1.0), "dropout=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            segmented_softmax(*arguments)
