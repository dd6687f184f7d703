"""Files and settings made to do harm: nothing in them runs, takes memory or writes outside the run."""

import hashlib
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import Payload, settings

from meter_fast.config import ConfigError, flatten
from meter_fast.data.tables import ArrowCaptions, TableError
from meter_fast.models.files import read_json, read_tensors
from meter_fast.recipes import resolve
from meter_fast.training import checkpoint
from meter_fast.training.checkpoint import CheckpointError, Reader, Writer


def packed(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of that header; `length` may lie about its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


CRAFTED = {
    "a header of an exabyte": packed({"a": entry()}, bytes(8), length=1 << 60),
    "a header of 200 MB": packed({"a": entry()}, bytes(8), length=200 << 20),
    "a header beyond the file": packed({"a": entry()}, bytes(8), length=4000),
    "overlapping tensors": packed({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "a hole between tensors": packed({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
    "offsets behind the end": packed({"a": entry(shape=(200,), offsets=(0, 800))}, bytes(8)),
    "offsets backwards": packed({"a": entry(offsets=(8, 0))}, bytes(8)),
    "a shape of a petabyte": packed({"a": entry(shape=(1 << 25, 1 << 25))}, bytes(8)),
    "a shape that overflows": packed({"a": entry(shape=(1 << 62, 4))}, bytes(8)),
    "a shape below zero": packed({"a": entry(shape=(-2,))}, bytes(8)),
    "an unknown type": packed({"a": entry(dtype="OBJECT")}, bytes(8)),
    "another size of type": packed({"a": entry(dtype="F64")}, bytes(8)),
    "more bytes than tensors": packed({"a": entry()}, bytes(64)),
    "no JSON": packed(b"\x80\x04cos\nsystem\n."),
    "nested without end": packed(b"[" * 100_000),
}


@pytest.mark.scenario(
    41, "15 crafted files as weights of a model and as a checkpoint's: refused by name, without memory"
)
@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_safetensors_are_refused(case, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "model.safetensors"
    path.write_bytes(CRAFTED[case])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_tensors(path)
    folder = a_checkpoint(tmp_path / "checkpoints", {"weight": {"a": torch.zeros(2)}})
    (folder / "weight-000.safetensors").write_bytes(CRAFTED[case])
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"weight-000\.safetensors"):
        Reader(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def a_checkpoint(folder: Path, kinds: dict[str, dict[str, torch.Tensor]]) -> Path:
    writer = Writer(folder, 1)
    for kind, held in kinds.items():
        for name, tensor in held.items():
            writer.add(kind, name, tensor)
    return writer.finish({"step": 1, "config": {}})


def reseal(folder: Path) -> None:
    """A right manifest for whatever the files now are."""
    files = {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in folder.iterdir()
        if p.name != "manifest.json"
    }
    (folder / "manifest.json").write_bytes(checkpoint._manifest_bytes({"format": 1, "files": files}))


@pytest.mark.slow
@pytest.mark.scenario(
    41, "moments of another shape or type, missing or strange, in a checkpoint with right hashes: refused"
)  # fmt: skip
def test_moments_that_do_not_fit_are_refused(ranks, data, tmp_path):
    run = tmp_path / "run"
    chosen = settings(data, "run.max_steps=2", "run.save_every=2", "engine.dtype=fp32")
    ranks.train(2, run, chosen).check()
    name = "fusion.token_types.weight"
    for number, (change, said) in enumerate((
        (lambda held: held.update({name: torch.zeros(3, 32)}), f"exp_avg of {name} is (3, 32), the model has (2, 32)"),
        (lambda held: held.pop(name), f"exp_avg of {name} is missing, the model has (2, 32)"),
        (lambda held: held.update({"x": torch.zeros(1)}), "exp_avg of x is (1,), the model has no such parameter"),
        (lambda held: held.update({name: held[name].half()}), f"exp_avg of {name} is F16, not fp32"),
    )):  # fmt: skip
        other = tmp_path / f"other-{number}"
        shutil.copytree(run, other)
        folder = other / "checkpoints" / "step-00000002"
        held = load_file(folder / "exp_avg-000.safetensors")
        change(held)
        save_file(held, folder / "exp_avg-000.safetensors")
        reseal(folder)
        shutil.rmtree(other / "logs")
        ended = ranks.train(2, other, [*chosen, "run.max_steps=3"], timeout=60).check(2)
        assert said in ended.logs[0] and "Traceback" not in "".join(ended.logs), ended.logs


@pytest.mark.scenario(
    40, "an Arrow table whose columns or metadata carry pickles: opened as data or refused, never run"
)
@pytest.mark.parametrize("place", ["extension", "metadata", "values"])
def test_pickles_in_a_table_are_not_opened(place, tmp_path):
    marker = tmp_path / "it ran"
    evil = pickle.dumps(Payload(marker))
    captions = pa.array([["a dog"], ["a cat"]], pa.list_(pa.string()))
    table = pa.table({"image": pa.array([evil, b"x"], pa.binary()), "caption": captions})
    if place == "extension":
        meta = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
        field = pa.field("caption", captions.type, metadata=meta)
        table = pa.table(table.columns, pa.schema([table.schema.field("image"), field]))
    if place == "metadata":
        table = table.replace_schema_metadata({"pandas": evil, "ARROW:schema": evil, "huggingface": evil})
    path = tmp_path / "t.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    try:
        assert ArrowCaptions([path]).read(0).text == "a dog"
    except TableError as error:
        assert "t.arrow" in str(error)
    assert not marker.exists()


@pytest.mark.scenario(40, "pickles in place of the JSON files that a run or an export reads")
@pytest.mark.parametrize("name", ["state.json", "manifest.json", "best.json", "config.json"])
def test_pickles_in_place_of_json_are_not_opened(name, tmp_path):
    marker = tmp_path / "it ran"
    evil = pickle.dumps(Payload(marker))
    folder = a_checkpoint(tmp_path / "checkpoints", {"weight": {"a": torch.zeros(2)}})
    if name == "best.json":
        (folder.parent / name).write_bytes(evil)
        assert checkpoint.best(folder.parent) == (None, float("inf"))
    elif name == "config.json":
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_json(tmp_path / name)
    else:
        (folder / name).write_bytes(evil)
        if name == "state.json":
            reseal(folder)
        with pytest.raises(CheckpointError, match=name):
            Reader(folder)
    assert not marker.exists()


@pytest.mark.scenario(42, "tags of YAML, calls and templates as values: text, or refused")
@pytest.mark.parametrize("key", ["optim.lr", "run.max_steps", "engine.compile", "optim.betas", "objectives.names"])
@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.mkdir ['{marker}']", "__import__('os').mkdir('{marker}')", "${{oc.env:HOME}}"]
)
def test_values_are_never_evaluated(key, value, tmp_path):
    marker = tmp_path / "it ran"
    with pytest.raises(ConfigError, match=key):
        resolve(["pretrain", "size=tiny", f"{key}={value.format(marker=marker)}"])
    text = value.format(marker=marker)
    assert resolve(["pretrain", "size=tiny", f"run.init={text}"]).run.init == text
    assert not marker.exists()


@pytest.mark.scenario(42, "variables of the environment named like settings change nothing")
def test_the_environment_overrides_nothing(monkeypatch):
    plain = resolve(["pretrain", "size=tiny"])
    for key in flatten(plain):
        for name in (key, key.upper().replace(".", "_"), "METER_FAST_" + key.upper().replace(".", "_")):
            monkeypatch.setitem(os.environ, name, "7")
    assert resolve(["pretrain", "size=tiny"]) == plain


@pytest.mark.slow
@pytest.mark.scenario(42, "a run with checkpoints, pictures, a best step and an export writes under run.dir alone")
def test_a_run_writes_under_its_directory_alone(ranks, data, tmp_path):
    def everything() -> set[Path]:
        return {path for root in (tmp_path, data) for path in root.rglob("*")}

    run = tmp_path / "runs" / "one"
    chosen = settings(
        data, "run.max_steps=4", "run.save_every=2", "run.eval_every=2", "run.picture_every=2", "data.val_sources=coco",
        "data.val_pairs=8", "data.tokenizer=trained", "engine.dtype=fp32",
    )  # fmt: skip
    before = everything()
    ranks.train(1, run, chosen).check()
    new = everything() - before - {run.parent}
    assert new and all(path.is_relative_to(run) for path in new)
    assert {p.name for p in run.iterdir()} >= {"best", "export", "checkpoints", "config.json", "metrics.jsonl"}
