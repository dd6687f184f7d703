"""Operations of a step, counted from shapes, against a real step; and a whole plan."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meter_fast.cli import main
from meter_fast.config import override
from meter_fast.flops import FORMULAS
from meter_fast.plan import make_plan
from meter_fast.plan.page import lines
from meter_fast.plan.step import on_gpu, step_cost
from meter_fast.recipes import resolve
from meter_fast.training.activations import largest_batch
from meter_fast.training.tasks import task_of

CASES = {
    "pretrain": [],
    "published negatives": ["objectives.itm_negatives=dataset"],
    "vqa": ["model.vqa_answers=50"],
    "nlvr2": [],
    "retrieval_coco": ["objectives.false_texts=3"],
    "caption": [],
}


def configuration(case: str):
    recipe = "pretrain" if case == "published negatives" else case
    words = [*CASES[case], "engine.micro_batch=2", "engine.global_batch=16", "engine.dtype=fp32"]
    return override(resolve([recipe, "size=tiny"]), words)


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_of_a_real_step(case):
    """A model with values on the CPU, both passes, counted by torch."""
    config = configuration(case)
    kernels = on_gpu(config, 13, 80).kernels
    plain = dict.fromkeys(("cross_attention", "mlm_loss", "residual_norm", "gelu"), "reference")
    real = override(config, ["data.max_text_length=13", f"kernels.cross_attention_form={kernels.cross_attention_form}"])
    real = override(real, [f"kernels.{name}={value}" for name, value in {**plain, "text": "padded"}.items()])
    task = task_of(config.objectives.names)
    module = task.module(task.make(real, False), real).train()
    batch, totals = largest_batch(real), dict.fromkeys(config.objectives.names, 1.0)

    def counted(checkpointing: bool) -> int:
        module.model.set_activation_checkpointing(checkpointing)
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with sdpa_kernel(SDPBackend.MATH), counter:
            module(batch, totals).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)
        return counter.get_total_flops()

    cost = step_cost(config, 13, 80)
    assert cost.flops * 2 == counted(False) > 0
    assert cost.checkpointed * 2 == counted(True) > counted(False)
    assert cost.forward < cost.flops / 2
    assert cost.pictures == {"published negatives": 1.5, "nlvr2": 2}.get(case, 1)


def test_longer_texts_take_more():
    config = configuration("pretrain")
    assert step_cost(config, 20, 80).flops > step_cost(config, 10, 80).flops
    assert step_cost(config, 1000, 80) == step_cost(config, config.data.max_text_length, 80)


def test_kernels_are_those_of_the_gpu():
    """At base size the absorbed form pays for 13 tokens on both, for 24 on an A100 alone, for 50 on neither."""
    config = resolve(["pretrain"])
    forms = {(n, arch): on_gpu(config, n, arch).kernels.cross_attention_form for n in (13, 24, 50) for arch in (80, 90)}
    assert forms == {
        (13, 80): "absorbed", (13, 90): "absorbed", (24, 80): "absorbed", (24, 90): "direct", (50, 80): "direct",
        (50, 90): "direct",
    }  # fmt: skip
    assert on_gpu(config, 13, 80).kernels.cross_attention == "triton"
    merged = resolve(["pretrain", "fusion=merged_attention"])
    assert on_gpu(merged, 13, 80).kernels.cross_attention == "reference"


@pytest.fixture(scope="module")
def plan():
    torch.manual_seed(0)
    return make_plan(["pretrain", "size=tiny", "nodes=2", "gpus_per_node=2", "engine.global_batch=256", "samples=5000"])


def test_a_plan_agrees_with_itself(plan):
    assert sum(plan["parameters"]["parts"].values()) == plan["parameters"]["total"]
    model = task_of(("mlm", "itm")).make(resolve(["pretrain", "size=tiny"]), False)
    assert plan["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert plan["flops"]["step"] == pytest.approx(256 * plan["flops"]["sample"])
    assert plan["flops"]["step_per_gpu"] == pytest.approx(64 * plan["flops"]["sample"])
    assert plan["batch"] == {"global": 256, "micro": 32, "accumulated": 2}
    assert len(plan["memory"]) == 12 and all(row["fits"] for row in plan["memory"])
    chosen = plan["communication"][plan["engine"]["zero"]]
    assert chosen["step_seconds"] == plan["time"]["step"]
    assert plan["time"]["run"] == pytest.approx(4000 * plan["time"]["step"])
    data = plan["data"]
    assert data["pictures_per_second"] * 2 == pytest.approx(plan["time"]["samples_per_second"])
    assert data["bytes_per_second"] == pytest.approx(data["pictures_per_second"] * 150_000)
    here = next(row for row in plan["nodes"] if row["nodes"] == 2)
    assert (here["micro_batch"], here["accumulated"]) == (64, 1)
    assert [row["nodes"] for row in plan["nodes"] if not row["micro_batch"]] == [128, 256]
    test = plan["retrieval"]
    assert test["total"] == pytest.approx(test["pair"] * 5000 * 25010)


def test_the_page_shows_every_section(plan):
    text = "\n".join(lines(plan))
    words = ("note:", "parameters", "FLOPs", "memory of a GPU", "with activation checkpointing", "communication of")
    for word in (*words, "reduce-scatter", "samples/s", "100,000 steps", "MB/s", "test of 5,000 pictures", "waiting"):
        assert word in text
    assert max(map(len, text.splitlines())) < 200


def test_the_command_writes_json_and_chart(tmp_path, capsys):
    words = [
        "plan",
        "nlvr2",
        "size=tiny",
        "gpus_per_node=1",
        f"out={tmp_path / 'plans'}",
        "--json",
        str(tmp_path / "p"),
    ]
    assert main(words) == 0
    assert "parameters" in capsys.readouterr().out
    plan = json.loads((tmp_path / "p").read_text())
    assert plan["data"]["pictures_per_sample"] == 2 and plan["retrieval"] is None
    assert plan["time"]["steps"] == -(-86_373 * 1 // plan["batch"]["global"])
    assert (tmp_path / "plans" / "nodes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "size=tiny", "nodes=3"], "is not a multiple of 768"),
        (["pretrain", "size=tiny", "gpu=h100"], "did you mean h100-80g?"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(words, message, capsys):
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.strip().count("\n") == 0
