"""The settings of a run: frozen dataclasses, overrides `key=value`, JSON in and out.

Knows names, types and rules of all settings. Knows nothing of how any of them is used: no torch, no files but JSON
text.

A setting is addressed by its path, `optim.lr`. A value is read by the annotation of its field, so
`optim.warmup=0.1` is a share of the run and `optim.warmup=500` a number of steps. An unknown key is an error that
names the nearest one.
"""

import dataclasses
import difflib
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from meter_fast.models.config import PARTS, BlocksOf, KernelsConfig, ModelConfig
from meter_fast.models.image_tokenizer_config import ImageTokenizerConfig

T = TypeVar("T")
OnPairs = Literal["mlm", "itm", "mim_in_batch", "mim_codes", "span_denoising", "caption"]
Alone = Literal["vqa", "nlvr2", "snli_ve", "reconstruction"]  # with batches of their own
FINE_TUNING: tuple[str, ...] = (*typing.get_args(Alone), "retrieval")  # runs of a task of their own


class ConfigError(ValueError):
    """A setting that does not exist, cannot be read or contradicts another; the text names key, value and remedy."""


@dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how they are prepared."""

    root: str = "data"  # folder that the source names are looked up in
    sources: tuple[str, ...] = ("coco", "vg", "sbu", "gcc")  # also "arrow:NAME[,NAME]" and "shards:PATTERN"
    weights: tuple[float, ...] = ()  # share of each source in a batch; empty = plain concatenation, as published
    val_sources: tuple[str, ...] = ()  # empty = no held-out evaluation
    val_split: str = "val"
    answers: str = ""  # of visual question answering: JSON list, label 0 first; empty = as the tables name them
    questions: Literal["single", "by_picture"] = "single"  # in training; by_picture: a batch counts pictures, see docs
    questions_per_picture: int = 8  # by_picture: at most, a picture with more is read in parts; 0 = all at once
    val_pairs: int = 512  # held-out pairs scored at each evaluation, the first ones of the split's fixed order
    transform: Literal["clip", "imagenet", "vit"] = "clip"  # pixel values and alpha, as the encoder knows them
    augment: Literal["none", "randaugment_published", "randaugment"] = "none"  # of training pictures alone
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    tokenizer: str = "roberta-base"  # hub name, local folder, "trained": learnt from the texts, or "init": of run.init
    max_text_length: int = 50  # tokens, specials included
    workers: int = 2  # loader threads per process; 0 = prepare in the training thread
    prefetch: int = 2  # optimizer steps prepared ahead
    max_image_pixels: int = 89_478_485  # larger pictures are refused from their header (Pillow's own limit)
    max_bad_share: float = 0.01  # stop when more samples than this could not be read


@dataclass(frozen=True)
class ObjectivesConfig:
    """What the model is trained on."""

    names: tuple[Literal[OnPairs, Alone, "retrieval"], ...] = ("mlm", "itm")
    mlm_probability: float = 0.15
    masking: Literal["token", "whole_word", "whole_word_published", "content_word"] = "token"
    itm_negatives: Literal["batch", "dataset"] = "batch"
    false_texts: int = 15  # of retrieval, for each picture
    false_text_choice: Literal["other_picture", "dataset"] = "other_picture"  # never the picture's own, or as published
    mim_probability: float = 0.15  # of a picture's cells; rounded to whole ones, at least one
    mim_negatives: Literal["batch", "all_ranks"] = "batch"  # whose cells are the candidates of mim_in_batch
    image_tokenizer: str = ""  # for mim_codes: an export folder of one, or a file of the published DALL-E encoder
    span_probability: float = 0.15  # share of the tokens that span denoising hides, in spans
    span_length: float = 3.0  # of a span, in tokens, on average


@dataclass(frozen=True)
class OptimConfig:
    """AdamW of the published runs, its parameter groups and schedule (published code, meter_utils.py:168-309)."""

    lr: float = 1e-5
    head_multiplier: float = 5.0  # learning rate of the task heads, relative to lr
    cross_modal_multiplier: float = 5.0  # learning rate of the fusion layers, relative to lr
    layer_decay: float = 1.0  # of the rate, from each layer of an encoder to the one below; 1 = off, as published
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: int | float = 0.1  # a share of the run (a number with a point) or a number of steps
    decay_power: float | Literal["cosine"] = 1.0
    end_lr: float = 0.0
    clip: float = 0.0  # largest gradient norm; 0 = off, as published


@dataclass(frozen=True)
class EngineConfig:
    """How a step is spread over processes and memory."""

    zero: Literal[0, 1, 2, 3] = 2
    dtype: Literal["bf16", "fp32"] = "bf16"
    global_batch: int = 4096  # pairs of one optimizer step, over all processes and accumulation
    micro_batch: int = 16  # pairs of one forward pass of one process
    offload: Literal["none", "cpu"] = "none"  # cpu: master weights and moments in host memory (zero 2 and 3)
    activation_checkpointing: bool = False
    checkpointed_parts: tuple[BlocksOf, ...] = PARTS  # whose blocks activation_checkpointing computes again
    compile: bool = False
    ds_config: str = ""  # a DeepSpeed JSON file in place of the one that zero and offload choose


@dataclass(frozen=True)
class RunOptions:
    """Length, rhythm and place of a run."""

    dir: str = "runs/pretrain"
    seed: int = 0
    max_steps: int = 100_000  # 0 = as many as run.max_epochs take
    max_epochs: float = 0.0  # passes over the training data; 0 = run.max_steps tells
    log_every: int = 10
    eval_every: int = 0  # 0 = never
    picture_every: int = 0  # held-out picture with the model's fills for TensorBoard; 0 = never
    save_every: int = 1000
    keep_last: int = 2
    async_save: bool = True  # write checkpoints beside the steps; takes a copy of the state in host memory
    resume: str = "auto"  # auto | never | path of a checkpoint
    init: str = ""  # weights to start from: an export folder, a published METER .ckpt, or a checkpoint
    hang_seconds: int = 1800  # a step that takes longer dumps all stacks and ends the process
    peer_seconds: int = 60  # a host that cannot be reached for so long, in a step that waits, ends the run


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)  # of objective reconstruction
    run: RunOptions = field(default_factory=RunOptions)


# ---------------------------------------------------------------------------------------------- dictionaries and JSON


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists), ready for JSON. Works for every dataclass here."""
    return {
        f.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for f in dataclasses.fields(config)
        for value in [getattr(config, f.name)]
    }


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """The dataclass `kind` from a nested dictionary as `to_dict` gives it. Left-out fields keep their defaults.

    Raises ConfigError for an unknown field, a value of another type, or a missing field without a default."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or kind.__name__}: expected a table of settings, got {values!r}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise _unknown(_join(path, key), [_join(path, name) for name in names])
    made = {key: _coerce(hints[key], value, _join(path, key)) for key, value in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in made and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing setting: {', '.join(_join(path, name) for name in missing)}")
    try:
        return kind(**made)
    except ConfigError:
        raise
    except ValueError as error:  # a rule of the dataclass itself
        parent, _, last = path.rpartition(".")
        named = str(error).startswith(f"{last}.")  # it says "vision.width=..." where the path is "model.vision"
        raise ConfigError(f"{_join(parent, '')}{error}" if named else f"{path}: {error}") from None


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-05, ...}: every setting by its path, in the order of the fields."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, key = getattr(config, f.name), _join(path, f.name)
        flat.update(flatten(value, key) if dataclasses.is_dataclass(value) else {key: value})
    return flat


def override(config: T, assignments: Iterable[str]) -> T:
    """A copy of `config` with `assignments` ("optim.lr=1e-4", ...) applied in order and the result checked as a whole.

    Raises ConfigError for text without "=", an unknown key (naming the nearest one) or a value of another type."""
    table = to_dict(config)
    known = flatten(config)
    for text in assignments:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r}: settings are written key=value")
        if key not in known:
            raise _unknown(key, list(known))
        *parents, last = key.split(".")
        target, kind = table, type(config)
        for parent in parents:
            target, kind = target[parent], typing.get_type_hints(kind)[parent]
        target[last] = _parse(typing.get_type_hints(kind)[last], value, key)
    changed = from_dict(type(config), table)
    if isinstance(changed, RunConfig):
        check(changed)
    return changed


def describe(config: Any, width: int = 110) -> str:
    """Every setting, a paragraph of `key=value` for each section."""
    sections: dict[str, list[str]] = {}
    for key, value in flatten(config).items():
        head, _, rest = key.rpartition(".")
        text = ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
        sections.setdefault(head, []).append(f"{rest}={text}")
    label = max(map(len, sections))
    return "\n".join(
        textwrap.fill(" ".join(parts), width, initial_indent=f"{head:<{label}}  ", subsequent_indent=" " * (label + 2),
                      break_long_words=False, break_on_hyphens=False)
        for head, parts in sections.items()
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the rules


def check(config: RunConfig) -> None:
    """Raise ConfigError where one setting contradicts another or is out of its range."""
    objectives, optim, engine, run = config.objectives, config.optim, config.engine, config.run
    alone = [name for name in objectives.names if name in typing.get_args(Alone)]
    rules = [
        *_data_rules(config),
        (bool(objectives.names), "objectives.names", objectives.names,
         "name at least one of mlm, itm, mim_in_batch, mim_codes, span_denoising, caption"),
        (config.model.decoder.layers > 0 or not {"span_denoising", "caption"} & set(objectives.names),
         "objectives.names", ",".join(objectives.names),
         "span_denoising and caption write text, which needs model.decoder.layers=1 or more (fusion=encoder_decoder)"),
        (0 < objectives.span_probability < 1, "objectives.span_probability", objectives.span_probability,
         "between 0 and 1"),
        (objectives.span_length >= 1, "objectives.span_length", objectives.span_length, "1 token or more"),
        (len(set(objectives.names)) == len(objectives.names), "objectives.names", objectives.names, "each once"),
        (0 < objectives.mlm_probability < 1, "objectives.mlm_probability", objectives.mlm_probability,
         "between 0 and 1"),
        (0 < objectives.mim_probability < 1, "objectives.mim_probability", objectives.mim_probability,
         "between 0 and 1"),
        (config.model.vision.grid > 1 or not {"mim_in_batch", "mim_codes"} & set(objectives.names),
         "model.vision.image_size", config.model.vision.image_size,
         "masked image modelling needs two cells or more along a side: at least twice model.vision.patch_size"),
        (bool(objectives.image_tokenizer) or "mim_codes" not in objectives.names, "objectives.image_tokenizer",
         objectives.image_tokenizer, "mim_codes needs one: name an export folder or a file of the DALL-E encoder"),
        (math.isfinite(optim.lr) and optim.lr >= 0, "optim.lr", optim.lr, "0 or more"),
        (0 < optim.layer_decay <= 1, "optim.layer_decay", optim.layer_decay, "above 0 and at most 1 (off)"),
        (all(0 <= b < 1 for b in optim.betas), "optim.betas", optim.betas, "between 0 and 1"),
        (optim.warmup >= 0, "optim.warmup", optim.warmup, "a share or a number of steps, 0 or more"),
        (isinstance(optim.warmup, int) or optim.warmup < 1, "optim.warmup", optim.warmup,
         "a number with a point is a share below 1; write a number of steps without a point"),
        (optim.clip >= 0, "optim.clip", optim.clip, "0 (off) or more"),
        (engine.global_batch >= 1, "engine.global_batch", engine.global_batch, "1 or more"),
        (engine.micro_batch >= 1, "engine.micro_batch", engine.micro_batch, "1 or more"),
        (objectives.itm_negatives != "batch" or "itm" not in objectives.names or engine.micro_batch % 2 == 0,
         "engine.micro_batch", engine.micro_batch,
         "must be even with objectives.itm_negatives=batch, where two pairs exchange their pictures"),
        (engine.offload == "none" or engine.zero in (2, 3), "engine.offload", engine.offload,
         f"needs engine.zero=2 or 3, not {engine.zero}"),
        (not (engine.compile and engine.zero == 3), "engine.compile", engine.compile,
         "torch.compile does not go with the parameter hooks of engine.zero=3; use 0, 1 or 2"),
        (run.max_steps >= 1 or run.max_epochs > 0, "run.max_steps", run.max_steps, "1 or more, or give run.max_epochs"),
        (run.max_steps >= 0 and not (run.max_steps and run.max_epochs), "run.max_steps", run.max_steps,
         f"run.max_epochs={run.max_epochs} tells the length, too: set one of the two to 0"),
        (math.isfinite(run.max_epochs) and run.max_epochs >= 0, "run.max_epochs", run.max_epochs, "0 or more"),
        (len(objectives.names) == 1 or not alone, "objectives.names",
         ",".join(objectives.names), f"{', '.join(alone)} trains alone, on data of its own"),
        ("retrieval" not in objectives.names or set(objectives.names) <= {"retrieval", "itm"}, "objectives.names",
         ",".join(objectives.names), "retrieval trains alone or with itm"),
        (objectives.false_texts >= 1, "objectives.false_texts", objectives.false_texts, "1 or more"),
        (not engine.activation_checkpointing or "reconstruction" not in objectives.names,
         "engine.activation_checkpointing", "true", "an image tokenizer is small and trains without: use false"),
        (engine.checkpointed_parts != (), "engine.checkpointed_parts", "",
         f"some of {','.join(PARTS)}, or say engine.activation_checkpointing=false"),
        (run.log_every >= 1, "run.log_every", run.log_every, "1 or more"),
        (run.save_every >= 1, "run.save_every", run.save_every, "1 or more"),
        (run.keep_last >= 1, "run.keep_last", run.keep_last, "1 or more"),
        (run.eval_every >= 0 and run.picture_every >= 0, "run.eval_every", run.eval_every, "0 (never) or more"),
        (run.hang_seconds >= 1, "run.hang_seconds", run.hang_seconds, "1 or more"),
        (run.peer_seconds >= 1, "run.peer_seconds", run.peer_seconds, "1 or more"),
        (bool(run.dir), "run.dir", run.dir, "name a folder"),
    ]  # fmt: skip
    for right, key, value, remedy in rules:
        if not right:
            raise ConfigError(f"{key}={value}: {remedy}")


def _data_rules(config: RunConfig) -> list[tuple[bool, str, object, str]]:
    """(whether it holds, key, value, remedy) of the settings of data."""
    data = config.data
    return [
        (bool(data.sources), "data.sources", data.sources, "name at least one source"),
        (not data.weights or len(data.weights) == len(data.sources), "data.weights", data.weights,
         f"give one weight for each of the {len(data.sources)} sources, or none"),
        (all(w > 0 for w in data.weights), "data.weights", data.weights, "weights are above 0"),
        (data.max_text_length >= 3, "data.max_text_length", data.max_text_length, "at least 3 tokens"),
        (data.workers >= 0, "data.workers", data.workers, "0 or more"),
        (data.prefetch >= 1, "data.prefetch", data.prefetch, "1 or more"),
        (data.val_pairs >= 2, "data.val_pairs", data.val_pairs, "2 or more"),
        (data.questions == "single" or config.objectives.names == ("vqa",), "data.questions", data.questions,
         "only vqa reads questions; leave it at single"),
        (data.questions_per_picture >= 0, "data.questions_per_picture", data.questions_per_picture,
         "1 or more, or 0 for all"),
        (0 <= data.max_bad_share <= 1, "data.max_bad_share", data.max_bad_share, "a share between 0 and 1"),
    ]  # fmt: skip


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unknown(key: str, known: list[str]) -> ConfigError:
    """The error for a key that is not there, with what was probably meant."""
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    by_name = {k.rsplit(".", 1)[-1]: k for k in known}
    near = [by_name[n] for n in difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.75)]
    guess = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6) or near
    hint = f"did you mean {' or '.join(guess)}?" if guess else f"known: {', '.join(_sections(known))}"
    return ConfigError(f"unknown setting {key!r}: {hint}")


def _sections(known: list[str]) -> list[str]:
    """Settings, or, where these are many, their sections: "optim.*"."""
    return known if len(known) <= 20 else list(dict.fromkeys(f"{k.split('.')[0]}.*" if "." in k else k for k in known))


# --------------------------------------------------------------------------------------------------- values and types


def _parse(kind: Any, text: str, key: str) -> Any:
    """The value of type `kind` that `text` of a command line stands for."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        for choice in args:
            if text == str(choice):
                return choice
        raise ConfigError(f"{key}={text}: one of {', '.join(str(a) for a in args)}")
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda a: a is str):  # text fits everything: last
            try:
                return _parse(option, text, key)
            except ConfigError:
                continue
        raise ConfigError(f"{key}={text}: expected {_name(kind)}")
    if origin is tuple:
        parts = [part.strip() for part in text.split(",") if part.strip()] if text else []
        kinds = [args[0]] * len(parts) if args[-1] is Ellipsis else list(args)
        if len(parts) != len(kinds):
            raise ConfigError(f"{key}={text}: expected {len(kinds)} values with commas between")
        return [_parse(k, part, key) for k, part in zip(kinds, parts, strict=True)]
    if kind is type(None):
        if text.lower() == "none":
            return None
    elif kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif kind is str:
        return text
    elif kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass  # reported below, with the key
    raise ConfigError(f"{key}={text}: expected {_name(kind)}")


def _coerce(kind: Any, value: Any, key: str) -> Any:
    """`value` as JSON gives it, checked against `kind`; lists become tuples and whole numbers floats where asked."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, key)
    if origin is Literal and value in args:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in sorted(args, key=lambda a: a is not type(value)):
            try:
                return _coerce(option, value, key)
            except ConfigError:
                continue
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(value) == len(kinds):
            return tuple(_coerce(k, v, key) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool, type(None)) and type(value) is kind:
        return value
    raise ConfigError(f"{key}={value!r}: expected {_name(kind)}")


def _name(kind: Any) -> str:
    """How a message calls the type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(a) for a in args)
    if origin is tuple:
        return f"a list of {_name(args[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}.get(
        kind, str(kind)
    )
