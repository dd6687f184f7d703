"""What the documents say is what the code does."""

import re
from pathlib import Path

from meter_fast.models.text_presets import TEXT_PRESETS
from meter_fast.models.vision_presets import VISION_PRESETS

DOCS = Path(__file__).parents[1] / "docs"


def rows(text: str) -> dict[str, list[str]]:
    """First cell, without its code marks, -> the other cells of every row of the tables."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| `" in line]
    return {first.strip("`"): rest for first, *rest in cells}


def test_encoders() -> None:
    """Every name with its numbers; that these are those of the modules is tested with the models."""
    said = rows((DOCS / "encoders.md").read_text())
    assert said.keys() == VISION_PRESETS.keys() | TEXT_PRESETS.keys()
    for name, preset in VISION_PRESETS.items():
        config = preset.config
        numbers = (config.image_size, config.patch_size, config.tokens, config.width, config.layers, preset.parameters)
        assert said[name] == [config.name, *(f"{n:,}" if n > 9999 or n == config.tokens else str(n) for n in numbers),
                              f"`{config.weights}`"]  # fmt: skip
    for name, preset in TEXT_PRESETS.items():
        config = preset.config
        numbers = [int(re.sub(",", "", cell)) for cell in said[name][1:6]]
        assert said[name][0] == config.name and said[name][6] == f"`{preset.hub}`"
        assert numbers == [config.layers, config.width, config.vocab_size, config.max_length, preset.parameters]
