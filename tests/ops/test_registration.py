"""The ops as the dispatcher sees them: one node for autograd, torch.compile, torch.export, ONNX, the FLOP counter."""

import functools
import io
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import crossvit_kernels
import inputs
from available import NATIVE, interpreted
from crossvit_kernels import backends
from crossvit_kernels.dispatch import register
from crossvit_kernels.dispatch.op import REGISTERED
from crossvit_kernels.dispatch.register import OPS
from crossvit_kernels.dispatch.spec import OpSpec
from inputs import DIFFERENTIABLE, EXAMPLES, Random
from numerics import AUTOCAST, DEVICES, FLOAT32, FLOAT64, Draw, Precision, evaluate, judge, nearby, place
from rounding import Rounded

ALL = ["reference", *NATIVE]


class Model(nn.Module):
    """All eight ops in a row, images (B, 3, H, W) -> (B, 24)."""

    def __init__(self, kernels: str = "auto") -> None:
        super().__init__()
        rng, width = Random(), 24
        self.kernels = kernels
        calls = {
            "patch_embed": inputs.patch_embed(rng, 1, 16, 16, patch=4, embed=width),
            "layer_norm_linear": inputs.layer_norm_linear(rng, 1, width, out=3 * width),
            "linear_residual": inputs.linear_residual(rng, 1, width, out=width, scale="channel"),
            "layer_norm_mlp": inputs.layer_norm_mlp(rng, 1, width, hidden=40),
            "cls_cross_attention": inputs.cls_cross_attention(rng, 1, 1, width, 3),
            "cls_fusion": inputs.cls_fusion(rng, 1, 1, width, width, 3),
        }
        activations = {"x", "residual", "images", "cls", "patches"}
        for op, given in calls.items():
            parameters = {
                n: nn.Parameter(v) for n, v in given.items() if isinstance(v, Tensor) and n not in activations
            }
            setattr(self, op, nn.ParameterDict(parameters))

    def call(self, op: str, *activations: Any, **others: Any) -> Tensor:
        names = OPS[op].inputs
        given = dict(
            zip(("images",) if op == "patch_embed" else [n for n in names if n in ACTIVATIONS[op]], activations)
        )
        return getattr(crossvit_kernels, op)(**given, **getattr(self, op), **others, kernels=self.kernels)

    def forward(self, images: Tensor) -> Tensor:
        images = crossvit_kernels.bicubic_resize(images, (18, 17), kernels=self.kernels)
        x = self.call("patch_embed", images, image_size=16)
        qkv = self.call("layer_norm_linear", x)
        x = self.call("linear_residual", crossvit_kernels.self_attention(qkv, 3, kernels=self.kernels), x)
        x = self.call("layer_norm_mlp", x)
        cls = self.call("cls_cross_attention", x[:, 0], x[:, 1:], num_heads=3)
        return self.call("cls_fusion", cls, x[:, 1:], num_heads=3)


ACTIVATIONS = {
    "layer_norm_linear": ("x",),
    "linear_residual": ("x", "residual"),
    "layer_norm_mlp": ("x",),
    "cls_cross_attention": ("cls", "patches"),
    "cls_fusion": ("cls", "patches"),
}


def dispatcher_inputs(name: str, *, permuted: bool = False, device: str = "cpu") -> list[Any]:
    """The example's arguments as crossvit_kernels::<name> takes them, up to `save` and `kernels`."""
    given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in EXAMPLES[name]().items()}
    if "image_size" in given:
        given["height"], given["width"] = given.pop("image_size")
    if name == "layer_norm_linear":
        given |= {"gelu_in": False, "gelu_out": given.pop("activation") == "gelu"}
    op = OPS[name]
    if "per_sample" in op.inputs:
        given["per_sample"] = given["scale"].dim() > 1
    if permuted:
        for i in op.activations:
            given[op.inputs[i]] = inputs.arrange(given[op.inputs[i]], "permuted")
    return [given.get(n, 1e-6 if n == "eps" else None) for n in op.inputs]


def backward_arguments(
    op: OpSpec, values: list[Any], saved: tuple[Tensor, ...], grad_out: Tensor, needs: list[bool]
) -> list[Any]:
    """The arguments of crossvit_kernels::<name>_backward up to `kernels`."""
    kept = [values[i] for i in op.kept]
    return [grad_out, *kept, *saved[0 if op.takes_out else 1 :], needs]


def forward(op: OpSpec, values: list[Any], kernels: str) -> tuple[Tensor, ...]:
    """(out, saved...) of crossvit_kernels::<name>."""
    result = op.op(*values, True, kernels)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("kernels", ALL)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.not_interpreted
def test_opcheck(name: str, kernels: str, permuted: bool) -> None:
    op, values = OPS[name], dispatcher_inputs(name, permuted=permuted, device=DEVICES.get(kernels, "cpu"))
    if op.save is None:
        torch.library.opcheck(op.op, (*values, False, kernels))
        return
    values = [v.requires_grad_() if isinstance(v, Tensor) else v for v in values]
    torch.library.opcheck(op.op, (*values, True, kernels))
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    torch.library.opcheck(op.op, (*values, False, kernels))
    saved = forward(op, values, kernels)
    needs = [values[i] is not None for i in op.kept if i in op.tensors]
    arguments = backward_arguments(op, values, saved, torch.randn_like(saved[0]), needs)
    torch.library.opcheck(op.backward_op, (*arguments, kernels))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_any_backward_accepts_any_forward(backend: str, name: str, rng: Random) -> None:
    """All backends save the same tensors: a kernel's backward over the reference's forward, and the other way round."""
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES[backend])
    needs = [True] * sum(i in op.tensors for i in op.kept)
    others = [kernels for kernels in ALL if DEVICES.get(kernels, DEVICES[backend]) == DEVICES[backend]]
    outs = {kernels: forward(op, values, kernels) for kernels in others}
    grad_out = rng.normal(*outs["reference"][0].shape).to(DEVICES[backend])
    for value, expected in zip(outs[backend], outs["reference"]):
        assert value.shape == expected.shape
        assert value.dtype == expected.dtype
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)

    names = [op.inputs[i] for i in op.kept if i in op.tensors]

    def draw(forward_kernels: str, backward_kernels: str, number: int) -> Draw:
        given = list(nearby(dict(zip(op.inputs, values)), FLOAT32, number).values())
        exact = [v.double() if isinstance(v, Tensor) else v for v in given]

        def arguments(given: list[Any], grad_out: Tensor, kernels: str) -> list[Any]:
            return backward_arguments(op, given, forward(op, given, kernels), grad_out, needs)

        kernel = op.backward_op(*arguments(given, grad_out, forward_kernels), backward_kernels)
        plain = arguments(given, grad_out, "reference")
        with Rounded():
            simulated = REGISTERED[name].backwards["reference"](*plain)
        ref64 = op.backward_op(*arguments(exact, grad_out.double(), "reference"), "reference")
        found = [dict(zip(names, (gradient.cpu() for gradient in r))) for r in (kernel, simulated, ref64)]
        return Draw(found[0], (found[1],), found[2])

    for other in others:
        for pair in ((other, backend), (backend, other)):
            judge(functools.partial(draw, *pair), FLOAT32.ulp, zero={"k_bias": 4.0})


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(backend: str, name: str) -> None:
    given = EXAMPLES[name]()
    names = {OPS[name].inputs[i] for i in OPS[name].activations} | {"scale"}
    for key in names & given.keys():
        if key != "scale" or given[key].dim() > 1:
            given[key] = given[key][:0]
    result = evaluate(getattr(crossvit_kernels, name), given, FLOAT32, backend, gradients=name in DIFFERENTIABLE)
    expected = evaluate(getattr(crossvit_kernels, name), given, FLOAT32, "reference", gradients=name in DIFFERENTIABLE)
    assert result["out"].shape[0] == 0
    for key, value in result.items():
        assert value.shape == expected[key].shape
        assert value.dtype == expected[key].dtype
        assert not value.count_nonzero()


def larger_example(name: str, *, small: bool = False) -> dict[str, Any]:
    """Arguments of an op that keep several tasks busy; small: as few as the interpreter has time for."""
    batch, tokens, out, size = (1, 40, 100, (21, 14)) if small else (3, 130, 200, (42, 35))
    large = {
        "layer_norm_linear": lambda: inputs.layer_norm_linear(Random(), batch, tokens, 96, out=out),
        "linear_residual": lambda: inputs.linear_residual(Random(), batch, tokens, 96, out=out, scale="sample"),
        "layer_norm_mlp": lambda: inputs.layer_norm_mlp(Random(), batch, tokens, 96, hidden=out, scale="channel"),
        "self_attention": lambda: inputs.self_attention(Random(), batch, tokens, 96, 3),
        "bicubic_resize": lambda: inputs.bicubic_resize(Random(), batch, 90, 70, size),
        "patch_embed": lambda: inputs.patch_embed(
            Random(), batch, *((10, 17) if small else (30, 50)), patch=7, embed=96, image_size=size
        ),
        "cls_cross_attention": lambda: inputs.cls_cross_attention(Random(), batch, tokens, 96, 3),
        "cls_fusion": lambda: inputs.cls_fusion(Random(), batch, tokens, 64, 96, 3),
    }
    return large[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_same_call_twice_gives_the_same_bits(backend: str, name: str, dtype: torch.dtype, poisoned: None) -> None:
    """Also where the memory that a kernel works in held NaN: a call with NaN everywhere comes between the two."""
    given = larger_example(name, small=interpreted(backend))
    nan = {n: torch.full_like(v, torch.nan) if isinstance(v, Tensor) else v for n, v in given.items()}
    op, precision = getattr(crossvit_kernels, name), type(FLOAT32)(str(dtype), dtype)

    def call(values: dict[str, Any]) -> dict[str, Tensor]:
        return evaluate(op, values, precision, backend, gradients=name in DIFFERENTIABLE)

    first = call(given)
    call(nan)
    for key, value in call(given).items():
        assert torch.equal(value, first[key]), key
        assert not value.isnan().any(), key


@pytest.mark.skipif("cpu" not in NATIVE, reason="the C++ kernels are not there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if name != "cls_cross_attention"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """cls_cross_attention apart, whose tokens are divided over the threads where images are few."""
    given, precision = larger_example(name), type(FLOAT32)(str(dtype), dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(getattr(crossvit_kernels, name), given, precision, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key


@pytest.mark.compiled_only
def test_calls_from_several_threads_do_not_meet(backend: str) -> None:
    """Models that serve from several Python threads: every call works in memory of its own."""
    calls = [inputs.layer_norm_mlp(Random(i), 2, 40 + 7 * i, 96, hidden=200) for i in range(8)]
    calls = [place(given, backend) for given in calls]
    expected = [crossvit_kernels.layer_norm_mlp(**given, kernels=backend) for given in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            outs = pool.map(lambda given: crossvit_kernels.layer_norm_mlp(**given, kernels=backend), calls)
            assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected))


@pytest.mark.parametrize("kernels", ALL)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_frozen_inputs_gradient_is_not_computed(name: str, kernels: str) -> None:
    """Every input in turn alone needs a gradient: the backward op is asked for it, and returns it, and no other."""
    op, values = OPS[name], dispatcher_inputs(name, device=DEVICES.get(kernels, "cpu"))

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is op.backward_op:
                calls.append((args[-2], len(result)))
            return result

    given = EXAMPLES[name]()
    everything = evaluate(getattr(crossvit_kernels, name), given, FLOAT32, kernels)
    for i in op.tensors:
        calls: list[tuple[list[bool], int]] = []
        alone = [v.detach().requires_grad_(j == i) if isinstance(v, Tensor) else v for j, v in enumerate(values)]
        with Spy():
            result = op.op(*alone, True, kernels)
            out = result[0] if op.saved else result
            grad_out = Random(7).normal(*out.shape).bfloat16().to(out)  # as evaluate draws it
            (gradient,) = torch.autograd.grad(out, [alone[i]], grad_out)
        expected_calls = [([j == i for j in op.kept if j in op.tensors], 1)] if i in op.kept else []
        assert calls == expected_calls
        torch.testing.assert_close(gradient.cpu(), everything[f"grad {op.inputs[i]}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_saved_tensors_are_autograds(backend: str, name: str) -> None:
    """Checkpointing recomputes them, and a saved input that was written to since is an error, not a wrong gradient."""
    op, first = getattr(crossvit_kernels, name), OPS[name].inputs[OPS[name].activations[0]]
    given = place(EXAMPLES[name](), backend)
    x = given.pop(first).requires_grad_()

    def call(x: Tensor) -> Tensor:
        return op(**{first: x}, **given, kernels=backend).square().sum()

    (expected,) = torch.autograd.grad(call(x), x)
    (checkpointed,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False), x)
    assert torch.equal(checkpointed, expected)
    written = x.clone()
    loss = call(written)
    with torch.no_grad():
        written.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("precision", [FLOAT32, AUTOCAST], ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_raises(backend: str, name: str, precision: Precision) -> None:
    given = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in place(EXAMPLES[name](), backend).items()}
    leaves = [v for v in given.values() if isinstance(v, Tensor)]
    with precision.context(leaves[0].device.type):
        out = getattr(crossvit_kernels, name)(**given, kernels=backend)
    # The gradient of a plain sum: what there is to differentiate again are the op's own inputs alone.
    first = torch.autograd.grad(out.float().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"crossvit_kernels.{name} has no second derivative"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_function_transforms_and_forward_mode_run_on_the_reference(backend: str, name: str) -> None:
    """torch.func and forward-mode derivatives know plain PyTorch only; no derivative is dropped without a word."""
    given = place(EXAMPLES[name](), backend)
    first = OPS[name].inputs[OPS[name].activations[0]]

    def call(kernels: str) -> Callable[[Tensor], Tensor]:
        return lambda x: getattr(crossvit_kernels, name)(**(given | {first: x}), kernels=kernels).sum()

    x, tangent = given[first], torch.ones_like(given[first])
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no forward-mode derivative on a CPU
        (_, value), (_, expected) = (torch.func.jvp(call(k), (x,), (tangent,)) for k in (backend, "reference"))
        assert torch.equal(value, expected)
        # On a GPU torch's bicubic resize adds up in any order.
        torch.testing.assert_close(torch.func.grad(call(backend))(x), torch.func.grad(call("reference"))(x))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(call(backend)(dual)).tangent, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.not_interpreted
def test_compile_of_the_whole_graph(backend: str, name: str, dynamic: bool) -> None:
    """Forward and backward are traced without a break and give what the eager op gives, for several batch sizes."""
    torch._dynamo.reset()
    op, example, differentiable = getattr(crossvit_kernels, name), EXAMPLES[name](), name in DIFFERENTIABLE
    compiled = torch.compile(
        lambda given: op(**given, kernels=backend), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    batched = {OPS[name].inputs[i] for i in OPS[name].activations} | {"scale"}

    for batch in (2, 3) if dynamic else (2,):
        given = {
            n: v[:1].expand(batch, *v.shape[1:]).clone() if n in batched and v.dim() > 1 else v
            for n, v in example.items()
        }
        call = {
            "eager": lambda kernels, **values: op(**values, kernels=kernels),
            "compiled": lambda kernels, **values: compiled(values),
        }
        eager, traced = (evaluate(call[k], given, FLOAT32, backend, gradients=differentiable) for k in call)
        for key, value in eager.items():
            torch.testing.assert_close(traced[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@torch._inductor.config.patch(force_disable_caches=True)
@pytest.mark.not_interpreted
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor_and_a_dynamic_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention half of a block, forward and backward, compiled by inductor once for all batch sizes."""
    monkeypatch.setenv("CI", "true")  # there inductor checks what it falls back to
    torch._dynamo.reset()
    rng = Random()
    qkv = place(inputs.layer_norm_linear(rng, 1, 24, out=72), backend)
    proj = place(inputs.linear_residual(rng, 1, 24, out=24), backend)
    for given, name in ((qkv, "x"), (proj, "x"), (proj, "residual")):
        del given[name]
    parameters = [v.requires_grad_() for v in (*qkv.values(), *proj.values())]

    def block(x: Tensor) -> Tensor:
        packed = crossvit_kernels.layer_norm_linear(x, **qkv, kernels=backend)
        attended = crossvit_kernels.self_attention(packed, 3, kernels=backend)
        return crossvit_kernels.linear_residual(attended, **proj, residual=x, kernels=backend)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = rng.normal(batch, 5, 24).to(DEVICES[backend]).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            out = compiled(x)
        expected = block(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(o.square().sum(), [x, *parameters]) for o in (out, expected))
        for value, wanted in zip(*gradients):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


def test_the_fake_stands_in_for_the_op_where_sizes_are_symbolic(backend: str) -> None:
    """The ONNX decomposition must not run there: it would trace the reference's shapes, guards and all."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(register, "decompose", None)
        given = place(EXAMPLES["layer_norm_linear"](), backend)
        call = torch.compile(
            lambda v: crossvit_kernels.layer_norm_linear(**v, kernels=backend), dynamic=True, backend="aot_eager"
        )
        assert call(given).shape == (2, 5, 12)


def test_export_keeps_the_ops_and_a_dynamic_batch() -> None:
    model = Model().eval().requires_grad_(False)
    images = Random().normal(2, 3, 20, 20)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = {str(node.target) for node in exported.graph.nodes}
    served = set(EXAMPLES) if NATIVE else set()
    assert {t.split(".")[1] for t in targets if t.startswith("crossvit_kernels.")} == served
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    images = Random(1).normal(3, 3, 20, 20)
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exported_first", [False, True])
def test_onnx_export_runs_in_onnxruntime(exported_first: bool) -> None:
    """The ops decompose into the reference, from a module and from an exported program, whatever `kernels` is."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Model().eval().requires_grad_(False)
    images, shapes = Random().normal(2, 3, 20, 20), ({0: torch.export.Dim("batch")},)
    if exported_first:
        program = torch.onnx.export(
            torch.export.export(model, (images,), dynamic_shapes=shapes), dynamo=True, verbose=False
        )
    else:
        program = torch.onnx.export(model, (images,), dynamic_shapes=shapes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    images = Random(1).normal(3, 3, 20, 20)
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_the_reference(backend: str) -> None:
    model = Model(backend).eval().requires_grad_(False).to(DEVICES[backend])
    images = Random().normal(2, 3, 20, 20).to(DEVICES[backend])
    traced = torch.jit.trace(model, images)
    assert "crossvit_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


def flops(call: Callable[[], Any]) -> int:
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # torch does not count the fused one on a CPU
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_flop_counter_counts_what_runs(backend: str, name: str) -> None:
    """The formulas agree with the count of the reference's own operations where the kernels do the same products."""
    values, op = dispatcher_inputs(name, device=DEVICES[backend]), OPS[name]
    plain = flops(lambda: op.reference(*values))
    assert flops(lambda: op.op(*values, False, "reference")) == plain
    counted = flops(lambda: op.op(*values, False, backend))
    if name not in ("cls_cross_attention", "cls_fusion"):
        assert counted == plain
        return
    # The absorbed form: q, u and v instead of q and all keys and values; two passes of every head over the tokens.
    batch, tokens, width, heads = 2, 6, 16, 2
    keys_and_values, scores = 2 * tokens * width**2, 2 * tokens * width
    absorbed = 2 * width**2 + 2 * tokens * width * heads
    assert plain - counted == 2 * batch * (keys_and_values + scores - absorbed)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_flop_counter_counts_the_backward(backend: str, name: str) -> None:
    values, op = dispatcher_inputs(name, device=DEVICES[backend]), OPS[name]
    leaves = [v.requires_grad_() if isinstance(v, Tensor) else v for v in values]

    def run(call: Callable[..., Any]) -> int:
        with sdpa_kernel(SDPBackend.MATH):
            result = call(*leaves)
        out = result[0] if isinstance(result, tuple) else result
        return flops(lambda: out.sum().backward())

    plain = run(op.reference)
    counted = run(lambda *v: op.op(*v, True, backend))
    # Again: for the factor's gradient a Linear's output, for the attention the scores.
    products = {"linear_residual": 1.5, "layer_norm_mlp": 1.25, "self_attention": 1.25}
    if name == "cls_cross_attention":
        assert 0 < counted < plain
    elif name == "patch_embed":
        assert counted == plain
    else:
        assert counted == pytest.approx(plain * products.get(name, 1.0))
    assert run(lambda *v: op.op(*v, True, "reference")) >= plain


def test_the_backward_of_a_forward_that_saved_nothing_raises() -> None:
    values = [v.requires_grad_() if isinstance(v, Tensor) else v for v in dispatcher_inputs("layer_norm_linear")]
    out = OPS["layer_norm_linear"].op(*values, False, "auto")[0]
    with pytest.raises(RuntimeError, match="save=False"):
        out.sum().backward()


def test_ops_in_float64_through_the_dispatcher_are_the_reference() -> None:
    for name in EXAMPLES:
        values = [v.double() if isinstance(v, Tensor) else v for v in dispatcher_inputs(name)]
        result = OPS[name].op(*values, False, "auto")
        out = result[0] if isinstance(result, tuple) else result
        torch.testing.assert_close(out, OPS[name].reference(*values))
        assert backends.resolve("auto", out.device, FLOAT64.inputs, name) == "reference"
