"""Published METER checkpoints in and out: CLIP ViT or Swin, RoBERTa or BERT, any size. Knows files, no training.

A released `.ckpt` is a file of PyTorch Lightning 1.3: a dict with "state_dict" and, beside it, "hyper_parameters".
Source: METER `modules/meter_module.py`; names and shapes as its `state_dict()` has them.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from meter_fast.interop.names import VISION, original_names
from meter_fast.interop.report import LoadReport
from meter_fast.interop.sizes import TABLE, infer_config
from meter_fast.models.config import ModelConfig
from meter_fast.models.files import read_checkpoint
from meter_fast.models.fusion import fit_token_types, refit
from meter_fast.models.meter import Meter
from meter_fast.models.positions import BIAS_TABLE, fit_positions, resize_positions

NEVER_COMPUTED = (
    "vit_model.positional_embedding",
    "vit_model.ln_final.",
    "text_transformer.pooler.",
    "text_transformer.embeddings.position_ids",
)
PUBLISHED_ENCODERS = ("clip_vit", "swin")
WINDOW_BUFFERS = (".relative_position_index", ".attn_mask")  # of Swin: they follow from the resolution
TOKEN_TYPES = "token_type_embeddings.weight"
CLIP_CONTEXT = 77
CLIP_TEXT_WIDTH = {768: 512, 1024: 768}  # of CLIP's own text encoder, by the width of its ViT


# Classes that Lightning names in its files. A plain dict takes their place: it holds what the file says and does
# nothing.
LIGHTNING_CLASSES = tuple(
    (OrderedDict, f"pytorch_lightning.{name}")
    for name in (
        "callbacks.model_checkpoint.ModelCheckpoint",
        "callbacks.lr_monitor.LearningRateMonitor",
        "utilities.parsing.AttributeDict",
    )
)


def from_meter(
    source: str | Path | Mapping[str, object],
    *,
    image_size: int | None = None,
    text_heads: int | None = None,
    fusion_heads: int | None = None,
    config: ModelConfig | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[Meter, LoadReport]:
    """Our model with the weights of a published checkpoint, in float32 on the CPU (or where the tensors are).

    source: a file, the dict it holds, or a state dict. image_size: another resolution than the file's (position
    tables are resized). config: the whole configuration, instead of inferring it; with another number of token types
    than the file's, these are fitted (`fit_token_types`). allow_missing, allow_unexpected:
    beginnings of published names that may lack or be left over. Raises ValueError for a file that is damaged, asks to
    run code or is no METER, and for every tensor that is missing, left over or of another shape.
    """
    where = f"{source}: " if isinstance(source, (str, Path)) else ""
    content = read_checkpoint(source, LIGHTNING_CLASSES) if isinstance(source, (str, Path)) else source
    try:
        state, published = _open(content)
        if config is None:
            config = infer_config(state, published, text_heads, fusion_heads, image_size)
        _must_co_attend(config)
        return _build(state, config, tuple(allow_missing), tuple(allow_unexpected))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def to_meter(model: Meter, unused: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the published code for our model, float32: all names, those it never computes with too.

    unused: values of these (`LoadReport.unused`); without them: zeros, LayerNorm 1 and 0, position_ids 0, 1, 2, ...
    Tensors lie where the model's do and share no memory with it. Raises ValueError for a model with merged attention,
    or a vision encoder that the published code does not have.
    """
    _must_co_attend(model.config)
    if model.config.vision.name not in PUBLISHED_ENCODERS:
        raise ValueError(
            f"the published code has no vision encoder of the kind {model.config.vision.name!r}, only "
            f"{' and '.join(PUBLISHED_ENCODERS)}: keep this model as an export folder"
        )
    state = {name: part.float().clone() for name, part in to_published(model.state_dict()).items()}
    for name, value in _never_computed(model).items():
        state[name] = value
    for name, value in (unused or {}).items():
        if not name.endswith(WINDOW_BUFFERS):
            state[name] = value.clone()
    return state


def to_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our parameter names (weights, gradients, moments) -> by the published names, in the published shapes.

    Where one of ours stands for several, each gets its share; the results are views.
    """
    published: dict[str, Tensor] = {}
    for name, value in tensors.items():
        theirs = original_names(name)
        for their_name, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            published[their_name] = part.reshape(_their_shape(their_name, part))
    return published


def _must_co_attend(config: ModelConfig) -> None:
    if config.decoder.layers:
        raise ValueError(
            f"model.decoder.layers={config.decoder.layers}: published METER checkpoints have no decoder; keep this "
            "model as an export folder"
        )
    if config.fusion.name != "co_attention":
        raise ValueError(
            f"model.fusion.name={config.fusion.name}: published METER checkpoints have co-attention layers, which a "
            "model of another fusion cannot take or give; use model.fusion.name=co_attention, or for your own model "
            "its export folder"
        )


def _open(content: Mapping[str, object]) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """(state dict, METER's configuration or {}) of a Lightning dict or a bare state dict."""
    published: Mapping[str, object] = {}
    if isinstance(content.get("state_dict"), Mapping):
        parameters = content.get("hyper_parameters")
        if isinstance(parameters, Mapping):
            inner = parameters.get("config", parameters)
            published = inner if isinstance(inner, Mapping) else {}
        content = content["state_dict"]
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if len(state) < len(content):
        strange = [f"{name} ({type(value).__name__})" for name, value in content.items() if str(name) not in state]
        raise ValueError(f"this is no METER checkpoint: not all of it are tensors: {', '.join(strange[:4])}")
    return state, published


def _build(
    state: dict[str, Tensor], config: ModelConfig, allow_missing: tuple[str, ...], allow_unexpected: tuple[str, ...]
) -> tuple[Meter, LoadReport]:
    device = next(iter(state.values())).device if state else torch.device("cpu")
    with torch.device(device):
        model = Meter(config, load_weights=False)
    left = dict(state)
    own_names = {theirs for name in model.state_dict() for theirs in original_names(name)}
    unused = {
        name: left.pop(name)
        for name in state
        if name not in own_names and (name.startswith(NEVER_COMPUTED) or name.endswith(WINDOW_BUFFERS))
    }
    matched, missing, problems, notes = [], [], [], []
    values: dict[str, Tensor] = {}
    resized: list[tuple[str, int, int]] = []
    for name, own in model.state_dict().items():
        theirs = original_names(name)
        absent = [their_name for their_name in theirs if their_name not in left]
        if absent:
            missing += absent
            continue
        parts = [left.pop(their_name) for their_name in theirs]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if theirs[0] == TABLE or theirs[0].endswith(BIAS_TABLE):
            value, before = _resized(value, own, config.vision.grid, theirs[0]), value
            if len(value) != len(before):
                resized.append((theirs[0], len(before), len(value)))
        if theirs[0] == TOKEN_TYPES and len(value) != len(own):
            notes.append(refit(theirs[0], len(value), len(own)))
            value = fit_token_types(value, len(own))
        if value.dim() < own.dim() and value.shape == own.shape[own.dim() - value.dim() :]:
            value = value.reshape(own.shape)
        if value.shape != own.shape:
            problems.append(f"{theirs[0]} is {tuple(value.shape)}, the model's {name} is {tuple(own.shape)}")
            continue
        values[name] = value
        matched += theirs
    problems += [f"{name} is missing" for name in missing if not name.startswith(allow_missing)]
    problems += [
        f"{name} {tuple(left[name].shape)} has no place" for name in left if not name.startswith(allow_unexpected)
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(values, strict=False)
    return model, LoadReport(tuple(matched), tuple(resized), tuple(missing), tuple(left), unused, tuple(notes))


def _resized(table: Tensor, own: Tensor, grid: int, name: str) -> Tensor:
    return resize_positions(table, grid, name) if name == TABLE else fit_positions(table, own.shape, grid, name)


def _their_shape(name: str, value: Tensor) -> tuple[int, ...]:
    """CLIP's class token and position table have no leading dimensions of 1, timm's do."""
    if name == "vit_model.visual.class_embedding":
        return (value.shape[-1],)
    return tuple(value.shape[1:]) if name == TABLE else tuple(value.shape)


def _never_computed(model: Meter) -> dict[str, Tensor]:
    text = model.config.text
    device = model.fusion.text_projection.weight.device
    return _vision_never_computed(model, device) | {
        "text_transformer.pooler.dense.weight": torch.zeros(text.width, text.width, device=device),
        "text_transformer.pooler.dense.bias": torch.zeros(text.width, device=device),
        "text_transformer.embeddings.position_ids": torch.arange(text.max_positions, device=device)[None],
    }


def _vision_never_computed(model: Meter, device: torch.device) -> dict[str, Tensor]:
    """Of CLIP the remains of its text encoder, of Swin the buffers."""
    vision = model.config.vision
    if vision.name != "clip_vit":
        buffers = {n: value.clone() for n, value in model.vision.encoder.named_buffers() if n.endswith(WINDOW_BUFFERS)}
        return {VISION + n: value.float() if value.is_floating_point() else value for n, value in buffers.items()}
    clip_width = CLIP_TEXT_WIDTH.get(vision.width, vision.width // 2)
    return {
        "vit_model.positional_embedding": torch.zeros(CLIP_CONTEXT, clip_width, device=device),
        "vit_model.ln_final.weight": torch.ones(clip_width, device=device),
        "vit_model.ln_final.bias": torch.zeros(clip_width, device=device),
    }
