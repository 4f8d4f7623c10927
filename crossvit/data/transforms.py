"""From an RGB picture to a model's input: as in evaluation, or augmented for training."""

import math
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from ..models.classifier import to_size
from ..models.variants import IMAGENET_MEAN, IMAGENET_STD

Transform = Callable[[Image.Image], Tensor]
_RESIZED = 1 << 25  # pixels of a resized picture, of which the centre is cut out; beyond it the centre alone is made
_SMALLEST = 1e-3  # crop ratio: of a photograph of 1000 pixels that is one


def evaluation_transform(
    image_size: int | tuple[int, int],
    crop_ratio: float = 0.875,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """RGB picture -> (3, H, W) float32: resized (bicubic, antialiased) until it covers image_size / crop_ratio, its
    centre cut out, normalised. A square `image_size` is timm's and the authors' evaluation: the shorter side decides.

    Raises ValueError or TypeError for a size or ratio that cannot be.
    """
    size = to_size(image_size)
    check_crop_ratio(crop_ratio)
    return v2.Compose([_Centre(*size, crop_ratio), *_to_tensor(mean, std)])


def check_crop_ratio(crop_ratio: float, name: str = "crop_ratio") -> None:
    """Raises ValueError for a ratio that is no part of a picture, or one of which nothing would be seen."""
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {crop_ratio!r}")
    if crop_ratio < _SMALLEST:
        raise ValueError(
            f"{name} must be at least {_SMALLEST:g}, a thousandth of the picture's side, got {crop_ratio!r}"
        )


class _Centre:
    """Resizes a picture, its proportions kept, to the smallest that covers (height, width) / ratio, and cuts out its
    centre (height, width)."""

    def __init__(self, height: int, width: int, ratio: float) -> None:
        self.height, self.width = height, width
        self.cover_height, self.cover_width = int(height / ratio), int(width / ratio)
        self.cut = v2.CenterCrop([height, width])

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.width * self.cover_height >= image.height * self.cover_width:
            size = (self.cover_height * image.width // image.height, self.cover_height)
        else:
            size = (self.cover_width, self.cover_width * image.height // image.width)
        if math.prod(size) <= _RESIZED:
            return self.cut(image.resize(size, Image.Resampling.BICUBIC))
        return self._centre_alone(image, size)

    def _centre_alone(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The centre of `image` at (width, height) = `size`, made without the rest, within 2 of 255."""
        x, left, right = _part(image.width, size[0], self.width)
        y, top, bottom = _part(image.height, size[1], self.height)
        box = x[0] - left, y[0] - top, x[1] - left, y[1] - top
        return image.crop((left, top, right, bottom)).resize((self.width, self.height), Image.Resampling.BICUBIC, box)


def _part(length: int, resized: int, cut: int) -> tuple[tuple[float, float], int, int]:
    """The pixels of one side that the middle `cut` of `resized` come from, as (first, past the last), and then the
    first and past the last that a bicubic filter reads for them. (Boxes are float32 in Pillow: they have to be small.)
    """
    step = length / resized
    first = round((resized - cut) / 2) * step
    last = first + cut * step
    margin = 3 * max(1, step)
    return (first, last), max(0, math.floor(first - margin)), min(length, math.ceil(last + margin))


def training_transform(
    image_size: int | tuple[int, int],
    *,
    crop_scale: float = 0.08,
    flip: float = 0.5,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    erasing: float = 0.25,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Transform:
    """RGB picture -> (3, H, W) float32 by timm's augmentation: random crop (bicubic), flip, policy or colours, erasing.

    auto_augment: timm's name of a policy, or "none". All of its randomness comes from the generators of random, numpy
    and torch. Raises ValueError for a policy that timm does not know.
    """
    import timm.data

    height, width = to_size(image_size)
    policy = None if auto_augment in ("", "none") else auto_augment
    try:
        transform = timm.data.create_transform(
            (3, height, width),
            is_training=True,
            scale=(crop_scale, 1.0),
            hflip=flip,
            auto_augment=policy,
            color_jitter=color_jitter,
            interpolation="bicubic",
            re_prob=erasing,
            re_mode="pixel",
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"auto_augment must be 'none' or a policy of timm's, got {auto_augment!r}: {error}") from error
    for step in transform.transforms:
        for operation in [*getattr(step, "ops", []), *chain.from_iterable(getattr(step, "policy", []))]:
            if operation.aug_fn is timm.data.auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
    """timm's, which asks for 0 bits at the magnitudes above 9: Pillow made that black, and from 13 on refuses it."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
