"""Losses, logits and gradients of MLM + ITM against the published code."""

import pytest
import torch
import torch.nn.functional as F
from golden_cases import TOLERANCE, GoldenCase, relative
from meter_fast.kernels.cross_attention import reference
from torch import Tensor

from meter_fast.interop import to_published
from meter_fast.objectives.joint import JointLoss

PACKED = ("attn.in_proj_bias", "attn.qkv.bias")  # query, key and value of CLIP and of Swin


def published_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients under the published names, in the published shapes."""
    return to_published({name: parameter.grad for name, parameter in model.named_parameters()})


def is_noise(name: str) -> bool:
    """Biases of keys: softmax does not depend on them, so their gradient is rounding noise."""
    return name.endswith(("key.bias", *PACKED))


def test_logits_and_losses(case: GoldenCase) -> None:
    heads: dict[str, Tensor] = {}
    decoder = case.model.mlm_head.decoder
    decoder.register_forward_hook(
        lambda _m, inputs, _o: heads.update(mlm=F.linear(inputs[0], decoder.weight, decoder.bias))
    )
    case.model.itm_head.register_forward_hook(lambda _m, inputs, output: heads.update(itm=output, cls=inputs[0]))
    batch = case.batch()
    losses = JointLoss(case.model)(batch)
    logits = case.outputs["mlm/logits"].flatten(0, 1)[batch.masked_rows]
    errors = {
        "mlm logits": relative(heads["mlm"], logits),
        "itm logits": relative(heads["itm"], case.outputs["itm/logits"]),
        "itm cls": relative(heads["cls"], case.outputs["itm/cls_feats"]),
        "mlm loss": relative(losses.parts["mlm"], case.outputs["mlm/loss"]),
        "itm loss": relative(losses.parts["itm"], case.outputs["itm/loss"]),
        "loss": abs(losses.loss.item() / case.gradient_norms["loss"] - 1),
    }
    assert max(errors.values()) < TOLERANCE, errors
    right = (logits.argmax(-1) == batch.masked_labels).sum()
    assert [value.item() for value in losses.metrics["mlm"]] == [right.item(), len(batch.masked_labels)]
    right = (case.outputs["itm/logits"].argmax(-1) == batch.itm_labels).sum()
    assert [value.item() for value in losses.metrics["itm"]] == [right.item(), len(batch)]


@pytest.mark.parametrize("form", ["plain", "fused", "blocked", "float64"])
def test_gradients(case: GoldenCase, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in all forms of attention in float32, and in float64, where only the golden's own rounding is left.

    In float32, gradients that nearly cancel (norm below 1e-4, of 6 in all: two tensors) move by 1e-6 to 5e-6 with the
    order of sums, so with the processor too; they may take four times the tolerance. float64 makes no exception.
    """
    if form != "float64":
        monkeypatch.setattr(reference, "attention_form", lambda *_: form)
    dtype = torch.float64 if form == "float64" else torch.float32
    JointLoss(case.model.to(dtype))(case.batch().to("cpu", dtype)).loss.backward()
    found = published_gradients(case.model)
    norms = case.gradient_norms["l2_norm"]
    errors = {
        name: abs(found[name].norm().item() / norm - 1) / (4 if form != "float64" and norm < 1e-4 else 1)
        for name, norm in norms.items()
        if norm is not None and not is_noise(name)
    }
    assert len(errors) > 150
    assert max(errors.values()) < TOLERANCE, sorted(errors.items(), key=lambda item: -item[1])[:5]
    without = {name for name, norm in norms.items() if norm is None}
    assert without == set(norms) - set(found), "exactly the parameters that we do not have get no gradient there"
    whole = {name: relative(found[name], value) for name, value in case.gradients.items()}
    assert whole and max(whole.values()) < TOLERANCE, whole


def test_packed_query_and_value_bias_gradients(case: GoldenCase) -> None:
    """What `is_noise` leaves out of packed biases by name: query and value thirds are signal, the key third is
    noise."""
    JointLoss(case.model)(case.batch()).loss.backward()
    for name, value in published_gradients(case.model).items():
        if name.endswith(PACKED):
            query, key, rest = value.chunk(3)
            signal = torch.stack([query.norm(), rest.norm()]).norm()
            assert key.norm() < 1e-5 * signal
            assert signal.item() == pytest.approx(case.gradient_norms["l2_norm"][name], rel=TOLERANCE)
