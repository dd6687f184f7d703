"""The paper's tables of comparisons: what each row changes, at full size and in miniature, and what the paper reports.

Knows settings as text and the paper's figures. Knows nothing of how rows are run or shown.

Source: Dou et al. 2022, arXiv 2111.02387; tables are numbered as in the proceedings of CVPR 2022. The paper itself
could not be re-read for this file. `checked` names, for single figures, a public text that quotes them; all others are
quoted from the paper without having been re-read, and are marked so wherever they are shown.

Full size is the paper's set-up: encoders with published weights, 4 M pictures, CLIP-ViT-B/32 and BERT unless a row says
otherwise. In miniature the kinds are the same and everything else is small: drawn scenes of 96 px, encoders that start
at random, patches of 32 pixels (CLIP-ViT-B/16: 16). What only weights tell apart (DeiT and ViT) is then the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from meter_fast.models.vision_presets import VISION_PRESETS

Size = Literal["tiny", "base"]

NOTES = "reading notes on the paper, zhangtemplar.github.io and docsaid.org/en/papers/multimodality/meter"
REVIEW = "a literature review that quotes table 7 of the proceedings"


@dataclass(frozen=True)
class Change:
    """Settings of the recipes, key=value. model: of pre-training and fine-tuning; pretrain: of pre-training alone; vqa:
    of fine-tuning alone."""

    model: tuple[str, ...] = ()
    pretrain: tuple[str, ...] = ()
    vqa: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """name: on the command line and of the row's folder; label: as the paper calls it. paper: figures by metric, per
    cent; checked: the metrics that were re-read, and where. start: another row, whose pre-training this one shares."""

    name: str
    label: str
    base: Change
    tiny: Change
    paper: Mapping[str, float] = field(default_factory=dict)
    checked: Mapping[str, str] = field(default_factory=dict)
    start: str = ""

    def change(self, size: Size) -> Change:
        """What the row sets at a size."""
        return self.base if size == "base" else self.tiny


@dataclass(frozen=True)
class Table:
    """number: in the proceedings. pretrained: rows are pre-trained, scored by zero-shot retrieval and fine-tuned; else
    fine-tuned from encoders alone. metrics: the paper's columns in order."""

    name: str
    title: str
    number: str
    pretrained: bool
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]


LENGTHS: dict[Size, dict[str, tuple[str, ...]]] = {
    "base": {"from_encoders": ("from_encoders=true",)},
    "tiny": {
        "pretrain": ("run.max_steps=700", "optim.warmup=0.15", "run.eval_every=0", "run.picture_every=0"),
        "vqa": ("run.max_steps=300", "run.max_epochs=0", "run.eval_every=0"),
        "from_encoders": (
            "run.max_steps=1000", "run.max_epochs=0", "run.eval_every=0", "data.tokenizer=trained", "optim.lr=5e-4",
            "optim.head_multiplier=1",
        ),
        "image_tokenizer": (),
    },
}  # fmt: skip
"""What each stage has in all rows: full runs as the recipes have them, or minutes on two CPU cores. "from_encoders":
fine-tuning without pre-training."""

HELD_OUT: dict[Size, tuple[str, ...]] = {
    "base": ("data.val_sources=f30k", "data.val_split=test"),
    "tiny": ("data.val_sources=coco", "data.val_split=test"),
}
"""What zero-shot retrieval is scored on: Flickr30k, as in the paper, or the scenes' test split."""

PICTURES: dict[Size, int | None] = {"base": None, "tiny": 100}

VQA, IR, TR = "VQAv2", "IR@1", "TR@1"
RETRIEVAL = {IR: "ir_r1", TR: "tr_r1"}
"""The metrics that zero-shot retrieval gives, where a table's rows are pre-trained, by the name of our score."""


def _figures(metrics: tuple[str, ...], text: str) -> dict[str, float]:
    """Figures in the order of the metrics -> by metric, without those that the paper leaves out (-)."""
    return {name: float(value) for name, value in zip(metrics, text.split(), strict=True) if value != "-"}


def _encoders(text: str, vision: str) -> tuple[Change, Change]:
    """(base, tiny) of a pair of encoders. At full size both trainings are at the vision encoder's native resolution."""
    model = (f"text={text}", f"vision={vision}")
    own = (f"model.vision.image_size={VISION_PRESETS[vision].config.image_size}",)
    finer = ("model.vision.patch_size=16",) if vision == "clip_b16_224" else ()
    return Change(model, vqa=own), Change((*model, *finer))


DEFAULT, _ = _encoders("bert_base", "clip_b32_224")


def _row(name: str, label: str, base: tuple[str, ...], tiny: tuple[str, ...], paper: dict, checked=None) -> Row:
    """A row of the default encoders that differs in the settings of pre-training."""
    full = replace(DEFAULT, pretrain=base)
    return Row(name, label, full, Change(pretrain=tiny), paper, dict.fromkeys(checked or (), REVIEW))


# ------------------------------------------------------------------------------------------------ without pre-training

_TEXT_METRICS = (VQA, "VE", "IR", "TR", "SQuAD", "MNLI")
_TEXTS = {
    "emb_only": ("Emb-only", "bert_embeddings", "67.13 74.85 49.06 68.20 - -"),
    "electra": ("ELECTRA", "electra_base", "69.22 76.57 41.80 58.30 86.8 88.8"),
    "clip": ("CLIP", "clip_base", "69.31 75.37 54.96 73.80 - -"),
    "deberta": ("DeBERTa", "deberta_base", "69.40 76.74 51.50 67.70 87.2 88.8"),
    "bert": ("BERT", "bert_base", "69.56 76.27 49.60 66.60 76.3 84.3"),
    "roberta": ("RoBERTa", "roberta_base", "69.69 76.53 49.86 68.90 84.6 87.6"),
    "albert": ("ALBERT", "albert_base", "69.94 76.20 52.20 68.70 86.4 87.9"),
}
TEXT_ENCODERS = Table(
    "text_encoders",
    "Text encoders without pre-training, with CLIP-ViT-B/32",
    "table 2",
    False,
    _TEXT_METRICS,
    tuple(
        Row(name, label, *_encoders(preset, "clip_b32_224"), _figures(_TEXT_METRICS, paper))
        for name, (label, preset, paper) in _TEXTS.items()
    ),
)

_VISION_METRICS = (VQA, "VE", "IR", "TR", "ImageNet")
_VISIONS = {
    "deit_distilled": ("Dis. DeiT B-384/16", "deit_distilled_b16_384", "67.84 76.17 34.84 52.10 85.2"),
    "beit": ("BEiT B-224/16", "beit_b16_224", "68.45 75.28 32.24 59.80 85.2"),
    "deit": ("DeiT B-384/16", "deit_b16_384", "68.92 75.97 33.38 50.90 82.9"),
    "vit": ("ViT B-384/16", "vit_b16_384", "69.09 76.35 40.30 59.80 83.97"),
    "clip32": ("CLIP B-224/32", "clip_b32_224", "69.69 76.53 49.86 68.90 -"),
    "volo": ("VOLO 4-448/32", "volo_d4_448", "71.44 76.42 40.90 61.40 86.8"),
    "cait": ("CaiT M-384/32", "cait_m36_384", "71.52 76.62 38.96 61.30 86.1"),
    "clip16": ("CLIP B-224/16", "clip_b16_224", "71.75 77.54 57.64 76.90 -"),
    "swin": ("Swin B-384/32", "swin_b_384", "72.38 77.65 52.30 69.50 86.4"),
}
VISION_ENCODERS = Table(
    "vision_encoders",
    "Vision encoders without pre-training, with RoBERTa",
    "table 3",
    False,
    _VISION_METRICS,
    tuple(
        Row(
            name, label, *_encoders("roberta_base", preset), _figures(_VISION_METRICS, paper),
            {VQA: NOTES} if name == "swin" else {},
        )
        for name, (label, preset, paper) in _VISIONS.items()
    ),
)  # fmt: skip

# --------------------------------------------------------------------------------------------------- with pre-training

METRICS = (VQA, IR, TR)
_PAIRS = {
    "emb_only_clip32": ("Embed-only + CLIP-32", "bert_embeddings", "clip_b32_224", "73.99 60.32 74.10"),
    "bert_clip32": ("BERT + CLIP-32", "bert_base", "clip_b32_224", "74.98 66.08 78.10"),
    "bert_clip16": ("BERT + CLIP-16", "bert_base", "clip_b16_224", "76.70 74.52 87.20"),
    "roberta_clip32": ("RoBERTa + CLIP-32", "roberta_base", "clip_b32_224", "74.67 65.50 76.60"),
    "roberta_clip16": ("RoBERTa + CLIP-16", "roberta_base", "clip_b16_224", "77.19 76.64 89.60"),
    "roberta_swin": ("RoBERTa + Swin", "roberta_base", "swin_b_384", "76.43 71.68 85.30"),
}
ENCODERS = Table(
    "encoders",
    "Encoders with pre-training",
    "table 4",
    True,
    METRICS,
    tuple(
        Row(
            name, label, *_encoders(text, vision), _figures(METRICS, paper),
            {VQA: NOTES} if name == "roberta_clip16" else {},
        )
        for name, (label, text, vision, paper) in _PAIRS.items()
    ),
)  # fmt: skip


def _rates(bottom: float, top: float) -> tuple[str, ...]:
    """Learning rates of the encoders and of what starts at random."""
    ratio = round(top / bottom, 6)
    return f"optim.lr={bottom:g}", f"optim.head_multiplier={ratio:g}", f"optim.cross_modal_multiplier={ratio:g}"


_RATES = {
    (1e-5, 1e-5): "73.16 48.80 63.70",
    (2e-5, 2e-5): "73.66 53.14 67.20",
    (3e-5, 3e-5): "73.77 56.48 70.90",
    (5e-5, 5e-5): "73.54 52.48 65.90",
    (1e-5, 5e-5): "74.98 66.08 78.10",
}
LEARNING_RATES = Table(
    "learning_rates",
    "Learning rates of pre-training: encoders / fusion and heads (in miniature ten times as high, and nothing in the "
    "encoders to keep)",
    "table 5",
    True,
    METRICS,
    tuple(
        _row(
            f"{bottom:.0e}_{top:.0e}".replace("e-0", "e-"), f"{bottom:.0e} / {top:.0e}".replace("e-0", "e-"),
            _rates(bottom, top), _rates(10 * bottom, 10 * top), _figures(METRICS, paper),
        )
        for (bottom, top), paper in _RATES.items()
    ),
)  # fmt: skip


def _fusion(name: str, label: str, paper: str) -> Row:
    change = (f"fusion={name}",)
    full = replace(DEFAULT, model=(*DEFAULT.model, *change))
    return Row(name, label, full, Change(change), _figures(METRICS, paper))


FUSION = Table(
    "fusion",
    "Fusion, and a decoder on top of it",
    "table 6",
    True,
    METRICS,
    (
        _fusion("merged_attention", "Merged attention", "74.00 57.46 73.10"),
        _fusion("co_attention", "Co-attention", "74.98 66.08 78.10"),
        _fusion("encoder_decoder", "Co-attention, encoder-decoder", "74.73 48.96 71.60"),
    ),
)

_GOALS = {
    "mlm": ("MLM", "74.19 - -"),
    "itm": ("ITM", "72.63 53.74 71.00"),
    "mlm,itm": ("MLM + ITM", "74.98 66.08 78.10"),
    "mlm,itm,mim_in_batch": ("MLM + ITM + MIM, in-batch negatives", "74.01 62.12 76.90"),
    "mlm,itm,mim_codes": ("MLM + ITM + MIM, discrete codes", "74.21 59.80 76.30"),
}
OBJECTIVES = Table(
    "objectives",
    "Objectives of pre-training",
    "table 7",
    True,
    METRICS,
    tuple(
        _row(
            goals.replace(",", "_"), label, (f"objectives.names={goals}",), (f"objectives.names={goals}",),
            _figures(METRICS, paper), () if goals == "mlm" else (IR, TR),
        )
        for goals, (label, paper) in _GOALS.items()
    ),
)  # fmt: skip


def _resolution(base: int, tiny: int, start: str) -> Row:
    model = ("text=roberta_base", "vision=clip_b16_224")
    full = Change(model, vqa=(f"model.vision.image_size={base}",))
    return Row(f"px{base}", f"{base} px", full, Change(vqa=(f"model.vision.image_size={tiny}",)), start=start)


RESOLUTION = Table(
    "resolution",
    "Resolution of fine-tuning after pre-training at 224 px (in miniature 64, 96, 128 and 192 px after 96 px; the "
    "paper plots this one, so no figures are quoted)",
    "the figure on resolution",
    True,
    METRICS,
    (
        _resolution(224, 64, ""), _resolution(288, 96, "px224"), _resolution(384, 128, "px224"),
        _resolution(576, 192, "px224"),
    ),
)  # fmt: skip

TABLES = {
    table.name: table
    for table in (TEXT_ENCODERS, VISION_ENCODERS, ENCODERS, LEARNING_RATES, FUSION, OBJECTIVES, RESOLUTION)
}
