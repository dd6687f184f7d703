"""What a real step sends and keeps, on each process of a test. Helpers only, no tests."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import deepspeed.comm.comm as communication
import torch
from parity import PAIRS, batch_of, configuration, pairs_of
from torch import Tensor

from meter_fast.config import EngineConfig, RunConfig
from meter_fast.interop import original_name
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss, counts_of
from meter_fast.plan.communication import collectives
from meter_fast.training import world as worlds
from meter_fast.training.engine import DS_CONFIGS, Engine
from meter_fast.training.memory import memory_of, sizes_of

OPERATIONS = ("all_reduce", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
              "all_to_all_single")  # fmt: skip


@contextmanager
def sent(processes: int) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Bytes of the whole tensors that DeepSpeed hands to its collectives, by kind: of all, and of the largest."""
    found: dict[str, int] = {}
    largest: dict[str, int] = {}
    backend = communication.cdb
    originals = {name: getattr(backend, name) for name in OPERATIONS if hasattr(backend, name)}

    def counting(name: str):
        def call(*args, **kwargs):
            first = next(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))  # the result
            whole = first.nbytes * (processes if name == "reduce_scatter_tensor" else 1)
            kind = name.removesuffix("_tensor").removesuffix("_into")
            found[kind] = found.get(kind, 0) + whole
            largest[kind] = max(largest.get(kind, 0), whole)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(backend, name, counting(name))
    try:
        yield found, largest
    finally:
        for name in originals:
            delattr(backend, name)


def storages() -> dict[int, torch.UntypedStorage]:
    """All storages on the CPU that tensors of this process have, by place. While the result is held, no other storage
    can take one of these places."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.device.type == "cpu"}
    found.pop(0, None)
    return found


def with_file(case: dict, path: Path) -> RunConfig:
    """The configuration of a case: a DeepSpeed file with the case's entries over those of the stage."""
    content = json.loads((DS_CONFIGS / f"zero{case['zero']}.json").read_text())
    content["zero_optimization"].update(case["file"])
    path.write_text(json.dumps(content))
    engine = EngineConfig(
        zero=case["zero"], dtype=case["dtype"], global_batch=PAIRS, micro_batch=2, ds_config=str(path)
    )  # fmt: skip
    return replace(configuration(0.0), engine=engine)


def look(out: str, cases: list[dict]) -> int:
    """Three steps of each case, of which the last is looked at. Stage 3 comes last: it changes torch for the rest."""
    world = worlds.start(240)
    results = []
    for case in sorted(cases, key=lambda case: case["zero"]):
        config = with_file(case, Path(out).with_suffix(f".ds-{world.rank}.json"))
        steps = []
        for step in range(3):
            pairs = pairs_of(step)
            firsts = [(a * world.size + world.rank) * 2 for a in range(PAIRS // 2 // world.size)]
            steps.append([batch_of(pairs[first : first + 2]) for first in firsts])
        torch.manual_seed(0)
        model = Meter(config.model)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        before = {place: storage for place, storage in storages().items() if place not in own}
        engine = Engine(JointLoss(model), config, world, original_name, start if world.is_main else None)
        kept, whole = [], []
        backward = engine._engine.backward

        def watched(loss, case=case, backward=backward, kept=kept, whole=whole, model=model, before=before):
            if case["zero"] == 3:
                there = [p.ds_numel for p in model.parameters() if p.ds_status.name == "AVAILABLE"]
                whole.append(sum(there) / sum(p.ds_numel for p in model.parameters()))
            result = backward(loss)
            kept.append(sum(held.nbytes() for place, held in storages().items() if place not in before))
            return result

        engine._engine.backward = watched
        for step, batches in enumerate(steps):
            counts = counts_of(engine.objectives, batches)
            counts = dict(zip(counts, world.sum(list(counts.values())), strict=True))
            kept.clear()
            whole.clear()
            with sent(world.size) as (found, largest):
                engine.step(step, batches, counts)
        sizes = sizes_of(config)
        expected = memory_of(config, world.size, sizes, None)
        results.append({
            **case, "sent": found, "largest": largest, "kept": kept[0], "whole": whole,
            "numbers": sizes.trained, "tensor": max(sizes.tensors),
            "planned": [asdict(one) | {"total": one.total} for one in collectives(config, sizes, world.size)],
            "state": expected.state, "buckets": expected.buckets, "gathered": expected.gathered,
        })  # fmt: skip
        del engine, backward, watched, model
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    return 0
