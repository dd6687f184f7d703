"""Does cost grow as it should? Time, memory and FLOPs of a training step against text length, image tokens, batch and
processes, with the exponent of each.

    python -m benchmarks.scaling [--axis text image batch processes] [--size tiny] [--dtype fp32] [--rounds 3]

The step is pre-training's, of our form, by the real engine; everything but the axis stays. Each point is a process of
its own (of the axis of processes, as many as it says, each with the same micro-batch), and the rounds of an axis go
from point to point. Metrics of each point, whose variant is its place on the axis:

- flops_per_step, counted from shapes, and activations: what autograd keeps, traced (`training/activations.py`); both of
  one process, and exact;
- state: weights, gradients and optimizer of one process, as estimated: what more processes divide;
- time_per_step, of the slowest process, and peak_memory, the largest, as in step_time. At size tiny the latter is
  mostly what libraries take once.

An exponent is the slope of the least squares line through the logarithms: 0 for what does not depend on the axis, 1 for
what is in proportion to it. What a step costs anyhow lowers it; attention between image tokens raises it. Processes
that share a machine's cores take the longer the more there are of them: there the exponent says how evenly they share.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks.apart import Apart, closing, rounds
from benchmarks.record import append
from benchmarks.step_cases import Case, Plan, configuration
from benchmarks.step_work import counts, make_step
from meter_fast.training.ports import free_port

LONGEST = 50  # tokens that the case pads to, where the plain form is asked; the tiny model has 64 positions
UNITS = {"flops_per_step": "FLOP", "activations": "B", "state": "B", "time_per_step": "ms", "peak_memory": "B"}
POINTS = {
    "text": {"tiny": (8, 16, 32, 48), "base": (8, 16, 32, 48)},
    "image": {"tiny": (96, 192, 288, 384), "base": (224, 288, 384, 576)},  # pixels
    "batch": {"tiny": (2, 4, 8, 16), "base": (2, 4, 8, 16)},
    "processes": {"tiny": (1, 2, 4), "base": (1, 2, 4)},
}
ON_AXIS = {"text": "text tokens", "image": "image tokens", "batch": "batch", "processes": "processes"}


def plans(axis: str, size: str, dtype: str) -> dict[int, Plan]:
    """By the place on the axis, the step there. Texts are equally long, so that the length is what it says."""
    common = Plan(Case("pretrain", POINTS["image"][size][1], LONGEST), size, 4, dtype, text_tokens=13, spread=0)
    found = {}
    for value in POINTS[axis][size]:
        if axis == "image":
            plan = replace(common, case=replace(common.case, image_size=value))
            value = configuration(plan).model.vision.tokens
        elif axis == "text":
            plan = replace(common, text_tokens=value)
        else:
            plan = replace(common, **{"world" if axis == "processes" else "batch": value})
        found[value] = plan
    return found


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def start(plan: Plan) -> list[Apart]:
    """The processes of one point."""
    if plan.world == 1:
        return [Apart(make_step, plan, "eager")]
    run = {"WORLD_SIZE": str(plan.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Apart(make_step, plan, "eager", RANK=str(n), LOCAL_RANK=str(n), **run) for n in range(plan.world)]


def measure(axis: str, size: str, dtype: str, count: int) -> dict[int, dict[str, float]]:
    """By the place on the axis, its metrics. Raises RuntimeError where a process fails."""
    points = plans(axis, size, dtype)
    groups: dict[int, list[Apart]] = {}
    started: list[Apart] = []
    with closing(started):
        for place, plan in points.items():
            groups[place] = start(plan)
            started += groups[place]
        found = rounds(groups, count)
    metrics = {}
    for place, plan in points.items():
        known = counts(plan)
        metrics[place] = {
            "flops_per_step": known["fast"],
            "activations": known["activations"],
            "state": known["state"],
            "time_per_step": 1e3 * statistics.median(result["seconds"] for result in found[place]),
            "peak_memory": max(result["peak"] for result in found[place]),
        }
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axis", choices=list(POINTS), nargs="+", default=list(POINTS))
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    devices = torch.cuda.device_count() or os.cpu_count() or 1
    for axis in arguments.axis:
        if axis == "processes" and torch.cuda.is_available() and devices < max(POINTS[axis][arguments.size]):
            parser.error(f"--axis processes takes a GPU each, and there are {devices}: leave it out, or hide the GPUs "
                         "by CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu")  # fmt: skip
        metrics = measure(axis, arguments.size, arguments.dtype, arguments.rounds)
        case = f"{ON_AXIS[axis]} {arguments.size} {arguments.dtype}"
        print(f"{case}\n{'':8}" + "".join(f"{name:>16}" for name in UNITS))
        rows = []
        for place, one in metrics.items():
            print(f"{place:8}" + "".join(f"{one[name]:16.6g}" for name in UNITS))
            rows += [dict(case=case, variant=str(place), metric=m, value=v, unit=UNITS[m]) for m, v in one.items()]
        fits = {name: exponent(list(metrics), [one[name] for one in metrics.values()]) for name in UNITS}
        print(f"{'exponent':8}" + "".join(f"{fits[name]:16.2f}" for name in UNITS))
        rows += [
            dict(case=case, variant="exponent", metric=f"exponent_of_{m}", value=v, unit="1") for m, v in fits.items()
        ]
        print(f"rows added to {append('scaling', rows)}", flush=True)


if __name__ == "__main__":
    main()
