"""A run small enough for tests: tables of little pictures, a model of 0.1 M parameters. Helpers only, no tests."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import load_file

from meter_fast.data.tokenizer import train_tokenizer

WORDS = ["a", "red", "blue", "green", "small", "large", "circle", "square", "left", "of", "above", "two", "on", "white"]
MODEL = [
    "model.vision.width=32", "model.vision.layers=1", "model.vision.heads=2", "model.vision.image_size=32",
    "model.vision.patch_size=16",
    "model.text.width=32", "model.text.layers=1", "model.text.heads=2", "model.text.ffn=64",
    "model.fusion.width=32", "model.fusion.heads=2", "model.fusion.layers=1",
]  # fmt: skip


class Payload:
    """What a malicious pickle holds: opening it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_table(path: Path, pictures: int, first: int) -> None:
    """A caption table of noisy 40 px pictures with two captions each; no two are alike."""
    images, captions = [], []
    for number in range(first, first + pictures):
        chance = np.random.default_rng(number)
        out = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (40, 40, 3), np.uint8)).save(out, "PNG")
        images.append(out.getvalue())
        captions.append([" ".join(chance.choice(WORDS, chance.integers(6, 14))) + f" {number} {k}" for k in range(2)])
    table = pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "caption": pa.array(captions, pa.list_(pa.string())),
            "image_id": [f"{n}.jpg" for n in range(pictures)],
            "split": ["train"] * pictures,
        }
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def make_data(root: Path) -> Path:
    """Tables of a training and a held-out split, and a tokenizer."""
    write_table(root / "coco_caption_karpathy_train.arrow", 30, 0)
    write_table(root / "coco_caption_karpathy_test.arrow", 8, 1000)
    train_tokenizer([" ".join(WORDS)] + [str(n) for n in range(30)], root / "tokenizer", "bert", 128)
    return root


def settings(data: Path, *more: str) -> list[str]:
    """Settings of a 20-step run of 8 pairs a step; later ones win."""
    return [
        *MODEL, f"data.root={data}", f"data.tokenizer={data / 'tokenizer'}", "data.val_sources=", "data.workers=0",
        "engine.global_batch=8", "engine.micro_batch=4", "run.max_steps=20", "run.log_every=1", "run.eval_every=0",
        "run.save_every=10", "run.hang_seconds=120", *more,
    ]  # fmt: skip


def losses(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """Step -> (loss of each objective ..., gradient norm), every digit that was written. Of a run that is still writing
    the last line may be there in part; it is left out."""
    whole = (run_dir / "metrics.jsonl").read_text().rpartition("\n")[0]
    rows = [row for row in map(json.loads, whole.splitlines()) if "loss" in row]
    return {r["step"]: (*(v for n, v in r["loss"].items() if n != "total"), r["grad_norm"]) for r in rows}


def samples(run_dir: Path, world: int) -> dict[int, list[int]]:
    """Step -> sample ids of the whole global batch in its order; of a step seen twice the last time counts."""
    seen: dict[int, dict[int, list[list[int]]]] = {}
    for rank in range(world):
        for line in (run_dir / f"samples-{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            seen.setdefault(row["step"], {})[rank] = row["samples"]
    return {
        step: [i for micro in range(len(ranks[0])) for rank in range(world) for i in ranks[rank][micro]]
        for step, ranks in sorted(seen.items())
    }


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All of a checkpoint: "kind/name" -> tensor."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    found = {}
    for path in folder.glob("*.safetensors"):
        kind = path.name.rsplit("-", 1)[0]
        found.update({f"{kind}/{name}": value for name, value in load_file(path).items()})
    return found


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], least: int = 150) -> None:
    """Equal names, equal bits, and at least that many tensors."""
    assert one.keys() == other.keys() and len(one) > least
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different[:5]


def worst(one: dict[int, tuple], other: dict[int, tuple]) -> float:
    """Largest relative difference of the losses over the steps that both have."""
    steps = one.keys() & other.keys()
    assert len(steps) >= 5
    return max(abs(a - b) / abs(b) for s in steps for a, b in zip(one[s][:-1], other[s][:-1], strict=True))
