"""Blocks of vision transformers against timm's, and what a step of them keeps."""

from functools import partial

import pytest
import torch
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from meter_fast.models.activated_linear import GELU
from meter_fast.models.attention_layer import SelfAttention
from meter_fast.models.recomputed import RecomputedNorm, recomputing
from meter_fast.models.vision_block import Block, Mlp

COMMON = {"dim": 32, "num_heads": 4, "qkv_bias": True, "attn_layer": SelfAttention}


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}, {"drop_path": 0.5}])
@pytest.mark.parametrize("autocast", [False, True])
def test_same_as_timm(options: dict[str, float], autocast: bool) -> None:
    """To rounding, with layer scale and stochastic depth, and where autocast makes parts narrower than their sum."""
    theirs = TimmBlock(**COMMON, **options, mlp_layer=TimmMlp)
    ours = Block(**COMMON, **options, mlp_layer=partial(Mlp, activation=GELU))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 9, 32, requires_grad=True)
    results = []
    for block in (theirs, ours):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(x)
        parameters = [parameter for _, parameter in sorted(block.named_parameters())]
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), (x, *parameters))))
        assert out.dtype == torch.float32
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_a_step_keeps_less() -> None:
    """Of a norm's output and of the sums' summands nothing, of the network its widest tensor once."""
    block = Block(**COMMON, mlp_layer=partial(Mlp, activation=GELU), norm_layer=RecomputedNorm)
    made: dict[str, StorageWeakRef] = {}
    for name in ("norm1", "norm2", "mlp.fc1", "attn", "mlp"):

        def note(_module: nn.Module, _inputs: object, out: torch.Tensor, name: str = name) -> None:
            made[name] = StorageWeakRef(out.untyped_storage())

        block.get_submodule(name).register_forward_hook(note)
    x = torch.randn(2, 9, 32, requires_grad=True)
    with recomputing():
        out = block(x)
    gone = {name: place.expired() for name, place in made.items()}
    assert gone == {"norm1": True, "norm2": True, "mlp.fc1": False, "attn": False, "mlp": False}
    assert made["mlp"] == StorageWeakRef(out.untyped_storage())  # the sum is written over the summand
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"drop": 0.1}, {"norm_layer": nn.LayerNorm}])
def test_what_the_network_does_not_have(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Mlp(8, 32, GELU, **options)
