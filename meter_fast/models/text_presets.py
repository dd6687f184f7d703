"""Published text encoders by name: sizes, where their weights and tokenizer are, how many parameters they have.

Knows plain values only. Numbers are those of the `config.json` that each is published with; parameters are counted
without pooler and heads. CLIP's vocabulary has one token more than published: the mask token, which it lacks.
"""

from dataclasses import dataclass, replace
from typing import Literal

from meter_fast.models.config import TextConfig

TextChoice = Literal[
    "default", "roberta_base", "roberta_large", "bert_base", "bert_large", "electra_base", "electra_large",
    "albert_base", "deberta_base", "deberta_v3_base", "clip_base", "clip_large", "embeddings", "bert_embeddings",
]  # fmt: skip


@dataclass(frozen=True)
class TextPreset:
    """hub: name on the Hugging Face hub, of the weights and of the tokenizer."""

    config: TextConfig
    hub: str
    parameters: int

    def pretrained(self) -> TextConfig:
        """The encoder with the published weights."""
        return replace(self.config, weights=self.hub)


_ROBERTA = TextConfig(
    name="roberta", width=768, layers=12, heads=12, ffn=3072, vocab_size=50265, max_positions=514, token_types=1,
    eps=1e-5, dropout=0.1, pad_id=1,
)  # fmt: skip
_BERT = replace(_ROBERTA, name="bert", vocab_size=30522, max_positions=512, token_types=2, eps=1e-12, pad_id=0)
_DEBERTA = replace(_ROBERTA, name="deberta", max_positions=512, token_types=0, eps=1e-7, pad_id=0)
_CLIP = replace(
    _ROBERTA, name="clip", width=512, heads=8, ffn=2048, vocab_size=49409, max_positions=77, token_types=0,
    dropout=0.0, pad_id=49407, activation="quick_gelu",
)  # fmt: skip
_LARGE = {"width": 1024, "layers": 24, "heads": 16, "ffn": 4096}

TEXT_PRESETS = {
    "roberta_base": TextPreset(_ROBERTA, "roberta-base", 124_055_040),
    "roberta_large": TextPreset(replace(_ROBERTA, **_LARGE), "roberta-large", 354_310_144),
    "bert_base": TextPreset(_BERT, "bert-base-uncased", 108_891_648),
    "bert_large": TextPreset(replace(_BERT, **_LARGE), "bert-large-uncased", 334_092_288),
    "electra_base": TextPreset(replace(_BERT, name="electra"), "google/electra-base-discriminator", 108_891_648),
    "electra_large": TextPreset(
        replace(_BERT, name="electra", **_LARGE), "google/electra-large-discriminator", 334_092_288
    ),
    "albert_base": TextPreset(
        replace(_BERT, name="albert", vocab_size=30000, dropout=0.0, embedding_width=128, activation="gelu_new"),
        "albert/albert-base-v2",
        11_092_992,
    ),
    "deberta_base": TextPreset(_DEBERTA, "microsoft/deberta-base", 138_601_728),
    "deberta_v3_base": TextPreset(
        replace(_DEBERTA, name="deberta_v3", vocab_size=128100), "microsoft/deberta-v3-base", 183_831_552
    ),
    "clip_base": TextPreset(_CLIP, "openai/clip-vit-base-patch16", 63_166_464),
    "clip_large": TextPreset(
        replace(_CLIP, width=768, heads=12, ffn=3072), "openai/clip-vit-large-patch14", 123_061_248
    ),
    "embeddings": TextPreset(replace(_ROBERTA, name="embeddings", layers=0), "roberta-base", 39_000_576),
    "bert_embeddings": TextPreset(replace(_BERT, layers=0), "bert-base-uncased", 23_837_184),
}


def tiny_text(choice: str, vocab_size: int = 1024) -> TextConfig:
    """The encoder of a preset at the size of `config.tiny()`, with random weights."""
    config = TEXT_PRESETS[choice].config
    return replace(
        config, width=128, layers=min(1, config.layers), heads=4, ffn=512, vocab_size=vocab_size, max_positions=64,
        dropout=0.0, pad_id=1 if config.counts_from_padding else 0,
        embedding_width=32 if config.embedding_width else None,
    )  # fmt: skip
