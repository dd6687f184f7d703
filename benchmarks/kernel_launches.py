"""The shipped kernels launched with the shapes of a base model, for reading their machine code. Knows the kernels and
what they are given; `kernel_static` knows how to read.
"""

import csv
import sys
from collections.abc import Callable
from functools import partial

import torch
from meter_fast.kernels.cross_attention import kernel as cross_attention
from meter_fast.kernels.gelu import kernel as gelu
from meter_fast.kernels.launch import Arch
from meter_fast.kernels.mlm_loss import kernel as mlm_loss
from meter_fast.kernels.residual_norm import kernel as residual_norm_kernel
from meter_fast.kernels.segmented_softmax import kernel as segmented_softmax
from meter_fast.kernels.segments import Segments
from torch import Tensor

from benchmarks import kernel_static
from benchmarks.kernel_cases import EPS, HEAD, HEADS, VOCABULARY, WIDTH
from benchmarks.record import RESULTS, commit

PAIRS, ROWS, MASKED_ROWS = 64, 64 * 325, 128


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def seed_for(dropout: float) -> Tensor | None:
    return on_meta(1, dtype=torch.int64) if dropout else None


def launch_direct(text_is: str, image: int, text: int, head: int, dropout: float, capability: int) -> None:
    arch, seed = Arch(capability), seed_for(dropout)
    queries, keys = (image, text) if text_is == "key" else (text, image)
    sides = (Segments.padded(PAIRS, queries, "meta"), Segments.padded(PAIRS, keys, "meta"))
    query = on_meta(PAIRS * queries, HEADS, head)
    key, value = on_meta(PAIRS * keys, 2, HEADS, head).unbind(1)
    out, lse = cross_attention.launch_forward(query, key, value, *sides, text_is, dropout, seed, arch)
    grad = torch.empty_like(out)
    cross_attention.launch_backward(grad, query, key, value, out, lse, *sides, text_is, dropout, seed, arch)


def launch_softmax(text_is: str, image: int, text: int, dropout: float, capability: int) -> None:
    """As the absorbed form calls it."""
    arch, seed = Arch(capability), seed_for(dropout)
    scores, lengths = on_meta(PAIRS, image, text, HEADS), on_meta(PAIRS, dtype=torch.int32)
    columns = on_meta(PAIRS, text, HEADS, dtype=torch.float32)
    bias, delta, shift = (columns, None, None) if text_is == "key" else (None, columns, columns)
    common = (text_is, HEAD**-0.5)
    segmented_softmax.launch_forward(scores, lengths, *common, bias, dropout, seed, scores, arch)
    segmented_softmax.launch_backward(scores, scores, *common, delta, shift, dropout, seed, scores, arch)


def launch_mlm_loss(gradient: bool, capability: int) -> None:
    logits, bias = on_meta(MASKED_ROWS, 50304), on_meta(50304)
    labels = on_meta(MASKED_ROWS, dtype=torch.int64)
    mlm_loss.launch_forward(logits, bias, labels, VOCABULARY, gradient, Arch(capability))


def launch_norm(dropout: float, capability: int) -> None:
    arch, seed = Arch(capability), seed_for(dropout)
    x, parameter = on_meta(ROWS, WIDTH), on_meta(WIDTH)
    y, normalised, rstd = residual_norm_kernel.launch_forward(
        x, parameter, x, parameter, parameter, EPS, dropout, seed, True, arch
    )
    residual_norm_kernel.launch_backward(y, normalised, rstd, parameter, dropout, seed, True, arch)


def launch_gelu(capability: int) -> None:
    x, bias = on_meta(ROWS, 4 * WIDTH), on_meta(4 * WIDTH)
    gelu.launch_forward(x, bias, Arch(capability))
    gelu.launch_backward(x, x, bias, Arch(capability))


def launches(quick: bool = False) -> dict[str, Callable[[int], None]]:
    """By name, functions of a capability that launch the shipped kernels for shapes of a base model, bfloat16. quick:
    texts in tiles up to 32, with dropout, which takes more registers than without."""
    cases: dict[str, Callable[[int], None]] = {}
    shapes = [(325, text, head) for head in (HEAD, 32, 128) for text in (13, 26, 50)] + [(1297, 13, HEAD)]
    if quick:
        shapes = [(325, 13, HEAD), (325, 26, HEAD), (325, 13, 128)]
    shapes = [(image, text, head) for image, text, head in shapes if cross_attention.fits(text, head, 2)]
    for dropout in (0.1,) if quick else (0.0, 0.1):
        for text_is, name in (("key", "image->text"), ("query", "text->image")):
            for image, text, head in shapes:  # the plain form computes what does not fit
                case = partial(launch_direct, text_is, image, text, head, dropout)
                cases[f"{name} direct V={image} T={text} K={head} dropout {dropout}"] = case
            for text in (16, 28) if quick else (16, 28, 52):  # whole groups of four, as the absorbed form makes them
                case = partial(launch_softmax, text_is, 325, text, dropout)
                cases[f"{name} absorbed V=325 T={text} dropout {dropout}"] = case
        cases[f"residual norm D={WIDTH} dropout {dropout}"] = partial(launch_norm, dropout)
    cases[f"GELU D={4 * WIDTH}"] = launch_gelu
    for gradient in (True,) if quick else (True, False):
        cases[f"MLM loss S={VOCABULARY}" + ("" if gradient else ", no gradient")] = partial(launch_mlm_loss, gradient)
    return cases


COLUMNS = (
    *("case", "kernel", "gpu", "tile", "warps", "stages", "registers", "spilled", "shared", "blocks_per_sm"),
    *("instructions", "matrix", "asynchronous", "accesses", "problems"),
)


def static() -> None:
    """Prints and writes the table."""
    table = []
    for name, cost in kernel_static.costs(launches(), tuple(kernel_static.LIMITS)):
        tile = {k: v for k, v in cost.constants.items() if isinstance(v, int) and v < 2**16}
        fields = {
            **vars(cost),
            "case": name,
            "gpu": kernel_static.LIMITS[cost.capability].name,
            "tile": " ".join(f"{k}={v}" for k, v in tile.items()),
            "matrix": " ".join(f"{kind}:{n}" for kind, n in cost.matrix.items()),
            "accesses": " ".join(f"{bits}b:{n}" for bits, n in sorted(cost.accesses.items(), reverse=True)),
            "problems": "; ".join(cost.problems),
        }
        table.append([str(fields[column]) for column in COLUMNS])
        print(name, cost.kernel, fields["gpu"], file=sys.stderr, flush=True)  # each takes a second or more
    widths = [max(map(len, column)) for column in zip(COLUMNS, *table)]
    print()
    for row in (COLUMNS, *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    with (RESULTS / "kernels_static.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(*COLUMNS, "commit"), *([*row, commit()] for row in table)])
