"""An encoder-decoder through what surrounds training: recipe, settings, groups, vocabulary, several processes, export,
and the way to published checkpoints, which it has not."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ranks import RankServer
from small_run import settings

import meter_fast
from meter_fast.config import ConfigError, ObjectivesConfig, OptimConfig, RunConfig, from_dict, to_dict
from meter_fast.data.spans import add_sentinels, read_sentinels
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer
from meter_fast.interop import original_name, original_names, to_meter
from meter_fast.models.config import DecoderConfig, ModelConfig, base, tiny
from meter_fast.models.meter import Meter
from meter_fast.predict import caption
from meter_fast.recipes import resolve
from meter_fast.training.optimizer import GROUPS, parameter_groups
from meter_fast.training.pairs import fit_vocabulary


def with_decoder(config: ModelConfig, layers: int) -> ModelConfig:
    fusion = dataclasses.replace(config.fusion, layers=layers)
    return dataclasses.replace(config, fusion=fusion, decoder=DecoderConfig(layers), mlm_head=False)


@pytest.mark.parametrize(("size", "layers", "decoder"), [("base", 3, 3), ("tiny", 2, 1)])
def test_the_recipe(size: str, layers: int, decoder: int) -> None:
    config = resolve(["pretrain", f"size={size}", "fusion=encoder_decoder"])
    plain = resolve(["pretrain", f"size={size}"])
    assert (config.model.fusion.layers, config.model.decoder.layers) == (layers, decoder)
    assert dataclasses.replace(config.model, decoder=DecoderConfig(layers)) == with_decoder(plain.model, layers)
    names = ("span_denoising", "itm", "caption") if size == "tiny" else ("span_denoising", "itm")
    assert config.objectives.names == names
    assert from_dict(RunConfig, to_dict(config)) == config
    assert resolve(["pretrain", f"size={size}", "fusion=co_attention"]) == plain
    merged = resolve(["pretrain", f"size={size}", "fusion=merged_attention", "text=bert_base"]).model
    assert (merged.fusion.name, merged.fusion.layers) == ("merged_attention", {"base": 12, "tiny": 4}[size])
    assert merged.decoder.layers == 0
    assert merged.text == resolve(["pretrain", f"size={size}", "text=bert_base"]).model.text


def test_settings_that_contradict() -> None:
    with pytest.raises(ConfigError, match=r"fusion=decoder: one of co_attention, merged_attention, encoder_decoder"):
        resolve(["pretrain", "fusion=decoder"])
    with pytest.raises(ConfigError, match=r"objectives.names=caption,itm: .*model.decoder.layers=1 or more"):
        resolve(["pretrain", "objectives.names=caption,itm"])
    for key, value in (("span_probability", "1.0"), ("span_length", "0.5")):
        with pytest.raises(ConfigError, match=rf"objectives.{key}={value}"):
            resolve(["pretrain", f"objectives.{key}={value}"])
    with pytest.raises(ConfigError, match=r"model.decoder.layers=-2: 0 \(no decoder\) or more"):
        resolve(["pretrain", "model.decoder.layers=-2"])


def test_groups_are_those_of_the_fusion_and_the_heads() -> None:
    with torch.device("meta"):
        model = Meter(with_decoder(base(), 3), load_weights=False)
    groups = parameter_groups(model.named_parameters(), OptimConfig(), original_name)
    found = {name: GROUPS[group["index"]] for group in groups for name in group["names"]}
    assert len(found) == len(list(model.parameters()))
    for name, group in found.items():
        part = {"decoder": "fusion", "lm_head": "heads", "itm_head": "heads"}.get(name.split(".")[0])
        if part is not None:
            assert group == part + ("_no_decay" if name.endswith("bias") or "norm" in name else ""), name
    published = [name for own in found for name in original_names(own)]
    assert len(set(published)) == len(published)


def test_there_is_no_published_form() -> None:
    with pytest.raises(ValueError, match=r"model.decoder.layers=1: published METER checkpoints have no decoder"):
        to_meter(Meter(with_decoder(tiny(vocab_size=40), 1)))


def fitted(tokenizer, objectives: ObjectivesConfig, **text: object) -> RunConfig:
    config = resolve(["pretrain", "size=tiny", "fusion=encoder_decoder"])
    model = dataclasses.replace(config.model, text=dataclasses.replace(config.model.text, **text))
    return fit_vocabulary(dataclasses.replace(config, model=model, objectives=objectives), tokenizer)


def test_the_vocabulary_grows_by_the_sentinels_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red circle", "two blue squares"], tmp_path, "bert", 64)
    words, goals = len(tokenizer), ObjectivesConfig(("span_denoising",), span_probability=0.3, span_length=2.0)
    pretrained = {"weights": "bert-base", "vocab_size": words, "pad_id": 0}
    assert fitted(tokenizer, goals, **pretrained).model.text.added_tokens == 0
    add_sentinels(tokenizer, 4)
    text = fitted(tokenizer, goals, **pretrained).model.text
    assert (text.vocab_size, text.added_tokens) == (words + 4, 4)
    spare = fitted(tokenizer, goals, **{**pretrained, "vocab_size": words + 9}).model.text
    assert (spare.vocab_size, spare.added_tokens) == (words + 9, 0)
    fresh = fitted(tokenizer, goals).model.text
    assert (fresh.vocab_size, fresh.added_tokens) == (words + 4, 0)
    with pytest.raises(ConfigError, match=rf"has {words + 4} tokens, model.text.vocab_size={words} rows"):
        fitted(tokenizer, ObjectivesConfig(("mlm", "itm")), **pretrained)
    tokenizer.add_tokens(["purple"])
    with pytest.raises(ConfigError, match=rf"has {words + 5} tokens"):
        fitted(tokenizer, goals, **pretrained)


def test_positions_for_what_is_written(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a red circle"], tmp_path, "bert", 64, sentinels=1)
    config = resolve(["pretrain", "size=tiny", "fusion=encoder_decoder", "model.decoder.max_positions=39"])
    with pytest.raises(ConfigError, match=r"model.decoder.max_positions=39: .*max_text_length=40 .* up to 40"):
        fit_vocabulary(config, tokenizer)


def losses(run_dir: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [list(row["loss"].values()) for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
def test_two_processes_follow_one(fusion: str, ranks: RankServer, data: Path, tmp_path: Path) -> None:
    """Split parameters, accumulation and activation checkpointing against a single process; and what is left behind."""
    chosen = settings(
        data, "fusion=encoder_decoder", f"model.fusion.name={fusion}", "objectives.names=span_denoising,itm",
        "engine.dtype=fp32", "run.max_steps=6", "run.save_every=6", "optim.warmup=2",
    )  # fmt: skip
    ranks.train(1, tmp_path / "one", [*chosen, "engine.zero=0"]).check()
    split = ["engine.zero=3", "engine.micro_batch=2", "engine.activation_checkpointing=true"]
    ranks.train(2, tmp_path / "two", [*chosen, *split]).check()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and one[-1][0] < one[0][0]
    for row, other in zip(one, two, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    model = meter_fast.load_model(tmp_path / "two")
    tokenizer = load_tokenizer(tmp_path / "two" / "export" / "tokenizer")
    assert model.config.decoder == DecoderConfig(1) and len(tokenizer) == model.config.text.vocab_size
    assert len(read_sentinels(tokenizer)) == 4  # 12 of 40 tokens in spans of 3
    with torch.no_grad():
        encoded = model.encode_image(torch.zeros(2, 3, 32, 32))
    assert len(caption(model, tokenizer, encoded, beams=2, max_length=4)) == 2
