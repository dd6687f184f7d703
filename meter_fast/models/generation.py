"""Texts written by a decoder, token by token: beam search, which with one beam is greedy. Knows a model with a decoder,
no tokenizer and no pictures.

Each step computes one row for each text: keys and values of earlier tokens and of both sides are kept, and the beams of
a pair read its picture and text together, so that nothing is repeated for a beam. The texts of a batch may differ in
length, of what is read and of what is written, and do not depend on each other. No chance is involved.

transformers' GenerationMixin would want a PreTrainedModel with its configuration and cache classes around two encodings
that it does not know; this is shorter than that glue, and does not change with the library's version.
Shape letters: B pairs, K beams, L text tokens, V image tokens, D fusion width, S vocabulary, T tokens written.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meter_fast.models.meter import Meter

DEAD = float("-inf")


@dataclass(frozen=True)
class Written:
    """The best text of each pair: ids without the end, at most max_length of them; score: summed log-probability of
    its tokens, the end among them, divided by (their number) ** length_penalty."""

    ids: list[list[int]]
    score: list[float]


@dataclass
class _Best:
    """The best finished text of each pair so far: ids [B,T] filled up with the end, score [B]."""

    ids: Tensor
    score: Tensor

    def offer(self, ids: Tensor, score: Tensor) -> None:
        """Candidates ids [B,K,t], score [B,K]; an earlier one stays if they are equally good."""
        score, beam = score.max(1)
        better = score > self.score
        chosen = ids[torch.arange(len(ids), device=ids.device), beam]
        self.ids[better, : ids.shape[2]] = chosen[better]
        self.score = torch.where(better, score, self.score)


@torch.inference_mode()
def write(
    model: Meter,
    text: Tensor,
    image: Tensor,
    text_mask: Tensor,
    end_id: int,
    max_length: int,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Written:
    """What the decoder writes when it reads text [B,L,D] and image [B,V,D], as the fusion leaves them, text_mask [B,L].

    A text ends at end_id, or when it has max_length tokens. beams: how many texts, one token longer, are kept at each
    step, of which those that end are finished and leave room again. length_penalty: 0 compares sums of
    log-probabilities, which favours short texts; 1 their means. The best finished text is given; the search goes on
    until no unfinished one can become better. Call it in evaluation mode. Raises
    ValueError for numbers out of their range.
    """
    if not 1 <= max_length <= model.decoder.max_positions:
        raise ValueError(
            f"max_length={max_length}: 1 to {model.decoder.max_positions}, which model.decoder.max_positions allows"
        )
    if beams < 1 or length_penalty < 0:
        raise ValueError(f"beams={beams}, length_penalty={length_penalty}: give 1 beam or more, a penalty of 0 or more")
    pairs, device = len(text), text.device
    cache = model.decoder.begin(text, image, text_mask)
    alive = torch.full((pairs, beams), DEAD, device=device)
    alive[:, 0] = 0  # all beams begin alike: only the first may go on
    ids = torch.empty(pairs, beams, 0, dtype=torch.int64, device=device)
    last = torch.full((pairs, beams), model.decoder.begin_id, device=device)
    best = _Best(torch.full((pairs, max_length), end_id, device=device), torch.full((pairs,), DEAD, device=device))
    for length in range(1, max_length + 1):
        rows = model.decoder.step(last, cache)
        scores = alive[..., None] + model.lm_head(rows).float().log_softmax(-1)
        alive, flat = scores.flatten(1).topk(beams)
        beam, last = flat // scores.shape[2], flat % scores.shape[2]
        ids = ids.gather(1, beam[..., None].expand(-1, -1, ids.shape[2]))
        ended = last == end_id
        best.offer(ids, alive.masked_fill(~ended, DEAD) / length**length_penalty)
        alive = alive.masked_fill(ended, DEAD)
        ids = torch.cat([ids, last[..., None]], dim=2)
        # Log-probabilities only fall, and the longest text divides them by most.
        if not (alive.amax(1) / max_length**length_penalty > best.score).any():
            break
        cache.choose(beam)
    else:
        best.offer(ids, alive / max_length**length_penalty)
    texts = [row[: row.index(end_id)] if end_id in row else row for row in best.ids.tolist()]
    return Written(texts, best.score.tolist())
