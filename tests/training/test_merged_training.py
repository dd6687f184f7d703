"""A model with merged attention through what surrounds training: settings, groups, freezing, learning, export, and the
way to published checkpoints, which it has not."""

import dataclasses
from pathlib import Path

import pytest
import torch
from ranks import RankServer
from small_run import losses, settings, worst

import meter_fast
from meter_fast.config import ConfigError, OptimConfig, override, to_dict
from meter_fast.convert import to_checkpoint
from meter_fast.data.batch import PretrainBatch
from meter_fast.interop import from_meter, original_name, original_names, to_meter
from meter_fast.models.config import FusionConfig, ModelConfig, base, tiny
from meter_fast.models.export import load_export, save_export
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.recipes import resolve
from meter_fast.training.optimizer import GROUPS, AdamW, parameter_groups
from meter_fast.training.unreached import freeze_unreached

SETTINGS = ["pretrain", "size=tiny", "model.fusion.name=merged_attention", "model.fusion.layers=4"]


def merged(config: ModelConfig, layers: int) -> ModelConfig:
    fusion = dataclasses.replace(config.fusion, name="merged_attention", layers=layers)
    return dataclasses.replace(config, fusion=fusion)


def a_batch(vocabulary: int, size: int) -> PretrainBatch:
    """Eight random pairs of unequal length, three masked tokens each."""
    chance = torch.Generator().manual_seed(4)
    mask = torch.arange(9) < torch.tensor([9, 4, 6, 5, 8, 4, 7, 5])[:, None]
    ids = torch.randint(5, vocabulary, mask.shape, generator=chance).masked_fill(~mask, 0)
    rows = (torch.arange(8)[:, None] * 9 + torch.arange(1, 4)).flatten()
    places = torch.arange(8)
    return PretrainBatch(
        images=torch.randn(8, 3, size, size, generator=chance),
        text_ids=ids,
        text_mask=mask,
        masked_ids=ids.flatten().index_fill(0, rows, 4).view_as(ids),
        masked_rows=rows,
        masked_labels=ids.flatten()[rows],
        itm_labels=1 - places % 2,
        itm_images=places - places % 2,
        false_images=None,
        sample_ids=places,
    )


def test_the_command_line_chooses_the_fusion() -> None:
    config = resolve(SETTINGS)
    assert config.model == merged(tiny(), 4)
    assert override(config, []) == config and to_dict(config)["model"]["fusion"]["name"] == "merged_attention"
    with pytest.raises(ConfigError, match=r"model.fusion.name='merged' is unknown: use one of co_attention, merged_at"):
        resolve([*SETTINGS, "model.fusion.name=merged"])


def test_groups_are_those_of_the_fusion() -> None:
    with torch.device("meta"):
        model = Meter(merged(base(), 12), load_weights=False)
    groups = parameter_groups(model.named_parameters(), OptimConfig(), original_name)
    found = {name: GROUPS[group["index"]] for group in groups for name in group["names"]}
    assert len(found) == len(list(model.parameters()))
    for name, group in found.items():
        part = {"fusion": "fusion", "mlm_head": "heads", "itm_head": "heads"}.get(name.split(".")[0], "rest")
        if name == "fusion.token_types.weight":
            part = "rest"  # as published
        if part != "rest":
            assert group == part + ("_no_decay" if name.endswith("bias") or "norm" in name else ""), name
        assert group.startswith(part), name
    published = [name for own in found for name in original_names(own)]
    assert len(set(published)) == len(published)


@pytest.mark.parametrize(
    ("objective", "frozen"),
    [("mlm", ("fusion.text_pooler.", "fusion.image_pooler.", "itm_head.")), ("itm", ("mlm_head.",))],
)
def test_what_no_objective_reaches_is_frozen(objective: str, frozen: tuple[str, ...]) -> None:
    model = Meter(merged(tiny(vocab_size=40), 2))
    unreached = freeze_unreached(JointLoss(model, (objective,)), model.config)
    expected = {name for name, _ in model.named_parameters() if name.startswith(frozen)}
    assert {name.removeprefix("model.") for name in unreached} == expected
    assert expected == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_learns_a_batch() -> None:
    torch.manual_seed(0)
    model = Meter(merged(tiny(vocab_size=40), 3))
    module, batch = JointLoss(model), a_batch(40, model.config.vision.image_size)
    groups = parameter_groups(model.named_parameters(), OptimConfig(lr=1e-3), original_name)
    optimizer = AdamW(groups)
    seen = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"], group["step"] = 1e-3, step + 1
        optimizer.zero_grad()
        found = module(batch)
        found.loss.backward()
        optimizer.step()
        seen.append(found.loss.item())
    assert seen == sorted(seen, reverse=True)
    assert seen[3] < seen[0] - 0.2, seen


def test_export_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Meter(merged(tiny(vocab_size=40), 3)).eval()
    again = load_export(save_export(model, tmp_path / "export", None))
    assert again.config == model.config
    batch = a_batch(40, model.config.vision.image_size)
    with torch.no_grad():
        assert torch.equal(JointLoss(again)(batch).loss, JointLoss(model)(batch).loss)
    other = Meter(tiny(vocab_size=40))
    assert set(other.state_dict()) != set(model.state_dict())


def test_there_is_no_published_form(tmp_path: Path) -> None:
    model = Meter(merged(tiny(vocab_size=40), 1))
    said = r"model.fusion.name=merged_attention: published METER checkpoints have co-attention"
    with pytest.raises(ValueError, match=said):
        to_meter(model)
    with pytest.raises(ValueError, match=said):
        from_meter(to_meter(Meter(tiny(vocab_size=40))), config=model.config)
    folder = save_export(model, tmp_path / "export", None)
    with pytest.raises(ValueError, match=said):
        to_checkpoint(folder, tmp_path / "meter.ckpt")
    assert not (tmp_path / "meter.ckpt").exists()


def test_default_fusion_is_co_attention() -> None:
    assert FusionConfig() == FusionConfig("co_attention", 768, 6, 12, 0.1, 2)


@pytest.mark.slow
def test_zero_3_follows_one_process(ranks: RankServer, data: Path, tmp_path: Path) -> None:
    """Two processes with split parameters and activation checkpointing, and what they leave behind."""
    chosen = settings(
        data, *SETTINGS[2:3], "model.fusion.layers=2", "engine.dtype=fp32", "run.max_steps=6", "run.save_every=6"
    )
    ranks.train(1, tmp_path / "one", [*chosen, "engine.zero=0"]).check()
    ranks.train(2, tmp_path / "two", [*chosen, "engine.zero=3", "engine.activation_checkpointing=true"]).check()
    assert worst(losses(tmp_path / "two"), losses(tmp_path / "one")) < 1e-5
    assert meter_fast.load_model(tmp_path / "two").config.fusion.name == "merged_attention"
