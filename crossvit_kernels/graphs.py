"""A model's inference as one CUDA graph: at small batches the GPU waits for the host, which a graph does not ask."""

from typing import Any

import torch
from torch import Tensor, nn

from .dispatch.torch_internals import tree_leaves, tree_map_only


class GraphedModule(nn.Module):
    """A model whose forward for inputs of one shape, dtype and device is the replay of a CUDA graph; see `graphed`."""

    def __init__(self, model: nn.Module, example: Tensor, warmup: int, clone: bool) -> None:
        super().__init__()
        self.model, self.clone = model, clone
        # Not inference tensors, even where the caller is in inference mode: calls write into them outside of it, too.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(example.device):
            self._input = example.detach().clone()
            # Weights that autocast keeps between calls lie outside the graph and would be gone when it is replayed.
            with torch.autocast(
                "cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
            ):
                self.graph, self._output = _captured(model, self._input, warmup)
        for leaf in tree_leaves(self._output):
            if not isinstance(leaf, (Tensor, type(None))):
                raise TypeError(
                    f"model: expected to return tensors, or tuples, lists and dicts of them, got {type(leaf).__name__}"
                )
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """The model's output for x; without `clone` the memory that the next call writes."""
        self._check(x)
        with torch.no_grad():
            self._input.copy_(x)
        self.replay()
        return tree_map_only(Tensor, torch.clone, self._output) if self.clone else self._output

    def replay(self) -> None:
        """Runs the graph on the input that is there, the last call's: for benchmarks."""
        with torch.cuda.device(self._input.device):
            self.graph.replay()

    def train(self, mode: bool = True) -> "GraphedModule":
        """Only train(False): the graph is inference. Raises RuntimeError otherwise."""
        if mode:
            raise RuntimeError("a graphed model is for inference: train the model itself, and graph it again")
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "GraphedModule":
        raise RuntimeError(
            "a graphed model keeps its memory, dtype and device: convert the model itself, and graph it again"
        )

    def _check(self, x: Tensor) -> None:
        expected = self._input
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        for name in ("shape", "dtype", "device"):
            if (found := getattr(x, name)) != (captured := getattr(expected, name)):
                found, captured = (tuple(v) if name == "shape" else v for v in (found, captured))
                raise ValueError(f"x: expected {name} {captured}, which the graph was captured with, got {found}")


def graphed(model: nn.Module, example: Tensor, *, warmup: int = 3, clone: bool = False) -> GraphedModule:
    """`model` for inference on inputs like `example`, captured once as a CUDA graph that every call replays.

    The graph holds the addresses of the model's weights. What is written into them in place (an optimizer's step,
    load_state_dict, copy_) the next call computes with; weights that are replaced (model.to(), assign=True, a new
    Parameter) it does not see: graph the model again. Captured under autocast, the graph is autocast, wherever it is
    called. The model must not depend on values on the host, and it runs `warmup` + 1 times here.

    Args:
        model: takes one tensor and returns a tensor or tuples, lists and dicts of tensors; in eval mode.
        example: a tensor on a CUDA device; its shape, dtype and device are those of all inputs, its values do not
            matter.
        warmup: calls before the capture, in which kernels are compiled and libraries loaded; at least 1.
        clone: return a copy of the output; otherwise it is the same memory at every call, which **the next call
            overwrites**.

    Returns:
        a module that is called as the model is, with `.replay()` for benchmarks and the model as `.model`. Inputs of
        another shape, dtype or device raise ValueError.

    Raises:
        TypeError, ValueError: an argument's type, device or value is wrong, or the model is not in eval mode;
            RuntimeError: there is no CUDA device, or the model does what a graph cannot hold (PyTorch says what).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1, got {warmup}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"model: expected a model in eval mode, got {name or type(model).__name__} in training mode; call "
                "model.eval() first"
            )
    if not torch.cuda.is_available():
        raise RuntimeError("graphed needs CUDA graphs: no CUDA device was found")
    if not example.is_cuda:
        raise ValueError(f"example: expected a tensor on a CUDA device, got one on {example.device}")
    return GraphedModule(model, example, warmup, clone)


def _captured(model: nn.Module, static: Tensor, warmup: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of model(static), in memory of its own, and the output that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads (a data loader that pins memory) may go on meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        output = model(static)
    return graph, output
