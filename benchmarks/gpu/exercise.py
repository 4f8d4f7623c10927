"""Calls every op once on one backend, forward and backward: for compute-sanitizer, and to have its kernels compiled.

python -m benchmarks.gpu.exercise [--op all] [--sizes small|model] [--device cuda] [--kernels triton]

"small": sizes that tiles divide, and some that they do not; "model": CrossViT-15's, then whole models. Nothing is
timed; results have to be finite.
"""

import argparse
import functools
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import crossvit

from ..cases import BRANCHES, OPS, Branch, Cell, inputs
from ..devices import use
from ..session import KERNELS, add_device_arguments, check_device, names
from ..training import TrainingStep

SMALL = {"tiles": Branch(26, 96, 192, 12, 60), "no tiles": Branch(26, 66, 90, 9, 45)}
VARIANTS: dict[str, list[dict[str, str]]] = {
    "layer_norm_linear": [{}, {"activation": "gelu"}, {"pre_activation": "gelu"}]
}
MODELS = ("crossvit_15_dagger_240", "crossvit_9_240", "crossvit_base_240")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where a call failed or a result is not finite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.exercise", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", type=names(OPS, OPS), default=list(OPS), help=f"all, {', '.join(OPS)}")
    parser.add_argument("--sizes", choices=["small", "model"], default="small")
    parser.add_argument("--kernels", choices=KERNELS, default="triton")
    parser.add_argument("--model", type=names(MODELS, MODELS), default=list(MODELS), help="of --sizes model")
    add_device_arguments(parser)
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    device = use(options.device)
    BRANCHES.update(SMALL)  # the cells look their sizes up there
    failures = done = 0
    for what, call in _calls(options):
        try:
            bad = [name for name, tensor in call().items() if not tensor.isfinite().all()]
            failure = f"not finite: {', '.join(bad)}" if bad else None
        except Exception as error:
            traceback.print_exception(error)
            failure = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        done += 1
        if failure is not None:
            failures += 1
            print(f"{what}: {failure}", flush=True)
            if (lost := device.lost()) is not None:
                print(f"the device is lost: {lost}")
                return 1
    print(f"{done} calls, {failures} failed")
    return int(failures > 0)


def _calls(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """What is called, in words, and a call that gives its results by name."""
    small = options.sizes == "small"
    branches = [(name, torch.bfloat16) for name in (SMALL if small else ("small", "large"))]
    branches += [("no tiles", torch.float32)] if small else []
    threads = torch.get_num_threads()
    for op, (branch, dtype) in itertools.product(options.op, branches):
        for backward in (False, True)[: 1 + (op != "cls_fusion")]:
            for batch, variant in itertools.product((5,) if small else (1, 32, 256), VARIANTS.get(op, [{}])):
                cell = Cell(op, branch, batch, dtype, backward, threads, options.device)
                yield f"{cell} {variant or ''}", functools.partial(_op, cell, options.kernels, variant)
    if not small:
        for model in options.model:
            for train in (False, True)[: 1 + (model == MODELS[0])]:
                what = f"{model}, {'a training step' if train else 'inference'}"
                yield what, functools.partial(_model, model, options.kernels, options.device, train)


def _op(cell: Cell, kernels: str, variant: dict[str, str]) -> dict[str, Tensor]:
    """Output and gradients."""
    function, tensors = functools.partial(cell.function(kernels), **variant), inputs(cell, 0)
    if not cell.backward:
        with torch.inference_mode():
            return {"output": function(**tensors)}
    wanted = cell.differentiable()
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    out = function(**leaves)
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], torch.randn_like(out))
    return {"output": out.detach(), **dict(zip(wanted, gradients))}


def _model(name: str, kernels: str, device: str, train: bool) -> dict[str, Tensor]:
    """Logits of one and of many images in bfloat16, or gradients of a step under autocast."""
    model = crossvit.create_model(name, kernels=kernels).to(device)
    size = model.image_size
    if train:
        logits, gradients = TrainingStep(
            model, torch.randn(8, 3, *size, device=device), torch.bfloat16
        ).logits_and_gradients()
        return {"logits": logits, **gradients}
    model = model.eval().to(torch.bfloat16)
    with torch.inference_mode():
        return {
            f"logits of {batch}": model(torch.randn(batch, 3, *size, device=device, dtype=torch.bfloat16))
            for batch in (1, 32, 256)
        }


if __name__ == "__main__":
    sys.exit(main())
