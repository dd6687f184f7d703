"""DeepSpeed around one module: configuration, precision, accumulation, and one optimizer step.

Knows DeepSpeed, the optimizer and its schedule. Knows nothing of data sources, files of a run or what is logged.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

import meter_fast
from meter_fast.config import ConfigError, RunConfig
from meter_fast.data.batch import Batch
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import Losses, shares
from meter_fast.training.layer_decay import layers_above
from meter_fast.training.optimizer import AdamW, Schedule, parameter_groups, shown_rates
from meter_fast.training.phases import time_collectives
from meter_fast.training.record import StepRecord
from meter_fast.training.state import WEIGHT, NamedState
from meter_fast.training.world import World

DS_CONFIGS = Path(meter_fast.__file__).parent.parent / "ds_configs"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def accumulation(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches that each process adds up for one optimizer step. Raises ConfigError naming what would divide."""
    at_once = micro_batch * world_size
    if global_batch % at_once == 0:
        return global_batch // at_once
    micro = [m for m in range(1, global_batch // world_size + 1) if global_batch % (m * world_size) == 0]
    near = sorted(sorted(micro, key=lambda m: abs(m - micro_batch))[:2])
    multiples = sorted({max(1, global_batch // at_once) * at_once, (global_batch // at_once + 1) * at_once})
    fits = f"engine.micro_batch={' or '.join(map(str, near))}, or " if near else ""
    raise ConfigError(
        f"engine.global_batch={global_batch} is not a multiple of {at_once} = {micro_batch} (engine.micro_batch) x "
        f"{world_size} (processes). What divides: {fits}engine.global_batch={' or '.join(map(str, multiples))}"
    )


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: the chosen file with the run's own numbers in place of the file's.

    Raises ConfigError if the file is missing, no JSON, or of another ZeRO stage."""
    engine = config.engine
    name = f"zero{engine.zero}{'_offload' if engine.offload == 'cpu' else ''}.json"
    path = Path(engine.ds_config) if engine.ds_config else DS_CONFIGS / name
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"engine.ds_config: cannot read {path} ({error.strerror}); run from a checkout of the "
                          f"project, installed with pip install -e .") from None  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"engine.ds_config: {path} is not JSON ({error})") from None
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage != engine.zero:
        raise ConfigError(f"engine.ds_config: {path} is of ZeRO stage {stage}; say engine.zero={stage}")
    low = engine.dtype == "bf16"
    content.update(
        train_batch_size=engine.global_batch,
        train_micro_batch_size_per_gpu=engine.micro_batch,
        gradient_accumulation_steps=accumulation(engine.global_batch, engine.micro_batch, world_size),
        gradient_clipping=config.optim.clip,
        bf16={**content.get("bf16", {}), "enabled": low},
        steps_per_print=1 << 60,
    )
    if not low or stage == 0:  # stage 0 cannot add bf16 gradients up in fp32
        content.pop("data_types", None)
    return content


class Engine:
    """A module under training. `module` is what the engine runs; its `model` owns every parameter.

    Building it is collective. `masters` of the main process, name -> fp32 tensor, become the master weights:
    DeepSpeed by itself would take them from the weights already rounded to bf16.
    """

    def __init__(
        self,
        module: nn.Module,
        config: RunConfig,
        world: World,
        published_name: Callable[[str], str],
        masters: dict[str, Tensor] | None = None,
    ) -> None:
        settings = deepspeed_config(config, world.size)
        self.world = world
        self.dtype = DTYPES[config.engine.dtype]
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self.schedule = Schedule.of(config.optim, config.run.max_steps)
        self.objectives = tuple(config.objectives.names)
        self._seed = config.run.seed
        self._bare_norm = config.engine.zero == 0 and self.dtype == torch.float32
        model = module.model
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing(True, config.engine.checkpointed_parts)
        above = partial(layers_above, config=config.model)
        groups = parameter_groups(model.named_parameters(), config.optim, published_name, above)
        optimizer = AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
        _quiet()
        self._engine, *_ = deepspeed.initialize(
            model=PlainOutputs(module), optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._alone = config.engine.zero == 0 and world.size == 1
        if config.engine.zero == 0:
            _reduce_in_buckets(self._engine, world.size, settings["zero_optimization"])
        time_collectives(world.phases)
        for buffer in module.buffers():  # parameters were sent to all by DeepSpeed
            world.broadcast(buffer)
        self.module = module
        self.state = NamedState(self._engine, self.module.model, world)
        if self.dtype != torch.float32:
            for name in self.state.names:
                self.state.write(WEIGHT, name, masters[name].float() if world.is_main else None)
        if config.engine.compile:
            compile_blocks(self.module.model)

    def step(self, step: int, batches: Sequence[Batch], counts: Mapping[str, float]) -> StepRecord:
        """One optimizer step (the `step`-th, from 0) on this process's micro-batches.

        counts: by objective, what the global batch holds; losses are means over it, whoever holds which part."""
        phases = self.world.phases
        phases.step = step
        self._engine.train()
        self.schedule.apply(self._engine.optimizer.param_groups, step)
        totals = shares(counts, self.accumulation * self.world.size)
        record = StepRecord(step, self.objectives)
        for number, batch in enumerate(batches):
            self._reseed(step, number)
            with phases.within("forward"):
                losses = Losses(*self._engine(batch.to(self.world.device, self.dtype), totals))
            with phases.within("backward"):
                self._engine.backward(losses.loss)
            with phases.within("optimizer"):
                if self._alone:
                    _fill_gradients(self.module)
                if number == self.accumulation - 1 and self._bare_norm:
                    bare = gradient_norm(self.module.parameters())
                self._engine.step()
            record.add(losses, batch.sample_ids)
        norm = bare if self._bare_norm else self._engine.get_global_grad_norm()
        record.close(norm, self.rates(), phases.take())
        return record

    def evaluated(self) -> nn.Module:
        """The module for evaluation: takes a batch, gives Losses, whatever the ZeRO stage holds where."""
        return Evaluated(self._engine)

    def rates(self) -> dict[str, float]:
        """Learning rate of the parameter groups, by name."""
        return shown_rates(self._engine.optimizer.param_groups)

    def _reseed(self, step: int, number: int) -> None:
        """Random numbers of a micro-batch depend on its place in the global batch alone: nothing to save, and the same
        dropout for any number of processes with the same micro-batch."""
        place = number * self.world.size + self.world.rank
        torch.manual_seed(((self._seed * 0x9E3779B1 + step) * 0x85EBCA6B + place) & (2**63 - 1))


class PlainOutputs(nn.Module):
    """Gives losses as a tuple: DeepSpeed finds output tensors in tuples and dictionaries only, and one that it does not
    find leaves out what it does before backward (at stage 1 gradients of micro-batches are then counted twice)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, batch: Batch, totals: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """(loss, parts, metrics) of `module`."""
        losses = self.module(batch, totals)
        return losses.loss, losses.parts, losses.metrics


class Evaluated(nn.Module):
    """The engine's module with Losses as its output, without totals: means are over the batch."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine = engine

    @property
    def model(self) -> nn.Module:
        """What is trained. Its parts may be called as long as every process calls the same ones."""
        return self.engine.module.module.model

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch on the engine's device."""
        return Losses(*self.engine(batch))


def _quiet() -> None:
    """DeepSpeed reports each of its internals; what a user needs stands in the banner."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _reduce_in_buckets(engine: deepspeed.DeepSpeedEngine, processes: int, settings: Mapping[str, Any]) -> None:
    """At stage 0 DeepSpeed copies all gradients into one tensor, in bf16 into another of fp32, too, and back: a quarter
    of a step in bf16 on a CPU. One process has nothing to reduce; several do it bucket by bucket, of a size that
    DeepSpeed reads from its file at the other stages alone."""
    if processes == 1:
        engine.enable_backward_allreduce = False
    elif "reduce_bucket_size" in settings:
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=settings["reduce_bucket_size"])


def _fill_gradients(module: nn.Module) -> None:
    """Zeros where a micro-batch has reached a parameter in no way, as DeepSpeed does where it reduces."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def gradient_norm(parameters) -> Tensor:
    """L2 norm over all gradients, a float32 scalar on the device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def compile_blocks(model: Meter, mode: str = "default") -> None:
    """torch.compile every repeated block in place, one small graph for all of a kind; names of parameters stay.

    mode: of torch.compile.
    """
    model.keep_activations()
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                if sum(1 for _ in block.parameters()) > 4:
                    block.compile(mode=mode)
