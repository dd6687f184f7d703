"""Bytes that the forward and backward pass of a micro-batch keep, found by running both without memory.

Knows settings, what each task trains, and torch's fake tensors: they have shapes, types and a device, and no values, so
the pass of any model is traced on any machine, with the operators that its device would take. Knows nothing of
optimizers. What an operator uses inside itself (a cuDNN or oneDNN workspace) is not seen.
"""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meter_fast.config import RunConfig
from meter_fast.data.batch import Batch, PretrainBatch, RankedTexts, StatementBatch, TextToText, VqaBatch
from meter_fast.data.cell_masking import CellMasking
from meter_fast.data.spans import longest_target
from meter_fast.training.engine import DTYPES
from meter_fast.training.tasks import task_of


class NotTraced(RuntimeError):
    """A pass that cannot be traced without values; the text says why."""


@dataclass(frozen=True)
class Activations:
    """Bytes, weights and their gradients apart.

    batch: the micro-batch itself. kept: what autograd holds between forward and backward. peak: the most that is there
    at once in both passes, `kept` and what operators pass to each other included; with activation checkpointing also
    the block that is computed again.
    """

    batch: int
    kept: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make, from their making to their release.

    known: tensors that are there already and do not count. now, peak: bytes.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._there = {tensor.untyped_storage()._cdata for tensor in known}
        self._known = known  # keeps their places from being given to others

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._there:
            return
        self._there.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._there.discard(place)
        self.now -= size


def trace_activations(config: RunConfig, checkpointing: bool, device: str | torch.device = "cpu") -> Activations:
    """What the largest micro-batch of a run keeps on a device of this kind, with or without activation checkpointing
    of the engine's parts.

    config: with the sizes that the data tell (vocabulary, answers). Texts are as long as data.max_text_length and not
    packed. Raises NotTraced where shapes depend on values, or there is no such device to ask what it would do.
    """
    if "reconstruction" in config.objectives.names:
        raise NotTraced("the shapes of an image tokenizer's statistics depend on its codes")
    module = module_without_values(config).to(DTYPES[config.engine.dtype])
    module.model.set_activation_checkpointing(checkpointing, config.engine.checkpointed_parts)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _trace(module.to_empty(device=device).train(), config, device)
    except RuntimeError as error:
        raise NotTraced(_said(error)) from error


def module_without_values(config: RunConfig) -> nn.Module:
    """What the engine runs, on the meta device. Texts are padded and there are no other processes: packing and
    candidates of other ranks depend on values. Raises NotTraced."""
    goals = replace(config.objectives, mim_negatives="batch")
    config = replace(config, objectives=goals, kernels=replace(config.kernels, text="padded"))
    task = task_of(goals.names)
    try:
        with torch.device("meta"):
            return task.module(task.make(config, False), config)
    except RuntimeError as error:
        raise NotTraced(_said(error)) from error


def _said(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _trace(module: nn.Module, config: RunConfig, device: str | torch.device) -> Activations:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = largest_batch(config).to(device, DTYPES[config.engine.dtype])
    totals = dict.fromkeys(config.objectives.names, 1.0)
    own = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    with LiveBytes([*module.parameters(), *module.buffers(), *own]) as live:
        losses = module(batch, totals)
        kept = live.now
        losses.loss.backward()
    return Activations(sum(tensor.untyped_storage().nbytes() for tensor in own), kept, live.peak)


def largest_batch(config: RunConfig) -> Batch:
    """A micro-batch of the largest shapes that the loader makes, of no meaning; on the CPU."""
    if "vqa" in config.objectives.names:
        return _questions(config)
    if "nlvr2" in config.objectives.names:
        return _statements(config, 2)
    if "snli_ve" in config.objectives.names:
        return _statements(config, 1)
    return _pairs(config)


def most_texts(config: RunConfig) -> int:
    """The most texts of a micro-batch."""
    each = config.data.questions_per_picture if config.data.questions == "by_picture" else 1
    return config.engine.micro_batch * each


def _texts(config: RunConfig) -> dict[str, Tensor]:
    rows, length = most_texts(config), config.data.max_text_length
    return {
        "text_ids": torch.full((rows, length), 5),
        "text_mask": torch.ones(rows, length, dtype=torch.bool),
        "text_rows": torch.arange(rows * length),
        "sample_ids": torch.arange(rows),
    }


def _images(config: RunConfig, count: int) -> Tensor:
    side = config.model.vision.image_size
    return torch.zeros(count, 3, side, side)


def _questions(config: RunConfig) -> VqaBatch:
    rows, pictures = torch.arange(most_texts(config)), config.engine.micro_batch
    return VqaBatch(
        images=_images(config, pictures),
        image_rows=rows % pictures,
        targets=torch.zeros(len(rows), config.model.vqa_answers),
        question_ids=rows,
        **_texts(config),
    )


def _statements(config: RunConfig, pictures: int) -> StatementBatch:
    rows = config.engine.micro_batch
    return StatementBatch(
        images=_images(config, pictures * rows),
        image_rows=torch.arange(pictures * rows).view(rows, pictures),
        labels=torch.zeros(rows, dtype=torch.int64),
        **_texts(config),
    )


def _pairs(config: RunConfig) -> PretrainBatch:
    goals, rows, length = config.objectives, config.engine.micro_batch, config.data.max_text_length
    texts, places = _texts(config), torch.arange(config.engine.micro_batch)
    masked = torch.arange(max(1, round(goals.mlm_probability * rows * length)))
    false = rows // 2 if goals.itm_negatives == "dataset" and "itm" in goals.names else 0
    cells: dict[str, Tensor] = {}
    if {"mim_in_batch", "mim_codes"} & set(goals.names):
        grid = config.model.vision.grid
        hidden = torch.arange(rows * CellMasking(grid, goals.mim_probability).hidden)
        cells = {
            "cell_mask": torch.ones(rows, grid, grid, dtype=torch.bool),
            "cell_rows": hidden,
            "cell_codes": torch.zeros_like(hidden),
        }
    written = longest_target(goals.names, length, goals.span_probability, goals.span_length)
    to_write = TextToText(
        ids=texts["text_ids"],
        mask=texts["text_mask"],
        text_rows=texts["text_rows"],
        targets=torch.full((rows, written), 5),
        lengths=torch.full((rows,), written),
        rows=torch.arange(rows * written),
    )
    ranked = rows * (1 + goals.false_texts)
    to_rank = RankedTexts(
        torch.full((ranked, length), 5), torch.ones(ranked, length, dtype=torch.bool), torch.arange(ranked * length)
    )
    return PretrainBatch(
        images=_images(config, rows),
        masked_ids=texts["text_ids"],
        masked_rows=masked,
        masked_labels=torch.zeros_like(masked),
        itm_labels=1 - places % 2,
        itm_images=places ^ 1,
        false_images=_images(config, false) if false else None,
        span_denoising=to_write if "span_denoising" in goals.names else None,
        caption=to_write if "caption" in goals.names else None,
        ranked=to_rank if "retrieval" in goals.names else None,
        **texts,
        **cells,
    )
