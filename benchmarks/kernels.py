"""What does each operator give? Time and memory against other people's forms, and what its machine code needs.

    python -m benchmarks.kernels [--operators mlm-loss ...] [--batch 64] [--dropout 0.1] [--rounds 11]
    python -m benchmarks.kernels --static       # no GPU: registers, shared memory ... of every shipped configuration

On a GPU the operators run as Triton kernels against eager torch, torch.compile, torch's fused attention, flash-attn,
Liger and cut-cross-entropy; what is not installed is listed as skipped. On a CPU the same rows compare the plain forms
that run there: they tell what the mathematics saves, nothing of the kernels. "published" is METER's own procedure:
texts padded to 50 tokens, attention weights in memory, logits of every position in float32.

Forward and forward + backward of each variant are timed, by turns on a CPU; backward is the difference.
"""

import argparse
import csv
import inspect
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from meter_fast.kernels.cross_attention import kernel as cross_attention
from meter_fast.kernels.cross_attention.absorbed import absorbed_cross_attention
from meter_fast.kernels.cross_attention.op import cross_attention as direct_cross_attention
from meter_fast.kernels.gelu import kernel as gelu
from meter_fast.kernels.gelu.op import bias_gelu
from meter_fast.kernels.launch import Arch
from meter_fast.kernels.mlm_loss import kernel as mlm_loss
from meter_fast.kernels.mlm_loss.op import linear_cross_entropy
from meter_fast.kernels.residual_norm import kernel as residual_norm_kernel
from meter_fast.kernels.residual_norm.op import residual_norm
from meter_fast.kernels.segmented_softmax import kernel as segmented_softmax
from meter_fast.kernels.segments import Segments
from torch import Tensor

from benchmarks import kernel_static
from benchmarks.record import RESULTS, append, commit

HEADS, HEAD, VOCABULARY = 12, 64, 50265
WIDTH, EPS = HEADS * HEAD, 1e-12
PADDED = 50  # tokens, max_text_len of the published pre-training
MASKED = 2  # masked tokens of an average caption: 15 % of 13
PIXELS = (224, 288, 384, 576)  # patches of 16: 197, 325, 577, 1297 tokens
TEXTS = (8, 13, 26, 50)


@dataclass(frozen=True)
class Variant:
    """A function without arguments, and the leaves that it is differentiated for."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


Case = tuple[str, dict[str, "Variant | str"]]  # name, variants; a string is the reason why one is skipped


def leaf(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=device)).bfloat16().requires_grad_()


def skipped(device: str, package: str = "") -> str:
    """Why a variant that needs a GPU (and a package) cannot run here, or nothing."""
    if device == "cpu":
        return "needs a GPU"
    return f"{package} is not installed" if package and find_spec(package) is None else ""


# --- attention ------------------------------------------------------------------------------------------------------


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """As METER's layers compute it: [B,T,H,K] each, mask added to the scores or None."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return (F.dropout(weights, dropout, dropout > 0) @ value).transpose(1, 2)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, dropout).transpose(1, 2)


def segments_attention(
    query: Tensor, key: Tensor, value: Tensor, sides: tuple[Segments, Segments], short: str, dropout: float
) -> Tensor:
    flat = (x.flatten(0, 1) for x in (query, key, value))
    return direct_cross_attention(*flat, *sides, short, dropout).view_as(query)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, sides: tuple[Segments, Segments], dropout: float):
    from flash_attn import flash_attn_varlen_func

    bounds = [F.pad(side.lengths.cumsum(0, dtype=torch.int32), (1, 0)) for side in sides]
    longest = [side.longest for side in sides]
    return flash_attn_varlen_func(query, key, value, *bounds, *longest, dropout_p=dropout, deterministic=True)


class Attention:
    """Inputs of one direction: the text reads ("query") or is read ("key"). Lengths are drawn from half the longest up
    to the longest; the published form gets the same texts padded to 50."""

    def __init__(self, text_is: str, image: int, text: int, batch: int, dropout: float, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(text // 2 + 1, text + 1, (batch,), generator=generator)
        lengths[0] = text
        self.text_is, self.batch, self.dropout, self.device = text_is, batch, dropout, device
        self.image, self.text, self.lengths = image, text, lengths.to(device, torch.int32)

    def sizes(self, text: int) -> tuple[int, int]:
        """Query and key tokens."""
        return (self.image, text) if self.text_is == "key" else (text, self.image)

    def mask(self, text: int) -> Tensor | None:
        """Added to the scores [B,1,1,text]; the image has no padding."""
        if self.text_is == "query":
            return None
        padding = torch.arange(text, device=self.device) >= self.lengths[:, None]
        return (padding[:, None, None] * -10000.0).bfloat16()

    def segments(self) -> tuple[Segments, Segments]:
        text = Segments.padded(self.batch, self.text, self.device, self.lengths)
        image = Segments.padded(self.batch, self.image, self.device)
        return (image, text) if self.text_is == "key" else (text, image)

    def core(self) -> dict[str, Variant | str]:
        def variant(function: Callable[..., Tensor], text: int, *rest: object) -> Variant:
            queries, keys = self.sizes(text)
            query = leaf(self.batch, queries, HEADS, HEAD, device=self.device)
            key_value = leaf(self.batch, keys, 2, HEADS, HEAD, device=self.device)
            return Variant(lambda: function(query, *key_value.unbind(2), *rest), (query, key_value))

        def flash() -> Variant:
            sides = [Segments.padded(self.batch, side.longest, self.device, side.lengths) for side in self.segments()]
            rows = [int(side.lengths.sum()) for side in sides]
            query = leaf(rows[0], HEADS, HEAD, device=self.device)
            key_value = leaf(rows[1], 2, HEADS, HEAD, device=self.device)
            return Variant(
                lambda: flash_attention(query, *key_value.unbind(1), sides, self.dropout), (query, key_value)
            )

        mask = self.mask(self.text)
        return {
            "published": variant(eager_attention, PADDED, self.mask(PADDED), self.dropout),
            "eager": variant(eager_attention, self.text, mask, self.dropout),
            "torch.compile": skipped(self.device)
            or variant(torch.compile(eager_attention), self.text, mask, self.dropout),
            "torch SDPA": variant(fused_attention, self.text, mask, self.dropout),
            "flash-attn varlen": skipped(self.device, "flash_attn") or flash(),
            "direct": variant(segments_attention, self.text, self.segments(), self.text_is, self.dropout),
        }

    def layer(self) -> dict[str, Variant | str]:
        """With the projections of queries, keys, values and output; without residual and norm."""
        scale = WIDTH**-0.5
        weights = [leaf(n * WIDTH, WIDTH, device=self.device, scale=scale) for n in (1, 2, 1)]
        biases = [leaf(n * WIDTH, device=self.device) for n in (1, 2, 1)]

        def inputs(text: int) -> tuple[Tensor, ...]:
            return tuple(leaf(self.batch, tokens, WIDTH, device=self.device) for tokens in self.sizes(text))

        def around(core: Callable[..., Tensor], x: Tensor, other: Tensor, *rest: object) -> Tensor:
            query = F.linear(x, weights[0], biases[0]).unflatten(-1, (HEADS, HEAD))
            key, value = F.linear(other, weights[1], biases[1]).unflatten(-1, (2, HEADS, HEAD)).unbind(2)
            return F.linear(core(query, key, value, *rest).flatten(2), weights[2], biases[2])

        def variant(function: Callable[..., Tensor], text: int, *rest: object) -> Variant:
            x, other = inputs(text)
            return Variant(lambda: around(function, x, other, *rest), (x, other, *weights, *biases))

        def absorbed() -> Variant:
            x, other = inputs(self.text)
            parameters = [p for pair in zip(weights, biases) for p in pair]
            return Variant(
                lambda: absorbed_cross_attention(
                    x, other, self.lengths, *parameters, HEADS, self.text_is, self.dropout
                ),
                (x, other, *parameters),
            )

        mask = self.mask(self.text)
        return {
            "published": variant(eager_attention, PADDED, self.mask(PADDED), self.dropout),
            "eager": variant(eager_attention, self.text, mask, self.dropout),
            "torch SDPA": variant(fused_attention, self.text, mask, self.dropout),
            "direct": variant(segments_attention, self.text, self.segments(), self.text_is, self.dropout),
            "absorbed": absorbed(),
        }


def attention_cases(batch: int, dropout: float, device: str, part: str) -> Iterator[Case]:
    shapes = [(pixels, 13) for pixels in PIXELS] + [(288, text) for text in TEXTS if text != 13]
    if device == "cpu":
        shapes = [(224, 13), (288, 13), (288, 50)]
    for text_is, name in (("key", "image->text"), ("query", "text->image")):
        for pixels, text in shapes:
            inputs = Attention(text_is, (pixels // 16) ** 2 + 1, text, batch, dropout, device)
            yield f"{name} B={batch} {pixels}px text {text} dropout {dropout}", getattr(inputs, part)()


# --- loss -----------------------------------------------------------------------------------------------------------


def published_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Logits of all positions; labels -100 where nothing was masked."""
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, ignore_index=-100)


def gathered_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), labels)


def operator_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden[rows], weight, bias, labels)[0] / len(rows)


def liger_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden[rows], labels, bias)


def cce_loss(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    takes_bias = "bias" in inspect.signature(cut_cross_entropy).parameters  # not in every version
    return cut_cross_entropy(hidden[rows], weight, labels, **({"bias": bias} if takes_bias else {}))


def loss_cases(batch: int, device: str) -> Iterator[Case]:
    for masked in (MASKED * batch,) if device == "cpu" or batch < 16 else (64, 128, 256, 512):
        weight = leaf(VOCABULARY, WIDTH, device=device, scale=WIDTH**-0.5)
        hidden, bias = leaf(batch * PADDED, WIDTH, device=device), leaf(VOCABULARY, device=device)
        rows = torch.arange(masked, device=device) * (len(hidden) // masked)
        labels = torch.randint(VOCABULARY, (masked,), device=device)
        everywhere = torch.full((len(hidden),), -100, device=device).index_copy(0, rows, labels)
        leaves = (hidden, weight, bias)

        def variant(function: Callable[..., Tensor], *rest: Tensor, leaves: tuple[Tensor, ...] = leaves) -> Variant:
            return Variant(partial(function, *leaves, *rest), leaves)

        yield (
            f"B={batch}, {masked} masked of {len(hidden)} positions",
            {
                "published": variant(published_loss, everywhere),
                "eager": variant(gathered_loss, rows, labels),
                "torch.compile": skipped(device) or variant(torch.compile(gathered_loss), rows, labels),
                "Liger": skipped(device, "liger_kernel") or variant(liger_loss, rows, labels),
                "cut-cross-entropy": skipped(device, "cut_cross_entropy") or variant(cce_loss, rows, labels),
                "linear_cross_entropy": variant(operator_loss, rows, labels),
            },
        )


# --- element-wise ----------------------------------------------------------------------------------------------


def eager_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, dropout: float) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + bias, dropout, dropout > 0), (WIDTH,), weight, shift, EPS)


def operator_norm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, dropout: float) -> Tensor:
    return residual_norm(x, bias, residual, weight, shift, EPS, dropout)


def norm_cases(batch: int, dropout: float, device: str) -> Iterator[Case]:
    for pixels in PIXELS[:2] if device == "cpu" else PIXELS:
        rows = batch * ((pixels // 16) ** 2 + 1)
        x, residual = leaf(rows, WIDTH, device=device), leaf(rows, WIDTH, device=device)
        bias, weight, shift = (leaf(WIDTH, device=device) for _ in range(3))
        leaves = (x, bias, residual, weight, shift)

        def variant(function: Callable[..., Tensor], leaves: tuple[Tensor, ...] = leaves) -> Variant:
            return Variant(partial(function, *leaves, dropout), leaves)

        yield (
            f"{rows} rows ({pixels}px, B={batch}) dropout {dropout}",
            {
                "eager": variant(eager_norm),
                "torch.compile": skipped(device) or variant(torch.compile(eager_norm)),
                "residual_norm": variant(operator_norm),
            },
        )


def eager_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def gelu_cases(batch: int, device: str) -> Iterator[Case]:
    rows = batch * 325
    leaves = (leaf(rows, 4 * WIDTH, device=device), leaf(4 * WIDTH, device=device))
    yield (
        f"{rows} rows of {4 * WIDTH} (288px, B={batch})",
        {
            "eager": Variant(partial(eager_gelu, *leaves), leaves),
            "torch.compile": skipped(device) or Variant(partial(torch.compile(eager_gelu), *leaves), leaves),
            "bias_gelu": Variant(partial(bias_gelu, *leaves), leaves),
        },
    )


# --- timing ---------------------------------------------------------------------------------------------------------


def both(variant: Variant, gradient: Tensor) -> None:
    torch.autograd.grad(variant.run(), variant.leaves, gradient, allow_unused=True)


def measure(variants: dict[str, Variant], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, and on a GPU the peak of memory in MiB beyond the inputs, by variant and metric."""
    gradients = {name: torch.randn_like(variant.run()) for name, variant in variants.items()}
    calls = {
        name: {"forward": variant.run, "both": partial(both, variant, gradients[name])}
        for name, variant in variants.items()
    }
    for functions in calls.values():
        functions["both"]()  # compiles, allocates
    results = {name: {} for name in variants}
    if torch.cuda.is_available():
        from triton.testing import do_bench

        for name, functions in calls.items():
            for metric, function in functions.items():
                results[name][metric] = do_bench(function, return_mode="median")
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            functions["both"]()
            results[name]["peak"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        seconds = {(name, metric): [] for name in calls for metric in calls[name]}
        for _ in range(rounds):  # by turns, so that a slow spell of the machine meets all
            for (name, metric), found in seconds.items():
                start = time.perf_counter()
                calls[name][metric]()
                found.append(time.perf_counter() - start)
        for (name, metric), found in seconds.items():
            results[name][metric] = 1e3 * statistics.median(found)
    for found in results.values():
        found["backward"] = found["both"] - found["forward"]
    return results


def benchmark(operators: dict[str, Iterator[Case]], rounds: int) -> list[dict]:
    rows = []
    for operator, cases in operators.items():
        for name, variants in cases:
            torch.compiler.reset()  # otherwise it gives up after some shapes
            print(
                f"\n{operator}: {name}\n{'':24}{'forward':>10}{'backward':>10}{'both ms':>10}{'peak MiB':>10}{'x':>8}"
            )
            results = measure({k: v for k, v in variants.items() if isinstance(v, Variant)}, rounds)
            first = next(iter(results.values()))["both"]
            for variant, reason in variants.items():
                if isinstance(reason, str):
                    print(f"{variant:24}skipped: {reason}")
                    continue
                found = results[variant]
                numbers = "".join(f"{found[k]:10.3f}" for k in ("forward", "backward", "both"))
                peak = f"{found['peak']:10.1f}" if "peak" in found else f"{'-':>10}"
                print(f"{variant:24}{numbers}{peak}{first / found['both']:8.2f}", flush=True)
                for metric, value in found.items():
                    unit = "MiB" if metric == "peak" else "ms"
                    rows.append(
                        dict(case=f"{operator}: {name}", variant=variant, metric=metric, value=value, unit=unit)
                    )
    return rows


def plot(rows: list[dict], device: str) -> None:
    """Bars of speed against the first variant of each case, forward and backward together; 1 is a dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "both":
            cases.setdefault(row["case"], {})[row["variant"]] = row["value"]
    names = list(dict.fromkeys(variant for times in cases.values() for variant in times))
    colours = dict(zip(names, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.16 * sum(len(times) + 1 for times in cases.values())))
    at, ticks = 0.0, []
    for times in cases.values():
        base = next(iter(times.values()))
        ticks.append(at + (len(times) - 1) / 2)
        for variant, value in times.items():
            axes.barh(at, base / value, color=colours[variant], label=variant)
            axes.text(base / value, at, f" {base / value:.2f}", va="center", fontsize=6)
            at += 1
        at += 1
    axes.set_yticks(ticks, cases, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.005)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel(f"times as fast as the first form, forward + backward, {device}", fontsize=8)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys(), fontsize=7, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(RESULTS / f"kernels_{device}.png", dpi=130, bbox_inches="tight")


# --- machine code ---------------------------------------------------------------------------------------------------

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("attention", "attention-layer", "mlm-loss", "residual-norm", "gelu")
    parser.add_argument("--static", action="store_true", help="what the machine code needs; no GPU")
    parser.add_argument("--operators", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", type=int, help="pairs: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--dropout", type=float, help="0.1 on a GPU, 0 on a CPU, where it would drown the rest")
    parser.add_argument("--rounds", type=int, default=11, help="on a CPU")
    arguments = parser.parse_args()
    if "TRITON_INTERPRET" in os.environ:  # read at import: interpreted kernels can be neither compiled nor timed
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:]], env=environment).returncode
    if arguments.static:
        static()
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = arguments.batch or (64 if device == "cuda" else 4)
    dropout = arguments.dropout if arguments.dropout is not None else (0.1 if device == "cuda" else 0.0)
    torch.manual_seed(0)
    operators = {
        "attention": attention_cases(batch, dropout, device, "core"),
        "attention-layer": attention_cases(batch, dropout, device, "layer"),
        "mlm-loss": loss_cases(batch, device),
        "residual-norm": norm_cases(batch, dropout, device),
        "gelu": gelu_cases(batch, device),
    }
    rows = benchmark({name: operators[name] for name in arguments.operators}, arguments.rounds)
    print(f"\nrows added to {append('kernels', rows)}")
    plot(rows, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
