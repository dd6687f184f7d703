"""Each exact saving against the plain form: outputs, losses, all gradients (dropout off, float64), and that work is
saved."""

import pytest
import torch
from golden_cases import relative
from small_case import small_batch, small_model
from torch import Tensor, nn

from benchmarks.plain import plain_losses
from meter_fast.models.config import FUSIONS, PARTS
from meter_fast.models.meter import Meter, Need, Part
from meter_fast.objectives.joint import JointLoss

EXACT = 1e-6  # losses are computed in float32, the rest here in float64


def gradients(model: Meter) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def check_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        if value is None or name.endswith(("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias")):
            continue
        assert found[name] is not None, f"{name} lost its gradient"
        assert relative(found[name], value) < EXACT, (name, relative(found[name], value))
    for name, value in found.items():
        assert value is None or not value.any() or expected[name] is not None, f"{name} should have no gradient"


def check_value_bias_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """The last third (or half) of a packed bias is the values', which is signal."""
    names = [name for name in expected if name.endswith(("query_key_value.bias", "key_value.bias", "qkv.bias"))]
    assert names
    for name in names:
        value = expected[name].chunk(2 if name.endswith("n.key_value.bias") else 3)[-1]
        assert relative(found[name][-len(value) :], value) < EXACT, name


@pytest.mark.parametrize("text", ["bert", "roberta"])
@pytest.mark.parametrize("negatives", ["batch", "dataset"])
@pytest.mark.parametrize("fusion_layers", [1, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_pretraining_equals_two_whole_passes(text: str, negatives: str, fusion_layers: int, fusion: str) -> None:
    model = small_model(text, fusion_layers, fusion=fusion).double()
    batch = small_batch(negatives, pad_id=model.config.text.pad_id).to("cpu", torch.float64)
    plain = plain_losses(model, batch)
    (plain["mlm"] + plain["itm"]).backward()
    expected = gradients(model)
    losses = JointLoss(model)(batch)
    losses.loss.backward()
    found = gradients(model)
    assert losses.loss.dtype == torch.float64
    for name, value in plain.items():
        assert losses.parts[name].item() == pytest.approx(value.item(), rel=EXACT)
    assert losses.loss.item() == pytest.approx((plain["mlm"] + plain["itm"]).item(), rel=EXACT)
    check_gradients(found, expected)
    check_value_bias_gradients(found, expected)


@pytest.mark.parametrize("name", ["mlm", "itm"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_objective_alone(name: str, fusion: str) -> None:
    model = small_model(fusion=fusion).double()
    batch = small_batch("dataset").to("cpu", torch.float64)
    plain = plain_losses(model, batch)[name]
    plain.backward()
    expected = gradients(model)
    losses = JointLoss(model, (name,))(batch)
    losses.loss.backward()
    assert list(losses.parts) == list(losses.metrics) == [name]
    assert losses.loss.item() == pytest.approx(plain.item(), rel=EXACT)
    check_gradients(gradients(model), expected)


@pytest.mark.parametrize("need", [Need.TEXT, Need.CLS])
@pytest.mark.parametrize("fusion_layers", [1, 2])
def test_last_layer_rows(need: Need, fusion_layers: int) -> None:
    """Only the rows that are read, against the whole last layer: values and the gradients that reach everything
    before."""
    model, batch = small_model(fusion_layers=fusion_layers).double(), small_batch().to("cpu", torch.float64)
    wanted = {Need.TEXT: "text", Need.CLS: "cls"}[need]
    results = []
    for asked in (Need.ALL, need):
        text, image = model.encode_text(batch.text_ids, batch.text_mask), model.encode_image(batch.images)
        fused = model.fuse(text, image, batch.text_mask, need=asked)
        value = getattr(fused, wanted)
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum().backward()
        results.append((value.detach(), gradients(model)))
    (whole, expected), (cut, found) = results
    assert relative(cut, whole) < 1e-12
    check_gradients(found, expected)


def test_parts_equal_separate_passes() -> None:
    model, batch = small_model(fusion_layers=3).double(), small_batch("dataset").to("cpu", torch.float64)
    mask, count = batch.text_mask, len(batch)
    image = model.encode_image(torch.cat([batch.images, batch.false_images]))
    text = model.encode_text(batch.text_ids, mask)
    other = model.encode_text(batch.masked_ids, mask)
    parts = (
        Part(Need.CLS, count, batch.itm_images),
        Part(Need.TEXT, count),
        Part(Need.ALL, count, batch.itm_images.flip(0)),
    )
    together = model.fuse_parts(torch.cat([text, other, text]), image, torch.cat([mask] * 3), parts)
    assert relative(together[0].cls, model.fuse(text, image[batch.itm_images], mask).cls) < 1e-12
    assert relative(together[1].text, model.fuse(other, image[:count], mask).text) < 1e-12
    whole = model.fuse(text, image[batch.itm_images.flip(0)], mask)
    assert relative(together[2].image, whole.image) < 1e-12
    assert relative(together[2].cls, whole.cls) < 1e-12


@pytest.mark.parametrize("negatives", ["batch", "dataset"])
def test_work_is_saved(negatives: str) -> None:
    """Counts the rows that the expensive parts see."""
    model, batch = small_model(fusion_layers=2), small_batch(negatives)
    seen: dict[str, list[tuple[int, ...]]] = {}

    def count(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(
            lambda _m, inputs: seen.setdefault(name, []).append(tuple(inputs[0].shape[:-1]))
        )

    first, last = model.fusion.layers
    count("vocabulary", model.mlm_head.decoder)
    count("first image self-attention", first.image.self_attention)
    count("last text", last.text.feed_forward)
    count("last image", last.image.feed_forward)
    model.vision.register_forward_pre_hook(lambda _m, inputs: seen.setdefault("vision", []).append((len(inputs[0]),)))
    JointLoss(model)(batch)
    pictures = len(batch) + (0 if batch.false_images is None else len(batch.false_images))
    length, tokens = batch.text_ids.shape[1], model.config.vision.tokens
    assert seen == {
        "vision": [(pictures,)],
        "vocabulary": [(len(batch.masked_rows),)],
        "first image self-attention": [(pictures, tokens)],
        "last text": [(len(batch), length), (len(batch), 1)],
        "last image": [(len(batch), 1)],
    }


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_changes_nothing(fusion: str) -> None:
    """A batch padded further gives the same losses and gradients, so padding to the batch's longest is exact."""
    model, batch = small_model(fusion=fusion).double(), small_batch().to("cpu", torch.float64)
    extra, length = 4, batch.text_ids.shape[1]
    pad = nn.functional.pad
    rows = batch.masked_rows // length * (length + extra) + batch.masked_rows % length
    longer = type(batch)(
        **{
            **vars(batch),
            "text_ids": pad(batch.text_ids, (0, extra)),
            "masked_ids": pad(batch.masked_ids, (0, extra)),
            "text_mask": pad(batch.text_mask, (0, extra)),
            "masked_rows": rows,
        }
    )
    results = []
    for one in (batch, longer):
        losses = JointLoss(model)(one)
        losses.loss.backward()
        results.append((losses.loss.item(), gradients(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=EXACT)
    check_gradients(results[1][1], results[0][1])


@pytest.mark.parametrize("parts", [PARTS, ("vision",), ("text", "fusion")])
def test_activation_checkpointing_changes_nothing(parts) -> None:
    model, batch = small_model(fusion_layers=3, dropout=0.1).train(), small_batch()
    runs: dict[bool, list[int]] = {True: [], False: []}
    results = {}
    for on in (False, True):
        model.set_activation_checkpointing(on, parts)
        watched = (model.vision.blocks[0], model.text.encoder.layer[0].intermediate, model.fusion.layers[1])
        hooks = [
            part.register_forward_pre_hook(lambda *_a, i=i, on=on: runs[on].append(i)) for i, part in enumerate(watched)
        ]
        torch.manual_seed(5)
        losses = JointLoss(model)(batch)
        losses.loss.backward()
        results[on] = (losses.loss.item(), gradients(model))
        for hook in hooks:
            hook.remove()
    assert sorted(runs[False]) == [0, 1, 2]
    again = [place for place, part in enumerate(("vision", "text", "fusion")) if part in parts]
    assert sorted(runs[True]) == sorted([0, 1, 2, *again]), "each block of the parts should run again in backward"
    assert results[True][0] == results[False][0]
    for name, value in results[False][1].items():
        assert torch.equal(results[True][1][name], value), name
