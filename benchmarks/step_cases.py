"""The training steps that are measured: which recipe, at which size, on which batch. Knows recipes and batches; knows
nothing of processes, clocks or results.

Shape letters: B texts with their pictures, L text tokens, N pictures.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.plain import PLAIN
from meter_fast.config import RunConfig, override
from meter_fast.data.batch import Batch, PretrainBatch, RankedTexts, StatementBatch, VqaBatch
from meter_fast.recipes import resolve

ANSWERS = 3129  # of VQAv2
FALSE_TEXTS = 15  # draw_false_text of the published retrieval
MASKED = 0.15
FIRST_WORD = 5  # ids below are special
MASK = 4
SPREAD = 4  # tokens that texts are shorter or longer than the average


@dataclass(frozen=True)
class Case:
    """recipe: whose settings are taken. image_size: pixels. padded: tokens of every text in the published run.
    texts_per_picture: that ask about one picture in our batch; in the published one every text brings its picture."""

    recipe: str
    image_size: int
    padded: int = 50
    texts_per_picture: int = 1


CASES = {
    "pretrain_224": Case("pretrain", 224),
    "pretrain_288": Case("pretrain", 288),
    "vqa_576": Case("vqa", 576),
    "vqa_576_5": Case("vqa", 576, texts_per_picture=5),
    "nlvr2_288": Case("nlvr2", 288),
    "snli_ve_384": Case("snli_ve", 384),
    "retrieval_384": Case("retrieval_coco", 384, padded=40),
}


@dataclass(frozen=True)
class Plan:
    """One measurement. batch: pairs, questions, statements, or pictures with 16 texts. text_tokens: of an average text,
    specials included; spread: how much shorter or longer the others are. checkpointing: parts of our model whose blocks
    are computed again in backward. world: processes, each with such a batch.

    Raises ValueError for texts too short to mask or longer than the published padding, and for an odd batch of pairs.
    """

    case: Case
    size: str = "base"
    batch: int = 4
    dtype: str = "bf16"
    zero: int = 2
    text_tokens: int = 13
    spread: int = SPREAD
    checkpointing: tuple[str, ...] = ()
    world: int = 1

    def __post_init__(self) -> None:
        if not 4 <= self.text_tokens <= self.case.padded:
            raise ValueError(f"text_tokens={self.text_tokens}: 4 or more, and {self.case.padded} at most, which the "
                             "published run pads to")  # fmt: skip
        of_pairs = self.case.recipe in ("pretrain", "retrieval_coco")
        if self.batch < 1 or (of_pairs and self.batch % 2):
            raise ValueError(f"batch={self.batch}: 1 or more, and even where two pairs exchange their pictures")

    @property
    def longest(self) -> int:
        """Tokens of the batch's longest text."""
        return self.text_tokens + min(self.spread, self.text_tokens - 4, self.case.padded - self.text_tokens)


def configuration(plan: Plan, plain: bool = False, compiled: bool = False) -> RunConfig:
    """The recipe's, without weights of the encoders and with one micro-batch a step. Plain: with the kernels of that
    form, and everything kept for backward, as published. Raises ConfigError."""
    settings = ["run.max_epochs=0", "run.max_steps=1000", f"data.max_text_length={plan.longest}"]
    settings += [f"engine.micro_batch={plan.batch}", f"engine.global_batch={plan.batch * plan.world}"]
    settings += [f"engine.dtype={plan.dtype}", f"engine.zero={plan.zero}"]
    if plan.checkpointing and not plain:
        parts = ",".join(plan.checkpointing)
        settings += ["engine.activation_checkpointing=true", f"engine.checkpointed_parts={parts}"]
    settings.append(f"engine.compile={compiled}")
    settings += [f"model.vision.image_size={plan.case.image_size}"]
    if plan.case.recipe == "vqa":
        settings.append(f"model.vqa_answers={ANSWERS}")
    if plan.case.recipe == "retrieval_coco":
        settings.append(f"objectives.false_texts={FALSE_TEXTS}")
    config = override(resolve([plan.case.recipe, f"size={plan.size}"]), settings)
    model = replace(config.model, vision=replace(config.model.vision, weights=None))
    config = replace(config, model=replace(model, text=replace(model.text, weights=None)))
    return replace(config, kernels=PLAIN) if plain else config


def make_batch(plan: Plan, config: RunConfig) -> Batch:
    """Random pictures and texts of unequal length, as our loader brings them, on the CPU; the same for the same plan.
    Negatives of ITM are partners' pictures."""
    chance = torch.Generator().manual_seed(0)
    names = config.objectives.names
    if "vqa" in names or "nlvr2" in names or "snli_ve" in names:
        return _about_pictures(plan, config, chance)
    ids, mask = _texts(plan, config, plan.batch, chance)
    rows = (mask & (torch.rand(mask.shape, generator=chance) < MASKED)).flatten().nonzero().flatten()
    rows = rows if len(rows) else torch.ones(1, dtype=torch.int64)
    masked = ids.flatten().clone()
    masked[rows] = MASK
    own = torch.arange(plan.batch)
    labels = 1 - own % 2
    ranked = None
    if "retrieval" in names:
        false, false_mask = _texts(plan, config, plan.batch * config.objectives.false_texts, chance)
        all_masks = torch.cat([mask, false_mask])
        ranked = RankedTexts(torch.cat([ids, false]), all_masks, all_masks.flatten().nonzero().flatten())
    return PretrainBatch(
        images=_images(config, plan.batch, chance),
        text_ids=ids,
        text_mask=mask,
        masked_ids=masked.view_as(ids),
        masked_rows=rows,
        masked_labels=ids.flatten()[rows],
        itm_labels=labels,
        itm_images=torch.where(labels == 1, own, own - 1),
        false_images=None,
        sample_ids=own,
        text_rows=mask.flatten().nonzero().flatten(),
        ranked=ranked,
    )


def _about_pictures(plan: Plan, config: RunConfig, chance: torch.Generator) -> VqaBatch | StatementBatch:
    ids, mask = _texts(plan, config, plan.batch, chance)
    each = 2 if "nlvr2" in config.objectives.names else 1
    count = each * -(-plan.batch // plan.case.texts_per_picture)
    rows = torch.arange(each * plan.batch) // plan.case.texts_per_picture
    common = {
        "images": _images(config, count, chance),
        "text_ids": ids,
        "text_mask": mask,
        "text_rows": mask.flatten().nonzero().flatten(),
        "sample_ids": torch.arange(plan.batch),
    }
    if "vqa" in config.objectives.names:
        targets = torch.zeros(plan.batch, config.model.vqa_answers)
        targets.scatter_(1, torch.randint(0, targets.shape[1], (plan.batch, 3), generator=chance), 0.6)
        return VqaBatch(image_rows=rows, targets=targets, question_ids=torch.arange(plan.batch), **common)
    labels = torch.arange(plan.batch) % (2 if each == 2 else 3)
    return StatementBatch(image_rows=rows.view(plan.batch, each), labels=labels, **common)


def _texts(plan: Plan, config: RunConfig, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [count,L] and mask; L is plan.longest, which the first text has."""
    spread = plan.longest - plan.text_tokens
    lengths = plan.text_tokens + torch.randint(-spread, spread + 1, (count,), generator=chance)
    lengths[0] = plan.longest
    mask = torch.arange(plan.longest) < lengths[:, None]
    words = config.model.text.vocab_size
    ids = torch.randint(FIRST_WORD, words, mask.shape, generator=chance)
    return torch.where(mask, ids, config.model.text.pad_id), mask


def _images(config: RunConfig, count: int, chance: torch.Generator) -> Tensor:
    side = config.model.vision.image_size
    return torch.randn(count, 3, side, side, generator=chance)
