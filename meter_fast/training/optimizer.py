"""AdamW of the published runs, its parameter groups by name, and its schedules as functions of the step.

Knows tensors and published parameter names. Knows nothing of DeepSpeed, batches or files.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meter_fast.config import OptimConfig

HEADS = ("vqa_classifier", "nlvr2_classifier", "mlm_score", "itm_score", "snli_classifier", "mim_in_batch_score",
         "mim_codes_score")  # fmt: skip
FUSION = "cross_modal"
GROUPS = ("rest", "rest_no_decay", "heads", "heads_no_decay", "fusion", "fusion_no_decay")
NO_DECAY = ("bias", "LayerNorm.bias", "LayerNorm.weight", "norm.bias", "norm.weight", "norm1.bias", "norm1.weight",
            "norm2.bias", "norm2.weight")  # fmt: skip


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay in the arithmetic of the published runs (transformers 4.6, `AdamW`).

    It differs from torch's: eps is added to sqrt(v) before the bias correction, and the decay comes after the
    update and takes the updated weights. torch's fused kernel computes it all the same, in one pass over the memory.
    A parameter without a gradient is left alone. State: exp_avg and exp_avg_sq, fp32, in the shape of the parameter;
    nothing else.

    The number of the update (1 for the first) stands in the group, `group["step"]`, and is set from outside: ZeRO
    calls `step()` once for each piece of a group, so counting here would count the pieces. `step()` at number 0
    makes the state and changes nothing: that is what DeepSpeed does while it initialises, at stage 0 with bf16 even
    for a real update on zero gradients, which would decay the weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if group["step"] > 0:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        # torch divides sqrt(v) by the bias correction first: with eps divided by it, too, both are the same quotient.
        eps = group["eps"] / math.sqrt(1 - beta2 ** group["step"])
        torch._fused_adamw_(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.full((), group["step"], dtype=torch.float32, device=p.device) for p in params],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])


def group_of(published_name: str) -> int:
    """0..5 of the published grouping: {rest, heads, fusion} x {decay, none}, decided on substrings of the name.

    Source: published code, meter_utils.py:168-250. Two consequences that look like slips but are how the released
    models were trained: CLIP's `ln_*` weights are decayed, `token_type_embeddings` counts as rest.
    """
    if any(head in published_name for head in HEADS):
        part = 1
    elif FUSION in published_name:
        part = 2
    else:
        part = 0
    return 2 * part + (1 if any(text in published_name for text in NO_DECAY) else 0)


def parameter_groups(
    named: Iterable[tuple[str, Tensor]],
    optim: OptimConfig,
    published_name: Callable[[str], str],
    layers_above: Callable[[str], int] = lambda name: 0,
) -> list[dict[str, Any]]:
    """The groups for AdamW, empty ones left out. `named`: (our name, parameter); frozen parameters are skipped.

    layers_above: by our name, see `layer_decay`; asked only where optim.layer_decay is not 1. Each group holds `index`
    (0..5), `layers_above`, `multiplier` (of the learning rate), `weight_decay` and the `names` of its params; without
    decay by layer there are six at most, as published.
    """
    multipliers = (1.0, optim.head_multiplier, optim.cross_modal_multiplier)
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        index = group_of(published_name(name))
        above = layers_above(name) if optim.layer_decay != 1 else 0
        group = groups.setdefault(
            (index, above),
            {
                "params": [],
                "names": [],
                "index": index,
                "layers_above": above,
                "multiplier": multipliers[index // 2] * optim.layer_decay**above,
                "lr": 0.0,
                "weight_decay": 0.0 if index % 2 else optim.weight_decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[index] for index in sorted(groups)]


def shown_rates(groups: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Learning rates of parameter groups by name. Where they fall from layer to layer, the top's and the lowest."""
    rates: dict[str, float] = {}
    for group in sorted(groups, key=lambda group: (group["index"], group["layers_above"])):
        name = GROUPS[group["index"]]
        rates[name if name not in rates else f"{name}_lowest"] = group["lr"]
    return rates


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step: linear warm-up from 0, then polynomial or cosine decay.

    `factor(step)` is relative to the peak; steps count from 0, so with a warm-up the very first step has rate 0, as
    published. Beyond max_steps the polynomial stays at its end and the cosine rises again (published code and
    transformers 4.6, `get_polynomial_decay_schedule_with_warmup`, `get_cosine_schedule_with_warmup`)."""

    lr: float
    max_steps: int
    warmup_steps: int
    decay_power: float | str
    end_lr: float

    @staticmethod
    def of(optim: OptimConfig, max_steps: int) -> "Schedule":
        """The schedule of a run; a share of warm-up is rounded down to steps."""
        warmup = optim.warmup if isinstance(optim.warmup, int) else int(max_steps * optim.warmup)
        return Schedule(optim.lr, max_steps, warmup, optim.decay_power, optim.end_lr)

    def factor(self, step: int) -> float:
        """Learning rate of step `step` (from 0) divided by the peak rate."""
        if step < self.warmup_steps:
            return step / max(1, self.warmup_steps)
        if self.decay_power == "cosine":
            progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        if self.lr == 0:
            return 0.0
        if step > self.max_steps:
            return self.end_lr / self.lr
        left = 1 - (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        return ((self.lr - self.end_lr) * left**self.decay_power + self.end_lr) / self.lr

    def apply(self, groups: list[dict[str, Any]], step: int) -> None:
        """Write the rate and the number of update `step` (from 0) into parameter groups of AdamW."""
        for group in groups:
            group["lr"] = self.lr * group["multiplier"] * self.factor(step)
            group["step"] = step + 1
