"""Masked image modelling: equation 2 and the codes against a plain computation, every encoder, what is computed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cell_cases import SMALL_VISION, with_cells, with_heads
from golden_cases import relative
from small_case import small_batch
from torch import Tensor, nn

from meter_fast.models.config import FUSIONS
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.objectives.masked_pictures import cells_of
from meter_fast.objectives.mim_in_batch import fingerprints
from meter_fast.training.unreached import freeze_unreached

NOISE = (
    "key.bias",
    "query_key_value.bias",
    "key_value.bias",
    "qkv.bias",
)  # parts of them have no gradient but rounding


def plain(model: Meter, batch) -> dict[str, Tensor]:
    """Both losses, written pair by pair and cell by cell."""
    grid, side = model.config.vision.grid, model.config.vision.patch_size
    head = model.mim_in_batch_head
    hidden = batch.images.clone()
    cells = []
    for pair in range(len(batch)):
        for place in range(grid**2):
            top, left = place // grid * side, place % grid * side
            cells.append(batch.images[pair, :, top : top + side, left : left + side].flatten())
            if batch.cell_mask[pair].flatten()[place]:
                hidden[pair, :, top : top + side, left : left + side] = 0
    candidates = head.cell_norm(head.cell(torch.stack(cells)))
    text, image = model.encode_text(batch.text_ids, batch.text_mask), model.encode_image(hidden)
    rows = model.fuse(text, image, batch.text_mask).image[:, model.config.vision.class_tokens :].flatten(0, 1)
    wanted = batch.cell_mask.flatten().nonzero().flatten()
    said = head.norm(F.gelu(head.dense(rows[wanted]))) / model.config.fusion.width**0.5
    return {
        "mim_in_batch": F.cross_entropy(said @ candidates.t(), wanted),
        "mim_codes": F.cross_entropy(model.mim_codes_head(rows[wanted]), batch.cell_codes),
    }


def gradients(model: Meter) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and not name.endswith(NOISE)}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", ["mim_in_batch", "mim_codes"])
@pytest.mark.parametrize("fusion_layers", [1, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_equals_the_plain_computation(name: str, fusion_layers: int, fusion: str) -> None:
    model = with_heads(fusion, fusion_layers=fusion_layers).double()
    batch = with_cells().to("cpu", torch.float64)
    expected = plain(model, batch)[name]
    expected.backward()
    wanted = gradients(model)
    losses = JointLoss(model, (name,))(batch)
    losses.loss.backward()
    found = gradients(model)
    assert losses.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert losses.metrics[name][1].item() == len(batch.cell_rows) == 18
    assert {n for n in wanted if wanted[n].any()} <= set(found) <= set(wanted)
    errors = {n: relative(found[n], wanted[n]) for n in found}
    assert max(errors.values()) < 1e-8, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("vision", SMALL_VISION)
def test_every_encoder(vision: str) -> None:
    """The class tokens are left out, whatever their number, and a hidden cell's pixels are not seen."""
    model = with_heads(vision=vision).double().eval()
    sizes = model.config.vision
    batch = with_cells(size=sizes.image_size, grid=sizes.grid).to("cpu", torch.float64)
    module = JointLoss(model, ("mim_in_batch", "mim_codes"))
    losses = module(batch)
    for name, value in plain(model, batch).items():
        assert losses.parts[name].item() == pytest.approx(value.item(), rel=1e-6), name
    seen = batch.cell_mask.repeat_interleave(sizes.patch_size, 1).repeat_interleave(sizes.patch_size, 2)[:, None]
    other = replace(batch, images=torch.where(seen, torch.randn_like(batch.images), batch.images))
    assert module(other).parts["mim_codes"].item() == losses.parts["mim_codes"].item()
    assert module(other).parts["mim_in_batch"].item() != losses.parts["mim_in_batch"].item()


def test_together_with_the_others() -> None:
    """Each loss is what it is alone, and all parameters are reached."""
    model, batch = with_heads().double(), with_cells(small_batch("dataset")).to("cpu", torch.float64)
    names = ("mlm", "itm", "mim_in_batch", "mim_codes")
    alone = {name: JointLoss(model, (name,))(batch).loss.item() for name in names}
    losses = JointLoss(model, names)(batch)
    losses.loss.backward()
    assert {name: value.item() for name, value in losses.parts.items()} == pytest.approx(alone, rel=1e-6)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_split_step_is_the_whole_for_codes(fusion: str) -> None:
    """Two micro-batches of unequal size, each told half of the step's cells."""
    model, batch = with_heads(fusion).double(), with_cells().to("cpu", torch.float64)
    module = JointLoss(model, ("mim_codes",))
    module(batch).loss.backward()
    whole = gradients(model)
    for begin, end in ((0, 2), (2, 6)):
        cells = slice(3 * begin, 3 * end)
        part = replace(
            part_of(batch, begin, end),
            cell_mask=batch.cell_mask[begin:end],
            cell_rows=batch.cell_rows[cells] - 9 * begin,
            cell_codes=batch.cell_codes[cells],
        )
        (module(part, {"mim_codes": 18 / 2}).loss / 2).backward()
    for name, value in gradients(model).items():
        assert torch.allclose(value, whole[name], rtol=1e-6, atol=1e-8), name


def part_of(batch, begin: int, end: int):
    """Pairs begin..end-1, as far as masked image modelling looks at them."""
    cut = {name: getattr(batch, name)[begin:end] for name in ("images", "text_ids", "text_mask", "masked_ids")}
    return replace(batch, **cut, text_rows=None)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("names", [("mim_in_batch",), ("mim_codes",), ("mlm", "mim_codes"), ("itm", "mim_in_batch")])
def test_what_is_not_reached_is_frozen(names: tuple[str, ...], fusion: str) -> None:
    model = with_heads(fusion)
    heads = {"mlm": "mlm_head.", "itm": "itm_head.", "mim_in_batch": "mim_in_batch_head.", "mim_codes": "mim_codes_he"}
    expected = [prefix for name, prefix in heads.items() if name not in names]
    if "itm" not in names:
        expected += ["fusion.text_pooler.", "fusion.image_pooler."]
    if fusion == "co_attention" and not {"mlm", "itm"} & set(names):
        expected += ["fusion.layers.1.text."]
    frozen = {n.removeprefix("model.") for n in freeze_unreached(JointLoss(model, names), model.config)}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(tuple(expected))}
    JointLoss(model, names)(with_cells()).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == frozen


@pytest.mark.parametrize("fusion", FUSIONS)
def test_parameters_are_used_inside_their_own_module(fusion: str) -> None:
    """As under ZeRO-3: empty at all times but in their module's forward."""
    model, batch = with_heads(fusion), with_cells()
    module = JointLoss(model, ("mlm", "itm", "mim_in_batch", "mim_codes")).eval()
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


def test_bfloat16() -> None:
    model, batch = with_heads(), with_cells()
    names = ("mim_in_batch", "mim_codes")
    expected = JointLoss(model, names)(batch).loss.item()
    losses = JointLoss(model.bfloat16(), names)(batch.to("cpu", torch.bfloat16))
    losses.loss.backward()
    assert losses.loss.dtype == torch.float32
    assert losses.loss.item() == pytest.approx(expected, rel=3e-2)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_cells_of_one_colour_train() -> None:
    """c of a cell whose embedding is the bias alone, which starts at 0: its gradient stays finite and small."""
    model, batch = with_heads(), with_cells()
    nn.init.zeros_(model.mim_in_batch_head.cell.bias)
    JointLoss(model, ("mim_in_batch",))(replace(batch, images=torch.zeros_like(batch.images))).loss.backward()
    assert model.mim_in_batch_head.cell.bias.grad.abs().max() < 1e3


def test_right_is_who_has_the_wanted_pixels() -> None:
    """All cells of one colour: any choice is right, although the loss is that of a guess among all."""
    model, batch = with_heads(), with_cells()
    plainly = replace(batch, images=torch.ones_like(batch.images))
    losses = JointLoss(model, ("mim_in_batch",))(plainly)
    assert [value.item() for value in losses.metrics["mim_in_batch"]] == [18, 18]
    assert losses.loss.item() == pytest.approx(torch.tensor(54.0).log().item(), rel=1e-5)
    assert JointLoss(model, ("mim_in_batch",))(batch).metrics["mim_in_batch"][0] < 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fingerprints_tell_cells_apart(dtype: torch.dtype) -> None:
    cells = torch.randint(0, 3, (9000, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    _, classes = cells.unique(dim=0, return_inverse=True)
    _, marks = fingerprints(cells).unique(return_inverse=True)
    pairs = torch.stack([classes, marks], 1).unique(dim=0)
    assert len(pairs) == classes.max() + 1 == marks.max() + 1
    swapped = cells.flip(1)
    assert ((fingerprints(swapped) == fingerprints(cells)) == (swapped == cells).all(1)).all()


def test_cells_are_in_the_order_of_the_tokens() -> None:
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    cells = cells_of(images, 3)
    assert cells.shape == (18, 12)
    assert torch.equal(cells[9 + 5], images[1, :, 2:4, 4:6].flatten())


def test_errors() -> None:
    model, batch = with_heads(), small_batch()
    with pytest.raises(ValueError, match=r"no hidden cells: give its loader a CellMasking"):
        JointLoss(model, ("mim_in_batch",))(batch)
    with pytest.raises(ValueError, match=r"no codes of its hidden cells"):
        JointLoss(model, ("mim_codes",))(replace(with_cells(), cell_codes=None))
    model.mim_codes_head = model.mim_in_batch_head = None
    with pytest.raises(ValueError, match=r"set model.mim_in_batch_head=true"):
        JointLoss(model, ("mim_in_batch",))
    with pytest.raises(ValueError, match=r"set model.mim_codes_head=NUMBER"):
        JointLoss(model, ("mim_codes",))
