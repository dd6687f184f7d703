"""What the processes of step_time and scaling do: an optimizer step, a matrix product, or counting without values.

Knows the engine and the measured cases; knows nothing of other processes and of results.
"""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from meter_fast.kernels.cross_attention.absorbed import absorbed_pays
from meter_fast.kernels.launch import arch_of
from torch import nn
from torch._inductor import config as inductor

from benchmarks.apart import Work
from benchmarks.plain import PLAIN as PLAIN_KERNELS
from benchmarks.plain import PlainLoss, as_published
from benchmarks.step_cases import Plan, configuration, make_batch
from meter_fast.config import RunConfig
from meter_fast.data.batch import Batch
from meter_fast.flops import count_flops
from meter_fast.host_memory import keep_freed_memory
from meter_fast.interop import original_name
from meter_fast.objectives.joint import counts_of
from meter_fast.training import world as worlds
from meter_fast.training.activations import module_without_values
from meter_fast.training.engine import DTYPES, Engine
from meter_fast.training.memory import estimate_memory
from meter_fast.training.tasks import task_of

PLAIN_VARIANT = "plain"
PLAIN = (PLAIN_VARIANT, "plain_kept")
VARIANTS = ("eager", "compiled", "cuda_graphs")
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is the ceiling
PRODUCTS = 8  # of which the fastest counts


def make_step(plan: Plan, variant: str, steps: int = 1) -> Work:
    """An optimizer step by the real engine, one of `world` processes. Gives seconds of one of `steps` steps, the loss
    before the first of all, without dropout, that of the last step, and the largest memory of the steps so far, in
    bytes: of a GPU all of it, of a host what has come since the start.
    """
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # scores in bf16 where all is; torch's default is fp32
    if variant == "cuda_graphs":
        inductor.triton.cudagraphs = True
    world = worlds.start(600)
    before = largest_resident()
    plain = variant in PLAIN
    config = configuration(plan, plain, variant in ("compiled", "cuda_graphs"))
    torch.manual_seed(0)
    engine, batch = _engine(config, world, plain), published_or_ours(plan, config, plain)
    counts = {name: float(count * plan.world) for name, count in counts_of(engine.objectives, [batch]).items()}
    loss = _loss(engine, batch.to(world.device, engine.dtype))
    cuda, taken = world.device.type == "cuda", 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_largest_resident()
        if variant != PLAIN_VARIANT:
            keep_freed_memory()

    def step() -> object:
        nonlocal taken
        if variant == "cuda_graphs":
            torch.compiler.cudagraph_mark_step_begin()
        taken += 1
        return engine.step(taken - 1, [batch], counts)

    def work() -> dict[str, float]:
        if cuda:
            step()  # asks the device again for what was given back
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            record = step()
        last = sum(record.read().losses.values())
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begun) / steps
        peak = torch.cuda.max_memory_allocated() if cuda else largest_resident() - before
        if cuda:
            torch.cuda.empty_cache()  # the other side gets the room
        return {"seconds": seconds, "loss": loss, "last_loss": last, "peak": float(peak)}

    return work


def _loss(engine: Engine, batch: Batch) -> float:
    """Of this process's batch, without dropout."""
    with torch.no_grad():
        return engine.evaluated().eval()(batch).loss.item()


def _engine(config: RunConfig, world: worlds.World, plain: bool) -> Engine:
    """Around random weights, the same for the same sizes."""
    task = task_of(config.objectives.names)
    module: nn.Module = task.module(task.make(config, False), config)
    if plain:
        module = PlainLoss(module.model, config.objectives.names)
    masters = None
    if config.engine.dtype != "fp32":
        masters = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    return Engine(module, config, world, original_name, masters)


def published_or_ours(plan: Plan, config: RunConfig, plain: bool) -> Batch:
    batch = make_batch(plan, config)
    return as_published(batch, plan.case.padded, config.model.text.pad_id) if plain else batch


def largest_resident() -> int:
    """Bytes of this process's memory at its largest so far. Linux alone tells it: ru_maxrss begins with what the
    process had that started this one."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[1])


def forget_largest_resident() -> None:
    """From now on `largest_resident` is what comes: building takes more than steps do. Linux, see proc(5)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def make_yardstick(plan: Plan) -> Work:
    """The fastest of some products of large square matrices, the FLOP/s that the device reaches at its best; and beside
    it `counts(plan)`."""
    known = counts(plan)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(DTYPES[plan.dtype]) for _ in range(2))

    def seconds() -> float:
        begun = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return lambda: {"flop_rate": 2 * side**3 / min(seconds() for _ in range(PRODUCTS)), **known}


def counts(plan: Plan) -> dict[str, float]:
    """What is known without values: FLOPs of forward and backward of one process's step, plain and ours, and bytes by
    the estimate of the start banner: at the peak, kept by autograd, and what is there all the time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = estimate_memory(configuration(plan), plan.world, device)
    return {
        "plain": float(step_flops(plan, True)),
        "fast": float(step_flops(plan, False)),
        "estimated_peak": float(memory.peak),
        "activations": float(memory.activations.kept),
        "state": float(memory.state),
    }


def step_flops(plan: Plan, plain: bool) -> int:
    """FLOPs of forward and backward of one process's micro-batch, by shapes alone; ours with texts padded to the
    longest, in the form of cross-attention that this machine's device takes."""
    config = configuration(plan, plain)
    if not plain:
        config = replace(config, kernels=replace(PLAIN_KERNELS, cross_attention_form=_form(plan, config)))
    module: nn.Module = module_without_values(config)
    if plain:
        module = PlainLoss(module.model, config.objectives.names)
    module.train().to(DTYPES[plan.dtype])
    batch = published_or_ours(plan, config, plain).to("meta", DTYPES[plan.dtype])
    totals = dict.fromkeys(config.objectives.names, 1.0)
    work: Callable[[], object] = lambda: module(batch, totals).loss.backward()  # noqa: E731
    return count_flops(work, backward=True)


def _form(plan: Plan, config: RunConfig) -> str:
    """On a CPU each layer decides as it does in the run; without values it would decide for a CPU on a GPU, too."""
    if not torch.cuda.is_available():
        return "auto"
    fusion, arch = config.model.fusion, arch_of(torch.empty(0, device="cuda"))
    pays = absorbed_pays(plan.longest, config.model.vision.tokens, fusion.heads, fusion.width, arch)
    return "absorbed" if pays else "direct"
