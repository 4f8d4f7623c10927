"""How much memory a model takes beyond its weights: the peak of a fresh process over what it held before it was called.

    python -m benchmarks.memory --model crossvit_15_dagger_240 --implementation auto --mode train

prints one JSON row. Linux only: the peak is the kernel's own (VmHWM, reset by /proc/self/clear_refs). The allocator
gives memory back at once here: what it would keep in pieces between tensors is a matter of their order, not of the
model.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import crossvit
from crossvit.models.variants import VARIANTS

from . import peers, timing
from .labels import backend
from .session import DTYPES, KERNELS, names
from .training import TrainingStep

MODELS = [name for name in crossvit.list_models() if timm.is_model(name) and not VARIANTS[name].single_branch]
IMPLEMENTATIONS = (*KERNELS, "timm-eager")
CALLS = 2  # the second training step meets the gradients and the optimizer's state of the first
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
RETURNED = 2**18  # bytes of an allocation, from which on it goes back when it is freed
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=names(MODELS), required=True)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--mode", choices=("inference", "train"), default="inference")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=240, help="its side")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for training autocast's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    for name in ("batch", "image", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    model = model_at(options.model[0], options.image, options.implementation)
    images, dtype = torch.rand(options.batch, 3, options.image, options.image) - 0.5, DTYPES[options.dtype]
    if options.mode == "train":
        peak = peak_bytes(TrainingStep(model, images, dtype))
    else:
        peak = peak_bytes(peers.inference(model.eval().to(dtype), images.to(dtype)))
    print(json.dumps(row_of(vars(options) | {"model": options.model[0]}) | {"peak_bytes": peak}))
    return 0


def row_of(cell: dict[str, Any]) -> dict[str, Any]:
    """What a row of figures says about where it comes from."""
    return {
        "model": cell["model"],
        "batch": cell["batch"],
        "image_size": cell["image"],
        "dtype": cell["dtype"],
        "mode": cell["mode"],
        "implementation": cell["implementation"],
        **backend(cell["implementation"], "cpu", DTYPES[cell["dtype"]]),
        "threads": cell["threads"],
        "device": timing.device_name(),
        "versions": timing.versions(),
    }


def model_at(name: str, side: int, implementation: str) -> torch.nn.Module:
    """Ours with these kernels, or timm's, float32, for images of this side.

    Every branch gets the side nearest to the model's own scale that its patches divide; of another timm's model would
    drop pixels, or fail.
    """
    arguments = VARIANTS[name].arguments
    sides = [
        max(1, round(side * scale / patch)) * patch
        for scale, patch in zip(arguments["img_scale"], arguments["patch_size"])
    ]
    # Half a pixel more, since timm cuts off what follows the point.
    scales = tuple(1.0 if own == side else (own + 0.5) / side for own in sides)
    if implementation == "timm-eager":
        return timm.create_model(name, img_size=side, img_scale=scales)
    return crossvit.create_model(name, image_size=side, img_scale=scales, kernels=implementation)


def peak_bytes(run: Any) -> int:
    """The most that CALLS calls of `run` hold over what the process held before, in bytes.

    Raises OSError where the kernel does not tell.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, RETURNED)
        libc.malloc_trim(0)  # memory that is free but kept would serve the first allocations unseen
    before = _status("VmRSS")
    CLEAR.write_text("5")
    for _ in range(CALLS):
        run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")


def start(cell: dict[str, Any]) -> subprocess.Popen[str]:
    """A process that measures `cell`: the options of the command, by name."""
    words = [word for name, value in cell.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its row; raises RuntimeError with the last line of what it said, where it failed."""
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError((err.strip().splitlines() or [f"it ended with {process.returncode}"])[-1])
    row: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return row


if __name__ == "__main__":
    sys.exit(main())
