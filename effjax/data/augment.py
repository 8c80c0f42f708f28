"""RandAugment (Cubuk et al., 2019, arXiv:1909.13719), with the scales that ImageNet recipes train with.

The recipes write it `rand-m9-mstd0.5-inc1`: two operations an image, each applied with probability one half
at a magnitude drawn from a normal distribution around 9 of 10, every operation growing harder with it.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from effjax.data.pil import Interpolation, from_pil, resample, to_pil
from effjax.data.records import Example

MAX_MAGNITUDE = 10.0


@dataclasses.dataclass(frozen=True)
class Canvas:
    """How an operation that moves pixels reads between them, and what it fills with."""

    interpolation: Image.Resampling
    fill: tuple[int, ...]

    def affine(self, image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
        """Output (x, y) is read at `(a x + b y + c, d x + e y + f)`."""
        fill = self.fill if image.mode == "RGB" else round(sum(self.fill) / len(self.fill))
        transform = Image.Transform.AFFINE
        return image.transform(image.size, transform, matrix, self.interpolation, fillcolor=fill)

    def rotate(self, image: Image.Image, degrees: float) -> Image.Image:
        """Turns about the centre."""
        fill = self.fill if image.mode == "RGB" else round(sum(self.fill) / len(self.fill))
        return image.rotate(degrees, self.interpolation, fillcolor=fill)


# image, strength in [-1, 1] whose sign is random, canvas. Operations that have no direction take |strength|.
Operation = Callable[[Image.Image, float, Canvas], Image.Image]


def _enhance(kind: type) -> Operation:
    """The factor is 1 where nothing changes, and at most 0.9 away from it."""
    return lambda image, s, canvas: kind(image).enhance(max(0.1, 1.0 + 0.9 * s))


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    """Adds up to 110 to every value below 128."""
    add = int(110 * strength)
    table = [min(255, value + add) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    """Keeps the top `4 - int(4 strength)` bits; with none left the image is black."""
    bits = 4 - int(4 * strength)
    return ImageOps.posterize(image, bits) if bits else image.point([0] * 256 * len(image.getbands()))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, s, canvas: ImageOps.autocontrast(image),
    "equalize": lambda image, s, canvas: ImageOps.equalize(image),
    "invert": lambda image, s, canvas: ImageOps.invert(image),
    "rotate": lambda image, s, canvas: canvas.rotate(image, 30.0 * s),
    "posterize": lambda image, s, canvas: _posterize(image, abs(s)),
    "solarize": lambda image, s, canvas: ImageOps.solarize(image, 256 - int(256 * abs(s))),
    "solarize_add": lambda image, s, canvas: _solarize_add(image, abs(s)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, s, canvas: canvas.affine(image, (1.0, 0.3 * s, 0.0, 0.0, 1.0, 0.0)),
    "shear_y": lambda image, s, canvas: canvas.affine(image, (1.0, 0.0, 0.0, 0.3 * s, 1.0, 0.0)),
    "translate_x": lambda image, s, canvas: canvas.affine(
        image, (1.0, 0.0, 0.45 * s * image.width, 0.0, 1.0, 0.0)
    ),
    "translate_y": lambda image, s, canvas: canvas.affine(
        image, (1.0, 0.0, 0.0, 0.0, 1.0, 0.45 * s * image.height)
    ),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies random operations of `OPERATIONS` to a uint8 `image`.

    Args:
      count: how many operations are drawn, with replacement (n).
      magnitude: their mean strength, of 10 (m).
      magnitude_std: the standard deviation of the strength, which is cut to [0, 10] (mstd).
      probability: that a drawn operation is applied.
      fill: the colour that comes in from outside; the default is ImageNet's mean.
    """

    count: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    probability: float = 0.5
    fill: tuple[int, ...] = (124, 116, 104)
    interpolation: Interpolation = "bicubic"
    random: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` of the same shape."""
        canvas = Canvas(resample(self.interpolation), self.fill)
        image = to_pil(example["image"])
        for operation in rng.choice(list(OPERATIONS), self.count):
            if rng.random() < self.probability:
                magnitude = np.clip(rng.normal(self.magnitude, self.magnitude_std), 0.0, MAX_MAGNITUDE)
                sign = 1.0 if rng.random() < 0.5 else -1.0
                image = OPERATIONS[operation](image, float(sign * magnitude / MAX_MAGNITUDE), canvas)
        return example | {"image": from_pil(image)}
