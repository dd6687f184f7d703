"""The arguments of a plan: figures by name, what replaces them, and messages that name the nearest."""

import pytest

from meter_fast.config import ConfigError
from meter_fast.plan.machine import GPUS, LINKS
from meter_fast.plan.options import read_arguments


def machine(*words: str):
    return read_arguments(["pretrain", "size=tiny", *words])[2]


def test_a_gpu_by_name_with_the_usual_links():
    for name, gpu in GPUS.items():
        found = machine(f"gpu={name}", "headroom=0")
        assert (found.memory, found.peak, found.in_node) == (1e9 * gpu.memory, gpu.bf16, gpu.in_node)
        assert found.usable == found.memory and found.link == LINKS[gpu.link]
    assert machine("engine.dtype=fp32").peak == GPUS["a100-80g"].fp32


def test_figures_of_ones_own():
    found = machine(
        "memory=24", "tflops=71", "bandwidth=936", "in_node=pcie4", "link=1.5", "nodes=3", "gpus_per_node=2"
    )
    assert (found.memory, found.peak, found.bandwidth) == (24e9, 71e12, 936e9)
    assert (found.in_node, found.link, found.gpus) == (31.5e9, 1.5e9, 6)
    assert found.usable == pytest.approx(0.92 * 24e9)


def test_settings_of_recipe_and_run_are_the_runs():
    config, options, _ = read_arguments(["vqa", "published=true", "size=tiny", "engine.zero=1", "tokens=9"])
    assert config.data.sources == ("vqa",) and config.engine.zero == 1 and options.tokens == 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrian"], "did you mean pretrain?"),
        (["pretrain", "gpus=8"], "unknown argument 'gpus': did you mean gpu"),
        (["pretrain", "node=8"], "unknown argument 'node': did you mean nodes?"),
        (["pretrain", "visoin=swin_b_384"], "did you mean vision?"),
        (["pretrain", "engine.zer=1"], "did you mean engine.zero"),
        (["pretrain", "gpu=a100-80"], "gpu=a100-80: did you mean a100-80g?"),
        (["pretrain", "link=8x200gb"], "link=8x200gb: did you mean 8x200gbit?"),
        (["pretrain", "link=-3"], "or GB/s each way"),
        (["pretrain", "in_node=nvlink"], "did you mean nvlink3?"),
        (["pretrain", "nodes=0"], "nodes=0: 1 or more"),
        (["pretrain", "nodes=two"], "nodes=two: expected a whole number"),
        (["pretrain", "efficiency=40"], "efficiency=40.0: a share"),
        (["pretrain", "headroom=1"], "headroom=1.0"),
        (["pretrain", "tokens=1"], "at least 3 tokens"),
        (["pretrain", "nodes"], "key=value"),
        (["image_tokenizer", "size=tiny"], "plan is about METER models"),
        ([], "name a recipe first"),
    ],
)
def test_wrong_arguments_name_the_nearest(words, message):
    with pytest.raises(ConfigError) as error:
        read_arguments(words)
    assert message in str(error.value)
