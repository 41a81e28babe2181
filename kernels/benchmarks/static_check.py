"""Compile every Triton kernel for four GPUs without having one, and read what the compilers made of it.

    python kernels/benchmarks/static_check.py            all variants: operators, dtypes, head sizes, targets
    python kernels/benchmarks/static_check.py --smallest what `make test` runs

Prints registers, local memory, shared memory, tensor-core instructions and the occupancy that these allow.
Exits with 1 if a kernel takes more than 100 KB of shared memory or, with inputs of 16 bits, spills, uses
local memory or has no tensor-core instruction. In float32, kept for checks rather than speed, spills are
only shown.

A variant is a real launch on tensors without storage (device "meta"): the kernels' arguments are recorded
instead of run, so that what is inspected is what a GPU would get.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from medattn_kernels import _device
from medattn_kernels.axial import fused as fused_axial
from medattn_kernels.axial import kernel as axial_kernel
from medattn_kernels.block import fused as fused_block
from medattn_kernels.block import kernel as block_kernel
from medattn_kernels.crosscov import fused as fused_crosscov
from medattn_kernels.crosscov import kernel as crosscov_kernel
from medattn_kernels.lambdas import fused as fused_lambdas
from medattn_kernels.lambdas import kernel as lambda_kernel
from medattn_kernels.lambdas.pairs import kernel as pair_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
HEAD_SIZES = (8, 16, 32, 64)
SHARED_KB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # of a multiprocessor
MOST_SHARED = 100 * 1024
KERNELS = ("forward", "backward")  # how their names begin
WITHOUT_PRODUCTS = ("forward_cosines", "backward_logits")  # small steps between two passes


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    fn: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What a compiler made of a launch; local: bytes of stack and spills per thread."""

    registers: int
    local: int
    shared: int
    matrix: int
    threads: int
    target: str

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's threads that registers and shared memory let run at once."""
        if self.target == "gfx942":  # 4 SIMDs of 512 registers a lane and 8 waves, 64 KB
            waves = min(8, 512 // max(1, self.registers)) * 4
            by_shared = 64 * 1024 // max(1, self.shared) * (self.threads // 64)
            return min(waves, by_shared, 32) / 32
        blocks = min(
            65536 // max(1, _round_up(self.registers, 8) * self.threads),
            SHARED_KB[self.target] * 1024 // (self.shared + 1024),
            32,
        )
        return min(1.0, blocks * self.threads / 2048)

    def faults(self, fast: bool, products: bool) -> list[str]:
        """What must not be. fast: for inputs of 16 bits. products: meant for tensor cores."""
        found = []
        if fast and self.local:
            found.append(f"{self.local} bytes of local memory")
        if self.shared > MOST_SHARED:
            found.append(f"{self.shared} bytes of shared memory, at most {MOST_SHARED}")
        if fast and products and not self.matrix:
            found.append("no tensor-core instruction")
        return found


class Recorder:
    """Stands in for a kernel: `recorder[grid](...)` notes the arguments."""

    def __init__(self, fn: Any, found: list[Launch]) -> None:
        self.fn, self.found = fn, found

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.found.append(Launch(self.fn, args, options))

        return launch


@contextmanager
def recording(module: Any) -> Iterator[list[Launch]]:
    """Put recorders in the place of a module's kernels and collect their launches."""
    found: list[Launch] = []
    kernels = {name: fn for name, fn in vars(module).items() if name.startswith(KERNELS)}
    for name, fn in kernels.items():
        setattr(module, name, Recorder(fn, found))
    try:
        yield found
    finally:
        for name, fn in kernels.items():
            setattr(module, name, fn)


def axial_launches(dtype: torch.dtype, width: int, *, separate: bool = False) -> list[Launch]:
    """Position-sensitive axial attention on a 96^3 volume with 8 heads, values twice as wide as keys."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, v = empty(1, 96, 96, 96, 8, width), empty(1, 96, 96, 96, 8, 2 * width)
    tables = [empty(191, width), empty(191, width), empty(191, 2 * width)]
    gain = empty(3, 8)
    numbers = (1, 0, 1.0, separate)
    with recording(axial_kernel) as found:
        content, position, lse = fused_axial.run_forward(q, q, v, *tables, gain, *numbers)
        fused_axial.run_backward(content, position, q, q, v, *tables, gain, content, position, lse, *numbers)
    return found


def block_launches(
    dtype: torch.dtype,
    width: int,
    *,
    size: tuple[int, ...] = (96, 96, 96),
    block: int = 8,
    halo: int = 4,
    stride: int = 1,
    relative: bool = True,
    biased: bool = False,
) -> list[Launch]:
    """Blocks with a halo on a volume or image with 8 heads. stride: offsets count queries, as in timm's."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    axes, rows = len(size), 2 * (block + halo) - 1
    x = empty(1, *size, 8, width)
    tables = [empty(rows, width) if relative and a >= 3 - axes else None for a in range(3)]
    bias = empty(8, *[rows] * axes) if biased else None
    numbers = ([block] * axes, [halo] * 2 * axes, [stride] * axes, [1] * axes, 1.0, True)
    with recording(block_kernel) as found:
        out, norm = fused_block.run_forward(x, x, x, *tables, bias, *numbers)
        fused_block.run_backward(out, x, x, x, *tables, bias, out, norm, *numbers)
    return list({launch.fn: launch for launch in found}.values())  # the heads' turns are alike


def crosscov_launches(dtype: torch.dtype, width: int) -> list[Launch]:
    """Cross-covariance attention on a 96^3 volume with 8 heads."""
    x = torch.empty(1, 96, 96, 96, 8, width, dtype=dtype, device="meta")
    temperature = torch.empty(8, device="meta")
    with recording(crosscov_kernel) as found:
        out, cosine, norm = fused_crosscov.run_forward(x, x, x, temperature)
        fused_crosscov.run_backward(out, x, x, x, temperature, cosine, norm)
    return found


def lambda_launches(dtype: torch.dtype, width: int, *, pairs: bool = False) -> list[Launch]:
    """Lambda attention on a 96^3 volume: 4 heads of queries, values twice as wide as keys, a table of 7^3.

    pairs: queries first, values of at most 64, and without the kernels for the first lambda, which both
    orders share.
    """
    value_width = min(2 * width, 64) if pairs else 2 * width

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (empty(1, 96, 96, 96, *shape) for shape in ((4, width), (1, width), (1, value_width)))
    table = empty(7, 7, 7, 1, width)
    chosen = mock.patch.object(fused_lambdas, "queries_first_fused", return_value=pairs)
    with chosen, recording(lambda_kernel) as found, recording(pair_kernel) as by_pair:
        out, *statistics = fused_lambdas.run_forward(q, k, v, table)
        fused_lambdas.run_backward(out, q, k, v, table, *statistics)
    return by_pair or found


OPERATORS = {
    "axial": axial_launches,
    "axial separate": partial(axial_launches, separate=True),
    "block": block_launches,
    "block window": partial(block_launches, size=(56, 56), block=7, halo=0, relative=False, biased=True),
    "block single": partial(block_launches, size=(56, 56), block=1, halo=3),
    "block strided": partial(block_launches, size=(32, 32), block=8, halo=3, stride=2),
    "crosscov": crosscov_launches,
    "lambda": lambda_launches,
    "lambda pairs": partial(lambda_launches, pairs=True),
}
SMALLEST = [name for name in OPERATORS if name != "axial separate"]


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile a recorded launch as Triton would: ones become constants, multiples of 16 are hinted at."""
    names = launch.fn.arg_names
    values = dict(zip(names, launch.args, strict=False))
    options = dict(launch.options)
    values |= {name: options.pop(name) for name in list(options) if name in names}
    fixed = {p.name for p in launch.fn.params if p.is_constexpr}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(part, (*path, n)) for n, part in enumerate(value))
        if isinstance(value, Tensor):
            hints[path] = [["tt.divisibility", 16]]
            return POINTER[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for n, name in enumerate(names):
        if name in fixed:
            constants[(n,)] = values[name]
            signature[name] = "constexpr"
        else:
            signature[name] = kind(values[name], (n,))
    _device.PRECISION = tl.constexpr("ieee" if target.backend == "hip" else "tf32x3")
    source = ASTSource(launch.fn, signature, constants, hints)
    return triton.compile(source, target=target, options=options)


def inspect(compiled: Any, name: str) -> Report:
    """Read the numbers of a compiled kernel."""
    shared = int(compiled.metadata.shared)
    threads = int(compiled.metadata.num_warps) * TARGETS[name].warp_size
    if TARGETS[name].backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, local = (
            _number(text, rf"\.{name}:\s+(\d+)") for name in ("vgpr_count", "private_segment_fixed_size")
        )
        return Report(registers, local, shared, len(re.findall(r"\bv_s?mfma", text)), threads, name)
    usage = _nvidia_tool("cuobjdump", ["--dump-resource-usage"], compiled.asm["cubin"])
    code = _nvidia_tool("nvdisasm", ["-c"], compiled.asm["cubin"])
    local = _number(usage, r"STACK:(\d+)") + _number(usage, r"LOCAL:(\d+)")
    matrix = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", code))
    return Report(_number(usage, r"REG:(\d+)"), local, shared, matrix, threads, name)


def variants(smallest: bool) -> Iterator[tuple[str, str, int, Launch, str]]:
    """Operator, dtype, head size, launch and target of every check."""
    if smallest:
        for operator in SMALLEST:
            yield from ((operator, "bf16", 16, x, "sm_90") for x in OPERATORS[operator](torch.bfloat16, 16))
        return
    for operator, dtype, width in product(OPERATORS, DTYPES, HEAD_SIZES):
        for launch, target in product(OPERATORS[operator](DTYPES[dtype], width), TARGETS):
            yield operator, dtype, width, launch, target


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print a Markdown table, return 1 for faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smallest", action="store_true", help="one dtype, head size and target per kernel")
    smallest = parser.parse_args(argv).smallest
    print("| kernel | dtype | D | target | registers | local B | shared B | matrix instr. | occupancy |")
    print("|---|---|---|---|---|---|---|---|---|")
    faults = []
    for operator, dtype, width, launch, target in variants(smallest):
        name = f"{operator} {launch.fn.__name__}"
        report = inspect(compile_launch(launch, TARGETS[target]), target)
        print(
            f"| {name} | {dtype} | {width} | {target} | {report.registers} | {report.local} | "
            f"{report.shared} | {report.matrix} | {report.occupancy:.0%} |",
            flush=True,
        )
        found = report.faults(dtype != "fp32", launch.fn.__name__ not in WITHOUT_PRODUCTS)
        faults += [f"{name} {dtype} D={width} {target}: {fault}" for fault in found]
    print(*faults, sep="\n")
    return 1 if faults else 0


@cache
def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def _nvidia_tool(name: str, options: Sequence[str], binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run(
            [_tool(name), *options, file.name], check=True, capture_output=True, text=True
        ).stdout


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in the compiler's report")
    return int(found[1])


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


if __name__ == "__main__":
    sys.exit(main())
