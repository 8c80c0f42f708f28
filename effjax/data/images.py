"""Image transforms: frozen dataclasses from example to example, on the field `image` `[H, W, C]`.

Those that move pixels (resize, crop, flip, shift) do not move boxes, masks or flow: dense tasks take them
out, or carry their targets along themselves. The table of kinds also has what reads other fields.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Shaped

from effjax.data.augment import RandAugment
from effjax.data.captions import OneHotText
from effjax.data.pil import Interpolation, from_pil, resample, to_pil
from effjax.data.records import Example
from effjax.errors import UsageError

ImageNetMean = (0.485, 0.456, 0.406)
ImageNetStd = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes to `size` (height, width), whatever the shape was; antialiased where it shrinks."""

    size: tuple[int, int]
    interpolation: Interpolation = "bicubic"
    random: ClassVar[bool] = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` `[*size, C]`."""
        return example | {"image": resize(example["image"], self.size, self.interpolation)}


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Evaluation's crop: the short side is resized to `floor(size / crop)`, then the middle is cut out.

    Args:
      size: height and width of the result.
      crop: the share of the short side that is kept; 0.875 makes 256 of 224.
    """

    size: int
    crop: float = 0.875
    interpolation: Interpolation = "bicubic"
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0.0 < self.crop <= 1.0:
            raise UsageError(f"crop={self.crop} must be a share above 0 and at most 1.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` `[size, size, C]`."""
        height, width = example["image"].shape[:2]
        short = math.floor(self.size / self.crop)
        if height <= width:
            scaled = (short, int(short * width / height))
        else:
            scaled = (int(short * height / width), short)
        image = resize(example["image"], scaled, self.interpolation)
        top, left = round((scaled[0] - self.size) / 2), round((scaled[1] - self.size) / 2)
        return example | {"image": image[top : top + self.size, left : left + self.size]}


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """The Inception crop (Szegedy et al., 2014, arXiv:1409.4842, section 6), as ImageNet recipes use it.

    The area is uniform in `scale` times the image's and the aspect ratio log-uniform in `ratio`; ten tries
    are made to find one that fits, after which the largest centred crop within `ratio` is taken.

    Args:
      size: height and width of the result.
      scale: bounds of the cropped share of the area.
      ratio: bounds of width over height.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    random: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` `[size, size, C]`."""
        image = example["image"]
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        cropped = image[top : top + height, left : left + width]
        return example | {"image": resize(cropped, (self.size, self.size), self.interpolation)}

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draws (top, left, height, width) of the crop."""
        low, high = self.ratio
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
                return int(top), int(left), crop_height, crop_width
        crop_height = min(height, max(1, round(width / low)))
        crop_width = min(width, max(1, round(height * high)))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right with a probability."""

    probability: float = 0.5
    random: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` of the same shape."""
        if rng.random() < self.probability:
            return example | {"image": example["image"][:, ::-1]}
        return example


@dataclasses.dataclass(frozen=True)
class RandomShift:
    """Moves the image by up to `pixels` rows and columns, each uniform, and fills with zeros."""

    pixels: int = 1
    random: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` of the same shape."""
        choices = 2 * self.pixels + 1
        down, right = int(rng.random() * choices) - self.pixels, int(rng.random() * choices) - self.pixels
        return example | {"image": shift(example["image"], down, right)}


@dataclasses.dataclass(frozen=True)
class RandomErasing:
    """Replaces a random rectangle by normal noise (Zhong et al., 2017, arXiv:1708.04896, as timm runs it).

    Comes after `normalize`: the noise is standard normal, one value a pixel and channel. Ten tries are made
    to find a rectangle smaller than the image.

    Args:
      probability: that an image is erased at all.
      area: bounds of the erased share of the image.
      aspect: bounds of height over width, drawn log-uniformly.
    """

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    random: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `image` of the same shape.

        Raises:
          UsageError: for an image of integers.
        """
        image = example["image"]
        if image.dtype != np.float32:
            raise UsageError("random_erasing fills with normal noise: put it after normalize.")
        if rng.random() >= self.probability:
            return example
        height, width, channels = image.shape
        for _ in range(10):
            area = height * width * rng.uniform(*self.area)
            aspect = math.exp(rng.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if rows < height and columns < width:
                top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
                erased = image.copy()
                noise = rng.standard_normal((rows, columns, channels), dtype=np.float32)
                erased[top : top + rows, left : left + columns] = noise
                return example | {"image": erased}
        return example


@dataclasses.dataclass(frozen=True)
class Normalize:
    """`(image / 255 - mean) / std`, uint8 to float32; one mean and std a channel, or one for all."""

    mean: tuple[float, ...] = ImageNetMean
    std: tuple[float, ...] = ImageNetStd
    random: ClassVar[bool] = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with a float32 `image`.

        Raises:
          UsageError: for another number of channels, or an image that is float already.
        """
        image = _bytes_image(example["image"], "normalize")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, image.shape[-1]):
                raise UsageError(
                    f"normalize has {len(values)} values in {name} for images of {image.shape[-1]} channels."
                )
        scale = 1.0 / (255.0 * np.asarray(self.std))
        offset = np.asarray(self.mean) / np.asarray(self.std)
        return example | {"image": image * scale.astype(np.float32) - offset.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class ToFloat:
    """Scales uint8 to float32 in [-1, 1], as diffusion models take pixels."""

    random: ClassVar[bool] = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with a float32 `image`."""
        image = _bytes_image(example["image"], "to_float")
        return example | {"image": image * np.float32(1 / 127.5) - np.float32(1.0)}


def resize(
    image: Shaped[np.ndarray, "height width channels"], size: tuple[int, int], interpolation: Interpolation
) -> Shaped[np.ndarray, "new_height new_width channels"]:
    """Resizes by Pillow; `size` is (height, width).

    Raises:
      UsageError: for what Pillow cannot hold: other than uint8 with one channel or three.
    """
    if image.shape[:2] == size:
        return image
    return from_pil(to_pil(image).resize(size[::-1], resample(interpolation)))


def shift(
    image: Shaped[np.ndarray, "height width channels"], down: int, right: int
) -> Shaped[np.ndarray, "height width channels"]:
    """Moves an image by whole pixels (up and left where negative) and fills with zeros."""
    height, width = image.shape[:2]
    down, right = max(-height, min(down, height)), max(-width, min(right, width))
    moved = np.zeros_like(image)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def _bytes_image(image: np.ndarray, asked_by: str) -> np.ndarray:
    if image.dtype != np.uint8:
        raise UsageError(
            f"{asked_by} takes uint8 images, not {image.dtype}: only one transform may make floats."
        )
    return image


KINDS = {
    "resize": Resize,
    "center_crop": CenterCrop,
    "random_resized_crop": RandomResizedCrop,
    "random_flip": RandomFlip,
    "random_shift": RandomShift,
    "rand_augment": RandAugment,
    "random_erasing": RandomErasing,
    "normalize": Normalize,
    "to_float": ToFloat,
    "one_hot_text": OneHotText,
}
