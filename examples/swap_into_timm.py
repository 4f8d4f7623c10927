"""Make a model of timm's faster, in place: the same weights, the same answers, less time.

    python examples/swap_into_timm.py
    python examples/swap_into_timm.py --model deit_tiny_patch16_224 --batch 8 --pretrained

Weights are random without --pretrained, which asks timm's hub for its own.
"""

import argparse
import copy
import statistics
import time

import skimage.data
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import crossvit_kernels


def seconds(model: nn.Module, images: Tensor) -> float:
    """The time of one forward."""
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


def main() -> None:
    """Compares a model with its accelerated copy, and times both in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="crossvit_9_240", help="a model of timm's (%(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--batch", type=int, default=3, metavar="N", help="images a forward (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns that each is timed (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)

    model = timm.create_model(options.model, pretrained=options.pretrained).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    photographs = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]
    pictures = [Image.fromarray(photographs[i % len(photographs)]) for i in range(options.batch)]
    images = torch.stack([prepare(picture) for picture in pictures])  # (B, 3, H, W), normalised as the model wants it

    # This is all that it takes. It prints what it swapped and what it left; restore(model) would undo it.
    accelerated = crossvit_kernels.accelerate(copy.deepcopy(model))

    with torch.inference_mode():
        before, after = model(images), accelerated(images)
        difference = (after - before).abs().max() / before.abs().max()
        print(f"largest difference of the logits: {difference:.1e} of the largest logit")
        print(f"same top-1 for {int((after.argmax(1) == before.argmax(1)).sum())} of {len(images)} images")

        # In turn: what else the machine does meets both alike.
        turns = [(seconds(model, images), seconds(accelerated, images)) for _ in range(options.rounds)]
    timms, ours = (statistics.median(times) for times in zip(*turns))
    print(f"timm {len(images) / timms:.1f} images/s, accelerated {len(images) / ours:.1f}: {timms / ours:.2f} times")


if __name__ == "__main__":
    main()
