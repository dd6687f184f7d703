"""What the shipped kernels need of an A100 and an H100, from their machine code, in a process where Triton compiles.

That process is this file run as a program: it prints costs as JSON, of the shipped kernels and of samples with faults.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]


@triton.jit
def product(x, y, out, depth, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, depth, 64):
        k = start + tl.arange(0, 64)
        a = tl.load(x + m[:, None] * depth + k[None, :])
        b = tl.load(y + k[:, None] * N + n[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out + m[:, None] * N + n[None, :], total)


def samples() -> dict:
    """One kernel without fault and one with each: tile, dtype, precision, warps, stages."""
    wanted = {
        "sound": (64, torch.bfloat16, "tf32", 4, 3),
        "spills": (128, torch.bfloat16, "tf32", 1, 1),
        "too much shared memory": (64, torch.bfloat16, "tf32", 4, 20),
        "without matrix instructions": (32, torch.float32, "ieee", 4, 2),
    }

    def case(tile: int, dtype: torch.dtype, precision: str, warps: int, stages: int) -> None:
        x, y = (torch.empty(size, dtype=dtype, device="meta") for size in ((tile, 1024), (1024, tile)))
        out = torch.empty(tile, tile, device="meta")
        product[(1,)](x, y, out, 1024, tile, tile, precision, num_warps=warps, num_stages=stages)

    return {name: lambda capability, args=args: case(*args) for name, args in wanted.items()}


if __name__ == "__main__":
    from benchmarks.kernel_launches import launches
    from benchmarks.kernel_static import costs

    cases = {"samples": samples(), "shipped": launches(quick=True)}[sys.argv[1]]
    found = [{"case": name, "problems": c.problems, **asdict(c)} for name, c in costs(cases, (80, 90))]
    print(json.dumps(found, default=str))


def compiled(what: str) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    program = [sys.executable, __file__, what]
    result = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_each_fault_is_found() -> None:
    found = compiled("samples")
    for cost in found:
        assert cost["constants"]["M"] in (32, 64, 128)
        for fault, word in {
            "spills": "spills",
            "too much shared memory": "shared memory",
            "without matrix instructions": "without",
        }.items():
            assert any(word in problem for problem in cost["problems"]) == (cost["case"] == fault), cost
    assert {(cost["case"], cost["capability"]) for cost in found} == {(name, c) for name in samples() for c in (80, 90)}
    sound = {cost["capability"]: cost for cost in found if cost["case"] == "sound"}
    # a warp's HMMA.16816 multiplies 16 x 8 x 16, four warps' HGMMA.64x64x16 the whole tile at a depth of 16
    assert sound[80]["matrix"] == {"HMMA": 64 * 64 * 64 // (16 * 8 * 16) // 4}
    assert sound[90]["matrix"] == {"HGMMA": 4}
    assert all(cost["asynchronous"] > 0 and set(cost["accesses"]) == {"128"} for cost in sound.values())


# Registers, shared memory, warps: blocks that NVIDIA's occupancy calculator gives.
@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "blocks"),
    [
        (80, 56, 0, 4, 9),
        (80, 32, 0, 4, 16),
        (80, 255, 0, 8, 1),
        (80, 128, 81 * 1024, 4, 2),
        (80, 32, 164 * 1024, 4, 0),
        (90, 32, 164 * 1024, 4, 1),
        (90, 16, 0, 1, 32),
    ],
)
def test_blocks_per_sm(capability: int, registers: int, shared: int, warps: int, blocks: int) -> None:
    from benchmarks.kernel_static import LIMITS, blocks_per_sm

    assert blocks_per_sm(LIMITS[capability], registers, shared, warps) == blocks


@pytest.fixture(scope="module")
def shipped() -> list[dict]:
    return compiled("shipped")


def problems(costs: list[dict]) -> list[tuple]:
    return [(c["case"], c["kernel"], c["capability"], c["problems"]) for c in costs if c["problems"]]


@pytest.mark.slow
def test_shipped_kernels_fit(shipped: list[dict]) -> None:
    # two directions, passes, GPUs: two texts with head size 64, one with 128
    assert sum(cost["has_dot"] for cost in shipped) == 24
    kernels = {"_forward", "_backward", "_column_log_sums", "_cross_entropy"}
    for capability in (80, 90):
        assert kernels <= {cost["kernel"] for cost in shipped if cost["capability"] == capability}
    assert not problems(shipped)
