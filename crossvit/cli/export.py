"""`crossvit export`: a model's weights for timm or the authors' code, or the model as an ONNX or torch.export file.

What can be run is compared with the model before the file gets its name.
"""

import argparse
import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..system.failures import CommandError
from ..system.files import patient_file, replacing
from ..system.text import print_line, printable
from ..weights.checkpoint import LAYOUTS, save_checkpoint
from .commands import Loaded, add_class_argument, add_model_arguments, check_fits, check_writable, load

WEIGHTS = (".safetensors", ".pth")
PROGRAMS = (".onnx", ".pt2")
# Largest difference from the model's logits over the largest logit; correct exports stay at a tenth of it.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "output",
        metavar="FILE",
        help="NAME.safetensors or NAME.pth: weights; NAME.onnx: for ONNX Runtime and others; NAME.pt2: torch.export",
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="timm", help="whose names weights have (default: %(default)s)"
    )
    parser.add_argument(
        "--fixed-batch",
        type=int,
        metavar="N",
        help="an .onnx or .pt2 file for batches of N only (default: of any size)",
    )
    add_class_argument(parser)
    add_model_arguments(parser)
    parser.epilog = (
        "An .onnx file holds standard operators whatever --kernels is. A .pt2 file holds the kernels' ops, and loads "
        "where crossvit_kernels is imported; with --kernels reference it is plain PyTorch and loads anywhere."
    )


def run(options: argparse.Namespace) -> int:
    """0."""
    path = Path(options.output)
    if path.suffix not in WEIGHTS + PROGRAMS:
        raise CommandError(f"FILE must end in {', '.join(WEIGHTS + PROGRAMS)}, got {options.output}")
    if options.fixed_batch is not None and options.fixed_batch < 1:
        raise CommandError(f"--fixed-batch must be at least 1, got {options.fixed_batch}")
    if path.suffix in PROGRAMS and options.layout != "timm":
        raise CommandError(f"--layout is for weights ({', '.join(WEIGHTS)}), got {options.output}")
    check_writable("FILE", options.output)
    loaded = load(options)
    told = _write(loaded, path, options)
    print_line(f"{printable(path)}: {path.stat().st_size / 1e6:.1f} MB{told}")
    return 0


def _write(loaded: Loaded, path: Path, options: argparse.Namespace) -> str:
    """Writes the file; returns what there is to say about it."""
    if path.suffix in WEIGHTS:
        noted = dict(classes=loaded.classes, crop_ratio=loaded.crop_ratio, multi_label=loaded.multi_label or None)
        save_checkpoint(loaded.model, path, options.layout, **noted)  # type: ignore[arg-type]
        names = ", the authors' names" if options.layout == "authors" else ", timm's names"
        if path.suffix == ".pth" and loaded.classes:
            return f"{names}; a .pth file has no place for class names, a .safetensors file has"
        return names
    batch = options.fixed_batch or 2
    numbers = batch * loaded.model.in_chans * math.prod(loaded.model.image_size)
    option = f"--fixed-batch {batch}: its" if options.fixed_batch else f"the {batch}"
    check_fits(f"{option} images to compare with", 4 * numbers)
    images = torch.randn(batch, loaded.model.in_chans, *loaded.model.image_size, device=loaded.device).to(loaded.dtype)
    model = loaded.model.requires_grad_(False)
    with replacing(path) as temporary, torch.no_grad():
        if path.suffix == ".onnx":
            export_onnx(model, images, temporary, dynamic=options.fixed_batch is None)
            runs = _onnx_runner(temporary)
        else:
            export_program(model, images, temporary, dynamic=options.fixed_batch is None)
            with open(temporary, "rb") as file:  # by name it would want the suffix
                runs = torch.export.load(file).module()
        if runs is None:
            return "; not compared with the model: onnxruntime is not installed"
        if options.fixed_batch is None:
            images = torch.cat((images, images[:1].flip(-1)))
        off = difference(runs, model, images)
        if not off <= TOLERANCE[loaded.dtype]:
            raise CommandError(f"the exported model's outputs are {off:.2g} of the largest off; nothing was written")
    by = "ONNX Runtime's" if path.suffix == ".onnx" else "its"
    return f"; {by} outputs are the model's within {off:.1g} of the largest"


def export_onnx(model: nn.Module, images: Tensor, path: Path, *, dynamic: bool = True) -> None:
    """Writes `model` as an ONNX file of standard operators, input "images", output "logits". images: an example (B, C,
    H, W); with `dynamic`, for B of any size. Raises CommandError without onnx and onnxscript, or in another dtype than
    float32.
    """
    if images.dtype != torch.float32:
        raise CommandError(f"ONNX files are written in float32, got --dtype {str(images.dtype).removeprefix('torch.')}")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CommandError(f"{error}: an .onnx file needs onnx and onnxscript") from error
    with _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=_dynamic(dynamic),
        )
        assert program is not None  # it is for dynamo=True
        program.save(str(path), external_data=False)


def export_program(model: nn.Module, images: Tensor, path: Path, *, dynamic: bool = True) -> None:
    """Writes `model` as torch.export's file. images: an example (B, C, H, W); with `dynamic`, for B of any size."""
    with _quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=_dynamic(dynamic))
        with patient_file(path) as file:
            torch.export.save(program, file)


def difference(exported: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor) -> float:
    """The largest difference of the two outputs over the model's largest."""
    expected = model(images).double()
    return float((exported(images).double() - expected).abs().max() / expected.abs().max())


def _dynamic(dynamic: bool) -> tuple[dict[int, torch.export.Dim]] | None:
    return ({0: torch.export.Dim("batch")},) if dynamic else None


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    name: str | bytes = str(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a name that is not UTF-8, with which the runtime opens nothing
        name = path.read_bytes()
    session = onnxruntime.InferenceSession(name, settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0]).to(images.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its stages, and warns about operators that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
