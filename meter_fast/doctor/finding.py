"""A finding, what is asked of a host, and what a host answers: plain values that travel as JSON. Knows no probes."""

import glob
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

AREAS = ("versions", "devices", "backends", "compilers", "limits", "network", "gloo", "disks")
"""What is looked at on a host; each is the module of that name."""

Level = Literal["fine", "remark", "fails", "unknown"]


@dataclass(frozen=True)
class Finding:
    """What one look gave. level: "fails" stops a run or spoils it, "remark" costs time or may surprise, "unknown" could
    not be found out, with the cause as its value. across: what it counts as when hosts differ in it; "" for nothing.
    """

    name: str
    level: Level
    value: str
    remedy: str = ""
    across: Literal["", "remark", "fails"] = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.level not in ("fails", "remark"), f"{self.name}: {self.value}: without a remedy"


def fine(name: str, value: str, across: Literal["", "remark", "fails"] = "") -> Finding:
    """All is well."""
    return Finding(name, "fine", value, across=across)


def unknown(name: str, why: str) -> Finding:
    """It could not be found out."""
    return Finding(name, "unknown", why)


@dataclass(frozen=True)
class Asked:
    """What a host is to be looked at for.

    command: recipe and settings, as for training. data_root, run_dir: absolute; data_root may be empty: not looked at.
    port: where the main process listens. seconds: for each area. slots: processes on this host, 0: one for each GPU.
    world: processes on all hosts, 0: as slots. hosts: their number, 0 where there is no hostfile. first: whether the
    main process is on this host. marker: a file that is there while the doctor runs, in the folder that all share.
    areas: some of AREAS.
    """

    command: tuple[str, ...]
    data_root: str
    run_dir: str
    port: int
    seconds: float
    slots: int = 0
    world: int = 0
    hosts: int = 0
    first: bool = True
    marker: str = ""
    areas: tuple[str, ...] = AREAS

    @property
    def processes(self) -> int:
        """On this host."""
        return self.slots or len(glob.glob("/dev/nvidia[0-9]*")) or 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Asked":
        values = json.loads(text)
        return cls(**{**values, "command": tuple(values["command"]), "areas": tuple(values["areas"])})


@dataclass(frozen=True)
class Report:
    """The answer of a host: findings by area. facts: plain values that others need, such as its address."""

    areas: dict[str, list[Finding]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def findings(self) -> Iterator[Finding]:
        for found in self.areas.values():
            yield from found

    def to_dict(self) -> dict[str, Any]:
        return {"areas": {name: [asdict(one) for one in found] for name, found in self.areas.items()},
                "facts": self.facts}  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """Raises KeyError or TypeError for anything else than `to_dict` gives."""
        areas = {name: [Finding(**one) for one in found] for name, found in values["areas"].items()}
        return cls(areas, dict(values["facts"]))


def amount(size: float) -> str:
    """Bytes for people: 1610612736 -> "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def capped(finding: Finding, level: Level) -> Finding:
    """The finding at another level."""
    return replace(finding, level=level)
