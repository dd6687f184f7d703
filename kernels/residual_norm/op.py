"""LayerNorm(residual + dropout(x + bias)): the operator.

It moves 8 bytes per bfloat16 value forward (6 without gradients) and as many backward (6 without dropout), and the
backward sums the gradients of bias, weight and shift on the way. Shape letters: N rows, D width.
"""

import torch
from torch import Tensor

from ..dropout import draw_seed, threshold
from ..launch import arch_of, autocasts, is_interpreted
from . import kernel, reference

MAX_WIDTH = 2048


def residual_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) [..., D], contiguous, in x's dtype.

    x, residual [..., D], one shape and one dtype of float32, float16, bfloat16 (under autocast both are cast to its
    dtype); bias (of the linear layer before, or None), weight, shift [D], floating, in any dtype. D is a multiple of 8
    up to 2048. Rows that no single stride describes are copied. dropout: share of values dropped, a constant in the
    compiled kernel; seed int64 [1], by default drawn from torch's generator. Which values are dropped depends on seed,
    row and column alone (see `kernels/dropout.py`). Statistics and sums are float32; gradients come in the dtypes of
    what they belong to. Raises ValueError for anything else.
    """
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, residual = x.to(dtype), residual.to(dtype)
    _check(x, bias, residual, weight, shift)
    if threshold(dropout) == 0:
        dropout, seed = 0.0, None
    elif seed is None:
        seed = draw_seed(x.device)
    leaves = (x, residual, weight, shift) if bias is None else (x, residual, weight, shift, bias)
    save = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    return _forward(x, bias, residual, weight, shift, eps, dropout, seed, save)[0]


@torch.library.custom_op("meter_fast::residual_norm_forward", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, normalised [N,D], rstd [N]); without `save` the last two are [0]."""
    inputs = (_rows(x), bias, _rows(residual), weight, shift, eps, dropout, seed)
    if x.is_cuda or is_interpreted():
        y, normalised, rstd = kernel.launch_forward(*inputs, save, arch_of(x))
    else:
        y, normalised, rstd = reference.forward(*inputs)
    if not save:
        normalised, rstd = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    return y.view(x.shape), normalised, rstd


@_forward.register_fake
def _(x, bias, residual, weight, shift, eps, dropout, seed, save):
    rows = x.shape[:-1].numel()
    normalised = x.new_empty((rows, x.shape[-1]) if save else 0)
    return x.new_empty(x.shape), normalised, x.new_empty(rows if save else 0, dtype=torch.float32)


@torch.library.custom_op("meter_fast::residual_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    normalised: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_residual like grad, grad_x like grad, sums float32 [2 or 3, D]); without dropout grad_x is [0]: it equals
    grad_residual. The sums belong to weight, shift and, with_bias, bias."""
    inputs = (_rows(grad), normalised, rstd, weight, dropout, seed)
    if grad.is_cuda or is_interpreted():
        grad_residual, grad_x, sums = kernel.launch_backward(*inputs, with_bias, arch_of(grad))
    else:
        grad_residual, grad_x, sums = reference.backward(*inputs)
        grad_residual, grad_x = grad_residual.to(grad.dtype), grad_x.to(grad.dtype)
        sums = sums if with_bias else sums[:2].clone()
    grad_x = grad_x.view(grad.shape) if dropout else grad.new_empty(0)
    return grad_residual.view(grad.shape), grad_x, sums


@_backward.register_fake
def _(grad, normalised, rstd, weight, dropout, seed, with_bias):
    sums = grad.new_empty((3 if with_bias else 2, grad.shape[-1]), dtype=torch.float32)
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape if dropout else 0), sums


def _setup_context(ctx, inputs, output):
    _, bias, _, weight, shift, _, dropout, seed, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1], output[2], weight, seed)
    ctx.dropout = dropout
    ctx.dtypes = (weight.dtype, shift.dtype, None if bias is None else bias.dtype)


def _gradients(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    normalised, rstd, weight, seed = ctx.saved_tensors
    with_bias = ctx.dtypes[2] is not None
    grad_residual, grad_x, sums = _backward(grad, normalised, rstd, weight, ctx.dropout, seed, with_bias)
    sums = [of_one.to(dtype) for of_one, dtype in zip(sums.unbind(0), ctx.dtypes)]
    grad_bias = sums[2] if with_bias else None
    return (grad_x if ctx.dropout else grad_residual, grad_bias, grad_residual, *sums[:2], None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _rows(x: Tensor) -> Tensor:
    """[N,D] with neighbouring columns side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _check(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, shift: Tensor) -> None:
    width = x.shape[-1] if x.dim() else 0
    if not 0 < width <= MAX_WIDTH or width % 8:
        raise ValueError(f"x {list(x.shape)}: the last dimension must be a multiple of 8 up to {MAX_WIDTH}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x.dtype={x.dtype}: float32, float16 or bfloat16 is needed; use the plain form for others")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual {residual.dtype} {list(residual.shape)}: it must be as x, {x.dtype} {list(x.shape)}"
        )
    if x.numel() // width >= 2**31:
        raise ValueError(f"x {list(x.shape)}: fewer than 2**31 rows are needed; split the batch")
    for name, parameter in (("bias", bias), ("weight", weight), ("shift", shift)):
        if parameter is not None and (parameter.shape != (width,) or not parameter.is_floating_point()):
            raise ValueError(
                f"{name} {parameter.dtype} {list(parameter.shape)}: floating [{width}] is needed, as x has"
            )
