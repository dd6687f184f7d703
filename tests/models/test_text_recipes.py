"""Text encoders from the command line: one argument brings sizes, weights and tokenizer."""

import typing

import pytest

from meter_fast.config import ConfigError, RunConfig, from_dict, to_dict
from meter_fast.models.text_presets import TEXT_PRESETS, TextChoice
from meter_fast.recipes import resolve


def test_every_preset_can_be_chosen() -> None:
    assert typing.get_args(TextChoice) == ("default", *TEXT_PRESETS)


@pytest.mark.parametrize("choice", TEXT_PRESETS)
def test_base_run(choice: str) -> None:
    config = resolve(["pretrain", "size=base", f"text={choice}"])
    preset = TEXT_PRESETS[choice]
    assert config.model.text == preset.pretrained()
    assert config.model.text.weights == config.data.tokenizer == preset.hub
    assert config.data.max_text_length <= config.model.text.max_length
    assert from_dict(RunConfig, to_dict(config)) == config


def test_settings_come_after_the_choice() -> None:
    config = resolve(["pretrain", "model.text.weights=none", "text=clip_base", "model.text.layers=6"])
    assert (config.model.text.name, config.model.text.layers, config.model.text.weights) == ("clip", 6, None)


def test_default_is_the_published_model() -> None:
    assert resolve(["pretrain", "text=default"]) == resolve(["pretrain"]) == resolve(["pretrain", "text=roberta_base"])


@pytest.mark.parametrize("choice", TEXT_PRESETS)
def test_tiny_run(choice: str) -> None:
    config = resolve(["pretrain", "size=tiny", f"text={choice}"])
    assert config.model.text.name == TEXT_PRESETS[choice].config.name
    assert config.model.text.width == 128 and config.model.text.weights is None
    assert config.data.tokenizer == "trained"


def test_unknown_choices() -> None:
    with pytest.raises(ConfigError, match=r"text=xlnet: one of default, roberta_base, .*deberta_v3_base"):
        resolve(["pretrain", "text=xlnet"])
    with pytest.raises(ConfigError, match=r"model.text.name='xlnet' is unknown: use one of roberta"):
        resolve(["pretrain", "model.text.name=xlnet"])
