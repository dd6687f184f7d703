"""The training state by parameter name, whatever ZeRO stage and precision hold it.

Knows where a DeepSpeed engine keeps fp32 master weights and Adam moments. Knows nothing of files, steps or batches.

Three kinds belong to every trained parameter, all fp32 and in its full shape: `weight`, `exp_avg`, `exp_avg_sq`.
Reading and writing are collective: every process calls with the same arguments. Frozen parameters and buffers have no
master and no moments: they are read as kind `frozen`, and get their values with the module, before there is an engine.
"""

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from meter_fast.training.world import World

WEIGHT, MEAN, SQUARE = "weight", "exp_avg", "exp_avg_sq"
KINDS = (WEIGHT, MEAN, SQUARE)  # of a trained parameter
FROZEN = "frozen"


class NamedState:
    """Access by name to the master weights and moments of `engine`, which trains `module`. Names are those of
    `module`.
    """

    def __init__(self, engine, module: nn.Module, world: World) -> None:
        self._world = world
        held = module.state_dict(keep_vars=True)
        self._trained = {name: held[name] for name, p in module.named_parameters() if p.requires_grad}
        self._frozen = {name: tensor for name, tensor in held.items() if name not in self._trained}
        self._stage = engine.zero_optimization_stage()
        self._adam = engine.basic_optimizer
        self._masters = self._plain_masters(engine) if self._stage == 0 else {}
        self._make_moments(engine)

    @property
    def names(self) -> list[str]:
        """The trained parameters, in the order of the module."""
        return list(self._trained)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the trained parameters."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._trained.items()}

    def numel(self) -> int:
        """Number of trained numbers."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self._trained.values())

    def read(self, kinds: tuple[str, ...] = (*KINDS, FROZEN)) -> Iterator[tuple[str, str, Tensor]]:
        """(kind, name, full tensor on the device), kind by kind. The tensor is the caller's only until the next."""
        for kind in kinds:
            if kind == FROZEN:
                for name, tensor in self._frozen.items():
                    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                        yield kind, name, tensor.detach()
                continue
            for name, parameter in self._trained.items():
                yield kind, name, self._get(kind, parameter)

    def write(self, kind: str, name: str, value: Tensor | None) -> None:
        """Set one tensor on all processes from the main one's `value` (fp32, any device; None elsewhere)."""
        parameter = self._trained[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        full = torch.empty(shape, dtype=torch.float32, device=self._world.device)
        if self._world.is_main:
            assert value is not None and value.shape == full.shape and value.dtype == torch.float32, (kind, name)
            full.copy_(value)
        self._set(kind, parameter, self._world.broadcast(full))

    def _get(self, kind: str, parameter: nn.Parameter) -> Tensor:
        if self._stage == 0:
            return self._plain(kind, parameter).detach()
        if kind == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _set(self, kind: str, parameter: nn.Parameter, full: Tensor) -> None:
        if self._stage == 0:
            with torch.no_grad():
                self._plain(kind, parameter).copy_(full)
        elif self._stage == 3:
            part = self._local_part(parameter, full)
            if kind == WEIGHT:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == WEIGHT:
            safe_set_full_fp32_param(parameter, full)
        else:
            safe_set_full_optimizer_state(parameter, full, kind)

    def _plain(self, kind: str, parameter: nn.Parameter) -> Tensor:
        master = self._masters[parameter]
        return master if kind == WEIGHT else self._adam.state[master][kind]

    def _local_part(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """This rank's piece under ZeRO-3. The last one is padded: DeepSpeed's own setter of full values cuts past the
        end when the size does not divide by the number of ranks.
        """
        size = parameter.ds_tensor.numel()
        padded = full.new_zeros(size * self._world.size)
        padded[: full.numel()] = full.flatten()
        return padded[size * self._world.rank : size * (self._world.rank + 1)]

    def _plain_masters(self, engine) -> dict[nn.Parameter, Tensor]:
        """Stage 0: parameter -> its fp32 master, which in fp32 is the parameter itself."""
        wrapper = engine.optimizer
        if wrapper is self._adam:
            return {p: p for p in self._trained.values()}
        pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)  # so called with bf16, too
        return {p: master for group in pairs for p, master in zip(*group, strict=True)}

    def _make_moments(self, engine) -> None:
        """Create moments of zeros now: DeepSpeed makes them with the first update, too late for a checkpoint to be
        read in and for one to be written before the first step.
        """
        masters = [master for group in self._adam.param_groups for master in group["params"]]
        if self._stage == 3:  # the groups are filled piece by piece during a step, and empty otherwise
            masters = engine.optimizer.fp32_partitioned_groups_flat
        for master in masters:
            for kind in (MEAN, SQUARE):
                self._adam.state[master].setdefault(kind, torch.zeros_like(master))
        if self._stage in (1, 2):
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # lets the moments be found by parameter
