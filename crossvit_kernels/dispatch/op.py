"""An op that is registered: its kernels by backend, and which of them serve a call."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import backends
from ..triton_kernels import triton_kernel
from . import reference
from .fit import Fitting, fit
from .native import native_kernel
from .spec import OpSpec

# The backends before which a dispatcher op's arguments are looked at here.
CHECKED = frozenset({"reference", "triton"})

REGISTERED: dict[str, "Op"] = {}
"""{name: the op}"""


class Op:
    """The kernels of an op whose dispatcher ops are defined, in tables by backend.

    forwards: (*inputs, save) -> (out, *saved), or out alone where the op saves nothing.
    backwards: (grad_out, *inputs that it sees, *saved, needs) -> the gradients that are needed. The CPU's take one more
        argument: whether the parameters' gradients are to be float32, in which they are summed.
    """

    def __init__(self, spec: OpSpec) -> None:
        name, strided = spec.name, [spec.inputs[i] for i in spec.activations]
        given = [*spec.inputs, "save"]
        self.spec, self.dispatched = spec, spec.op
        self.forwards: dict[str, Callable] = {
            "reference": lambda *args: reference.forward(spec, args[:-1], args[-1]),
            "triton": triton_kernel(name, "forward", given),
            **{b: native_kernel(b, name, given, strided) for b in ("cpu", "cuda")},
        }
        if spec.save is not None:
            given = ["grad_out", *(spec.inputs[i] for i in spec.kept), *spec.backward_saved, "needs"]
            self.backward_dispatched = spec.backward_op
            self.fitting = Fitting(spec)
            self.backwards: dict[str, Callable] = {
                "reference": lambda *args: reference.backward(spec, args),
                "triton": triton_kernel(name, "backward", given),
                **{
                    b: native_kernel(b, f"{name}_backward", [*given, "wide"], ["grad_out", *strided])
                    for b in ("cpu", "cuda")
                },
            }
        REGISTERED[name] = self

    def backend(self, inputs: Sequence[Any], kernels: str, suffix: str = "") -> str:
        """The backend that serves these inputs, of the forward or, by its suffix, of the backward."""
        spec = self.spec
        for i in spec.activations:
            if inputs[i].numel() == 0:
                return "reference"
        compute = inputs[spec.compute]
        name = backends.resolve(kernels, compute.device, compute.dtype, spec.name + suffix)
        return name if name not in spec.fits or spec.fits[name](*inputs) else "reference"

    def forward(self, inputs: Sequence[Any], save: bool, kernels: str) -> Any:
        """The forward, for arguments that were validated."""
        return self.forwards[self.backend(inputs, kernels)](*inputs, save)

    def forward_checked(self, *args: Any) -> Any:
        """The forward, for the arguments of its dispatcher op, at which nobody may have looked."""
        *inputs, save, kernels = args
        backend = self.backend(inputs, kernels)
        if backend in CHECKED:
            fit(self.spec, inputs)
        return self.forwards[backend](*inputs, save)

    def backward(self, *args: Any, wide: bool = False) -> list[Tensor]:
        """The backward, for the arguments of its dispatcher op. wide: whether the parameters' gradients are to be
        float32, in which they are summed, where the backend can leave them so."""
        *given, kernels = args
        _, inputs, saved, needs = self.spec.split(given)
        backend = self.backend(inputs, kernels, "_backward")
        if backend in CHECKED:
            self.fitting(given)
            seen = given[: 1 + len(self.spec.kept)]
            given = [*seen, *(t.contiguous() for t in saved), needs]  # kernels take what was saved as it was made
        return self.backwards[backend](*given, *((wide,) if backend == "cpu" else ()))
