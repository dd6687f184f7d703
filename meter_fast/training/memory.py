"""How much memory a run takes on each process, before it takes any. Knows settings and what DeepSpeed keeps of a model;
the passes are traced by activations.py.

Source of the parts that ZeRO divides: Rajbhandari et al. 2020, figure 1, and DeepSpeed 0.19 as this engine uses it:
gradients of bf16 weights are added up in fp32 (stage 1 keeps the sums whole, and the gradients beside them), and from
stage 1 on the optimizer has fp32 masters of its own, with fp32 weights, too. ZeRO-3 keeps weights that it has gathered
in the forward pass for the backward pass, unless `stage3_max_reuse_distance` numbers lie between: of a model of METER's
size, all of them. Not counted: the memory pool of the device's own (fragments, CUDA context) and what the loader keeps
ahead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from meter_fast.config import RunConfig
from meter_fast.training.activations import Activations, module_without_values, most_texts, trace_activations
from meter_fast.training.checkpoint import FILE_BYTES
from meter_fast.training.engine import DTYPES, deepspeed_config
from meter_fast.training.layer_decay import layers_above
from meter_fast.training.optimizer import parameter_groups
from meter_fast.training.resume import expected_bytes
from meter_fast.training.tasks import task_of

REUSE_DISTANCE = 1_000_000_000  # numbers; DeepSpeed's default of stage3_max_reuse_distance
FLATTENED = 12  # bytes a number: copies of the gradients that are reduced at once; 10 to 13 were seen on two processes


@dataclass(frozen=True)
class Memory:
    """Bytes of one process's device, or of its host where `host` says so.

    weights: in the run's dtype, frozen ones included. gradients: what is added up over micro-batches. masters: fp32
    weights of the optimizer. moments: of Adam. buckets: where gradients wait to be reduced (stages 2 and 3). gathered:
    whole weights during the passes (stage 3). update: what the optimizer needs for a moment for its largest group, or
    what flattening all gradients takes before it (stages 0 and 1). logits: fp32, a part of the activations.
    activations: of the largest micro-batch, None where they are not known. host: masters, moments and update are in
    host memory. saving: of the main process's host, while a checkpoint is written (see saving.py).
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    buckets: int
    gathered: int
    update: int
    logits: int
    activations: Activations | None
    host: bool
    saving: int

    @property
    def state(self) -> int:
        """What is there for the whole run, on the device."""
        return self.weights + self.gradients + (0 if self.host else self.masters + self.moments)

    @property
    def on_host(self) -> int:
        """What offloading moves to the host: the optimizer's state and the gradients that it reads."""
        return self.masters + self.moments + self.update if self.host else 0

    @property
    def peak(self) -> int:
        """The most that is there at once, on the device: in the passes or in the update."""
        passes = self.buckets + self.gathered
        if self.activations is not None:
            passes += self.activations.batch + self.activations.peak
        return self.state + max(passes, 0 if self.host else self.update)


def estimate_memory(
    config: RunConfig, world_size: int, device: str | torch.device = "cpu", activations: bool = True
) -> Memory:
    """The memory of a run on each of `world_size` processes. config: with the sizes that the data tell.

    activations: trace the passes, which takes seconds (see trace_activations). Raises ConfigError where the DeepSpeed
    file cannot be read, NotTraced where model or passes cannot be traced.
    """
    traced = None
    if activations:
        traced = trace_activations(config, config.engine.activation_checkpointing, device)
    return memory_of(config, world_size, sizes_of(config), traced)


def memory_of(config: RunConfig, world_size: int, sizes: "Sizes", traced: Activations | None) -> Memory:
    """The same where `sizes_of` the model and its activations are known already."""
    trained, everything = sizes.trained, sizes.trained + sizes.frozen
    zero, low = config.engine.zero, DTYPES[config.engine.dtype].itemsize
    settings = deepspeed_config(config, world_size)["zero_optimization"]

    def share(stage: int) -> int:
        return world_size if zero >= stage else 1

    summed = {0: low, 1: 4 + (low if low < 4 else 0)}.get(zero, 4)
    bucket = min(int(settings.get("reduce_bucket_size", 0)), trained) if zero >= 2 else 0
    gathered = 0
    if zero == 3 and world_size > 1:
        gathered = everything if stays_gathered(settings, everything) else min(everything, bucket)
    at_once = trained if zero else min(int(settings.get("reduce_bucket_size", trained)), trained)
    flattened = FLATTENED * at_once if zero < 2 and world_size > 1 else 0
    return Memory(
        weights=everything * low // share(3),
        gradients=trained * summed // share(2),
        masters=4 * trained // share(1) if zero or low < 4 else 0,
        moments=8 * trained // share(1),
        buckets=4 * bucket * (2 if settings.get("overlap_comm") else 1),
        gathered=low * gathered,
        update=max(_update(trained, sizes.largest, zero, low) // share(1), flattened),
        logits=_logits(config),
        activations=traced,
        host=config.engine.offload == "cpu",
        saving=_saving(config, trained, sizes.frozen * low),
    )


def _saving(config: RunConfig, trained: int, frozen: int) -> int:
    """A copy of the state, frozen bytes included, or as much of it as goes into a file; beside it a file being made."""
    file = min(FILE_BYTES, max(4 * trained, frozen))
    return (expected_bytes(trained) + frozen if config.run.async_save else file) + 2 * file


def stays_gathered(settings: Mapping[str, Any], numbers: int) -> bool:
    """Whether ZeRO-3 keeps all weights between forward and backward pass. settings: "zero_optimization" of the file."""
    return 2 * numbers <= int(settings.get("stage3_max_reuse_distance", REUSE_DISTANCE))


def _update(trained: int, largest: int, zero: int, low: int) -> int:
    """Denominators of the largest group, and gradients that DeepSpeed copies for the optimizer: in fp32 a group at
    stage 1 and 2, where bf16 has summed them up in the right place; all of them, as fp32, at stage 0 of bf16."""
    if zero == 0:
        return 4 * largest + (4 * trained if low < 4 else 0)
    return 4 * largest * (2 if low == 4 and zero < 3 else 1)


@dataclass(frozen=True)
class Sizes:
    """Numbers in the weights: trained ones, frozen ones, those of the optimizer's largest group, those of each part of
    the model by name, and those of each tensor."""

    trained: int
    frozen: int
    largest: int
    parts: Mapping[str, int]
    tensors: tuple[int, ...]


def sizes_of(config: RunConfig) -> Sizes:
    """Of the model that a run trains. Raises NotTraced where it cannot be built without values."""
    model = module_without_values(config).model
    above = partial(layers_above, config=config.model)
    name = task_of(config.objectives.names).parameter_name
    groups = parameter_groups(model.named_parameters(), config.optim, name, above)
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    return Sizes(
        trained=sum(counts),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        largest=max(counts, default=0),
        parts={part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()},
        tensors=tuple(p.numel() for p in model.parameters()),
    )


def _logits(config: RunConfig) -> int:
    """Of the largest head alone, in fp32."""
    goals, rows, length = config.objectives, config.engine.micro_batch, config.data.max_text_length
    words = config.model.text.vocab_size
    scores = {
        "mlm": max(1, round(goals.mlm_probability * rows * length)) * words,
        "span_denoising": rows * length * words,
        "caption": rows * length * words,
        "vqa": most_texts(config) * config.model.vqa_answers,
    }
    return 4 * max((scores[name] for name in goals.names if name in scores), default=0)
