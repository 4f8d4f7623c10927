"""What a recorded Triton launch becomes on a GPU, without one: compiled ahead of time, and its resources read.

with recording("sm_90") as launches:
    REGISTERED["cls_cross_attention"].forwards["triton"](*tensors on "meta", True)
resources = compile_launch(launches[0], "sm_90")
"""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from crossvit_kernels.triton_kernels.launch import Launch

# Shared memory of a block (at most) and of a multiprocessor, in bytes, and a multiprocessor's threads: CUDA C++
# Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
_SHARED_OF_MULTIPROCESSOR = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
_THREADS, _BLOCKS, _REGISTERS, _RESERVED_SHARED = 2048, 32, 65536, 1024

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
_PRODUCT = r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+> ->"
_MATRIX = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}


@dataclass(frozen=True)
class Resources:
    """What the compiler says of a kernel: registers of a thread, bytes of its stack (spills lie there), bytes of shared
    memory of a block, warps, how often the PTX holds each kind of matrix instruction, and the (rows, inner, columns) of
    the products that the source asks for."""

    registers: int
    stack: int
    shared: int
    num_warps: int
    matrix: dict[str, int]
    products: list[tuple[int, int, int]]
    architecture: str

    @property
    def blocks_per_multiprocessor(self) -> int:
        """How many blocks are resident at once."""
        threads = 32 * self.num_warps
        per_warp = -(-self.registers * 32 // 256) * 256
        by_shared = _SHARED_OF_MULTIPROCESSOR[self.architecture] // (self.shared + _RESERVED_SHARED)
        return min(_BLOCKS, _THREADS // threads, _REGISTERS // (per_warp * self.num_warps), by_shared)

    @property
    def occupancy(self) -> float:
        """Resident threads over the most there can be."""
        return self.blocks_per_multiprocessor * 32 * self.num_warps / _THREADS


def compile_launch(launch: Launch, architecture: str) -> Resources:
    """Compiles what `launch` would run on `architecture` ("sm_80", "sm_90", "sm_100"), specialised as a run is."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    divisible: list[tuple[int, ...]] = []

    def kind(value: Any, path: tuple[int, ...], constexpr: bool = False) -> Any:
        """Of an argument at this place: its type, or of a tuple those of its fields."""
        if isinstance(value, tuple):
            return type(value)(*(kind(field, (*path, i)) for i, field in enumerate(value)))
        found = "constexpr" if constexpr else _kind(value)
        if found == "constexpr":
            constants[path] = value
        elif _divisible(value):
            divisible.append(path)
        return found

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        signature[parameter.name] = kind(value, (i,), parameter.is_constexpr)
    key = (tuple(signature.items()), tuple(constants.items()), tuple(divisible))
    return _compile(launch.kernel, *key, launch.num_warps, launch.num_stages, architecture)


@functools.cache
def _compile(
    kernel: Any, signature: tuple, constants: tuple, divisible: tuple, num_warps: int, num_stages: int, target: str
) -> Resources:
    source = ASTSource(
        kernel,
        dict(signature),
        constexprs=dict(constants),
        attrs={path: [["tt.divisibility", 16]] for path in divisible},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)
    ptx = compiled.asm["ptx"]
    return Resources(
        **_usage(compiled.asm["cubin"]),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        matrix={name: len(re.findall(pattern, ptx)) for name, pattern in _MATRIX.items()},
        products=sorted({tuple(map(int, found)) for found in re.findall(_PRODUCT, compiled.asm["ttir"])}),
        architecture=target,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    (registers,), (stack,) = re.findall(r"REG:(\d+)", text), re.findall(r"STACK:(\d+)", text)
    return {"registers": int(registers), "stack": int(stack)}


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _divisible(value: Any) -> bool:
    """Whether a run would know that this argument is a multiple of 16."""
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0
