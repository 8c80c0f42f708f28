"""`scenes`: drawn shapes that move, with everything a dense task could ask for known exactly.

A scene is a function of its number alone. Discs, squares and triangles lie at distinct depths over a shaded
ground, the nearer hiding the farther, and each moves by a whole number of pixels a frame, so boxes, masks,
depth and motion are exact to the pixel.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from effjax.data.builders.digits import png

SIZE = 64
FRAMES = 8
MOST_OBJECTS = 5
SHAPES = ("nothing", "disc", "square", "triangle")
GROUND_DEPTH = 10.0
SPLITS = {"train": range(0, 1024), "test": range(1024, 1280)}


class Scenes(tfds.core.GeneratorBasedBuilder):
    """Drawn scenes, 64x64, in eight frames.

    Fields, of frame 0 unless said otherwise (M = 5 objects at most, absent ones are zero):
      image `[64, 64, 3]` uint8, and video `[8, 64, 64, 3]` uint8, whose first frame is `image`.
      segmentation `[64, 64, 1]` uint8: the class at each pixel, 0 for the ground.
      instances `[64, 64, 1]` uint8: the object at each pixel, counted from 1, 0 for the ground.
      depth `[64, 64, 1]` float32: 10 for the ground, less for what is nearer.
      flow `[64, 64, 2]` float32: motion to frame 1 in pixels, (rows, columns).
      boxes `[M, 4]` float32: the visible part's (top, left, bottom, right) as a share of the image.
      classes `[M]` int32 (0 where there is no object) and velocity `[M, 2]` float32 in pixels a frame.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; TFDS's own look-up wants a package it does not require

    def _info(self) -> tfds.core.DatasetInfo:
        def packed(shape: tuple[int, ...], dtype: type) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="zlib")

        plane = (SIZE, SIZE)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn shapes with exact boxes, masks, depth and motion.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(*plane, 3), encoding_format="png"),
                    "video": packed((FRAMES, *plane, 3), np.uint8),
                    "segmentation": packed((*plane, 1), np.uint8),
                    "instances": packed((*plane, 1), np.uint8),
                    "depth": packed((*plane, 1), np.float32),
                    "flow": packed((*plane, 2), np.float32),
                    "boxes": tfds.features.Tensor(shape=(MOST_OBJECTS, 4), dtype=np.float32),
                    "classes": tfds.features.Tensor(shape=(MOST_OBJECTS,), dtype=np.int32),
                    "velocity": tfds.features.Tensor(shape=(MOST_OBJECTS, 2), dtype=np.float32),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(numbers) for split, numbers in SPLITS.items()}

    def _generate_examples(self, numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in numbers:
            scene = draw(number)
            yield number, scene | {"image": png(scene["image"])}


def draw(number: int) -> dict[str, np.ndarray]:
    """Returns scene `number` with the fields of `Scenes`."""
    rng = np.random.Generator(np.random.PCG64(number))
    count = int(rng.integers(1, MOST_OBJECTS + 1))
    kinds = rng.integers(1, len(SHAPES), count)
    centres = rng.integers(8, SIZE - 8, (count, 2))
    radii = rng.uniform(5.0, 14.0, count)
    # Far to near, which is the order of painting; a gap keeps the depths apart.
    depths = np.sort(rng.uniform(1.0, 8.0, count))[::-1] + 0.1 * np.arange(count)[::-1]
    velocities = rng.integers(-3, 4, (count, 2))
    colours = rng.integers(64, 256, (count, 3))
    tilt = rng.uniform(-1.0, 1.0, 2)

    ground = _ground(tilt)
    frames, instances = [], np.zeros((SIZE, SIZE), np.int64)
    for frame in range(FRAMES):
        picture, owner = ground.copy(), np.zeros((SIZE, SIZE), np.int64)
        for i in range(count):
            inside = _inside(int(kinds[i]), centres[i] + frame * velocities[i], float(radii[i]))
            picture[inside], owner[inside] = colours[i], i + 1
        frames.append(picture)
        instances = owner if frame == 0 else instances

    # What another object hides entirely is no object of frame 0; the others are renumbered.
    visible = [i for i in range(count) if (instances == i + 1).any()]
    renumber = np.zeros(count + 1, np.uint8)
    renumber[[i + 1 for i in visible]] = np.arange(1, len(visible) + 1)
    return {
        "image": frames[0],
        "video": np.stack(frames),
        "segmentation": np.append(0, kinds).astype(np.uint8)[instances][..., None],
        "instances": renumber[instances][..., None],
        "depth": np.append(GROUND_DEPTH, depths).astype(np.float32)[instances][..., None],
        "flow": np.concatenate([np.zeros((1, 2)), velocities]).astype(np.float32)[instances],
        "boxes": _rows([_box(instances == i + 1) for i in visible], (4,), np.float32),
        "classes": _rows([kinds[i] for i in visible], (), np.int32),
        "velocity": _rows([velocities[i] for i in visible], (2,), np.float32),
    }


def _ground(tilt: np.ndarray) -> np.ndarray:
    """A grey plane `[64, 64, 3]`, shaded along `tilt`, always darker than an object may be."""
    ramp = np.linspace(-1.0, 1.0, SIZE)
    shade = 32.0 + 12.0 * (tilt[0] * ramp[:, None] + tilt[1] * ramp[None, :])
    return np.repeat(shade[..., None], 3, axis=-1).astype(np.uint8)


def _inside(kind: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """Which pixel centres `[64, 64]` lie in a shape."""
    rows, columns = np.ogrid[:SIZE, :SIZE]
    down, right = rows - centre[0], columns - centre[1]
    match SHAPES[kind]:
        case "disc":
            return down**2 + right**2 <= radius**2
        case "square":
            return np.maximum(np.abs(down), np.abs(right)) <= radius
        case _:  # a triangle that stands on its base
            return (down <= radius) & (2 * np.abs(right) <= down + radius)


def _box(inside: np.ndarray) -> tuple[float, float, float, float]:
    """The tight box around a mask, as (top, left, bottom, right) shares of the image."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return rows[0] / SIZE, columns[0] / SIZE, (rows[-1] + 1) / SIZE, (columns[-1] + 1) / SIZE


def _rows(values: list[Any], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Pads a list to `[MOST_OBJECTS, *shape]` with zeros."""
    table: np.ndarray = np.zeros((MOST_OBJECTS, *shape), dtype)
    if values:
        table[: len(values)] = values
    return table
