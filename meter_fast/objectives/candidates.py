"""Choosing one of many candidates by dot products, in the memory of a few rows' scores. Knows tensors and ranks, no
batch and no model.

A cross-entropy whose weight matrix are the candidates. Scores [M,N] are made for some rows at a time, and their
gradient at once with them, so that neither ever exists whole: only the gradients of rows and candidates are kept for
backward. Shape letters: M rows, N candidates, D width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

SCORES_AT_ONCE = 1 << 26  # 256 MB of float32


def choose(
    rows: Tensor, candidates: Tensor, labels: Tensor, scores_at_once: int = SCORES_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Sum over the rows of -log softmax(rows @ candidatesᵀ)[label], and the candidate with the best score of each row.

    rows [M,D] and candidates [N,D] of one floating dtype, labels [M] int64 in 0..N-1. Returns (loss, a scalar, float32
    or wider; chosen int64 [M], no gradient). Gradients flow to rows and candidates; sums are float32 or wider.
    """
    gradient = torch.is_grad_enabled() and (rows.requires_grad or candidates.requires_grad)
    at_once = max(1, scores_at_once // len(candidates))
    return _Choose.apply(rows, candidates, labels, at_once, gradient)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, candidates, labels, at_once, gradient):
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss = rows.new_zeros((), dtype=wide)
        chosen = torch.empty_like(labels)
        of_rows = torch.empty_like(rows) if gradient else None
        of_candidates = torch.zeros_like(candidates, dtype=wide) if gradient else None
        for begin in range(0, len(rows), at_once):
            here = slice(begin, begin + at_once)
            scores = (rows[here] @ candidates.t()).to(wide)
            chosen[here] = scores.argmax(1)
            wanted = labels[here, None]
            log_total = scores.logsumexp(1, keepdim=True)
            loss += (log_total - scores.gather(1, wanted)).sum()
            if gradient:
                slopes = scores.sub_(log_total).exp_()
                slopes.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=wide))
                slopes = slopes.to(rows.dtype)
                of_rows[here] = slopes @ candidates
                of_candidates += slopes.t() @ rows[here]
        ctx.mark_non_differentiable(chosen)
        if gradient:
            ctx.save_for_backward(of_rows, of_candidates)
            ctx.dtype = candidates.dtype
        return loss, chosen

    @staticmethod
    def backward(ctx, grad, _chosen):
        of_rows, of_candidates = ctx.saved_tensors
        return (of_rows * grad).to(of_rows.dtype), (of_candidates * grad).to(ctx.dtype), None, None, None


def gather(own: Tensor) -> tuple[Tensor, int]:
    """Rows [n,...] of every process, in the order of ranks [n*ranks,...], and the place of the first of `own`.

    Backward adds up what all processes ask of this one's rows. Every process brings equally many. Collective in both
    directions; without a process group there is only `own`.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return own, 0
    return _Gather.apply(own), len(own) * dist.get_rank()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own):
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
