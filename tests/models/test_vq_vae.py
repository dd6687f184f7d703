"""The VQ-VAE: codes and pictures, a codebook of moving averages, unused codes, two processes, files."""

import dataclasses
import json
import multiprocessing as mp
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meter_fast.models.image_tokenizer import load_image_tokenizer, open_image_tokenizer, save_image_tokenizer
from meter_fast.models.image_tokenizer_config import ImageTokenizerConfig
from meter_fast.models.vq_vae import DEAD, Codebook, VqVae

SMALL = ImageTokenizerConfig(image_size=16, downsamplings=2, codes=32, code_width=8, width=16, blocks=1)


def pictures(count: int = 32, seed: int = 0) -> Tensor:
    """Plain squares of four colours on one of two backgrounds."""
    chance = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])
    made = torch.full((count, 3, 16, 16), 0.2) + 0.6 * torch.randint(0, 2, (count, 1, 1, 1), generator=chance)
    for picture in made:
        top, left, colour = (int(torch.randint(0, n, (1,), generator=chance)) for n in (3, 3, 4))
        picture[:, 4 * top : 4 * top + 8, 4 * left : 4 * left + 8] = colours[colour][:, None, None]
    return made


def small(seed: int = 0) -> VqVae:
    torch.manual_seed(seed)
    return VqVae(SMALL)


def test_shapes_and_ranges() -> None:
    model = small()
    rebuilt, codes, commitment = model(pictures(4))
    assert rebuilt.shape == (4, 3, 16, 16) and codes.shape == (4, 4, 4) and commitment.dim() == 0
    assert codes.dtype == torch.int64 and codes.min() >= 0 and codes.max() < 32
    model.eval()
    assert model.encode(torch.rand(2, 3, 24, 8)).shape == (2, 6, 2)  # any multiple of the factor
    shown = model.decode(model.encode(pictures(4)))
    assert shown.shape == (4, 3, 16, 16) and shown.min() >= 0 and shown.max() <= 1
    assert torch.equal(model(pictures(4))[1], model.encode(pictures(4)))


def test_training_lowers_the_error_and_uses_the_codes() -> None:
    torch.manual_seed(0)
    model = VqVae(dataclasses.replace(SMALL, decay=0.8))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for step in range(80):
        batch = pictures(32, step)
        rebuilt, _, commitment = model(batch)
        error = F.mse_loss(rebuilt, batch)
        optimizer.zero_grad()
        (error / 0.0625 + 0.25 * commitment).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0], errors[::10]
    model.eval()
    held_out = pictures(64, 1000)
    assert F.mse_loss(model.decode(model.encode(held_out)), held_out) < 0.6 * held_out.var()
    assert len(model.encode(held_out).unique()) > 8


def test_gradients_pass_the_codes_straight_through() -> None:
    """The decoder's gradient arrives at the encoder's output as if nothing stood between."""
    model = small().double().eval()
    model.codebook.vectors.normal_()
    batch = pictures(2).double()
    told = model._encode(batch).detach()
    kept = F.embedding(model.codebook(told.flatten(0, 2)).view(2, 4, 4), model.codebook.vectors)
    kept.requires_grad_()
    weights = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (model._decode(kept) * weights).sum().backward()
    seen = []
    model.encoder.register_full_backward_hook(lambda _m, _inputs, outputs: seen.append(outputs[0]))
    (model(batch)[0] * weights).sum().backward()
    assert torch.allclose(seen[0].permute(0, 2, 3, 1), kept.grad, atol=1e-6)


def test_vectors_are_moving_averages() -> None:
    """Against averages kept by hand, with codes that are all in use."""
    book = Codebook(3, 2, 0.9)
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    book.vectors.copy_(centres)
    book.uses.fill_(10.0)
    book.sums.copy_(10 * centres)
    uses, sums = book.uses.clone(), book.sums.clone()
    for step in range(5):
        chance = torch.Generator().manual_seed(step)
        x = centres[torch.arange(30) % 3] + 0.3 * torch.randn(30, 2, generator=chance)
        codes = book(x)
        assert torch.equal(codes, torch.cdist(x, centres).argmin(1))
        for code in range(3):
            uses[code] = 0.9 * uses[code] + 0.1 * (codes == code).sum()
            sums[code] = 0.9 * sums[code] + 0.1 * x[codes == code].sum(0)
        assert torch.allclose(book.vectors, sums / uses[:, None], atol=1e-5)
    book.eval()
    before = book.vectors.clone()
    book(torch.randn(30, 2))
    assert torch.equal(book.vectors, before)


def test_unused_codes_move_to_what_is_told_worst() -> None:
    book = Codebook(4, 2, 0.99)
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    book(x)
    assert len(book.vectors.unique(dim=0)) == 4  # from the first batch on, although all began in one place
    book.vectors[3], book.sums[3], book.uses[3] = 1000.0, 1000 * book.uses[3], 0.5 * DEAD * book.uses.mean()
    far = torch.cat([x, torch.full((1, 2), 50.0)])
    book(far)
    assert torch.allclose(book.vectors[3], far[-1], atol=1e-3)


def test_bfloat16_keeps_the_codebook_in_float32() -> None:
    model = small()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    rebuilt, _, commitment = model(pictures(4).bfloat16())
    (F.mse_loss(rebuilt, pictures(4)) + commitment).backward()
    assert rebuilt.dtype == commitment.dtype == model.codebook.vectors.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.dim() > 0 for p in model.parameters())


def test_parameters_are_used_inside_their_own_module() -> None:
    """As under ZeRO-3: empty at all times but in their module's forward."""
    model = small().eval()
    model.codebook.vectors.normal_(generator=torch.Generator().manual_seed(0))
    expected = model(pictures(2))[0]
    values = {parameter: parameter.data for parameter in model.parameters()}

    def fill(part, _inputs) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = values[parameter]

    def empty(part, *_rest) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for part in model.modules():
        part.register_forward_pre_hook(fill)
        part.register_forward_hook(empty)
        empty(part)
    with torch.no_grad():
        assert torch.equal(model(pictures(2))[0], expected)


def _move_as(rank: int, world: int, rendezvous: str) -> dict[str, Tensor]:
    """Four updates of this rank's share of the vectors; the fifth code is unused at first."""
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=limit)
    try:
        return _moved(rank, world)
    finally:
        dist.destroy_process_group()


def _moved(rank: int, world: int, reseed: bool = True) -> dict[str, Tensor]:
    book = Codebook(6, 3, 0.9)
    chance = torch.Generator().manual_seed(0)
    book.vectors.normal_(generator=chance)
    book.uses.fill_(20.0)
    book.sums.copy_(20 * book.vectors)
    if reseed:
        book.vectors[4], book.sums[4], book.uses[4] = 100.0, 0.0, 0.0
    torch.manual_seed(rank)  # ranks draw differently, as in training
    for _ in range(4):
        x = torch.randn(40, 3, generator=chance)
        book(x.chunk(world)[rank])
    return dict(book.state_dict())


def _be_rank_1(rendezvous: str) -> None:
    torch.set_num_threads(1)
    torch.save(_move_as(1, 2, rendezvous), f"{rendezvous}.rank-1")


def test_two_ranks_keep_one_codebook(tmp_path: Path) -> None:
    """Both hold the same vectors, the unused code's too, which comes from a vector that one of them has seen."""
    context = mp.get_context("spawn")
    other = context.Process(target=_be_rank_1, args=(str(tmp_path / "meet"),), daemon=True)
    other.start()
    mine = _move_as(0, 2, str(tmp_path / "meet"))
    other.join(30)
    theirs = torch.load(tmp_path / "meet.rank-1", weights_only=True)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert mine["vectors"].abs().max() < 10 and mine["uses"].min() > 0
    one = _moved(0, 1)
    assert torch.allclose(mine["uses"].sum(), one["uses"].sum(), rtol=1e-5)


def test_export_and_back(tmp_path: Path) -> None:
    model = small()
    model(pictures(8))
    model.eval()
    folder = save_image_tokenizer(SMALL, tmp_path / "run" / "export", model.state_dict())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    for path in (folder, tmp_path / "run"):
        again = open_image_tokenizer(path)
        assert again.config == SMALL and not again.training
        assert torch.equal(again.encode(pictures(8)), model.encode(pictures(8)))


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objectives.image_tokenizer=.*absent does not exist"):
        open_image_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"config.json does not exist"):
        open_image_tokenizer(tmp_path)
    folder = save_image_tokenizer(SMALL, tmp_path / "own", small().state_dict())
    description = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"format": "meter-fast"}, "not that of an image tokenizer"),
        ({"version": 2}, "has version 2, this program reads version 1"),
        ({"model": {"size": 3}}, 'its "model" is not one that this version knows'),
        ({"model": description["model"] | {"codes": 31}}, "does not fit the model"),
    ):
        (folder / "config.json").write_text(json.dumps(description | change))
        with pytest.raises(ValueError, match=said):
            load_image_tokenizer(folder)
    with pytest.raises(ValueError, match=r"is not that of the model: \['codebook"):
        save_image_tokenizer(
            SMALL, tmp_path / "own", {n: v for n, v in small().state_dict().items() if "book" not in n}
        )
    for change, said in (
        ({"image_size": 18}, r"image_size=18 is not a multiple of 4 .*: use 16 or 20"),
        ({"codes": 1}, r"image_tokenizer.codes=1: 2 or more"),
        ({"decay": 1.0}, r"image_tokenizer.decay=1.0: between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(SMALL, **change)
