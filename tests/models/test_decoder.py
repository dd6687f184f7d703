"""The decoder equals one written out here; causality, padding, gradients, forms and kernels, what it refuses."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import PLAIN, WORDS, decoder_batch, decoder_config, decoder_model, texts_of
from torch import Tensor, nn

from meter_fast.models.config import FUSIONS, DecoderConfig, KernelsConfig
from meter_fast.models.export import load_export, save_export
from meter_fast.models.meter import Meter, Need, Part

LENGTHS, WRITTEN = [5, 3, 6, 2], [3, 6, 2, 4]


def read(model: Meter, need: Need = Need.BOTH) -> tuple:
    """What the fusion makes of four pairs, and the texts."""
    texts, images = texts_of(LENGTHS, WRITTEN), decoder_batch(next(model.parameters()).dtype).images
    text = model.encode_text(texts.ids, texts.mask)
    return model.fuse(text, model.encode_image(images), texts.mask, need=need), texts


def decode(model: Meter) -> tuple[Tensor, Tensor]:
    """Rows of the decoder [4,T,D] and which of them are real."""
    fused, texts = read(model)
    rows = model.decoder(model.decoder.inputs(texts.targets), fused.text, fused.image, texts.mask, texts.lengths)
    return rows, torch.arange(rows.shape[1]) < texts.lengths[:, None]


def attended(x: Tensor, others: Tensor, query: nn.Linear, key: Tensor, value: Tensor, out, heads: int, hide) -> Tensor:
    """Attention written out for one pair: x [T,D] reads key and value [U,D]; hide [T,U] bool or None."""
    size = x.shape[-1] // heads
    parts = []
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        scores = query[:, at] @ key[:, at].T / size**0.5
        if hide is not None:
            scores = scores.masked_fill(hide, float("-inf"))
        parts.append(scores.softmax(-1) @ value[:, at])
    return out[2](x + F.linear(torch.cat(parts, -1), out[0], out[1]))


def plain_decoder(model: Meter, ids: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """One pair without padding: ids [T], text [L,D], image [V,D] -> [T,D]."""
    decoder, heads = model.decoder, model.config.fusion.heads
    tables = decoder.embeddings
    x = tables.norm(tables.words.weight[ids] + tables.positions.weight[: len(ids)])
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for layer in decoder.layers:
        own = layer.self_attention
        query, key, value = F.linear(x, own.query_key_value.weight, own.query_key_value.bias).chunk(3, -1)
        x = attended(x, x, query, key, value, (own.out.weight, own.out.bias, own.norm_of), heads, later)
        for cross, side in ((layer.image_attention, image), (layer.text_attention, text)):
            query = F.linear(x, cross.query.weight, cross.query.bias)
            key, value = F.linear(side, cross.key_value.weight, cross.key_value.bias).chunk(2, -1)
            x = attended(x, side, query, key, value, (cross.out.weight, cross.out.bias, cross.norm_of), heads, None)
        feed = layer.feed_forward
        up = F.gelu(F.linear(x, feed.up.weight, feed.up.bias))
        x = feed.norm_of(x + F.linear(up, feed.down.weight, feed.down.bias))
    return x


@pytest.mark.parametrize("fusion", FUSIONS)
def test_equals_the_decoder_written_out(fusion: str) -> None:
    model = decoder_model(fusion, torch.float64)
    for part in model.decoder.modules():
        if hasattr(part, "norm"):
            norm = part.norm
            part.norm_of = lambda x, n=norm: F.layer_norm(x, x.shape[-1:], n.weight, n.bias, n.eps)
    fused, texts = read(model)
    rows, _ = decode(model)
    for pair, (length, count) in enumerate(zip(LENGTHS, WRITTEN, strict=True)):
        ids = torch.tensor([WORDS, *texts.targets[pair, : count - 1]])
        expected = plain_decoder(model, ids, fused.text[pair, :length], fused.image[pair])
        assert (rows[pair, :count] - expected).abs().max() < 1e-12


def test_cls_is_the_class_tokens_row() -> None:
    model = decoder_model(dtype=torch.float64)
    both, texts = read(model)
    ids = torch.full((4, 1), WORDS + 1)
    rows = model.decoder(ids, both.text, both.image, texts.mask)
    found, everything = read(model, Need.CLS)[0], read(model, Need.ALL)[0]
    assert found.text is None and found.image is None and found.cls.shape == (4, 64)
    assert torch.equal(found.cls, rows[:, 0]) and torch.equal(everything.cls, found.cls)
    assert torch.equal(everything.text, both.text) and torch.equal(everything.image, both.image)
    assert model.itm_head(found.cls).shape == (4, 2)
    shown = model.fuse(*_encoded(model), need=Need.CLS, attention=True)
    assert torch.allclose(shown.cls, found.cls) and len(shown.attention) == 2


def _encoded(model: Meter) -> tuple[Tensor, Tensor, Tensor]:
    texts, images = texts_of(LENGTHS, WRITTEN), decoder_batch(next(model.parameters()).dtype).images
    return model.encode_text(texts.ids, texts.mask), model.encode_image(images), texts.mask


def test_a_token_changes_only_what_comes_after() -> None:
    model = decoder_model(dtype=torch.float64)
    fused, texts = read(model)
    ids = torch.randint(4, WORDS, (4, 7), generator=torch.Generator().manual_seed(7))
    rows = model.decoder(ids, fused.text, fused.image, texts.mask)
    for place in range(7):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % WORDS
        differs = (model.decoder(changed, fused.text, fused.image, texts.mask) - rows).abs().amax((0, 2)) > 1e-9
        assert differs.tolist() == [later >= place for later in range(7)]


def test_padding_of_either_text_changes_nothing() -> None:
    model = decoder_model(dtype=torch.float64)
    fused, texts = read(model)
    rows, real = decode(model)
    longer = F.pad(texts.mask, (0, 3))
    text = torch.cat([fused.text, torch.full((4, 3, 64), 7.0, dtype=torch.float64)], 1)
    text = torch.where(longer[..., None], text, 9.0)
    inputs = F.pad(model.decoder.inputs(texts.targets), (0, 2), value=5)
    found = model.decoder(inputs, text, fused.image, longer, texts.lengths)[:, : rows.shape[1]]
    assert (found - rows)[real].abs().max() < 1e-12


@pytest.mark.parametrize("fusion", FUSIONS)
def test_token_by_token_equals_all_at_once(fusion: str) -> None:
    """Three texts of each pair at a time, which change places on the way."""
    model = decoder_model(fusion, torch.float64).eval()
    fused, texts = read(model)
    ids = torch.randint(4, WORDS, (4, 3, 6), generator=torch.Generator().manual_seed(8))
    ids[..., 0] = WORDS
    places = torch.tensor([[2, 0, 0], [1, 1, 1], [0, 1, 2], [2, 1, 0]])
    cache = model.decoder.begin(fused.text, fused.image, texts.mask)
    for step in range(6):
        if step == 3:
            cache.choose(places)
            ids[..., :3] = ids[..., :3].gather(1, places[..., None].expand(-1, -1, 3))
        row = model.decoder.step(ids[..., step], cache)
        for text in range(3):
            whole = model.decoder(ids[:, text, : step + 1], fused.text, fused.image, texts.mask)
            assert (row[:, text] - whole[:, -1]).abs().max() < 1e-12
    assert cache.length == 6


def run(model: Meter) -> dict[str, Tensor]:
    """What training computes with a decoder, and all gradients."""
    rows, real = decode(model)
    texts = texts_of(LENGTHS, WRITTEN)
    loss, correct = model.lm_head(rows[real], texts.targets[real])
    cls = read(model, Need.CLS)[0].cls
    (loss + model.itm_head(cls).square().sum()).backward()
    return {"rows": rows[real], "cls": cls, "loss": loss, "correct": correct} | {
        name: p.grad for name, p in model.named_parameters()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * max(1.0, value.abs().max()), f"{name}: {error}"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_parameter_has_a_gradient_and_none_is_idle(fusion: str) -> None:
    model = decoder_model(fusion)
    run(model)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not any("pooler" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(("form", "text"), itertools.product(("direct", "absorbed", "auto"), ("padded", "packed")))
def test_forms_in_float64(form: str, text: str) -> None:
    kernels = dataclasses.replace(PLAIN, cross_attention_form=form, text=text)
    found = run(decoder_model(dtype=torch.float64, kernels=kernels))
    assert_equal(found, run(decoder_model(dtype=torch.float64)), 1e-11)


TRITON = [
    ("co_attention", KernelsConfig("triton", "direct", "packed", "triton", "triton", "triton")),
    ("co_attention", KernelsConfig("triton", "absorbed", "padded", "triton", "triton", "triton")),
    ("merged_attention", KernelsConfig("triton", "direct", "packed", "triton", "triton", "triton")),
]


@pytest.mark.parametrize(("fusion", "kernels"), TRITON, ids=str)
def test_kernels_give_the_same_numbers(fusion: str, kernels: KernelsConfig) -> None:
    config = decoder_config(fusion, layers=1)
    config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, layers=1))
    model = decoder_model(kernels=kernels, config=config)
    assert_equal(run(model), run(decoder_model(config=config)), 2e-5)
    model.eval()
    fused, texts = read(model)
    ids = model.decoder.inputs(texts.targets)
    cache = model.decoder.begin(fused.text, fused.image, texts.mask)
    rows = torch.cat([model.decoder.step(ids[:, t : t + 1], cache) for t in range(ids.shape[1])], 1)
    assert (rows - model.decoder(ids, fused.text, fused.image, texts.mask)).abs().max() < 2e-5


def test_parts_share_pictures() -> None:
    """Several readers at once, one of which reads other pictures, give what each gives alone."""
    model = decoder_model(dtype=torch.float64)
    text, image, mask = _encoded(model)
    places = torch.tensor([2, 2, 0, 1])
    parts = (Part(Need.BOTH, 4), Part(Need.CLS, 4, places))
    spans, pairs = model.fuse_parts(torch.cat([text, text]), image, torch.cat([mask, mask]), parts)
    alone = model.fuse(text, image, mask, need=Need.BOTH)
    assert (spans.text - alone.text)[mask].abs().max() < 1e-12 and (spans.image - alone.image).abs().max() < 1e-12
    assert (pairs.cls - model.fuse(text, image[places], mask, need=Need.CLS).cls).abs().max() < 1e-12


@pytest.mark.parametrize("fusion", FUSIONS)
def test_activation_checkpointing(fusion: str) -> None:
    model = decoder_model(fusion, torch.float64)
    model.set_activation_checkpointing(True)
    calls = []
    model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_equal(run(model), run(decoder_model(fusion, torch.float64)), 1e-12)
    assert len(calls) == 4  # the text and the class token, forward and again in backward


def test_dropout_acts_in_training_only() -> None:
    config = decoder_config()
    model = decoder_model(config=dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, dropout=0.3)))
    fused, texts = read(model.eval())
    ids = model.decoder.inputs(texts.targets)

    def rows() -> Tensor:
        return model.decoder(ids, fused.text, fused.image, texts.mask)

    assert torch.equal(rows(), rows())
    model.train()
    assert not torch.equal(rows(), rows())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_export_and_back(fusion: str, tmp_path) -> None:
    model = decoder_model(fusion).eval()
    again = load_export(save_export(model, tmp_path / "export", None))
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(decode(again)[0], decode(model)[0])


def test_a_model_without_decoder_has_none_of_it() -> None:
    model = Meter(dataclasses.replace(decoder_config(layers=0), mlm_head=True))
    assert model.decoder is None and model.lm_head is None
    assert read(model, Need.CLS)[0].cls.shape == (4, 128) == (4, model.config.cls_width)
    assert model.fusion.text_pooler is not None


def test_what_is_refused() -> None:
    model = decoder_model()
    fused, texts = read(model)
    with pytest.raises(ValueError, match=r"13 tokens exceeds model.decoder.max_positions=12"):
        model.decoder(torch.zeros(4, 13, dtype=torch.int64), fused.text, fused.image, texts.mask)
    cache = model.decoder.begin(fused.text, fused.image, texts.mask)
    for _ in range(12):
        model.decoder.step(torch.zeros(4, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"ends at model.decoder.max_positions=12"):
        model.decoder.step(torch.zeros(4, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"decoder.layers=-1"):
        DecoderConfig(layers=-1)
    with pytest.raises(ValueError, match=r"decoder.max_positions=1"):
        DecoderConfig(max_positions=1)
