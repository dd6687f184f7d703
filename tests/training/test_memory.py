"""The estimate of memory against what a run really takes on the CPU."""

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from meter_fast.config import RunConfig, override
from meter_fast.models import recomputed
from meter_fast.recipes import resolve
from meter_fast.training import banner
from meter_fast.training.activations import Activations, LiveBytes, NotTraced, largest_batch, trace_activations
from meter_fast.training.engine import DTYPES
from meter_fast.training.memory import estimate_memory
from meter_fast.training.tasks import task_of
from meter_fast.training.world import World

SMALL = ["engine.global_batch=6", "engine.micro_batch=6", "data.max_text_length=24", "run.max_steps=1"]
CASES = {
    "pre-training": ["pretrain"],
    "questions": ["vqa", "model.vqa_answers=500", "run.max_epochs=0", "model.vision.image_size=192"],
    "pictures with questions": ["vqa", "model.vqa_answers=500", "run.max_epochs=0", "data.questions=by_picture",
                                "data.questions_per_picture=3"],
    "statements": ["nlvr2", "run.max_epochs=0"],
    "hypotheses": ["snli_ve", "run.max_epochs=0"],
    "retrieval": ["retrieval_coco", "run.max_epochs=0"],
    "decoder": ["pretrain", "fusion=encoder_decoder", "objectives.names=itm,span_denoising,caption"],
    "merged attention": ["pretrain", "fusion=merged_attention"],
    "cells of Swin": ["pretrain", "vision=swin_b_224", "text=deberta_v3_base", "model.mim_in_batch_head=true",
                      "objectives.names=mlm,mim_in_batch"],
}  # fmt: skip
EXACT = 1.02  # allocators and tensors without a storage of their own


def configuration(case: str, dtype: str = "fp32") -> RunConfig:
    recipe, *settings = CASES[case]
    choices = [text for text in settings if "." not in text.split("=")[0]]
    config = resolve([recipe, "size=tiny", *choices])
    return override(config, [*(text for text in settings if text not in choices), *SMALL, f"engine.dtype={dtype}"])


@functools.cache
def traced(case: str, dtype: str, checkpointing: bool) -> Activations:
    return trace_activations(configuration(case, dtype), checkpointing)


def real_passes(config: RunConfig, checkpointing: bool) -> Callable[[], torch.Tensor]:
    """The loss of the same micro-batch, on a real model."""
    task = task_of(config.objectives.names)
    module = task.module(task.make(config, False), config).to(DTYPES[config.engine.dtype]).train()
    module.model.set_activation_checkpointing(checkpointing)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = largest_batch(config).to("cpu", DTYPES[config.engine.dtype])
    return lambda: module(batch, dict.fromkeys(config.objectives.names, 1.0)).loss


def saved_bytes(config: RunConfig) -> int:
    """What autograd really keeps of a forward pass without checkpointing, each storage once."""
    kept: dict[int, int] = {}
    loss = real_passes(config, False)
    cells = [cell.cell_contents for cell in loss.__closure__]
    module = next(cell for cell in cells if isinstance(cell, torch.nn.Module))
    batch = next(cell for cell in cells if not isinstance(cell, torch.nn.Module) and hasattr(cell, "images"))
    own = [*module.parameters(), *module.buffers()]
    own += [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}

    def see(packed: object) -> object:
        for tensor in tree_leaves(packed if not isinstance(packed, tuple) else packed[0].inputs):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return packed

    def seen(pack: Callable, unpack: Callable) -> saved_tensors_hooks:
        return saved_tensors_hooks(lambda tensor: see(pack(tensor)), unpack)

    with pytest.MonkeyPatch.context() as patch, seen(lambda tensor: tensor, lambda tensor: tensor):
        patch.setattr(recomputed, "saved_tensors_hooks", seen)  # the inner hooks alone see what is made again
        held = loss()
    assert held.requires_grad
    return sum(kept.values())


def live_peak(config: RunConfig, checkpointing: bool) -> int:
    """The most bytes of tensors that both passes have at once, counted while they are computed."""
    loss = real_passes(config, checkpointing)
    module, batch = (cell.cell_contents for cell in loss.__closure__ if hasattr(cell.cell_contents, "to"))
    if not isinstance(module, torch.nn.Module):
        module, batch = batch, module
    own = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    with LiveBytes([*module.parameters(), *module.buffers(), *own]) as live:
        loss().backward()
    return live.peak


@pytest.mark.parametrize("case", CASES)
def test_what_autograd_keeps(case: str) -> None:
    found = saved_bytes(configuration(case))
    assert found / EXACT <= traced(case, "fp32", False).kept <= 1.05 * found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["pre-training", "questions"])
def test_peak_of_both_passes(case: str, checkpointing: bool) -> None:
    """Without values as with them. What operators use inside themselves is in neither."""
    estimated = traced(case, "fp32", checkpointing).peak
    found = live_peak(configuration(case), checkpointing)
    assert found / EXACT <= estimated <= 1.1 * found


def test_checkpointing_keeps_less_and_computes_a_block_again() -> None:
    everything, blocks = (traced("questions", "fp32", on) for on in (False, True))
    assert blocks.kept < everything.kept / 3
    assert blocks.kept < blocks.peak < everything.peak
    assert blocks.batch == everything.batch


def test_checkpointing_a_part_keeps_more_than_all_and_less_than_none() -> None:
    config = configuration("questions")
    config = replace(config, engine=replace(config.engine, checkpointed_parts=("vision",)))
    everything, blocks = (traced("questions", "fp32", on) for on in (False, True))
    assert blocks.kept < trace_activations(config, True).kept < everything.kept
    assert trace_activations(config, False) == everything


def test_parts_follow_zero_and_dtype() -> None:
    config = configuration("questions")
    task = task_of(config.objectives.names)
    numbers = sum(p.numel() for p in task.make(config, False).parameters())

    def parts(zero: int, dtype: str, world: int, offload: str = "none") -> tuple[float, ...]:
        engine = replace(config.engine, zero=zero, dtype=dtype, offload=offload, global_batch=6 * world)
        memory = estimate_memory(replace(config, engine=engine), world, activations=False)
        return tuple(getattr(memory, name) / numbers for name in ("weights", "gradients", "masters", "moments"))

    assert parts(0, "fp32", 4) == (4, 4, 0, 8)
    assert parts(0, "bf16", 4) == (2, 2, 4, 8)
    assert parts(1, "bf16", 4) == (2, 6, 1, 2)
    assert parts(2, "bf16", 4) == (2, 1, 1, 2)
    assert parts(3, "bf16", 4) == (0.5, 1, 1, 2)
    assert parts(2, "fp32", 1) == (4, 4, 4, 8)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    config = configuration("questions", "bf16")
    here = estimate_memory(config, 1, activations=False)
    there = estimate_memory(replace(config, engine=replace(config.engine, offload="cpu")), 1, activations=False)
    assert here.on_host == 0
    assert there.on_host >= there.masters + there.moments == here.masters + here.moments
    assert there.state == here.state - here.masters - here.moments


def test_writing_beside_the_steps_takes_a_copy() -> None:
    """Of fp32 weights and moments and of what is frozen; without, of what goes into a file."""
    config = configuration("questions", "bf16")
    memory = estimate_memory(config, 1, activations=False)
    waiting = estimate_memory(replace(config, run=replace(config.run, async_save=False)), 1, activations=False)
    numbers = memory.weights // 2
    assert memory.saving - waiting.saving >= 8 * numbers
    assert waiting.saving >= 8 * numbers and memory.peak == waiting.peak


def test_what_cannot_be_traced_says_why() -> None:
    config = resolve(["image_tokenizer", "size=tiny"])
    with pytest.raises(NotTraced, match="image tokenizer"):
        trace_activations(config, False)
    assert estimate_memory(config, 1, activations=False).weights > 0


@pytest.mark.parametrize("case", ["pre-training", "questions"])
def test_kernels_are_traced_too(case: str) -> None:
    """Shapes of an operator's own kernels are known without running them, also where what no objective reaches is
    found first, on the meta device."""
    config = configuration(case)
    kernels = replace(
        config.kernels, **dict.fromkeys(("cross_attention", "mlm_loss", "residual_norm", "gelu"), "triton")
    )
    found = trace_activations(replace(config, kernels=kernels), False)
    assert 0 < found.kept <= found.peak


def test_the_banner_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small run only what is there throughout; the passes of others are traced, where they can be."""
    config, world = configuration("questions", "bf16"), World(0, 1, 0, torch.device("cpu"), None)
    assert re.fullmatch(
        r"\S+ MB a process at most: weights \S+ MB, gradients \S+ MB, optimizer \S+ MB, activations not counted; "
        r"\S+ MB of the main process's host memory while a checkpoint is written",
        banner.memory(config, world),
    )
    monkeypatch.setattr(banner, "BIG", 0)
    assert re.search(r"activations \S+ MB \(\S+ MB between the passes\); ", banner.memory(config, world))
    offload = replace(config, engine=replace(config.engine, offload="cpu"))
    assert re.search(r"; \S+ MB of host memory, optimizer \S+ MB; ", banner.memory(offload, world))
    assert "activations not known: the shapes" in banner.memory(resolve(["image_tokenizer", "size=tiny"]), world)
