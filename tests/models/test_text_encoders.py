"""Every text encoder by name: the library's own numbers, packed texts, weights from files, a step of pre-training."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from partitioned import partition
from safetensors.torch import load_file, save_file
from text_cases import LENGTHS, build, small, texts
from torch import nn

from meter_fast.models.config import TEXT_NAMES, TextConfig
from meter_fast.models.packing import Packing
from meter_fast.models.text import build_text, can_pack, encode_packed, encode_padded, set_text_checkpointing
from meter_fast.models.text_families import FAMILIES
from meter_fast.models.text_presets import TEXT_PRESETS, tiny_text
from meter_fast.models.weights import load_text_weights

PACKED = [name for name in TEXT_NAMES if name not in ("deberta", "deberta_v3", "clip")]
WITH_HEADS = {  # what the library writes: encoders with the heads that they are published with, and bare ones
    "roberta": ("RobertaForMaskedLM", "RobertaModel"),
    "bert": ("BertForPreTraining", "BertModel"),
    "electra": ("ElectraForPreTraining", "ElectraForMaskedLM", "ElectraModel"),
    "albert": ("AlbertForPreTraining", "AlbertModel"),
    "deberta": ("DebertaForMaskedLM", "DebertaModel"),
    "deberta_v3": ("DebertaV2ForMaskedLM", "DebertaV2Model"),
    "clip": ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection"),
    "embeddings": ("RobertaForMaskedLM", "RobertaModel"),
}


def save_library_model(config: TextConfig, kind: str, folder: Path, **changes: object) -> nn.Module:
    """A folder that `save_pretrained` wrote, of a model with weights large enough to matter; the encoder of it, with
    the library's own attention."""
    torch.manual_seed(4)
    text = {
        "vocab_size": config.vocab_size - (config.name == "clip"), "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.eps, "hidden_act": config.activation, "pad_token_id": config.pad_id,
        "type_vocab_size": config.token_types, "embedding_size": config.embedding_width or 24,
        **FAMILIES[config.name].fixed, **changes,
    }  # fmt: skip
    if config.name == "clip":
        text = {key: text[key] for key in text if key not in ("type_vocab_size", "embedding_size")}
        text |= {"pad_token_id": 1, "bos_token_id": 57, "eos_token_id": 58, "projection_dim": 16}
    elif config.name not in ("electra", "albert"):
        del text["embedding_size"]
    model_class = getattr(transformers, kind)
    if kind == "CLIPModel":
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        made = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    else:
        made = model_class.config_class(**text)
    made._attn_implementation = "eager"
    model = model_class(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if config.name == "clip":
        return getattr(model, "text_model", model)
    return getattr(model, model.base_model_prefix, model)


CASES = [(name, kind) for name, kinds in WITH_HEADS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_equals_the_library(name: str, kind: str, tmp_path: Path) -> None:
    """Weights from a folder that the library wrote, its own attention on the other side, with padding."""
    config = small(name, weights=str(tmp_path))
    library = save_library_model(config, kind, tmp_path)
    assert library.config._attn_implementation == "eager"
    text = build_text(config).eval()
    report = load_text_weights(text, config)
    assert report.matched == len(text.state_dict())
    ids, mask = texts(config)
    with torch.no_grad():
        found = encode_padded(text, ids, mask)
        if name == "embeddings":
            expected = library.embeddings(input_ids=ids)
        else:
            expected = library(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert found.shape == (len(LENGTHS), max(LENGTHS), 24)
    assert (found - expected)[mask].abs().max() < 1e-6 * expected[mask].abs().max().clamp_min(1)
    assert expected[mask].std() > 0.1


@pytest.mark.parametrize("name", ["deberta", "deberta_v3"])
def test_distances_beyond_the_first_bucket(name: str, tmp_path: Path) -> None:
    """DeBERTa-v3 has a row for each distance up to 128 and shares those beyond."""
    config = small(name, max_positions=512, weights=str(tmp_path))
    library = save_library_model(config, WITH_HEADS[name][-1], tmp_path)
    text = build_text(config).eval()
    load_text_weights(text, config)
    ids, mask = texts(config, (300, 150))
    with torch.no_grad():
        expected = library(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert (encode_padded(text, ids, mask) - expected)[mask].abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_padding_changes_nothing(name: str) -> None:
    config = small(name)
    text = build(config).eval()
    ids, mask = texts(config)
    with torch.no_grad():
        together = encode_padded(text, ids, mask)
        for i, length in enumerate(LENGTHS):
            alone = encode_padded(text, ids[i : i + 1, :length], mask[i : i + 1, :length])[0]
            assert (together[i, :length] - alone).abs().max() < 2e-6 * alone.abs().max().clamp_min(1)


@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_padded(name: str) -> None:
    config = small(name)
    results = []
    for packed in (False, True):
        text = build(config).double().eval()
        ids, mask = texts(config)
        out = encode_packed(text, ids, Packing.of(mask)) if packed else encode_padded(text, ids, mask)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        (out * weights)[mask].sum().backward()
        results.append((out, {name: p.grad for name, p in text.named_parameters()}))
    (padded, gradients), (packed, packed_gradients) = results
    assert can_pack(text)
    assert (padded - packed)[mask].abs().max() < 1e-12
    assert packed[~mask].count_nonzero() == 0
    for parameter, gradient in gradients.items():
        error = (gradient - packed_gradients[parameter]).abs().max()
        assert error < 1e-11 * gradient.abs().max().clamp_min(1), parameter


def test_clip_reads_backwards_only() -> None:
    config = small("clip")
    text = build(config).eval()
    ids, mask = texts(config, (9, 9))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    with torch.no_grad():
        before, after = encode_padded(text, ids, mask), encode_padded(text, changed, mask)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after).abs().amax(-1) > 1e-4)[:, 5:].all()


@pytest.mark.parametrize("name", [name for name in TEXT_NAMES if name not in ("clip", "embeddings")])
def test_the_others_read_both_ways(name: str) -> None:
    config = small(name)
    text = build(config).eval()
    ids, mask = texts(config, (9, 9))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 40 + 2
    with torch.no_grad():
        difference = encode_padded(text, ids, mask) - encode_padded(text, changed, mask)
    assert (difference.abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("choice", TEXT_PRESETS)
def test_published_sizes(choice: str) -> None:
    """Counts are those of the published files, less poolers and heads."""
    preset = TEXT_PRESETS[choice]
    with torch.device("meta"):
        text = build_text(preset.config)
    assert sum(parameter.numel() for parameter in text.parameters()) == preset.parameters


def test_published_counts_of_the_papers() -> None:
    """In millions, as the papers and the library's documentation round them; CLIP's with the mask token's row."""
    rounded = {
        "roberta_base": 124, "roberta_large": 354, "bert_base": 109, "bert_large": 334, "electra_base": 109,
        "albert_base": 11, "deberta_base": 139, "deberta_v3_base": 184, "clip_base": 63, "clip_large": 123,
    }  # fmt: skip
    assert {name: round(TEXT_PRESETS[name].parameters / 1e6) for name in rounded} == rounded


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_parameters_are_used_inside_their_own_module(name: str) -> None:
    """As under ZeRO-3: a module's parameters are there from its own forward to the end of it, empty at other times."""
    config = small(name)
    text = build(config).eval()
    ids, mask = texts(config)
    with torch.no_grad():
        expected = encode_padded(text, ids, mask)
        partition(text)
        assert torch.equal(encode_padded(text, ids, mask), expected)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_activation_checkpointing(name: str) -> None:
    """The same gradients, and layers computed again in backward; switched off it is gone."""
    config = small(name)
    text = build(config).train()
    ids, mask = texts(config)
    calls = []
    linear = next((part for part in text.encoder.modules() if isinstance(part, nn.Linear)), None)
    if name == "albert":
        linear = text.encoder.albert_layer_groups[0].albert_layers[0].ffn
    if linear is not None:
        linear.register_forward_hook(lambda *_: calls.append(1))
    gradients, counts = [], []
    for on in (False, True, False):
        set_text_checkpointing(text, on)
        text.zero_grad()
        calls.clear()
        torch.manual_seed(6)
        encode_padded(text, ids, mask)[mask].square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in text.parameters()])
        counts.append(len(calls))
    assert counts[0] == counts[2] and (linear is None or counts[1] == 2 * counts[0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients[:2], strict=True))


@pytest.mark.parametrize("name", [name for name in TEXT_NAMES if name != "clip"])
def test_dropout_acts_in_training_only(name: str) -> None:
    config = small(name, dropout=0.3)
    text = build(config)
    ids, mask = texts(config)
    with torch.no_grad():
        first, second = encode_padded(text.train(), ids, mask), encode_padded(text, ids, mask)
        assert not torch.allclose(first[mask], second[mask])
        assert torch.equal(encode_padded(text.eval(), ids, mask)[mask], encode_padded(text, ids, mask)[mask])


def test_dropout_of_the_presets() -> None:
    """ALBERT (version 2) and CLIP were trained without."""
    without = {name for name, preset in TEXT_PRESETS.items() if preset.config.dropout == 0}
    assert without == {"albert_base", "clip_base", "clip_large"}
    assert {preset.config.dropout for preset in TEXT_PRESETS.values()} == {0.0, 0.1}


def test_the_mask_token_of_clip_starts_at_random(tmp_path: Path) -> None:
    config = small("clip", weights=str(tmp_path))
    save_library_model(config, "CLIPModel", tmp_path)
    text = build_text(config)
    row = text.embeddings.token_embedding.weight[-1].detach().clone()
    report = load_text_weights(text, config)
    assert "row 59 of the vocabulary, the mask token's, starts at random" in str(report)
    file = load_file(tmp_path / "model.safetensors")
    table = file["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(text.embeddings.token_embedding.weight[:-1], table)
    assert torch.equal(text.embeddings.token_embedding.weight[-1], row)
    assert 0.005 < row.std() < 0.05
    whole = dataclasses.replace(config, vocab_size=59)
    assert load_text_weights(build_text(whole), whole).resized == ()


@pytest.mark.parametrize(("name", "kind"), [("roberta", "RobertaModel"), ("clip", "CLIPModel")])
def test_added_tokens_start_at_random(name: str, kind: str, tmp_path: Path) -> None:
    """A file has a row less for each; without their number in the settings the sizes do not agree."""
    published = small(name, weights=str(tmp_path))
    save_library_model(published, kind, tmp_path)
    grown = dataclasses.replace(published, vocab_size=63, added_tokens=3)
    text = build_text(grown)
    start = text.get_input_embeddings().weight.detach().clone()
    report = load_text_weights(text, grown)
    table = text.get_input_embeddings().weight
    known = 60 - (name == "clip")
    assert "rows 60 to 62 of the vocabulary, added tokens, start at random" in str(report)
    assert torch.equal(table[known:], start[known:]) and not torch.equal(table[:known], start[:known])
    plain = build_text(published)
    load_text_weights(plain, published)
    assert torch.equal(table[:known], plain.get_input_embeddings().weight[:known])
    for wrong in (dict(added_tokens=0), dict(added_tokens=2), dict(added_tokens=5)):
        config = dataclasses.replace(grown, **wrong)
        with pytest.raises(ValueError, match=r"shapes differ"):
            load_text_weights(build_text(config), config)


def test_unprefixed_clip_file(tmp_path: Path) -> None:
    """As later versions of the library name the tensors of the text half alone."""
    config = small("clip", weights=str(tmp_path / "text.safetensors"))
    text = build(config)
    save_file({name: value.clone() for name, value in text.state_dict().items()}, tmp_path / "text.safetensors")
    again = build_text(config)
    assert load_text_weights(again, config).matched == len(text.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(text.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "kind", "changes", "message"),
    [
        (
            "deberta",
            "DebertaModel",
            {"position_biased_input": True},
            "position_biased_input=True, text.name=deberta",
        ),
        ("deberta", "DebertaModel", {"pos_att_type": ["c2p"]}, r"pos_att_type=\['c2p'\]"),
        ("deberta_v3", "DebertaV2Model", {"position_buckets": 32}, "position_buckets=32"),
        ("albert", "AlbertModel", {"num_hidden_groups": 2}, "num_hidden_groups=2"),
        (
            "albert",
            "AlbertModel",
            {"hidden_act": "gelu"},
            "hidden_act='gelu', .* text.activation='gelu_new'",
        ),
        ("electra", "ElectraModel", {"embedding_size": 12}, r"word_embeddings.weight is \(60, 12\)"),
        ("clip", "CLIPModel", {"hidden_act": "gelu"}, "text.activation='quick_gelu'"),
    ],
)
def test_folders_that_do_not_fit(name: str, kind: str, changes: dict, message: str, tmp_path: Path) -> None:
    config = small(name, weights=str(tmp_path))
    save_library_model(config, kind, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_text_weights(build_text(config), config)


def test_weights_of_another_encoder(tmp_path: Path) -> None:
    save_library_model(small("electra"), "ElectraForMaskedLM", tmp_path)
    for name, message in (("bert", "model_type='electra'"), ("deberta_v3", "model_type='electra'")):
        config = small(name, weights=str(tmp_path))
        with pytest.raises(ValueError, match=message):
            load_text_weights(build_text(config), config)
    config = small("bert", weights=str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"holds electra weights .*set model.text.name=electra"):
        load_text_weights(build_text(config), config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"name": "xlnet"}, "text.name='xlnet' is unknown: use one of roberta, bert, electra, albert"),
        ("embeddings", {"layers": 2}, "text.layers=2: text.name=embeddings has no layers: use 0"),
        ("albert", {"layers": 0}, "text.layers=0: text.name=albert needs at least one"),
        ("bert", {"embedding_width": 8}, "text.embedding_width=8: only electra and albert"),
        ("clip", {"activation": "relu"}, "text.activation='relu'"),
        ("deberta", {"heads": 5}, "text.width=24 is not a multiple of text.heads=5"),
    ],
)
def test_unfit_sizes(name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(name, **changes)


@pytest.mark.parametrize("choice", TEXT_PRESETS)
def test_tiny_form_of_a_preset(choice: str) -> None:
    config = tiny_text(choice, vocab_size=50)
    text = build_text(config)
    ids, mask = texts(config)
    assert encode_padded(text, ids, mask).shape == (*ids.shape, 128)
    assert sum(parameter.numel() for parameter in text.parameters()) < 400_000
