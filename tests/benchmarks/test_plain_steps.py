"""Steps without savings against ours, for every training task, and that the batches of both are what they say."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from golden_cases import TOLERANCE, relative
from torch import Tensor

from benchmarks.plain import PLAIN, PlainLoss, as_published, plain_match_scores, plain_scores, without_savings
from benchmarks.step_cases import CASES, Case, Plan, configuration, make_batch
from meter_fast.data.batch import Batch, PretrainBatch
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import counts_of
from meter_fast.objectives.losses import Losses
from meter_fast.training.tasks import joint_loss

# A bias that is the same for all keys or all candidates changes no softmax: its gradient is rounding.
NOISE = ("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias", "rank_head.bias")


def plan_of(name: str) -> Plan:
    """Two layers of fusion, no dropout; pictures small enough to be quick, and two sizes of pre-training."""
    case = CASES[name]
    return Plan(replace(case, image_size=case.image_size // 3 // 32 * 32), "tiny", batch=6, dtype="fp32")


def both(plan: Plan) -> dict[str, tuple[torch.nn.Module, Batch]]:
    """Two models of the same weights, each in its loss."""
    config = configuration(plan)
    torch.manual_seed(3)
    model = Meter(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch = make_batch(plan, config)
    ours = joint_loss(model, config)
    longer = as_published(batch, plan.case.padded, config.model.text.pad_id)
    plain = PlainLoss(deepcopy(model), config.objectives.names)
    return {"fast": (ours, batch), "plain": (plain, longer)}


def told(module: torch.nn.Module, batch: Batch) -> tuple[Losses, dict[str, Tensor], dict[str, Tensor]]:
    """Losses, what the heads said and all gradients."""
    model, said = module.model, {}
    heads = [(name, part) for name, part in model.named_children() if name.endswith("_head") and name != "mlm_head"]
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: said.update({name: out})) for name, part in heads
    ]
    model.zero_grad(set_to_none=True)
    losses = module(batch)
    losses.loss.backward()
    for hook in hooks:
        hook.remove()
    return losses, said, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_plain_and_fast_give_the_same(name: str) -> None:
    """Outputs, losses, what was right, and all gradients, in fp32."""
    sides = both(plan_of(name))
    (fast, our_said, our_grads), (plain, said, grads) = (told(*sides[side]) for side in ("fast", "plain"))
    assert fast.parts.keys() == plain.parts.keys()
    for part, value in plain.parts.items():
        assert fast.parts[part].item() == pytest.approx(value.item(), rel=TOLERANCE), part
        assert [n.item() for n in fast.metrics[part]] == [n.item() for n in plain.metrics[part]], part
    assert said.keys() == our_said.keys() and (said or "mlm" in plain.parts)
    for head, value in said.items():
        assert relative(our_said[head], value) < TOLERANCE, head
    assert grads.keys() == our_grads.keys()
    for parameter, value in grads.items():
        if not parameter.endswith(NOISE):
            assert relative(our_grads[parameter], value) < 10 * TOLERANCE, parameter


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_shared(name: str) -> None:
    """How many pictures and texts the encoders of both see, and where words are scored."""
    plan = plan_of(name)
    sides = both(plan)
    config, rows, seen = configuration(plan), {}, {}
    for side, (module, batch) in sides.items():
        rows.clear()
        model = module.model
        model.vision.register_forward_pre_hook(lambda _m, given: rows.setdefault("pictures", []).append(len(given[0])))
        model.fusion.layers[-1].text.feed_forward.register_forward_pre_hook(
            lambda _m, given: rows.setdefault("texts", []).append(tuple(given[0].shape[:2]))
        )
        if model.mlm_head is not None:
            model.mlm_head.register_forward_pre_hook(
                lambda _m, given: rows.setdefault("words", []).append(given[0].shape[:-1].numel())
            )
        module(batch)
        seen[side] = {key: sum(found) if key != "texts" else found for key, found in rows.items()}
    count, length = plan.batch, plan.case.padded
    pictures, passes = {
        ("mlm", "itm"): (count, [count, count]),
        ("vqa",): (-(-count // plan.case.texts_per_picture), [count]),
        ("nlvr2",): (2 * count, [count, count]),
        ("snli_ve",): (count, [count]),
        ("retrieval", "itm"): (count, [16 * count, count]),
    }[config.objectives.names]
    assert seen["fast"]["pictures"] == pictures
    assert seen["plain"]["pictures"] == sum(passes)
    assert seen["plain"]["texts"] == [(n, length) for n in passes]
    if "mlm" in config.objectives.names:
        assert seen["plain"]["words"] == count * length > 10 * seen["fast"]["words"]


def test_attention_writes_its_scores_out() -> None:
    """No operator of a plain step is torch's fused attention, long as the picture's sequence is."""
    plan = Plan(Case("vqa", 384), "tiny", batch=2, dtype="fp32")
    sides = both(plan)
    called = {}
    for side, (module, batch) in sides.items():
        with torch.profiler.profile() as profile:
            module(batch)
        called[side] = {event.key for event in profile.key_averages()}
    assert any("flash_attention" in name for name in called["fast"])
    assert not any("flash_attention" in name or "efficient_attention" in name for name in called["plain"])


def test_activations_are_kept() -> None:
    """Of 4 D values a token, a picture's block keeps x, sigmoid(1.702 x) and their product, a fusion layer x and
    gelu(x)."""
    config = configuration(Plan(CASES["pretrain_224"], "tiny", batch=2, dtype="fp32")).model
    row = 4 * 5 * 4 * config.vision.width
    assert _wide_bytes(without_savings(Meter(config, kernels=PLAIN))) == {"vision": 3 * row, "fusion": 2 * row}


def test_no_sum_is_written_over_its_summand() -> None:
    """In a picture's block, as published."""
    config = configuration(Plan(CASES["pretrain_224"], "tiny", batch=2, dtype="fp32")).model
    block = without_savings(Meter(config, kernels=PLAIN)).vision.blocks[0]
    summands = []
    for summand in (block.attn, block.mlp):
        summand.register_forward_hook(lambda _module, _inputs, out: summands.append((out, out.clone())))
    block(torch.randn(2, 5, config.vision.width))
    assert len(summands) == 2 and all(torch.equal(out, copy) for out, copy in summands)


def _wide_bytes(model: Meter) -> dict[str, int]:
    """Bytes of tensors of 5 tokens, 4 D wide, that torch itself keeps for backward of one feed-forward network."""
    networks = {"vision": model.vision.blocks[0].mlp, "fusion": model.fusion.layers[0].image.feed_forward}
    width = model.config.vision.width
    found = {}
    for name, network in networks.items():
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if tensor.shape == (5, 4 * width):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.randn(5, width, requires_grad=True))
        found[name] = sum(kept.values())
    return found


def test_plain_predictions_write_their_scores_out() -> None:
    config = configuration(Plan(Case("vqa", 384), "tiny", batch=2, dtype="fp32")).model
    model = Meter(replace(config, rank_head=True), kernels=PLAIN).eval()
    pictures, ids = torch.randn(1, 3, 384, 384), [[0, 7, 8, 2]]
    with torch.profiler.profile() as profile, torch.no_grad():
        plain_match_scores(model, pictures, ids, 50)
        plain_scores(model, "vqa_head", (pictures,), torch.tensor(ids), torch.ones(1, 4, dtype=torch.bool))
    called = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" in called
    assert not any("flash_attention" in name or "efficient_attention" in name for name in called)


@pytest.mark.parametrize("name", CASES)
def test_the_published_batch(name: str) -> None:
    """Texts padded, a picture for each text and a false one for each pair; what the pictures are stays."""
    plan = plan_of(name)
    config = configuration(plan)
    batch = make_batch(plan, config)
    longer = as_published(batch, plan.case.padded, 1)
    assert batch.text_ids.shape == (plan.batch, plan.longest) and longer.text_ids.shape == (6, plan.case.padded)
    assert torch.equal(longer.text_ids[longer.text_mask], batch.text_ids[batch.text_mask])
    if isinstance(batch, PretrainBatch):
        assert len(longer.images) == len(longer.false_images) == 6
        shown = torch.cat([longer.images, longer.false_images])[longer.itm_images]
        assert torch.equal(shown, batch.images[batch.itm_images])
        assert torch.equal(longer.masked_ids.flatten()[longer.masked_rows] == 4, torch.ones_like(batch.masked_rows) > 0)
    else:
        assert len(longer.images) == batch.image_rows.numel() == longer.image_rows.unique().numel()
        assert torch.equal(longer.images[longer.image_rows], batch.images[batch.image_rows])
        assert len(batch.images) == batch.image_rows.unique().numel()


def test_totals_divide_a_step() -> None:
    """Losses are divided by what the step holds, as ours are."""
    plan = plan_of("pretrain_224")
    sides = both(plan)
    (fast, batch), (plain, longer) = sides["fast"], sides["plain"]
    totals = {name: 2.0 * count for name, count in counts_of(fast.objectives, [batch]).items()}
    assert plain(longer, totals).loss.item() == pytest.approx(fast(batch, totals).loss.item(), rel=TOLERANCE)
    assert plain(longer, totals).loss.item() == pytest.approx(plain(longer).loss.item() / 2, rel=TOLERANCE)


@pytest.mark.parametrize(("changed", "said"), [({"text_tokens": 51}, "text_tokens=51"), ({"batch": 0}, "batch=0")])
def test_what_cannot_be_measured_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(CASES["vqa_576"], **changed)
