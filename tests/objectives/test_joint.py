"""What the engine relies on: totals, empty masks, precision, errors, and that ZeRO-3 may partition every parameter."""

import pytest
import torch
from partitioned import partition
from small_case import small_batch, small_model
from torch import nn

from meter_fast.models.config import FUSIONS
from meter_fast.objectives.joint import JointLoss


def test_means_over_a_split_step_are_those_of_the_whole() -> None:
    """Two micro-batches with unequal numbers of masked tokens; each is told half of the step's."""
    model, batch = small_model().double(), small_batch("batch").to("cpu", torch.float64)
    module = JointLoss(model)
    module(batch).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    length, total = batch.text_ids.shape[1], len(batch.masked_rows)
    masked = []
    for begin, end in ((0, 2), (2, 6)):
        inside = (batch.masked_rows >= begin * length) & (batch.masked_rows < end * length)
        masked.append(int(inside.sum()))
        part = type(batch)(
            **{
                name: value[begin:end]
                for name, value in vars(batch).items()
                if value is not None and name not in ("masked_rows", "masked_labels", "itm_images")
            },
            masked_rows=batch.masked_rows[inside] - begin * length,
            masked_labels=batch.masked_labels[inside],
            itm_images=batch.itm_images[begin:end] - begin,
            false_images=None,
        )
        losses = module(part, {"mlm": total / 2, "itm": len(batch) / 2})
        (losses.loss / 2).backward()
    assert masked == [2, 3]
    for name, parameter in model.named_parameters():
        if not name.endswith(("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias")):
            assert torch.allclose(parameter.grad, whole[name], rtol=1e-5, atol=1e-6 * whole[name].abs().max()), name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.scenario(24, "loss 0 and zero gradients, no NaN")
def test_no_masked_token(fusion: str) -> None:
    """A micro-batch may have none: the loss is finite, and every parameter gets a gradient, as collectives need."""
    model, batch = small_model(fusion=fusion), small_batch()
    empty = type(batch)(
        **{**vars(batch), "masked_rows": batch.masked_rows[:0], "masked_labels": batch.masked_labels[:0]}
    )
    losses = JointLoss(model)(empty)
    losses.loss.backward()
    assert losses.parts["mlm"].item() == 0.0
    assert [value.item() for value in losses.metrics["mlm"]] == [0, 0]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert not model.mlm_head.decoder.weight.grad.any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_parameter_gets_a_gradient(fusion: str) -> None:
    model = small_model(fusion=fusion)
    JointLoss(model)(small_batch()).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bfloat16_forward_and_backward(fusion: str) -> None:
    model, batch = small_model(fusion=fusion), small_batch()
    expected = JointLoss(model)(batch).loss.item()
    model.bfloat16()
    losses = JointLoss(model)(batch.to("cpu", torch.bfloat16))
    losses.loss.backward()
    assert losses.loss.dtype == torch.float32
    assert losses.loss.item() == pytest.approx(expected, rel=2e-2)
    assert all(
        parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all() for parameter in model.parameters()
    )


def test_dropout_acts_in_training_only() -> None:
    module, batch = JointLoss(small_model(dropout=0.3)), small_batch()
    first, second = module(batch).loss.item(), module(batch).loss.item()
    assert first != second
    module.eval()
    assert module(batch).loss.item() == module(batch).loss.item()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_parameters_are_used_inside_their_own_module(fusion: str) -> None:
    """As under ZeRO-3: a module's parameters are there from its own forward to the end of it and empty at all other
    times."""
    model, batch = small_model(fusion=fusion), small_batch("dataset")
    module = JointLoss(model).eval()
    with torch.no_grad():
        expected = module(batch).loss.item()
        partition(model)
        assert module(batch).loss.item() == expected


def test_no_parameter_has_zero_dimensions() -> None:
    """DeepSpeed's bf16 start fails on them, and on BatchNorm."""
    model = small_model()
    assert all(parameter.dim() > 0 for parameter in model.parameters())
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())


def test_errors() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"'unknown'.*mlm, itm"):
        JointLoss(model, ("unknown",))
    with pytest.raises(ValueError, match=r"at least one"):
        JointLoss(model, ())
    with pytest.raises(ValueError, match=r"each once"):
        JointLoss(model, ("mlm", "mlm"))
    model.itm_head = None
    with pytest.raises(ValueError, match=r"model.itm_head=true"):
        JointLoss(model)


def test_text_longer_than_the_positions() -> None:
    model = small_model("roberta")
    ids = torch.full((1, 19), 7)
    assert model.encode_text(ids[:, :18], ids[:, :18] > 0).shape == (1, 18, 24)
    with pytest.raises(ValueError, match=r"19 tokens exceeds the 18.*max_positions=20"):
        model.encode_text(ids, ids > 0)


def test_texts_and_pictures_must_be_pairs() -> None:
    """A single picture would otherwise be spread over all texts by broadcasting."""
    model, batch = small_model(), small_batch()
    text, image = model.encode_text(batch.text_ids, batch.text_mask), model.encode_image(batch.images[:1])
    with pytest.raises(ValueError, match=r"6 texts and 1 pictures"):
        model.fuse(text, image, batch.text_mask)
