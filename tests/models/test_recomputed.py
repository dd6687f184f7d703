"""Activations and norms that are computed again: the same numbers, bit for bit, and fewer tensors that are kept."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from meter_fast.kernels.gelu.op import bias_gelu
from meter_fast.kernels.launch import is_interpreted
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from meter_fast.models.config import PARTS, DecoderConfig, tiny
from meter_fast.models.meter import Meter
from meter_fast.models.recomputed import RecomputedNorm, recomputable, recomputing

BIAS = torch.linspace(-1, 1, 16)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: recomputable(F.gelu(x), F.gelu, x),
    "bias": lambda x: recomputable(bias_gelu(x, BIAS), bias_gelu, x, BIAS),
    "norm": RecomputedNorm(16),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With two readers, of which one reads a view."""
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 4).to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    function = FUNCTIONS[name].to(dtype) if name == "norm" else FUNCTIONS[name]
    results, kept = [], []
    for on in (False, True):
        with recomputing(on):
            hidden = function(x * 2)
            place = StorageWeakRef(hidden.untyped_storage())
            out = linear(hidden).sum() + linear(hidden.flatten(0, -2)).sin().sum()
        del hidden
        kept.append(not place.expired())
        results.append((out, *torch.autograd.grad(out, (x, linear.weight, linear.bias))))
    assert kept == [True, name == "bias" and is_interpreted()]  # the interpreter holds on to what it was given last
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_may_be_gone_in_backward() -> None:
    """As ZeRO-3 takes them away between the passes; backward of the norm itself finds them again."""
    norm, linear, x = RecomputedNorm(8), nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    (expected,) = torch.autograd.grad(linear(norm(x)).sin().sum(), linear.weight)
    with recomputing():
        loss = linear(norm(x)).sin().sum()
    norm.weight.data = norm.bias.data = torch.empty(0)
    (found,) = torch.autograd.grad(loss, linear.weight)
    assert torch.equal(found, expected)


def test_what_is_kept_all_the_same() -> None:
    """Part of what was computed or another order of it, where autocast is on, under no scope, and where the inner scope
    of two is off."""
    x, linear = torch.randn(6, 16, requires_grad=True), nn.Linear(16, 4)

    def is_kept(use: Callable[[Tensor], Tensor]) -> bool:
        hidden = FUNCTIONS["gelu"](x)
        place, out = StorageWeakRef(hidden.untyped_storage()), use(hidden)
        del hidden
        return not place.expired() and out.requires_grad

    assert is_kept(linear)
    with recomputing():
        assert not is_kept(linear)
        assert is_kept(lambda hidden: hidden[1:] * hidden[:-1])
        assert is_kept(lambda hidden: hidden.t() * hidden.t())
        with torch.autocast("cpu", torch.bfloat16):
            assert is_kept(lambda hidden: hidden * hidden)
    with torch.no_grad(), recomputing():
        assert not linear(FUNCTIONS["gelu"](x)).requires_grad
    with recomputing(False):
        assert is_kept(linear)


def test_another_tensor_in_the_same_place() -> None:
    """Of the same size, after the first one is gone: it is kept as it is."""
    x, linear = torch.randn(64, 64, requires_grad=True), nn.Linear(64, 64)
    with recomputing():
        for _ in range(20):
            hidden = recomputable(F.gelu(x), F.gelu, x)
            del hidden
            other = x * 3
            out = linear(other)
            del other
            (found,) = torch.autograd.grad(out.sum(), linear.weight)
            torch.testing.assert_close(found, (3 * x).sum(0).expand_as(found))


EACH = {"vision", "fusion", "decoder"}


@pytest.mark.parametrize("part", sorted(EACH))
def test_checkpointing_and_compilers_turn_it_off(part: str) -> None:
    """What a model under training computes again, by part: the parts that are no checkpoints."""
    model = Meter(replace(tiny(), decoder=DecoderConfig(layers=1)), load_weights=False).train()
    assert recomputed(model) == EACH
    model.set_activation_checkpointing(True)
    assert recomputed(model) == set()
    model.set_activation_checkpointing(True, (part,))
    assert recomputed(model) == EACH - {part}
    model.set_activation_checkpointing(False)
    assert recomputed(model) == EACH
    model.keep_activations()
    assert recomputed(model) == set()


def recomputed(model: Meter) -> set[str]:
    """Parts of the model with norms that run again in backward, though they are called in forward alone."""
    parts = {module: part for part in PARTS for module in (getattr(model, part) or nn.Module()).modules()}
    found: set[str] = set()
    again = RecomputedNorm._again

    def watched(norm: RecomputedNorm, *inputs: Tensor) -> Tensor:
        found.add(parts[norm])
        return again(norm, *inputs)

    side, mask = model.config.vision.image_size, torch.ones(2, 5, dtype=torch.bool)
    RecomputedNorm._again = watched
    try:
        text, image = model.encode_text(torch.full((2, 5), 7), mask), model.encode_image(torch.randn(2, 3, side, side))
        written = model.decode(torch.full((2, 3), 7), text, image, mask, None)
        (written.sum() + model.fuse(text, image, mask).cls.sum()).backward()
    finally:
        RecomputedNorm._again = again
    return found
