"""Hidden cells: how many, keyed by the place in the stream alone, the same however a global batch is divided."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from making import SIDE, backend, loader_of, write_pairs

from meter_fast.data.cell_masking import CellMasking
from meter_fast.data.loader import EvaluationLoader
from meter_fast.data.sources import open_sources
from meter_fast.data.text import TextPipeline


@pytest.fixture
def sources(tmp_path):
    write_pairs(tmp_path / "own.arrow", 24)
    return open_sources(["arrow:own"], tmp_path)


def hidden_of(loader, steps: tuple[int, int] = (0, 3)) -> list[list[list[int]]]:
    """Each step's hidden cells, picture by picture."""
    found = []
    for batches in loader.steps(*steps):
        for batch in batches:
            assert torch.equal(batch.cell_mask.flatten().nonzero().flatten(), batch.cell_rows)
        found.append([mask.flatten().nonzero().flatten().tolist() for b in batches for mask in b.cell_mask])
    return found


@pytest.mark.parametrize(("grid", "probability", "hidden"), [(18, 0.15, 49), (3, 0.15, 1), (2, 0.01, 1), (2, 0.99, 3)])
def test_how_many(grid: int, probability: float, hidden: int) -> None:
    masking = CellMasking(grid, probability)
    assert masking.hidden == hidden
    fields = masking.fields(torch.zeros(4, 3, 8, 8), map(np.random.default_rng, range(4)))
    assert fields["cell_mask"].shape == (4, grid, grid)
    assert fields["cell_mask"].flatten(1).sum(1).tolist() == [hidden] * 4
    assert "cell_codes" not in fields


def test_every_cell_is_hidden_as_often() -> None:
    masking = CellMasking(4, 0.2)
    fields = masking.fields(torch.zeros(4000, 3, 8, 8), (np.random.default_rng(n) for n in range(4000)))
    share = fields["cell_mask"].float().mean(0)
    assert masking.hidden == 3
    assert (share - 3 / 16).abs().max() < 5 * (3 / 16 * 13 / 16 / 4000) ** 0.5  # five standard deviations


def test_the_same_however_divided(sources, tokenizer) -> None:
    cells = CellMasking(4, 0.2)
    whole = hidden_of(loader_of(sources, tokenizer, global_batch=8, cells=cells))
    assert whole == hidden_of(loader_of(sources, tokenizer, global_batch=8, cells=cells, micro_batch=2, workers=2))
    ranks = [
        hidden_of(loader_of(sources, tokenizer, global_batch=8, cells=cells, micro_batch=2, rank=rank, world=2))
        for rank in range(2)
    ]
    for step, everything in enumerate(whole):
        mine, other = (ranks[rank][step] for rank in range(2))
        assert everything == mine[:2] + other[:2] + mine[2:] + other[2:]
    assert hidden_of(loader_of(sources, tokenizer, global_batch=8, cells=cells), (2, 3)) == whole[2:]
    assert hidden_of(loader_of(sources, tokenizer, global_batch=8, cells=cells, seed=4)) != whole
    assert len({tuple(hidden) for step in whole for hidden in step}) > 12


def test_nothing_else_changes(sources, tokenizer) -> None:
    """Captions, their masks and pairs are those of a run without hidden cells."""
    (plain,) = next(loader_of(sources, tokenizer, global_batch=8).steps(0, 1))
    (hiding,) = next(loader_of(sources, tokenizer, global_batch=8, cells=CellMasking(4)).steps(0, 1))
    assert plain.cell_mask is None
    for name, value in vars(replace(hiding, cell_mask=None, cell_rows=None)).items():
        other = getattr(plain, name)
        assert value is other is None or torch.equal(value, other), name


def test_codes_are_those_of_the_hidden_cells(sources, tokenizer) -> None:
    def brightness(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, SIDE, SIDE)
        return (1000 * images.mean(1).unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4))).long()

    loader = loader_of(sources, tokenizer, global_batch=8, cells=CellMasking(2, 0.5, brightness))
    (batch,) = next(loader.steps(0, 1))
    assert torch.equal(batch.cell_codes, brightness(batch.images)[batch.cell_mask])
    assert len(batch.cell_codes.unique()) > 8
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.cell_codes.dtype == torch.int64 and moved.cell_mask.dtype == torch.bool


def test_held_out_pictures_have_them_too(sources, tokenizer) -> None:
    text = TextPipeline(tokenizer, max_length=16)
    batches = list(EvaluationLoader(sources, text, backend(), batch_size=8, cells=CellMasking(4)))
    again = list(EvaluationLoader(sources, text, backend(), batch_size=4, cells=CellMasking(4)))
    assert torch.equal(torch.cat([b.cell_mask for b in batches]), torch.cat([b.cell_mask for b in again]))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"1 x 1 cells"):
        CellMasking(1)
    with pytest.raises(ValueError, match=r"objectives.mim_probability=1.0"):
        CellMasking(4, 1.0)
