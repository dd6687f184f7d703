"""Choosing among candidates: some rows at a time and all at once, and candidates of two processes."""

import multiprocessing as mp
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cell_cases import with_cells, with_heads
from test_masked_images import NOISE, part_of

from meter_fast.objectives.candidates import choose
from meter_fast.objectives.joint import JointLoss


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    rows, candidates = (torch.randn(n, 16, generator=chance).to(dtype).requires_grad_() for n in (37, 101))
    return rows, candidates, torch.randint(0, 101, (37,), generator=chance)


@pytest.mark.parametrize("scores_at_once", [1, 101 * 10, 1 << 26])
def test_in_pieces_and_whole(scores_at_once: int) -> None:
    rows, candidates, labels = case()
    scores = rows @ candidates.t()
    expected = F.cross_entropy(scores, labels, reduction="sum")
    (3 * expected).backward()
    wanted, rows.grad = rows.grad, None
    wanted_candidates, candidates.grad = candidates.grad, None
    loss, chosen = choose(rows, candidates, labels, scores_at_once)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(chosen, scores.argmax(1))
    assert torch.allclose(rows.grad, wanted, rtol=1e-10, atol=1e-12)
    assert torch.allclose(candidates.grad, wanted_candidates, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    rows, candidates, labels = case()
    assert torch.autograd.gradcheck(lambda r, c: choose(r, c, labels[:5], 202)[0], (rows[:5], candidates))


def test_bfloat16_sums_are_float32() -> None:
    rows, candidates, labels = case(torch.bfloat16)
    loss, _ = choose(rows, candidates, labels, 101 * 10)
    loss.backward()
    exact = [value.detach().double().requires_grad_() for value in (rows, candidates)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32 and rows.grad.dtype == candidates.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    for own, other in zip((rows, candidates), exact, strict=True):
        assert (own.grad - other.grad).norm() < 1e-2 * other.grad.norm()


@torch.no_grad()
def test_without_gradient_none_is_made() -> None:
    rows, candidates, labels = case()
    assert not choose(rows, candidates, labels)[0].requires_grad


def test_no_rows() -> None:
    rows, candidates, labels = case()
    loss, chosen = choose(rows[:0], candidates, labels[:0])
    loss.backward()
    assert loss.item() == 0 and chosen.numel() == 0 and not candidates.grad.any()


def _gradients_of(rank: int, rendezvous: str) -> tuple[float, int, dict[str, torch.Tensor]]:
    """A rank's part of the step: three pairs of six, and what an optimizer would get after averaging over ranks."""
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
    try:
        model, batch = _case()
        cells = slice(9 * rank, 9 * rank + 9)
        part = part_of(batch, 3 * rank, 3 * rank + 3)
        mask, rows = batch.cell_mask[3 * rank : 3 * rank + 3], batch.cell_rows[cells] - 27 * rank
        part = type(part)(**{**vars(part), "cell_mask": mask, "cell_rows": rows, "cell_codes": batch.cell_codes[cells]})
        losses = JointLoss(model, ("mim_in_batch",))(part, {"mim_in_batch": 18 / 2})
        losses.loss.backward()
        loss, right = losses.loss.detach(), losses.metrics["mim_in_batch"][0]
        for value in (loss, right, *(p.grad for p in model.parameters() if p.grad is not None)):
            dist.all_reduce(value)
        return loss.item() / 2, right.item(), {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()


def _case():
    model = with_heads().double()
    model.mim_in_batch_head.all_ranks = True
    batch = with_cells().to("cpu", torch.float64)
    batch.images[4] = batch.images[1]  # on the other rank: its cells have the same pixels
    return model, batch


def _be_rank_1(rendezvous: str) -> None:
    torch.set_num_threads(1)
    _gradients_of(1, rendezvous)


def test_two_ranks_are_the_joined_batch(tmp_path: Path) -> None:
    """Loss, right answers and gradients, with the candidates of both."""
    context = mp.get_context("spawn")
    other = context.Process(target=_be_rank_1, args=(str(tmp_path / "meet"),), daemon=True)
    other.start()
    loss, right, found = _gradients_of(0, str(tmp_path / "meet"))
    other.join(30)
    assert other.exitcode == 0
    model, batch = _case()
    losses = JointLoss(model, ("mim_in_batch",))(batch)
    losses.loss.backward()
    assert loss == pytest.approx(losses.loss.item(), rel=1e-10)
    assert right == losses.metrics["mim_in_batch"][0].item()
    assert found.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in found and not name.endswith(NOISE):
            assert torch.allclose(found[name], parameter.grad, rtol=1e-8, atol=1e-12), name
