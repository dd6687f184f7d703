"""What the processes of a run send each other in one optimizer step, at each ZeRO stage, and how long that takes.

Knows DeepSpeed's stages as the engine uses them (counted in a run of two processes) and rates of links; nothing of
models. Not counted: norms, flags and other single numbers, latencies, and candidates that `mim_negatives=all_ranks`
gathers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from meter_fast.config import RunConfig
from meter_fast.plan.options import Machine
from meter_fast.training.engine import DTYPES, deepspeed_config
from meter_fast.training.memory import Sizes, stays_gathered

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
PERSISTENT = 100_000  # numbers; DeepSpeed's default of stage3_param_persistence_threshold
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of communication_data_type


@dataclass(frozen=True)
class Collective:
    """One kind of exchange. size: bytes of the whole tensors each time. times: in an optimizer step. beside: the pass
    that goes on meanwhile, "" for none."""

    kind: Kind
    what: Literal["gradients", "weights"]
    size: int
    times: int
    beside: Literal["", "forward", "backward"]

    @property
    def total(self) -> int:
        """Bytes of an optimizer step."""
        return self.size * self.times

    def sent(self, processes: int) -> float:
        """Bytes that each process sends in an optimizer step, by rings (Patarasuk and Yuan 2009): of an all-reduce, a
        reduce-scatter and an all-gather, its parts of all others."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.total * (processes - 1) / processes


def collectives(config: RunConfig, sizes: Sizes, processes: int) -> list[Collective]:
    """Of one optimizer step; none for a single process. Raises ConfigError where the global batch does not divide.

    Stages 0 and 1 reduce gradients once, after the last micro-batch, stages 2 and 3 after each, beside its backward
    pass where the file says overlap_comm. From stage 1 on the new weights are gathered: once after the update (1, 2),
    or for the passes of each micro-batch (3), where small tensors are gathered once and stay whole.
    """
    if processes == 1:
        return []
    zero, low = config.engine.zero, DTYPES[config.engine.dtype].itemsize
    content = deepspeed_config(config, processes)
    settings, accumulated = content["zero_optimization"], content["gradient_accumulation_steps"]
    gradients = BYTES.get(content.get("communication_data_type", ""), low) * sizes.trained
    overlaps = bool(settings.get("overlap_comm", zero == 3))
    if zero == 0:
        return [Collective("all_reduce", "gradients", gradients, 1, "")]
    if zero == 1:
        reduced = Collective("all_reduce", "gradients", gradients, 1, "")
    elif zero == 2:
        reduced = Collective("all_reduce", "gradients", gradients, accumulated, "backward" if overlaps else "")
    else:
        reduced = Collective("reduce_scatter", "gradients", gradients, accumulated, "backward" if overlaps else "")
    if zero < 3:
        return [reduced, Collective("all_gather", "weights", low * sizes.trained, 1, "")]
    return [reduced, *_gathered(config, sizes, settings, accumulated)]


def _gathered(config: RunConfig, sizes: Sizes, settings: Mapping[str, Any], accumulated: int) -> list[Collective]:
    """Of stage 3: small tensors after the update, the others for each micro-batch, or, where they are not kept between
    the passes, for each pass, the one that activation checkpointing adds included."""
    low = DTYPES[config.engine.dtype].itemsize
    least = int(settings.get("stage3_param_persistence_threshold", PERSISTENT))
    small = sum(size for size in sizes.tensors if size <= least)
    large = sizes.trained + sizes.frozen - small
    passes = 1 if stays_gathered(settings, large + small) else 2 + config.engine.activation_checkpointing
    found = [Collective("all_gather", "weights", low * small, 1, "")] if small else []
    return [*found, Collective("all_gather", "weights", low * large, passes * accumulated, "forward")]


def seconds(collective: Collective, machine: Machine, link_efficiency: float) -> float:
    """Of one optimizer step, if nothing else went on. Rings over all GPUs use the links in a node and, on several
    nodes, all of a node's cards: the slower of the two tells."""
    sent = collective.sent(machine.gpus)
    within = sent / machine.in_node if machine.gpus_per_node > 1 else 0.0
    between = sent / machine.link if machine.nodes > 1 else 0.0
    return max(within, between) / link_efficiency
