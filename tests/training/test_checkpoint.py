"""Checkpoint files: complete or invisible, refused when a single byte is wrong, nothing in them can run."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from small_run import Payload

from meter_fast.training import checkpoint
from meter_fast.training.checkpoint import CheckpointError, Reader, Writer


def some_tensors() -> dict[tuple[str, str], torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {
        (kind, name): torch.randn(shape, generator=chance)
        for kind in ("weight", "exp_avg")
        for name, shape in (("a.weight", (7, 5)), ("a.bias", (7,)), ("b.weight", (11,)))
    }


def write(folder: Path, step: int) -> Path:
    writer = Writer(folder, step)
    for (kind, name), tensor in some_tensors().items():
        writer.add(kind, name, tensor)
    return writer.finish({"step": step, "config": {}})


def test_round_trip_is_exact(tmp_path):
    reader = Reader(write(tmp_path, 12))
    assert reader.step == 12 and reader.folder.name == "step-00000012"
    assert reader.shapes("weight") == {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (11,)}
    for (kind, name), tensor in some_tensors().items():
        assert reader.tensor(kind, name).equal(tensor)


def test_large_kinds_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 150)
    folder = write(tmp_path, 1)
    assert sorted(p.name for p in folder.glob("weight*")) == ["weight-000.safetensors", "weight-001.safetensors"]
    assert Reader(folder).tensor("weight", "b.weight").equal(some_tensors()["weight", "b.weight"])


def test_nothing_is_visible_before_the_end(tmp_path):
    writer = Writer(tmp_path, 3)
    writer.add("weight", "a", torch.ones(4))
    assert checkpoint.steps(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_twice_replaces(tmp_path):
    write(tmp_path, 3)
    writer = Writer(tmp_path, 3)
    writer.add("weight", "a", torch.ones(4))
    writer.finish({"step": 3})
    assert Reader(checkpoint.path_of(tmp_path, 3)).shapes("weight") == {"a": (4,)}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


FILES = ("weight-000.safetensors", "exp_avg-000.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.scenario(11, "bits flipped throughout every file of a checkpoint: the file is named")
def test_every_flipped_byte_is_found(tmp_path, name):
    """A bit flip at many places of each file: the message names it, and the older checkpoint is chosen."""
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    content = path.read_bytes()
    for place in sorted({0, 1, 7, 8, 9, len(content) - 1, *range(0, len(content), max(1, len(content) // 60))}):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=name):
            checkpoint.verify(path.parent)
    choice = checkpoint.newest(tmp_path)
    assert choice.reader.step == 1 and name in choice.passed_over[0]
    path.write_bytes(content)
    assert checkpoint.newest(tmp_path).reader.step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["cut", "empty", "longer", "gone"])
@pytest.mark.scenario(11, "files cut, emptied, longer, gone")
def test_truncated_and_missing_files_are_found(tmp_path, name, harm):
    path = write(tmp_path, 1) / name
    content = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "longer": content + b"\n"}[harm])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(path.parent)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        checkpoint.newest(tmp_path)


def reseal(folder: Path) -> None:
    """Give a checkpoint a right manifest for whatever its files now are, as someone with bad intent would."""
    files = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
        if p.name != "manifest.json"
    }
    (folder / "manifest.json").write_bytes(checkpoint._manifest_bytes({"format": 1, "files": files}))


@pytest.mark.parametrize("name", ["weight-000.safetensors", "exp_avg-000.safetensors", "state.json"])
@pytest.mark.scenario(40, "a pickle as weights, moments or state of a checkpoint, with right hashes")
def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(tmp_path, name):
    marker = tmp_path / "it ran"
    folder = write(tmp_path / "checkpoints", 1)
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    reseal(folder)
    checkpoint.verify(folder)  # the hashes are right, so it is the reader that must refuse
    with pytest.raises(CheckpointError, match=name):
        Reader(folder)
    torch.save({"weight": Payload(marker)}, folder / name)
    reseal(folder)
    with pytest.raises(CheckpointError, match=name):
        Reader(folder)
    assert not marker.exists()


@pytest.mark.scenario(42, "a manifest that names ../secret")
def test_a_manifest_that_points_outside_is_refused(tmp_path):
    folder = write(tmp_path, 1)
    content = json.loads((folder / "manifest.json").read_text())
    files = {**content["files"], "../secret": {"size": 1, "sha256": "0"}}
    (folder / "manifest.json").write_bytes(checkpoint._manifest_bytes({"format": 1, "files": files}))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        checkpoint.verify(folder)


def test_prune_keeps_the_last_and_the_best_and_clears_leftovers(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoint.mark_best(tmp_path, 2, 0.5)
    (tmp_path / ".writing-step-00000009-dead").mkdir()
    assert checkpoint.best(tmp_path) == (2, 0.5)
    assert checkpoint.prune(tmp_path, 1) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.json", "step-00000002", "step-00000004"]


@pytest.mark.scenario(12, "a delete that fails is told and ends nothing")
def test_a_failing_delete_is_told_and_ends_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)

    def refuse(path, *args, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert checkpoint.prune(tmp_path, 1) == [f"could not remove {tmp_path / 'step-00000001'}: Input/output error"]
    assert checkpoint.steps(tmp_path) == [2]
    assert checkpoint.newest(tmp_path).reader.step == 2


def test_no_checkpoints_is_a_fresh_start_and_strangers_are_named(tmp_path):
    assert checkpoint.newest(tmp_path / "not there").reader is None
    (tmp_path / "evil.pt").write_bytes(b"\x80\x04.")
    choice = checkpoint.newest(tmp_path)
    assert choice.reader is None and "evil.pt: not a checkpoint" in choice.passed_over[0]


@pytest.mark.scenario(10, "a folder that cannot be written, or is too small, is told before the run begins")
def test_the_write_probe_names_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write into .*file/run: Not a directory"):
        checkpoint.probe(tmp_path / "file" / "run", 0)
    with pytest.raises(CheckpointError, match=r"takes 1000000.00 GB .* free"):
        checkpoint.probe(tmp_path / "run", 10**15)
    with full_disk(1), pytest.raises(CheckpointError, match=r"cannot write into .*/run: File too large"):
        checkpoint.probe(tmp_path / "run", 1)
    checkpoint.probe(tmp_path / "run", 1)
    assert list((tmp_path / "run").iterdir()) == []
