"""How long does a prediction take, and how many a second? Each task at several batches and lengths of text, the plain
model against the predictor, in one run.

    python -m benchmarks.latency [--size base] [--batch 1 8 32 64] [--task answer match] [--tokens 8 13 50]
    python -m benchmarks.latency --task answer --image-size 576 --batch 1 5 --texts 1 5 --dtype bf16 fp32    # VQAv2's
    python -m benchmarks.latency --variant eager compiled cuda_graphs --rounds 500                      # on a GPU

Plain is the model in torch's operators with texts padded to 50 tokens, nothing shared between requests and every row
computed (`benchmarks/plain.py`); the variants are what `meter_fast.load` gives, called as users call it: eager as it
is, compiled with each block by torch.compile, for each case anew, cuda_graphs with these replayed. All begin at decoded
pictures and texts as strings. Weights are random and made here. Before anything is timed, all must say the same.
Each form is a process of its own, and rounds alternate, so that a slow spell of the machine meets all; on a CPU ours
keep the memory that they free, as `meter-fast predict` does (`meter_fast/host_memory.py`), and plain does not. On a
busy machine look at the processor time.

p95 and p99 of n rounds are interpolated at places 0.95 (n - 1) and 0.99 (n - 1) of the calls, fastest first: with up to
101 rounds p99 lies between the two slowest calls and says what the machine's worst moment was. To compare p99 take 500
rounds or more, of which it leaves five. requests_per_second is of all rounds, one call after the other.

A batch is so many requests: questions about as many pictures, or with `--texts N` N about each; for rank that many
texts of one picture; for caption that many pictures, of which TOKENS tokens are written. `--tokens` is the length of an
average text, the first and the last token included; the others are up to SPREAD shorter or longer.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.apart import Apart, Work, closing, rounds
from benchmarks.plain import PLAIN, plain_caption, plain_scores, without_savings
from benchmarks.record import append
from benchmarks.step_cases import SPREAD
from benchmarks.step_work import PLAIN_VARIANT, VARIANTS
from meter_fast.data.answers import Answers
from meter_fast.data.images import image_transform
from meter_fast.data.spans import read_sentinels
from meter_fast.data.tokenizer import train_tokenizer
from meter_fast.host_memory import keep_freed_memory
from meter_fast.models.meter import Meter
from meter_fast.predict.encoded import MATCH, pad, place_of
from meter_fast.predict.pictures import Picture
from meter_fast.predict.predictor import TRUE, Predictor
from meter_fast.recipes.pretrain import pretrain
from meter_fast.training.engine import DTYPES, compile_blocks

PADDED = 50  # tokens, max_text_len of the published models
SHORTEST = 4  # tokens of a text, with the first and the last
TOKENS = 20  # of a caption
K = 5
ANSWERS = 3129  # of VQAv2
HEADS = {
    "answer": "vqa_head", "match": "itm_head", "rank": "rank_head", "fill": "mlm_head", "entails": "snli_head",
    "compare": "nlvr2_head", "caption": None,
}  # fmt: skip
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of scores and probabilities
WARM = 3  # calls of each form before any counts: CUDA graphs are recorded in the second


@dataclass(frozen=True)
class Sides:
    """All forms of one model: the same weights. fast: by variant."""

    plain: Meter
    fast: dict[str, Predictor]

    @property
    def tokenizer(self):
        return next(iter(self.fast.values())).tokenizer


def make_sides(
    size: str,
    image_size: int | None,
    writes: bool,
    dtype: torch.dtype,
    device: str,
    variants: Sequence[str] = ("eager",),
) -> Sides:
    """The model of all heads, or the one with a decoder. variants: of VARIANTS."""
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
    plain = without_savings(Meter(config, kernels=PLAIN)).eval().to(device, dtype)
    answers = Answers(tuple(map(str, range(ANSWERS))))
    transform = image_transform("clip", vision.image_size)
    fast = {}
    for variant in variants:
        model = Meter(config).eval().to(device, dtype)
        model.load_state_dict(plain.state_dict())
        if variant != "eager":
            compile_blocks(model, "reduce-overhead" if variant == "cuda_graphs" else "default")
        fast[variant] = Predictor(model, tokenizer, transform, answers, PADDED)
    return Sides(plain, fast)


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


def make_requests(task: str, batch: int, texts_each: int, tokens: int, pixels: int) -> Requests:
    """Random pictures of pixels x pixels and texts of about `tokens` tokens; a word is one of them."""
    chance = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    each = batch if task == "rank" else texts_each
    count = -(-batch // each)
    drawn = [Picture(torch.randn(3, pixels, pixels, generator=generator)) for _ in range(2 * count)]
    spread = min(SPREAD, tokens - SHORTEST, PADDED - tokens)
    lengths = tokens - 2 + chance.integers(-spread, spread + 1, batch)
    texts = [" ".join(chance.choice(words(), length)) for length in lengths]
    if task == "fill":
        texts = [" ".join(["<mask>", *text.split()[1:]]) for text in texts]
    rows = [n // each for n in range(batch)]
    return Requests([drawn[n] for n in rows], [drawn[count + n] for n in rows], texts)


def stacked(model: Meter, pictures: Sequence[Picture]) -> Tensor:
    return torch.stack([picture.pixels for picture in pictures]).to(*place_of(model))


@torch.inference_mode()
def ask_plain(task: str, sides: Sides, asked: Requests) -> Tensor:
    """The numbers of the prediction, [B,...] on the host; of a caption its tokens."""
    model, tokenizer = sides.plain, sides.tokenizer
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


def ask_fast(task: str, predictor: Predictor, asked: Requests) -> object:
    """The call of a user."""
    if torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()  # what was replayed before is read
    call = getattr(predictor, task)
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


def check(task: str, sides: Sides, plain: Tensor, said: object, tolerance: float) -> float:
    """The largest difference. Raises RuntimeError where it is beyond the tolerance, or captions differ."""
    if task == "caption":
        tokenizer = sides.tokenizer
        texts = [row[: row.index(end)] if (end := tokenizer.sep_token_id) in row else row for row in plain.tolist()]
        same = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in texts] == said
        if not same and tolerance == TOLERANCE["fp32"]:
            raise RuntimeError("caption: plain and fast write different texts")
        return 0.0
    difference = (plain - numbers(task, said)).abs().max().item()
    if difference > tolerance * max(1.0, plain.abs().max().item()):
        raise RuntimeError(f"{task}: plain and fast differ by {difference:.2e}")
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


@dataclass(frozen=True)
class Model:
    """What is asked, and in which dtype, of TOLERANCE. writes: the one with a decoder."""

    size: str
    image_size: int | None
    writes: bool
    dtype: str


@dataclass(frozen=True)
class Case:
    """texts: about each picture."""

    task: str
    tokens: int
    texts: int
    batch: int


def make_form(form: str, model: Model, todo: Sequence[Case], count: int) -> Work:
    """What one process does when told to: of each case first all that is not timed, WARM calls, compared with what
    plain says, then `count` calls. Raises RuntimeError where they do not say the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = form == PLAIN_VARIANT
    variant = "eager" if plain else form
    sides = make_sides(model.size, model.image_size, model.writes, DTYPES[model.dtype], device, (variant,))
    if not plain and device == "cpu":
        keep_freed_memory()

    def calls() -> Iterator[Spent]:
        for case in todo:
            torch.compiler.reset()  # a graph for each case, of its own sizes
            pixels = sides.plain.config.vision.image_size
            asked = make_requests(case.task, case.batch, case.texts, case.tokens, pixels)
            said_plainly = partial(ask_plain, case.task, sides, asked)
            call = said_plainly if plain else partial(ask_fast, case.task, sides.fast[variant], asked)
            expected = said_plainly()
            for _ in range(0 if plain else WARM):
                check(case.task, sides, expected, call(), TOLERANCE[model.dtype])
            yield Spent(0.0, 0.0)
            for _ in range(count):
                yield spent(call)

    call = calls()
    return lambda: asdict(next(call))


def measure(
    model: Model, variants: Sequence[str], todo: Sequence[Case], count: int
) -> Iterator[tuple[Case, dict[str, list[Spent]]]]:
    """Case after case, `count` calls of plain and of each variant. Raises RuntimeError as `make_form` does."""
    started: list[Apart] = []
    with closing(started):
        for form in (PLAIN_VARIANT, *variants):
            started.append(Apart(make_form, form, model, todo, count))
        forms = {form: [side] for form, side in zip((PLAIN_VARIANT, *variants), started, strict=True)}
        for case in todo:
            yield case, {form: [Spent(**one) for one in found] for form, found in rounds(forms, count).items()}


def summed(times: Sequence[Spent], batch: int) -> dict[str, float]:
    """Percentiles on the clock and the median of processor time, in milliseconds, and requests per second."""
    wall = [1e3 * one.wall for one in times]
    return {
        "p50": statistics.median(wall),
        "p95": float(np.quantile(wall, 0.95)),
        "p99": float(np.quantile(wall, 0.99)),
        "cpu_p50": 1e3 * statistics.median(one.cpu for one in times),
        "requests_per_second": batch / statistics.mean(one.wall for one in times),
    }


def show(case: str, found: dict[str, dict[str, float]]) -> None:
    """A line for each form, with how many times less than plain it takes."""
    print(case)
    plain = found[PLAIN_VARIANT]
    for name, values in found.items():
        ratio, cpu = (plain[metric] / values[metric] for metric in ("p50", "cpu_p50"))
        print(f"{name:>14}" + "".join(f"{value:>12.1f}" for value in values.values())
              + f"{ratio:>11.2f}x{cpu:>11.2f}x", flush=True)  # fmt: skip


def parse() -> argparse.Namespace:
    """The command's arguments; ends it where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--image-size", type=int, help="pixels; the preset's own by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--task", choices=list(HEADS), nargs="+", default=list(HEADS))
    parser.add_argument("--texts", type=int, nargs="+", default=[1], help="texts about each picture")
    parser.add_argument("--tokens", type=int, nargs="+", default=[13], help=f"of an average text, up to {PADDED}")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), nargs="+", default=["fp32"])
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=["eager"])
    parser.add_argument("--rounds", type=int, default=20, help="see above of what p99 takes")
    arguments = parser.parse_args()
    if min(arguments.tokens) < SHORTEST or max(arguments.tokens) > PADDED:
        parser.error(f"--tokens {' '.join(map(str, arguments.tokens))}: {SHORTEST} to {PADDED}, which plain pads to")
    if min(*arguments.batch, *arguments.texts, arguments.rounds) < 1:
        parser.error("--batch, --texts and --rounds are 1 or more")
    if "cuda_graphs" in arguments.variant and not torch.cuda.is_available():
        parser.error("--variant cuda_graphs needs a GPU: leave it out")
    return arguments


def cases(arguments: argparse.Namespace, task: str) -> list[Case]:
    """What is measured of a task. Texts of a caption are not read; those of a ranking are all about one picture."""
    tokens = arguments.tokens if task != "caption" else [SHORTEST]
    texts = arguments.texts if task not in ("rank", "caption") else [1]
    chosen = itertools.product(tokens, texts, arguments.batch)
    return [Case(task, length, each, batch) for length, each, batch in chosen if each <= batch]


def said(model: Model, case: Case) -> str:
    """The case, in words."""
    pixels = model.image_size or pretrain(model.size).model.vision.image_size
    length = "" if case.task == "caption" else f" text {case.tokens}"
    of = f", {case.texts} texts a picture" if case.texts > 1 else ""
    return f"{model.size} {pixels}px {model.dtype} {case.task} batch {case.batch}{length}{of}"


def main() -> None:
    arguments = parse()
    metrics = ("p50 ms", "p95 ms", "p99 ms", "cpu p50 ms", "requests/s", "plain / it", "cpu")
    print(f"{'':>14}" + "".join(f"{name:>12}" for name in metrics), flush=True)
    for dtype, writes in itertools.product(arguments.dtype, (False, True)):
        todo = [case for task in arguments.task if (task == "caption") == writes for case in cases(arguments, task)]
        if not todo:
            continue
        model = Model(arguments.size, arguments.image_size, writes, dtype)
        try:
            for case, times in measure(model, arguments.variant, todo, arguments.rounds):
                found = {form: summed(some, case.batch) for form, some in times.items()}
                rows = [
                    dict(case=said(model, case), variant=form, metric=metric, value=value, unit=UNITS.get(metric, "ms"))
                    for form, values in found.items()
                    for metric, value in values.items()
                ]
                path = append("latency", rows)  # at once: a run of hours may be stopped
                show(said(model, case), found)
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
    print(f"rows added to {path}")


UNITS = {"requests_per_second": "1/s"}  # all others are milliseconds


if __name__ == "__main__":
    main()
