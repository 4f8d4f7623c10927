"""Registers an op with PyTorch's dispatcher, once for all backends, so that autograd, autocast, torch.compile,
torch.export, ONNX and the FLOP counter see one node.

`Op` makes of an op's schema, shapes and reference two dispatcher ops,

    crossvit_kernels::<name>(inputs, bool save, str kernels) -> (out, saved...)
    crossvit_kernels::<name>_backward(grad_out, inputs, saved..., bool[] needs, str kernels) -> the gradients that are
    needed

whose implementations look the backend up when they run. `save` says whether a backward will come; without it the saved
tensors have no rows. Every backend saves the same tensors, so any backend's backward accepts any backend's forward.
"""

import functools
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import meta_table, register_decomposition
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from .. import backends
from ..triton import triton_kernel
from .autograd import AUTOCAST, VMAP, Differentiable, below_autograd, second_derivative
from .fit import Fitting, fit, fit_backward
from .native import native_kernel

LIBRARY = torch.library.Library("crossvit_kernels", "DEF")

# The backends before which the dispatcher ops look at their arguments here.
CHECKED = frozenset({"reference", "triton"})

Result = tuple[Sequence[int], torch.dtype]

_ORDINARY = {Tensor, Parameter, type(None)}

OPS: dict[str, "Op"] = {}

_KEY = torch._C.DispatchKey


def _keys(*keys: Any) -> Any:
    return functools.reduce(operator.or_, map(torch._C.DispatchKeySet, keys))


_AUTOGRAD = _keys(_KEY.AutogradFunctionality, _KEY.AutogradOther, _KEY.AutogradNestedTensor, _KEY.ADInplaceOrView)
_OBSERVERS = _keys(
    _KEY.Python,
    _KEY.PythonDispatcher,
    _KEY.PreDispatch,
    _KEY.FuncTorchDynamicLayerFrontMode,
    VMAP,
    _KEY.Functionalize,
).raw_repr()


def plain_call() -> bool:
    """Whether derivatives are not taken in ways that only plain PyTorch knows, and TorchScript does not trace."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


class Op:
    """An op of the package and, unless `save` is None, its backward.

    inputs          its arguments, in the schema language
    reference       (*inputs) -> out, in plain PyTorch
    shapes          (*inputs) -> the shapes that the tensors among them must have; ValueError, TypeError where one has
                    another rank than its shape is known by, or a number does not go with them
    results         (*inputs) -> the shapes and dtypes of out and the saved
    flops           (backend, *inputs) -> int
    matrices        the inputs that autocast casts; the first one's dtype is the compute dtype. An op without leaves
                    dtypes as they are, and computes in its first activation's
    activations     the inputs that may be empty or strided
    promoted        the inputs that the reference concatenates, which brings them to one dtype
    saved, save     the saved tensors' names; (*inputs) -> the saved tensors
    backward_flops  (backend, {input: whether its gradient is needed}, *inputs) -> int
    passed          the input to which out's gradient passes unchanged; the backward does not see it
    takes_out       whether the backward sees out
    fits            for a backend whose kernels do not take every size, (*inputs) -> whether they take these; the
                    reference serves others
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        *,
        reference: Callable[..., Tensor],
        shapes: Callable[..., tuple[Any, ...]],
        results: Callable[..., tuple[Result, ...]],
        flops: Callable[..., int],
        matrices: Sequence[str],
        activations: Sequence[str],
        promoted: Sequence[str] = (),
        saved: Sequence[str] = (),
        save: Callable[..., tuple[Tensor, ...]] | None = None,
        backward_flops: Callable[..., int] | None = None,
        passed: str | None = None,
        takes_out: bool = False,
        fits: Mapping[str, Callable[..., bool]] | None = None,
    ) -> None:
        self.name, self.reference, self.shapes, self.results = name, reference, shapes, results
        self.save, self.saved = save, tuple(saved)
        self.flops, self.backward_flops, self.takes_out = flops, backward_flops, takes_out
        self.fits = fits or {}
        OPS[name] = self
        fields = inputs.split(", ")
        self.inputs = [field.split()[-1] for field in fields]
        self.tensors = [i for i, field in enumerate(fields) if field.startswith("Tensor")]
        self.compute = self.inputs.index((*matrices, *activations)[0])
        self.matrices = [self.inputs.index(n) for n in matrices]
        self.activations = [self.inputs.index(n) for n in activations]
        self.parameters = [i for i in self.matrices if i not in self.activations]
        self.promoted = [self.inputs.index(n) for n in promoted]
        self.passed = None if passed is None else self.inputs.index(passed)
        self.kept = [i for i in range(len(fields)) if i != self.passed]  # the inputs that the backward sees

        returns = ", ".join(f"Tensor {n}" for n in ("out", *saved))
        self.op = self._define(name, f"{inputs}, bool save, str kernels", returns, self._run_checked, self._fake)
        self.forwards: dict[str, Callable] = {
            "reference": self._run_reference,
            "triton": triton_kernel(name, "forward"),
            **{b: native_kernel(b, name, [*self.inputs, "save"], activations) for b in ("cpu", "cuda")},
        }
        for device in ("CPU", "CUDA") if matrices else ():
            LIBRARY.impl(name, self._autocast(device.lower()), f"Autocast{device}")
        register_flop_formula(self.op.overloadpacket, get_raw=True)(self._count)
        # For ONNX and run_decompositions; FakeTensorMode would take it for symbolic sizes too, but for meta_table.
        register_decomposition(self.op)(self._decompose)
        meta_table[self.op] = self._fake
        LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        self.fitting = Fitting(self)
        if save is not None:
            kept = ", ".join(fields[i] for i in self.kept)
            names = [*(["out"] if takes_out else []), *saved]
            tensors = "".join(f", Tensor {n}" for n in names)
            self.backward_op = self._define(
                f"{name}_backward",
                f"Tensor grad_out, {kept}{tensors}, bool[] needs, str kernels",
                "Tensor[]",
                self.run_backward,
                self._fake_backward,
            )
            order = ["grad_out", *(self.inputs[i] for i in self.kept), *names, "needs", "wide"]
            self.backwards: dict[str, Callable] = {
                "reference": self._differentiate_reference,
                "triton": triton_kernel(name, "backward"),
                **{b: native_kernel(b, f"{name}_backward", order, {"grad_out", *activations}) for b in ("cpu", "cuda")},
            }
            for device in ("CPU", "CUDA"):  # a backward that runs inside the region computes as the one outside
                LIBRARY.impl(f"{name}_backward", self._without_autocast, f"Autocast{device}")
            register_flop_formula(self.backward_op.overloadpacket, get_raw=True)(self._count_backward)
            torch.library.register_autograd(f"crossvit_kernels::{name}_backward", second_derivative(self), lib=LIBRARY)

    def __call__(self, *inputs: Any, kernels: str) -> Tensor:
        """The op, through the dispatcher."""
        if torch.compiler.is_compiling():
            save = torch.is_grad_enabled() and any(
                inputs[i] is not None and inputs[i].requires_grad for i in self.tensors
            )
            result = self.op(*inputs, save, kernels)
        else:
            save = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
            if self.observed([inputs[i] for i in self.tensors]):
                result = self.op(*inputs, save, kernels)
            elif torch._C._is_any_autocast_enabled():
                result = self._run_under_autocast(inputs, save, kernels)
            elif save:
                result = Differentiable.apply(self, None, None, *inputs, True, kernels)
            else:
                result = self.run(*inputs, False, kernels)
        return result[0] if self.saved else result

    def _run_under_autocast(self, inputs: Sequence[Any], save: bool, kernels: str) -> Any:
        """Past the dispatcher. The autograd formula casts the parameters itself and gives their gradients in their own
        dtype, without a rounding to autocast's."""
        device = inputs[self.compute].device.type
        dtype = None
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            inputs = self.cast(inputs, dtype, [i for i in self.tensors if not save or i not in self.parameters])
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            if save:
                return Differentiable.apply(self, None, dtype, *inputs, True, kernels)
            return self.run(*inputs, False, kernels)

    @staticmethod
    def observed(tensors: Sequence[Tensor | None]) -> bool:
        """Whether a mode, tracer, transform or tensor subclass is to see the op; else the dispatcher, which costs 5 us,
        would only hand it on."""
        if torch._C._dispatch_tls_local_include_set().raw_repr() & _OBSERVERS:
            return True
        return not _ORDINARY.issuperset(map(type, tensors))

    def needs_reference(self, kernels: str, tensor: Tensor, dtype: torch.dtype) -> bool:
        """Whether the op's plain PyTorch is to be called instead: where the backend is the reference, and where
        derivatives are taken in ways that only plain PyTorch knows (torch.func, forward mode) or TorchScript traces."""
        if backends.resolve(kernels, tensor.device, dtype, self.name) == "reference":
            return True
        return not torch.compiler.is_compiling() and not plain_call()

    # What the dispatcher calls

    @staticmethod
    def _define(name: str, arguments: str, returns: str, run: Callable, fake: Callable) -> Any:
        LIBRARY.define(f"{name}({arguments}) -> " + (returns if returns.endswith("]") else f"({returns})"))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"crossvit_kernels::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.crossvit_kernels, name).default

    def _backend(self, inputs: Sequence[Any], kernels: str, suffix: str = "") -> str:
        for i in self.activations:
            if inputs[i].numel() == 0:
                return "reference"
        compute = inputs[self.compute]
        name = backends.resolve(kernels, compute.device, compute.dtype, self.name + suffix)
        return name if name not in self.fits or self.fits[name](*inputs) else "reference"

    def run(self, *args: Any) -> Any:
        """Forward on the backend that serves these arguments."""
        return self.forwards[self._backend(args, args[-1])](*args[:-1])

    def _run_checked(self, *args: Any) -> Any:
        """What the dispatcher calls: the forward of arguments that nobody may have looked at."""
        backend = self._backend(args, args[-1])
        if backend in CHECKED:
            fit(self, args[:-2])
        return self.forwards[backend](*args[:-1])

    def run_backward(self, *args: Any, wide: bool = False) -> list[Tensor]:
        """Backward on the backend that serves these arguments; `wide`: with the parameters' gradients in float32, in
        which it sums them, where it can."""
        backend = self._backend(self.inputs_of_backward(args), args[-1], "_backward")
        if backend in CHECKED:
            self.fitting(args)
            saved = 1 + len(self.kept)  # which kernels take as they were made
            args = (*args[:saved], *(t.contiguous() for t in args[saved:-2]), *args[-2:])
        return self.backwards[backend](*args[:-1], *((wide,) if backend == "cpu" else ()))

    def inputs_of_backward(self, args: Sequence[Any]) -> list[Any]:
        """The op's inputs among the backward's arguments; for the one that it does not see, out's gradient."""
        inputs: list[Any] = [args[0]] * len(self.inputs)
        for i, value in zip(self.kept, args[1:]):
            inputs[i] = value
        return inputs

    def _fake(self, *args: Any) -> Any:
        # Inductor traces with fakes before it lowers. It is to call the op; unless told so it raises, where CI is set,
        # over the decomposition that ONNX wants. Only an inductor that is loaded is told: loading it takes seconds.
        if (lowering := sys.modules.get("torch._inductor.lowering")) is not None:
            lowering.FALLBACK_ALLOW_LIST.add(self.op.name())
        fit(self, args[:-2], symbolic=True)
        out, *saved = self.outputs(*args[:-2])
        return (out, *(t if args[-2] else t.new_empty((0, *t.shape[1:])) for t in saved)) if saved else out

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        fit_backward(self, args, symbolic=True)
        kept = [args[1 + k] for k, i in enumerate(self.kept) if i in self.tensors]
        return [t.new_empty(t.shape) for t, needed in zip(kept, args[-2]) if needed]

    def outputs(self, *inputs: Any) -> list[Tensor]:
        """Fresh tensors for out and the saved."""
        like = inputs[self.compute]
        return [like.new_empty(shape, dtype=dtype) for shape, dtype in self.results(*inputs)]

    def _autocast(self, device: str) -> Callable:
        def run(*args: Any) -> Any:
            inputs = self.cast(args, torch.get_autocast_dtype(device), self.tensors)
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
                return self.op(*inputs)

        return run

    def cast(self, inputs: Sequence[Any], dtype: torch.dtype, which: Sequence[int]) -> list[Any]:
        """These of the inputs as autocast to this dtype has them."""
        result = list(inputs)
        for i in which:
            # Of the others a float16 one under bfloat16, or the reverse, is the only kind that kernels do not know.
            wanted = (dtype,) if i in self.matrices else (dtype, torch.float32)
            if result[i] is not None and result[i].dtype not in (*wanted, torch.float64):
                result[i] = result[i].to(wanted[-1])
        for i in self.promoted:
            for j in self.promoted:
                result[i] = result[i].to(torch.promote_types(result[i].dtype, result[j].dtype))
        return result

    def _without_autocast(self, *args: Any) -> list[Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return self.backward_op(*args)

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        if not plain_call():
            return self._run_reference(*args[:-1])
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Differentiable.apply(self, keyset, None, *args)
        return below_autograd(self, keyset, *args)

    def _decompose(self, *args: Any) -> Any:
        return self._run_reference(*args[:-1])

    # The reference as a backend

    @contextmanager
    def _mixed_dtypes(self, inputs: Sequence[Any]) -> Any:
        """The dispatcher ops meet 16-bit matrices beside other dtypes below autocast, where the reference needs it
        back, and beside parameters in float32, with which it does the same."""
        dtype, device = inputs[self.compute].dtype, inputs[self.compute].device.type
        mixed = dtype.itemsize == 2 and any(
            inputs[i] is not None and inputs[i].dtype is not dtype for i in self.tensors
        )
        with torch.autocast(device, dtype if mixed else None, enabled=mixed):
            yield

    def _run_reference(self, *args: Any) -> Any:
        inputs, save = args[:-1], args[-1]
        with self._mixed_dtypes(inputs):
            out = self.reference(*inputs).contiguous()
            if not self.saved:
                return out
            if not save:
                return out, *(t.new_empty((0, *t.shape[1:])) for t in self.outputs(*inputs)[1:])
            if out.numel() == 0:
                return out, *self.outputs(*inputs)[1:]
            assert self.save is not None
            return out, *self.save(*inputs)

    def _differentiate_reference(self, *args: Any) -> list[Tensor]:
        include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        # An op's implementation runs below autograd, where nothing would be recorded.
        with torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD):
            inputs = [t.detach() if isinstance(t, Tensor) else t for t in self.inputs_of_backward(args)]
            wanted = [i for i, needed in zip((i for i in self.kept if i in self.tensors), args[-1]) if needed]
            for i in wanted:
                inputs[i].requires_grad_()
            grads = self.differentiate(inputs, wanted, args[0], create_graph=False)
        return [g.clone(memory_format=torch.contiguous_format) for g in grads]

    def differentiate(
        self, inputs: Sequence[Any], wanted: Sequence[int], grad_out: Tensor, *, create_graph: bool
    ) -> Sequence[Tensor]:
        """The gradients of these of the inputs, which require them, by the reference's own."""
        with torch.enable_grad(), self._mixed_dtypes(inputs):
            out = self.reference(*inputs)
        leaves = [inputs[i] for i in wanted]
        return torch.autograd.grad(out, leaves, grad_out, create_graph=create_graph, materialize_grads=True)

    # What runs, in floating-point operations

    def _count(self, *args: Any, out_val: Any = None, **_: Any) -> int:
        return self.flops(self._backend(args, args[-1]), *args[: len(self.inputs)])

    def _count_backward(self, *args: Any, out_val: Any = None, **_: Any) -> int:
        assert self.backward_flops is not None
        inputs = self.inputs_of_backward(args)
        names = [self.inputs[i] for i in self.kept if i in self.tensors]
        backend = self._backend(inputs, args[-1], "_backward")
        again = self.flops(backend, *inputs) if backend == "reference" else 0
        return again + self.backward_flops(backend, dict(zip(names, args[-2])), *inputs)
