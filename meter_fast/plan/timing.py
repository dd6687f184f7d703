"""How long a step takes, and a run. Knows what a step computes, sends and updates, and the machine's rates.

Times are those of the slowest part of each phase at stated shares of the peak rates: they tell what to expect and which
part to look at, and replace no measurement. Launching operators is not counted: it bounds passes of a few milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from meter_fast.config import RunConfig
from meter_fast.plan.communication import Collective, seconds
from meter_fast.plan.options import Machine
from meter_fast.plan.step import StepCost
from meter_fast.training.engine import DTYPES
from meter_fast.training.memory import Sizes

# Bytes that an update reads and writes for each number: tensors of 4 bytes that each operation of
# training.optimizer.AdamW touches, in its order.
UPDATE_BYTES = 4 * (2 + 3 + 2 + 4 + 2 + 2 + 4 + 3)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on each GPU. sent: of all collectives; exposed: of what no pass hides."""

    compute: float
    sent: float
    exposed: float
    update: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.update

    @property
    def communication_share(self) -> float:
        """Of the step's time, what is spent waiting for others."""
        return self.exposed / self.total


def step_time(
    config: RunConfig,
    sizes: Sizes,
    cost: StepCost,
    sent: Sequence[Collective],
    machine: Machine,
    efficiency: float,
    link_efficiency: float,
) -> StepTime:
    """sent: of `communication.collectives`. With offloading the update is bound by the host, which is not known: it
    counts as on the device."""
    own = config.engine.global_batch / machine.gpus
    rate = machine.peak * efficiency
    flops = cost.checkpointed if config.engine.activation_checkpointing else cost.flops
    compute, forward = own * flops / rate, own * cost.forward / rate
    room = {"": 0.0, "forward": forward, "backward": compute - forward}
    exposed = everything = 0.0
    for one in sent:
        takes = seconds(one, machine, link_efficiency)
        everything += takes
        exposed += max(0.0, takes - room[one.beside])
    divided = machine.gpus if config.engine.zero else 1
    low = DTYPES[config.engine.dtype].itemsize
    update = sizes.trained / divided * (UPDATE_BYTES + (4 + low if low < 4 else 0)) / machine.bandwidth
    return StepTime(compute, everything, exposed, update)
