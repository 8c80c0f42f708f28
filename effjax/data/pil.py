"""Arrays to Pillow images and back."""

from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def to_pil(image: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    """One channel becomes mode L, three RGB."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def from_pil(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    """Mode L keeps an axis of one channel."""
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resample(interpolation: Interpolation) -> Image.Resampling:
    """Pillow's name of an interpolation."""
    return Image.Resampling[interpolation.upper()]
