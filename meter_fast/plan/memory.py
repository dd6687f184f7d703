"""Which micro-batch fits a GPU, at each ZeRO stage, with and without activation checkpointing.

Knows the estimate of memory that a run's start banner shows, and the division of the global batch. Knows nothing of
speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from meter_fast.config import RunConfig
from meter_fast.plan.options import Machine
from meter_fast.plan.step import on_gpu
from meter_fast.training.activations import Activations, trace_activations
from meter_fast.training.engine import accumulation
from meter_fast.training.memory import Memory, Sizes, memory_of

STAGES = ((0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu"))
TRACED = (2, 32, 256)  # micro-batches whose passes are traced


@dataclass(frozen=True)
class Passes:
    """Activations of micro-batches of any size, from those of a few.

    What passes keep grows in proportion to the micro-batch, and their peak is the largest of several sums that do (or,
    with candidates of the whole batch, grow faster). So between two traced ones a straight line is no less than what a
    trace would give; beyond the last, the last two's line is taken.
    """

    traced: tuple[tuple[int, Activations], ...]

    def of(self, micro_batch: int) -> Activations:
        """Bytes of a micro-batch of this many samples."""
        (low, one), (high, other) = next(
            (pair for pair in pairwise(self.traced) if micro_batch <= pair[1][0]), self.traced[-2:]
        )
        share = (micro_batch - low) / (high - low)
        return Activations(*(
            round(getattr(one, name) + share * (getattr(other, name) - getattr(one, name)))
            for name in ("batch", "kept", "peak")
        ))  # fmt: skip


def trace_passes(config: RunConfig, capability: int, checkpointing: bool) -> Passes:
    """Of a GPU of this compute capability, by tracing on the CPU with the GPU's kernels: attention over short texts
    keeps its weights there, and texts are as long as data.max_text_length, so that a GPU needs rather less. Raises
    NotTraced."""
    config = on_gpu(config, config.data.max_text_length, capability)
    found = []
    for micro_batch in TRACED:
        sized = replace(config, engine=replace(config.engine, micro_batch=micro_batch))
        found.append((micro_batch, trace_activations(sized, checkpointing)))
    return Passes(tuple(found))


@dataclass(frozen=True)
class Fit:
    """What a way of keeping the run takes on each GPU: `memory` of the run's own micro-batch, and the largest one that
    fits, 0 where none does, with the micro-batches accumulated."""

    zero: int
    offload: str
    checkpointing: bool
    memory: Memory
    fits: bool
    largest: int
    accumulated: int


def micro_batches(config: RunConfig, processes: int) -> list[int]:
    """Those that divide the global batch over the processes, as the trainer does; even where it asks for that."""
    goals = config.objectives
    even = "itm" in goals.names and goals.itm_negatives == "batch"
    share, rest = divmod(config.engine.global_batch, processes)
    if rest:
        return []
    return [micro for micro in range(1, share + 1) if share % micro == 0 and not (even and micro % 2)]


def with_engine(config: RunConfig, **changes: object) -> RunConfig:
    """The run with other settings of the engine; a DeepSpeed file of its own goes with the run's own stage alone."""
    engine = config.engine
    own = all(getattr(engine, key) == changes.get(key, getattr(engine, key)) for key in ("zero", "offload"))
    return replace(config, engine=replace(engine, ds_config=engine.ds_config if own else "", **changes))


def largest_micro_batch(
    config: RunConfig, processes: int, sizes: Sizes, passes: Passes, usable: float
) -> int:  # fmt: skip
    """The largest of `micro_batches` whose peak is at most `usable` bytes; 0 for none. The settings of the engine other
    than the micro-batch are the run's."""
    for micro_batch in reversed(micro_batches(config, processes)):
        sized = with_engine(config, micro_batch=micro_batch)
        if memory_of(sized, processes, sizes, passes.of(micro_batch)).peak <= usable:
            return micro_batch
    return 0


def all_fits(
    config: RunConfig, machine: Machine, sizes: Sizes, passes: dict[bool, Passes]
) -> Sequence[Fit]:  # fmt: skip
    """Every stage, with offloading where there is one; passes: without and with activation checkpointing."""
    found = []
    for checkpointing, traced in passes.items():
        for zero, offload in STAGES:
            kept = with_engine(config, zero=zero, offload=offload, activation_checkpointing=checkpointing)
            largest = largest_micro_batch(kept, machine.gpus, sizes, traced, machine.usable)
            memory = memory_of(kept, machine.gpus, sizes, traced.of(kept.engine.micro_batch))
            accumulated = accumulation(kept.engine.global_batch, largest, machine.gpus) if largest else 0
            fits = memory.peak <= machine.usable
            found.append(Fit(zero, offload, checkpointing, memory, fits, largest, accumulated))
    return found
