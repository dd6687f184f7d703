"""Ranks that are slow or stuck at a chosen place. Helpers only, no tests."""

import os
import threading
import time
from collections.abc import Callable, Sequence

import torch

from meter_fast import train as program
from meter_fast.data.assemble import Assembler
from meter_fast.training import checkpoint, run
from meter_fast.training.engine import Engine
from meter_fast.training.optimizer import AdamW


def train(argv: Sequence[str], where: str, seconds: float, on_rank: int = -1) -> int:
    """meter_fast.train, with a sleep at each call of what `where` names; on all ranks where on_rank is -1."""
    if on_rank in (-1, int(os.environ["RANK"])):
        PLACES[where](lambda: time.sleep(seconds))
    return program.main(argv)


def calling(owner: object, name: str) -> Callable[[Callable[[], None]], None]:
    """Arms a pause before owner.name."""

    def arm(pause: Callable[[], None]) -> None:
        found = getattr(owner, name)

        def paused(*args, **kwargs):
            pause()
            return found(*args, **kwargs)

        setattr(owner, name, paused)

    return arm


class Through(torch.autograd.Function):
    """The identity, with a pause on the way back."""

    @staticmethod
    def forward(ctx, value, pause):
        ctx.pause = pause
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.pause()
        return grad, None


def in_backward(pause: Callable[[], None]) -> None:
    """A backward that takes long before it hands any gradient on."""
    build = Engine.__init__

    def building(self, module, *args, **kwargs):
        forward = module.forward

        def slow(batch, totals=None):
            losses = forward(batch, totals)
            return type(losses)(Through.apply(losses.loss, pause), losses.parts, losses.metrics)

        module.forward = slow
        build(self, module, *args, **kwargs)

    Engine.__init__ = building


def in_forward(pause: Callable[[], None]) -> None:
    """A forward that takes long."""
    build = Engine.__init__

    def building(self, module, *args, **kwargs):
        calling(module, "forward")(pause)
        build(self, module, *args, **kwargs)

    Engine.__init__ = building


def in_a_thread(pause: Callable[[], None]) -> None:
    """Decoding that takes long, where a thread of the loader does it."""

    def only_there() -> None:
        assert threading.current_thread() is not threading.main_thread()
        pause()

    calling(Assembler, "micro_batch")(only_there)


PLACES = {
    "starting": calling(run, "build"),
    "data": calling(Assembler, "micro_batch"),
    "loader thread": in_a_thread,
    "forward": in_forward,
    "backward": in_backward,
    "optimizer": calling(AdamW, "step"),
    "saving": calling(checkpoint.Writer, "add"),
}
