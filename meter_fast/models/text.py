"""Text encoder: RoBERTa or BERT of transformers, without pooler. Knows token ids, nothing of tokenizers or files.

Source: Liu et al. 2019 (RoBERTa), Devlin et al. 2019 (BERT); METER, section 3.1.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BertConfig, BertModel, RobertaConfig, RobertaModel

from meter_fast.kernels.cross_attention.reference import attention
from meter_fast.kernels.segments import Segments
from meter_fast.kernels.varlen_attention import varlen_attention
from meter_fast.models.config import TextConfig
from meter_fast.models.packing import Packing

CLASSES = {"roberta": (RobertaConfig, RobertaModel), "bert": (BertConfig, BertModel)}
ATTENTION = "meter_fast"


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


def encode_padded(text: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """ids [B,L] int64, mask [B,L] bool -> [B,L,E]."""
    return text(input_ids=ids, attention_mask=mask[:, None, None, :]).last_hidden_state


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
    """The encoder that `config.name` names, with random weights.

    Call it with input_ids [B,L] and attention_mask bool [B,1,1,L]; `.last_hidden_state` is [B,L,E].
    RoBERTa counts positions over the ids it is given, so a padding id in the middle of a masked caption shifts what
    follows, as published. Raises ValueError on an unknown name.
    """
    if config.name not in CLASSES:
        raise ValueError(f"text.name={config.name!r} is unknown: use one of {', '.join(CLASSES)}")
    AttentionInterface.register(ATTENTION, attend)
    config_class, model_class = CLASSES[config.name]
    library_config = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.token_types,
        layer_norm_eps=config.eps,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=config.pad_id,
        hidden_act="gelu",
        use_cache=False,
        attn_implementation=ATTENTION,
    )
    return model_class(library_config, add_pooling_layer=False)


def set_text_checkpointing(text: nn.Module, on: bool) -> None:
    """Activation checkpointing, layer by layer. Later versions of the library call the switch by another name."""
    if on:
        enable = getattr(text, "activation_checkpointing_enable", None) or text.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        disable = getattr(text, "activation_checkpointing_disable", None) or text.gradient_checkpointing_disable
        disable()
