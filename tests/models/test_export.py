"""An exported folder opens again with the same numbers, and says clearly when it cannot."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from safetensors.torch import load_file, save_file

from meter_fast.convert import to_checkpoint
from meter_fast.models.config import tiny
from meter_fast.models.export import load_export, read_inputs, save_export
from meter_fast.models.meter import Meter


@pytest.fixture
def model() -> Meter:
    torch.manual_seed(3)
    return Meter(tiny(vocab_size=40))


@pytest.fixture
def folder(model: Meter, tmp_path: Path) -> Path:
    tokenizer = tmp_path / "tokenizer_files"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    return save_export(model, tmp_path / "run" / "export", tokenizer)


def test_round_trip(model: Meter, folder: Path) -> None:
    again = load_export(folder)
    assert not again.training
    assert again.config == model.config
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert (folder / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["export"], "nothing half-made is left"


def test_export_replaces_an_older_one_and_takes_other_values(model: Meter, folder: Path) -> None:
    state = {name: value + 1 for name, value in model.bfloat16().state_dict().items()}
    master = {name: value.float() for name, value in state.items()}
    save_export(model, folder, None, master)
    again = load_export(folder).state_dict()
    assert all(torch.equal(again[name], value) for name, value in master.items())
    assert not (folder / "tokenizer").exists()
    with pytest.raises(ValueError, match=r"not that of the model"):
        save_export(model, folder, None, {"vision.cls_token": master["vision.cls_token"]})


def test_weights_of_the_encoders_are_not_asked_for_again(tmp_path: Path) -> None:
    config = tiny(vocab_size=40)
    sources = dataclasses.replace(config, text=dataclasses.replace(config.text, weights="/nowhere/folder"))
    folder = save_export(Meter(sources, load_weights=False), tmp_path / "export", None)
    assert load_export(folder).config == config


@pytest.mark.scenario(41, "an export with tensors missing, of another shape, or cut")
def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(ValueError, match=r"nowhere/config.json does not exist"):
        load_export(tmp_path / "nowhere")

    other = broken("other")
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"not that of a meter-fast model"):
        load_export(other)

    later = broken("later")
    content = json.loads((later / "config.json").read_text())
    (later / "config.json").write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(ValueError, match=r"version 2, this program reads version 1"):
        load_export(later)

    for number, (inputs, said) in enumerate([
        ([], r'its "inputs" is no object'),
        ({"max_text_length": "x"}, r'"max_text_length" of its "inputs" is \'x\''),
        ({"max_text_length": -3}, r"is -3, and texts have 3 tokens or more"),
        ({"transform": 1}, r'"transform" of its "inputs" is 1, expected clip'),
    ]):  # fmt: skip
        told = broken(f"inputs-{number}")
        (told / "config.json").write_text(json.dumps(content | {"inputs": inputs}))
        with pytest.raises(ValueError, match=f"inputs-{number}/config.json: .*{said}"):
            read_inputs(told)

    unknown = broken("unknown")
    content["model"]["vision"]["colour"] = 1
    (unknown / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"colour"):
        load_export(unknown)

    cut = broken("cut")
    tensors = load_file(cut / "model.safetensors")
    tensors.pop("itm_head.weight")
    tensors["fusion.token_types.weight"] = torch.zeros(3, 128)
    save_file(tensors, cut / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: itm_head.weight.*fusion.token_types.weight is \(3, 128\)"):
        load_export(cut)

    short = broken("short")
    with (short / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match=r"short/model.safetensors is no readable safetensors file"):
        load_export(short)

    with pytest.raises(ValueError, match=r"tokenizer folder .*absent does not exist"):
        save_export(load_export(folder), tmp_path / "more", tmp_path / "absent")


def test_a_full_disk_leaves_what_was_there(model: Meter, tmp_path: Path) -> None:
    """Of an export, which would have been replaced, and of nothing."""
    folder = save_export(model, tmp_path / "old", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in (folder, tmp_path / "new"):
        with full_disk(5000), pytest.raises(OSError, match=rf"{place.name} could not be written .*: make room there"):
            save_export(model, place, None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with full_disk(5000), pytest.raises(OSError, match=r"x.ckpt could not be written .*: make room there"):
        to_checkpoint(folder, tmp_path / "x.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
