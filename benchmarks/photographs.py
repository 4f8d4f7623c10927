"""Real photographs as model inputs, from files inside the scikit-image and scikit-learn wheels (no download)."""

import functools

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@functools.cache
def _sources() -> tuple[Image.Image, ...]:
    import skimage.data
    from sklearn.datasets import load_sample_images

    arrays = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), *load_sample_images().images]
    return tuple(Image.fromarray(array) for array in arrays)


def photographs(count: int, size: int | tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `count` distinct ImageNet-normalised crops, (count, 3, H, W), of five photographs.

    The result is deterministic and image `i` does not depend on `count`: image `i` is crop `i // 5` of photograph
    `i % 5`; crop 0 is the largest centred one, later ones are 0.5 to 0.95 of its side, at a random place, every other
    one mirrored. Crops have the target's aspect ratio and are resampled (bicubic, antialiased) to `size`, an int or
    (H, W).

    Raises TypeError or ValueError for a count, size or dtype that cannot be served.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {size}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    images = np.empty((count, height, width, 3), np.uint8)
    for i in range(count):
        images[i] = np.asarray(_crop(i, height, width))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalised = (torch.from_numpy(images).float() / 255 - mean) / std
    return normalised.permute(0, 3, 1, 2).contiguous().to(dtype)


def _crop(index: int, height: int, width: int) -> Image.Image:
    sources = _sources()
    source, crop = sources[index % len(sources)], index // len(sources)
    scale = min(source.width / width, source.height / height)
    x = y = 0.5
    if crop:
        side, x, y = np.random.default_rng(index).random(3)
        scale *= 0.5 + 0.45 * side
    left, top = x * (source.width - scale * width), y * (source.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = source.resize((width, height), Image.Resampling.BICUBIC, box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop % 2 else image
