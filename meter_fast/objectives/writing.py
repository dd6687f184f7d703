"""What objectives share whose decoder writes a text: what is read, and the loss on what is written. Knows a model and
texts, no batch.

All tokens are predicted in one pass, each from those before it in the target. Exact savings: the vocabulary is scored
on real tokens only, and never kept as logits where the loss has a kernel. Shape letters: B pairs, L text tokens,
T tokens to write, M of them that are real.
"""

from torch import Tensor

from meter_fast.data.batch import TextToText
from meter_fast.models.meter import Fused, Meter, Need, Part
from meter_fast.objectives.reading import Reading


def reading(texts: TextToText) -> Reading:
    """The texts with gaps, each with its own picture; every row of both sides, as the decoder reads them all."""
    return Reading(texts.ids, texts.mask, Part(Need.BOTH, len(texts.ids)), texts.text_rows)


def loss(model: Meter, fused: Fused, texts: TextToText, total: float) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy / total, float32 scalar; tokens written correctly, sentinels and ends too, int64 scalar."""
    text = fused.text[:, : texts.mask.shape[1]]  # longer where another objective's texts are
    inputs = model.decoder.inputs(texts.targets)
    written = model.decode(inputs, text, fused.image, texts.mask, texts.lengths)
    rows = written.flatten(0, 1).index_select(0, texts.rows)
    summed, correct = model.lm_head(rows, texts.targets.flatten().index_select(0, texts.rows))
    return summed / total, correct
