"""The arguments of `meter-fast plan`: those of its own, and the run that the others describe.

Knows names, ranges and messages. Knows nothing of what is computed from them.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meter_fast.config import ConfigError, RunConfig, override
from meter_fast.plan.machine import GPUS, IN_NODE, LINKS
from meter_fast.recipes import RECIPES, resolve


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is for, and what it takes for granted. Of figures of the machine, 0 and "" are those of `gpu`."""

    gpu: str = "a100-80g"
    nodes: int = 1
    gpus_per_node: int = 8
    link: str = ""  # between nodes, all cards of a node together: a name, or GB/s each way
    in_node: str = ""  # between the GPUs of a node: a name, or GB/s each way of one GPU
    memory: float = 0.0  # GB of a GPU
    tflops: float = 0.0  # peak of a GPU in the run's dtype
    bandwidth: float = 0.0  # GB/s of a GPU's memory
    # Share of the peak that counted operations reach. torchtitan's published tables for Llama 3 8B on H100s, a clean
    # trainer in PyTorch as this one is, have 33 to 39 %; this one has not been measured on GPUs.
    efficiency: float = 0.35
    link_efficiency: float = 0.8  # share of a link's rate that collectives reach: about 240 of 300 GB/s on a DGX A100
    headroom: float = 0.08  # share of the memory for the CUDA context, NCCL, fragments and pictures being decoded
    tokens: int = 13  # of an average text, specials included: a caption of COCO; of memory the longest text counts
    picture_kb: float = 0.0  # 0: of the tables in data.root, or 150, as COCO's train2017 (118,287 pictures of 18 GB)
    samples: int = 0  # of the training data; 0: of the tables, or of the published sets
    out: str = ""  # folder for the chart


@dataclass(frozen=True)
class Machine:
    """bytes and bytes/s of one GPU (`memory`, `bandwidth`, `in_node`) and of one node (`link`); peak FLOP/s. usable: of
    the memory, by a run."""

    gpu: str
    nodes: int
    gpus_per_node: int
    memory: float
    usable: float
    peak: float
    bandwidth: float
    in_node: float
    link: float
    capability: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def read_arguments(argv: Sequence[str]) -> tuple[RunConfig, PlanOptions, Machine]:
    """`["pretrain", "gpu=h100-80g", "engine.zero=1", ...]` -> the run, what is the plan's own, and the machine.

    Raises ConfigError, naming what was probably meant."""
    names = [field.name for field in dataclasses.fields(PlanOptions)]
    own = [text for text in argv[1:] if text.partition("=")[0] in names and "=" in text]
    rest = [text for text in argv if text not in own]
    if argv and argv[0] in RECIPES:
        _refuse_unknown(rest[1:], [*inspect.signature(RECIPES[argv[0]]).parameters, *names])
    config, options = resolve(rest), override(PlanOptions(), own)
    _check(options)
    if "reconstruction" in config.objectives.names:
        raise ConfigError("plan is about METER models; an image tokenizer is small and fits any GPU")
    return config, options, _machine(options, config.engine.dtype)


def _refuse_unknown(settings: Sequence[str], known: Sequence[str]) -> None:
    """A key without a point that neither the recipe nor the plan knows."""
    for text in settings:
        key, separator, _ = text.partition("=")
        if separator and "." not in key and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"unknown argument {key!r}: " + (f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}")
            )


def _check(options: PlanOptions) -> None:
    rules = [
        ("nodes", options.nodes >= 1, "1 or more"),
        ("gpus_per_node", options.gpus_per_node >= 1, "1 or more"),
        ("memory", options.memory >= 0, "GB of a GPU, or 0 for that of gpu"),
        ("tflops", options.tflops >= 0, "TFLOP/s of a GPU, or 0 for that of gpu"),
        ("bandwidth", options.bandwidth >= 0, "GB/s of a GPU's memory, or 0 for that of gpu"),
        ("efficiency", 0 < options.efficiency <= 1, "a share above 0 and at most 1"),
        ("link_efficiency", 0 < options.link_efficiency <= 1, "a share above 0 and at most 1"),
        ("headroom", 0 <= options.headroom < 1, "a share of 0 or more and below 1"),
        ("tokens", options.tokens >= 3, "at least 3 tokens"),
        ("picture_kb", options.picture_kb >= 0, "KB, or 0 for that of the data"),
        ("samples", options.samples >= 0, "a number, or 0 for that of the data"),
    ]
    for key, right, remedy in rules:
        if not right:
            raise ConfigError(f"{key}={getattr(options, key)}: {remedy}")


def _machine(options: PlanOptions, dtype: str) -> Machine:
    gpu = GPUS[_known("gpu", options.gpu, GPUS)]
    memory = 1e9 * (options.memory or gpu.memory)
    return Machine(
        gpu=options.gpu,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        memory=memory,
        usable=memory * (1 - options.headroom),
        peak=1e12 * options.tflops or (gpu.bf16 if dtype == "bf16" else gpu.fp32),
        bandwidth=1e9 * options.bandwidth or gpu.bandwidth,
        in_node=_rate("in_node", options.in_node, IN_NODE) if options.in_node else gpu.in_node,
        link=_rate("link", options.link or gpu.link, LINKS),
        capability=gpu.capability,
    )


def _rate(key: str, value: str, names: Mapping[str, float]) -> float:
    """Bytes/s of a link's name or of GB/s."""
    if value in names:
        return names[value]
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        _known(key, value, names, "or GB/s each way")
    return 1e9 * rate


def _known(key: str, value: str, names: Mapping[str, object], otherwise: str = "") -> str:
    if value in names:
        return value
    near = [name for name in names if value and name.startswith(value)] or difflib.get_close_matches(value, list(names))
    guess = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"{key}={value}: {guess}Known: {', '.join(names)}{', ' if otherwise else ''}{otherwise}")
