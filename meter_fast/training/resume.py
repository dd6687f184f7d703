"""Where a run starts and what it leaves behind: fresh weights, given weights or a checkpoint; what a checkpoint says of
its run, and the export.

Knows the model, the named state and the files. All functions are collective; only the main process touches files,
the others get their values from it, so nothing but the main process needs to see the run directory.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from meter_fast.config import ConfigError, RunConfig, flatten, from_dict, to_dict
from meter_fast.interop import HEAD_NAMES, from_meter, original_name
from meter_fast.models.export import load_export
from meter_fast.models.fusion import fit_token_types, refit
from meter_fast.models.image_tokenizer import load_image_tokenizer
from meter_fast.models.positions import fit_positions, is_position_table
from meter_fast.models.vq_vae import VqVae
from meter_fast.models.weights import copy_into
from meter_fast.training import checkpoint
from meter_fast.training.checkpoint import CheckpointError, Reader
from meter_fast.training.state import FROZEN, KINDS, WEIGHT, NamedState
from meter_fast.training.versions import versions
from meter_fast.training.world import World

# What decides which samples a step reads and what is asked about them: another value would not go on with this run.
FIXED = (
    "image_tokenizer.",
    "data.sources",
    "data.questions",
    "data.weights",
    "data.max_text_length",
    "engine.global_batch",
    "run.seed",
    "objectives.",
)
TOKEN_TYPES = "fusion.token_types.weight"
# Says nothing about the run's results.
FREE = ("run.dir", "run.resume", "run.init", "run.log_every", "run.hang_seconds", "run.peer_seconds", "run.async_save",
        "data.root", "data.workers", "data.prefetch", "model.vision.weights", "model.text.weights")  # fmt: skip


@dataclass
class Start:
    """Where training begins. `step`: optimizer steps done. On the main process `reader` is the checkpoint to restore
    and `masters` the fp32 weights; both None elsewhere.
    """

    step: int = 0
    origin: str = "random weights"
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    reader: Reader | None = None
    masters: dict[str, Tensor] | None = None


def checkpoints_of(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


# ------------------------------------------------------------------------------------------------------------ starting


def find_start(config: RunConfig, world: World, identity: dict[str, Any]) -> Start:
    """Choose what to start from by run.resume and run.init, and check that it belongs to this run.

    identity: what must be the same on resume besides settings (sizes of the data, the vocabulary). Raises
    CheckpointError or ConfigError."""
    start = Start()

    def choose() -> dict[str, Any]:
        folder = checkpoints_of(config.run.dir)
        reader = _chosen(config, folder, start.notes)
        if reader is None:
            start.origin = config.run.init or start.origin
            return {}
        start.notes += _differences(config, reader, identity)
        start.reader = reader
        skipped = {str(cause): int(count) for cause, count in reader.state.get("skipped", {}).items()}
        return {"step": reader.step, "origin": str(reader.folder), "skipped": skipped}

    for name, value in world.together(choose).items():
        setattr(start, name, value)
    return start


def _chosen(config: RunConfig, folder: Path, notes: list[str]) -> Reader | None:
    if config.run.resume == "never":
        if checkpoint.steps(folder):
            raise ConfigError(
                f"run.resume=never, but {folder} holds checkpoints of steps {checkpoint.steps(folder)}; choose another "
                f"run.dir, or remove that folder"
            )
        return None
    if config.run.resume == "auto":
        choice = checkpoint.newest(folder)
        notes += [f"passed over: {line}" for line in choice.passed_over]
        return choice.reader
    path = Path(config.run.resume)
    if not path.is_dir():
        raise ConfigError(
            f"run.resume={config.run.resume}: auto, never, or the folder of a checkpoint; there is none here"
        )
    return Reader(path)


def _differences(config: RunConfig, reader: Reader, identity: dict[str, Any]) -> list[str]:
    """Notes on settings that changed since the checkpoint. Raises CheckpointError for those that must not."""
    try:
        before = flatten(from_dict(RunConfig, reader.state["config"]))
    except (KeyError, ConfigError) as error:
        raise CheckpointError(f"{reader.folder}: its settings are not those of this version ({error})") from None
    notes, refused = [], []
    for key, now in flatten(config).items():
        if before[key] == now or key.startswith(FREE):
            continue
        line = f"{key}: {_short(before[key])} -> {_short(now)}"
        (refused if key.startswith(("model.", *FIXED)) else notes).append(line)
    for key, now in identity.items():
        if reader.state.get("identity", {}).get(key) != now:
            refused.append(f"{key}: {_short(reader.state.get('identity', {}).get(key))} -> {_short(now)}")
    if refused:
        raise CheckpointError(
            f"{reader.folder} is of another run: {'; '.join(refused)}. Go on with the settings of the checkpoint, or "
            f"take only its weights: run.init={reader.folder} with another run.dir"
        )
    return [f"changed since the checkpoint: {line}" for line in notes]


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def load_weights(model: nn.Module, config: RunConfig, start: Start) -> None:
    """Fill `model` (fp32, on the host) on the main process, before the engine takes it. Raises ValueError."""
    if start.reader is not None:
        tensors = _tensors_of(start.reader)
        copy_into(model, tensors, str(start.reader.folder))
    elif config.run.init:
        copy_into(model, _given(config, model, start.notes), config.run.init)
    start.notes += [str(report) for report in getattr(model, "weight_reports", ())]
    start.masters = {name: p.detach().clone() for name, p in model.named_parameters()}


def _tensors_of(reader: Reader) -> dict[str, Tensor]:
    return {name: reader.tensor(kind, name) for kind in (WEIGHT, FROZEN) for name in reader.shapes(kind)}


def _given(config: RunConfig, model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """The weights that run.init names, by our names, with position tables at the run's resolution."""
    path = Path(config.run.init)
    if not path.exists():
        raise ConfigError(f"run.init={path} does not exist: give an export folder, a METER .ckpt or a checkpoint")
    if path.is_file():
        wanted = replace(config.model, itm_head=config.model.itm_head or config.model.rank_head)
        given, report = from_meter(path, config=wanted, allow_missing=HEAD_NAMES, allow_unexpected=HEAD_NAMES)
        notes += str(report).splitlines()
        tensors = given.state_dict()
        for name in [name for name in tensors if original_name(name) in report.missing]:
            del tensors[name]
        return _with_heads(tensors, model, notes)
    if (path / checkpoint.MANIFEST).is_file():
        tensors = _tensors_of(Reader(path))
    else:
        tensors = (load_image_tokenizer if isinstance(model, VqVae) else load_export)(path).state_dict()
    for name, own in model.state_dict().items():
        if is_position_table(name) and name in tensors and tensors[name].shape != own.shape:
            before, after = (table.numel() // table.shape[-1] for table in (tensors[name], own))
            tensors[name] = fit_positions(tensors[name], own.shape, config.model.vision.grid, name)
            notes.append(f"resized: {name} from {before} to {after} rows")
    types, own = tensors.get(TOKEN_TYPES), model.state_dict().get(TOKEN_TYPES)
    if types is not None and own is not None and len(types) != len(own):
        tensors[TOKEN_TYPES] = fit_token_types(types, len(own))
        notes.append(refit(TOKEN_TYPES, len(types), len(own)))
    return _with_heads(tensors, model, notes)


def _with_heads(tensors: dict[str, Tensor], model: nn.Module, notes: list[str]) -> dict[str, Tensor]:
    """The tensors without heads that the model does not have, and with the model's own for heads that they lack."""
    own = model.state_dict()
    if "rank_head.weight" in own and "rank_head.weight" not in tensors and "itm_head.weight" in tensors:
        # That of the class which says "match" (METER, modules/meter_module.py).
        tensors |= {f"rank_head.{part}": tensors[f"itm_head.{part}"][1:] for part in ("weight", "bias")}
        notes.append("rank_head starts as row 1 of itm_head")
    heads = [{name.split(".")[0] for name in part if name.split(".")[0].endswith("_head")} for part in (own, tensors)]
    for head in sorted(heads[0] - heads[1]):
        notes.append(f"not in the file, starts at random: {head}")
    for head in sorted(heads[1] - heads[0]):
        notes.append(f"not in the model, left out: {head}")
    kept = {name: value for name, value in tensors.items() if name.split(".")[0] not in heads[1] - heads[0]}
    return kept | {name: value for name, value in own.items() if name.split(".")[0] in heads[0] - heads[1]}


def restore(state: NamedState, start: Start, world: World) -> None:
    """Put the master weights and moments of the checkpoint into the engine; nothing to do for a fresh start. Raises
    CheckpointError if they are not those of the engine's parameters."""
    if not world.hear(start.reader is not None):
        return
    world.together(lambda: _check_fit(start.reader, state.shapes()))
    for kind in KINDS:
        for name in state.names:
            state.write(kind, name, start.reader.tensor(kind, name) if world.is_main else None)


def _check_fit(reader: Reader, shapes: dict[str, tuple[int, ...]]) -> None:
    """Nothing is read or sent before all of it is known to fit."""
    for kind in KINDS:
        held = reader.shapes(kind)
        for name in sorted(
            held.keys() ^ shapes.keys() | {n for n in held.keys() & shapes.keys() if held[n] != shapes[n]}
        ):
            raise CheckpointError(
                f"{reader.folder}: {kind} of {name} is {held.get(name, 'missing')}, the model has "
                f"{shapes.get(name, 'no such parameter')}"
            )
        if odd := sorted(name for name in held if reader.dtype(kind, name) != "F32"):
            raise CheckpointError(f"{reader.folder}: {kind} of {odd[0]} is {reader.dtype(kind, odd[0])}, not fp32")


# -------------------------------------------------------------------------------------------------------------- saving


def describe_run(config: RunConfig, world: World, identity: dict[str, Any]) -> dict[str, Any]:
    """What state.json says of a run besides the step: settings, identity, versions, processes."""
    return {
        "config": to_dict(config),
        "identity": identity,
        "world_size": world.size,
        "versions": versions(),
    }


def expected_bytes(parameters: int) -> int:
    """Size of a checkpoint: fp32 weights and two moments."""
    return 12 * parameters


def export(state: NamedState, world: World, write: Callable[[dict[str, Tensor]], None]) -> None:
    """`write` the model alone, from fp32 master weights and what is frozen, on the main process."""
    tensors = {name: t.detach().cpu().clone() if world.is_main else None for _, name, t in state.read((WEIGHT, FROZEN))}
    world.together(lambda: write(tensors))
