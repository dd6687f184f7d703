"""A plan as a whole: one dictionary of plain values, ready for JSON, from the words of a command line.

Knows every part of the plan; nothing of how it is shown.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meter_fast.config import RunConfig
from meter_fast.plan import communication, memory, ranking, supply, timing
from meter_fast.plan.options import Machine, PlanOptions, read_arguments
from meter_fast.plan.step import StepCost, on_gpu, step_cost
from meter_fast.training.activations import NotTraced
from meter_fast.training.engine import accumulation
from meter_fast.training.masked_images import fit_heads
from meter_fast.training.memory import Memory, Sizes, sizes_of
from meter_fast.training.pairs import fit_length

ANSWERS = 3129  # of VQAv2's published label space
CODES = 8192  # of DALL-E's image tokenizer
NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of the chart


@dataclass(frozen=True)
class Known:
    """What is found out once and serves every number of nodes. passes: by activation checkpointing, empty where they
    cannot be traced."""

    config: RunConfig
    options: PlanOptions
    sizes: Sizes
    cost: StepCost
    passes: Mapping[bool, memory.Passes]


def make_plan(argv: Sequence[str]) -> dict[str, Any]:
    """The plan of `["pretrain", "gpu=h100-80g", "nodes=8", ...]`. Bytes, seconds, FLOPs.

    Raises ConfigError for wrong arguments and a global batch that does not divide, ValueError for data that are there
    and cannot be used, NotTraced for a model whose shapes depend on values."""
    config, options, machine = read_arguments(argv)
    accumulated = accumulation(config.engine.global_batch, config.engine.micro_batch, machine.gpus)
    data = supply.look_at(config, options)
    config, notes = _fitted(config, data)
    sizes = sizes_of(config)
    known = Known(
        config, options, sizes, step_cost(config, options.tokens, machine.capability), _passes(config, machine, notes)
    )
    time = _timed(known, config, machine)
    steps = config.run.max_steps or None
    return {
        "command": list(argv),
        "machine": dataclasses.asdict(machine) | {"gpus": machine.gpus},
        "assumed": {name: getattr(options, name) for name in ("efficiency", "link_efficiency", "headroom", "tokens")},
        "notes": notes,
        "parameters": _parameters(sizes),
        "flops": _flops(known, machine),
        "engine": dataclasses.asdict(config.engine),
        "batch": {
            "global": config.engine.global_batch,
            "micro": config.engine.micro_batch,
            "accumulated": accumulated,
        },
        "memory": [_fit(fit) for fit in memory.all_fits(config, machine, sizes, known.passes)],
        "communication": _communication(known, machine),
        "time": _time(time, config, steps),
        "data": _data(data, known, time, machine),
        "retrieval": _retrieval(argv[0], known, machine),
        "nodes": [_at(known, machine, nodes) for nodes in NODES],
    }


def _fitted(config: RunConfig, data: supply.Supply) -> tuple[RunConfig, list[str]]:
    """The configuration with what the data tell of it, or would; and what was assumed."""
    notes = [data.said]
    goals, model = config.objectives, config.model
    if "vqa" in goals.names and not model.vqa_answers:
        notes += [] if data.answers else [f"{ANSWERS:,} answers, as VQAv2's published label space has"]
        config = replace(config, model=replace(model, vqa_answers=data.answers or ANSWERS))
    elif "mim_codes" in goals.names and not Path(goals.image_tokenizer).exists():
        notes.append(f"{goals.image_tokenizer} is not there: {CODES:,} codes, as DALL-E's image tokenizer has")
        config = replace(
            config, model=replace(model, mim_codes_head=CODES, mim_in_batch_head="mim_in_batch" in goals.names)
        )
    elif {"mim_in_batch", "mim_codes"} & set(goals.names):
        config = fit_heads(config)
    return (fit_length(config, data.samples) if data.samples else config), notes


def _passes(config: RunConfig, machine: Machine, notes: list[str]) -> dict[bool, memory.Passes]:
    try:
        return {on: memory.trace_passes(config, machine.capability, on) for on in (False, True)}
    except NotTraced as error:
        notes.append(f"activations are not known, nor what fits: {error}")
        return {}


def _parameters(sizes: Sizes) -> dict[str, Any]:
    return {"total": sizes.trained + sizes.frozen, "trained": sizes.trained, "parts": dict(sizes.parts)}


def _flops(known: Known, machine: Machine) -> dict[str, float]:
    cost, engine = known.cost, known.config.engine
    used = cost.checkpointed if engine.activation_checkpointing else cost.flops
    return {
        "sample": cost.flops,
        "sample_forward": cost.forward,
        "sample_checkpointed": cost.checkpointed,
        "step": used * engine.global_batch,
        "step_per_gpu": used * engine.global_batch / machine.gpus,
    }


def _fit(fit: memory.Fit) -> dict[str, Any]:
    """A row of the memory table, in bytes."""
    return {
        "zero": fit.zero,
        "offload": fit.offload,
        "activation_checkpointing": fit.checkpointing,
        **_parts(fit.memory),
        "fits": fit.fits,
        "largest_micro_batch": fit.largest,
        "accumulated": fit.accumulated,
    }


def _parts(need: Memory) -> dict[str, int]:
    assert need.activations is not None
    return {
        "weights": need.weights,
        "gradients": need.gradients,
        "optimizer": 0 if need.host else need.masters + need.moments,
        "buckets": need.buckets,
        "gathered": need.gathered,
        "activations": need.activations.batch + need.activations.peak,
        "peak": need.peak,
        "host": need.on_host,
        "saving": need.saving,
    }


def _timed(known: Known, config: RunConfig, machine: Machine) -> timing.StepTime:
    sent = communication.collectives(config, known.sizes, machine.gpus)
    options = known.options
    return timing.step_time(
        config, known.sizes, known.cost, sent, machine, options.efficiency, options.link_efficiency
    )  # fmt: skip


def _communication(known: Known, machine: Machine) -> list[dict[str, Any]]:
    """Of every stage with the run's micro-batch."""
    rows = []
    for zero in range(4):
        offload = known.config.engine.offload if zero == known.config.engine.zero else "none"
        config = memory.with_engine(known.config, zero=zero, offload=offload)
        sent = communication.collectives(config, known.sizes, machine.gpus)
        time = _timed(known, config, machine)
        rows.append({
            "zero": zero,
            "collectives": [dataclasses.asdict(one) for one in sent],
            "bytes": sum(one.total for one in sent),
            "sent_per_gpu": sum(one.sent(machine.gpus) for one in sent),
            "seconds": time.sent,
            "exposed_seconds": time.exposed,
            "step_seconds": time.total,
        })  # fmt: skip
    return rows


def _time(time: timing.StepTime, config: RunConfig, steps: int | None) -> dict[str, Any]:
    return {
        "step": time.total,
        "compute": time.compute,
        "communication": time.exposed,
        "update": time.update,
        "samples_per_second": config.engine.global_batch / time.total,
        "steps": steps,
        "run": steps * time.total if steps else None,
        "100k_steps": 100_000 * time.total,
    }


def _data(data: supply.Supply, known: Known, time: timing.StepTime, machine: Machine) -> dict[str, Any]:
    """Rates of a node, pictures and bytes a second."""
    pictures = known.config.engine.global_batch * known.cost.pictures / time.total / machine.nodes
    return {
        "samples": data.samples,
        "pictures_per_sample": known.cost.pictures,
        "picture_bytes": data.picture_bytes,
        "pictures_per_second": pictures,
        "bytes_per_second": pictures * data.picture_bytes,
    }


def _retrieval(recipe: str, known: Known, machine: Machine) -> dict[str, Any] | None:
    """The test of a model with a head that ranks, on all GPUs; None for one without."""
    config, options = known.config, known.options
    if not (config.model.itm_head or config.model.rank_head):
        return None
    pictures, captions = ranking.SPLITS.get(recipe, ranking.SPLITS["retrieval_coco"])
    kernels = on_gpu(config, options.tokens, machine.capability).kernels
    kernels = replace(kernels, **dict.fromkeys(("cross_attention", "mlm_loss", "residual_norm", "gelu"), "reference"))
    flops = ranking.flops_per_pair(config.model, pictures, captions, options.tokens, kernels)
    pairs = pictures * captions
    seconds = flops * pairs / (machine.peak * options.efficiency * machine.gpus)
    return {"pictures": pictures, "captions": captions, "pair": flops, "total": flops * pairs, "seconds": seconds}


def _at(known: Known, machine: Machine, nodes: int) -> dict[str, Any]:
    """The run on so many nodes, with the largest micro-batch that divides and fits; none: None."""
    config, there = known.config, replace(machine, nodes=nodes)
    passes = known.passes.get(config.engine.activation_checkpointing)
    if passes is None:
        return {"nodes": nodes, "micro_batch": None}
    micro_batch = memory.largest_micro_batch(config, there.gpus, known.sizes, passes, there.usable)
    if not micro_batch:
        return {"nodes": nodes, "micro_batch": None}
    sized = memory.with_engine(config, micro_batch=micro_batch)
    time = _timed(known, sized, there)
    return {
        "nodes": nodes,
        "micro_batch": micro_batch,
        "accumulated": accumulation(config.engine.global_batch, micro_batch, there.gpus),
        "step": time.total,
        "passes": time.compute * micro_batch * there.gpus / config.engine.global_batch,
        "samples_per_second": config.engine.global_batch / time.total,
        "communication_share": time.communication_share,
    }
