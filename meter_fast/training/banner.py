"""What a run says of itself before it starts: devices, back ends, sizes, data coverage, arithmetic of the global batch.

Knows how to word facts. Knows nothing of where they go: rows (label, value) for the monitor.
"""

import os
import platform

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from meter_fast.config import RunConfig
from meter_fast.data.cell_masking import CellMasking
from meter_fast.data.images import ImageBackend
from meter_fast.data.sources import Sources
from meter_fast.kernels.varlen_attention import varlen_backend
from meter_fast.models.config import PARTS
from meter_fast.models.meter import Meter
from meter_fast.models.text import can_pack
from meter_fast.training.activations import NotTraced
from meter_fast.training.engine import DTYPES, Engine
from meter_fast.training.memory import estimate_memory
from meter_fast.training.pairs import Pairs
from meter_fast.training.resume import Start, checkpoints_of
from meter_fast.training.world import World

Row = tuple[str, str]


BIG = 1e9  # bytes of weights, gradients and optimizer; of smaller runs the passes, which take seconds, are not traced


def rows(
    config: RunConfig, world: World, engine: Engine, pairs: Pairs, start: Start, model: Meter, memory: str
) -> list[Row]:
    """All rows of the start banner. memory: as `memory` says."""
    said = [
        ("run", config.run.dir),
        ("devices", f"{world.size} x {_device(world.device)}, {dist.get_backend()}"),
        ("model", _parameters(model)),
        ("kernels", kernels(config, world.device.type, model) if isinstance(model, Meter) else ""),
        ("engine", precision(config)),
        ("memory", memory),
        ("global batch", _batch(config, engine, world, pairs)),
        ("steps", f"{config.run.max_steps:,}, warm-up {engine.schedule.warmup_steps:,}, starting at {start.step:,}"),
        ("starts from", "\n".join([start.origin, *start.notes])),
        ("data", _coverage(pairs.sources)),
        ("held out", _coverage(pairs.held_out) if pairs.held_out else "none: data.val_sources is empty"),
        ("pictures", _pictures(config, pairs.backend)),
        ("text", _text(config, pairs)),
        ("objectives", _objectives(config, pairs)),
        ("checkpoints", f"{checkpoints_of(config.run.dir)}, every {config.run.save_every:,} steps, the last "
                        f"{config.run.keep_last} and the best kept, "
                        f"{'written beside the steps' if config.run.async_save else 'steps wait for them'}"),
    ]  # fmt: skip
    return [row for row in said if row[1]]


def memory(config: RunConfig, world: World) -> str:
    """What the run will take on each process; to be asked before there is an engine, as ZeRO-3 changes torch."""
    try:
        need = estimate_memory(config, world.size, world.device, activations=False)
    except NotTraced as error:
        return f"not known: {error}"
    passes = "activations not counted"
    if need.state + need.on_host >= BIG:
        try:
            need = estimate_memory(config, world.size, world.device)
        except NotTraced as error:
            passes = f"activations not known: {error}"
    if need.activations is not None:
        passes = f"activations {amount(need.activations.batch + need.activations.peak)}"
        passes += f" ({amount(need.activations.kept)} between the passes)"
    optimizer = amount(need.masters + need.moments)
    parts = [f"weights {amount(need.weights)}", f"gradients {amount(need.gradients)}"]
    parts += [] if need.host else [f"optimizer {optimizer}"]
    text = f"{amount(need.peak)} a process at most: {', '.join([*parts, passes])}"
    text += f"; {amount(need.on_host)} of host memory, optimizer {optimizer}" if need.host else ""
    return text + f"; {amount(need.saving)} of the main process's host memory while a checkpoint is written"


def amount(size: float) -> str:
    """1234567890 -> "1.23 GB"."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _text(config: RunConfig, pairs: Pairs) -> str:
    if pairs.tokenizer is None:
        return ""
    return f"{len(pairs.tokenizer):,} tokens of {config.data.tokenizer}, up to {config.data.max_text_length} a text"


def _objectives(config: RunConfig, pairs: Pairs) -> str:
    chosen = config.objectives
    parts = [", ".join(chosen.names)]
    if pairs.answers is not None:
        unnamed = f", {pairs.answers.unnamed:,} of them never given" if pairs.answers.unnamed else ""
        parts.append(f"{len(pairs.answers):,} answers{unnamed}")
    if "mlm" in chosen.names:
        parts.append(f"masking {chosen.masking} {chosen.mlm_probability:g}")
    if {"mim_in_batch", "mim_codes"} & set(chosen.names):
        hidden = CellMasking(config.model.vision.grid, chosen.mim_probability).hidden
        parts.append(f"{hidden} of {config.model.vision.grid**2} cells of a picture hidden")
    if "mim_codes" in chosen.names:
        parts.append(f"{config.model.mim_codes_head:,} codes of {chosen.image_tokenizer}")
    if "itm" in chosen.names:
        parts.append(f"false pictures from the {chosen.itm_negatives}")
    if "retrieval" in chosen.names:
        origin = "other pictures" if chosen.false_text_choice == "other_picture" else "the data set"
        parts.append(f"{chosen.false_texts} false texts of {origin} for each picture")
    return "; ".join(parts)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads each)"


def _parameters(model: nn.Module) -> str:
    counts = {
        name: sum(getattr(p, "ds_numel", p.numel()) for p in part.parameters()) for name, part in model.named_children()
    }
    frozen = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if not p.requires_grad)
    text = f"{millions(sum(counts.values()))} parameters: "
    text += ", ".join(f"{name} {millions(count)}" for name, count in counts.items())
    kept = ", or to keep the ITM head" if getattr(model, "rank_head", None) is not None else ""
    return text + (f"; {millions(frozen)} frozen, as no objective reaches them{kept}" if frozen else "")


def millions(count: int) -> str:
    """1234567 -> "1.23 M"."""
    return f"{count / 1e6:.3g} M"


def kernels(config: RunConfig, device: str, model: Meter) -> str:
    """What computes a run's operators on a device ("cpu", "cuda"); the model's values are not looked at."""
    chosen = model.kernels
    plain = model.attention_backends(device, config.engine.dtype == "bf16", config.data.max_text_length)
    parts = ["attention " + ", ".join(f"{part} {form}" for part, form in plain.items())]
    if config.model.fusion.name == "co_attention":
        parts.append(f"cross-attention {chosen.cross_attention}, {chosen.cross_attention_form} form")
    texts = chosen.text
    if texts == "packed":
        if can_pack(model.text):
            texts += f" ({varlen_backend(device, DTYPES[config.engine.dtype], config.model.text.dropout)})"
        else:
            texts += f" in the fusion, padded in the encoder, as the attention of {config.model.text.name} needs"
    parts += [
        f"texts {texts}",
        f"MLM loss {chosen.mlm_loss}",
        f"residual norm {chosen.residual_norm}",
        f"GELU {chosen.gelu}",
    ]
    return "; ".join(parts)


def precision(config: RunConfig) -> str:
    """Stage and dtypes of a run, and what else its engine does."""
    settings = config.engine
    parts = [f"DeepSpeed {deepspeed.__version__}, ZeRO {settings.zero}"]
    parts.append("bf16 with fp32 master weights" if settings.dtype == "bf16" else "fp32")
    if settings.offload == "cpu":
        parts.append("optimizer in host memory")
    if settings.activation_checkpointing:
        some = settings.checkpointed_parts != PARTS
        parts.append("activation checkpointing" + (f" of {', '.join(settings.checkpointed_parts)}" if some else ""))
    if settings.compile:
        parts.append("compiled blocks")
    return ", ".join(parts)


def _batch(config: RunConfig, engine: Engine, world: World, pairs: Pairs) -> str:
    settings = config.engine
    parts = f"{world.size} processes x {settings.micro_batch} x {engine.accumulation} accumulated"
    if config.data.questions == "by_picture":
        each = f"{pairs.samples_a_draw:.3g} questions, {config.data.questions_per_picture} at most"
        return f"{settings.global_batch:,} pictures = {parts}; each with {each}"
    return f"{settings.global_batch:,} pairs = {parts}"


def _coverage(sources: Sources) -> str:
    lines = []
    total = sum(sources.weights) if sources.weights else 0
    for number, row in enumerate(sources.coverage()):
        line = f"{row['source']}: {row['files']:,} files, {row['pictures']:,} {row.get('shown', 'pictures')}, "
        line += f"{row['captions']:,} {row.get('texts', 'captions')}"
        if row["duplicates"]:
            line += f" ({row['duplicates']:,} duplicates left out)"
        if row.get("unanswered"):
            line += f" ({row['unanswered']:,} without answers left out)"
        if total and number < len(sources.weights):
            line += f", {100 * sources.weights[number] / total:.3g} % of samples"
        if row["missing"]:
            line += f"; not there: {', '.join(row['missing'][:4])}{' ...' if len(row['missing']) > 4 else ''}"
        for name, found in list(row["problems"].items())[:4]:
            line += f"; {name}: {', '.join(f'{count} {cause}' for cause, count in found.items())}"
        lines.append(line)
    return "\n".join(lines)


def _pictures(config: RunConfig, backend: ImageBackend) -> str:
    size = backend.transform.size
    text = f"{backend.name}: {config.data.transform} at {size} px, up to {config.data.max_image_pixels / 1e6:.3g} Mpx"
    return text + (f", {config.data.augment} in training" if config.data.augment != "none" else "")
