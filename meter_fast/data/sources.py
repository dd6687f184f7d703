"""Which data a run reads: names of published data sets, a user's own tables, tar shards; put one after another.

Knows the file names and splits of METER's data sets and where files lie. Knows nothing of the order in which samples
are drawn (order.py) nor of what their bytes hold.
"""

import glob
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meter_fast.data.shards import TarCaptions
from meter_fast.data.tables import ArrowCaptions, Sample


class SourceError(ValueError):
    """A source that cannot be opened: which file in which folder, what is there instead, what to do."""


@dataclass(frozen=True)
class _Published:
    """The tables that METER reads of one data set for one split (METER code, datasets/*_dataset.py).

    names: file stems in the order they are read. required: those without which the set is not that set; the others
    may be missing (people's copies of downloaded sets have gaps, other sets have no `restval`) and are then reported.
    """

    names: tuple[str, ...]
    required: tuple[str, ...] = ()


_COCO_TEST = _Published(("coco_caption_karpathy_test",), ("coco_caption_karpathy_test",))
_F30K_TEST = _Published(("f30k_caption_karpathy_test",), ("f30k_caption_karpathy_test",))

# As published, "val" of COCO and Flickr30k is their Karpathy TEST split, and Flickr30k trains on its val split too. To
# choose a model by data that is not the test data, name the table itself: "arrow:coco_caption_karpathy_val".
PUBLISHED: dict[str, dict[str, _Published]] = {
    "coco": {
        "train": _Published(
            ("coco_caption_karpathy_train", "coco_caption_karpathy_restval"), ("coco_caption_karpathy_train",)
        ),
        "val": _COCO_TEST,
        "test": _COCO_TEST,
    },
    "f30k": {
        "train": _Published(
            ("f30k_caption_karpathy_train", "f30k_caption_karpathy_val"), ("f30k_caption_karpathy_train",)
        ),
        "val": _F30K_TEST,
        "test": _F30K_TEST,
    },
    "vg": {"train": _Published(("vg",), ("vg",))},
    "sbu": {"train": _Published(tuple(f"sbu_{n}" for n in range(9)))},
    "gcc": {"train": _Published(tuple(f"conceptual_caption_train_{n}" for n in range(31)))},
}
SPLITS = ("train", "val", "test")


@dataclass
class Source:
    """One opened source: its pairs (or questions), and what was and was not found on opening it."""

    name: str
    pairs: Any
    missing: list[str] = field(default_factory=list)

    def coverage(self) -> dict:
        """A row for the start banner; `missing` names files, `problems` counts per shard what is wrong with it."""
        return {
            "source": self.name,
            "files": len(self.pairs.files),
            "pictures": self.pairs.pictures,
            "captions": len(self.pairs),
            "duplicates": self.pairs.duplicates,
            "missing": self.missing,
            "texts": getattr(self.pairs, "texts", "captions"),
            "shown": getattr(self.pairs, "shown", "pictures"),
            "unanswered": getattr(self.pairs, "left_out", 0),
            "problems": {name: dict(found) for name, found in getattr(self.pairs, "problems", {}).items()},
        }


class Sources:
    """Several sources as one: samples 0..len-1, source after source, as published (plain concatenation).

    names, sizes: of each source, in order. weights: each source's share of the samples drawn; None: shares by size.
    left_out: names of sources that have no table in this split.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None, left_out: Sequence[str] = ()):
        self._sources = list(sources)
        self.names = [source.name for source in self._sources]
        self.sizes = [len(source.pairs) for source in self._sources]
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.left_out = list(left_out)
        self._first = np.cumsum([0, *self.sizes]).tolist()
        self._first_picture = np.cumsum([0, *(source.pairs.pictures for source in self._sources)]).tolist()

    def __len__(self) -> int:
        return self._first[-1]

    @property
    def tables(self) -> list[Any]:
        """What each source reads from, in order."""
        return [source.pairs for source in self._sources]

    @property
    def files(self) -> list[str]:
        """Names of all tables and shards, in order."""
        return [file.name for table in self.tables for file in table.files]

    def read(self, index: int) -> Sample:
        """Sample `index`. Raises IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._first, index) - 1
        return self._sources[number].pairs.read(index - self._first[number])

    def picture(self, index: int) -> tuple[str | int | None, list[str]]:
        """Of the picture that sample `index` of captioned pictures shows: its name in the table, None where it has
        none, and all its captions."""
        number = bisect_right(self._first, index) - 1
        return self._sources[number].pairs.picture(index - self._first[number])

    def image_ids(self, indices: np.ndarray) -> np.ndarray:
        """indices [n] int64 of samples -> [n] int64: which picture each shows, unique over all sources."""
        indices = np.asarray(indices, np.int64)
        owners = np.searchsorted(self._first, indices, side="right") - 1
        pictures = np.empty(indices.shape, np.int64)
        for number in np.unique(owners).tolist():
            own = owners == number
            local = self._sources[number].pairs.image_ids(indices[own] - self._first[number])
            pictures[own] = local + self._first_picture[number]
        return pictures

    def coverage(self) -> list[dict]:
        """A row per source for the start banner, sources without this split included (0 files)."""
        empty = {"files": 0, "pictures": 0, "captions": 0, "duplicates": 0, "missing": [], "problems": {}}
        return [source.coverage() for source in self._sources] + [{"source": name, **empty} for name in self.left_out]


def open_sources(
    names: Sequence[str], root: str | Path, split: str = "train", weights: Sequence[float] | None = None
) -> Sources:
    """Open sources below `root`.

    names: "coco", "vg", "sbu", "gcc", "f30k" (the published tables of `split`), "arrow:NAME[,NAME]" (caption tables by
    file stem, whatever the split), "shards:PATTERN" (tar shards: a glob, or braces as in {00000..00331} and {a,b};
    relative to root or absolute).
    weights: one positive number per name, each source's share of the samples; None or () for plain concatenation.

    Missing files: a table named by "arrow:", a shard named by braces, and a published set's main table must be there.
    Of the numbered tables of sbu and gcc at least one must be, of a glob's shards too; what else the published set has
    is listed as missing in coverage(). A source without tables in `split` (vg, sbu, gcc beyond training) is left out,
    as published, and shown in coverage() with 0 files; all left out is an error.
    Raises SourceError, TableError or ShardError (ValueErrors all).
    """
    root = Path(root)
    if split not in SPLITS:
        raise SourceError(f"split {split!r}: choose one of {', '.join(SPLITS)}")
    if not names:
        raise SourceError("no data source is named; for example data.sources=coco,vg")
    weights = weights or None
    if weights is not None and (len(weights) != len(names) or not all(0 < float(w) < float("inf") for w in weights)):
        raise SourceError(
            f"data.weights={tuple(weights)}: give one positive number for each of the sources {tuple(names)}"
        )
    if not root.is_dir():
        raise SourceError(f"data.root={str(root)!r} is not a folder (looked at {root.resolve()})")
    opened, shares, left_out = [], [], []
    for number, name in enumerate(names):
        source = _open(name, root, split)
        if source is None:
            left_out.append(name)
            continue
        opened.append(source)
        shares.append(1.0 if weights is None else float(weights[number]))
    if not opened:
        raise SourceError(
            f"none of the sources {tuple(names)} has a {split} split; "
            "choose another split, or name tables by arrow:NAME"
        )
    return Sources(opened, None if weights is None else shares, left_out)


def _open(name: str, root: Path, split: str) -> Source | None:
    """One source by name; None when it has nothing in this split."""
    kind, colon, what = name.partition(":")
    if colon and kind == "arrow":
        stems = [stem.strip() for stem in what.split(",")]
        return Source(name, ArrowCaptions(find_tables(name, stems, stems, root)))
    if colon and kind == "shards":
        return Source(name, TarCaptions(find_shards(what, root)))
    if name not in PUBLISHED:
        known = ", ".join(PUBLISHED)
        raise SourceError(f"unknown data source {name!r}: choose {known}, arrow:TABLE[,TABLE] or shards:PATTERN")
    published = PUBLISHED[name].get(split)
    if published is None:
        return None
    files = find_tables(name, published.names, published.required, root)
    there = {file.stem for file in files}
    return Source(name, ArrowCaptions(files), [f"{stem}.arrow" for stem in published.names if stem not in there])


def open_tables(
    names: Sequence[str],
    root: str | Path,
    split: str,
    published: Mapping[str, Mapping[str, Sequence[str]]],
    make: Callable[[list[Path]], Any],
    texts: str,
) -> list[Source]:
    """Open tables of other texts than captions below `root`: by the names in `published`, name -> split -> file stems,
    or "arrow:NAME[,NAME]". make: what opens the files of one source. texts: what they hold. Raises SourceError, and
    what `make` raises."""
    root, opened = Path(root), []
    if not names:
        first = next(iter(published.values()))["train"][0]
        raise SourceError(f"no data source is named; for example data.sources=arrow:{first}")
    if not root.is_dir():
        raise SourceError(f"data.root={str(root)!r} is not a folder (looked at {root.resolve()})")
    for name in names:
        kind, colon, what = name.partition(":")
        if colon and kind == "arrow":
            stems = [stem.strip() for stem in what.split(",")]
        elif name in published:
            if split not in published[name]:
                raise SourceError(f"split {split!r}: choose one of {', '.join(published[name])}")
            stems = list(published[name][split])
        else:
            raise SourceError(
                f"unknown data source {name!r} of {texts}: choose {', '.join(published)} or arrow:TABLE[,TABLE]"
            )
        opened.append(Source(name, make(find_tables(name, stems, stems, root))))
    return opened


def find_tables(name: str, stems: Sequence[str], required: Sequence[str], root: Path) -> list[Path]:
    """The files of `stems` that are there; all of `required` must be, and at least one."""
    files = [root / (stem if stem.endswith(".arrow") else f"{stem}.arrow") for stem in stems]
    found = [file for file in files if file.is_file()]
    lacking = [f for f, stem in zip(files, stems, strict=True) if stem in required and f not in found]
    if lacking or not found:
        wanted = ", ".join(file.name for file in lacking or files[:1])
        more = "" if lacking else f" (nor any other of its {len(files)} tables)"
        raise SourceError(
            f"data source {name!r}: no table {wanted}{more} in the folder {root}; {_listing(root, '.arrow')}"
        )
    return found


def find_shards(pattern: str, root: Path) -> list[Path]:
    """The shards of a pattern, sorted within each glob. Braces name shards one by one, so each must be there."""
    shards: list[Path] = []
    lacking: list[Path] = []
    for part in expand_braces(pattern):
        path = root / part  # an absolute pattern replaces root
        found = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(part) else [path] if path.is_file() else []
        shards += found
        if not found:
            lacking.append(path)
    if lacking:
        first = ", ".join(path.name for path in lacking[:3])
        count = f"{len(lacking)} missing, the first " if len(lacking) > 3 else ""
        hint = "; a glob such as *.tar takes what is there" if "{" in pattern else ""
        folder = lacking[0].parent
        raise SourceError(
            f"data source 'shards:{pattern}': no {first} ({count}folder {folder}); {_listing(folder, '.tar')}{hint}"
        )
    return list(dict.fromkeys(shards))


def expand_braces(pattern: str) -> list[str]:
    """a{00..02}.tar -> a00.tar, a01.tar, a02.tar; {x,y} -> x, y; several groups multiply. Groups do not nest."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise SourceError(f"shards:{pattern}: a brace without its partner; write {{00000..00331}} or {{a,b}}")
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first) or int(last) - int(first) >= 1_000_000:
            raise SourceError(
                f"shards:{pattern}: {{{match[1]}}} counts from {first} to {last}; "
                "it must ascend, by less than a million"
            )
        width = len(first) if first.startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    return [pattern[: match.start()] + part + rest for part in parts for rest in expand_braces(pattern[match.end() :])]


def _listing(folder: Path, suffix: str) -> str:
    """What a folder holds, for messages: files of the wanted kind first."""
    if not folder.is_dir():
        return "there is no such folder"
    everything = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    wanted = [name for name in everything if name.endswith(suffix)]
    shown = wanted or everything
    kind = f"{suffix} files" if wanted else "files and folders"
    if not shown:
        return "the folder is empty"
    return f"it holds {len(shown)} {kind}: {', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''}"
