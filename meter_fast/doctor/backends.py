"""What a run of the asked recipe would compute with on this host, and whether that works: small pictures are decoded, a
small kernel is compiled and run, sizes are compared with memory.

Knows which code chooses each back end and asks it; has no rules of its own for what is chosen.
"""

import io
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from meter_fast.config import ConfigError, RunConfig
from meter_fast.doctor.disks import existing
from meter_fast.doctor.finding import Asked, Finding, amount, fine, unknown
from meter_fast.recipes import resolve

if TYPE_CHECKING:
    import torch
    from torch import nn


def device(asked: Asked) -> Iterator[Finding]:
    """Where a run computes and over what its processes speak, as DeepSpeed chooses."""
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator()
    forced = os.environ.get("DS_ACCELERATOR")
    why = f"DS_ACCELERATOR={forced}" if forced else "found by DeepSpeed"
    yield fine("device", f"{chosen.device_name()}, {chosen.communication_backend_name()}; {why}", "fails")


def kernels(asked: Asked) -> Iterator[Finding]:
    """Which implementation each operator takes, and why."""
    from meter_fast.kernels.launch import is_interpreted
    from meter_fast.models.meter import Meter, suits_triton
    from meter_fast.training import banner

    config = resolve(asked.command)
    if is_interpreted():
        yield Finding("Triton", "remark", "TRITON_INTERPRET is set: kernels run in the interpreter, slowly",
                      "unset TRITON_INTERPRET", "fails")  # fmt: skip
    try:
        model = _model(asked.command)
    except ValueError as error:
        yield Finding("kernels", "fails", str(error), "see the settings that it names", "fails")
        return
    if isinstance(model, Meter):
        takes, why = suits_triton(config.model.fusion.width // config.model.fusion.heads)
        text = banner.kernels(config, _device().type, model)
        chosen = "Triton and packed texts" if takes else "torch's operators and padded texts"
        yield fine("kernels", f"{text}; auto takes {chosen}: {why}", "fails")


def flash_attention(asked: Asked) -> Iterator[Finding]:
    """Whether an installed flash-attn, which packed texts would take, can be imported."""
    from meter_fast.kernels.varlen_attention import FLASH_ATTN

    if FLASH_ATTN:
        try:
            import flash_attn  # noqa: F401
        except (ImportError, OSError) as error:
            remedy = "pip uninstall flash-attn, or build it anew for this torch"
            used = _device().type == "cuda"
            yield Finding("flash-attn", "fails" if used else "remark", f"installed, but not to be imported: {error}",
                          remedy, "fails")  # fmt: skip
            return
        yield fine("flash-attn", "can be imported", "remark")


def compiled_kernel(asked: Asked) -> Iterator[Finding]:
    """Where Triton is chosen: a small kernel, compiled here and compared with the plain form."""
    import torch

    from meter_fast.kernels.gelu import op, reference

    model, place = _model(asked.command), _device()
    if place.type != "cuda" or getattr(getattr(model, "kernels", None), "gelu", "") != "triton":
        return
    x, bias = torch.randn(32, 256, device=place), torch.randn(256, device=place)
    try:
        off = (op.bias_gelu(x, bias) - reference.bias_gelu(x, bias)).abs().max().item()
    except Exception as error:  # whatever a compiler says
        yield Finding("Triton", "fails", f"a kernel does not compile or run: {' '.join(str(error).split())[-300:]}",
                      "see the compilers below; kernels.*=reference does without", "remark")  # fmt: skip
        return
    if off > 1e-4:
        yield Finding("Triton", "fails", f"a kernel's result is off by {off:.2g}", "kernels.*=reference, and another "
                      "Triton or driver", "remark")  # fmt: skip
    else:
        yield fine("Triton", "a kernel compiles, runs and is right")


def pictures(asked: Asked) -> Iterator[Finding]:
    """What decodes pictures: it is opened and decodes a JPEG and a PNG."""
    import numpy as np
    import torch
    from PIL import Image

    from meter_fast.data.images import image_transform, open_backend

    config, encoded = resolve(asked.command), []
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (64, 48), (200, 100, 50)).save(file, kind)
        encoded.append(np.frombuffer(file.getvalue(), np.uint8))
    transform = image_transform(config.data.transform, config.model.vision.image_size)
    try:
        backend = open_backend(config.data.backend, transform, _device(), torch.float32, max_batch=4)
        backend.decode(encoded)
    except (ValueError, RuntimeError) as error:
        yield Finding("pictures", "fails", str(error), "data.backend=torchvision does without DALI", "fails")
        return
    yield fine("pictures", f"{backend.name} on {backend.device.type}; data.backend={config.data.backend}", "fails")
    backend.close()


def precision(asked: Asked) -> Iterator[Finding]:
    """The dtype that computes, and whether the device has it."""
    from deepspeed.accelerator import get_accelerator

    from meter_fast.training import banner

    config = resolve(asked.command)
    text = banner.precision(config)
    if config.engine.dtype == "bf16" and not get_accelerator().is_bf16_supported():
        yield Finding("precision", "fails", f"{text}; this device has no bf16", "engine.dtype=fp32", "fails")
    else:
        yield fine("precision", text, "fails")


def batch(asked: Asked) -> Iterator[Finding]:
    """Whether the global batch divides among the processes, and the DeepSpeed file can be read."""
    from meter_fast.training.engine import deepspeed_config

    config, world = resolve(asked.command), asked.world or asked.processes
    try:
        settings = deepspeed_config(config, world)
    except ConfigError as error:
        text, _, remedy = str(error).partition("What divides: ")
        yield Finding("global batch", "fails", text.strip(), remedy or "see the text", "fails")
        return
    engine = config.engine
    yield fine("global batch", f"{engine.global_batch:,} = {world} processes x {engine.micro_batch} x "
               f"{settings['gradient_accumulation_steps']} accumulated")  # fmt: skip


def memory(asked: Asked) -> Iterator[Finding]:
    """What a process takes, against what its device and this host have."""
    import psutil
    import torch

    from meter_fast.training.activations import NotTraced
    from meter_fast.training.memory import estimate_memory

    config, place, here = resolve(asked.command), _device(), asked.processes
    world = asked.world or here
    try:
        need = estimate_memory(config, world, place)
    except NotTraced as error:
        yield unknown("memory", f"activations are not known: {error}")
        need = estimate_memory(config, world, place, activations=False)
    has = (
        torch.cuda.get_device_properties(place).total_memory if place.type == "cuda" else psutil.virtual_memory().total
    )
    share = 1 if place.type == "cuda" else here
    text = f"{amount(need.peak)} a process of {amount(has)}{f' for {here} processes' if share > 1 else ''}"
    yield _fits("device memory", need.peak * share, has, text, "a smaller engine.micro_batch, "
                "engine.activation_checkpointing=true, engine.zero=3 or engine.offload=cpu")  # fmt: skip
    if need.on_host:
        total = psutil.virtual_memory().total
        text = f"{here} x {amount(need.on_host)} of optimizer state, of {amount(total)}"
        yield _fits("host memory", need.on_host * here, total, text, "engine.offload=none, or more hosts")


def _fits(name: str, need: float, has: float, text: str, remedy: str) -> Finding:
    if need > has:
        return Finding(name, "fails", text, remedy)
    return Finding(name, "remark", f"{text}: tight", remedy) if need > 0.9 * has else fine(name, text)


def checkpoints(asked: Asked) -> Iterator[Finding]:
    """Room for them in the run directory: those kept, the best one and the one being written."""
    from meter_fast.training.resume import expected_bytes

    config = resolve(asked.command)
    size = expected_bytes(sum(p.numel() for p in _model(asked.command).parameters()))
    folder = existing(asked.run_dir)
    free, most = shutil.disk_usage(folder).free, config.run.keep_last + 2
    text = f"{amount(size)} each, up to {most} at once, {amount(free)} free"
    remedy = f"make room on {folder}, another run.dir, or a lower run.keep_last"
    if free < size:
        yield Finding("checkpoints", "fails", text, remedy)
    elif free < most * size:
        yield Finding("checkpoints", "remark", text, remedy)
    else:
        yield fine("checkpoints", text)


def _device() -> "torch.device":
    import torch
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().device_name())


@lru_cache(1)
def _model(command: tuple[str, ...]) -> "nn.Module":
    """Without values. Raises ValueError where kernels do not fit it."""
    import torch

    from meter_fast.training.tasks import task_of

    config: RunConfig = resolve(command)
    with torch.device("meta"):
        return task_of(config.objectives.names).make(config, False)


PROBES = (device, kernels, flash_attention, compiled_kernel, pictures, precision, batch, memory, checkpoints)
