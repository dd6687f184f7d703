"""What backward computes again instead of keeping it: normalised tokens, and activations between two linear layers.

A linear layer keeps its input for the gradient of its weight. Where that input is an activation or a LayerNorm of
another tensor, which is kept anyway, one pass over the memory gives it back, so only the other one is kept. The numbers
are the same ones: the same function of the same tensor.

Parts of the model open `recomputing`; modules in them tell what is `recomputable`. Source: selective recomputation,
Korthikanti et al. 2022, section 5.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from meter_fast.kernels.launch import autocasts


@dataclass(frozen=True)
class _Recipe:
    """How to make what a storage holds again; the place keeps its number from being given to another storage."""

    place: StorageWeakRef
    size: int
    function: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]


class _Open(threading.local):
    """By storage, what the innermost `recomputing` of this thread was told of."""

    recipes: dict[int, _Recipe] | None = None


_open = _Open()


@contextmanager
def recomputing(on: bool = True) -> Iterator[None]:
    """Within it autograd keeps nothing that is `recomputable`. Does nothing if `on` is False, without gradients, and
    where a compiler decides what is kept."""
    if not on or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    recipes: dict[int, _Recipe] = {}

    def pack(tensor: Tensor) -> Tensor | tuple[_Recipe, torch.Size]:
        recipe = recipes.get(tensor.untyped_storage()._cdata)
        if recipe is None or tensor.numel() != recipe.size or not tensor.is_contiguous():
            return tensor
        return recipe, tensor.shape

    outer, _open.recipes = _open.recipes, recipes
    try:
        with saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _open.recipes = outer


def _unpack(packed: Tensor | tuple[_Recipe, torch.Size]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    recipe, shape = packed
    with torch.no_grad():
        return recipe.function(*recipe.inputs).view(shape)


def recomputable(out: Tensor, function: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> Tensor:
    """`out`, which function(x, *parameters) gives again: elementwise or a norm, without random numbers, of a tensor
    that autograd keeps anyway. parameters: small ones, which are copied, as they may be elsewhere in backward (ZeRO-3).
    Under autocast it is kept: backward would compute in another dtype."""
    recipes = None if torch.compiler.is_compiling() else _open.recipes
    if recipes is not None and out.requires_grad and out.is_contiguous() and not autocasts(out):
        storage = out.untyped_storage()
        copies = tuple(None if p is None else p.detach().clone() for p in parameters)
        recipes[storage._cdata] = _Recipe(StorageWeakRef(storage), out.numel(), function, (x.detach(), *copies))
    return out


class RecomputedNorm(nn.LayerNorm):
    """torch's, of which backward keeps the input alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return recomputable(super().forward(x), self._again, x, self.weight, self.bias)

    def _again(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
