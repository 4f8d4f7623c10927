"""What a user would run instead of our kernels: timm eager and compiled, ONNX Runtime, OpenVINO, on the same weights.

Each builder takes the float32 timm model in eval mode, the float32 images and the dtype to compute in, does all its
preparation (cast, export, compilation), and returns a call without arguments that makes one forward pass over all the
images and gives the logits, (batch, classes), as a torch tensor. A builder that cannot serve raises with the reason.
"""

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from weakref import WeakKeyDictionary

import timm
import torch
from torch import Tensor, nn

from .session import UnsupportedError

Run = Callable[[], Tensor]


def timm_model(name: str) -> nn.Module:
    """timm's model `name` in eval mode, float32, with random weights that make every parameter count.

    Weights are timm's initialisation times two, so that attention is far from uniform; biases, positions and CLS
    tokens get noise of 0.02, norms of 0.1. Logits of two photographs then differ by about 0.3 of the largest logit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if id(parameter) in norms:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                elif parameter.ndim == 1 or parameter_name.startswith(("pos_embed", "cls_token")):
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
                else:
                    parameter.mul_(2)
    return model


def inference(model: Callable[[Tensor], Tensor], images: Tensor) -> Run:
    """A forward pass of a torch module in inference mode."""

    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def timm_eager(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    return inference(copy.deepcopy(model).to(dtype), images.to(dtype))


def timm_compiled(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    """torch.compile, on a GPU with all its tuning (a CUDA graph is made of it elsewhere, where one is asked for); on a
    CPU with inductor's freezing (weights packed beforehand), as PyTorch advises for inference there."""
    import torch._inductor.config as inductor

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no word on a missing GPU amid the bar
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs" if images.is_cuda else None
    compiled = torch.compile(copy.deepcopy(model).to(dtype), dynamic=False, mode=mode)
    run = inference(compiled, images.to(dtype))
    if images.is_cuda:
        run()
        return run
    with inductor.patch(freezing=True):
        run()
    return run


def onnxruntime(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    if dtype != torch.float32:
        raise UnsupportedError(f"its CPU provider has no {_name(dtype)} kernels for these operators")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads may spin within a run, but not on into the turn of the next candidate.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(_exported(model, images)), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Run:
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    import openvino as ov

    core = ov.Core()
    if dtype != torch.float32 and precision.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnsupportedError(f"its CPU plugin does not compute in {precision} on this processor")
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(str(_exported(model, images)), "CPU", hints).create_infer_request()
    feed = [images.numpy()]
    return lambda: torch.from_numpy(request.infer(feed)[0])


PEERS: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Run]] = {
    "timm-eager": timm_eager,
    "timm-compiled": timm_compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}

GPU_PEERS = ("timm-eager", "timm-compiled")

_exports: WeakKeyDictionary[nn.Module, tempfile.TemporaryDirectory[str]] = WeakKeyDictionary()


def _exported(model: nn.Module, images: Tensor) -> Path:
    """The ONNX file of `model` for exactly this input shape, made once and kept as long as the model lives."""
    if model not in _exports:
        _exports[model] = tempfile.TemporaryDirectory(prefix="crossvit-onnx-")
    path = Path(_exports[model].name) / ("x".join(map(str, images.shape)) + ".onnx")
    if not path.exists():
        with _quiet():
            program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
        assert program is not None  # it is for dynamo=True
        program.save(path)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its stages and warns about operators that are not there; a progress bar is on the screen."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
