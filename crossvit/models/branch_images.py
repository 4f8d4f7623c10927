"""The image that a branch of a CrossViT sees: its size, and the cut that it may be."""

from torch import Tensor


def branch_size(image_size: tuple[int, int], scale: float, patch_size: int) -> tuple[int, int]:
    """(height, width) of a branch's image: the input's times `scale`, each rounded to the nearest multiple of
    `patch_size`.
    """
    height, width = (max(1, round(side * scale / patch_size)) * patch_size for side in image_size)
    return height, width


def centre_crop(images: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The centre, of this size, of images (B, C, *image_size), as timm's `crop_scale` cuts it; smaller images come back
    whole.
    """
    (height, width), (h, w) = image_size, size
    if h > height or w > width:
        return images
    top, left = round((height - h) / 2), round((width - w) / 2)
    return images[:, :, top : top + h, left : left + w]
