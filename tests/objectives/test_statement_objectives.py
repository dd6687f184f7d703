"""NLVR2 and SNLI-VE against the published code's numbers and the plain form of two passes, and what the trainer relies
on."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from golden_cases import GOLDEN, GOLDEN_CASES, TOLERANCE, GoldenCase, load_case, relative
from partitioned import partition
from safetensors.torch import load_file
from small_case import small_batch, small_model
from torch import Tensor

from benchmarks.plain import plain_losses
from meter_fast.data.batch import StatementBatch
from meter_fast.interop import from_meter, to_meter
from meter_fast.models.config import DecoderConfig, ModelConfig
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.objectives.losses import classified

TASKS = ("nlvr2", "snli_ve")
HEADS = {"nlvr2": "nlvr2_head", "snli_ve": "snli_head"}
PUBLISHED = {"nlvr2": "nlvr2", "snli_ve": "snli"}
CLASSES = {"nlvr2": 2, "snli_ve": 3}


@pytest.fixture(params=GOLDEN_CASES)
def golden(request: pytest.FixtureRequest) -> GoldenCase:
    return load_case(request.param)


def task_state(case: GoldenCase, task: str) -> dict[str, Tensor]:
    """The published state dict of the fine-tuned model: no heads of pre-training, of NLVR2 three token types.

    The golden numbers of SNLI-VE are of a model with all three, of which it reads the first two.
    """
    tasks = load_file(GOLDEN / case.name / "state_tasks.safetensors")
    state = {name: value for name, value in case.state.items() if not name.startswith(("mlm_score.", "itm_score."))}
    state |= {name: value for name, value in tasks.items() if name.startswith(f"{PUBLISHED[task]}_classifier.")}
    return state | ({"token_type_embeddings.weight": tasks["token_type_embeddings.weight"]} if task == "nlvr2" else {})


def task_model(case: GoldenCase, task: str) -> Meter:
    heads = case.sizes["text"]["num_attention_heads"], case.sizes["heads"]
    return from_meter(task_state(case, task), text_heads=heads[0], fusion_heads=heads[1])[0].eval()


def golden_batch(case: GoldenCase, task: str) -> StatementBatch:
    inputs, count = case.inputs, len(case.inputs["image"])
    images, labels = ("image",), inputs["snli_labels"]
    if task == "nlvr2":
        images, labels = ("image_0", "image_1"), inputs["nlvr2_answers"]
    return StatementBatch(
        images=torch.cat([inputs[name] for name in images]),
        image_rows=torch.arange(len(images) * count).view(len(images), count).T,
        text_ids=inputs["text_ids"],
        text_mask=inputs["text_masks"].bool(),
        labels=labels,
        sample_ids=torch.arange(count),
    )


def task_config(model: Meter, task: str) -> ModelConfig:
    """The configuration of `model` with the head of a task."""
    config = dataclasses.replace(model.config, mlm_head=False, itm_head=False)
    if task == "nlvr2":
        config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, token_types=3))
    return dataclasses.replace(config, **{HEADS[task]: True})


def small_task_model(task: str, **options: object) -> Meter:
    """A random model; its rows of token types differ much."""
    config = task_config(small_model(**options), task)
    torch.manual_seed(5)
    model = Meter(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def small_task_batch(task: str) -> StatementBatch:
    """Six statements about five pictures; of NLVR2 one is about a picture beside itself, and some are left here and
    right there."""
    pairs = small_batch()
    rows = torch.tensor([[0, 1], [0, 1], [1, 0], [2, 3], [4, 4], [3, 2]])[:, : 2 if task == "nlvr2" else 1]
    labels = torch.tensor([0, 1, 1, 0, 1, 0]) if task == "nlvr2" else torch.tensor([0, 1, 2, 2, 1, 0])
    return StatementBatch(pairs.images[:5], rows, pairs.text_ids, pairs.text_mask, labels, torch.arange(6) + 10)


def watch(model: Meter, task: str) -> dict[str, Tensor]:
    """A dictionary that gets the input and output of the head."""
    seen: dict[str, Tensor] = {}
    getattr(model, HEADS[task]).register_forward_hook(
        lambda _m, inputs, output: seen.update(cls=inputs[0], logits=output)
    )
    return seen


@pytest.mark.parametrize("task", TASKS)
def test_logits_and_loss_are_the_published_ones(golden: GoldenCase, task: str) -> None:
    model, batch, name = task_model(golden, task), golden_batch(golden, task), PUBLISHED[task]
    seen = watch(model, task)
    losses = JointLoss(model, (task,))(batch)
    assert relative(seen["logits"], golden.outputs[f"{name}/logits"]) < TOLERANCE
    assert relative(losses.parts[task], golden.outputs[f"{name}/loss"]) < TOLERANCE
    if task == "nlvr2":
        assert relative(seen["cls"], golden.outputs["nlvr2/cls_feats"]) < TOLERANCE
    right = (golden.outputs[f"{name}/logits"].argmax(-1) == batch.labels).sum().item()
    assert [value.item() for value in losses.metrics[task]] == [right, len(batch)]


@pytest.mark.parametrize("task", TASKS)
def test_published_names_in_and_out(golden: GoldenCase, task: str) -> None:
    state, model = task_state(golden, task), task_model(golden, task)
    assert getattr(model, HEADS[task]) is not None and not model.config.mlm_head and not model.config.itm_head
    assert model.config.fusion.token_types == (3 if task == "nlvr2" else 2)
    written = to_meter(model)
    assert set(written) == set(state)
    for name in ("token_type_embeddings.weight", *(n for n in state if "_classifier." in n)):
        assert torch.equal(written[name], state[name]), name


@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layers", [1, 2])
def test_one_pass_is_two(task: str, fusion: str, layers: int) -> None:
    """Outputs, loss and all gradients, in float64, are those of passes that share nothing."""
    model = small_task_model(task, fusion=fusion, fusion_layers=layers).double()
    batch = small_task_batch(task).to("cpu", torch.float64)
    seen, found = watch(model, task), []
    for plain in (True, False):
        model.zero_grad()
        loss = plain_losses(model, batch, (task,))[task] if plain else JointLoss(model, (task,))(batch).loss
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((seen["logits"].detach(), loss.item(), grads))
    (logits, loss, grads), (ours, our_loss, our_grads) = found
    assert relative(ours, logits) < 1e-12
    assert our_loss == pytest.approx(loss, rel=1e-6)  # the loss is in float32
    assert grads.keys() == our_grads.keys() and any(name.startswith(HEADS[task]) for name in grads)
    for name, grad in grads.items():
        assert torch.allclose(our_grads[name], grad, rtol=1e-6, atol=1e-9), name
    rows = our_grads["fusion.token_types.weight"].abs().sum(1)
    assert len(rows) == (3 if task == "nlvr2" else 2) and rows.min() > 0


def test_left_and_right_are_told_apart() -> None:
    """Exchanged pictures give other logits, and not those of exchanged halves alone."""
    model, batch = small_task_model("nlvr2").eval(), small_task_batch("nlvr2")
    seen = watch(model, "nlvr2")
    with torch.no_grad():
        JointLoss(model, ("nlvr2",))(batch)
        cls = seen["cls"]
        JointLoss(model, ("nlvr2",))(replace(batch, image_rows=batch.image_rows.flip(1)))
    half = cls.shape[1] // 2
    assert relative(seen["cls"], cls) > 1e-2
    assert relative(seen["cls"], torch.cat([cls[:, half:], cls[:, :half]], 1)) > 1e-2


def test_with_a_decoder() -> None:
    """The decoder's one row of each picture, side by side."""
    config = dataclasses.replace(task_config(small_model(), "nlvr2"), decoder=DecoderConfig(layers=1))
    torch.manual_seed(1)
    model, batch = Meter(config).double().eval(), small_task_batch("nlvr2").to("cpu", torch.float64)
    seen = watch(model, "nlvr2")
    with torch.no_grad():
        plain_losses(model, batch, ("nlvr2",))
        expected = seen["logits"]
        JointLoss(model, ("nlvr2",))(batch)
    assert relative(seen["logits"], expected) < 1e-9


@pytest.mark.parametrize("task", TASKS)
def test_pictures_and_statements_are_encoded_once(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = small_task_model(task), []
    for name in ("encode_image", "encode_text"):
        encode = getattr(model, name)

        def counted(*given: object, name: str = name, encode: object = encode) -> Tensor:
            seen.append((name, len(given[0])))
            return encode(*given)

        monkeypatch.setattr(model, name, counted)
    JointLoss(model, (task,))(small_task_batch(task))
    assert sorted(seen) == [("encode_image", 5), ("encode_text", 6)]


@pytest.mark.parametrize("task", TASKS)
def test_totals_divide_a_step(task: str) -> None:
    """Two micro-batches of four and two statements, each told half of the step's."""
    model, batch = small_task_model(task).double(), small_task_batch(task).to("cpu", torch.float64)
    whole = JointLoss(model, (task,))(batch).loss.item()
    parts = []
    for rows in (slice(0, 4), slice(4, 6)):
        fields = {name: value[rows] for name, value in vars(batch).items() if name not in ("images", "text_rows")}
        parts.append(JointLoss(model, (task,))(StatementBatch(batch.images, **fields), {task: 3.0}).loss.item())
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_keeps_the_loss_in_float32(task: str) -> None:
    model, batch = small_task_model(task), small_task_batch(task)
    expected = JointLoss(model, (task,))(batch).loss.item()
    moved = batch.to("cpu", torch.bfloat16)
    assert (moved.images.dtype, moved.labels.dtype, moved.image_rows.dtype) == (torch.bfloat16, *[torch.int64] * 2)
    losses = JointLoss(model.bfloat16(), (task,))(moved)
    losses.loss.backward()
    assert losses.loss.dtype == torch.float32 and losses.loss.item() == pytest.approx(expected, rel=3e-2)
    assert getattr(model, HEADS[task]).out.weight.grad.isfinite().all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
def test_parameters_are_used_inside_their_own_module(task: str, fusion: str) -> None:
    """As under ZeRO-3."""
    model, batch = small_task_model(task, fusion=fusion), small_task_batch(task)
    module = JointLoss(model, (task,)).eval()
    with torch.no_grad():
        expected = module(batch).loss.item()
        partition(model)
        assert module(batch).loss.item() == expected


@pytest.mark.parametrize("task", TASKS)
def test_packed_texts_give_the_same_loss(task: str) -> None:
    model, batch = small_task_model(task), small_task_batch(task)
    expected = JointLoss(model, (task,))(batch).loss.item()
    model.kernels = replace(model.kernels, text="packed")
    rows = batch.text_mask.flatten().nonzero().flatten()
    for one in (batch, replace(batch, text_rows=rows)):
        assert JointLoss(model, (task,))(one).loss.item() == pytest.approx(expected, rel=1e-5)


def running(values: Sequence[tuple[float, int]]) -> float:
    return sum(right for right, _ in values) / sum(count for _, count in values)


def test_running_accuracy_is_the_published_metric() -> None:
    """The published metric leaves out labels of -100, which no statement has."""
    metrics, seen = load_file(GOLDEN / "metrics.safetensors"), []
    for number, expected in enumerate(json.loads((GOLDEN / "metrics.json").read_text())["accuracy_after_update"]):
        logits, labels = metrics[f"acc.logits.{number}"].flatten(0, -2), metrics[f"acc.targets.{number}"].flatten()
        kept = labels != -100
        seen.append((classified(logits[kept], labels[kept], 1.0)[1].item(), int(kept.sum())))
        assert running(seen) == pytest.approx(expected, abs=1e-6)


def test_errors() -> None:
    for task, setting in (("nlvr2", "nlvr2_head=true"), ("snli_ve", "snli_head=true")):
        with pytest.raises(ValueError, match=rf"'{task}' needs a head.*model.{setting}"):
            JointLoss(small_model(), (task,))
    with pytest.raises(ValueError, match="tells two pictures apart, which takes 3"):
        dataclasses.replace(small_model().config, nlvr2_head=True)
