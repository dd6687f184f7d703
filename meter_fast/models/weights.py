"""Starts the encoders from published weights: a local file or folder, or a hub name. Knows encoders, nothing of METER
files.

Every tensor of a file is copied, resized, or named in the report as left out; what remains unexplained is an error.
"""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from meter_fast.models.clip_names import to_timm
from meter_fast.models.config import TextConfig, VisionConfig
from meter_fast.models.files import read_json, read_tensors
from meter_fast.models.positions import fit_positions, grid_of, is_position_table, resize_positions
from meter_fast.models.text_families import FAMILIES

FILE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
CLASSIFIERS = ("head.", "head_dist.", "aux_head.")
FOLLOW_FROM_SIZES = (".relative_position_index", ".attn_mask", ".num_batches_tracked")
TEXT_LEFT_OUT = (
    "pooler.", "lm_head.", "cls.", "classifier.", "predictions.", "sop_classifier.", "generator_predictions.",
    "generator_lm_head.", "discriminator_predictions.", "lm_predictions.", "mask_predictions.", "vision_model.",
    "visual_projection.", "text_projection.", "logit_scale", "embeddings.position_ids", "embeddings.token_type_ids",
)  # fmt: skip
TEXT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class WeightsReport:
    """What became of a file of encoder weights. `resized` and `left_out` explain in words."""

    what: str
    source: str
    matched: int
    resized: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        notes = "; ".join(self.resized + self.left_out)
        return f"{self.what}: {self.matched} tensors from {self.source}" + (f" ({notes})" if notes else "")


def load_vision_weights(vision: nn.Module, config: VisionConfig) -> WeightsReport:
    """Fills the vision encoder from `config.weights`, in place, any floating dtype.

    CLIP's ViT: OpenAI's or timm's names; a file with one block more than `config.layers` loses its last, as published.
    The others: timm's names or those of the Swin authors. Position tables of another resolution are resized. Raises
    ValueError where the file does not fit, naming the tensor and the setting.
    """
    if config.name != "clip_vit":
        return _load_timm_encoder(vision, config)
    source = str(config.weights)
    tensors = _vision_names(_read_vision(source), source)
    kept, left_out = {}, []
    for name, (ours, value) in tensors.items():
        if ours is None:
            left_out.append(name)
        else:
            kept[ours] = value
    notes = [f"{len(left_out)} other tensors of the file left out: {_few(left_out)}"] if left_out else []
    blocks = 1 + max((int(name.split(".")[1]) for name in kept if name.startswith("blocks.")), default=-1)
    if blocks == config.layers + 1:
        kept = {name: value for name, value in kept.items() if not name.startswith(f"blocks.{config.layers}.")}
        notes.append(f"block {blocks} of {blocks} dropped, as published")
    elif blocks != config.layers:
        raise ValueError(
            f"{source} has {blocks} blocks: set model.vision.layers={blocks - 1} (as published) or {blocks}"
        )
    resized = _fit_vision_shapes(kept, config, source)
    matched = copy_into(vision, kept, source)
    return WeightsReport("vision encoder", source, matched, tuple(resized), tuple(notes))


def _load_timm_encoder(vision: nn.Module, config: VisionConfig) -> WeightsReport:
    source, own = str(config.weights), vision.state_dict()
    tensors = _read_vision(source)
    swin_of_its_authors = "layers.0.downsample.reduction.weight" in tensors
    kept, left_out, notes = {}, [], []
    for name, value in tensors.items():
        if name.startswith(CLASSIFIERS) or name.endswith(FOLLOW_FROM_SIZES):
            left_out.append(name)
            continue
        if (
            swin_of_its_authors and ".downsample." in name
        ):  # there the end of a stage, in timm the beginning of the next
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) + 1}.{rest}"
        elif config.name == "beit" and name.startswith("fc_norm."):
            name = name.removeprefix("fc_")
        kept[f"encoder.{name}"] = value
    resized: dict[tuple, int] = {}
    for name, value in kept.items() if set(kept) == set(own) else ():
        differ = value.shape != own[name].shape and value.shape[-1] == own[name].shape[-1]
        if differ and is_position_table(name):
            kept[name] = fit_positions(value, own[name].shape, config.grid, f"{source}: {name}")
            change = (tuple(value.shape), tuple(own[name].shape))
            resized[change] = resized.get(change, 0) + 1
    if left_out:
        notes.append(f"{len(left_out)} other tensors of the file left out: {_few(left_out)}")
    if config.name == "beit" and "fc_norm.weight" in tensors:
        notes.append("norm after pooling, fc_norm, taken as the norm of the tokens")
    words = [f"{n} position tables resized from {old} to {new}" for (old, new), n in resized.items()]
    return WeightsReport("vision encoder", source, copy_into(vision, kept, source), tuple(words), tuple(notes))


def load_text_weights(text: nn.Module, config: TextConfig) -> WeightsReport:
    """Fills a text encoder from `config.weights`, in place: a hub name, or a folder or file as Hugging Face writes.

    Poolers, language-model heads and, of a whole CLIP, its other half are left out; so are the layers where
    `config.layers` is 0. The rows of `config.added_tokens`, and of CLIP's mask token if the file lacks it, keep their
    random start. Raises ValueError where the file or its config.json does not fit.
    """
    source = str(config.weights)
    file, family = _text_file(source, config), FAMILIES[config.name]
    others = {f"{other.prefix}.": name for name, other in reversed(FAMILIES.items()) if other.prefix != family.prefix}
    unread = TEXT_LEFT_OUT + family.unread + (() if config.layers else ("encoder.",))
    kept, left_out = {}, []
    for name, value in read_tensors(file).items():
        for prefix, other in others.items():
            if name.startswith(prefix):
                raise ValueError(f"{file} holds {other} weights ({name}): set model.text.name={other}")
        name = name.removeprefix(f"{family.prefix}.")
        if name.startswith(unread):
            left_out.append(name)
        else:
            kept[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = (
                value
            )
    resized = _add_rows(kept, text, config)
    notes = (f"{len(left_out)} other tensors of the file left out: {_few(left_out)}",) if left_out else ()
    return WeightsReport("text encoder", source, copy_into(text, kept, str(file)), resized, notes)


def _add_rows(kept: dict[str, Tensor], text: nn.Module, config: TextConfig) -> tuple[str, ...]:
    """Gives a table of words the rows of tokens that the encoder was not trained with, in place: sentinels, and before
    them CLIP's mask token, as CLIP was not trained to fill in words."""
    table = text.get_input_embeddings()
    name = next(name for name, part in text.named_modules() if part is table) + ".weight"
    own, rows = table.weight.detach(), len(kept.get(name, ()))
    published = len(own) - config.added_tokens
    lacks_mask = config.name == "clip" and rows == published - 1
    if name not in kept or not (rows == published or lacks_mask) or rows == len(own):
        return ()
    kept[name] = torch.cat([kept[name].to(own), own[rows:]])
    notes = [f"row {rows} of the vocabulary, the mask token's, starts at random"] if lacks_mask else []
    if config.added_tokens:
        notes.append(f"rows {published} to {len(own) - 1} of the vocabulary, added tokens, start at random")
    return tuple(notes)


def copy_into(module: nn.Module, tensors: dict[str, Tensor], source: str) -> int:
    """Copies tensors by name, all of the module's and no others. Raises ValueError, before copying, if they differ."""
    own = module.state_dict(keep_vars=True)
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_few(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors have no place: {_few(unexpected)}")
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: {_few(shapes, 3)}")
    if problems:
        raise ValueError(
            f"{source} does not fit the model: {'. '.join(problems)}. Set the model's sizes to those of the file."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    return len(own)


def _read_vision(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if path.exists() or source.endswith(FILE_ENDINGS) or path.is_absolute():
        return read_tensors(path)
    if not source.startswith("hf-hub:") and not timm.is_model(source.split(".")[0]):
        raise ValueError(
            f"model.vision.weights={source!r} is neither a file nor a model of timm: give a path, or a name such as "
            "vit_base_patch16_clip_quickgelu_224.openai"
        )
    try:
        return timm.create_model(source, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"model.vision.weights={source!r} could not be fetched ({_first_line(error)}): "
                         "check the name and the network, or give a local file") from error  # fmt: skip


def _vision_names(tensors: dict[str, Tensor], source: str) -> dict[str, tuple[str | None, Tensor]]:
    """Name in the file -> (our name or None, tensor)."""
    if "pos_embed" in tensors:
        left_out = ("head.", "fc_norm.")
        return {name: (None if name.startswith(left_out) else name, value) for name, value in tensors.items()}
    tables = [name for name in tensors if name.endswith("visual.positional_embedding")]
    if len(tables) != 1:
        raise ValueError(
            f"{source} is no CLIP ViT: it has {len(tables)} tensors called visual.positional_embedding, no "
            f"pos_embed; it holds {_few(sorted(tensors))}"
        )
    prefix = tables[0].removesuffix("positional_embedding")
    named: dict[str, tuple[str | None, Tensor]] = {}
    for name, value in tensors.items():
        inner = name.removeprefix(prefix) if name.startswith(prefix) else None
        if inner is None or inner == "proj":  # the text half of CLIP, and the projection that METER does not use
            named[name] = (None, value)
        else:
            named[name] = (to_timm(inner) or inner, value)
    return named


def _fit_vision_shapes(kept: dict[str, Tensor], config: VisionConfig, source: str) -> list[str]:
    """Brings class token and position table to our shapes, in place; returns what was resized, in words."""
    for name in ("cls_token", "pos_embed"):
        if name in kept:
            kept[name] = kept[name].reshape(1, -1, kept[name].shape[-1])
    patch = kept.get("patch_embed.proj.weight")
    if patch is not None and patch.shape[-1] != config.patch_size:
        raise ValueError(f"{source} has patches of {patch.shape[-1]} px: set model.vision.patch_size={patch.shape[-1]}")
    if patch is not None and patch.shape[0] != config.width:
        raise ValueError(f"{source} is {patch.shape[0]} wide: set model.vision.width={patch.shape[0]}")
    if "pos_embed" not in kept:
        return []
    before = grid_of(kept["pos_embed"].shape[1], f"{source}: the position table")
    if before == config.grid:
        return []
    kept["pos_embed"] = resize_positions(kept["pos_embed"][0], config.grid)[None]
    return [f"position table resized from {before} x {before} to {config.grid} x {config.grid} patches"]


def _text_file(source: str, config: TextConfig) -> Path:
    path = Path(source)
    if path.is_file() or source.endswith(FILE_ENDINGS):
        return path
    if not path.is_dir():
        path = _download_text(source)
    if (path / "config.json").exists():
        _check_text_config(read_json(path / "config.json"), config, path)
    for name in TEXT_FILES:
        if (path / name).exists():
            return path / name
    raise ValueError(f"{path} holds neither {' nor '.join(TEXT_FILES)}: is it a folder that save_pretrained wrote?")


def _download_text(source: str) -> Path:
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"model.text.weights={source!r} does not exist: check the path")
    try:
        path = Path(snapshot_download(source, allow_patterns=["config.json", TEXT_FILES[0]]))
        if not (path / TEXT_FILES[0]).exists():
            path = Path(snapshot_download(source, allow_patterns=["config.json", TEXT_FILES[1]]))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"model.text.weights={source!r} is no local folder and could not be fetched ({_first_line(error)}): "
            "check the name and the network, or give a local folder"
        ) from error
    return path


def _check_text_config(found: dict, config: TextConfig, path: Path) -> None:
    """What tensors do not show: kind, heads, eps, activation. (Sizes are compared tensor by tensor.)"""
    family, where = FAMILIES[config.name], path / "config.json"
    kind = found.get("model_type", family.model_types[0])
    if kind not in family.model_types:
        raise ValueError(f"{where} says model_type={kind!r}, the model has text.name={config.name!r}: make them equal")
    if kind == "clip":
        found = found.get("text_config") or {}
    expected = {
        "num_attention_heads": ("heads", config.heads),
        "layer_norm_eps": ("eps", config.eps),
        "hidden_act": ("activation", config.activation),
    }
    if family.shares_pad_id:
        expected["pad_token_id"] = ("pad_id", config.pad_id)
    for key, (setting, value) in expected.items():
        if key in found and found[key] != value:
            raise ValueError(
                f"{where} says {key}={found[key]!r}, the model has text.{setting}={value!r}: make them equal"
            )
    for key, value in family.fixed.items():
        theirs = found.get(key, getattr(family.config(), key, None))
        if _unordered(theirs) != _unordered(value):
            raise ValueError(
                f"{where} says {key}={theirs!r}, text.name={config.name} is built with {value!r}: "
                "give the weights of such a model"
            )


def _unordered(value: object) -> object:
    """Kinds of attention are written as a list or as "c2p|p2c", in any order."""
    if isinstance(value, str) and "|" in value:
        value = value.split("|")
    return sorted(value) if isinstance(value, list) else value


def _few(names: list[str], count: int = 4) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
