"""Scores of pictures against texts on disk: a file of float32 rows, memory-mapped, and which blocks of rows are done.

Knows files and numbers; knows no models and no ranks. Several processes may write at a time, each its own blocks; a
block counts as done from the moment its record appears, which is after its rows are on the disk. What was stopped goes
on with the blocks that are left.

FOLDER/scores.f32          [N,U] float32, row after row
FOLDER/scores.json         whose scores they are
FOLDER/blocks/00012.json   of a block that is done: {"unreadable": {"97": "truncated"}}, rows and causes
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meter_fast.models.files import read_json
from meter_fast.training.monitor import replace_text

SCORES, DESCRIPTION, BLOCKS = "scores.f32", "scores.json", "blocks"


class ScoreTable:
    """scores [N,U] of pictures against texts, in blocks of `block` pictures, in `folder`, which `prepare` has made."""

    def __init__(self, folder: Path, pictures: int, texts: int, block: int):
        self.folder, self.pictures, self.texts, self.block = folder, pictures, texts, block
        self._rows = np.memmap(folder / SCORES, np.float32, "r+", shape=(pictures, texts))

    @staticmethod
    def prepare(folder: Path, pictures: int, texts: int, whose: Mapping[str, object]) -> None:
        """Make the folder's files, or check those that are there. One process, before any opens the table.

        whose: what the scores depend on. Raises ValueError for a folder with scores of something else.
        """
        description = {"pictures": pictures, "texts": texts, **whose}
        path = folder / DESCRIPTION
        if path.is_file():
            before = read_json(path)
            other = sorted(key for key in before.keys() | description.keys() if before.get(key) != description.get(key))
            if other:
                raise ValueError(
                    f"{folder} holds scores of something else ({', '.join(other)} differ): name another folder, or "
                    "remove it"
                )
            return
        try:
            (folder / BLOCKS).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"--scores {folder} cannot be a folder, as a file is in its way: name another one"
            ) from None
        if any((folder / BLOCKS).iterdir()):
            raise ValueError(f"{folder} holds records of scores without {DESCRIPTION}: name another folder")
        with open(folder / SCORES, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * pictures * texts)  # a full disk is told here, not while mapped
        replace_text(path, json.dumps(description, indent=1) + "\n")

    def __len__(self) -> int:
        """Blocks."""
        return -(-self.pictures // self.block)

    def rows(self, block: int) -> list[int]:
        """The pictures of a block."""
        return list(range(block * self.block, min((block + 1) * self.block, self.pictures)))

    def left(self) -> list[int]:
        """The blocks that are not done."""
        return [block for block in range(len(self)) if not self._record(block).is_file()]

    def write(self, block: int, scores: Tensor, causes: list[str | None]) -> None:
        """Rows [P,U] float32 of a block, and why each picture could not be read."""
        rows = self.rows(block)
        self._rows[rows[0] : rows[-1] + 1] = scores.numpy()
        self._rows.flush()
        unreadable = {str(row): cause for row, cause in zip(rows, causes, strict=True) if cause is not None}
        replace_text(self._record(block), json.dumps({"unreadable": unreadable}) + "\n")

    def skipped(self) -> Counter:
        """Pictures that could not be read, by cause, over all blocks."""
        found: Counter = Counter()
        for block in range(len(self)):
            found.update(read_json(self._record(block))["unreadable"].values())
        return found

    def scores(self) -> Tensor:
        """[N,U] float32, mapped: what is read of it is loaded when it is read."""
        return torch.from_numpy(self._rows)

    def _record(self, block: int) -> Path:
        return self.folder / BLOCKS / f"{block:05d}.json"
