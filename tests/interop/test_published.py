"""Published checkpoints in and out: values, names, files, and what is refused."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_cases import GOLDEN, TOLERANCE, GoldenCase, load_case, relative
from safetensors.torch import load_file
from torch import Tensor

from meter_fast.interop import LoadReport, from_meter, original_name, original_names, to_meter
from meter_fast.models.config import VisionConfig
from meter_fast.models.meter import Meter

UNUSED = {
    "vit_model.positional_embedding",
    "vit_model.ln_final.weight",
    "vit_model.ln_final.bias",
    "text_transformer.pooler.dense.weight",
    "text_transformer.pooler.dense.bias",
    "text_transformer.embeddings.position_ids",
}
KEY_LISTS = sorted(path.stem for path in (GOLDEN / "checkpoint_keys").glob("*.json"))


def unused_of(case: GoldenCase) -> set[str]:
    """Names of a golden state that the published model never computes with, or computes again from its sizes."""
    if case.model.config.vision.name == "clip_vit":
        return UNUSED
    buffers = {name for name in case.state if name.endswith((".relative_position_index", ".attn_mask"))}
    return {name for name in UNUSED if name.startswith("text_")} | buffers


@pytest.fixture
def golden() -> GoldenCase:
    return load_case("clip_bert")


def load(state: object, **arguments: object) -> tuple[Meter, LoadReport]:
    return from_meter(state, text_heads=4, fusion_heads=4, **arguments)


def test_round_trip_key_for_key_and_value_for_value(case: GoldenCase) -> None:
    written = to_meter(case.model, case.report.unused)
    assert set(written) == set(case.state)
    for name, value in case.state.items():
        assert written[name].dtype == value.dtype, name
        assert torch.equal(written[name], value), name
    assert set(case.report.unused) == unused_of(case)
    assert set(case.report.matched) | unused_of(case) == set(case.state)
    assert not case.report.missing and not case.report.unexpected and not case.report.resized


def test_written_state_is_independent_of_the_model(golden: GoldenCase) -> None:
    written = to_meter(golden.model, golden.report.unused)
    with torch.no_grad():
        for parameter in golden.model.parameters():
            parameter.zero_()
    golden.report.unused["vit_model.ln_final.weight"].zero_()
    assert all(
        torch.equal(written[name], value) or name == "vit_model.ln_final.weight" for name, value in golden.state.items()
    )
    assert written["vit_model.ln_final.weight"].any()
    load_case.__globals__["_files"].cache_clear()  # the golden tensors themselves were changed above


def test_bfloat16_model_is_written_in_float32(golden: GoldenCase) -> None:
    """Golden weights are exact in bf16, so nothing is lost on the way."""
    written = to_meter(golden.model.bfloat16(), golden.report.unused)
    assert all(torch.equal(written[name], value) for name, value in golden.state.items())


def test_every_parameter_has_its_published_name(case: GoldenCase) -> None:
    ours = [name for name, _ in case.model.named_parameters()]
    theirs = [their_name for name in ours for their_name in original_names(name)]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) | unused_of(case) == set(case.state)
    assert original_name("fusion.layers.1.image.cross_attention.key_value.bias") == (
        "cross_modal_image_layers.1.crossattention.self.key.bias"
    )
    assert original_name("model.mlm_head.decoder.bias") == "mlm_score.bias"
    assert original_name("text.encoder.layer.0.output.LayerNorm.weight") == (
        "text_transformer.encoder.layer.0.output.LayerNorm.weight"
    )
    for strange in ("decoder.weight", "vision.head.weight", "fusion.layers.0.audio.feed_forward.up.weight"):
        with pytest.raises(ValueError, match=strange):
            original_name(strange)


@pytest.mark.parametrize("kind", KEY_LISTS)
def test_released_checkpoints_of_full_size(kind: str) -> None:
    """Names, shapes and dtypes of the released kinds, through our model of that size and back. No memory is used for
    weights."""
    keys = json.loads((GOLDEN / "checkpoint_keys" / f"{kind}.json").read_text())["keys"]
    state = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in keys.items()
    }
    model, report = from_meter({"state_dict": state, "hyper_parameters": {"config": {}}})
    assert not report.missing and not report.unexpected and not report.resized
    assert model.config.vision.image_size == int(kind.rsplit("_", 1)[1])
    assert (model.config.text.name, model.config.text.eps) == (
        ("bert", 1e-12) if "bert_" in kind.replace("roberta", "") else ("roberta", 1e-5)
    )
    assert model.config.text.heads == model.config.fusion.heads == 12
    assert model.config.vision.heads == (32 if kind.startswith("swin") else 12)
    written = to_meter(model, report.unused)
    assert {name: (list(value.shape), str(value.dtype)) for name, value in written.items()} == {
        name: (entry["shape"], f"torch.{entry['dtype']}") for name, entry in keys.items()
    }


@pytest.mark.parametrize("kind", [kind for kind in KEY_LISTS if "pretrain" in kind])
def test_model_of_our_own_is_written_with_all_published_names(kind: str) -> None:
    """Without `unused`, what the published model carries and never computes with is made up: names, shapes and dtypes
    agree."""
    keys = json.loads((GOLDEN / "checkpoint_keys" / f"{kind}.json").read_text())["keys"]
    state = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"]), device="meta") for name, e in keys.items()}
    model, _ = from_meter(state)
    written = to_meter(model)
    assert {name: (list(value.shape), str(value.dtype)) for name, value in written.items()} == {
        name: (entry["shape"], f"torch.{entry['dtype']}") for name, entry in keys.items()
    }


def test_sizes_are_inferred(golden: GoldenCase) -> None:
    sizes, config = golden.sizes, golden.model.config
    vision = (
        config.vision.width,
        config.vision.layers,
        config.vision.heads,
        config.vision.patch_size,
        config.vision.image_size,
    )
    assert vision == (128, sizes["clip"]["layers"] - 1, 2, 16, 48)
    text = (config.text.name, config.text.width, config.text.layers, config.text.ffn, config.text.vocab_size)
    assert text == ("bert", 64, 3, 256, 260)
    assert (config.text.max_positions, config.text.token_types, config.text.eps, config.text.pad_id) == (
        24,
        2,
        1e-12,
        0,
    )
    assert (config.fusion.width, config.fusion.layers, config.fusion.token_types) == (48, 2, 2)


def test_another_resolution(golden: GoldenCase) -> None:
    model, report = load(golden.state, image_size=80)
    assert report.resized == (("vit_model.visual.positional_embedding", 10, 26),)
    assert "resized: vit_model.visual.positional_embedding from 10 to 26 rows" in str(report)
    with torch.no_grad():
        assert model.encode_image(torch.randn(1, 3, 80, 80)).shape == (1, 26, 128)


def test_encoders_that_the_published_code_lacks_are_refused(golden: GoldenCase) -> None:
    vision = VisionConfig("vit", 32, 1, 2, 16, 32)
    with torch.device("meta"):
        model = Meter(dataclasses.replace(golden.model.config, vision=vision))
    with pytest.raises(ValueError, match=r"no vision encoder of the kind 'vit', only clip_vit and swin"):
        to_meter(model)


def test_swin_at_another_resolution() -> None:
    """Bias tables are resized, buffers computed anew; the file's own resolution changes nothing."""
    swin = load_case("swin_roberta")
    config = swin.model.config.vision
    assert (config.width, config.layers, config.heads, config.patch_size, config.image_size) == (64, 8, 8, 32, 96)
    assert config.drop_path == 0.1
    model, report = load(swin.state, image_size=160)
    assert len(report.resized) == 8
    assert {rows for _, *rows in map(tuple, report.resized) for rows in [tuple(rows)]} == {(25, 81)}
    with torch.no_grad():
        assert model.encode_image(torch.randn(1, 3, 160, 160)).shape == (1, 25, 64)
    written = to_meter(model, report.unused)
    assert set(written) == set(swin.state)
    assert written["vit_model.layers.0.blocks.1.attn_mask"].shape == (64, 25, 25)
    again, _ = load(written)
    assert again.config.vision.image_size == 160


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {
                name.replace("layers.2.blocks.", "layers.1.blocks.").replace("1.blocks.0", "1.blocks.2"): value
                for name, value in state.items()
            },
            r"stages of \[2, .*blocks is not known|not numbered",
        ),
        (
            lambda state: state | {"vit_model.layers.3.blocks.0.attn.relative_position_bias_table": torch.ones(24, 8)},
            "has 24 rows, which is no square of an odd number",
        ),
        (
            lambda state: state | {"vit_model.layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(24, 1)},
            r"is \(24, 1\), which is no table of the model's kind, \(25, 1\)",
        ),
    ],
)
def test_swin_states_that_do_not_fit(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(change(dict(load_case("swin_roberta").state)))


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli", "rank"])
def test_task_checkpoint_keeps_its_heads(case: GoldenCase, task: str) -> None:
    """A task's checkpoint has no pre-training heads: neither has the model, and the task's head goes in and out."""
    state = {name: value for name, value in case.state.items() if not name.startswith(("mlm_score", "itm_score"))}
    tasks = load_file(GOLDEN / case.name / "state_tasks.safetensors")
    own = {name: value for name, value in tasks.items() if name.startswith((f"{task}_", "token_type"))}
    heads = {"text_heads": case.sizes["text"]["num_attention_heads"], "fusion_heads": case.sizes["heads"]}
    model, report = from_meter(state | own, **heads)
    assert [name for name, _ in model.named_children() if name.endswith("_head")] == [f"{task}_head"]
    assert model.fusion.token_types.weight.shape[0] == 3
    written = to_meter(model, report.unused)
    assert set(written) == set(state | own)
    assert all(torch.equal(written[name], value) for name, value in own.items())


def test_half_a_head_is_refused(golden: GoldenCase) -> None:
    with pytest.raises(ValueError, match=r"vqa_classifier.0.weight \(96, 96\) has no place"):
        load(golden.state | {"vqa_classifier.0.weight": torch.ones(96, 96)})


def save_lightning_file(path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lightning 1.3 writes: callbacks keyed by their class, hyper-parameters in a dict class of its own."""
    modules = {
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
    }
    classes = {}
    with monkeypatch.context() as patch:
        for module_name, class_name in modules.items():
            parts = module_name.split(".")
            for end in range(1, len(parts) + 1):
                patch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
            base = dict if class_name == "AttributeDict" else object
            classes[class_name] = type(class_name, (base,), {"__module__": module_name})
            setattr(sys.modules[module_name], class_name, classes[class_name])
        torch.save(
            {
                "epoch": 9,
                "global_step": 100000,
                "pytorch-lightning_version": "1.3.2",
                "state_dict": state,
                "hyper_parameters": classes["AttributeDict"](
                    config={
                        "tokenizer": "bert-base-uncased",
                        "num_heads": 4,
                        "drop_rate": 0.25,
                        "loss_names": {"itm": 1},
                    }
                ),
                "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": []}],
                "lr_schedulers": [{"base_lrs": [1e-5], "last_epoch": 3}],
                "callbacks": {
                    classes["ModelCheckpoint"]: {"best_model_score": torch.tensor(1.5), "monitor": "val/the_metric"}
                },
            },
            path,
        )


@pytest.mark.scenario(44, "read without Lightning: its objects stay inert, weights and settings are taken")
def test_lightning_file(golden: GoldenCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "meter_clip16_288_roberta_pretrain.ckpt"
    save_lightning_file(path, golden.state, monkeypatch)
    assert "pytorch_lightning" not in sys.modules
    model, report = from_meter(path, text_heads=4)
    assert set(report.unused) == UNUSED
    assert (model.config.fusion.heads, model.config.fusion.dropout) == (4, 0.25)
    with torch.no_grad():
        found = model.eval().encode_image(golden.inputs["image"])
    assert relative(found, golden.outputs["infer/vit"]) < TOLERANCE


class Attack:
    def __reduce__(self) -> tuple:
        return (os.system, ("echo attacked > attacked.txt",))


@pytest.mark.parametrize("place", ["state_dict", "callbacks", "hyper_parameters"])
@pytest.mark.scenario(40, "a published .ckpt with a payload in its weights, callbacks or hyper-parameters")
def test_malicious_file(golden: GoldenCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": dict(golden.state), "callbacks": {}, "hyper_parameters": {}}
    content[place]["weight"] = Attack()
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt was not opened.*run code.*system"):
        load(tmp_path / "bad.ckpt")
    assert not (tmp_path / "attacked.txt").exists()


def without(*beginnings: str) -> Callable[[dict[str, Tensor]], dict]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(beginnings)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "no METER checkpoint: 8 of the 8 tensors .* holds 0 tensors: nothing"),
        (
            lambda state: {"itm_score.fc.bias": state["itm_score.fc.bias"]},
            "no METER checkpoint: 8 of .*: itm_score.fc.bias",
        ),
        (lambda state: {"visual.conv1.weight": torch.ones(1)}, "no METER checkpoint"),
        (lambda state: {"epoch": 3, **state}, r"not all of it are tensors: epoch \(int\)"),
        (
            lambda state: {"vit_model.layers.0.attn.relative_position_bias_table": torch.ones(1)},
            "no METER checkpoint: 8 of the 8 .*vit_model.layers.3",
        ),
        (without("cross_modal_image_pooler"), "cross_modal_image_pooler.dense.weight is missing; .*bias is missing$"),
        (without("cross_modal_text_layers.0."), r"layers \[1\] of .* not numbered 0, 1, 2"),
        (
            without("cross_modal_image_layers.1."),
            "cross_modal_image_layers.1.attention.self.query.weight is missing.*and 21 more",
        ),
        (lambda state: {**state, "extra.weight": torch.ones(2, 3)}, r"extra.weight \(2, 3\) has no place"),
        (
            lambda state: {**state, "itm_score.fc.weight": torch.ones(3, 96)},
            r"itm_score.fc.weight is \(3, 96\), the model's itm_head.weight is \(2, 96\)",
        ),
        (
            lambda state: {**state, "vit_model.visual.positional_embedding": torch.ones(12, 128)},
            "positional_embedding has 12 rows, which is no class row and a square grid",
        ),
        (
            lambda state: {**state, "cross_modal_text_layers.0.attention.self.key.weight": torch.ones(47, 48)},
            r"self.query.weight is \(143, 48\), the model's .* is \(144, 48\)",
        ),
    ],
)
def test_states_that_do_not_fit(golden: GoldenCase, change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(change(dict(golden.state)))


def test_allowed_differences_are_reported(golden: GoldenCase) -> None:
    state = without("cross_modal_image_pooler")(golden.state) | {"extra.weight": torch.ones(2)}
    model, report = load(state, allow_missing=("cross_modal_image_pooler.",), allow_unexpected=("extra.",))
    assert report.missing == ("cross_modal_image_pooler.dense.weight", "cross_modal_image_pooler.dense.bias")
    assert report.unexpected == ("extra.weight",)
    text = str(report)
    assert "missing, left at random: cross_modal_image_pooler.dense.bias" in text
    assert "unexpected, left out: extra.weight" in text
    assert model.fusion.image_pooler.dense.weight.std() > 0


def test_the_file_is_named(golden: GoldenCase, tmp_path: Path) -> None:
    torch.save({"some": torch.ones(1)}, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match=r"wrong.ckpt: this is no METER checkpoint"):
        from_meter(tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match=r"absent.ckpt does not exist: .*holds wrong.ckpt"):
        from_meter(str(tmp_path / "absent.ckpt"))
    with pytest.raises(ValueError, match=r"64 wide part .* pass text_heads="):
        from_meter(golden.state)
    with pytest.raises(ValueError, match=r"48 wide part .* pass fusion_heads="):
        from_meter(golden.state, text_heads=4)
