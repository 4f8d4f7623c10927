"""From an RGB picture to a model's input: as in evaluation, or augmented for training."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from .classifier import to_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Transform = Callable[[Image.Image], Tensor]


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
    height, width = to_size(image_size)
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio must be above 0 and at most 1, got {crop_ratio!r}")
    cover = _Cover(int(height / crop_ratio), int(width / crop_ratio))
    return v2.Compose([cover, v2.CenterCrop([height, width]), *_to_tensor(mean, std)])


class _Cover:
    """Resizes a picture, its proportions kept, to the smallest that covers (height, width)."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.width * self.height >= image.height * self.width:
            size = (self.height * image.width // image.height, self.height)
        else:
            size = (self.width, self.width * image.height // image.width)
        return image.resize(size, Image.Resampling.BICUBIC)


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
