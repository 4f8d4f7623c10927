"""Write a CrossViT as an ONNX file and answer with ONNX Runtime, which needs neither PyTorch nor this package.

    python examples/export_and_serve_onnx.py
    python examples/export_and_serve_onnx.py --checkpoint fine_tuned/model.safetensors --out model.onnx

The file holds standard operators and takes any number of images. `crossvit export` writes it from the command line.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import skimage.data
import torch
from PIL import Image

import crossvit
from crossvit.cli.export import export_onnx
from crossvit.models.variants import IMAGENET_MEAN, IMAGENET_STD


def prepare(picture: Image.Image, side: int) -> np.ndarray:
    """The centre of a picture as the model's input, (3, side, side) float32: what a server does, without PyTorch."""
    length = min(picture.size)
    left, top = (picture.width - length) / 2, (picture.height - length) / 2
    square = picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + length, top + length))
    pixels = np.asarray(square, np.float32) / 255
    mean, deviation = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    return ((pixels - mean) / deviation).transpose(2, 0, 1)


def main() -> None:
    """Exports, serves batches of two sizes, and compares with the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="crossvit_tiny_240", help="with random weights (%(default)s)")
    parser.add_argument("--checkpoint", help="a file that crossvit.save_checkpoint wrote, instead of --model")
    parser.add_argument("--out", type=Path, default=Path("crossvit.onnx"), help="the file (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.checkpoint is None:
        model = crossvit.create_model(options.model)
    else:
        model, _ = crossvit.load_model(options.checkpoint)
    model.eval().requires_grad_(False)
    height, width = model.image_size

    export_onnx(model, torch.zeros(2, 3, height, width), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")

    session = onnxruntime.InferenceSession(options.out, providers=["CPUExecutionProvider"])
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    images = np.stack([prepare(Image.fromarray(pixels), height) for pixels in photographs])
    for batch in images[:1], images:
        (served,) = session.run(["logits"], {"images": batch})
        with torch.inference_mode():
            logits = model(torch.from_numpy(batch)).numpy()
        difference = np.abs(served - logits).max() / np.abs(logits).max()
        same = int((served.argmax(axis=1) == logits.argmax(axis=1)).sum())
        print(f"batch {len(batch)}: same answer for {same}, largest difference {difference:.1e} of the largest logit")


if __name__ == "__main__":
    main()
