"""Arrays to Pillow images and back."""

from typing import Literal

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from effjax.errors import UsageError

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def to_pil(image: Shaped[np.ndarray, "height width channels"]) -> Image.Image:
    """One channel becomes mode L, three RGB.

    Raises:
      UsageError: for any other number of channels, and for what is not uint8.
    """
    if image.dtype != np.uint8 or image.shape[-1] not in (1, 3):
        raise UsageError(
            f"Resizing and RandAugment take uint8 images of 1 or 3 channels, not {image.dtype} of "
            f"{image.shape[-1]}: put them before normalize and to_float."
        )
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def from_pil(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    """Mode L keeps an axis of one channel."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resample(interpolation: Interpolation) -> Image.Resampling:
    """Pillow's name of an interpolation."""
    return Image.Resampling[interpolation.upper()]
