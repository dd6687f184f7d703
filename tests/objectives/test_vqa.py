"""Visual question answering against the published code's numbers, and what the trainer relies on."""

import json
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, GOLDEN_CASES, TOLERANCE, GoldenCase, load_case, relative
from partitioned import partition
from safetensors.torch import load_file
from small_case import small_batch, small_model
from torch import Tensor

from meter_fast.data.batch import VqaBatch
from meter_fast.interop import from_meter, to_meter
from meter_fast.models.heads import AnswerHead
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss, counts_of, shares
from meter_fast.objectives.vqa import answer_scores

VQA = "vqa_classifier."
ANSWERS = 7


@pytest.fixture(params=GOLDEN_CASES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return load_case(request.param)


def task_state(case: GoldenCase) -> dict[str, Tensor]:
    """The published state dict of the fine-tuned model: no heads of pre-training."""
    tasks = load_file(GOLDEN / case.name / "state_tasks.safetensors")
    state = {name: value for name, value in case.state.items() if not name.startswith(("mlm_score.", "itm_score."))}
    return state | {name: value for name, value in tasks.items() if name.startswith(VQA)}


def task_model(case: GoldenCase) -> Meter:
    heads = case.sizes["text"]["num_attention_heads"], case.sizes["heads"]
    return from_meter(task_state(case), text_heads=heads[0], fusion_heads=heads[1])[0].eval()


def golden_batch(case: GoldenCase) -> VqaBatch:
    inputs, count = case.inputs, len(case.inputs["image"])
    return VqaBatch(
        images=inputs["image"],
        image_rows=torch.arange(count),
        text_ids=inputs["text_ids"],
        text_mask=inputs["text_masks"].bool(),
        targets=inputs["vqa_targets"],
        question_ids=torch.arange(count),
        sample_ids=torch.arange(count),
    )


def small_vqa_model(**options: object) -> Meter:
    model = small_model(**options)
    torch.manual_seed(5)
    model.vqa_head = AnswerHead(model.config.cls_width, model.config.fusion.width, ANSWERS)
    return model


def small_vqa_batch() -> VqaBatch:
    """Six questions about four pictures."""
    pairs = small_batch()
    chance = torch.Generator().manual_seed(3)
    targets = torch.rand(6, ANSWERS, generator=chance) * (torch.rand(6, ANSWERS, generator=chance) < 0.4)
    rows = torch.tensor([0, 0, 1, 2, 3, 3])
    return VqaBatch(
        pairs.images[:4], rows, pairs.text_ids, pairs.text_mask, targets, torch.arange(6), torch.arange(6) + 10
    )


def test_logits_and_loss_are_the_published_ones(golden: GoldenCase) -> None:
    model, seen = task_model(golden), {}
    model.vqa_head.register_forward_hook(lambda _m, _i, output: seen.update(logits=output))
    batch = golden_batch(golden)
    losses = JointLoss(model, ("vqa",))(batch)
    assert relative(seen["logits"], golden.outputs["vqa/logits"]) < TOLERANCE
    assert relative(losses.parts["vqa"], golden.outputs["vqa/loss"]) < TOLERANCE
    right, count = losses.metrics["vqa"]
    best = golden.outputs["vqa/logits"].argmax(-1).tolist()
    expected = sum(row[place].item() for row, place in zip(golden.inputs["vqa_targets"], best, strict=True))
    assert right.item() == pytest.approx(expected) and count.item() == len(best)


def test_published_names_in_and_out(golden: GoldenCase) -> None:
    state = task_state(golden)
    model = task_model(golden)
    assert model.config.vqa_answers == len(state[f"{VQA}3.bias"]) > 0
    assert not model.config.mlm_head and not model.config.itm_head
    written = to_meter(model)
    for name in (name for name in state if name.startswith(VQA)):
        assert torch.equal(written[name], state[name]), name
    assert set(written) == set(state)


@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
def test_questions_about_one_picture_share_its_encoding(fusion: str) -> None:
    """Losses and all gradients are those of the batch in which every question has a picture of its own."""
    model, batch = small_vqa_model(fusion=fusion).double(), small_vqa_batch()
    batch = batch.to("cpu", torch.float64)
    plain = replace(batch, images=batch.images[batch.image_rows], image_rows=torch.arange(6))
    found = []
    for one in (batch, plain):
        model.zero_grad()
        losses = JointLoss(model, ("vqa",))(one)
        losses.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((losses, grads))
    (shared, ours), (alone, theirs) = found
    assert shared.loss.item() == pytest.approx(alone.loss.item(), rel=1e-12)
    assert shared.metrics["vqa"][0] == alone.metrics["vqa"][0]
    assert ours.keys() == theirs.keys() and any(name.startswith("vqa_head.") for name in ours)
    for name, grad in ours.items():
        assert torch.allclose(grad, theirs[name], rtol=1e-6, atol=1e-9), name


def test_totals_divide_a_step() -> None:
    """Two micro-batches of four and two questions, each told half of the step's."""
    model, batch = small_vqa_model().double(), small_vqa_batch().to("cpu", torch.float64)
    whole = JointLoss(model, ("vqa",))(batch).loss.item()
    parts = []
    for rows in (slice(0, 4), slice(4, 6)):
        fields = {name: value[rows] for name, value in vars(batch).items() if name not in ("images", "text_rows")}
        parts.append(JointLoss(model, ("vqa",))(VqaBatch(batch.images, **fields), {"vqa": 3.0}).loss.item())
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
def test_whole_pictures_divide_a_step(fusion: str) -> None:
    """Micro-batches of one picture with two questions and of three with four, each picture encoded once: loss and all
    gradients of the step in which every question brings its own."""
    model, batch = small_vqa_model(fusion=fusion).double(), small_vqa_batch().to("cpu", torch.float64)
    found = []
    alone = replace(batch, images=batch.images[batch.image_rows], image_rows=torch.arange(6))
    parts = []
    for rows, pictures in ((slice(0, 2), slice(0, 1)), (slice(2, 6), slice(1, 4))):
        fields = {name: value[rows] for name, value in vars(batch).items() if name not in ("images", "text_rows")}
        fields["image_rows"] = fields["image_rows"] - pictures.start
        parts.append(VqaBatch(batch.images[pictures], **fields))
    for micro_batches in ([alone], parts):
        model.zero_grad()
        totals = shares(counts_of(("vqa",), micro_batches), len(micro_batches))
        losses = [JointLoss(model, ("vqa",))(one, totals).loss / len(micro_batches) for one in micro_batches]
        torch.stack(losses).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((sum(losses).item(), grads))
    (plain, expected), (grouped, grads) = found
    assert grouped == pytest.approx(plain, rel=1e-6) and grads.keys() == expected.keys() and len(grads) > 50
    for name, grad in grads.items():  # the loss is in float32
        assert torch.allclose(grad, expected[name], rtol=1e-5, atol=1e-8), name


def test_bfloat16_keeps_targets_and_loss_in_float32() -> None:
    model, batch = small_vqa_model(), small_vqa_batch()
    expected = JointLoss(model, ("vqa",))(batch).loss.item()
    moved = batch.to("cpu", torch.bfloat16)
    assert (moved.images.dtype, moved.targets.dtype) == (torch.bfloat16, torch.float32)
    losses = JointLoss(model.bfloat16(), ("vqa",))(moved)
    losses.loss.backward()
    assert losses.loss.dtype == torch.float32
    assert losses.loss.item() == pytest.approx(expected, rel=2e-2)
    assert model.vqa_head.out.weight.grad.isfinite().all()


def test_parameters_are_used_inside_their_own_module() -> None:
    """As under ZeRO-3."""
    model, batch = small_vqa_model(), small_vqa_batch()
    module = JointLoss(model, ("vqa",)).eval()
    with torch.no_grad():
        expected = module(batch).loss.item()
        partition(model)
        assert module(batch).loss.item() == expected


def test_packed_texts_give_the_same_loss() -> None:
    model, batch = small_vqa_model(), small_vqa_batch()
    expected = JointLoss(model, ("vqa",))(batch).loss.item()
    model.kernels = replace(model.kernels, text="packed")
    rows = batch.text_mask.flatten().nonzero().flatten()
    for one in (batch, replace(batch, text_rows=rows)):
        assert JointLoss(model, ("vqa",))(one).loss.item() == pytest.approx(expected, rel=1e-5)


def test_score_of_the_first_choice() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0], [3.0, 1.0, 2.0], [0.0, 0.1, 0.2]])
    targets = torch.tensor([[0.3, 0.6, 1.0], [0.0, 1.0, 0.9], [0.0, 0.0, 1.0]])
    assert answer_scores(logits, targets).tolist() == pytest.approx([0.6, 0.0, 1.0])


def test_running_score_is_the_published_metric() -> None:
    metrics = load_file(GOLDEN / "metrics.safetensors")
    scores: list[float] = []
    for number, expected in enumerate(json.loads((GOLDEN / "metrics.json").read_text())["vqa_after_update"]):
        scores += answer_scores(metrics[f"vqa.logits.{number}"], metrics[f"vqa.targets.{number}"]).tolist()
        assert sum(scores) / len(scores) == pytest.approx(expected, abs=1e-6)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"'vqa' needs a head.*model.vqa_answers=NUMBER"):
        JointLoss(small_model(), ("vqa",))
    batch = small_vqa_batch()
    with pytest.raises(ValueError, match=r"scores 6 answers, the model 7: set model.vqa_answers=6"):
        JointLoss(small_vqa_model(), ("vqa",))(replace(batch, targets=batch.targets[:, :6]))
