"""What a Triton kernel needs of a GPU, read from its machine code on a machine without one. Knows no operators.

Launches are recorded instead of run: the launcher is called with meta tensors, Triton's own binder chooses the types
and specialisations as it would for the same tensors on the GPU, the compiler makes the cubin for a named capability,
and the disassembler of Triton's wheel gives its instructions. TRITON_INTERPRET must be unset: interpreted kernels are
not compiled. What stands here is counted, not timed.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Limits:
    """Of a streaming multiprocessor. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    name: str
    shared_per_sm: int
    shared_per_block: int
    reserved_per_block: int = 1024
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


LIMITS = {80: Limits("A100", 164 * 1024, 163 * 1024), 90: Limits("H100", 228 * 1024, 227 * 1024)}

MATRIX = re.compile(r"[A-Z]*MMA")  # HMMA, HGMMA of warp groups; IMMA, QGMMA ... of other types
ASYNCHRONOUS = re.compile(r"LDGSTS|UBLKCP|UTMALDG")  # cp.async, bulk copies, TMA
GLOBAL = re.compile(r"LDG|STG|LDGSTS|ATOMG|RED")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.a-z]+)", re.MULTILINE)
USAGE = re.compile(r"(REG|STACK|LOCAL|SHARED):(\d+)")


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, with everything that the compiler is told about it."""

    kernel: JITFunction
    target: GPUTarget
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    grid: tuple[int, ...]

    @property
    def key(self) -> str:
        """Equal for launches that run the same machine code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.kernel.__module__}.{self.kernel.__name__} {self.target} {parts}"

    def compile(self) -> CompiledKernel:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options)


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches made inside the block are listed, as for a GPU of that capability, and not run."""
    launches: list[Launch] = []
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)

    def record(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kwargs["debug"] = False
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        size = grid(bound) if callable(grid) else grid
        launches.append(Launch(kernel, target, signature, constants, attributes, vars(options), tuple(size)))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel needs. Sizes in bytes; instructions counted once wherever they stand, loops included."""

    kernel: str
    capability: int
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    blocks_per_sm: int
    instructions: int
    matrix: dict[str, int]  # kind of instruction -> how many: HGMMA multiplies faster than HMMA on an H100
    asynchronous: int
    has_dot: bool
    accesses: dict[int, int]  # bits of an access to global memory -> how many
    constants: dict[str, object]  # what the kernel is compiled for: tile sizes, dropout, ...

    @property
    def problems(self) -> list[str]:
        """What forbids to ship it."""
        limit = LIMITS[self.capability].shared_per_block
        return [
            *([f"spills {self.spilled} bytes"] if self.spilled else []),
            *([f"shared memory {self.shared} of {limit} bytes"] if self.shared > limit else []),
            *(["products without matrix instructions"] if self.has_dot and not self.matrix else []),
        ]


def cost(launch: Launch) -> Cost:
    compiled = launch.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _output("nvdisasm", "-c", file.name)
        usage = dict(USAGE.findall(_output("cuobjdump", "-res-usage", file.name)))
    names = INSTRUCTION.findall(code)
    kinds = Counter(name.split(".")[0] for name in names)
    metadata = compiled.metadata
    limits, registers = LIMITS[launch.target.arch], int(usage["REG"])
    return Cost(
        kernel=launch.kernel.__name__,
        capability=launch.target.arch,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=registers,
        spilled=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=metadata.shared,
        blocks_per_sm=blocks_per_sm(limits, registers, metadata.shared, metadata.num_warps),
        instructions=len(names),
        matrix={kind: n for kind, n in kinds.items() if MATRIX.fullmatch(kind)},
        asynchronous=sum(n for kind, n in kinds.items() if ASYNCHRONOUS.fullmatch(kind)),
        has_dot="tt.dot" in compiled.asm["ttir"],
        accesses=dict(Counter(_bits(name) for name in names if GLOBAL.fullmatch(name.split(".")[0]))),
        constants={p.name: launch.constants[p.num,] for p in launch.kernel.params if p.is_constexpr},
    )


def blocks_per_sm(limits: Limits, registers: int, shared: int, warps: int) -> int:
    """How many blocks of `warps` warps fit. Registers are given to a warp 256 at a time out of one of four files,
    shared memory 128 bytes at a time (CUDA occupancy calculator, compute capabilities 8.0 and 9.0)."""
    if shared > limits.shared_per_block:
        return 0
    warps_by_registers = 4 * (limits.registers // 4 // (triton.cdiv(32 * registers, 256) * 256))
    return min(
        limits.blocks,
        limits.warps // warps,
        warps_by_registers // warps,
        limits.shared_per_sm // (triton.cdiv(shared + limits.reserved_per_block, 128) * 128),
    )


def costs(cases: dict[str, Callable[[int], None]], capabilities: tuple[int, ...]) -> Iterator[tuple[str, Cost]]:
    """(name, cost) of each different kernel that the cases launch, each being called with a capability. A kernel that
    several cases share is listed with the first."""
    seen: set[str] = set()
    for capability in capabilities:
        for name, case in cases.items():
            with recorded(capability) as launches:
                case(capability)
            for launch in launches:
                if launch.key not in seen:
                    seen.add(launch.key)
                    yield name, cost(launch)


def _bits(name: str) -> int:
    """Width of an access to global memory by its suffix: LDG.E.128, STG.E.U16, LDG.E of 32 bits."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", name)
    return int(width[1]) if width else 32


def _output(tool: str, *args: str) -> str:
    return subprocess.run([BIN / tool, *args], check=True, capture_output=True, text=True).stdout
