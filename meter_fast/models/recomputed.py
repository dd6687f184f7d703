"""An activation between two linear layers that is computed again in backward instead of being kept. Knows tensors.

The second layer keeps its input for the gradient of its weight: 4 D values a token, as many as the activation keeps of
its own input. The first follows from the second in one pass over the memory, so only that one is kept. The numbers are
the same ones: the same function of the same tensor.

Source: selective recomputation, Korthikanti et al. 2022, section 5.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from timm.layers import Mlp
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Out = TypeVar("Out")


def activated(linear: Callable[[Tensor], Out], activation: Callable[[Tensor], Tensor], up: Tensor, keep: bool) -> Out:
    """linear(activation(up)). keep: as torch does; that is also what happens where nothing is kept anyway, and where a
    compiler decides."""
    if keep or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear(activation(up))
    hidden = activation(up)
    place, size = StorageWeakRef(hidden.untyped_storage()), hidden.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        is_hidden = tensor.numel() == size and StorageWeakRef(tensor.untyped_storage()) == place
        return tensor.shape if is_hidden and tensor.is_contiguous() else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return activation(up).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return linear(hidden)


class RecomputedMlp(Mlp):
    """timm's, of a vision encoder's block, without a norm in its middle.

    keep_activation: for a block that is a checkpoint itself: nothing may hold its tensors."""

    keep_activation = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.drop2(activated(self.fc2, lambda up: self.drop1(self.act(up)), self.fc1(x), self._keeps()))

    def _keeps(self) -> bool:
        return self.keep_activation or (self.training and self.drop1.p > 0)
