"""Retrieval against the published code's numbers and against pictures that are repeated for each of their texts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_cases import GOLDEN, GOLDEN_CASES, TOLERANCE, GoldenCase, load_case, relative
from partitioned import partition
from safetensors.torch import load_file
from small_case import small_batch, small_model
from torch import Tensor

from benchmarks.plain import plain_losses
from meter_fast.data.batch import PretrainBatch, RankedTexts
from meter_fast.interop import from_meter, to_meter
from meter_fast.models.heads import RankHead
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.score_retrieval import encode_texts, match_scores

FALSE = 3


def ranked_model(case: GoldenCase) -> Meter:
    """The published model that was fine-tuned for retrieval."""
    tasks = load_file(GOLDEN / case.name / "state_tasks.safetensors")
    state = {name: value for name, value in case.state.items() if not name.startswith("mlm_score.")}
    state |= {name: value for name, value in tasks.items() if name.startswith("rank_output.")}
    heads = case.sizes["text"]["num_attention_heads"], case.sizes["heads"]
    model = from_meter(state, text_heads=heads[0], fusion_heads=heads[1])[0].eval()
    assert torch.equal(to_meter(model)["rank_output.weight"], tasks["rank_output.weight"])
    return model


def golden_texts(case: GoldenCase, pad_id: int) -> RankedTexts:
    """The published false texts are padded with id 0 whatever the tokenizer; ours with its own."""
    ids = torch.cat([case.inputs["text_ids"], case.inputs["false_text_ids"].flatten(0, 1)])
    mask = torch.cat([case.inputs["text_masks"], case.inputs["false_text_masks"].flatten(0, 1)]).bool()
    return RankedTexts(torch.where(mask, ids, pad_id), mask)


@pytest.mark.parametrize("name", GOLDEN_CASES)
@pytest.mark.parametrize("text", ["padded", "packed"])
def test_published_scores_and_loss(name: str, text: str) -> None:
    case = load_case(name)
    model, seen = ranked_model(case), {}
    model.kernels = replace(model.kernels, text=text)
    model.rank_head.register_forward_hook(lambda _m, _i, output: seen.update(scores=output))
    pairs = len(case.inputs["image"])
    for pad_id in {0, model.config.text.pad_id}:
        batch = replace(case.batch(), ranked=golden_texts(case, pad_id))
        if pad_id != model.config.text.pad_id and text == "packed":
            continue  # packed texts have no padding
        losses = JointLoss(model, ("retrieval",))(batch)
        scores = torch.cat([seen["scores"][:pairs], seen["scores"][pairs:].view(pairs, -1)], dim=1)
        assert relative(scores, case.outputs["irtr/scores"]) < TOLERANCE
        assert relative(losses.parts["retrieval"], case.outputs["irtr/loss"]) < TOLERANCE
        first = case.outputs["irtr/scores"].argmax(1) == 0
        assert [value.item() for value in losses.metrics["retrieval"]] == [int(first.sum()), pairs]


@pytest.mark.parametrize("name", GOLDEN_CASES)
@torch.inference_mode()
def test_published_recall_scores(name: str) -> None:
    case = load_case(name)
    model = ranked_model(case)
    masks = case.inputs["text_masks"].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(case.inputs["text_ids"], masks, strict=True)]
    scores = match_scores(model, model.encode_image(case.inputs["image"]), encode_texts(model, rows))
    assert relative(scores, case.outputs["recall/scores"]) < TOLERANCE


# -------------------------------------------------------------------------------------------------- the plain form


def small_ranked_model(fusion: str = "co_attention", layers: int = 2) -> Meter:
    model = small_model(fusion_layers=layers, fusion=fusion)
    model.mlm_head, model.rank_head = None, RankHead(model.config.cls_width)
    torch.nn.init.normal_(model.rank_head.weight, std=0.5)
    return model


def small_ranked_batch(negatives: str = "batch") -> PretrainBatch:
    batch = small_batch(negatives)
    chance = torch.Generator().manual_seed(9)
    length = 7
    mask = torch.arange(length) < torch.randint(3, length + 1, (6 * FALSE, 1), generator=chance)
    false = torch.randint(5, 60, mask.shape, generator=chance).where(mask, 0)
    more = batch.text_ids.shape[1] - length
    ids = torch.cat([batch.text_ids, F.pad(false, (0, more))])
    mask = torch.cat([batch.text_mask, F.pad(mask, (0, more))])
    return replace(batch, ranked=RankedTexts(ids, mask, mask.flatten().nonzero().flatten()))


def gradients(model: Meter, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("negatives", ["batch", "dataset"])
@pytest.mark.parametrize("objectives", [("retrieval",), ("retrieval", "itm")])
@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention"])
def test_pictures_are_shared_exactly(fusion: str, objectives: tuple[str, ...], negatives: str) -> None:
    model = small_ranked_model(fusion).double()
    batch = small_ranked_batch(negatives).to("cpu", torch.float64)
    seen: list[int] = []
    expected = sum(plain_losses(model, batch, objectives).values())
    theirs = gradients(model, expected)
    handle = model.vision.register_forward_pre_hook(lambda _m, given: seen.append(len(given[0])))
    losses = JointLoss(model, objectives)(batch)
    handle.remove()
    ours = gradients(model, losses.loss)
    exact = 1e-6 if "itm" in objectives else 1e-9  # the loss of ITM is computed in float32
    assert losses.loss.item() == pytest.approx(expected.item(), rel=exact)
    assert ours.keys() == theirs.keys() and any(name.startswith("rank_head.") for name in ours)
    for name, value in theirs.items():
        if not name.endswith(("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias", "rank_head.bias")):
            assert relative(ours[name], value) < exact, name
    assert seen == [6 + (len(batch.false_images) if "itm" in objectives and batch.false_images is not None else 0)]


def test_totals_divide_a_step() -> None:
    model, batch = small_ranked_model(), small_ranked_batch()
    module = JointLoss(model, ("retrieval",))
    whole = module(batch).loss.item()
    assert module(batch, {"retrieval": 12.0}).loss.item() == pytest.approx(whole / 2)


def test_bfloat16_scores_do_not_tie() -> None:
    """The head computes in float32 on bfloat16 weights."""
    model, batch = small_ranked_model(), small_ranked_batch()
    expected = JointLoss(model, ("retrieval",))(batch).loss.item()
    losses = JointLoss(model.bfloat16(), ("retrieval",))(batch.to("cpu", torch.bfloat16))
    losses.loss.backward()
    assert losses.loss.dtype == torch.float32 and losses.loss.item() == pytest.approx(expected, rel=5e-2)
    head = RankHead(64).bfloat16()
    scores = head(torch.linspace(4, 4.01, 50).bfloat16()[:, None].expand(50, 64) + torch.eye(50, 64).bfloat16())
    assert scores.dtype == torch.float32 and len(scores.unique()) > 40


def test_parameters_are_used_inside_their_own_module() -> None:
    """As under ZeRO-3."""
    model, batch = small_ranked_model(), small_ranked_batch()
    module = JointLoss(model, ("retrieval", "itm")).eval()
    with torch.no_grad():
        expected = module(batch).loss.item()
        partition(model)
        assert module(batch).loss.item() == expected


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"'retrieval' needs a head.*model.rank_head=true"):
        JointLoss(small_model(), ("retrieval",))
    with pytest.raises(ValueError, match="the batch has no false texts"):
        JointLoss(small_ranked_model(), ("retrieval",))(small_batch())
