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
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_cases import Case, Variant, attention_cases, gelu_cases, loss_cases, norm_cases
from benchmarks.kernel_launches import static
from benchmarks.record import RESULTS, append


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
