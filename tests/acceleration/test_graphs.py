"""A model as a CUDA graph: the same results, weights as they are in place, and errors that say what is wrong."""

import pytest
import torch
from torch import Tensor, nn

import crossvit
import crossvit_kernels
from available import GPU
from crossvit_kernels import backends, graphed, layer_norm_mlp, triton_kernels
from inputs import EXAMPLES, Random

gpu = pytest.mark.gpu


class Layer(nn.Module):
    """A small model on the ops, with results in a container."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 64), nn.Linear(64, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
        mlp = (self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        y = layer_norm_mlp(x, self.norm.weight, self.norm.bias, *mlp, self.norm.eps)
        return {"y": (self.dropout(y), self.up(y).relu())}


@pytest.fixture
def layer() -> Layer:
    """A Layer in eval mode, its weights seeded."""
    torch.manual_seed(0)
    return Layer().eval()


def equal(found: dict[str, tuple[Tensor, ...]], expected: dict[str, tuple[Tensor, ...]]) -> None:
    """Both outputs of a Layer; a library may take another algorithm while it is captured."""
    for a, b in zip(found["y"], expected["y"], strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_in_training_mode_is_refused(layer: Layer) -> None:
    layer.dropout.train()
    with pytest.raises(ValueError, match=r"dropout in training mode; call model\.eval\(\) first"):
        graphed(layer, torch.zeros(2, 5, 32))
    with pytest.raises(ValueError, match="got Layer in training mode"):
        graphed(Layer(), torch.zeros(2, 5, 32))


def test_wrong_arguments_are_refused(layer: Layer) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        graphed(lambda x: x, torch.zeros(2, 5, 32))
    with pytest.raises(TypeError, match="example: expected a tensor, got tuple"):
        graphed(layer, (2, 5, 32))
    with pytest.raises(ValueError, match="warmup: expected at least 1, got 0"):
        graphed(layer, torch.zeros(2, 5, 32), warmup=0)


@pytest.mark.skipif(GPU, reason="there is a CUDA device")
def test_without_cuda_it_says_so(layer: Layer) -> None:
    with pytest.raises(RuntimeError, match="no CUDA device was found"):
        graphed(layer, torch.zeros(2, 5, 32))


@gpu
def test_an_example_on_the_cpu_is_refused(layer: Layer) -> None:
    with pytest.raises(ValueError, match="example: expected a tensor on a CUDA device, got one on cpu"):
        graphed(layer.cuda(), torch.zeros(2, 5, 32))


@gpu
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_it_equals_the_eager_model(layer: Layer, rng: Random, inference: bool) -> None:
    """Also for inputs in other strides, with gradients on, and in the other grad mode than that of the capture."""
    layer.cuda()
    with torch.inference_mode(inference):
        graph = graphed(layer, torch.zeros(2, 5, 32, device="cuda"))
    for _ in range(3):
        x = rng.normal(2, 32, 5).cuda().mT.requires_grad_()
        with torch.no_grad():
            expected = layer(x)
        found = graph(x)
        equal(found, expected)
        assert not found["y"][0].requires_grad
        with torch.inference_mode():
            equal(graph(x), expected)


@gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_it_equals_the_eager_crossvit(rng: Random, autocast: bool) -> None:
    """A graph that was captured under autocast stays so outside of it."""
    torch.manual_seed(0)
    model = crossvit.create_model("crossvit_tiny_240", num_classes=10).eval().cuda()
    x = rng.normal(2, 3, 240, 240).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        graph = graphed(model, torch.zeros_like(x))
        with torch.no_grad():
            expected = model(x)
    found = graph(x)
    tolerance = 2e-2 if autocast else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_it_sees_weights_that_are_changed_in_place(layer: Layer, rng: Random, autocast: bool) -> None:
    layer.cuda()
    x = rng.normal(2, 5, 32).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        graph = graphed(layer, x, clone=True)
        before = graph(x)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        found = graph(x)
        assert not torch.equal(found["y"][0], before["y"][0])
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        equal(found, layer(x))


@gpu
def test_the_output_is_overwritten_unless_cloned(layer: Layer, rng: Random) -> None:
    layer.cuda()
    x, other = rng.normal(2, 5, 32).cuda(), rng.normal(2, 5, 32).cuda()
    graph = graphed(layer, x)
    first = graph(x)["y"][0]
    assert graph(other)["y"][0] is first
    graph = graphed(layer, x, clone=True)
    first = graph(x)["y"][0]
    kept = first.clone()
    graph(other)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


@gpu
def test_replay_runs_on_the_last_input(layer: Layer, rng: Random) -> None:
    layer.cuda()
    x = rng.normal(2, 5, 32).cuda()
    graph = graphed(layer, x)
    out = graph(x)["y"][0]
    kept = out.clone()
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, kept, rtol=0, atol=0)


@gpu
def test_another_input_is_refused(layer: Layer) -> None:
    x = torch.zeros(2, 5, 32, device="cuda")
    graph = graphed(layer.cuda(), x)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 5, 32\).*got \(1, 5, 32\)"):
        graph(x[:1])
    with pytest.raises(ValueError, match=r"x: expected dtype torch\.float32.*got torch\.float16"):
        graph(x.half())
    with pytest.raises(ValueError, match=r"x: expected device cuda:0.*got cpu"):
        graph(x.cpu())
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        graph([x])


@gpu
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
@pytest.mark.parametrize("name", triton_kernels.OPS)
def test_ops_run_on_a_side_stream_and_in_a_captured_graph(name: str, kernels: str) -> None:
    """On a stream of their own the inputs become ready late: a kernel on another stream would read NaN."""
    if (why := backends.reason(kernels)) is not None:
        pytest.skip(why)
    op, given = getattr(crossvit_kernels, name), EXAMPLES[name]()
    tensors = {n: v.cuda() for n, v in given.items() if isinstance(v, Tensor)}
    others = {n: v for n, v in given.items() if not isinstance(v, Tensor)}
    differentiable = name != "cls_fusion"

    def call(values: dict[str, Tensor]) -> list[Tensor]:
        if not differentiable:
            with torch.no_grad():
                return [op(**values, **others, kernels=kernels)]
        leaves = {n: v.detach().requires_grad_() for n, v in values.items()}
        out = op(**leaves, **others, kernels=kernels)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]

    expected = call(tensors)
    late = {n: torch.full_like(v, torch.nan) for n, v in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for n, v in tensors.items():
            late[n].copy_(v)
        found = call(late)
    stream.synchronize()
    assert all(map(torch.equal, found, expected))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(late)
    for v in late.values():
        v.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert not found[0].isfinite().any()
    for n, v in tensors.items():
        late[n].copy_(v)
    graph.replay()
    assert all(map(torch.equal, found, expected))


@gpu
def test_it_is_not_trained_nor_moved(layer: Layer) -> None:
    graph = graphed(layer.cuda(), torch.zeros(2, 5, 32, device="cuda"))
    assert graph.eval() is graph
    with pytest.raises(RuntimeError, match="for inference"):
        graph.train()
    with pytest.raises(RuntimeError, match="convert the model itself"):
        graph.half()
