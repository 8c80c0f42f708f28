"""Video transforms: frozen dataclasses from example to example, on the field `video` `[F, H, W, C]`."""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from effjax.data.records import Example
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Clip:
    """Cuts frames out of a video, makes them smaller by whole areas, and scales bytes to [-1, 1].

    Every pixel of the result is the mean of a square of the source.

    Attributes:
      frames: how many, from the first one on; None takes all.
      every: frames of the source from one to the next.
      size: height and width of the result, which must divide those of the source; None leaves them.
    """

    frames: int | None = None
    every: int = 1
    size: int | None = None
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("frames", "every", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with a float32 `video` of this shape.

        Raises:
          UsageError: for what is no video of bytes, has too few frames, or does not divide.
        """
        video = bytes_video(example, "clip")
        frames = -(-len(video) // self.every) if self.frames is None else self.frames
        reach = (frames - 1) * self.every + 1
        if reach > len(video):
            raise UsageError(
                f"clip takes {frames} frames, every {self.every}, which is {reach} of the source, and its "
                f"videos have {len(video)}: take fewer."
            )
        video = video[: reach : self.every]
        height, width = video.shape[1:3]
        size = (height, width) if self.size is None else (self.size, self.size)
        if height % size[0] or width % size[1]:
            raise UsageError(
                f"clip makes videos of {size[0]} x {size[1]} out of {height} x {width}, which it does not "
                f"divide: choose a size that divides both sides."
            )
        return example | {"video": shrunk(video, size) * np.float32(1 / 127.5) - np.float32(1.0)}


@dataclasses.dataclass(frozen=True)
class FlipVideo:
    """Mirrors a video left and right, turns it upside down and runs it backwards, each or not at random.

    Attributes:
      horizontal: probability of the first.
      vertical: of the second.
      backwards: of the third.
    """

    horizontal: float = 0.5
    vertical: float = 0.0
    backwards: float = 0.0
    random: ClassVar[bool] = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with `video` of the same shape."""
        chances = (self.backwards, self.vertical, self.horizontal)
        steps = tuple(slice(None, None, -1 if rng.random() < chance else 1) for chance in chances)
        return example | {"video": example["video"][steps]}


def shrunk(
    video: np.ndarray, size: tuple[int, int]
) -> Float[np.ndarray, "frames new_height new_width channels"]:
    """Means over the squares that fall on one pixel of the result, in float32."""
    frames, height, width, channels = video.shape
    cut = (frames, size[0], height // size[0], size[1], width // size[1], channels)
    return video.reshape(cut).mean((2, 4), dtype=np.float32)


def bytes_video(example: Example, asked_by: str) -> np.ndarray:
    """The field `video`, which must be bytes of four axes.

    Raises:
      UsageError: saying what is wrong with it.
    """
    if "video" not in example:
        raise UsageError(
            f"{asked_by} takes the field 'video', and the source has {', '.join(example)}: choose another "
            f"data set, or name the field among those of the source."
        )
    video = np.asarray(example["video"])
    if video.ndim != 4 or video.dtype != np.uint8:
        raise UsageError(
            f"{asked_by} takes uint8 videos [frames, height, width, channels], not {video.dtype} "
            f"{list(video.shape)}."
        )
    return video


KINDS = {"clip": Clip, "flip_video": FlipVideo}
