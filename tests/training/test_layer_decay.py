"""Learning rates that fall from layer to layer: which layers each encoder has, and the groups that follow."""

import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from meter_fast.config import ConfigError, OptimConfig
from meter_fast.interop import original_name
from meter_fast.models import config as models
from meter_fast.models.meter import Meter
from meter_fast.models.text_presets import TEXT_PRESETS
from meter_fast.models.vision_presets import VISION_PRESETS
from meter_fast.recipes import resolve
from meter_fast.training.layer_decay import layers_above
from meter_fast.training.optimizer import Schedule, parameter_groups, shown_rates

VISION = ("clip_b16_224", "vit_b16_384", "deit_distilled_b16_384", "cait_m36_384", "volo_d4_448", "beit_b16_224",
          "swin_b_224")  # fmt: skip
LAYERS = {"cait_m36_384": 38, "volo_d4_448": 38, "clip_b16_224": 11, "swin_b_224": 24}
TEXT = ("roberta_base", "bert_base", "electra_base", "albert_base", "deberta_base", "deberta_v3_base", "clip_base")


def depths(config: models.ModelConfig, part: str) -> dict[str, int]:
    """Name -> layers above, of one encoder."""
    with torch.device("meta"):
        model = Meter(config, load_weights=False)
    return {name: layers_above(name, config) for name, _ in model.named_parameters() if name.startswith(part)}


@pytest.mark.parametrize("name", VISION)
def test_vision_layers(name: str) -> None:
    """Every depth from the embeddings to the top is there, and a block's parameters are all at one depth."""
    found = depths(replace(models.base(), vision=VISION_PRESETS[name].config), "vision.")
    count = LAYERS.get(name, 12)
    assert set(found.values()) == set(range(count + 1))
    assert {above for part, above in found.items() if "patch_embed" in part} == {count}
    assert {above for part, above in found.items() if part in ("vision.norm.weight", "vision.encoder.norm.bias")} == {0}
    blocks = defaultdict(set)
    for part, above in found.items():
        if block := re.match(r"vision\.(?:encoder\.)?(.*?\d+(?:\.blocks)?(?:\.\d+)?)\.(?:attn|mlp|norm)", part):
            blocks[block[1]].add(above)
    assert len(blocks) == count and all(len(at) == 1 for at in blocks.values())
    assert sorted(at.pop() for at in blocks.values()) == list(range(count))


@pytest.mark.parametrize(
    ("parameter", "name", "above"),
    [
        ("vision.blocks.10.mlp.fc1.weight", "clip_b16_224", 0),
        ("vision.blocks.0.mlp.fc1.weight", "clip_b16_224", 10),
        ("vision.pos_embed", "clip_b16_224", 11),
        ("vision.encoder.blocks_token_only.0.norm1.weight", "cait_m36_384", 1),
        ("vision.encoder.cls_token", "cait_m36_384", 2),
        ("vision.encoder.layers.3.downsample.reduction.weight", "swin_b_224", 1),
        ("vision.encoder.layers.2.blocks.17.norm1.weight", "swin_b_224", 2),
        ("vision.encoder.layers.1.blocks.0.norm1.weight", "swin_b_224", 21),
        ("vision.encoder.network.4.3.norm1.weight", "volo_d4_448", 2),
        ("vision.encoder.network.0.0.norm1.weight", "volo_d4_448", 37),
        ("fusion.layers.0.text.feed_forward.up.weight", "swin_b_224", 0),
        ("model.vqa_head.out.weight", "swin_b_224", 0),
    ],
)
def test_places(parameter: str, name: str, above: int) -> None:
    assert layers_above(parameter, replace(models.base(), vision=VISION_PRESETS[name].config)) == above


@pytest.mark.parametrize("name", TEXT)
def test_text_layers(name: str) -> None:
    found = depths(replace(models.base(), text=TEXT_PRESETS[name].config), "text.")
    assert {above for part, above in found.items() if part.startswith("text.embeddings.")} == {12}
    inside = {part: above for part, above in found.items() if re.search(r"\.layers?\.\d+\.", part)}
    if name == "albert_base":
        assert {above for part, above in found.items() if ".albert_layers." in part} == {0}
        assert found["text.encoder.embedding_hidden_mapping_in.weight"] == 12
    else:
        assert set(inside.values()) == set(range(12))
        for part, above in inside.items():
            assert above == 11 - int(re.search(r"\.layers?\.(\d+)\.", part)[1]), part
    for part, above in found.items():
        if "rel_embeddings" in part or part.startswith("text.encoder.LayerNorm"):
            assert above == 12, part
        if "final_layer_norm" in part:
            assert above == 0, part


def test_embeddings_only_have_no_layers() -> None:
    config = replace(models.base(), text=TEXT_PRESETS["embeddings"].config)
    assert set(depths(config, "text.").values()) == {0}


def groups_of(model: Meter, optim: OptimConfig) -> list[dict]:
    return parameter_groups(
        model.named_parameters(), optim, original_name, lambda name: layers_above(name, model.config)
    )


def test_rates_fall_in_the_encoders_alone() -> None:
    model = Meter(replace(models.tiny(64), vqa_answers=5))
    optim = OptimConfig(lr=1e-3, head_multiplier=50, cross_modal_multiplier=5, layer_decay=0.5, warmup=0)
    groups = groups_of(model, optim)
    Schedule.of(optim, 10).apply(groups, 0)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    assert rates["vision.blocks.2.mlp.fc1.weight"] == rates["vision.norm.weight"] == pytest.approx(1e-3)
    assert rates["vision.blocks.0.mlp.fc1.bias"] == pytest.approx(2.5e-4)
    assert rates["vision.patch_embed.proj.weight"] == pytest.approx(1.25e-4)
    assert rates["text.encoder.layer.0.output.dense.weight"] == pytest.approx(1e-3)
    assert rates["text.embeddings.word_embeddings.weight"] == pytest.approx(5e-4)
    assert {rates[name] for name in rates if name.startswith("fusion.layers.")} == {5e-3}
    assert rates["vqa_head.out.weight"] == pytest.approx(5e-2) and rates["mlm_head.decoder.weight"] == 5e-2
    decayed = {name: group["weight_decay"] for group in groups for name in group["names"]}
    plain = groups_of(model, replace(optim, layer_decay=1.0))
    assert decayed == {name: group["weight_decay"] for group in plain for name in group["names"]}
    shown = shown_rates(groups)
    assert len(shown) == 8 and shown["rest"] == 1e-3 and shown["rest_lowest"] == pytest.approx(1.25e-4)


def test_at_one_the_groups_are_the_published_ones() -> None:
    model = Meter(models.tiny(64))
    with_depths, without = groups_of(model, OptimConfig()), parameter_groups(
        model.named_parameters(), OptimConfig(), original_name
    )  # fmt: skip
    keys = ("index", "names", "multiplier", "weight_decay", "layers_above")
    assert [[group[key] for key in keys] for group in with_depths] == [[g[key] for key in keys] for g in without]
    assert len(without) == 6 and list(shown_rates(without)) == [
        "rest", "rest_no_decay", "heads", "heads_no_decay", "fusion", "fusion_no_decay"
    ]  # fmt: skip


@pytest.mark.parametrize(("bottom", "top"), [(1e-5, 1e-5), (5e-5, 5e-5), (1e-5, 5e-5), (1e-5, 1e-4)])
def test_bottom_and_top_rates_of_table_6(bottom: float, top: float) -> None:
    model = Meter(replace(models.tiny(64), mlm_head=False, itm_head=False, vqa_answers=5))
    optim = OptimConfig(lr=bottom, head_multiplier=top / bottom, cross_modal_multiplier=top / bottom, warmup=0)
    groups = groups_of(model, optim)
    Schedule.of(optim, 10).apply(groups, 0)
    for group in groups:
        for name in group["names"]:
            is_bottom = name.startswith(("vision.", "text.", "fusion.token_types."))  # types: as published
            assert group["lr"] == pytest.approx(bottom if is_bottom else top), name


@pytest.mark.parametrize("value", ["0", "1.1", "-1"])
def test_decay_out_of_range(value: str) -> None:
    with pytest.raises(ConfigError, match=r"optim.layer_decay=.*above 0 and at most 1"):
        resolve(["pretrain", "size=tiny", f"optim.layer_decay={value}"])
