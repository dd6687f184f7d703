"""What one step of a run computes: operations of a sample, pictures of a sample. From shapes alone.

Knows settings, what each task trains, and how a GPU would choose kernels; nothing of machines' rates or of memory.
"""

from dataclasses import dataclass, replace

from meter_fast.config import RunConfig
from meter_fast.flops import count_flops
from meter_fast.kernels.cross_attention.absorbed import absorbed_pays
from meter_fast.kernels.launch import Arch
from meter_fast.models.meter import TRITON_HEADS
from meter_fast.training.activations import NotTraced, largest_batch, module_without_values
from meter_fast.training.engine import DTYPES


@dataclass(frozen=True)
class StepCost:
    """Of one sample: FLOPs of both passes, of the forward pass alone, and of both with activation checkpointing;
    pictures that are decoded."""

    flops: float
    forward: float
    checkpointed: float
    pictures: float


def on_gpu(config: RunConfig, text_length: int, capability: int) -> RunConfig:
    """The configuration with the kernels that a GPU of this compute capability takes for texts of `text_length`, chosen
    by the rules of the model; texts padded, as packing depends on values."""
    fusion, kernels = config.model.fusion, config.kernels
    triton = fusion.width // fusion.heads in TRITON_HEADS
    kernels = replace(kernels.settle(triton), text="padded")
    if fusion.name == "merged_attention" and not config.model.decoder.layers:
        kernels = replace(kernels, cross_attention="reference", cross_attention_form="direct")
    elif kernels.cross_attention_form == "auto":
        pays = absorbed_pays(text_length, config.model.vision.tokens, fusion.heads, fusion.width, Arch(capability))
        kernels = replace(kernels, cross_attention_form="absorbed" if pays else "direct")
    return replace(config, kernels=kernels)


def step_cost(config: RunConfig, tokens: int, capability: int) -> StepCost:
    """Of a micro-batch of texts of `tokens` tokens. config: with the sizes that the data tell. Raises NotTraced where
    shapes depend on values.

    Matrix products alone are counted, as torch does, with the plain operators: the kernels do the same ones."""
    length = min(tokens, config.data.max_text_length)
    kernels = on_gpu(config, length, capability).kernels
    kernels = replace(kernels, **dict.fromkeys(("cross_attention", "mlm_loss", "residual_norm", "gelu"), "reference"))
    config = replace(config, kernels=kernels, data=replace(config.data, max_text_length=length))
    module = module_without_values(config).to(DTYPES[config.engine.dtype])
    batch = largest_batch(config).to("meta", DTYPES[config.engine.dtype])
    totals = dict.fromkeys(config.objectives.names, 1.0)
    rows = config.engine.micro_batch

    def passes() -> None:
        module.zero_grad(set_to_none=True)
        module(batch, totals).loss.backward()

    try:
        forward = count_flops(lambda: module(batch, totals))
        both = count_flops(passes, backward=True)
        module.model.set_activation_checkpointing(True, config.engine.checkpointed_parts)
        checkpointed = count_flops(passes, backward=True)
    except RuntimeError as error:
        raise NotTraced(" ".join(str(error).split())[:200]) from error
    false = 0 if getattr(batch, "false_images", None) is None else len(batch.false_images)
    return StepCost(both / rows, forward / rows, checkpointed / rows, (len(batch.images) + false) / rows)
