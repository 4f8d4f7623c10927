"""accelerate beside what else is done to a model: autocast, copies, averages, DDP, checkpointing, compilers, files."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from crossvit_kernels import accelerate, acceleration
from rounding import Rounded
from timm_models import OTHERS, build, images, results, swapped, tiny

COMPILED = ["crossvit_9_240", "cait_xxs24_224", "siglip"]
LEARNING_RATE = 0.01


def test_half_precision_and_autocast() -> None:
    for name in ("crossvit_9_240", "siglip"):
        model = build(name)
        x = images(model)
        with torch.no_grad():
            expected = model(x)
            accelerate(model, verbose=False)
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model(x)
            low = model.bfloat16()(x.bfloat16())
        for found in (mixed, low):
            assert found.dtype is torch.bfloat16
            assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name", ["crossvit_9_240", *OTHERS])
def test_errors_of_gradients_under_autocast(name: str) -> None:
    """By the rule for an op, in bfloat16: twice the error of timm's formulas under autocast, simulated or its own, and
    an ulp; dtypes as timm has them."""
    model, autocast, ulp = build(name), torch.autocast("cpu", torch.bfloat16), torch.finfo(torch.bfloat16).eps
    x = images(model)
    exact = results(copy.deepcopy(model).double(), x.double())
    with autocast:
        plain = results(model, x)
        with Rounded():
            simulated = results(model, x)
        found = results(accelerate(model, verbose=False), x)
    for key, value in exact.items():
        assert found[key].dtype == plain[key].dtype
        error, *others = ((r[key].double() - value).square().mean().sqrt() for r in (found, plain, simulated))
        scale = value.square().mean().sqrt()
        summands = exact[key.replace("bias", "weight")].abs().max()
        if scale < 1e-9 * summands:  # zero by mathematics: what a softmax takes out again
            assert key.endswith(("wk.bias", "attn.k.bias", "attn.proj_l.bias"))
            scale = summands
        assert error <= 2 * max(others) + ulp * scale, key


def test_copies_files_and_weights() -> None:
    """deepcopy, torch.save of the state dict and of the model, load_state_dict after accelerate."""
    model = accelerate(build("crossvit_9_240"), verbose=False)
    x = images(model)
    with torch.no_grad():
        model(x)
        copied = copy.deepcopy(model)
        other = build("crossvit_9_240", seed=7)
        expected = other(x)
        state = io.BytesIO()
        torch.save(other.state_dict(), state)
        state.seek(0)
        model.load_state_dict(torch.load(state, weights_only=True))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        whole = io.BytesIO()
        torch.save(model, whole)
        whole.seek(0)
        loaded = torch.load(whole, weights_only=False)
        assert torch.equal(loaded(x), model(x))
        assert swapped(loaded) == swapped(copied) == swapped(model)
        assert not torch.equal(copied(x), model(x))
        copied.blocks[0].blocks[0][0].attn.qkv = nn.Sequential(copied.blocks[0].blocks[0][0].attn.qkv)
        # The copy looks at its own children.
        assert acceleration(copied).left.keys() - acceleration(model).left.keys() == {"blocks.0.blocks.0.0"}
        assert copied(x).isfinite().all()


def test_a_state_dict_goes_back_to_timm() -> None:
    """What an accelerated model saves after a step, a plain one loads: the same keys, the same logits."""
    model, plain = accelerate(build("crossvit_9_dagger_240"), verbose=False), build("crossvit_9_dagger_240", seed=7)
    x = images(model)
    step(model.train(), x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_moving_averages(kind: str) -> None:
    """An average of an accelerated model runs on the kernels, and with its own weights: those of a plain model's."""
    model, plain = build("deit_tiny_patch16_224"), build("deit_tiny_patch16_224")
    accelerate(model, verbose=False)
    averages = []
    for m in (model, plain):
        x = images(m)
        if kind == "timm":
            average: Any = timm.utils.ModelEmaV3(m, decay=0.6)
        else:
            average = torch.optim.swa_utils.AveragedModel(
                m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.6)
            )
        for _ in range(2):
            step(m.train(), x)
            average.update(m) if kind == "timm" else average.update_parameters(m)
            with torch.no_grad():
                average.module.eval()(x)
        averages.append(average.module)
    assert swapped(averages[0]) == swapped(model)
    with torch.no_grad():
        found, expected, latest = averages[0](x), averages[1](x), model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - latest).abs().max() > 100 * (found - expected).abs().max()


def step(model: nn.Module, x: Tensor) -> None:
    """One of SGD, on a fixed random loss."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loss_of(model, x).backward()
    optimizer.step()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that is the mean of its images' losses."""
    logits = model(x)
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(2))
    return (logits * weights).sum(1).square().mean()


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Logits and gradients agree, up to roundings; some, as a key's bias's, are nothing else."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        atol = 1e-4 * value.abs().max().item() + 1e-6
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def in_a_process(rank: int, folder: Path) -> None:
    """Two steps of DDP, of a model accelerated before it is wrapped and of one accelerated after."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    states = []
    for before in (True, False):
        model = build("crossvit_9_240").train()
        if before:
            accelerate(model, verbose=False)
        wrapped = DistributedDataParallel(model)
        if not before:
            accelerate(wrapped, verbose=False)
        assert swapped(model)
        share = images(model, 4)[2 * rank : 2 * rank + 2]
        for _ in range(2):
            step(wrapped, share)
            wrapped.zero_grad()
        states.append(model.state_dict())
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_of_ddp_train_as_one(tmp_path: Path) -> None:
    """Both end with the weights of timm's own model after the same steps over all images, and with the same bits."""
    torch.multiprocessing.start_processes(in_a_process, (tmp_path,), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    plain = build("crossvit_9_240").train()
    start = copy.deepcopy(plain.state_dict())
    for _ in range(2):
        step(plain, images(plain, 4))
        plain.zero_grad()
    for state, other in zip(first, second):
        for key, expected in plain.state_dict().items():
            assert torch.equal(state[key], other[key]), key
            moved = (expected - start[key]).abs().max()
            assert (state[key] - expected).abs().max() <= 1e-3 * moved + 1e-6 * expected.abs().max(), key


@pytest.mark.parametrize("name", ["crossvit_9_240", "deit_tiny_patch16_224"])
def test_gradient_checkpointing(name: str) -> None:
    """The gradients are those of timm's model without; what was dropped is dropped again."""
    model = build(name, drop_path_rate=0.3).train()
    x = images(model, 4)
    torch.manual_seed(5)
    expected = results(model, x)
    accelerate(model, verbose=False)
    if name.startswith("crossvit"):  # timm's has no such option: a user wraps the stages
        for stage in model.blocks:
            run = stage.forward
            stage.forward = lambda tokens, run=run: checkpoint(run, tokens, use_reentrant=False)
    else:
        model.set_grad_checkpointing()
    torch.manual_seed(5)
    found = results(model, x)
    assert_near(found, expected)


@pytest.mark.filterwarnings("error:.*lru_cache")  # which the compiler warns of where the traced code has one
@pytest.mark.parametrize("name", COMPILED)
def test_compile_and_export(name: str) -> None:
    """The whole graph in one, and from a file, with the ops in it: the compiler, which traces the forward, finds those
    that export finds, which runs it."""
    model = accelerate(tiny(name), verbose=False)
    x = images(model)
    traced: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        traced.extend(called_ops(module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend=backend)(x)
        program, file = torch.export.export(model, (x,)), io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        exported = torch.export.load(file).module()(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    assert sorted(traced) == sorted(called_ops(program.graph)) != []


def called_ops(graph: torch.fx.Graph) -> list[str]:
    """The kernels' ops in a graph, each as often as it is there."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith("crossvit_kernels.")]


def test_a_compiled_model_trains() -> None:
    """Accelerated before and after torch.compile; the gradients of timm's model."""
    plain = tiny("crossvit_9_240")
    x = images(plain)
    expected = results(plain, x)
    for before in (True, False):
        model = copy.deepcopy(plain)
        if before:
            accelerate(model, verbose=False)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        if not before:
            accelerate(compiled, verbose=False)
        found = results(compiled, x)
        assert_near({key.removeprefix("_orig_mod."): value for key, value in found.items()}, expected)
    assert swapped(model)


@pytest.mark.filterwarnings("ignore")
def test_packaged_by_aot_inductor(tmp_path: Path) -> None:
    """Compiled for batches of any size into a file, which gives the same logits without the model."""
    model = accelerate(tiny("crossvit_9_240"), verbose=False)
    x, more = images(model), images(model, 5)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
        )
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (x, more):
            torch.testing.assert_close(loaded(batch), model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_onnx_runtime_gives_the_same_logits(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = accelerate(tiny(name), verbose=False)
    x = images(model)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
