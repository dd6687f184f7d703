"""Activations that are computed again: the same numbers, bit for bit, and fewer tensors that are kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from meter_fast.models.config import tiny
from meter_fast.models.meter import Meter
from meter_fast.models.recomputed import RecomputedMlp, activated
from meter_fast.models.vision import QuickGELU


def kept_bytes(work) -> tuple[Tensor, int]:
    """The result of `work` and the bytes of the tensors that autograd keeps for it, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return result, sum(kept.values())


@pytest.mark.parametrize("activation", [F.gelu, QuickGELU()], ids=["gelu", "quick"])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_same_bits(activation, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 4), torch.randn(shape, requires_grad=True)
    results = []
    for keep in (True, False):
        out = activated(linear, activation, x * 2, keep)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, linear.weight, linear.bias))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_activation_is_not_kept() -> None:
    """Live tensors after the forward pass, as hooks of ours stand between those of a test and autograd."""
    linear = nn.Linear(64, 4)
    x = torch.randn(1000, 64, requires_grad=True)
    made: list = []

    def activation(up: Tensor) -> Tensor:
        hidden = F.gelu(up)
        made.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden

    out = activated(linear, activation, x, keep=False)
    assert made[0].expired()
    out.sum().backward()
    assert len(made) == 2  # and made again
    kept = activated(linear, activation, x, keep=True)
    assert not made[2].expired() and kept.requires_grad


def test_quick_gelu_keeps_its_input_alone() -> None:
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    out, kept = kept_bytes(lambda: QuickGELU()(x))
    assert kept == 8 * 100
    plain = x * torch.sigmoid(1.702 * x)
    assert torch.allclose(out, plain, rtol=1e-14)
    (ours,), (theirs,) = (torch.autograd.grad(y.sin().sum(), x) for y in (out, plain))
    assert torch.allclose(ours, theirs, rtol=1e-13)


def test_a_checkpoint_holds_nothing_of_its_block() -> None:
    """With `keep`, as a model under checkpointing sets it."""
    mlp, refs = RecomputedMlp(8, 32), []
    mlp.keep_activation = True
    mlp.fc1.register_forward_hook(lambda module, inputs, out: refs.append(StorageWeakRef(out.untyped_storage())))
    x = torch.randn(10, 8, requires_grad=True)
    out = checkpoint(mlp, x, use_reentrant=False)
    assert refs[0].expired()
    out.sum().backward()


def test_checkpointing_turns_it_off_and_on() -> None:
    model = Meter(tiny(), load_weights=False)
    feeds = [m for m in model.modules() if hasattr(m, "keep_activation")]
    assert {type(m).__name__ for m in feeds} == {"FeedForward", "RecomputedMlp"}
    model.set_activation_checkpointing(True)
    assert all(m.keep_activation for m in feeds)
    model.set_activation_checkpointing(True, ("vision",))
    assert [type(m).__name__ for m in feeds if m.keep_activation] == ["RecomputedMlp"] * len(model.vision.blocks)
    model.set_activation_checkpointing(False)
    assert not any(m.keep_activation for m in feeds)
