"""The predictor's lower layer against the published code: logits of every head."""

from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, TOLERANCE, GoldenCase, relative
from safetensors.torch import load_file

from meter_fast.interop import from_meter
from meter_fast.models.meter import Meter
from meter_fast.predict.engine import Request, class_logits, mask_logits
from meter_fast.score_retrieval import encode_texts, match_scores


def task_model(case: GoldenCase) -> Meter:
    """The model with the heads of all tasks."""
    tasks = load_file(GOLDEN / case.name / "state_tasks.safetensors")
    heads = {"text_heads": case.sizes["text"]["num_attention_heads"], "fusion_heads": case.sizes["heads"]}
    return from_meter(case.state | tasks, **heads)[0].eval()


def requests_of(case: GoldenCase, name: str = "text_ids", pictures: int = 1) -> list[Request]:
    """Text i about picture i, and for two pictures about picture B + i: without padding."""
    rows = zip(case.inputs[name], case.inputs["text_masks"].bool(), strict=True)
    count = len(case.inputs[name])
    return [
        Request(ids[mask].tolist(), tuple(i + count * p for p in range(pictures))) for i, (ids, mask) in enumerate(rows)
    ]


@pytest.mark.parametrize("batch", [1, 3, 32])
@pytest.mark.parametrize(
    ("task", "head", "images"),
    [
        ("vqa", "vqa_head", ["image"]),
        ("snli", "snli_head", ["image"]),
        ("itm", "itm_head", ["itm_image"]),
        ("nlvr2", "nlvr2_head", ["image_0", "image_1"]),
    ],
)
def test_classes(case: GoldenCase, task: str, head: str, images: list[str], batch: int) -> None:
    pixels = torch.cat([case.inputs[name] for name in images])
    requests = requests_of(case, pictures=len(images))
    found = class_logits(task_model(case), head, lambda n: pixels[n], requests, batch)
    assert relative(torch.stack(found), case.outputs[f"{task}/logits"]) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_masks(case: GoldenCase, batch: int) -> None:
    """At every token with a label."""
    labels = case.inputs["text_labels_mlm"] != -100
    requests = [
        replace(request, places=tuple(row.nonzero()[:, 0].tolist()))
        for request, row in zip(requests_of(case, "text_ids_mlm"), labels, strict=True)
    ]
    found = dict(mask_logits(task_model(case), lambda n: case.inputs["image"][n], requests, batch))
    assert sorted(found) == list(range(len(requests)))
    logits = torch.cat([found[number] for number in sorted(found)])
    assert relative(logits, case.outputs["mlm/logits"][labels]) < TOLERANCE


def test_nlvr2_tells_the_pictures_apart(case: GoldenCase) -> None:
    """With the two exchanged the numbers are others: the token types count."""
    pixels = torch.cat([case.inputs["image_1"], case.inputs["image_0"]])
    found = class_logits(task_model(case), "nlvr2_head", lambda n: pixels[n], requests_of(case, pictures=2), 32)
    assert relative(torch.stack(found), case.outputs["nlvr2/logits"]) > 1e-3


@torch.inference_mode()
def test_ranking_head(case: GoldenCase) -> None:
    """Every picture against every text."""
    model, ids = task_model(case), [request.ids for request in requests_of(case)]
    scores = match_scores(model, model.encode_image(case.inputs["image"]), encode_texts(model, ids))
    assert relative(scores, case.outputs["recall/scores"]) < TOLERANCE
