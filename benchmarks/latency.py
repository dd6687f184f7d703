"""How long does a prediction take? Each task at several batches, the plain model against the predictor, in one run.

    python -m benchmarks.latency [--size base] [--batch 1 8 32] [--task answer match] [--texts 1] [--dtype fp32]

Plain is the model in torch's operators with texts padded to 50 tokens, nothing shared between requests and every row
computed (`benchmarks/plain.py`); fast is what `meter_fast.load` gives, called as users call it. Both begin at decoded
pictures and texts as strings. Weights are random and made here. Before anything is timed, both must say the same.
Rounds alternate, so that a slow spell of the machine meets both; p95 needs some tens of rounds to mean much. On a busy
machine look at the processor time.

A batch is so many requests: questions about as many pictures, or with `--texts N` N about each; for rank that many
texts of one picture; for caption that many pictures, of which TOKENS tokens are written.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain import PLAIN, plain_caption, plain_scores
from benchmarks.record import append
from meter_fast.data.answers import Answers
from meter_fast.data.images import image_transform
from meter_fast.data.spans import read_sentinels
from meter_fast.data.tokenizer import train_tokenizer
from meter_fast.models.meter import Meter
from meter_fast.predict.encoded import MATCH, pad, place_of
from meter_fast.predict.pictures import Picture
from meter_fast.predict.predictor import TRUE, Predictor
from meter_fast.recipes.pretrain import pretrain

PADDED = 50  # tokens, max_text_len of the published models
WORDS = 11  # of an average text; 13 tokens with the first and the last
TOKENS = 20  # of a caption
K = 5
ANSWERS = 3129  # of VQAv2
HEADS = {
    "answer": "vqa_head", "match": "itm_head", "rank": "rank_head", "fill": "mlm_head", "entails": "snli_head",
    "compare": "nlvr2_head", "caption": None,
}  # fmt: skip
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of scores and probabilities


@dataclass(frozen=True)
class Side:
    """Both forms of one model: the same weights."""

    plain: Meter
    fast: Predictor


def make_side(size: str, image_size: int | None, writes: bool, dtype: torch.dtype, device: str) -> Side:
    """The model of all heads, or the one with a decoder."""
    config = pretrain(size, fusion="encoder_decoder" if writes else "co_attention").model
    vision = replace(config.vision, weights=None, image_size=image_size or config.vision.image_size)
    config = replace(config, vision=vision, text=replace(config.text, weights=None))
    if not writes:
        config = replace(
            config, fusion=replace(config.fusion, token_types=3), vqa_answers=ANSWERS, nlvr2_head=True, snli_head=True,
            rank_head=True,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer([" ".join(words())], Path(folder), sentinels=1)
    torch.manual_seed(0)
    plain = Meter(config, kernels=PLAIN).eval().to(device, dtype)
    fast = Meter(config).eval().to(device, dtype)
    fast.load_state_dict(plain.state_dict())
    answers = Answers(tuple(map(str, range(ANSWERS))))
    return Side(plain, Predictor(fast, tokenizer, image_transform("clip", vision.image_size), answers, PADDED))


def words() -> list[str]:
    """Of the texts."""
    letters = "abcdefghij"
    return [a + b + c for a in letters for b in letters for c in letters[:2]]


@dataclass(frozen=True)
class Requests:
    """pictures: one for each text, and a second for comparisons; those of several texts are the same object."""

    first: list[Picture]
    second: list[Picture]
    texts: list[str]


def make_requests(task: str, batch: int, texts_each: int, side: int) -> Requests:
    """Random pictures and texts of about WORDS words."""
    chance = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    each = batch if task == "rank" else texts_each
    count = -(-batch // each)
    drawn = [Picture(torch.randn(3, side, side, generator=generator)) for _ in range(2 * count)]
    texts = [" ".join(chance.choice(words(), chance.integers(WORDS - 4, WORDS + 5))) for _ in range(batch)]
    if task == "fill":
        texts = [text.replace(text.split()[2], "<mask>", 1) for text in texts]
    rows = [n // each for n in range(batch)]
    return Requests([drawn[n] for n in rows], [drawn[count + n] for n in rows], texts)


def stacked(model: Meter, pictures: Sequence[Picture]) -> Tensor:
    return torch.stack([picture.pixels for picture in pictures]).to(*place_of(model))


@torch.inference_mode()
def ask_plain(task: str, side: Side, asked: Requests) -> Tensor:
    """The numbers of the prediction, [B,...] on the host; of a caption its tokens."""
    model, tokenizer = side.plain, side.fast.tokenizer
    device, _ = place_of(model)
    first = stacked(model, asked.first)
    if task == "caption":
        read = [tokenizer.cls_token_id, read_sentinels(tokenizer)[0], tokenizer.sep_token_id]
        padding = [model.config.text.pad_id] * (PADDED - len(read))
        ids = torch.tensor([read + padding] * len(first), device=device)
        mask = torch.arange(PADDED, device=device).expand_as(ids) < len(read)
        return plain_caption(model, first, ids, mask, TOKENS).cpu()
    texts = [text.replace("<mask>", tokenizer.mask_token) for text in asked.texts]
    rows = tokenizer(texts, truncation=True, max_length=PADDED)["input_ids"]
    ids, mask = pad([*rows, [0] * PADDED], model.config.text.pad_id, device)  # the last one sets the length
    ids, mask = ids[:-1], mask[:-1]
    pictures = (first, stacked(model, asked.second)) if task == "compare" else (first,)
    logits = plain_scores(model, HEADS[task], pictures, ids, mask).float()
    if task == "answer":
        return logits.sigmoid().topk(K).values.cpu()
    if task == "fill":
        return logits.softmax(-1).topk(K).values[ids == tokenizer.mask_token_id].cpu()
    if task == "rank":
        return logits[:, 0].cpu()
    chances = logits.softmax(-1).cpu()
    return chances if task == "entails" else chances[:, {"match": MATCH, "compare": TRUE}[task]]


def ask_fast(task: str, side: Side, asked: Requests) -> object:
    """The call of a user."""
    call = getattr(side.fast, task)
    if task == "caption":
        return call(asked.first, max_length=TOKENS)
    if task == "rank":
        return call(asked.first[0], asked.texts)
    if task == "compare":
        return call(asked.first, asked.second, asked.texts)
    return call(asked.first, asked.texts, K) if task in ("answer", "fill") else call(asked.first, asked.texts)


def numbers(task: str, said: object) -> Tensor:
    """What `ask_plain` gives, out of what the predictor says."""
    if task == "answer":
        return torch.tensor([[score for _, score in row] for row in said])
    if task == "fill":
        return torch.tensor([[p for _, p in row[0]] for row in said])
    if task == "rank":
        return torch.from_numpy(said.scores[0])
    if task == "entails":
        return torch.tensor([list(row.values()) for row in said])
    return torch.tensor(said)


def check(task: str, side: Side, plain: Tensor, said: object, tolerance: float) -> float:
    """The largest difference. Exits where it is beyond the tolerance, or captions differ."""
    if task == "caption":
        tokenizer = side.fast.tokenizer
        texts = [row[: row.index(end)] if (end := tokenizer.sep_token_id) in row else row for row in plain.tolist()]
        same = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in texts] == said
        if not same and tolerance == TOLERANCE["fp32"]:
            raise SystemExit("caption: plain and fast write different texts")
        return 0.0
    difference = (plain - numbers(task, said)).abs().max().item()
    if difference > tolerance * max(1.0, plain.abs().max().item()):
        raise SystemExit(f"{task}: plain and fast differ by {difference:.2e}")
    return difference


@dataclass(frozen=True)
class Spent:
    """Seconds of one call: on the clock, and of processors (all threads), which a busy machine changes less."""

    wall: float
    cpu: float


def spent(call: Callable[[], object]) -> Spent:
    """Carry it out, on a GPU to the end."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def measure(task: str, side: Side, asked: Requests, rounds: int, tolerance: float) -> dict[str, list[Spent]]:
    """Each round and form; the first, in which both are compared, does not count."""
    forms = {"plain": lambda: ask_plain(task, side, asked), "fast": lambda: ask_fast(task, side, asked)}
    check(task, side, forms["plain"](), forms["fast"](), tolerance)
    found: dict[str, list[Spent]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            found[name].append(spent(form))
    return found


def milliseconds(times: Sequence[Spent]) -> dict[str, float]:
    """p50 and p95 on the clock, and the median of processor time."""
    wall = [1e3 * one.wall for one in times]
    return {
        "p50": statistics.median(wall),
        "p95": float(np.quantile(wall, 0.95)),
        "cpu_p50": 1e3 * statistics.median(one.cpu for one in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--image-size", type=int, help="pixels; the preset's own by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--task", choices=list(HEADS), nargs="+", default=list(HEADS))
    parser.add_argument("--texts", type=int, default=1, help="texts about each picture")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    heads = "".join(f"{form + ' ' + metric:>14}" for form in ("plain", "fast") for metric in ("p50", "p95", "cpu_p50"))
    print(f"{'ms':<48}{heads}{'plain / fast':>14}{'cpu':>8}", flush=True)
    for writes, tasks in ((False, set(HEADS) - {"caption"}), (True, {"caption"})):
        chosen = [task for task in arguments.task if task in tasks]
        if not chosen:
            continue
        side = make_side(arguments.size, arguments.image_size, writes, dtype, device)
        pixels = side.plain.config.vision.image_size
        for task in chosen:
            for batch in arguments.batch:
                asked = make_requests(task, batch, arguments.texts, pixels)
                times = measure(task, side, asked, arguments.rounds, TOLERANCE[arguments.dtype])
                several = arguments.texts > 1 and task not in ("rank", "caption")
                of = f", {arguments.texts} texts a picture" if several else ""
                case = f"{arguments.size} {pixels}px {arguments.dtype} {task} batch {batch}{of}"
                found = {form: milliseconds(some) for form, some in times.items()}
                rows = [
                    dict(case=case, variant=form, metric=metric, value=value, unit="ms")
                    for form, values in found.items()
                    for metric, value in values.items()
                ]
                path = append("latency", rows)  # at once: a run of hours may be stopped
                shown = "".join(f"{value:>14.1f}" for values in found.values() for value in values.values())
                ratio, cpu = (found["plain"][m] / found["fast"][m] for m in ("p50", "cpu_p50"))
                print(f"{case:<48}{shown}{ratio:>13.2f}x{cpu:>7.2f}x", flush=True)
    print(f"rows added to {path}")


if __name__ == "__main__":
    main()
