"""What do the exact savings give in a training step? Forward, backward and update, plain form against ours, in one run.

    python -m benchmarks.step_time [--case pretrain_288 vqa_576_5] [--batch 4] [--dtype bf16 fp32] [--rounds 3]
    python -m benchmarks.step_time --variant eager compiled cuda_graphs --batch 32 --steps 20      # on a GPU
    python -m benchmarks.step_time --case vqa_576 --batch 2 --text-tokens 50 --checkpointing    # against the estimate
    python -m benchmarks.step_time --variant plain_kept eager --one-at-a-time --batch 12   # much memory
    python -m benchmarks.step_time --flops-only

Plain is the published procedure in torch's operators (`benchmarks/plain.py`) on the published loader's batch: texts
padded to 50 tokens (retrieval: 40), a picture for each text, a false picture for each pair. Ours takes the same pairs,
padded to the longest text or packed, and the kernels and forms that the model chooses by itself. Both are trained by
the real engine, with the recipe's dropout, in the same precision; published runs are in fp32, one process a GPU.

Each side is a process of its own, so that its peak memory is its own; rounds alternate, so that a slow spell of the
machine meets all, and products of large matrices, in a process too, go with them: the ceiling that utilisation is a
share of. On a GPU a side gives its free memory back after each round; on a host both keep theirs, unless they run
--one-at-a-time. On a CPU our runs keep the memory that they free (`meter_fast/host_memory.py`), and plain does not;
variant plain_kept is plain with that one thing, too. Metrics, of each side:

- time_per_step (median of the rounds), samples_per_second, loss (before the first step, without dropout: the sides
  have to agree), last_loss (of the last round's last step; at size tiny, without dropout, the sides have to agree),
  peak_memory: of the steps, on a GPU all that was allocated, on a host without what the libraries took before;
  estimated_peak_memory: what the start banner says of ours, where every text has a picture of its own, as the estimate
  assumes.
- flops_per_sample: of forward and backward, counted from shapes (`meter_fast/flops.py`); what --checkpointing computes
  again does not count, and the update has next to none.
- mfu: flops_per_sample x samples_per_second / ceiling. It falls when work is removed and the rest does not get faster.
- published_mfu: the same with the FLOPs of the plain form, whoever removed how many of them: the utilisation at which
  the published procedure would have to run to keep up. samples_per_second need no such correction, as a sample is a
  sample on both sides; their ratio is (plain FLOPs / our FLOPs) x (our mfu / plain mfu), savings times speed.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.apart import Apart, closing, rounds, rounds_one_at_a_time
from benchmarks.record import append
from benchmarks.step_cases import CASES, Plan
from benchmarks.step_work import PLAIN, PLAIN_VARIANT, VARIANTS, make_step, make_yardstick, step_flops
from meter_fast.models.config import PARTS

CEILING = "matrix product"
SAME_LOSS = {"fp32": 1e-4, "bf16": 3e-2}  # relative


def measure(
    plan: Plan, variants: Sequence[str], count: int, steps: int, one_at_a_time: bool = False
) -> dict[str, dict[str, float]]:
    """By variant, its metrics; the plain form is one of them, and so is the ceiling. Raises RuntimeError where a side
    fails or the losses of both forms differ."""
    makers = {name: partial(Apart, make_step, plan, name, steps) for name in (PLAIN_VARIANT, *variants)}
    makers[CEILING] = partial(Apart, make_yardstick, plan)
    if one_at_a_time:
        found = rounds_one_at_a_time(makers, count)
    else:
        sides: list[Apart] = []
        with closing(sides):
            for start in makers.values():
                sides.append(start())
            found = rounds({name: [side] for name, side in zip(makers, sides, strict=True)}, count)
    yardstick = found.pop(CEILING)
    ceiling, known = max(result["flop_rate"] for result in yardstick), yardstick[0]
    metrics = {name: _metrics(results, known, name, plan, ceiling) for name, results in found.items()}
    check(metrics, plan, variants)
    return metrics | {CEILING: {"flop_rate": ceiling}}


def count(plan: Plan) -> dict[str, dict[str, float]]:
    """Those of the metrics that need no clock."""
    return {
        name: {"flops_per_sample": step_flops(plan, name == PLAIN_VARIANT) / plan.batch}
        for name in (PLAIN_VARIANT, "eager")
    }


def _metrics(results: list[dict[str, float]], known: dict[str, float], name: str, plan: Plan, ceiling: float) -> dict:
    seconds = statistics.median(result["seconds"] for result in results)
    flops = known[PLAIN_VARIANT if name in PLAIN else "fast"] / plan.batch
    rate = plan.batch / seconds
    metrics = {  # the first one is in every run: see record.runs
        "flops_per_sample": flops,
        "time_per_step": 1e3 * seconds,
        "samples_per_second": rate,
        "loss": results[-1]["loss"],
        "last_loss": results[-1]["last_loss"],
        "peak_memory": max(result["peak"] for result in results),
        "mfu": flops * rate / ceiling,
        "published_mfu": known[PLAIN_VARIANT] / plan.batch * rate / ceiling,
    }
    if name not in PLAIN and plan.case.texts_per_picture == 1:
        metrics["estimated_peak_memory"] = known["estimated_peak"]
    return metrics


UNITS = {
    "time_per_step": "ms", "samples_per_second": "1/s", "loss": "1", "last_loss": "1", "peak_memory": "B",
    "flops_per_sample": "FLOP", "mfu": "1", "published_mfu": "1", "estimated_peak_memory": "B", "flop_rate": "FLOP/s",
}  # fmt: skip


def check(metrics: dict[str, dict[str, float]], plan: Plan, variants: Sequence[str]) -> None:
    """Raises RuntimeError where the sides do not train the same: their losses differ before the first step, without
    dropout, or after as many steps, where the recipe has no dropout, which is another one on each side."""
    limit = SAME_LOSS[plan.dtype]
    compared = ("loss", "last_loss") if plan.size == "tiny" else ("loss",)
    for name, metric in itertools.product(variants, compared):
        plain, ours = metrics[PLAIN_VARIANT][metric], metrics[name][metric]
        if not abs(ours - plain) <= limit * abs(plain):
            raise RuntimeError(f"{metric} differs: plain {plain:.5g}, {name} {ours:.5g}")


def show(case: str, metrics: dict[str, dict[str, float]]) -> None:
    """A line for each side, and what is saved."""
    print(f"{case}; ceiling {metrics[CEILING]['flop_rate'] / 1e12:.3g} TFLOP/s\n{'':12}{'ms/step':>10}{'samples/s':>11}"
          f"{'GFLOP/sample':>14}{'MFU':>7}{'published':>11}{'peak MB':>10}{'estimate':>10}{'loss':>11}")  # fmt: skip
    plain = metrics[PLAIN_VARIANT]
    for name, one in metrics.items():
        if name == CEILING:
            continue
        estimate = f"{one['estimated_peak_memory'] / 1e6:.0f}" if "estimated_peak_memory" in one else "-"
        print(f"{name:12}{one['time_per_step']:10.1f}{one['samples_per_second']:11.2f}"
              f"{one['flops_per_sample'] / 1e9:14.2f}{one['mfu']:7.1%}{one['published_mfu']:11.1%}"
              f"{one['peak_memory'] / 1e6:10.0f}{estimate:>10}{one['loss']:11.4f}")  # fmt: skip
        if name != PLAIN_VARIANT:
            saved, faster = plain["flops_per_sample"] / one["flops_per_sample"], one["mfu"] / plain["mfu"]
            print(f"{'':12}{plain['time_per_step'] / one['time_per_step']:.2f} x faster = {saved:.2f} x fewer FLOPs "
                  f"x {faster:.2f} x the utilisation; {plain['peak_memory'] / one['peak_memory']:.2f} x less memory",
                  flush=True)  # fmt: skip


def said(name: str, plan: Plan) -> str:
    """The case, in words."""
    words = f"{name} {plan.size} batch {plan.batch} {plan.dtype} zero {plan.zero} text {plan.text_tokens}"
    parts = "" if plan.checkpointing == PARTS else f" {','.join(plan.checkpointing)}"
    return words + (f" checkpointed{parts}" if plan.checkpointing else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=[n for n in CASES if n != "snli_ve_384"])
    parser.add_argument("--variant", choices=(*VARIANTS, *PLAIN[1:]), nargs="+", default=["eager"])
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--batch", type=int, default=4, help="pairs, questions or statements; retrieval: with 16 texts")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), nargs="+", default=["bf16"])
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), nargs="+", default=[2])
    parser.add_argument("--text-tokens", type=int, default=13, help="of an average text, specials included")
    parser.add_argument(
        "--checkpointing", choices=PARTS, nargs="*", help="ours keeps only blocks' inputs; no part: of all"
    )
    parser.add_argument("--flops-only", action="store_true", help="count, run nothing")
    parser.add_argument("--one-at-a-time", action="store_true", help="for sides that do not fit beside each other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of a round, of which the mean counts")
    arguments = parser.parse_args()
    checkpointing = PARTS if arguments.checkpointing == [] else tuple(arguments.checkpointing or ())
    if "cuda_graphs" in arguments.variant and not torch.cuda.is_available():
        parser.error("--variant cuda_graphs needs a GPU: leave it out")
    for name, dtype, zero in itertools.product(arguments.case, arguments.dtype, arguments.zero):
        try:
            plan = Plan(
                CASES[name], arguments.size, arguments.batch, dtype, zero, arguments.text_tokens,
                checkpointing=checkpointing,
            )  # fmt: skip
        except ValueError as error:
            parser.error(str(error))
        case = said(name, plan)
        if arguments.flops_only:
            metrics = count(plan)
            plain, ours = (metrics[side]["flops_per_sample"] for side in (PLAIN_VARIANT, "eager"))
            print(f"{case}: {plain / 1e9:.1f} GFLOP a sample plain, {ours / 1e9:.1f} ours, {plain / ours:.2f} x fewer")
        else:
            try:
                metrics = measure(plan, arguments.variant, arguments.rounds, arguments.steps, arguments.one_at_a_time)
            except RuntimeError as error:
                raise SystemExit(f"{case}: {error}") from error
            show(case, metrics)
        rows = [
            dict(case=case, variant=variant, metric=metric, value=value, unit=UNITS[metric])
            for variant, one in metrics.items()
            for metric, value in one.items()
        ]
        print(f"rows added to {append('step_time', rows)}", flush=True)


if __name__ == "__main__":
    main()
