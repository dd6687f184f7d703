"""Cross-entropy of a linear layer over the masked rows: the operator.

The logits of the masked rows are few enough to be kept (128 rows x 50265 in bfloat16: 13 MB), so this is three matrix
products, done by torch, and one kernel between them that turns logits into losses and, in place, into their gradient.
Logits have a row stride Sp, S rounded up to a multiple of 128: with an odd stride such as 50265 neither products nor
kernel could read 16 bytes at a time. Parameters stay at S. Shape letters: M masked rows, D width, S vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import arch_of, autocasts, is_interpreted
from . import kernel, reference


def linear_cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of -log softmax(rows @ weightᵀ + bias)[label], and how many rows have their label on top.

    rows [M,D] and weight [S,D], one floating dtype (under autocast both are cast to its dtype); bias [S], floating;
    labels int64 [M] in 0..S-1. Returns (loss float32 scalar, correct int64 scalar, no gradient); no rows give (0, 0).
    Of equal logits the first column counts as on top. Gradients flow to rows, weight and bias, in their dtypes.

    Logits and their gradient are kept in the rows' dtype, sums are float32. The gradient kept is the one of the sum
    itself (between -1 and 1): the loss's own incoming gradient is applied to the small operands of the products.

    Raises ValueError for shapes or dtypes that do not fit; for a label outside 0..S-1 only on a CPU, where looking at
    it waits for nothing: on a GPU such a row makes the loss NaN.
    """
    _check(rows, weight, bias, labels)
    if autocasts(rows):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if rows.dtype != weight.dtype:
        raise ValueError(f"weight.dtype={weight.dtype}, but rows.dtype={rows.dtype}: convert one, or use autocast")
    gradient = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad or bias.requires_grad)
    loss, correct, _ = _forward(rows, weight, bias, labels, gradient)
    return loss, correct


@torch.library.custom_op("meter_fast::mlm_loss_forward", mutates_args=())
def _forward(
    rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, correct, slopes): slopes [M,Sp] = d loss / d logits in the rows' dtype, or [0] without `gradient`."""
    vocabulary = weight.shape[0]
    whole = vocabulary // 8 * 8
    logits = rows.new_empty(rows.shape[0], _stride(vocabulary))
    torch.mm(rows, weight[:whole].t(), out=logits[:, :whole])
    if whole < vocabulary:  # apart, because a product with an odd side cannot use 16-byte accesses
        torch.mm(rows, weight[whole:].t(), out=logits[:, whole:vocabulary])
    bias = F.pad(bias, (0, logits.shape[1] - vocabulary))
    if rows.is_cuda or is_interpreted():
        losses, hits = kernel.launch_forward(
            logits, bias, _checked(labels, vocabulary), vocabulary, gradient, arch_of(rows)
        )
    else:
        losses, hits = reference.cross_entropy_(logits, bias, _checked(labels, vocabulary), vocabulary, gradient)
    return losses.sum(), hits.sum(), logits if gradient else logits.new_empty(0)


@_forward.register_fake
def _(rows, weight, bias, labels, gradient):
    slopes = rows.new_empty(rows.shape[0], _stride(weight.shape[0])) if gradient else rows.new_empty(0)
    return rows.new_empty((), dtype=torch.float32), labels.new_empty(()), slopes


@torch.library.custom_op("meter_fast::mlm_loss_backward", mutates_args=())
def _backward(grad: Tensor, slopes: Tensor, rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows [M,D], weight [S,D] and bias (float32 [S]) from the loss's, a float32 scalar."""
    vocabulary = weight.shape[0]
    whole = vocabulary // 8 * 8
    grad_rows = slopes[:, :whole] @ weight[:whole]
    if whole < vocabulary:
        grad_rows.addmm_(slopes[:, whole:vocabulary], weight[whole:])
    grad_weight = slopes.t() @ (rows * grad)  # rows from S on are made of zeros
    grad_bias = slopes.sum(0, dtype=torch.float32)
    return grad_rows.mul_(grad), grad_weight[:vocabulary], grad_bias[:vocabulary] * grad


@_backward.register_fake
def _(grad, slopes, rows, weight):
    return (
        rows.new_empty(rows.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    rows, weight, bias, _, _ = inputs
    ctx.set_materialize_grads(False)  # else zeros of the slopes' size are made for a gradient that nobody has
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[2], rows, weight)
    ctx.bias_dtype = bias.dtype


def _gradients(ctx, grad, *_):
    if grad is None:
        return None, None, None, None, None
    grad_rows, grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors)
    return grad_rows, grad_weight, grad_bias.to(ctx.bias_dtype), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _stride(vocabulary: int) -> int:
    return (vocabulary + 127) // 128 * 128


def _checked(labels: Tensor, vocabulary: int) -> Tensor:
    if labels.device.type == "cpu" and labels.numel():
        low, high = (bound.item() for bound in labels.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"labels from {low} to {high}: they must be in 0..{vocabulary - 1}; pass masked rows only")
    return labels


def _check(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"rows {rows.dtype} {list(rows.shape)}: floating [M,D] is needed; gather the masked rows")
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight {list(weight.shape)}: [S,{rows.shape[1]}] is needed, as rows are {list(rows.shape)}")
    if bias.shape != weight.shape[:1] or not bias.is_floating_point():
        raise ValueError(
            f"bias {bias.dtype} {list(bias.shape)}: floating [{weight.shape[0]}] is needed, one a row of weight"
        )
    if labels.dtype != torch.int64 or labels.shape != rows.shape[:1]:
        raise ValueError(f"labels {labels.dtype} {list(labels.shape)}: int64 [{rows.shape[0]}] is needed, one a row")
