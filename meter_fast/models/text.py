"""Text encoders of transformers, without pooler. Knows token ids, nothing of tokenizers or files.

Which there are, and their sources: `text_families`. METER, section 3.1.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertModel, AttentionInterface, CLIPTextModel, DebertaModel, DebertaV2Model, RobertaModel

from meter_fast.kernels.cross_attention.reference import attention
from meter_fast.kernels.segments import Segments
from meter_fast.kernels.varlen_attention import varlen_attention
from meter_fast.models.config import TextConfig
from meter_fast.models.packing import Packing
from meter_fast.models.text_families import ATTENTION, FAMILIES, library_config


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    segments: Segments | None = None,
    **_,
) -> tuple[Tensor, None]:
    """The attention cores that all parts of the model share, as transformers calls them: -> ([B,L,H,K], None).

    With `segments`, B is 1 and L the tokens of all texts.
    """
    if segments is None:
        return attention(query, key, value, attention_mask, dropout).transpose(1, 2), None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    return varlen_attention(*rows, segments, segments, dropout)[None], None


def can_pack(text: nn.Module) -> bool:
    """Whether `encode_packed` serves this encoder. Not CLIP's (causal) and DeBERTa's (attention by distance)."""
    return not isinstance(text, (CLIPTextModel, DebertaModel, DebertaV2Model))


def encode_padded(text: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """ids [B,L] int64, mask [B,L] bool -> [B,L,E]; rows of padding hold values of no meaning."""
    if isinstance(text, (DebertaModel, DebertaV2Model)):
        attention_mask = mask
    elif isinstance(text, CLIPTextModel):
        length = ids.shape[1]
        attention_mask = mask[:, None, None, :] & mask.new_ones(length, length).tril()
    else:
        attention_mask = mask[:, None, None, :]
    return text(input_ids=ids, attention_mask=attention_mask).last_hidden_state


def encode_packed(text: nn.Module, ids: Tensor, packing: Packing) -> Tensor:
    """ids [B,L] int64 -> [B,L,E], zeros on padding: no work is done there."""
    if isinstance(text, RobertaModel):
        positions = text.embeddings.create_position_ids_from_input_ids(ids, text.embeddings.padding_idx)
    else:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    read = text(
        input_ids=packing.pack(ids)[None], position_ids=packing.pack(positions)[None], segments=packing.segments
    )
    return packing.unpack(read.last_hidden_state[0])


def build_text(config: TextConfig) -> nn.Module:
    """The encoder that `config.name` names, with random weights. `encode_padded` and `encode_packed` call it.

    RoBERTa counts positions over the ids it is given, so a padding id in the middle of a masked caption shifts what
    follows, as published.
    """
    AttentionInterface.register(ATTENTION, attend)
    family = FAMILIES[config.name]
    options = {"add_pooling_layer": False} if family.has_pooler else {}
    text = family.model(library_config(config), **options)
    _use_weights_in_their_own_modules(text)
    return text


def _use_weights_in_their_own_modules(text: nn.Module) -> None:
    """Under ZeRO-3 a weight is only there in the forward of its own module. Two encoders of the library look at one
    from outside: DeBERTa reads its table of relative positions, CLIP asks for the length of its position table."""
    if isinstance(text, (DebertaModel, DebertaV2Model)):
        rows = torch.arange(text.encoder.rel_embeddings.num_embeddings)
        text.encoder.register_buffer("relative_rows", rows, persistent=False)
        text.encoder.get_rel_embedding = partial(_relative_table, text.encoder)
    elif isinstance(text, CLIPTextModel):
        text.embeddings.forward = partial(_clip_embeddings, text.embeddings)


def _clip_embeddings(embeddings: nn.Module, input_ids: Tensor, **_) -> Tensor:
    """[B,L] -> [B,L,E]: words and positions."""
    return embeddings.token_embedding(input_ids) + embeddings.position_embedding(
        embeddings.position_ids[:, : input_ids.shape[1]]
    )


def _relative_table(encoder: nn.Module) -> Tensor:
    """[2 x reach, D]; DeBERTa-v3's is normalised."""
    table = encoder.rel_embeddings(encoder.relative_rows)
    return encoder.LayerNorm(table) if "layer_norm" in getattr(encoder, "norm_rel_ebd", ()) else table


def set_text_checkpointing(text: nn.Module, on: bool) -> None:
    """Activation checkpointing, layer by layer. Later versions of the library call the switch by another name."""
    if isinstance(text, AlbertModel):
        _set_albert_checkpointing(text, on)
    elif on:
        enable = getattr(text, "activation_checkpointing_enable", None) or text.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        disable = getattr(text, "activation_checkpointing_disable", None) or text.gradient_checkpointing_disable
        disable()


def _set_albert_checkpointing(text: AlbertModel, on: bool) -> None:
    """The library has no switch for ALBERT. Its one layer is called again and again; each call is a checkpoint."""
    for group in text.encoder.albert_layer_groups:
        for layer in group.albert_layers:
            layer.__dict__.pop("forward", None)
            if on:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
