"""Span denoising and captioning: losses of a plain loop, all objectives together, and what the engine relies on."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import NAMES, WORDS, decoder_batch, decoder_config, decoder_model
from torch import Tensor, nn

from meter_fast.data.batch import PretrainBatch, TextToText
from meter_fast.models.config import FUSIONS
from meter_fast.models.meter import Meter, Need
from meter_fast.objectives.joint import JointLoss, counts_of
from meter_fast.training.unreached import freeze_unreached


def plain_loss(model: Meter, images: Tensor, texts: TextToText) -> tuple[Tensor, int]:
    """Mean cross-entropy, pair after pair and token after token, without padding; and how many come first."""
    losses, right = [], 0
    for pair in range(len(images)):
        ids = texts.ids[pair, texts.mask[pair]][None]
        targets = texts.targets[pair, : texts.lengths[pair]]
        mask = torch.ones_like(ids, dtype=torch.bool)
        image = model.encode_image(images[pair : pair + 1])
        fused = model.fuse(model.encode_text(ids, mask), image, mask, need=Need.BOTH)
        for place in range(len(targets)):
            before = torch.cat([torch.tensor([WORDS]), targets[:place]])[None]
            row = model.decoder(before, fused.text, fused.image, mask)[:, -1]
            logits = model.lm_head(row)
            losses.append(F.cross_entropy(logits, targets[place : place + 1]))
            right += int(logits.argmax() == targets[place])
    return torch.stack(losses).mean(), right


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", ["span_denoising", "caption"])
def test_loss_is_that_of_the_plain_loop(fusion: str, name: str) -> None:
    model, batch = decoder_model(fusion, torch.float64), decoder_batch(torch.float64)
    found = JointLoss(model, (name,))(batch)
    found.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    expected, right = plain_loss(model, batch.images, getattr(batch, name))
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)  # losses are kept in float32
    assert [value.item() for value in found.metrics[name]] == [right, counts_of((name,), [batch])[name]]
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert gradients[key] is None, key
        else:
            assert torch.allclose(gradients[key], parameter.grad, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("text", ["padded", "packed"])
def test_together_as_alone(fusion: str, text: str) -> None:
    kernels = dataclasses.replace(decoder_model().kernels, text=text)
    model, batch = decoder_model(fusion, torch.float64, kernels), decoder_batch(torch.float64)
    JointLoss(model, NAMES)(batch).loss.backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    losses = JointLoss(model, NAMES)(batch).parts
    model.zero_grad()
    for name in NAMES:
        alone = JointLoss(model, (name,))(batch)
        alone.loss.backward()
        assert losses[name].item() == pytest.approx(alone.loss.item(), rel=1e-6)
    for key, parameter in model.named_parameters():
        assert torch.allclose(together[key], parameter.grad, rtol=1e-5, atol=1e-7), key


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_parameter_gets_a_gradient(fusion: str) -> None:
    model = decoder_model(fusion)
    JointLoss(model, NAMES[:2])(decoder_batch()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bfloat16_forward_and_backward(fusion: str) -> None:
    model, batch = decoder_model(fusion), decoder_batch()
    expected = JointLoss(model, NAMES)(batch).loss.item()
    model.bfloat16()
    losses = JointLoss(model, NAMES)(batch.to("cpu", torch.bfloat16))
    losses.loss.backward()
    assert losses.loss.dtype == torch.float32
    assert losses.loss.item() == pytest.approx(expected, rel=3e-2)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("form", ["direct", "auto"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_parameters_are_used_inside_their_own_module(fusion: str, form: str) -> None:
    """As under ZeRO-3: a module's parameters are there from its own forward to the end of it and empty at all other
    times."""
    kernels = dataclasses.replace(decoder_model().kernels, cross_attention_form=form)
    model, batch = decoder_model(fusion, kernels=kernels), decoder_batch()
    module = JointLoss(model, NAMES).eval()
    with torch.no_grad():
        expected = module(batch).loss.item()
        values = {parameter: parameter.data for parameter in model.parameters()}

        def fill(part: nn.Module, _inputs: object) -> None:
            for parameter in part.parameters(recurse=False):
                parameter.data = values[parameter]

        def empty(part: nn.Module, *_rest: object) -> None:
            for parameter in part.parameters(recurse=False):
                parameter.data = torch.empty(0)

        for part in model.modules():
            part.register_forward_pre_hook(fill)
            part.register_forward_hook(empty)
            empty(part)
        assert module(batch).loss.item() == expected


def without(batch: PretrainBatch, name: str) -> PretrainBatch:
    return dataclasses.replace(batch, **{name: None})


def test_other_objectives_need_no_texts_to_write() -> None:
    model, batch = decoder_model(), decoder_batch()
    whole = JointLoss(model, ("itm",))(batch).loss
    assert torch.equal(JointLoss(model, ("itm",))(without(without(batch, "caption"), "span_denoising")).loss, whole)


@pytest.mark.parametrize(
    ("names", "frozen"),
    [
        (("span_denoising", "itm"), ()),
        (("span_denoising",), ("itm_head.",)),
        (("caption",), ("itm_head.",)),
        (("itm",), ("lm_head.",)),
        (("mlm", "itm"), ("lm_head.",)),
        (("mlm", "span_denoising"), ("itm_head.",)),
    ],
)
def test_what_no_objective_reaches_is_frozen(names: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    config = dataclasses.replace(decoder_config(), mlm_head="mlm" in names)
    model = Meter(config)
    unreached = freeze_unreached(JointLoss(model, names), config)
    expected = {name for name, _ in model.named_parameters() if frozen and name.startswith(frozen)}
    assert {name.removeprefix("model.") for name in unreached} == expected
    assert expected == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_a_model_without_decoder_is_refused() -> None:
    model = Meter(decoder_config(layers=0))
    with pytest.raises(ValueError, match=r"'caption' needs a head that the model lacks: set model.decoder.layers=3"):
        JointLoss(model, ("caption",))
