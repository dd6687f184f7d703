"""Which micro-batch fits, and the activations between the traced ones."""

from dataclasses import replace

import pytest

from meter_fast.config import override
from meter_fast.plan.memory import Passes, all_fits, largest_micro_batch, micro_batches, trace_passes, with_engine
from meter_fast.plan.options import read_arguments
from meter_fast.plan.step import on_gpu
from meter_fast.recipes import resolve
from meter_fast.training.activations import Activations, trace_activations
from meter_fast.training.engine import accumulation
from meter_fast.training.memory import memory_of, sizes_of

LINEAR = Passes(tuple((n, Activations(n, 10**6 * n, 10**6 * n + 5000)) for n in (2, 32, 256)))


def test_activations_between_and_beyond_the_traced_ones():
    for micro_batch in (1, 2, 16, 32, 100, 512):
        assert LINEAR.of(micro_batch) == Activations(micro_batch, 10**6 * micro_batch, 10**6 * micro_batch + 5000)


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_a_line_is_close_to_a_trace_and_no_less(size):
    """At base size with the kernels of a GPU, traced on the CPU."""
    config = resolve(["pretrain", f"size={size}", "engine.micro_batch=16"])
    found = trace_activations(on_gpu(config, config.data.max_text_length, 80), True)
    line = trace_passes(config, 80, True).of(16)
    assert line.kept == pytest.approx(found.kept, rel=1e-3)
    assert found.peak <= line.peak <= 1.05 * found.peak


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        (["engine.global_batch=48", "engine.micro_batch=2"], 4, [2, 4, 6, 12]),  # even: two pairs exchange pictures
        (
            ["engine.global_batch=48", "engine.micro_batch=1", "objectives.itm_negatives=dataset"],
            4,
            [1, 2, 3, 4, 6, 12],
        ),
        (["engine.global_batch=48", "engine.micro_batch=2"], 5, []),
        (["engine.global_batch=48", "engine.micro_batch=2"], 16, []),  # three pairs each
    ],
)
def test_micro_batches_are_those_that_the_trainer_takes(settings, processes, expected):
    config = override(resolve(["pretrain", "size=tiny"]), settings)
    assert micro_batches(config, processes) == expected
    for micro_batch in expected:
        assert accumulation(48, micro_batch, processes) * micro_batch * processes == 48
        override(config, [f"engine.micro_batch={micro_batch}"])  # is no contradiction


def test_the_largest_one_is_the_last_that_fits():
    config = resolve(["pretrain", "size=tiny", "engine.global_batch=4096"])
    sizes = sizes_of(config)

    def peak(micro_batch: int) -> int:
        return memory_of(with_engine(config, micro_batch=micro_batch), 8, sizes, LINEAR.of(micro_batch)).peak

    assert largest_micro_batch(config, 8, sizes, LINEAR, peak(64)) == 64
    assert largest_micro_batch(config, 8, sizes, LINEAR, peak(64) - 1) == 32
    assert largest_micro_batch(config, 8, sizes, LINEAR, 1e15) == 512
    assert largest_micro_batch(config, 8, sizes, LINEAR, peak(2) - 1) == 0


def test_every_stage_with_and_without_checkpointing():
    config, _, machine = read_arguments(["pretrain", "size=tiny", "engine.global_batch=4096", "memory=0.5"])
    half = Passes(tuple((n, replace(a, peak=a.peak // 2)) for n, a in LINEAR.traced))
    found = all_fits(config, machine, sizes_of(config), {False: LINEAR, True: half})
    assert [(fit.zero, fit.offload) for fit in found[:6]] == [
        (0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "cpu"), (3, "cpu")
    ]  # fmt: skip
    for without, on in zip(found[:6], found[6:], strict=True):
        assert (without.checkpointing, on.checkpointing) == (False, True)
        assert without.largest == 256 and on.largest == 512
        assert without.accumulated == 4096 // 8 // without.largest
        assert without.fits and without.memory.peak > on.memory.peak
    offloaded = next(fit for fit in found if fit.offload == "cpu")
    assert offloaded.memory.on_host > 0


def test_a_file_of_ones_own_goes_with_its_stage_alone(tmp_path):
    config = override(resolve(["pretrain", "size=tiny"]), [f"engine.ds_config={tmp_path / 'own.json'}"])
    assert with_engine(config, micro_batch=8).engine.ds_config
    assert not with_engine(config, zero=1).engine.ds_config
    assert not with_engine(config, offload="cpu").engine.ds_config
