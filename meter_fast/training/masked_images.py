"""What masked image modelling adds to a run: the heads of the model, the hidden cells of the pictures. Knows settings,
models and the data room; nothing of steps.
"""

from dataclasses import replace

from meter_fast.config import ObjectivesConfig, RunConfig
from meter_fast.data.cell_masking import CellMasking
from meter_fast.models.config import ModelConfig


def fit_heads(config: RunConfig) -> RunConfig:
    """The configuration with the heads of masked image modelling that its objectives need, and no others."""
    model = replace(config.model, mim_in_batch_head="mim_in_batch" in config.objectives.names)
    return replace(config, model=model)


def open_cells(objectives: ObjectivesConfig, model: ModelConfig) -> CellMasking | None:
    """What hides cells of the pictures, where an objective asks for it. Raises ValueError."""
    if not {"mim_in_batch", "mim_codes"} & set(objectives.names):
        return None
    return CellMasking(model.vision.grid, objectives.mim_probability)
