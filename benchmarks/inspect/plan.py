"""What the GPU kernels of an op will do, from shapes and compiled code alone: computed, not measured.

python -m benchmarks.ops --plan [--kernels triton,cuda] [--op all] [--batch 256] [--dtype bfloat16] [--backward]
    [--architecture sm_90]

For each op and size: its launches with their grids, registers, shared memory and occupancy; the bytes of every tensor
that a launch takes (of the CUDA kernels: a call takes, gives and needs in between), each counted once; the
floating-point operations; and the time that a GPU which copies BANDWIDTH and multiplies RATE cannot beat.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from triton.tools.tensor_descriptor import TensorDescriptor

from crossvit_kernels import backends, triton_kernels
from crossvit_kernels.dispatch.op import REGISTERED
from crossvit_kernels.dispatch.register import OPS
from crossvit_kernels.triton_kernels.launch import Launch, recording

from .. import timing
from ..cases import Cell
from ..session import dtype_name
from . import cuda_plan
from .compiled import Resources, compile_launch

BANDWIDTH = 4.3e12  # bytes per second, read plus written: an H200's copy
RATE = 790e12  # floating-point operations per second: an H200's bfloat16 matrix product
_RATE_OF_WIDTH = {2: 1.0, 4: 0.5}  # TF32 runs at half the rate of 16-bit numbers


@dataclass(frozen=True)
class Plan:
    """The launches of one op on inputs of one size."""

    cell: Cell
    launches: list[Launch]
    flops: int

    @property
    def moved(self) -> int:
        """Bytes of all tensors of all launches, one that several launches take counted for each."""
        return sum(size for launch in self.launches for size in tensor_bytes(launch).values())


def least_seconds(cell: Cell, moved: int, flops: int) -> float:
    """What a GPU of BANDWIDTH and RATE could not beat."""
    return max(moved / BANDWIDTH, flops / (RATE * _RATE_OF_WIDTH[cell.dtype.itemsize]))


def tensor_bytes(launch: Launch) -> dict[str, int]:
    """The bytes of every tensor among a launch's arguments, one that is given twice counted once."""
    given: dict[str, Any] = {}
    for name, value in launch.arguments.items():
        name = re.sub("_(ptr|tiles)$", "", name)
        fields = value._asdict() if isinstance(value, tuple) else {"base": value}
        given |= {name if field == "base" else f"{name}_{field}": v for field, v in fields.items()}
    given = {name: v.base if isinstance(v, TensorDescriptor) else v for name, v in given.items()}
    tensors = {id(v): (n, v) for n, v in reversed(given.items()) if isinstance(v, Tensor)}
    return {n: v.numel() * v.element_size() for n, v in reversed(tensors.values())}


def arguments(cell: Cell, autocast: bool = False, device: str = "meta") -> list[Any]:
    """The op's inputs as its dispatcher op takes them, tensors without memory ("meta"); with `autocast` only the
    operands of products are of the cell's dtype."""
    matrices = [OPS[cell.op].inputs[i] for i in OPS[cell.op].matrices]
    values: dict[str, Any] = {"num_heads": cell.sizes.heads, "eps": 1e-6, "gelu_in": False, "gelu_out": False}
    values["per_sample"] = False
    values["height"] = values["width"] = cell.sizes.image
    for name, shape in cell.shapes().items():
        if name == "patches":  # a view behind the CLS token, as in the model
            shape = (shape[0], shape[1] + 1, shape[2])
        dtype = torch.float32 if autocast and name not in matrices else cell.dtype
        tensor = torch.empty(shape, dtype=dtype, device=device)
        values[name] = tensor[:, 1:] if name == "patches" else tensor
    return [values.get(name) for name in OPS[cell.op].inputs]


def record(cell: Cell, architecture: str, autocast: bool = False) -> Plan:
    """The launches of the op's forward, or of its forward for training and its backward, on `architecture`."""
    op, kernels = OPS[cell.op], REGISTERED[cell.op]
    inputs = arguments(cell, autocast)
    with recording(architecture) as launches:
        result = kernels.forwards["triton"](*inputs, cell.backward)
        flops = op.flops("triton", *inputs)
        if cell.backward:
            out, *saved = result if isinstance(result, tuple) else (result,)
            kept = [inputs[i] for i in op.kept]
            tensors = [op.inputs[i] for i in op.kept if i in op.tensors]
            wanted = [name in cell.differentiable() for name in tensors]
            given = [torch.empty_like(out), *kept, *([out] if op.takes_out else []), *saved]
            kernels.backwards["triton"](*given, wanted)
            assert op.backward_flops is not None
            flops += op.backward_flops("triton", dict(zip(tensors, wanted)), *inputs)
    return Plan(cell, launches, flops)


def served(op: str, kernels: str = "triton") -> bool:
    """Whether there are such kernels for `op`; torch's own attention serves self_attention on a GPU."""
    return op in triton_kernels.SERVED if kernels == "triton" else backends.serves(kernels, op)


def show(
    cells: Sequence[Cell],
    architectures: Sequence[str],
    json: Path | None,
    autocast: bool = False,
    kernels: Sequence[str] = ("triton", "cuda"),
) -> None:
    """Prints the plan of every cell, compiled for each of the architectures; with `json` also writes a row a launch."""
    if "cuda" in kernels and (why := cuda_plan.missing()) is not None:
        print(f"No plan of the CUDA kernels: {why}")
        kernels = [name for name in kernels if name != "cuda"]
    plans = [
        (name, cell, architecture)
        for cell in cells
        for architecture in architectures
        for name in kernels
        if served(cell.op, name) and (not cell.backward or served(f"{cell.op}_backward", name))
    ]
    rates = f"{BANDWIDTH / 1e12:.1f} TB/s and {RATE / 1e12:.0f} TFLOP/s"
    print(f"Computed from shapes and compiled code, not measured; the least time is at {rates}.")
    print("Bytes: every tensor of a launch once; what several of its programs read comes from the L2 cache but once.")
    rows: list[dict[str, Any]] = []
    for name, cell, architecture in tqdm(plans, desc="compiling", unit="op", leave=False, disable=None):
        if name == "cuda":
            rows += _cuda(cell, architecture, autocast)
        else:
            plan = record(cell, architecture, autocast)
            compiled = [compile_launch(launch, architecture) for launch in plan.launches]
            tqdm.write(_text(plan, compiled, architecture))
            rows += [_row(plan, launch, resources) for launch, resources in zip(plan.launches, compiled)]
        if json is not None:
            timing.write_json(json, rows)


def _cuda(cell: Cell, architecture: str, autocast: bool) -> list[dict[str, Any]]:
    """Prints the plan of the CUDA kernels; its rows, a launch each."""
    op, inputs = OPS[cell.op], arguments(cell, autocast, "cpu")
    call = cuda_plan.call(cell, inputs)
    flops = op.flops("cuda", *inputs)
    if cell.backward:
        tensors = [op.inputs[i] for i in op.kept if i in op.tensors]
        assert op.backward_flops is not None
        flops += op.backward_flops("cuda", {name: name in cell.differentiable() for name in tensors}, *inputs)
    # What a call makes for itself is written once and read once.
    moved = sum(call.tensors.values()) + 2 * call.scratch
    lines = [_head("cuda", cell, architecture, len(call.launches), moved, flops)]
    rows = []
    for launch in call.launches:
        resources = cuda_plan.resources(launch, architecture)
        lines.append(_resources(launch.name, launch.grid, resources))
        rows.append(
            _common("cuda", cell, launch.name, launch.grid, resources)
            | {"bytes": call.tensors, "scratch": call.scratch, "moved": moved, "precision": None}
        )
    tensors = ", ".join(f"{name} {_size(size)}" for name, size in call.tensors.items())
    tqdm.write("\n".join([*lines, f"      {tensors}; in between {_size(call.scratch)}"]))
    return rows


def _row(plan: Plan, launch: Launch, resources: Resources) -> dict[str, Any]:
    return _common("triton", plan.cell, launch.name, launch.grid, resources) | {
        "bytes": tensor_bytes(launch),
        "precision": launch.arguments.get("PRECISION"),
    }


def _common(kernels: str, cell: Cell, kernel: str, grid: tuple[int, ...], resources: Resources) -> dict[str, Any]:
    return {
        "kernels": kernels,
        "op": cell.op,
        "branch": cell.branch,
        "batch": cell.batch,
        "dtype": dtype_name(cell.dtype),
        "mode": cell.mode,
        "kernel": kernel,
        "grid": grid,
        **dataclasses.asdict(resources),
        "blocks_per_multiprocessor": resources.blocks_per_multiprocessor,
        "occupancy": resources.occupancy,
        "measured": False,
    }


def _text(plan: Plan, compiled: Sequence[Resources], architecture: str) -> str:
    head = _head("triton", plan.cell, architecture, len(plan.launches), plan.moved, plan.flops)
    return "\n".join([head, *map(_line, plan.launches, compiled)])


def _head(kernels: str, cell: Cell, architecture: str, launches: int, moved: int, flops: int) -> str:
    branch = cell.sizes
    return (
        f"\n{kernels}: {cell.op}, {cell.branch} branch ({branch.tokens} × {branch.width}), batch {cell.batch}, "
        f"{dtype_name(cell.dtype)}, {cell.mode}, {architecture}: {launches} launches, {moved / 1e6:.2f} MB, "
        f"{flops / 1e9:.2f} GFLOP, at least {1e6 * least_seconds(cell, moved, flops):.1f} µs"
    )


def _line(launch: Launch, resources: Resources) -> str:
    moved = ", ".join(f"{name} {_size(size)}" for name, size in tensor_bytes(launch).items())
    return f"{_resources(launch.name, launch.grid, resources)}\n      {moved}"


def _resources(kernel: str, grid: tuple[int, ...], resources: Resources) -> str:
    matrix = ", ".join(f"{count} {name}" for name, count in resources.matrix.items() if count) or "no matrix units"
    spills = f", {resources.stack} B OF STACK" if resources.stack else ", no spills"
    blocks = " × ".join(map(str, grid))
    return (
        f"  {kernel}: grid {blocks}, {32 * resources.num_warps} threads, {resources.registers} registers{spills}, "
        f"{resources.shared / 1024:.0f} KB shared, occupancy {resources.occupancy:.0%}, {matrix}"
    )


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
