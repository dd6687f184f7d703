"""The direct cross-attention operator, interpreted, against a loop over the sequences in float64."""

from dataclasses import dataclass

import interpreter_bf16
import pytest
import torch
from golden_cases import relative
from meter_fast.kernels.cross_attention import kernel, op
from meter_fast.kernels.cross_attention.kernel import Config, fits
from meter_fast.kernels.cross_attention.op import cross_attention
from meter_fast.kernels.cross_attention.reference import ragged_attention, ragged_attention_backward
from meter_fast.kernels.dropout import STREAM_IMAGE_TO_TEXT, STREAM_TEXT_TO_IMAGE, draw_seed, keep_mask
from meter_fast.kernels.launch import Arch
from meter_fast.kernels.segments import Segments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

interpreter_bf16.install()

CPU = torch.device("cpu")
SEED = torch.tensor([0x1234_5678_9ABC])
SHORT = pytest.mark.parametrize("short", ["key", "query"])


@pytest.fixture(autouse=True)
def every_tile_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has no registers for 64 tokens in float32; the interpreter has, and float32 tells most about the maths."""
    monkeypatch.setattr(kernel, "TILE_BYTES", 64 * 128 * 4)


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    query_segments: Segments
    key_segments: Segments
    short: str

    def arguments(self, dropout: float = 0.0) -> tuple:
        sides = self.query_segments, self.key_segments
        return self.query, self.key, self.value, *sides, self.short, dropout, SEED if dropout else None


def padded(length: int, lengths: list[int]) -> Segments:
    return Segments.padded(len(lengths), length, CPU, torch.tensor(lengths))


def packed(lengths: list[int]) -> Segments:
    return Segments.packed(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


def inputs(
    short: str,
    image: Segments,
    text: Segments,
    heads: int = 1,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    sides = (image, text) if short == "key" else (text, image)
    # two rows more than the segments hold: padding behind the last one
    rows = [int((side.starts + side.lengths).max()) + 2 for side in sides]
    shapes = [(n, heads, head_size) for n in (rows[0], rows[1], rows[1])]
    tensors = [(spread * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]
    return Inputs(*tensors, *sides, short)


def outside(segments: Segments, rows: int) -> Tensor:
    """bool [rows], True for padding."""
    begin, end = segments.starts[:, None], (segments.starts + segments.lengths)[:, None]
    row = torch.arange(rows)
    return ~((row >= begin) & (row < end)).any(0)


def loop(query, key, value, query_segments, key_segments, short, dropout=0.0, seed=None) -> Tensor:
    """Sequence by sequence, head by head, from exponentials."""
    out = torch.zeros_like(query)
    heads, tables = query.shape[1], (query_segments.starts, query_segments.lengths, *vars(key_segments).values())
    stream = STREAM_IMAGE_TO_TEXT if short == "key" else STREAM_TEXT_TO_IMAGE
    for b, (q_start, n_q, k_start, n_k) in enumerate(zip(*(x.tolist() for x in tables[:4]), strict=True)):
        for h in range(heads if n_k else 0):
            q, k, v = query[q_start : q_start + n_q, h], key[k_start : k_start + n_k, h], value[k_start:, h][:n_k]
            weights = (q @ k.T / query.shape[2] ** 0.5).exp()
            weights = weights / weights.sum(1, keepdim=True)
            if dropout:
                image, text = (n_q, n_k) if short == "key" else (n_k, n_q)
                kept = keep_mask(seed, b * heads + h + 1, image, text, stream, dropout)[-1]
                weights = weights * (kept if short == "key" else kept.T) / (1 - dropout)
            out[q_start : q_start + n_q, h] += weights @ v
    return out


def results(form, given: Inputs, dropout: float = 0.0, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients of query, key and value; dtype: of the computation."""
    query, key, value, *rest = given.arguments(dropout)
    tensors = [x if dtype is None else x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    out = form(*tensors, *rest)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(query.dtype)
    return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def check(given: Inputs, dropout: float = 0.0, tolerance: float = 1e-6) -> None:
    found, golden = results(cross_attention, given, dropout), results(loop, given, dropout, torch.float64)
    sides = [given.query_segments] * 2 + [given.key_segments] * 2
    for name, x, exact, side in zip(("out", "query", "key", "value"), found, golden, sides, strict=True):
        assert x.is_contiguous() and x.dtype == given.query.dtype
        # one key: the gradients of query and key are zero up to rounding
        assert relative(x, exact) < tolerance or (x - exact).abs().max() < 4 * tolerance, name
        assert not x[outside(side, len(x))].any(), name


LENGTHS = [(1, 1), (8, 49), (13, 325), (16, 197), (17, 1), (32, 65), (33, 130), (50, 197), (64, 577), (13, 1297)]


@SHORT
@pytest.mark.parametrize(("text", "image"), LENGTHS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lengths(short: str, text: int, image: int, dropout: float) -> None:
    texts, images = [text, max(1, text // 2)], [image, max(1, image - 7)]
    check(inputs(short, padded(image, images), padded(text, texts)), dropout)


@SHORT
@pytest.mark.parametrize("head_size", [32, 128])
def test_head_sizes(short: str, head_size: int) -> None:
    check(inputs(short, padded(70, [70, 3]), padded(13, [1, 13]), heads=2, head_size=head_size), 0.1)


@SHORT
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_packed_text(short: str, dropout: float) -> None:
    check(inputs(short, padded(49, [49, 49, 49]), packed([5, 1, 20]), heads=2), dropout)


@SHORT
def test_empty_sequences_and_padding(short: str) -> None:
    """Pairs without text, without image, without both; rows before the first sequence and between two."""
    image = Segments(torch.tensor([3, 75, 100, 100]).int(), torch.tensor([70, 20, 0, 0]).int(), 70)
    text = Segments(torch.tensor([1, 6, 6, 200]).int(), torch.tensor([4, 0, 9, 0]).int(), 9)
    check(inputs(short, image, text), 0.1)


@SHORT
def test_no_pair(short: str) -> None:
    found = results(cross_attention, inputs(short, padded(9, [1]), padded(9, [1])))
    none = Segments(torch.empty(0).int(), torch.empty(0).int(), 9)
    rows = [x.detach().requires_grad_() for x in found[1:]]
    out = cross_attention(*rows, none, none, short)
    assert not out.any()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), rows))


@SHORT
def test_strides_and_offset(short: str) -> None:
    """Slices of packed projections, heads outside rows, a storage that begins at an odd place."""
    given = inputs(short, padded(70, [70, 31]), padded(13, [13, 1]), heads=2)
    rows, keys = len(given.query), len(given.key)
    key_value = torch.cat([given.key.flatten(1), given.value.flatten(1)], 1).detach()
    key, value = key_value.view(keys, 2, 2, 64).unbind(1)
    storage = torch.empty(rows * 128 + 3)
    query = storage[3:].view(2, rows, 64).transpose(0, 1).copy_(given.query.detach())
    assert not query.is_contiguous() and query.data_ptr() % 16 and not key.is_contiguous()
    views = [x.requires_grad_() for x in (query, key, value)]
    moved = Inputs(*views, *given.arguments()[3:6])
    for x, expected in zip(results(cross_attention, moved, 0.1), results(cross_attention, given, 0.1), strict=True):
        assert torch.equal(x, expected)


@SHORT
def test_gradient_of_any_layout(short: str) -> None:
    given = inputs(short, padded(20, [20, 3]), padded(5, [5, 1]))
    tensors = given.arguments()[:3]
    for grad in (torch.ones(()).expand(given.query.shape), torch.randn(64, 1, len(given.query)).permute(2, 1, 0)):
        found = torch.autograd.grad(cross_attention(*given.arguments()), tensors, grad)
        for x, exact in zip(found, torch.autograd.grad(loop(*given.arguments()), tensors, grad), strict=True):
            assert relative(x, exact) < 2e-6 or (x - exact).abs().max() < 1e-6


@SHORT
def test_float16(short: str) -> None:
    check(inputs(short, padded(90, [90, 65]), padded(17, [17, 8]), dtype=torch.float16), 0.1, 1e-3)


@SHORT
@pytest.mark.parametrize("text", [13, 50])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_bfloat16_is_as_near_as_the_plain_form(short: str, text: int, spread: float) -> None:
    given = inputs(short, padded(130, [130, 97]), padded(text, [text, 9]), dtype=torch.bfloat16, spread=spread)
    exact = results(loop, given, dtype=torch.float64)
    plain = results(ragged_attention, given)
    for name, x, usual, golden in zip("oqkv", results(cross_attention, given), plain, exact, strict=True):
        assert relative(x, golden) < 2 * relative(usual, golden), name
        assert relative(x, golden) < 2e-2, name


@SHORT
@pytest.mark.parametrize("block", [16, 32, 128])
def test_no_mask_depends_on_tiles(short: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that form the unit matrix show the mask itself."""
    given = inputs(short, padded(60, [60, 41]), padded(23, [23, 12]), heads=2)
    rows = torch.arange(len(given.key)) % given.key_segments.longest
    value = torch.eye(64)[rows][:, None].expand(given.value.shape).clone().requires_grad_()
    shown = Inputs(given.query, given.key, value, *given.arguments()[3:6])
    before = results(cross_attention, shown, 0.4)
    monkeypatch.setattr(kernel, "config", lambda *arguments: Config(block, 4, 2))
    after = results(cross_attention, shown, 0.4)
    assert torch.equal(before[0] == 0, after[0] == 0)
    assert torch.equal(before[0] == 0, loop(*shown.arguments(0.4)) == 0)
    for x, y in zip(before, after, strict=True):
        assert relative(x, y) < 2e-6


@SHORT
def test_gpus_agree(short: str) -> None:
    """The forms of the kernels for an A100 and for an H100."""
    given = inputs(short, padded(70, [70, 41]), padded(23, [23, 12]))
    arguments, found = given.arguments(0.1), []
    tensors, rest = [x.detach() for x in arguments[:3]], arguments[3:]
    for arch in (Arch(80), Arch(90)):
        saved = kernel.launch_forward(*tensors, *rest, arch)
        found.append([*saved, *kernel.launch_backward(saved[0].cos(), *tensors, *saved, *rest, arch)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y) or relative(x, y) < 1e-6


@SHORT
def test_dropout_draws_a_new_mask_each_time(short: str) -> None:
    given = inputs(short, padded(30, [30]), padded(9, [9]))
    arguments = given.arguments()[:6]
    torch.manual_seed(0)
    first, second = cross_attention(*arguments, 0.5), cross_attention(*arguments, 0.5)
    torch.manual_seed(0)
    assert torch.equal(cross_attention(*arguments, 0.5), first)
    assert not torch.equal(first, second)
    seed = draw_seed(CPU)
    assert torch.equal(cross_attention(*arguments, 0.5, seed), cross_attention(*arguments, 0.5, seed))


@SHORT
def test_longer_texts_take_the_plain_form(short: str) -> None:
    check(inputs(short, padded(20, [20, 3]), padded(70, [65, 70])), 0.1, 2e-6)


def test_which_texts_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert fits(64, 64, 2) and fits(32, 128, 2) and fits(32, 64, 4) and fits(16, 128, 4) and fits(64, 32, 4)
    assert not fits(65, 32, 2) and not fits(33, 128, 2) and not fits(33, 64, 4) and not fits(17, 128, 4)


@SHORT
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_plain_form_and_its_backward(short: str, dropout: float) -> None:
    """Without the interpreter a CPU computes in plain form."""
    given = inputs(short, padded(20, [20, 3, 7]), packed([5, 0, 11]), heads=2, head_size=4, dtype=torch.float64)
    golden = results(loop, given, dropout)
    out, *gradients = results(ragged_attention, given, dropout)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    by_hand = ragged_attention_backward(grad, *given.arguments(dropout))
    for exact, x, y in zip(golden, (out, *gradients), (out, *by_hand), strict=True):
        assert relative(x, exact) < 1e-14 and relative(y, exact) < 1e-14


@SHORT
def test_operator_without_interpreter(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "is_interpreted", lambda: False)
    monkeypatch.setattr(op, "launch_forward", None)
    check(inputs(short, padded(20, [20, 3]), padded(9, [5, 9])), 0.1)


@SHORT
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rules_of_operators(short: str, dropout: float) -> None:
    given = inputs(short, padded(20, [20, 3]), padded(9, [5, 9]))
    query, key, value, query_segments, key_segments, _, _, seed = given.arguments(dropout)
    tables = query_segments.starts, query_segments.lengths, key_segments.starts, key_segments.lengths
    options = *tables, query_segments.longest, key_segments.longest, short, dropout, seed
    torch.library.opcheck(op._forward, (query, key, value, *options), rtol=1e-4, atol=1e-5)
    saved = [x.detach() for x in op._forward(query, key, value, *options)]
    tensors = [x.detach() for x in (query, query, key, value)]
    torch.library.opcheck(op._backward, (*tensors, *saved, *options))


@SHORT
def test_compiles_as_one_graph(short: str) -> None:
    given = inputs(short, padded(20, [20, 3]), padded(9, [5, 9]))
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    for x, expected in zip(results(compiled, given, 0.1), results(cross_attention, given, 0.1), strict=True):
        assert torch.equal(x, expected)


@SHORT
def test_fake_cuda_tensors(short: str) -> None:
    with FakeTensorMode():
        sides = [Segments.padded(4, length, torch.device("cuda")) for length in (13, 325)]
        query_segments, key_segments = sides if short == "query" else sides[::-1]
        query, *keys = (
            torch.empty(4 * side.longest, 12, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for side in (query_segments, key_segments, key_segments)
        )
        out = cross_attention(query, *keys, query_segments, key_segments, short, 0.1)
        assert (out.shape, out.dtype, out.device.type) == (query.shape, torch.bfloat16, "cuda")
        # torch's autograd engine asks for a real device: the operator of backward is called by itself
        tables = query_segments.starts, query_segments.lengths, key_segments.starts, key_segments.lengths
        options = *tables, query_segments.longest, key_segments.longest, short, 0.1, torch.empty(1, dtype=torch.int64)
        for x, gradient in zip((query, *keys), op._backward(out, query, *keys, None, None, *options), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, x.dtype, x.device)


@SHORT
def test_activation_checkpointing_replays_the_mask(short: str) -> None:
    given = inputs(short, padded(20, [20, 3]), padded(9, [5, 9]))
    arguments, found = given.arguments()[:6], []
    for form in (cross_attention, lambda *x: checkpoint(cross_attention, *x, use_reentrant=False)):
        torch.manual_seed(3)
        out = form(*arguments, 0.5)
        torch.rand(7)  # the generator moves on before backward
        found.append(torch.autograd.grad(out.sin().sum(), arguments[:3]))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_bad_input() -> None:
    given = inputs("key", padded(20, [20, 3]), padded(9, [5, 9]), head_size=32)
    query, key, value, image, text, _, _, _ = given.arguments()
    one, wide = padded(9, [5]), Segments(text.starts.long(), text.lengths, 9)
    for arguments, message in [
        ((query, key, value, image, text, "text"), "short='text'"),
        ((query, key, value, image, text, "key", 1.0), "dropout=1.0"),
        ((query[0], key, value, image, text, "key"), "query is"),
        ((query, key[..., :16], value, image, text, "key"), "key is"),
        ((query, key, value[:-1], image, text, "key"), r"value \["),
        ((query, key, value.half(), image, text, "key"), "value is torch.float16"),
        ((query.double(), key.double(), value.double(), image, text, "key"), "query is torch.float64"),
        ((query[..., ::2], key[..., :16], value[..., :16], image, text, "key"), "query has strides"),
        ((query[..., :16], key[..., :16], value[..., :16], image, text, "key"), "head size 16"),
        ((query, key, value, image, one, "key"), "key_segments 1"),
        ((query, key, value, image, wide, "key"), "key_segments is torch.int64"),
        ((query, key, value, image, text, "key", 0.1, torch.tensor(3)), r"seed is torch.int64 \[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            cross_attention(*arguments)
