"""The operator `segmented_softmax`: Triton on a GPU or interpreted, plain torch on a CPU. Forward and backward are
operators each, so that torch.compile sees no further than their names."""

import torch
from torch import Tensor

from ..dropout import draw_seed, threshold
from ..launch import arch_of, is_interpreted
from . import kernel, reference


def segmented_softmax(
    scores: Tensor,
    text_lengths: Tensor,
    text_is: str,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(scale * (scores + bias)) over each segment, then dropout: [B,V,T,H] in the dtype of `scores`.

    scores [B,V,T,H], floating (made contiguous if they are not). text_is "key": a segment is the T text tokens of one
    (v, h); "query": the V image tokens of one (t, h). text_lengths int32 [B]: text tokens from there on get 0, and so
    does their gradient. bias [B,T,H]: added to all of a column's scores. Computed in float32 or wider.

    dropout: share of the weights that are dropped, by the counters (t // 4, v, b * H + h) of `kernels.dropout`; seed
    int64 [1] on the same device, None: drawn. Raises ValueError for arguments that do not fit each other.
    """
    check(scores, text_lengths, text_is, dropout)
    if bias is not None:
        if bias.shape != (scores.shape[0], *scores.shape[2:]):
            raise ValueError(f"bias: shape {tuple(bias.shape)}, but {tuple(scores.shape)} scores need one [B,T,H]")
        bias = bias.to(reference.accumulation_dtype(scores.dtype)).contiguous()
    if dropout and seed is None:
        seed = draw_seed(scores.device)
    probabilities, dropped = _segmented_softmax(
        scores.contiguous(), text_lengths, bias, seed, text_is, float(scale), float(dropout)
    )
    return dropped if dropout else probabilities


def check(scores: Tensor, text_lengths: Tensor, text_is: str, dropout: float) -> None:
    if scores.dim() != 4 or not scores.is_floating_point():
        raise ValueError(f"scores: {scores.dtype} {tuple(scores.shape)}, but floating [B,V,T,H] is needed")
    check_lengths(text_lengths, scores.shape[0])
    check_direction(text_is)
    threshold(dropout)


def check_lengths(text_lengths: Tensor, pairs: int) -> None:
    if text_lengths.shape != (pairs,) or text_lengths.dtype != torch.int32:
        found = f"{text_lengths.dtype} {tuple(text_lengths.shape)}"
        raise ValueError(f"text_lengths: {found}, but int32 [{pairs}] is needed, a length for each pair")


def check_direction(text_is: str) -> None:
    if text_is not in reference.SOFTMAX_DIM:
        raise ValueError(f'text_is={text_is!r}: "query" if the text reads the image, "key" if the image reads the text')


def forward(
    scores: Tensor,
    text_lengths: Tensor,
    text_is: str,
    scale: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """(probabilities, probabilities after dropout), see `reference.forward`; `out`, which may be the scores, is where
    a kernel writes the first of them."""
    if scores.is_cuda or is_interpreted():
        return kernel.launch_forward(scores, text_lengths, text_is, scale, bias, dropout, seed, out, arch_of(scores))
    return reference.forward(scores, text_lengths, text_is, scale, bias, dropout, seed)


def backward(
    probabilities: Tensor,
    gradient: Tensor,
    text_is: str,
    scale: float,
    delta: Tensor | None,
    shift: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """(gradient of the scores, probabilities after dropout), see `reference.backward`; `out`, which may be the
    gradient, is where a kernel writes the first of them."""
    if probabilities.is_cuda or is_interpreted():
        return kernel.launch_backward(
            probabilities, gradient, text_is, scale, delta, shift, dropout, seed, out, arch_of(probabilities)
        )
    return reference.backward(probabilities, gradient, text_is, scale, delta, shift, dropout, seed)


@torch.library.custom_op("meter_fast::segmented_softmax", mutates_args=())
def _segmented_softmax(
    scores: Tensor,
    text_lengths: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    text_is: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    probabilities, dropped = forward(
        scores, text_lengths, text_is, scale, bias, dropout, seed, torch.empty_like(scores)
    )
    return probabilities, dropped if dropout else scores.new_empty(0)


@_segmented_softmax.register_fake
def _(scores, text_lengths, bias, seed, text_is, scale, dropout):
    return torch.empty_like(scores), torch.empty_like(scores) if dropout else scores.new_empty(0)


@torch.library.custom_op("meter_fast::segmented_softmax_backward", mutates_args=())
def _segmented_softmax_backward(
    probabilities: Tensor, gradient: Tensor, seed: Tensor | None, text_is: str, scale: float, dropout: float
) -> Tensor:
    gradient, delta = gradient.contiguous(), None
    if text_is == "query":
        dtype = reference.accumulation_dtype(gradient.dtype)
        dropped = reference.drop(gradient.to(dtype), text_is, dropout, seed)
        delta = (probabilities * dropped).sum(reference.SOFTMAX_DIM[text_is])
    out = torch.empty_like(gradient)
    return backward(probabilities, gradient, text_is, scale, delta, None, dropout, seed, out)[0]


@_segmented_softmax_backward.register_fake
def _(probabilities, gradient, seed, text_is, scale, dropout):
    return torch.empty_like(probabilities)


def _setup_context(ctx, inputs, output):
    _, _, bias, seed, ctx.text_is, ctx.scale, ctx.dropout = inputs
    ctx.save_for_backward(output[0], seed)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, probabilities_gradient, dropped_gradient):
    probabilities, seed = ctx.saved_tensors
    gradient = dropped_gradient if ctx.dropout else probabilities_gradient
    if gradient is None:
        return (None,) * 7
    scores_gradient = _segmented_softmax_backward(probabilities, gradient, seed, ctx.text_is, ctx.scale, ctx.dropout)
    bias_gradient = None
    if ctx.has_bias:
        bias_gradient = scores_gradient.sum(1, dtype=reference.accumulation_dtype(scores_gradient.dtype))
    return scores_gradient, None, bias_gradient, None, None, None, None


_segmented_softmax.register_autograd(_autograd_backward, setup_context=_setup_context)
