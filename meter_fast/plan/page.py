"""A plan as lines for people. Knows the content of the plan; computes nothing."""

from collections.abc import Iterator, Mapping
from typing import Any

from meter_fast.training.banner import amount, millions
from meter_fast.training.monitor import duration, rate

LAUNCHES = 0.03  # seconds of a micro-batch below which launching some thousands of operators tells


def lines(plan: Mapping[str, Any]) -> list[str]:
    """Section after section."""
    sections = (_machine, _model, _memory, _communication, _time, _data, _retrieval, _nodes)
    return [line for section in sections for line in section(plan)]


def _machine(plan: Mapping[str, Any]) -> Iterator[str]:
    machine, assumed, batch, engine = plan["machine"], plan["assumed"], plan["batch"], plan["engine"]
    yield (
        f"{machine['nodes']} nodes of {machine['gpus_per_node']} x {machine['gpu']}: {machine['memory'] / 1e9:g} GB, "
        f"{machine['usable'] / 1e9:.3g} of them for the run, {machine['peak'] / 1e12:g} TFLOP/s at {engine['dtype']}"
    )
    yield (
        f"links each way: {machine['in_node'] / 1e9:g} GB/s of a GPU in its node, {machine['link'] / 1e9:g} GB/s of "
        f"a node; assumed: {100 * assumed['efficiency']:g} % of the GPUs' peak, "
        f"{100 * assumed['link_efficiency']:g} % of the links', texts of {assumed['tokens']} tokens"
    )
    accumulated = f"{machine['gpus']} GPUs x {batch['micro']} x {batch['accumulated']} accumulated"
    yield f"global batch {batch['global']:,} = {accumulated}, ZeRO {engine['zero']}{_kept(engine)}"
    for note in plan["notes"]:
        yield f"note: {note}"


def _kept(engine: Mapping[str, Any]) -> str:
    offload = ", optimizer in host memory" if engine["offload"] == "cpu" else ""
    return offload + (", activation checkpointing" if engine["activation_checkpointing"] else "")


def _model(plan: Mapping[str, Any]) -> Iterator[str]:
    counts, flops = plan["parameters"], plan["flops"]
    parts = ", ".join(f"{name} {millions(count)}" for name, count in counts["parts"].items())
    yield ""
    yield f"parameters  {millions(counts['total'])}, {millions(counts['trained'])} of them trained: {parts}"
    yield (
        f"FLOPs       {_flop(flops['sample'])} a sample (forward {_flop(flops['sample_forward'])}, with activation "
        f"checkpointing {_flop(flops['sample_checkpointed'])}); a step {_flop(flops['step'])}, "
        f"{_flop(flops['step_per_gpu'])} on each GPU"
    )


def _flop(count: float) -> str:
    """354000000000 -> "354 GFLOP"."""
    size, unit = next(
        ((s, u) for s, u in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")) if count >= s), (1e6, "M")
    )
    return f"{count / size:.3g} {unit}FLOP"


def _memory(plan: Mapping[str, Any]) -> Iterator[str]:
    if not plan["memory"]:
        return
    parts = ("weights", "gradients", "optimizer", "buckets", "gathered", "activations", "peak", "host")
    yield ""
    unit = 1e9 if max(row["peak"] for row in plan["memory"]) >= 1e9 else 1e6
    name, micro_batch = "GB" if unit == 1e9 else "MB", plan["batch"]["micro"]
    yield f"memory of a GPU in {name} at micro-batch {micro_batch}, and the largest micro-batch that fits"
    yield f"{'ZeRO':<18}" + "".join(f"{name:>12}" for name in parts) + f"{'largest':>10}{'accumulated':>13}"
    for checkpointing in (False, True):
        if checkpointing:
            yield "with activation checkpointing"
        for row in plan["memory"]:
            if row["activation_checkpointing"] is checkpointing:
                yield _memory_row(row, parts, unit)
    saving = max(row["saving"] for row in plan["memory"])
    yield f"the first process's host takes {amount(saving)} more while a checkpoint is written"


def _memory_row(row: Mapping[str, Any], parts: tuple[str, ...], unit: float) -> str:
    name = f"{row['zero']}{', offload' if row['offload'] == 'cpu' else ''}"
    sizes = "".join(f"{row[part] / unit:>12.2f}" for part in parts)
    best = (
        f"{row['largest_micro_batch']:>10}{row['accumulated']:>13}" if row["largest_micro_batch"] else f"{'none':>10}"
    )
    return f"{name:<18}{sizes}{best}" + ("" if row["fits"] else "  does not fit")


def _communication(plan: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    if plan["machine"]["gpus"] == 1:
        yield "communication  none: one GPU"
        return
    yield f"communication of a step of {plan['batch']['accumulated']} micro-batches"
    yield f"{'ZeRO':<6}{'exchanged':>12}{'sent by a GPU':>16}{'takes':>11}{'waited for':>13}{'step':>10}  exchanges"
    for row in plan["communication"]:
        each = "; ".join(
            f"{one['kind'].replace('_', '-')} of {one['what']} {amount(one['size'])} x {one['times']}"
            for one in row["collectives"]
        )
        yield (
            f"{row['zero']:<6}{amount(row['bytes']):>12}{amount(row['sent_per_gpu']):>16}"
            f"{_short(row['seconds']):>11}{_short(row['exposed_seconds']):>13}{_short(row['step_seconds']):>10}  {each}"
        )


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _time(plan: Mapping[str, Any]) -> Iterator[str]:
    time = plan["time"]
    yield ""
    yield (
        f"step        {_short(time['step'])}: passes {_short(time['compute'])}, waiting for others "
        f"{_short(time['communication'])}, update {_short(time['update'])}; "
        f"{rate(time['samples_per_second'])} samples/s"
    )
    run = f"{time['steps']:,} steps take {duration(time['run'])}" if time["steps"] else "length not known"
    other = f"; 100,000 steps {duration(time['100k_steps'])}" if time["steps"] != 100_000 else ""
    yield f"run         {run}{other}"


def _data(plan: Mapping[str, Any]) -> Iterator[str]:
    data = plan["data"]
    yield (
        f"data        {rate(data['pictures_per_second'])} pictures/s and {data['bytes_per_second'] / 1e6:,.4g} MB/s "
        f"for each node ({data['pictures_per_sample']:g} pictures a sample of {data['picture_bytes'] / 1e3:.3g} KB)"
    )


def _retrieval(plan: Mapping[str, Any]) -> Iterator[str]:
    test = plan["retrieval"]
    if test is not None:
        yield (
            f"retrieval   test of {test['pictures']:,} pictures x {test['captions']:,} captions: "
            f"{_flop(test['pair'])} a pair, {_flop(test['total'])}, {test['seconds'] / 3600:.3g} hours"
        )


def _nodes(plan: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{'nodes':>5}{'micro-batch':>13}{'accumulated':>13}{'step':>10}{'samples/s':>12}{'waiting':>10}"
    for row in plan["nodes"]:
        if not row["micro_batch"]:
            yield f"{row['nodes']:>5}  no micro-batch divides the global batch and fits"
            continue
        short = "  passes so short are bound by launches, not counted" if row["passes"] < LAUNCHES else ""
        yield (
            f"{row['nodes']:>5}{row['micro_batch']:>13}{row['accumulated']:>13}{_short(row['step']):>10}"
            f"{rate(row['samples_per_second']):>12}{100 * row['communication_share']:>8.1f} %{short}"
        )
