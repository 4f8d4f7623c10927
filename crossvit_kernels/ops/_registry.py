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
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import meta_table, register_decomposition
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

from .. import backends

LIBRARY = torch.library.Library("crossvit_kernels", "DEF")

OPS: dict[str, "Op"] = {}

_KEY = torch._C.DispatchKey


def _keys(*keys: Any) -> Any:
    return functools.reduce(operator.or_, map(torch._C.DispatchKeySet, keys))


_AUTOCAST = _keys(_KEY.AutocastCPU, _KEY.AutocastCUDA)
_AUTOGRAD = _keys(_KEY.AutogradFunctionality, _KEY.AutogradOther, _KEY.AutogradNestedTensor, _KEY.ADInplaceOrView)
_OBSERVERS = _keys(
    _KEY.Python,
    _KEY.PythonDispatcher,
    _KEY.PreDispatch,
    _KEY.FuncTorchDynamicLayerFrontMode,
    _KEY.Functionalize,
).raw_repr()


class Op:
    """An op of the package and, unless `save` is None, its backward.

    inputs          its arguments, in the schema language
    reference       (*inputs) -> out, in plain PyTorch
    outputs         (*inputs) -> fresh tensors of the shapes and dtypes of out and the saved
    flops           (backend, *inputs) -> int
    matrices        the inputs that autocast casts; the first one's dtype is the compute dtype
    activations     the inputs that may be empty or strided
    promoted        the inputs that the reference concatenates, which brings them to one dtype
    saved, save     the saved tensors' names; (*inputs) -> the saved tensors
    backward_flops  (backend, {input: whether its gradient is needed}, *inputs) -> int
    passed          the input to which out's gradient passes unchanged; the backward does not see it
    takes_out       whether the backward sees out
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        *,
        reference: Callable[..., Tensor],
        outputs: Callable[..., tuple[Tensor, ...]],
        flops: Callable[..., int],
        matrices: Sequence[str],
        activations: Sequence[str],
        promoted: Sequence[str] = (),
        saved: Sequence[str] = (),
        save: Callable[..., tuple[Tensor, ...]] | None = None,
        backward_flops: Callable[..., int] | None = None,
        passed: str | None = None,
        takes_out: bool = False,
    ) -> None:
        self.name, self.reference, self.outputs, self.save, self.saved = name, reference, outputs, save, saved
        self.flops, self.backward_flops, self.takes_out = flops, backward_flops, takes_out
        OPS[name] = self
        fields = inputs.split(", ")
        self.inputs = [field.split()[-1] for field in fields]
        self.tensors = [i for i, field in enumerate(fields) if field.startswith("Tensor")]
        self.compute = self.inputs.index(matrices[0])
        self.matrices = [self.inputs.index(n) for n in matrices]
        self.activations = [self.inputs.index(n) for n in activations]
        self.promoted = [self.inputs.index(n) for n in promoted]
        self.passed = None if passed is None else self.inputs.index(passed)
        self.kept = [i for i in range(len(fields)) if i != self.passed]  # the inputs that the backward sees

        returns = ", ".join(f"Tensor {n}" for n in ("out", *saved))
        self.op = self._define(name, f"{inputs}, bool save, str kernels", returns, self._forward, self._fake)
        self._native = self._native_kernel(name, [*self.inputs, "save"])
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, self._autocast(device.lower()), f"Autocast{device}")
        register_flop_formula(self.op.overloadpacket, get_raw=True)(self._count)
        # For ONNX and run_decompositions; FakeTensorMode would take it for symbolic sizes too, but for meta_table.
        register_decomposition(self.op)(self._decompose)
        meta_table[self.op] = self._fake
        torch.library.register_autograd(
            f"crossvit_kernels::{name}", self._backward, setup_context=self._setup_context, lib=LIBRARY
        )
        if save is not None:
            kept = ", ".join(fields[i] for i in self.kept)
            names = [*(["out"] if takes_out else []), *saved]
            tensors = "".join(f", Tensor {n}" for n in names)
            self.backward_op = self._define(
                f"{name}_backward",
                f"Tensor grad_out, {kept}{tensors}, bool[] needs, str kernels",
                "Tensor[]",
                self._run_backward,
                self._fake_backward,
            )
            order = ["grad_out", *(self.inputs[i] for i in self.kept), *names, "needs"]
            self._native_backward = self._native_kernel(f"{name}_backward", order)
            for device in ("CPU", "CUDA"):  # a backward that runs inside the region computes as the one outside
                LIBRARY.impl(f"{name}_backward", self._without_autocast, f"Autocast{device}")
            register_flop_formula(self.backward_op.overloadpacket, get_raw=True)(self._count_backward)
            torch.library.register_autograd(
                f"crossvit_kernels::{name}_backward", self._no_second_derivative, lib=LIBRARY
            )

    def __call__(self, *inputs: Any, kernels: str) -> Tensor:
        """The op, through the dispatcher."""
        if torch.compiler.is_compiling():
            save = torch.is_grad_enabled() and any(
                inputs[i] is not None and inputs[i].requires_grad for i in self.tensors
            )
            result = self.op(*inputs, save, kernels)
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            result = self.op(*inputs, True, kernels)
        elif self._unobserved(inputs):
            result = self._forward(*inputs, False, kernels)  # where the dispatcher would end too, 5 us later
        else:
            result = self.op(*inputs, False, kernels)
        return result[0] if self.saved else result

    def _unobserved(self, inputs: Sequence[Any]) -> bool:
        """Whether these are ordinary tensors and no autocast, mode, tracer or transform is to see the op."""
        if torch._C._dispatch_tls_local_include_set().raw_repr() & _OBSERVERS or torch._C._is_any_autocast_enabled():
            return False
        for i in self.tensors:
            kind = type(inputs[i])
            if kind is not Tensor and kind is not Parameter and inputs[i] is not None:
                return False
        return True

    def needs_reference(self, kernels: str, tensor: Tensor, dtype: torch.dtype) -> bool:
        """Whether the op's plain PyTorch is to be called instead: where the backend is the reference, and where
        derivatives are taken in ways that only plain PyTorch knows (torch.func, forward mode) or TorchScript traces."""
        if backends.resolve(kernels, tensor.device, dtype, self.name) == "reference":
            return True
        return not torch.compiler.is_compiling() and (
            torch._C._functorch.peek_interpreter_stack() is not None
            or forward_ad._current_level >= 0
            or torch._C._is_tracing()
        )

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
        return backends.resolve(kernels, compute.device, compute.dtype, self.name + suffix)

    def _forward(self, *args: Any) -> Any:
        if self._backend(args, args[-1]) == "cpu":
            return self._native(*args[:-1])
        return self._run_reference(*args[:-1])

    def _run_backward(self, *args: Any) -> list[Tensor]:
        inputs: list[Any] = [args[0]] * len(self.inputs)  # where the input is not seen, out's gradient stands for it
        for i, value in zip(self.kept, args[1:]):
            inputs[i] = value
        if self._backend(inputs, args[-1], "_backward") == "cpu":
            result = self._native_backward(*args[:-1])
            return result if isinstance(result, list) else [result]
        return self._differentiate_reference(args[0], inputs, args[-2])

    def _fake(self, *args: Any) -> Any:
        out, *saved = self.outputs(*args[:-2])
        return (out, *(t if args[-2] else t.new_empty((0, *t.shape[1:])) for t in saved)) if saved else out

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        kept = [args[1 + k] for k, i in enumerate(self.kept) if i in self.tensors]
        return [t.new_empty(t.shape) for t, needed in zip(kept, args[-2]) if needed]

    def _autocast(self, device: str) -> Callable:
        def run(*args: Any) -> Any:
            dtype, inputs = torch.get_autocast_dtype(device), list(args)
            for i in self.tensors:
                # Of the others a float16 one under bfloat16, or the reverse, is the only kind that kernels do not know.
                wanted = (dtype,) if i in self.matrices else (dtype, torch.float32)
                if inputs[i] is not None and inputs[i].dtype not in (*wanted, torch.float64):
                    inputs[i] = inputs[i].to(wanted[-1])
            for i in self.promoted:
                for j in self.promoted:
                    inputs[i] = inputs[i].to(torch.promote_types(inputs[i].dtype, inputs[j].dtype))
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                return self.op(*inputs)

        return run

    def _without_autocast(self, *args: Any) -> list[Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return self.backward_op(*args)

    def _decompose(self, *args: Any) -> Any:
        return self._run_reference(*args[:-1])

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        out, saved = (output[0], output[1:]) if self.saved else (output, ())
        tensors = [inputs[i] if i in self.tensors else None for i in self.kept]
        ctx.save_for_backward(*tensors, *([out] if self.takes_out else []), *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.others = [None if i in self.tensors else inputs[i] for i in self.kept]
        ctx.save, ctx.kernels = inputs[-2:]
        ctx.passed_dtype = None if self.passed is None else inputs[self.passed].dtype

    def _backward(self, ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if self.save is None:
            raise RuntimeError(
                f"crossvit_kernels.{self.name} has no derivative: for training compose the ops that it consists of"
            )
        if not ctx.save:
            raise RuntimeError(
                f"crossvit_kernels::{self.name} was called with save=False and has nothing to take a derivative from"
            )
        grads: list[Tensor | None] = [None] * (len(self.inputs) + 2)
        if grad_out is None:
            return tuple(grads)
        if self.passed is not None and ctx.needs_input_grad[self.passed]:
            grads[self.passed] = grad_out.to(ctx.passed_dtype)
        wanted = [i for i in self.kept if i in self.tensors]
        needs = [bool(ctx.needs_input_grad[i]) for i in wanted]
        if any(needs):
            tensors = ctx.saved_tensors
            split = len(self.kept)
            inputs = [t if i in self.tensors else o for i, t, o in zip(self.kept, tensors, ctx.others)]
            found = iter(self.backward_op(grad_out, *inputs, *tensors[split:], needs, ctx.kernels))
            for i, needed in zip(wanted, needs):
                if needed:
                    grads[i] = next(found)
        return tuple(grads)

    def _no_second_derivative(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"crossvit_kernels.{self.name} has no second derivative; with kernels='reference' PyTorch's own are there"
        )

    # The reference as a backend

    @contextmanager
    def _mixed_dtypes(self, inputs: Sequence[Any]) -> Any:
        """The dispatcher ops meet several dtypes only below autocast, where the reference needs it back."""
        dtype, device = inputs[self.compute].dtype, inputs[self.compute].device.type
        mixed = any(inputs[i] is not None and inputs[i].dtype is not dtype for i in self.tensors)
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
            assert self.save is not None
            return out, *self.save(*inputs)

    def _differentiate_reference(self, grad_out: Tensor, inputs: list[Any], needs: Sequence[bool]) -> list[Tensor]:
        wanted = [i for i, needed in zip((i for i in self.kept if i in self.tensors), needs) if needed]
        include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
        with (
            torch._C._ForceDispatchKeyGuard(
                include, exclude - _AUTOGRAD
            ),  # below autograd nothing is recorded otherwise
            torch.enable_grad(),
            self._mixed_dtypes(inputs),
        ):
            inputs = [t.detach() if isinstance(t, Tensor) else t for t in inputs]
            leaves = [inputs[i].requires_grad_() for i in wanted]
            out = self.reference(*inputs)
            grads = torch.autograd.grad(out, leaves, grad_out, materialize_grads=True)
        return [g.clone(memory_format=torch.contiguous_format) for g in grads]

    # The CPU's native kernels

    def _native_kernel(self, name: str, given: list[str]) -> Callable:
        """Calls crossvit_kernels_cpu::<name>, which picks its arguments from the given ones by name."""
        if not backends.serves("cpu", name):
            return self._run_reference  # never reached: resolve() does not answer "cpu"
        native = getattr(torch.ops.crossvit_kernels_cpu, name).default
        arguments = [(given.index(a.name), "Tensor" in str(a.type)) for a in native._schema.arguments]
        strided = {given.index(self.inputs[i]) for i in self.activations if self.inputs[i] in given}
        if given[0] == "grad_out":
            strided.add(0)

        def run(*args: Any) -> Any:
            values = []
            for i, is_tensor in arguments:
                value = args[i]
                # Rows may lie wherever two leading strides can say; a row itself is contiguous.
                if (
                    is_tensor
                    and value is not None
                    and not value.is_contiguous()
                    and not (i in strided and value.stride(-1) == 1 and value.dim() <= 3)
                ):
                    value = value.contiguous()
                values.append(value)
            return native(*values)

        return run

    # What runs, in floating-point operations

    def _count(self, *args: Any, out_val: Any = None, **_: Any) -> int:
        return self.flops(self._backend(args, args[-1]), *args[: len(self.inputs)])

    def _count_backward(self, *args: Any, out_val: Any = None, **_: Any) -> int:
        assert self.backward_flops is not None
        inputs: list[Any] = [args[0]] * len(self.inputs)
        for i, value in zip(self.kept, args[1:]):
            inputs[i] = value
        names = [self.inputs[i] for i in self.kept if i in self.tensors]
        backend = self._backend(inputs, args[-1], "_backward")
        again = self.flops(backend, *inputs) if backend == "reference" else 0
        return again + self.backward_flops(backend, dict(zip(names, args[-2])), *inputs)
