"""Fine-tuning recipes by name: encoders bring what belongs to them."""

import pytest

from meter_fast.models.vision_presets import VISION_PRESETS
from meter_fast.recipes import resolve


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_image_encoders(name: str) -> None:
    config = resolve(["vqa", f"vision={name}", "from_encoders=true"])
    preset = VISION_PRESETS[name]
    vision = config.model.vision
    assert (vision.name, vision.weights) == (preset.config.name, preset.config.weights)
    assert vision.image_size == (574 if vision.patch_size == 14 else 576)
    assert config.data.transform == preset.transform


def test_text_encoders_bring_their_tokenizer() -> None:
    assert resolve(["vqa", "text=bert_base"]).data.tokenizer == "bert-base-uncased"
    assert resolve(["vqa"]).data.tokenizer == "roberta-base"
    assert resolve(["vqa", "size=tiny", "text=bert_base"]).data.tokenizer == "init"


def test_augmentation_is_the_published_one_at_size_base() -> None:
    for settings in ([], ["published=true"], ["vision=swin_b_384"]):
        assert resolve(["vqa", *settings]).data.augment == "randaugment_published"
    assert resolve(["vqa", "data.augment=randaugment"]).data.augment == "randaugment"
    assert resolve(["vqa", "size=tiny"]).data.augment == resolve(["pretrain"]).data.augment == "none"
