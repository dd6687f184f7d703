"""The text encoders by name: which classes of transformers build them, and what makes them what they are.

Knows the library's configurations and how its files name tensors. Knows no weights and no batches.

Sources: RoBERTa (Liu et al. 2019), BERT (Devlin et al. 2019), ELECTRA (Clark et al. 2020), ALBERT (Lan et al. 2020),
DeBERTa (He et al. 2021), DeBERTa-v3 (He et al. 2023), CLIP (Radford et al. 2021); METER, section 4.2, compares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    ElectraConfig,
    ElectraModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from meter_fast.models.config import TextConfig

ATTENTION = "meter_fast"  # the name that our attention is registered under


@dataclass(frozen=True)
class Family:
    """How transformers builds and stores one architecture.

    attention: which implementation its layers take; "eager" where the library has no other. model_types: what its
    config.json says, the one of the encoder alone first. prefix: of its tensors in files of a model with heads. unread:
    beginnings of further tensors of such files that the encoder never computes with. fixed: settings of the library
    that belong to the architecture, not to a size. shares_pad_id: whether config.json's padding id is the tokenizer's.
    has_pooler: whether the class builds a pooler unless told otherwise.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    model_types: tuple[str, ...]
    prefix: str
    attention: str = ATTENTION
    unread: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    shares_pad_id: bool = True
    has_pooler: bool = False


# Without absolute positions: content reads relative positions, and relative positions read content.
DISENTANGLED = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "pos_att_type": ["c2p", "p2c"],
}
ROBERTA = Family(RobertaConfig, RobertaModel, ("roberta",), "roberta", has_pooler=True)
FAMILIES = {
    "roberta": ROBERTA,
    "bert": Family(BertConfig, BertModel, ("bert",), "bert", has_pooler=True),
    "electra": Family(ElectraConfig, ElectraModel, ("electra",), "electra"),
    "albert": Family(
        AlbertConfig,
        AlbertModel,
        ("albert",),
        "albert",
        fixed={"num_hidden_groups": 1, "inner_group_num": 1},
        has_pooler=True,
    ),
    "deberta": Family(
        DebertaConfig,
        DebertaModel,
        ("deberta",),
        "deberta",
        attention="eager",
        unread=("embeddings.position_embeddings.",),
        fixed=DISENTANGLED,
    ),
    "deberta_v3": Family(
        DebertaV2Config,
        DebertaV2Model,
        ("deberta-v2",),
        "deberta",
        attention="eager",
        unread=("embeddings.position_embeddings.",),
        fixed={**DISENTANGLED, "share_att_key": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"},
    ),
    "clip": Family(
        CLIPTextConfig, CLIPTextModel, ("clip_text_model", "clip"), "text_model", shares_pad_id=False
    ),  # its config.json says 1, its tokenizer pads with the end-of-text token
    "embeddings": ROBERTA,  # with no layers
}


def library_config(config: TextConfig) -> PreTrainedConfig:
    """The library's configuration of the encoder that `config` describes."""
    family = FAMILIES[config.name]
    settings: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.eps,
        "hidden_act": config.activation,
        "pad_token_id": config.pad_id,
        "attn_implementation": family.attention,
        **family.fixed,
    }
    if config.name == "clip":
        settings |= {"attention_dropout": config.dropout, "bos_token_id": None, "eos_token_id": config.pad_id}
    else:
        settings |= {
            "type_vocab_size": config.token_types,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
        }
    if config.name in ("electra", "albert"):
        settings["embedding_size"] = config.embedding_width or config.width
    if config.name in ("roberta", "bert", "electra", "embeddings"):
        settings["use_cache"] = False
    return family.config(**settings)
