"""The small published models of tests/golden, and how two tensors are compared. Helpers only, no tests."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from meter_fast.data.batch import PretrainBatch
from meter_fast.interop import LoadReport, from_meter
from meter_fast.models.meter import Meter

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = ("clip_roberta", "clip_bert", "swin_roberta")
TOLERANCE = 5e-6  # relative L2, see golden/README.md


@dataclass(frozen=True)
class GoldenCase:
    """A published model: `state` under the original's names, and `model`, ours with these weights, in evaluation
    mode."""

    name: str
    sizes: dict
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    gradient_norms: dict
    model: Meter
    report: LoadReport

    def batch(self) -> PretrainBatch:
        """The pre-training batch of the golden losses; false pictures as their own tensor, as `negatives="dataset"`
        gives."""
        inputs = self.inputs
        labels = inputs["text_labels_mlm"].flatten()
        rows = (labels != -100).nonzero().flatten()
        matching = inputs["itm_labels"] == 1
        pairs = len(matching)
        places = torch.arange(pairs)
        places[~matching] = pairs + torch.arange(int((~matching).sum()))
        return PretrainBatch(
            images=inputs["image"],
            text_ids=inputs["text_ids"],
            text_mask=inputs["text_masks"].bool(),
            masked_ids=inputs["text_ids_mlm"],
            masked_rows=rows,
            masked_labels=labels[rows],
            itm_labels=inputs["itm_labels"],
            itm_images=places,
            false_images=inputs["false_image_0"][~matching],
            sample_ids=torch.arange(pairs),
        )


@cache
def _files(name: str) -> tuple[dict, ...]:
    folder = GOLDEN / name
    tensors = [load_file(folder / f"{file}.safetensors") for file in ("state", "inputs", "outputs", "grads_pretrain")]
    texts = [json.loads((folder / f"{file}.json").read_text()) for file in ("config", "grads_pretrain")]
    return (*tensors, *texts)


def load_case(name: str) -> GoldenCase:
    """A golden case with a model of its own."""
    state, inputs, outputs, gradients, config, norms = _files(name)
    sizes = config["case"]
    model, report = from_meter(state, text_heads=sizes["text"]["num_attention_heads"], fusion_heads=sizes["heads"])
    return GoldenCase(name, sizes, state, inputs, outputs, gradients, norms, model.eval(), report)


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance; shapes must be equal."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    distance = (found.double() - expected.double()).norm()
    return (distance / expected.double().norm().clamp_min(1e-30)).item()
