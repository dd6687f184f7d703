"""The processes of a run and what they say to each other.

Knows ranks, devices and collectives. Knows nothing of models, data or files.

Small facts that steer the run (how many tokens are masked, has someone been asked to stop) travel over a group of their
own on the host, so that agreeing on them never waits for the accelerator.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meter_fast.config import ConfigError
from meter_fast.training import slurm
from meter_fast.training.phases import REDUCE, Phases
from meter_fast.training.ports import free_port


class StoppedTogether(RuntimeError):
    """Another process has failed and said why; this one has nothing to add."""


@dataclass(frozen=True)
class World:
    """This process among all of the run. `host`: the group for `sum`, `share` and `together`; None for one that is
    alone and has joined no group. `phases`: what it is doing."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host: Any
    phases: Phases = field(default_factory=Phases, compare=False)

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes, float64. Collective."""
        if self.host is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with self.phases.within(REDUCE):
            dist.all_reduce(total, group=self.host)
        return total.tolist()

    def share(self, value: Any) -> list[Any]:
        """What every process says, in order of rank. Any JSON value; JSON and not pickle, so nothing can run.
        Collective.
        """
        text = _bytes(value)
        if self.host is None:
            return [_value(text)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.phases.within(REDUCE):
            dist.all_gather(sizes, torch.tensor([text.numel()]), group=self.host)
            padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            padded[: text.numel()] = text
            texts = [torch.zeros_like(padded) for _ in range(self.size)]
            dist.all_gather(texts, padded, group=self.host)
        return [_value(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

    def hear(self, value: Any) -> Any:
        """What the main process says; the others' `value` is not looked at. Collective."""
        text = _bytes(value) if self.is_main else torch.zeros(0, dtype=torch.uint8)
        if self.host is None:
            return _value(text)
        size = torch.tensor([text.numel()])
        with self.phases.within(REDUCE):
            dist.broadcast(size, 0, group=self.host)
            if not self.is_main:
                text = torch.zeros(int(size), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self.host)
        return _value(text)

    def together(self, work: Callable[[], Any]) -> Any:
        """Run `work` on the main process and give its JSON result to all. If it raises ValueError or OSError, the main
        process raises that and every other one StoppedTogether, so that none is left waiting. Collective."""
        said: dict[str, Any] = {}
        failure: Exception | None = None
        if self.is_main:
            try:
                said["result"] = work()
            except (ValueError, OSError) as error:
                failure, said["error"] = error, f"{type(error).__name__}: {error}"
        heard = self.hear(said)
        if failure is not None:
            raise failure
        if "error" in heard:
            raise StoppedTogether(heard["error"])
        return heard["result"]

    def each(self, work: Callable[[], Any]) -> Any:
        """Run `work` on every process. If it raises ValueError or OSError anywhere, all stop: those that failed raise
        their error, the others StoppedTogether. Returns this process's own result. Collective."""
        result, failure = None, None
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
        failed = [rank for rank, fine in enumerate(self.share(failure is None)) if not fine]
        if failure is not None:
            raise failure
        if failed:
            raise StoppedTogether(f"rank {failed[0]} failed")
        return result

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The main process's values of `tensor` (on `device`), in place. Collective."""
        if self.host is not None:
            with self.phases.within(REDUCE):
                dist.broadcast(tensor, 0)
        return tensor


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


def alone(device: torch.device | str) -> World:
    """A process by itself, without a launcher and without a group to join."""
    return World(0, 1, 0, torch.device(device), None)


def start(timeout_seconds: int) -> World:
    """Join the run that the launcher (or srun) describes, or make one of a single process where there is none.

    timeout_seconds: how long a collective of the default group may wait for a peer. Raises ConfigError where the
    processes cannot meet."""
    import deepspeed  # slow, and of no use to a process that is alone
    from deepspeed.accelerator import get_accelerator

    os.environ.update(slurm.variables(os.environ))
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    # A C++ extension that only inference uses: building it costs a minute and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    accelerator.set_device(local_rank)
    device = torch.device(accelerator.device_name(local_rank))
    timeout = timedelta(seconds=timeout_seconds)
    try:
        deepspeed.init_distributed(accelerator.communication_backend_name(), timeout=timeout, verbose=False)
        on_host = dist.get_backend() == "gloo"
        host = dist.group.WORLD if on_host else dist.new_group(backend="gloo", timeout=timeout)
        # Nobody goes on before all have met: a process that ends at once takes the meeting place with it.
        dist.barrier(host)
    except dist.DistNetworkError as error:
        raise ConfigError(_why_apart(error)) from error
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, host)


def _why_apart(error: Exception) -> str:
    """Why the processes did not meet, with the remedy."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return (
            f"another program listens at {where}: deepspeed --master_port N with a free one, {free_port()} for example"
        )
    return f"no way to meet at {where} ({error}): meter-fast doctor --only network,gloo says more"
